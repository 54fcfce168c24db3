"""Cuts of long chains against trying every one."""

from __future__ import annotations

import itertools
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mechreward.chains import Step, cut_long, token_entropies
from mechreward.errors import InputError
from mechreward.models import LoadedModel


def steps_of(lengths: list[int]) -> list[Step]:
    ends = list(itertools.accumulate(lengths))
    return [Step("x", e - n, e, e - n, e) for n, e in zip(lengths, ends, strict=True)]


def test_cuts_stand_where_entropy_is_high() -> None:
    entropies = [0.0, 0.0, 0.1, 0.0, 0.9, 0.0, 0.5, 0.0, 0.2, 0.0]
    steps = steps_of([2, 2, 2, 2, 2])
    assert cut_long(steps, entropies, 10) == [(0, 10)]
    assert cut_long(steps, entropies, 6) == [(0, 4), (4, 10)]
    assert cut_long(steps, entropies, 4) == [(0, 4), (4, 6), (6, 10)]
    assert cut_long(steps, [0.0] * 6 + [2.0] + [0.0] * 3, 6) == [(0, 6), (6, 10)]


def test_a_step_that_is_too_long_is_cut_inside() -> None:
    entropies = [0.0, 0.0, 0.0, 0.3, 0.0, 0.8, 0.0, 0.0]
    assert cut_long(steps_of([1, 6, 1]), entropies, 4) == [(0, 4), (4, 8)]
    assert cut_long(steps_of([8]), entropies, 6) == [(0, 5), (5, 8)]
    # As few cuts inside as can be, whatever the entropies there: (0, 3), (3, 7), (7, 10) would have two.
    assert cut_long(steps_of([2, 8]), [float(t in (3, 7)) for t in range(10)], 4) == [(0, 2), (2, 6), (6, 10)]


@given(
    st.lists(st.integers(1, 5), min_size=1, max_size=5),
    st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=25, max_size=25),
    st.integers(1, 8),
)
@settings(max_examples=150, deadline=None)
def test_the_best_of_all_cuts(lengths: list[int], entropies: list[float], limit: int) -> None:
    steps, n = steps_of(lengths), sum(lengths)
    if n > 11:
        return
    ends = {step.token_end for step in steps}

    def cost(cuts: tuple[int, ...]) -> tuple[int, int, float]:
        return len(set(cuts) - ends), len(cuts), -sum(entropies[cut] for cut in cuts)

    every = itertools.chain.from_iterable(itertools.combinations(range(1, n), k) for k in range(n))
    fitting = [c for c in every if all(b - a <= limit for a, b in itertools.pairwise([0, *c, n]))]
    pieces = cut_long(steps, entropies[:n], limit)
    assert [a for a, _ in pieces] == [0, *(b for _, b in pieces[:-1])] and pieces[-1][1] == n
    assert all(0 < b - a <= limit for a, b in pieces)
    assert cost(tuple(b for _, b in pieces[:-1])) == min(map(cost, fitting))


def test_one_very_long_step_takes_no_long_time() -> None:
    started = time.process_time()
    assert len(cut_long(steps_of([20_000]), [1.0] * 20_000, 16)) == 1250
    assert time.process_time() - started < 3  # three times as long where every place before is tried


def test_entropies_are_those_of_the_distributions(tiny_llama, char_tokenizer) -> None:
    prompts, completions = [[5, 6], [7]], [[8, 9, 10], [11]]
    got = token_entropies(LoadedModel(tiny_llama, char_tokenizer, "x"), prompts, completions, batch_size=1)
    for prompt, completion, values in zip(prompts, completions, got, strict=True):
        assert len(values) == len(completion)
        for t, value in enumerate(values):
            with torch.no_grad():
                p = tiny_llama(torch.tensor([[*prompt, *completion[:t]]])).logits[0, -1].double().softmax(-1)
            assert value == pytest.approx(float(-(p * p.log()).sum()), abs=1e-4)


def test_bad_input_is_one_sentence() -> None:
    with pytest.raises(InputError, match="^max_tokens: 0 is too small; a piece has at least 1 token$"):
        cut_long(steps_of([1]), [0.0], 0)
    with pytest.raises(InputError, match="^steps: the chain has none; there is nothing to cut$"):
        cut_long([], [], 4)
    with pytest.raises(InputError, match="^entropies: 1 are given for 2 tokens; give one each$"):
        cut_long(steps_of([2]), [0.0], 4)
