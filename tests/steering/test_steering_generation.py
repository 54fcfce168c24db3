"""Steered generation token for token against steering written out by hand: models, modes, batches, padding, caches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from mechreward.errors import InputError
from mechreward.models import LoadedModel, iter_logits, read_residuals, unwrap
from mechreward.sae import SAE
from mechreward.steering import Variant

EOS, PAD = 1, 2
MODELS = ["gpt2", "llama", "qwen3_5", "lora"]
TEXTS = ["12+7=", "a", "sam has 3 +", "Q: x\nA:", "9", "the sum of 4", "zz", "b=2, c=3."]
NEW = 6


def nudge(acts_NF: Tensor) -> Tensor:
    acts_NF[:, [3, 20]] += torch.tensor([2.0, -1.0])
    return acts_NF


def pin(acts_NF: Tensor) -> Tensor:
    acts_NF[:, [3, 20]] = torch.tensor([3.0, 0.0])
    return acts_NF


def scale(acts_NF: Tensor) -> Tensor:
    acts_NF[:, [3, 20, 5, 6, 7, 8]] *= 3.0
    return acts_NF


def when(acts_NF: Tensor) -> Tensor:
    for row_F in acts_NF:
        if row_F[3] > 0.2 or not (row_F[20] < 0.4):
            row_F[11] = 4.0
    return acts_NF


def steer(variant: Variant, mode: str) -> None:
    if mode == "nudge":
        variant.set({3: 2.0, 20: -1.0}, mode="nudge", unit="raw")
    elif mode == "pin":
        variant.set({3: 3.0, 20: 0.0}, mode="pin", unit="raw")
    elif mode == "scale":
        variant.set([3, 20, 5, 6, 7, 8], 3.0, mode="scale")
    else:
        condition = (variant.feature(3) > 0.2) | ~(variant.feature(20) < 0.4)
        variant.set_when(condition, 11, 4.0, mode="pin", unit="raw")


MODES: dict[str, Callable[[Tensor], Tensor]] = {"nudge": nudge, "pin": pin, "scale": scale, "when": when}


def prompts(loaded: LoadedModel) -> list[list[int]]:
    # With BOS, which is not edited, in half of the rows.
    rows = [loaded.tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    return [[0, *row] if i % 2 else row for i, row in enumerate(rows)]


def plain_generate(loaded: LoadedModel, rows: list[list[int]], use_cache: bool) -> list[list[int]]:
    """transformers' own `generate`, padded on the left."""
    width = max(map(len, rows))
    ids = torch.tensor([[PAD] * (width - len(row)) + row for row in rows])
    seen = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    drawn = unwrap(loaded.model).generate(
        input_ids=ids, attention_mask=seen, max_new_tokens=NEW, do_sample=False, use_cache=use_cache, pad_token_id=PAD
    )
    cut = [row.index(EOS) + 1 if EOS in row else NEW for row in drawn[:, width:].tolist()]
    return [row[:end] for row, end in zip(drawn[:, width:].tolist(), cut, strict=True)]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", MODELS)
def test_greedy_text_is_the_reference_s(name: str, mode: str, model_of, hand) -> None:
    loaded = model_of(name)
    sae = hand.make_sae(loaded)
    variant = Variant(loaded, sae)
    rows = prompts(loaded)
    plain = [response.completion_ids for (response,) in variant.generate(rows, max_new_tokens=NEW)]
    steer(variant, mode)
    wanted = [hand.greedy(loaded, sae, MODES[mode], row, NEW) for row in rows]
    assert sum(list(a) != b for a, b in zip(plain, wanted, strict=True)) >= 2, "the edit has to matter"
    for size in (1, 8):
        drawn = variant.generate(rows, max_new_tokens=NEW, batch_size=size)
        assert [list(response.completion_ids) for (response,) in drawn] == wanted
    for use_cache in (True, False):
        with variant.steered():
            assert plain_generate(loaded, rows, use_cache) == wanted
            assert plain_generate(loaded, rows[:1], use_cache) == wanted[:1]


@pytest.mark.parametrize("name", MODELS)
def test_edits_of_the_completion_alone(name: str, model_of, hand) -> None:
    loaded = model_of(name)
    sae = hand.make_sae(loaded)
    variant = Variant(loaded, sae, where="completion")
    steer(variant, "pin")
    rows = prompts(loaded)
    wanted = [hand.greedy(loaded, sae, pin, row, NEW, completion_only=True) for row in rows]
    assert wanted != [hand.greedy(loaded, sae, pin, row, NEW) for row in rows]
    for size in (1, 8):
        drawn = variant.generate(rows, max_new_tokens=NEW, batch_size=size)
        assert [list(response.completion_ids) for (response,) in drawn] == wanted
    for use_cache in (True, False):
        with variant.steered(after=rows):
            assert plain_generate(loaded, rows, use_cache) == wanted


