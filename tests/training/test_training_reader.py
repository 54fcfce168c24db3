"""Tapped, read and frozen rewards against the model itself, one token after another, whatever trains and however."""

from __future__ import annotations

import copy
import logging
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import PreTrainedModel
from trl import GRPOTrainer

from mechreward.errors import InputError
from mechreward.hacking import DualVerifier
from mechreward.models import find_blocks
from mechreward.probes import LinearProbe
from mechreward.reward import FeatureReward
from mechreward.sae import SAE
from mechreward.training import DenseConfig
from mechreward.training.guard import Guard
from mechreward.training.reader import Tap, difference, dropout, largest
from mechreward.training.shaping import _activations

WEIGHTS = {3: 1.0, 7: -0.5, 11: 2.0, 40: 1.0, 60: -1.5}
LORA = LoraConfig(r=2, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
MISALIGNED = {"num_iterations": 2}  # TRL then scores every batch with the policy that sampled it


def even_tokens(completion_ids, **_) -> list[float]:
    return [sum(1.0 for token in ids if token % 2 == 0) / len(ids) for ids in completion_ids]


@torch.no_grad()
def token_by_token(model, reward: FeatureReward, out, row: int) -> list[float]:
    """The reward of each token of a row from a forward over the row up to it, and no further."""
    prompt = out["prompt_ids"][row][out["prompt_mask"][row].bool()]
    completion = out["completion_ids"][row][out["completion_mask"][row].bool()]
    ids = torch.cat([prompt, completion])
    rewards = []
    for end in range(len(prompt) + 1, len(ids) + 1):
        kept = []
        handle = find_blocks(model)[reward.layer].register_forward_hook(
            lambda _m, _i, output, kept=kept: kept.append(output[0] if isinstance(output, tuple) else output)
        )
        model.eval()(input_ids=ids[None, :end])
        handle.remove()
        acts = reward.sae.encode(kept[0][0, -1])
        rewards.append(sum(weight * acts[i].item() for i, weight in WEIGHTS.items()))
    return rewards


def perturb(model) -> None:
    """Moves every weight that learns, so that the policy is not the model it started as."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


class Reads:
    """Counts forwards of our own, which a tap spares."""

    def __init__(self, trainer, monkeypatch) -> None:
        self.readers: list[str] = []
        forward = trainer._forward

        def spy(reader, out):
            self.readers.append(reader)
            return forward(reader, out)

        monkeypatch.setattr(trainer, "_forward", spy)


CASES = {
    "forward": ({}, None, "policy", ["policy"]),
    "tapped": (MISALIGNED, None, "policy", []),
    "tapped, lora": (MISALIGNED, LORA, "policy", []),
    "steps_per_generation": ({"steps_per_generation": 4, "gradient_accumulation_steps": 2}, None, "policy", []),
    "reference, lora": ({"beta": 0.1}, LORA, "frozen", []),
    "policy beside a reference, lora": ({"beta": 0.1}, LORA, "policy", ["policy"]),
    "both scored, lora": ({"beta": 0.1, **MISALIGNED}, LORA, "policy", []),
    "frozen, lora": ({}, LORA, "frozen", ["frozen"]),
    "frozen": ({}, None, "frozen", ["frozen"]),
    "checkpointing": ({"gradient_checkpointing": True, **MISALIGNED}, LORA, "policy", []),
    "truncated": ({"mask_truncated_completions": True, **MISALIGNED}, None, "policy", []),
}


@pytest.mark.parametrize("case", CASES)
def test_every_road_reads_the_right_state_of_the_right_token(
    case, tmp_path, model, sae, char_tokenizer, make, score, monkeypatch
) -> None:
    config, peft_config, reader, wanted_forwards = CASES[case]
    start, reward = copy.deepcopy(model), FeatureReward(WEIGHTS, sae)
    rollouts = []
    trainer = make(
        tmp_path,
        model,
        [reward, even_tokens],
        char_tokenizer,
        peft_config=peft_config,
        config=config,
        dense=DenseConfig(reader=reader, gap_every=0, sample_rollouts=8, read_batch_size=3),
        on_rollouts=rollouts.append,
    )
    perturb(trainer.model)
    reads = Reads(trainer, monkeypatch)
    first, out = score(trainer), score(trainer)
    # The first batch is read both ways if there is a tap; every later one by the tap alone.
    assert reads.readers == [reader, *wanted_forwards]
    assert ("dense/tap_difference" in trainer._metrics["train"]) == (not wanted_forwards)
    policy = trainer.accelerator.unwrap_model(trainer.model)
    reference = start if reader == "frozen" else policy
    for batch, rollout in zip((first, out), rollouts, strict=True):
        lengths = batch["completion_mask"].sum(1).tolist()
        assert len(set(lengths)) > 1
        for row, length in enumerate(lengths):
            assert len(rollout.token_rewards[row]) == length
            if length:
                expected = token_by_token(reference, reward, batch, row)
                torch.testing.assert_close(
                    torch.tensor(rollout.token_rewards[row]), torch.tensor(expected), rtol=1e-4, atol=1e-4
                )


def test_a_tap_under_autocast_gives_float32(tmp_path, model, sae, char_tokenizer, make, score) -> None:
    config, dense = {**MISALIGNED, "bf16": True}, DenseConfig(gap_every=0)
    trainer = make(
        tmp_path, model, [FeatureReward(WEIGHTS, sae), even_tokens], char_tokenizer, config=config, dense=dense
    )
    out = score(trainer)
    [(tapped_BT, readable_BT)] = trainer._tap.take("policy")
    [(read_BT, _)] = trainer._forward("policy", out)
    assert tapped_BT.dtype == torch.float32 and readable_BT.equal(out["completion_mask"].bool())
    # Half precision moves states a little, and may turn a feature near the k-th place on or off.
    off = ((tapped_BT - read_BT).abs().sum() / read_BT.abs().sum()).item()
    assert 0 < off < 0.1 and trainer._metrics["train"]["dense/tap_difference"] == [pytest.approx(off)]


def test_an_adapter_from_before_is_part_of_the_starting_model(
    tmp_path, model, sae, char_tokenizer, make, score
) -> None:
    torch.manual_seed(1)
    adapted = get_peft_model(model, LORA)
    perturb(adapted)
    start, reward, rollouts = copy.deepcopy(adapted), FeatureReward(WEIGHTS, sae), []
    for beta in (0.0, 0.1):
        trainer = make(
            tmp_path,
            copy.deepcopy(adapted),
            [reward, even_tokens],
            char_tokenizer,
            config={"beta": beta},
            dense=DenseConfig(reader="frozen", sample_rollouts=8),
            on_rollouts=rollouts.append,
        )
        perturb(trainer.model)
        out = score(trainer)
        for row in range(3):
            expected = token_by_token(start, reward, out, row)
            assert rollouts[-1].token_rewards[row] == pytest.approx(expected, rel=1e-3, abs=1e-3)
        assert trainer._trust.agrees is (None if beta == 0 else True)


def test_biases_that_train_beside_an_adapter_are_not_read_as_frozen(
    tmp_path, tiny_qwen2, sae, char_tokenizer, make, score
) -> None:
    start, reward, rollouts = copy.deepcopy(tiny_qwen2), FeatureReward(WEIGHTS, sae), []
    peft_config = LoraConfig(r=2, bias="lora_only", target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    trainer = make(
        tmp_path, copy.deepcopy(start), [reward, even_tokens], char_tokenizer, peft_config=peft_config,
        config={"beta": 0.1}, dense=DenseConfig(reader="frozen", sample_rollouts=8), on_rollouts=rollouts.append,
    )  # fmt: skip
    score(trainer)
    perturb(trainer.model)
    out = score(trainer)
    assert trainer._tap.take("frozen") is None
    expected = token_by_token(start, reward, out, 0)
    assert rollouts[-1].token_rewards[0] == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_the_reference_of_full_fine_tuning_is_the_starting_model(
    tmp_path, model, sae, char_tokenizer, make, score
) -> None:
    model.save_pretrained(tmp_path / "start")
    reward, rollouts = FeatureReward(WEIGHTS, sae), []
    trainer = make(
        tmp_path,
        str(tmp_path / "start"),
        [reward, even_tokens],
        char_tokenizer,
        config={"beta": 0.1},
        dense=DenseConfig(reader="frozen", gap_every=0, sample_rollouts=8),
        on_rollouts=rollouts.append,
    )
    perturb(trainer.model)
    out = score(trainer)
    assert trainer._trust.agrees is True and trainer._tap.take("policy") is None
    for row in range(3):
        expected = token_by_token(model, reward, out, row)
        assert rollouts[-1].token_rewards[row] == pytest.approx(expected, rel=1e-3, abs=1e-3)
    trainer.args.sync_ref_model = True  # a reference that moves is no frozen model
    score(trainer)
    assert trainer._tap.take("frozen") is None


def test_a_tap_that_reads_something_else_is_not_used(
    tmp_path, tiny_gpt2, sae, char_tokenizer, make, score, caplog, monkeypatch
) -> None:
    # GPT-2's positions count TRL's left padding: its scoring pass does not have the states of the unpadded rows.
    reward, rollouts = FeatureReward(WEIGHTS, sae), []
    trainer = make(
        tmp_path,
        copy.deepcopy(tiny_gpt2),
        [reward, even_tokens],
        char_tokenizer,
        config=MISALIGNED,
        dense=DenseConfig(gap_every=0, sample_rollouts=8),
        on_rollouts=rollouts.append,
    )
    reads = Reads(trainer, monkeypatch)
    with caplog.at_level(logging.WARNING):
        batches = [score(trainer) for _ in range(2)]
    assert reads.readers == ["policy", "policy"]
    assert sum("rewards are read by a forward of their own" in record.message for record in caplog.records) == 1
    for out, rollout in zip(batches, rollouts, strict=True):
        assert out["prompt_mask"][4].sum() < out["prompt_mask"].shape[1]
        expected = token_by_token(trainer.model, reward, out, 4)
        assert rollout.token_rewards[4] == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_a_fault_that_the_first_batch_hides_is_found(
    tmp_path, tiny_gpt2, sae, char_tokenizer, make, monkeypatch
) -> None:
    # Prompts of one length have no padding, and GPT-2's scoring pass is then right; the next batch has some.
    reward, rollouts = FeatureReward(WEIGHTS, sae), []
    dense = DenseConfig(gap_every=0, sample_rollouts=8)
    trainer = make(
        tmp_path, copy.deepcopy(tiny_gpt2), [reward, even_tokens], char_tokenizer,
        config=MISALIGNED, dense=dense, on_rollouts=rollouts.append,
    )  # fmt: skip
    reads = Reads(trainer, monkeypatch)
    trainer.model.train()
    for prompts, agrees in ((["12+3=", "45+6="], True), (["what is 7?", "a"], False)):
        out = trainer._generate_and_score_completions([{"prompt": p} for p in prompts for _ in range(4)])
        assert trainer._trust.agrees is agrees
        expected = token_by_token(trainer.model, reward, out, 4)
        assert rollouts[-1].token_rewards[4] == pytest.approx(expected, rel=1e-3, abs=1e-3)
        trainer.model.train()
    assert reads.readers == ["policy", "policy"]


def test_tap_and_forward_are_compared_again_and_again(
    tmp_path, model, sae, char_tokenizer, make, score, monkeypatch, caplog
) -> None:
    reward, rollouts = FeatureReward(WEIGHTS, sae), []
    trainer = make(
        tmp_path, model, [reward, even_tokens], char_tokenizer, config=MISALIGNED,
        dense=DenseConfig(gap_every=0, sample_rollouts=8), on_rollouts=rollouts.append,
    )  # fmt: skip
    reads, compared = Reads(trainer, monkeypatch), []
    for step in (0, 1, 9, 10, 11, 19):
        trainer.state.global_step = step
        score(trainer)
        compared.append(len(reads.readers))
    assert compared == [1, 1, 1, 2, 2, 2], "at the start, then every ten steps"
    right = Tap._score
    monkeypatch.setattr(Tap, "_score", staticmethod(lambda *given: (right(*given)[0] + 1.0, right(*given)[1])))
    trainer.state.global_step = 20
    out = score(trainer)
    expected = token_by_token(trainer.model, reward, out, 0)
    assert rollouts[-1].token_rewards[0] == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert sum("rewards are read by a forward of their own" in record.message for record in caplog.records) == 1


def test_evaluation_decides_nothing(tmp_path, model, sae, char_tokenizer, make, score, monkeypatch) -> None:
    rewards, dense = [FeatureReward(WEIGHTS, sae), even_tokens], DenseConfig(gap_every=0)
    trainer = make(tmp_path, model, rewards, char_tokenizer, config=MISALIGNED, dense=dense)
    reads, seen = Reads(trainer, monkeypatch), []
    for mode in ("eval", "eval", "train", "eval", "train"):
        if mode == "train":
            score(trainer)
        else:
            trainer.model.eval()
            trainer._generate_and_score_completions([{"prompt": p} for p in ("12+3=", "a") for _ in range(4)])
        seen.append(len(reads.readers))
    assert seen == [1, 2, 3, 3, 3]


@pytest.mark.parametrize("kind", ["adapter", "attention", "residual"])
def test_a_model_with_dropout_is_never_tapped(
    kind, tmp_path, sae, char_tokenizer, make, score, tiny_llama, tiny_gpt2, caplog
) -> None:
    reward, rollouts, peft_config = FeatureReward(WEIGHTS, sae), [], None
    model = copy.deepcopy(tiny_gpt2 if kind == "residual" else tiny_llama)
    if kind == "adapter":  # 0 at first, so that its dropout does not show
        peft_config = LoraConfig(r=4, lora_dropout=0.05, target_modules="all-linear", task_type="CAUSAL_LM")
    elif kind == "attention":
        model.model.layers[0].self_attn.attention_dropout = 0.05
    else:
        model.transformer.h[0].mlp.dropout.p = 0.05
    trainer = make(
        tmp_path, model, [reward, even_tokens], char_tokenizer, config=MISALIGNED, peft_config=peft_config,
        dense=DenseConfig(gap_every=0, sample_rollouts=8), on_rollouts=rollouts.append,
    )  # fmt: skip
    score(trainer)
    perturb(trainer.model)
    out = score(trainer)
    assert trainer._tap.take("policy") is None
    expected = token_by_token(trainer.model, reward, out, 0)
    assert rollouts[-1].token_rewards[0] == pytest.approx(expected, rel=1e-3, abs=1e-3)
    said = [record.getMessage() for record in caplog.records if "forward of their own" in record.message]
    assert len(said) == 1 and "dropout" in said[0] and "0.05" in said[0]


def test_dropout_that_is_off_leaves_the_tap_on(tiny_gpt2) -> None:
    noisy = copy.deepcopy(tiny_gpt2)
    noisy.transformer.h[2].attn.resid_dropout.p = 0.1
    assert dropout(noisy.train()) == "h.2.attn.resid_dropout.p=0.1"
    assert dropout(noisy.eval()) is None and dropout(tiny_gpt2) is None


def test_the_tap_can_be_turned_off(tmp_path, model, sae, char_tokenizer, make, score, monkeypatch) -> None:
    dense = DenseConfig(tap=False, gap_every=0)
    rewards = [FeatureReward(WEIGHTS, sae), even_tokens]
    trainer = make(tmp_path, model, rewards, char_tokenizer, config=MISALIGNED, dense=dense)
    reads = Reads(trainer, monkeypatch)
    for _ in range(2):
        score(trainer)
    assert reads.readers == ["policy", "policy"] and trainer._tap.take("policy") is None


def test_the_loss_is_not_tapped(tmp_path, model, sae, char_tokenizer, make, score) -> None:
    hooks = [len(block._forward_hooks) for block in find_blocks(model)]
    trainer = make(tmp_path, model, [FeatureReward(WEIGHTS, sae), even_tokens], char_tokenizer, config=MISALIGNED)
    out = score(trainer)
    caught = trainer._tap.take("policy")
    trainer.current_gradient_accumulation_steps = 1
    trainer._compute_loss(trainer.model, {**out, "num_items_in_batch": torch.tensor(8.0)}).backward()
    assert trainer._tap.take("policy") is caught
    # transformers leaves hooks of its own on a model that was once asked for its hidden states.
    assert [len(block._forward_hooks) for block in find_blocks(model)] == hooks


@pytest.mark.parametrize("config", [{}, MISALIGNED], ids=["forward", "tapped"])
def test_two_layers_cost_one_forward(
    config, tmp_path, model, sae_of_layer, char_tokenizer, make, score, monkeypatch
) -> None:
    rewards = [FeatureReward(WEIGHTS, sae_of_layer(layer, seed), name=f"l{layer}") for layer, seed in ((0, 5), (2, 6))]
    rollouts = []
    trainer = make(
        tmp_path,
        model,
        [*rewards, even_tokens],
        char_tokenizer,
        config={**config, "reward_weights": [1.0, 3.0, 1.0]},
        dense=DenseConfig(gap_every=0, sample_rollouts=8, read_batch_size=8),
        on_rollouts=rollouts.append,
    )
    score(trainer)
    passes = []
    blocks = find_blocks(model)
    for layer in range(4):
        blocks[layer].register_forward_hook(lambda _m, _i, _o, layer=layer: passes.append(layer))
    monkeypatch.setattr(trainer, "_generate", lambda *a, _g=trainer._generate, **k: (_g(*a, **k), passes.clear())[0])
    out = score(trainer)
    # Tapped: two micro-batches of TRL's pass, all four blocks. Otherwise one forward, stopped after block 2.
    assert passes == ([0, 1, 2, 3] * 2 if config else [0, 1, 2])
    for row in range(3):
        each = [token_by_token(model, reward, out, row) for reward in rewards]
        expected = [a + 3 * b for a, b in zip(*each, strict=True)]
        assert rollouts[-1].token_rewards[row] == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_no_early_exit_where_weights_are_sharded(
    tmp_path, model, sae, char_tokenizer, make, score, monkeypatch
) -> None:
    rewards = [FeatureReward(WEIGHTS, sae), even_tokens]
    trainer = make(tmp_path, model, rewards, char_tokenizer, dense=DenseConfig(gap_every=0, read_batch_size=8))
    passes = []
    for layer, block in enumerate(find_blocks(model)):
        block.register_forward_hook(lambda _m, _i, _o, layer=layer: passes.append(layer))
    for sharded, wanted in ((False, [0, 1]), (True, [0, 1, 2, 3])):
        monkeypatch.setattr(trainer, "is_fsdp_enabled", sharded)
        passes.clear()
        trainer._forward("policy", trainer.seen if sharded else score(trainer))
        assert passes[-len(wanted) :] == wanted
    trainer._frozen, trainer.dense = None, DenseConfig(reader="frozen")
    with pytest.raises(InputError, match="reader, gap_every: a frozen copy of sharded weights"):
        trainer._check_setup(model)
    dual = DualVerifier(rewards[0], LinearProbe(torch.zeros(32), 0.0, 32, "p", layer=2))
    with pytest.raises(InputError, match="dual: a frozen copy of sharded weights .* give no dual verifier"):
        Guard(trainer, dual, None)


def test_no_early_exit_of_guards_and_regularisers_where_weights_are_sharded(
    tmp_path, model, sae, char_tokenizer, make, score, monkeypatch
) -> None:
    rewards = [FeatureReward(WEIGHTS, sae), even_tokens]
    trainer = make(tmp_path, model, rewards, char_tokenizer, peft_config=LORA)
    out, passes = score(trainer), []
    mask_BT = out["completion_mask"].bool()
    for layer, block in enumerate(find_blocks(trainer.model)):
        block.register_forward_hook(lambda _m, _i, _o, layer=layer: passes.append(layer))
    for sharded, wanted in ((False, [0, 1] * 2), (True, [0, 1, 2, 3] * 2)):
        monkeypatch.setattr(trainer, "is_fsdp_enabled", sharded)
        passes.clear()
        trainer.guard._read_frozen(out, mask_BT)
        _activations(trainer, out, mask_BT)
        assert passes == wanted


def test_the_gap_is_policy_minus_frozen(tmp_path, model, sae, char_tokenizer, make, score) -> None:
    start, reward, rollouts = copy.deepcopy(model), FeatureReward(WEIGHTS, sae), []
    for reader in ("policy", "frozen"):
        trainer = make(
            tmp_path,
            copy.deepcopy(model),
            [reward, even_tokens],
            char_tokenizer,
            dense=DenseConfig(reader=reader, gap_every=2, sample_rollouts=8),
            on_rollouts=rollouts.append,
        )
        score(trainer)
        assert trainer._metrics["train"]["dense/reader_gap"][-1] == pytest.approx(0.0, abs=1e-4)
        perturb(trainer.model)
        trainer.state.global_step = 1
        score(trainer)
        assert len(trainer._metrics["train"]["dense/reader_gap"]) == 1
        trainer.state.global_step = 2
        out = score(trainer)
        rows = range(len(out["completion_ids"]))
        gaps = torch.cat(
            [
                torch.tensor(token_by_token(trainer.model, reward, out, row))
                - torch.tensor(token_by_token(start, reward, out, row))
                for row in rows
            ]
        )
        metrics = trainer._metrics["train"]
        assert metrics["dense/reader_gap"][-1] == pytest.approx(gaps.mean().item(), rel=1e-2, abs=1e-3)
        assert metrics["dense/reader_gap_rms"][-1] == pytest.approx(gaps.square().mean().sqrt().item(), rel=1e-2)
        assert abs(gaps.mean()) > 0.05


def test_share_of_the_dense_part(tmp_path, model, sae, char_tokenizer, make, score) -> None:
    reward = FeatureReward(WEIGHTS, sae)
    trainer = make(tmp_path, model, [reward, even_tokens], char_tokenizer, dense=DenseConfig(weight=0.5))
    out = score(trainer)
    total_BT, mask_BT = out["advantages"].double(), out["completion_mask"].bool()
    outcome_B = torch.tensor([trainer._logs["advantages"][row] for row in range(8)]).double()
    dense_BT = (total_BT - outcome_B[:, None]).masked_fill(~mask_BT, 0)
    expected = (dense_BT * total_BT).sum() / total_BT.square().sum()
    assert trainer._metrics["train"]["dense/share"][-1] == pytest.approx(expected.item(), rel=1e-3)
    assert 0 < expected < 1


def test_a_first_batch_cut_everywhere_is_named(tmp_path, model, sae, char_tokenizer, make, score, monkeypatch) -> None:
    original = GRPOTrainer._generate_and_score_completions

    def cut(self, inputs):
        out = original(self, inputs)
        out["completion_mask"] = torch.zeros_like(out["completion_mask"])
        return out

    monkeypatch.setattr(GRPOTrainer, "_generate_and_score_completions", cut)
    trainer = make(tmp_path, model, [FeatureReward(WEIGHTS, sae), even_tokens], char_tokenizer)
    with pytest.raises(InputError, match="max_completion_length: all completions of the first batch ran into 7 tokens"):
        score(trainer)
    trainer.state.global_step = 1  # later, a whole batch may be cut by chance
    assert score(trainer)["advantages"].count_nonzero() == 0


def rewards_of(*rows: list[float]) -> tuple[torch.Tensor, torch.Tensor]:
    values_BT = torch.tensor(rows)
    return values_BT, torch.ones_like(values_BT).bool()


def test_difference_by_hand() -> None:
    read = rewards_of([1.0, -3.0], [0.0, 4.0])
    assert difference([read], [read]) == 0
    assert difference([rewards_of([1.5, -3.0], [0.0, 3.5])], [read]) == pytest.approx(1 / 8)
    # The largest of all rewards.
    other = rewards_of([2.0, 0.0], [0.0, 0.0])
    assert difference([read, rewards_of([3.0, 0.0], [0.0, 0.0])], [read, other]) == 0.5
    assert difference([rewards_of([1.0])], [rewards_of([0.0])]) is None
    # Only tokens that have a reward by either reading.
    mask = torch.tensor([[True, False]])
    assert difference([(torch.ones(1, 2), mask)], [(torch.tensor([[2.0, 9.0]]), mask)]) == 0.5
    assert difference([(torch.ones(1, 2), mask)], [(torch.tensor([[2.0, 2.0]]), ~mask)]) == 0.5


def test_the_largest_difference_of_all_processes(monkeypatch) -> None:
    cpu = torch.device("cpu")
    assert largest(0.25, cpu) == 0.25 and largest(None, cpu) is None
    monkeypatch.setattr(
        "mechreward.training.reader.gather", lambda own: torch.cat([own, torch.tensor([0.5, math.nan, 0.125])])
    )
    assert largest(0.25, cpu) == largest(None, cpu) == 0.5 and largest(0.75, cpu) == 0.75


def test_a_tap_scores_rows_in_order_over_micro_batches(tiny_llama: PreTrainedModel, sae: SAE) -> None:
    reward = FeatureReward(WEIGHTS, sae)
    ids = torch.randint(4, 60, (5, 6))
    mask = torch.ones(5, 6).long()
    mask[1, 4:] = 0
    tap = Tap([reward])
    with torch.no_grad(), tap.batch(), tap.catching("policy", tiny_llama, mask, 3):
        for start in (0, 2, 4):
            tiny_llama(input_ids=ids[start : start + 2], attention_mask=mask[start : start + 2])
    [(reward_BT, readable_BT)] = tap.take("policy")
    with torch.no_grad():
        h_BTD = tiny_llama(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states[2][:, 3:]
    torch.testing.assert_close(reward_BT, reward.compute_per_token(h_BTD, mask[:, 3:].bool()), rtol=1e-4, atol=1e-4)
    assert readable_BT.tolist() == reward.readable(h_BTD, mask[:, 3:].bool()).tolist()
    assert reward_BT[1].tolist()[1:] == [0.0, 0.0] and readable_BT[1].tolist() == [True, False, False]
    with tap.batch():
        assert tap.take("policy") is None
