"""The check on a model: which tokens are read, and when the other blocks are."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mechreward.errors import InputError
from mechreward.models import LoadedModel, load_model
from mechreward.rollout import sample_responses
from mechreward.sae import SAE, check_on_model, check_sae, load_sae
from mechreward.sae.on_model import _spread, block_states
from mechreward.sae.rows import Row
from mechreward.tasks import load_questions
from mechreward.tiny import MODEL, SAE_FOLDER

BOS, EOS, PAD = 0, 1, 2


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load_model(str(MODEL))


@pytest.fixture(scope="module")
def rows(tiny: LoadedModel) -> list[Row]:
    questions = load_questions("tiny:easy", limit=8, seed=5)
    responses = sample_responses(tiny, questions, n=2, max_new_tokens=48, seed=3)
    return [(r.prompt_ids, r.completion_ids) for r in responses]


@pytest.fixture(scope="module")
def sae() -> SAE:
    return load_sae(SAE_FOLDER)


def at(sae: SAE, layer: int) -> SAE:
    return replace(sae, meta=replace(sae.meta, layer=layer))


def test_states_are_those_of_plain_forwards_without_special_tokens(
    tiny_llama: PreTrainedModel, char_tokenizer: PreTrainedTokenizerFast
) -> None:
    loaded = LoadedModel(tiny_llama, char_tokenizer, "tiny")
    rows: list[Row] = [((BOS, 5, 6), (7, BOS, 8, EOS)), ((BOS,), (9, PAD, 10, 11, 12, EOS)), ((20, 21), (22,))]
    want: dict[int, set[tuple[float, ...]]] = {0: set(), 2: set()}
    for prompt, completion in rows:
        with torch.no_grad():
            states = tiny_llama(torch.tensor([[*prompt, *completion]]), output_hidden_states=True).hidden_states
        for layer in want:
            for place, token in enumerate(completion):
                if token not in (BOS, PAD):
                    want[layer].add(rounded(states[layer + 1][0, len(prompt) + place]))
    got = block_states(loaded, rows, [2, 0], batch_size=2)
    assert sorted(got) == [0, 2] and len(got[0]) == 9
    assert {layer: set(map(rounded, h_ND)) for layer, h_ND in got.items()} == want


def rounded(h_D: Tensor) -> tuple[float, ...]:
    return tuple(round(x, 2) + 0.0 for x in h_D.tolist()[:6])


def test_massive_tokens_are_left_out(tiny_llama: PreTrainedModel, char_tokenizer: PreTrainedTokenizerFast) -> None:
    loaded = LoadedModel(tiny_llama, char_tokenizer, "tiny")
    row: Row = ((BOS,), tuple(range(10, 30)))
    block = tiny_llama.model.layers[1]

    def enlarge(_module: object, _inputs: object, output: Tensor) -> Tensor:
        output = output.clone()
        output[:, 5] *= 1e4
        return output

    plain = block_states(loaded, [row], [1])[1]
    handle = block.register_forward_hook(enlarge)
    try:
        without = block_states(loaded, [row], [1])[1]
    finally:
        handle.remove()
    # Place 5 of the forward is place 4 of the completion.
    assert torch.equal(without, torch.cat([plain[:4], plain[5:]]))


def test_only_its_own_block_is_read_where_it_fits(tiny: LoadedModel, sae: SAE, rows: list[Row]) -> None:
    check = check_on_model(sae, tiny, rows)
    assert list(check.fvu_by_layer) == [2] and check.findings == ()
    every = check_on_model(sae, tiny, rows, every_block=True)
    assert list(every.fvu_by_layer) == [0, 1, 2, 3, 4]
    assert (every.fvu, every.n_tokens) == (pytest.approx(check.fvu), check.n_tokens)
    assert every == check_sae(sae, block_states(tiny, rows, range(5)))


def test_the_other_blocks_are_read_where_it_does_not(tiny: LoadedModel, sae: SAE, rows: list[Row]) -> None:
    check = check_on_model(at(sae, 3), tiny, rows)
    assert list(check.fvu_by_layer) == [0, 1, 2, 3, 4]
    (finding,) = check.findings
    assert finding.startswith("likely a wrong layer: ") and "on block 2 than on block 3" in finding


def test_rows_are_spread() -> None:
    rows: list[Row] = [((0,), (i,) * 10) for i in range(12)]
    assert _spread(rows, 30) == rows[::4]
    assert _spread(rows, 59) == rows[::2]
    assert _spread(rows, 61) == rows
    assert _spread(rows, 10_000) == rows


def test_bad_input(
    tiny: LoadedModel, tiny_llama: PreTrainedModel, char_tokenizer: PreTrainedTokenizerFast, sae: SAE, rows: list[Row]
) -> None:
    with pytest.raises(InputError, match="layer: 5 is out of range; the model has blocks 0 to 4"):
        check_on_model(at(sae, 5), tiny, rows)
    other = LoadedModel(tiny_llama, char_tokenizer, "other")
    with pytest.raises(InputError, match="sae: it reads residuals of width 128, but other has width 32"):
        check_on_model(sae, other, rows)
    with pytest.raises(InputError, match="rows: there are none"):
        check_on_model(sae, tiny, [])
    with pytest.raises(InputError, match="rows: no token is left to read"):
        check_on_model(sae, tiny, [((5,), (tiny.tokenizer.bos_token_id,))])
