"""Vectors, contrasts and fits against the plain formulas."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mechreward.errors import InputError
from mechreward.steering import Protocol, Variant, autoconditional, contrast, repetition, steering_vector, sweep
from mechreward.steering.examples import mean_activations
from mechreward.steering.sweep import Point, check_strengths, find_knee


def test_caa_vector_averages_paraphrases_first(llama) -> None:
    def last(text: str) -> torch.Tensor:
        ids = torch.tensor([llama.tokenizer(text)["input_ids"]])
        with torch.no_grad():
            return llama.model(ids, output_hidden_states=True).hidden_states[2][0, -1]

    pairs = [(["12+7", "ab", "9"], "12-7"), ("x=1", "x=234")]
    first = (last("12+7") + last("ab") + last("9")) / 3 - last("12-7")
    wanted = (first + last("x=1") - last("x=234")) / 2
    torch.testing.assert_close(steering_vector(llama, 1, pairs), wanted, rtol=1e-3, atol=1e-3)
    for bad in ([], [([], "a")]):
        with pytest.raises(InputError, match="pairs:"):
            steering_vector(llama, 1, bad)


def test_contrast_of_sets_of_unequal_size(llama, llama_sae) -> None:
    variant = Variant(llama, llama_sae)
    first, second = ["aaaa", "aaab", "abaa", "caaa", "aada"], ["9999", "9989", "1999"]
    found = contrast(variant, first, second, k=3)
    means = [np.log1p(np.stack([mean_activations(variant, t) for t in side])).mean(0) for side in (first, second)]
    difference = dict(zip(found.frame["id"], found.frame["difference"], strict=True))
    for feature, value in difference.items():
        assert value == pytest.approx(means[0][feature] - means[1][feature])
    assert all(difference[i] > 0 for i in found.first.ids) and all(difference[i] < 0 for i in found.second.ids)
    assert found.first.ids and found.second.ids and found.frame["q_value"].is_monotonic_increasing
    with pytest.raises(InputError, match="second: 1 texts"):
        contrast(variant, first, second[:1])


def test_mean_activations_leave_bos_out(llama, llama_sae) -> None:
    variant = Variant(llama, llama_sae)
    seen = variant.inspect([0, 9, 20])
    wanted = seen.matrix()[1:].mean(0)
    assert np.abs(seen.matrix()[0]).max() > 0
    np.testing.assert_allclose(mean_activations(variant, [0, 9, 20]), wanted, rtol=1e-5)


@pytest.mark.parametrize(
    ("ids", "share"), [([1, 2, 3], 0.0), ([1] * 8, 0.8), ([1, 2, 3, 4, 1, 2, 3, 4, 1], 2 / 6), (range(20), 0.0)]
)
def test_repetition_by_hand(ids, share) -> None:
    assert repetition(list(ids)) == pytest.approx(share)


def point(strength: float, behaviour: float, fluent: bool = True, arm: str = "edit") -> Point:
    return Point(arm, strength, behaviour, 0.0, 1.0, 0.1, 0.0, 10, fluent)


def test_the_knee_is_the_smallest_fluent_strength_with_most_of_the_gain() -> None:
    none = point(0.0, 0.2, arm="none")
    edits = [point(2.0, 0.7), point(0.5, 0.3), point(1.0, 0.65), point(4.0, 1.0, fluent=False)]
    assert find_knee([none, *edits, point(0.1, 0.9, arm="random")]) == 1.0  # .45 of .5 is 90 %
    assert find_knee([none, point(2.0, 0.7), point(1.0, 0.64)]) == 2.0
    assert find_knee([none, point(1.0, 0.2), point(2.0, 0.1)]) is None
    assert find_knee([none, point(4.0, 1.0, fluent=False)]) is None


def test_the_knee_of_factors_is_the_one_nearest_to_1() -> None:
    curve = [point(0.0, 0.2, arm="none"), *(point(factor, 0.9) for factor in (0.0, 0.5, 2.0))]
    assert find_knee(curve, "scale") == 0.5 and find_knee(curve) == 0.0


def test_texts_of_bos_alone_are_refused(llama, llama_sae) -> None:
    variant, texts = Variant(llama, llama_sae), [[9, 20], [0], [20, 31], [7, 5]]
    for use in (lambda: contrast(variant, texts, texts), lambda: autoconditional(variant, texts[:1] * 4, [[0]] * 4)):
        with pytest.raises(InputError, match="^text: '<s>' has no token but BOS"):
            use()


@pytest.mark.parametrize("strengths", [(1.0, float("nan")), (float("inf"),), (1.0, 1.0), ()])
def test_strengths_that_are_none(strengths) -> None:
    with pytest.raises(InputError, match="^strengths: .* must be at least one finite number, none of them twice"):
        check_strengths(strengths, 4)


def test_a_sweep_of_factors_takes_the_knee_nearest_to_1(llama, llama_sae) -> None:
    """Both factors gain as much, against answers without an edit that score nothing."""
    scores = iter([0.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    protocol = Protocol(
        prompts=["12+7=", "a"],
        score=lambda *_: next(scores),
        max_new_tokens=3,
        nll_margin=1e9,
        repetition_margin=1.0,
    )
    assert sweep(Variant(llama, llama_sae), 3, [0.0, 0.9], protocol, mode="scale", controls=()).knee == 0.9
