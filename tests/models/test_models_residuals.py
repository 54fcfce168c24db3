"""The residual stream against forwards that share nothing with it: one unpadded row at a time, no hooks."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GemmaConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipVisionConfig,
)

from mechreward.errors import InputError
from mechreward.models import (
    capture_blocks,
    eval_mode,
    find_blocks,
    iter_blocks,
    iter_residuals,
    norm_outliers,
    read_residuals,
)

EOS = 1
PROMPTS = [[0, 5, 6, 7], [0, 9], [0, 11, 12, 13, 14, 15, 16, 17], [0, 5, 6], [21, 22, 23, 24, 25]]
COMPLETIONS = [[8, 30, EOS], [10, 31, 32, 33, 34, 35, EOS], [18], [40, 41, 42, 43], [EOS]]


@pytest.fixture(scope="module")
def tiny_lora(tiny_llama):
    """A LoRA on Llama whose B matrices are not zero, so that it changes every state."""
    torch.manual_seed(7)
    config = LoraConfig(r=4, lora_dropout=0.5, task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj", "down_proj"])
    model = get_peft_model(copy.deepcopy(tiny_llama), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(params=["tiny_llama", "tiny_qwen2", "tiny_gpt2", "tiny_lora"])
def model(request):
    return request.getfixturevalue(request.param)


def row_states(model, prompt: list[int], completion: list[int], layer: int) -> Tensor:
    """States of one completion from `hidden_states` of one unpadded row, token by token."""
    with torch.no_grad():
        states = model(torch.tensor([prompt + completion]), output_hidden_states=True).hidden_states
    return torch.stack([states[layer + 1][0, len(prompt) + t] for t in range(len(completion))])


def final_norm(model):
    decoder = model.get_decoder()
    return decoder.ln_f if hasattr(decoder, "ln_f") else decoder.norm


def comparable(model, h: Tensor, layer: int) -> Tensor:
    # transformers gives the last block's state after the final norm only.
    return final_norm(model)(h).detach() if layer == 3 else h


@pytest.mark.parametrize("layer", [0, 2, 3])
@pytest.mark.parametrize("batch_size", [1, 2, 32])
def test_states_equal_those_of_each_row_alone(model, layer: int, batch_size: int) -> None:
    h_BTD, mask_BT = read_residuals(model, PROMPTS, COMPLETIONS, layer, batch_size)
    assert h_BTD.shape == (5, 7, 32) and h_BTD.dtype == torch.float32 and not h_BTD.requires_grad
    assert mask_BT.tolist() == [[t < len(row) for t in range(7)] for row in COMPLETIONS]
    for row, (prompt, completion) in enumerate(zip(PROMPTS, COMPLETIONS, strict=True)):
        want = row_states(model, prompt, completion, layer)
        got = comparable(model, h_BTD[row, : len(completion)], layer)
        torch.testing.assert_close(got, want, atol=2e-5, rtol=1e-4)
        assert (h_BTD[row, len(completion) :] == 0).all()


@pytest.mark.parametrize("shift", [-1, 1])
def test_the_neighbouring_token_has_a_clearly_different_state(model, shift: int) -> None:
    """Guards the test above: states one token off would not pass it."""
    h_BTD, _ = read_residuals(model, PROMPTS, COMPLETIONS, 2)
    prompt, completion = PROMPTS[1], COMPLETIONS[1]
    with torch.no_grad():
        states = model(torch.tensor([prompt + completion]), output_hidden_states=True).hidden_states[3][0]
    places = range(len(prompt) + max(shift, 0), len(prompt) + len(completion) + min(shift, 0))
    for place in places:
        off = (h_BTD[1, place - len(prompt)] - states[place - shift]).abs().max()
        assert off > 0.1


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen2", "tiny_gpt2", "tiny_lora"])
def test_left_padded_rows_with_a_mask_and_positions_agree(name: str, request) -> None:
    """What TRL feeds a model: pads on the left; GPT-2 needs its positions told."""
    model = request.getfixturevalue(name)
    rows = [p + c for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    width = max(map(len, rows))
    ids = torch.tensor([[2] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        states = model(ids, attention_mask=mask, position_ids=positions, output_hidden_states=True).hidden_states[2]
    h_BTD, _ = read_residuals(model, PROMPTS, COMPLETIONS, 1)
    for row, completion in enumerate(COMPLETIONS):
        want = states[row, width - len(completion) :]
        torch.testing.assert_close(h_BTD[row, : len(completion)], want, atol=2e-5, rtol=1e-4)


def test_the_adapter_changes_the_states_and_disabling_it_gives_the_base(tiny_llama, tiny_lora) -> None:
    base, _ = read_residuals(tiny_llama, PROMPTS, COMPLETIONS, 1)
    adapted, mask_BT = read_residuals(tiny_lora, PROMPTS, COMPLETIONS, 1)
    assert ((adapted - base).norm(dim=-1)[mask_BT] > 0.05).all()
    with tiny_lora.disable_adapter():
        off, _ = read_residuals(tiny_lora, PROMPTS, COMPLETIONS, 1)
    torch.testing.assert_close(off, base)


def test_batches_are_bucketed_by_length_and_cover_every_row_once(tiny_llama) -> None:
    batches = list(iter_residuals(tiny_llama, PROMPTS, COMPLETIONS, 1, batch_size=2))
    assert [batch.rows for batch in batches] == [[4, 0], [3, 1], [2]]  # total lengths 6 7 | 7 9 | 9
    assert [tuple(batch.h_BTD.shape) for batch in batches] == [(2, 3, 32), (2, 7, 32), (1, 1, 32)]
    assert [batch.mask_BT.sum().item() for batch in batches] == [4, 11, 1]


def test_reading_is_lazy_but_checks_at_once(tiny_llama) -> None:
    with counted(tiny_llama) as calls:
        stream = iter_residuals(tiny_llama, PROMPTS, COMPLETIONS, 1, batch_size=2)
        assert calls == [0, 0, 0, 0]
        next(stream)
        assert torch.is_grad_enabled()  # nothing leaks to the caller between batches
    assert calls == [1, 1, 0, 0]
    with pytest.raises(InputError, match="layer: 4 is out of range"):
        iter_residuals(tiny_llama, PROMPTS, COMPLETIONS, 4)


class counted:
    """Counts forwards of each block without touching what they do."""

    def __init__(self, model) -> None:
        self.blocks, self.calls = find_blocks(model), [0] * len(find_blocks(model))

    def __enter__(self) -> list[int]:
        self.handles = [b.register_forward_pre_hook(self._count(i)) for i, b in enumerate(self.blocks)]
        return self.calls

    def _count(self, block: int):
        def add(*_: object) -> None:
            self.calls[block] += 1

        return add

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()


@pytest.mark.parametrize("layer", [0, 1, 2, 3])
def test_no_block_after_the_layer_runs(model, layer: int) -> None:
    with counted(model) as calls:
        read_residuals(model, PROMPTS, COMPLETIONS, layer)
    assert calls == [1] * (layer + 1) + [0] * (3 - layer)


@pytest.mark.parametrize("batch_size", [2, 32])
def test_several_blocks_of_one_forward_equal_each_read_alone(model, batch_size: int) -> None:
    """Layers in any order, one named twice; the forward runs once a batch and stops after the last of them."""
    with counted(model) as calls:
        batches = list(iter_blocks(model, PROMPTS, COMPLETIONS, [2, 0, 2], batch_size))
    assert calls == [len(batches)] * 3 + [0]
    assert sorted(row for batch in batches for row in batch.rows) == [0, 1, 2, 3, 4]
    for layer in (0, 2):
        alone, mask_BT = read_residuals(model, PROMPTS, COMPLETIONS, layer, batch_size)
        for batch in batches:
            assert list(batch.h_BTD) == [0, 2]
            width = batch.mask_BT.shape[1]
            assert torch.equal(batch.h_BTD[layer], alone[batch.rows, :width])
            assert torch.equal(batch.mask_BT, mask_BT[batch.rows, :width])


def test_blocks_that_are_not_there_are_named_at_once(tiny_llama) -> None:
    with pytest.raises(InputError, match="layer: 4 is out of range; the model has blocks 0 to 3"):
        iter_blocks(tiny_llama, PROMPTS, COMPLETIONS, [0, 4])
    with pytest.raises(InputError, match="layers: none is named; give at least one block"):
        iter_blocks(tiny_llama, PROMPTS, COMPLETIONS, [])


def test_a_nan_is_found_in_every_block_that_is_read(tiny_llama) -> None:
    model = copy.deepcopy(tiny_llama)
    find_blocks(model)[2].register_forward_hook(lambda _module, _inputs, out: torch.full_like(out, float("nan")))
    next(iter_blocks(model, PROMPTS, COMPLETIONS, [0, 1]))
    with pytest.raises(InputError, match="after block 2 is NaN"):
        next(iter_blocks(model, PROMPTS, COMPLETIONS, [0, 2]))


def hooks(model) -> int:
    return sum(len(module._forward_hooks) for module in model.modules())


def test_hooks_are_gone_after_reading_and_after_an_exception(tiny_qwen2) -> None:
    before = hooks(tiny_qwen2)  # not 0 once transformers has put in its own for output_hidden_states
    read_residuals(tiny_qwen2, PROMPTS, COMPLETIONS, 2)
    assert hooks(tiny_qwen2) == before
    with pytest.raises(RuntimeError, match="mine"), capture_blocks(tiny_qwen2, [0, 1]):
        assert hooks(tiny_qwen2) == before + 2
        raise RuntimeError("mine")
    assert hooks(tiny_qwen2) == before


def test_capture_without_stop_lets_the_forward_end_and_keeps_its_gradient(tiny_llama) -> None:
    with capture_blocks(tiny_llama, [1, 0], stop=False) as states:
        output = tiny_llama(torch.tensor([PROMPTS[0]]), output_hidden_states=True)
    assert sorted(states) == [0, 1]
    for layer, h_BTD in states.items():
        assert torch.equal(h_BTD, output.hidden_states[layer + 1])
        assert h_BTD.requires_grad


def test_capture_holds_the_latest_forward(tiny_llama) -> None:
    with capture_blocks(tiny_llama, [1], stop=False) as states:
        tiny_llama(torch.tensor([PROMPTS[0]]))
        first = states[1]
        tiny_llama(torch.tensor([PROMPTS[1]]))
    assert first.shape[1] == len(PROMPTS[0]) and states[1].shape[1] == len(PROMPTS[1])


def test_a_stop_further_out_is_not_swallowed_further_in(tiny_llama) -> None:
    """The inner capture sits on a later block: the outer stop must end both forwards, and the inner one stays empty."""
    reached, before = False, hooks(tiny_llama)
    with capture_blocks(tiny_llama, [0]) as outer:
        with capture_blocks(tiny_llama, [2]) as inner:
            tiny_llama(torch.tensor([PROMPTS[0]]))
        reached = True
    assert list(outer) == [0] and not inner and not reached
    assert hooks(tiny_llama) == before


def test_modes_are_restored_module_by_module_and_dropout_is_off(tiny_lora) -> None:
    tiny_lora.train()
    frozen = find_blocks(tiny_lora)[0]
    frozen.eval()
    before = [module.training for module in tiny_lora.modules()]
    h_BTD, _ = read_residuals(tiny_lora, PROMPTS, COMPLETIONS, 2)
    assert [module.training for module in tiny_lora.modules()] == before
    assert True in before and False in before
    tiny_lora.eval()
    want = row_states(tiny_lora, PROMPTS[0], COMPLETIONS[0], 2)
    torch.testing.assert_close(h_BTD[0, :3], want, atol=2e-5, rtol=1e-4)


def test_modes_are_restored_after_an_exception(tiny_llama) -> None:
    model = copy.deepcopy(tiny_llama).train()
    with pytest.raises(RuntimeError, match="mine"), eval_mode(model):
        assert not model.training and not torch.is_grad_enabled()
        raise RuntimeError("mine")
    assert all(module.training for module in model.modules()) and torch.is_grad_enabled()


def test_a_half_precision_model_gives_float32(tiny_llama) -> None:
    h_BTD, _ = read_residuals(copy.deepcopy(tiny_llama).bfloat16(), PROMPTS, COMPLETIONS, 1)
    exact, _ = read_residuals(tiny_llama, PROMPTS, COMPLETIONS, 1)
    assert h_BTD.dtype == torch.float32
    assert (h_BTD - exact).norm() < 0.05 * exact.norm()


@pytest.mark.parametrize(
    ("prompts", "completions", "sentence"),
    [
        ([], [], "completion_ids: the batch is empty; give at least one row"),
        ([[0]], [[3], [4]], "completion_ids: 2 rows for 1 prompts; give one each"),
        ([[0], [0]], [[3], []], "completion_ids: row 1 has no tokens; leave such rows out"),
        (
            [[0], [0] * 100], [[3], [4] * 157],
            "completion_ids: row 1 has 257 tokens with its prompt; the model reads at most 256",
        ),
        ([[0], [0]], [[3], [64]], "completion_ids: row 1 holds token 64; the model knows 0 to 63"),
        ([[-100]], [[3]], "completion_ids: row 0 holds token -100; the model knows 0 to 63"),
    ],
)  # fmt: skip
def test_bad_rows_are_named_before_any_forward(tiny_llama, prompts, completions, sentence: str) -> None:
    with counted(tiny_llama) as calls, pytest.raises(InputError) as caught:
        read_residuals(tiny_llama, prompts, completions, 1)
    assert str(caught.value) == sentence
    assert calls == [0, 0, 0, 0]


def test_a_model_whose_tokens_see_later_ones_is_refused() -> None:
    shape = {
        "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0,
    }  # fmt: skip
    seen = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
            "image_size": 28, "patch_size": 14}  # fmt: skip
    pictures = PaliGemmaConfig(
        text_config=GemmaConfig(**shape).to_dict(),
        vision_config=SiglipVisionConfig(**seen).to_dict(),
        projection_dim=32,
        image_token_index=63,
    )
    encoder = Gemma3TextConfig(**shape, use_bidirectional_attention=True)
    for model in (PaliGemmaForConditionalGeneration(pictures), Gemma3ForCausalLM(encoder)):
        with pytest.raises(InputError, match=f"^model: tokens of {type(model).__name__} see later ones; only causal"):
            iter_residuals(model, PROMPTS, COMPLETIONS, 0)
    causal = Gemma3ForCausalLM(Gemma3TextConfig(**shape))
    assert next(iter(iter_residuals(causal, PROMPTS, COMPLETIONS, 0))).mask_BT.any()


def test_a_row_that_fills_the_context_exactly_is_read(tiny_gpt2) -> None:
    h_BTD, _ = read_residuals(tiny_gpt2, [[0] * 100], [[4] * 28], 0)
    assert h_BTD.shape == (1, 28, 32)


def test_a_nan_state_is_named_by_row_and_layer(tiny_llama) -> None:
    model = copy.deepcopy(tiny_llama)
    with torch.no_grad():
        model.model.embed_tokens.weight[43] = float("nan")  # only row 3 holds token 43, as its last
    with pytest.raises(InputError) as caught:
        read_residuals(model, PROMPTS, COMPLETIONS, 2)
    want = "residual: the state after block 2 is NaN at row 3; check the model's weights and dtype"
    assert str(caught.value) == want


def test_an_infinite_state_is_named_too(tiny_llama) -> None:
    model = copy.deepcopy(tiny_llama)
    find_blocks(model)[1].register_forward_hook(lambda _module, _inputs, out: torch.full_like(out, float("inf")))
    with pytest.raises(InputError, match="after block 1 is infinite at row 1;"):
        read_residuals(model, PROMPTS[:2], [COMPLETIONS[0] * 3, COMPLETIONS[1]], 1)


def test_norm_outliers_drops_only_what_exceeds_ten_masked_medians() -> None:
    h_BTD = torch.zeros(2, 6, 2)
    h_BTD[..., 0] = torch.tensor([[1.0, 1.0, 10.0, 10.1, 1e6, 1e6], [1e4, 1e3, 1e6, 1e6, 1e6, 1e6]])
    mask_BT = torch.tensor([[True] * 4 + [False] * 2, [True] * 2 + [False] * 4])
    # The first row's median is the lower middle of 1, 1, 10 and 10.1; with what is masked out it would be 10.
    # The second row's is 1e3: of both rows together it would be 10, and nothing of that row would be left.
    assert norm_outliers(h_BTD, mask_BT).tolist() == [[True] * 3 + [False] * 3, [True] * 2 + [False] * 4]
    assert norm_outliers(h_BTD, mask_BT, factor=10.2).tolist() == mask_BT.tolist()
    assert norm_outliers(h_BTD, torch.zeros_like(mask_BT)).sum() == 0


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 999), st.integers(1, 5), st.integers(1, 9))
def test_norm_outliers_takes_the_lower_median_of_each_rows_numbers(seed: int, rows: int, tokens: int) -> None:
    rng = np.random.default_rng(seed)
    norm_BT = rng.choice([0.5, 1.0, 4.0, 30.0, np.inf, np.nan], size=(rows, tokens))
    mask_BT = rng.random((rows, tokens)) < 0.7
    wanted = np.zeros_like(mask_BT)
    for b in range(rows):
        counted = sorted(x for x, seen in zip(norm_BT[b], mask_BT[b], strict=True) if seen and not np.isnan(x))
        if counted:
            wanted[b] = mask_BT[b] & (norm_BT[b] <= 10 * counted[(len(counted) - 1) // 2])
    h_BTD = torch.tensor(norm_BT)[..., None]
    assert norm_outliers(h_BTD, torch.tensor(mask_BT)).tolist() == wanted.tolist()