@pytest.mark.parametrize("where", ["all", "completion"])
@pytest.mark.parametrize("name", MODELS)
def test_a_teacher_forced_pass_sees_what_generation_saw(name: str, where: str, model_of, hand) -> None:
    loaded = model_of(name)
    sae = hand.make_sae(loaded)
    variant = Variant(loaded, sae, where=where)
    steer(variant, "when")
    rows = prompts(loaded)
    responses = [response for (response,) in variant.generate(rows, max_new_tokens=NEW)]
    completions = [list(response.completion_ids) for response in responses]
    with variant.steered(rows if where == "completion" else None):
        batches = list(iter_logits(loaded.model, rows, completions))
    for batch in batches:
        for i, row in enumerate(batch.rows):
            got = batch.logprobs_BT[i, : len(completions[row])]
            torch.testing.assert_close(got, torch.tensor(responses[row].logprobs), rtol=1e-3, atol=1e-4)
            first = len(rows[row]) - 1 if where == "completion" else 0
            by_hand = hand.logits(loaded, sae, when, [*rows[row], *completions[row]], first)[len(rows[row]) - 1 : -1]
            torch.testing.assert_close(batch.logits_BTV[i, : len(completions[row])], by_hand, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["gpt2", "llama", "qwen3_5", "gemma2", "qwen3_5_image_text", "lora"])
def test_cleared_is_the_base_model_bit_for_bit(name: str, model_of, hand) -> None:
    loaded = model_of(name)
    inner = unwrap(loaded.model)
    ids = torch.tensor([[0, 9, 20, 31], [0, 7, 7, 40]])
    before = {key: value.clone() for key, value in inner.state_dict().items()}
    with torch.no_grad():
        base = inner(ids).logits
    variant = Variant(loaded, hand.make_sae(loaded))
    steer(variant, "nudge")
    with torch.no_grad(), variant.steered():
        steered = inner(ids).logits
    assert not torch.equal(steered, base)
    with torch.no_grad():
        assert torch.equal(inner(ids).logits, base)
    cleared, reset = variant.copy(), variant.copy()
    cleared.clear([3, 20])
    reset.reset()
    for empty in (cleared, reset):
        with torch.no_grad(), empty.steered():
            assert torch.equal(inner(ids).logits, base)
    assert all(torch.equal(value, before[key]) for key, value in inner.state_dict().items())


def test_hooks_are_gone_after_an_error(llama: LoadedModel, llama_sae: SAE) -> None:
    def hooks() -> list[object]:
        return [h for m in llama.model.modules() for h in (*m._forward_hooks.values(), *m._forward_pre_hooks.values())]

    variant = Variant(llama, llama_sae)
    steer(variant, "pin")
    # transformers may have left its own on a model that other tests use too.
    before = hooks()
    with pytest.raises(ZeroDivisionError), variant.steered():
        assert len(hooks()) > len(before)
        raise ZeroDivisionError
    assert hooks() == before


def test_whatever_runs_inside_is_steered(llama: LoadedModel, llama_sae: SAE) -> None:
    """A residual read at the block itself, half padded, is the edited one; the block before is as it was."""
    rows, prompt = [[9, 20, 31], [7]], [[0], [0, 5]]
    plain, mask = read_residuals(llama.model, prompt, rows, 1)
    variant = Variant(llama, llama_sae)
    steer(variant, "nudge")
    with variant.steered():
        edited, _ = read_residuals(llama.model, prompt, rows, 1)
        earlier, _ = read_residuals(llama.model, prompt, rows, 0)
    added = 2.0 * llama_sae.W_dec_FD[3] - llama_sae.W_dec_FD[20]
    torch.testing.assert_close(edited - plain, mask[..., None] * added, rtol=1e-4, atol=1e-3)
    assert torch.equal(earlier, read_residuals(llama.model, prompt, rows, 0)[0])


def test_a_closed_token_is_left_alone_in_a_step_with_a_cache(llama: LoadedModel, llama_sae: SAE) -> None:
    """BOS, drawn on its own, beside another token."""
    variant, ids = Variant(llama, llama_sae), torch.tensor([[0], [9]])
    steer(variant, "nudge")
    with torch.no_grad():
        plain = llama.model(ids).logits
        with variant.steered():
            steered = llama.model(ids).logits
    moved = (steered - plain).abs().amax((1, 2)) > 0
    assert moved.tolist() == [False, True]


def test_ids_of_another_forward_are_no_ids(llama: LoadedModel, llama_sae: SAE) -> None:
    variant, ids = Variant(llama, llama_sae), torch.tensor([[9, 20, 31]])
    steer(variant, "nudge")
    with torch.no_grad(), variant.steered():
        llama.model(input_ids=ids)
        with pytest.raises(InputError, match="^inputs_embeds: a steered model needs token ids"):
            llama.model(inputs_embeds=torch.zeros(1, 3, 32))
