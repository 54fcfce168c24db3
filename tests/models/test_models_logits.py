"""Logits of completion tokens against one unpadded row at a time."""

from __future__ import annotations

import copy

import pytest
import torch

from mechreward.errors import InputError
from mechreward.models.logits import completion_logits, iter_logits

PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12], [4, 4]]
COMPLETIONS = [[13, 14], [15, 16, 17, 18, 19], [20], [21, 22, 1]]


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_gpt2"])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_each_row_is_as_if_alone(request, name: str, batch_size: int) -> None:
    model = request.getfixturevalue(name)
    seen = []
    for batch in iter_logits(model, PROMPTS, COMPLETIONS, batch_size):
        for row, logits_TV, ids_T, mask_T, logprobs_T in zip(
            batch.rows, batch.logits_BTV, batch.ids_BT, batch.mask_BT, batch.logprobs_BT, strict=True
        ):
            prompt, completion = PROMPTS[row], COMPLETIONS[row]
            with torch.no_grad():
                want = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
            n = len(completion)
            assert mask_T.tolist() == [True] * n + [False] * (len(mask_T) - n)
            assert ids_T[:n].tolist() == completion
            torch.testing.assert_close(logits_TV[:n], want, atol=1e-4, rtol=1e-4)
            chosen = torch.stack([want[t].log_softmax(-1)[token] for t, token in enumerate(completion)])
            torch.testing.assert_close(logprobs_T[:n], chosen, atol=1e-4, rtol=1e-4)
            assert logprobs_T[n:].tolist() == [0.0] * (len(mask_T) - n)
            seen.append(row)
    assert sorted(seen) == [0, 1, 2, 3]


def test_the_head_is_not_run_over_the_prompt(tiny_llama) -> None:
    widths = []
    handle = tiny_llama.lm_head.register_forward_hook(lambda _m, _i, logits: widths.append(logits.shape[1]))
    completion_logits(tiny_llama, [[5] * 9, [6] * 7], [[7, 8], [9]])
    handle.remove()
    assert widths == [5], "11 tokens, of which the first 6 of both rows come before the last one of a prompt"


def test_reading_leaves_the_mode_and_takes_no_gradient_while_training_has_both(tiny_gpt2) -> None:
    model = copy.deepcopy(tiny_gpt2).train()
    assert not next(iter_logits(model, PROMPTS, COMPLETIONS)).logits_BTV.requires_grad
    assert model.training
    assert completion_logits(model, PROMPTS, COMPLETIONS).logprobs_BT.requires_grad


def test_bad_rows_are_one_sentence(tiny_llama) -> None:
    with pytest.raises(InputError, match="^prompt_ids: row 1 is empty; something has to stand before"):
        iter_logits(tiny_llama, [[5], []], [[6], [7]])
    with pytest.raises(InputError, match="^completion_ids: row 1 has no tokens"):
        iter_logits(tiny_llama, [[5], [5]], [[6], []])
