"""One real GRPO step of each decoder family, with the reward of every token against an independent forward."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig

from mechreward.models import find_blocks
from mechreward.reward import FeatureReward
from mechreward.training import DenseConfig

WEIGHTS = {3: 1.0, 7: -0.5, 11: 2.0, 40: 1.0, 60: -1.5}
LORA = LoraConfig(r=2, lora_dropout=0.0, task_type="CAUSAL_LM")
FAMILIES = [
    "llama",
    "mistral",
    "gemma2",
    "deepseek_v3",
    "qwen3_5",
    "qwen3_5_image_text",
    "qwen3_5_moe",
    "gemma4",
    "gemma4_image_text",
]


def even_tokens(completion_ids, **_) -> list[float]:
    return [sum(1.0 for token in ids if token % 2 == 0) / len(ids) for ids in completion_ids]


@torch.no_grad()
def whole_forward(model, reward: FeatureReward, prompt: torch.Tensor, completion: torch.Tensor) -> torch.Tensor:
    """Rewards from one plain forward of the whole model over one row, hooked by hand."""
    kept = []
    handle = find_blocks(model)[reward.layer].register_forward_hook(
        lambda _m, _i, output: kept.append(output[0] if isinstance(output, tuple) else output)
    )
    model.eval()(input_ids=torch.cat([prompt, completion])[None], use_cache=False)
    handle.remove()
    acts = reward.sae.encode(kept[0][0, len(prompt) :])
    return sum(weight * acts[:, i] for i, weight in WEIGHTS.items())


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("family", [*FAMILIES, "gpt2"])
def test_one_step(family, lora, tmp_path, tiny_model, tiny_gpt2, sae_of_layer, char_tokenizer, make) -> None:
    model = copy.deepcopy(tiny_gpt2 if family == "gpt2" else tiny_model(family))
    model.generation_config.eos_token_id = [1, *range(40, 50)]
    if "image_text" in family:
        model.requires_grad_(True)
        for name, parameter in model.named_parameters():
            if "vision" in name or "visual" in name:
                parameter.requires_grad_(False)  # as the seed's notebook does: the vision tower does not learn
    peft_config = None
    if lora:
        peft_config = copy.deepcopy(LORA)
        # Of an image-text model the language model alone: Gemma 4's vision tower has layers of a kind of its own.
        text = r"^(?!.*(vision|visual)).*\.(q_proj|o_proj|down_proj)$"
        peft_config.target_modules = ["c_attn", "c_proj"] if family == "gpt2" else text
    reward, rollouts = FeatureReward(WEIGHTS, sae_of_layer(2)), []
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    start = copy.deepcopy(model)
    trainer = make(
        tmp_path,
        model,
        [reward, even_tokens],
        char_tokenizer,
        peft_config=peft_config,
        config={
            "max_steps": 1,
            "num_iterations": 2,
            "learning_rate": 1e-3,
            # No image stands behind a sampled image token: image-text models put a pad in its place.
            "generation_kwargs": {"suppress_tokens": [59, 60, 61, 62, 63]},
        },
        dense=DenseConfig(weight=0.5, sample_rollouts=8),
        on_rollouts=rollouts.append,
    )
    trainer.train()
    out = trainer.seen
    assert trainer._trust.agrees is (family != "gpt2")
    lengths = out["completion_mask"].sum(1).tolist()
    assert len(set(lengths)) > 1 and len(set(out["prompt_mask"].sum(1).tolist())) > 1
    for row, length in enumerate(lengths):
        prompt = out["prompt_ids"][row][out["prompt_mask"][row].bool()]
        expected = whole_forward(start, reward, prompt, out["completion_ids"][row, :length])
        got = torch.tensor(rollouts[0].token_rewards[row])
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
        assert out["advantages"][row, length:].count_nonzero() == 0
    assert out["advantages"].isfinite().all() and out["advantages"].count_nonzero() > 0
    after = dict(trainer.accelerator.unwrap_model(trainer.model).named_parameters())
    if not lora:
        moved = {name for name, parameter in after.items() if not torch.equal(parameter, before[name])}
        assert len(moved) > 10 and not any("vision" in name or "visual" in name for name in moved)
    else:
        assert any(parameter.abs().sum() > 0 for name, parameter in after.items() if "lora_B" in name)
