"""Families against sums by hand: accuracy, agreement, and what a signal keeps."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations
from math import isnan, nan

import numpy as np
import pytest

from mechreward.errors import InputError
from mechreward.features import PackRephrasing
from mechreward.gates.rephrasing import MIN_MIXED, FamilyAnswer, Signal, accuracies, consistency, judge_signal
from mechreward.gates.statistics import Interval


def answers(*rows: tuple[str, str, str, str]) -> list[FamilyAnswer]:
    """(family, kind, member, "101"): an answer a digit."""
    return [FamilyAnswer(f, kind, member, bit == "1") for f, kind, member, bits in rows for bit in bits]


SMALL = answers(
    ("a", "original", "a", "110"),
    ("a", "names", "a~n", "100"),
    ("a", "order", "a~o", "111"),
    ("b", "original", "b", "000"),
    ("b", "names", "b~n", "010"),
    ("b", "order", "b~o", "001"),
)


def test_accuracy_by_kind() -> None:
    found = accuracies(SMALL)
    values = {kind: (row["value"], row["n"]) for kind, row in found.items()}
    expected = {"original": (2 / 6, 6), "names": (2 / 6, 6), "order": (4 / 6, 6), "variations": (6 / 12, 12)}
    assert values == {kind: (pytest.approx(value), n) for kind, (value, n) in expected.items()}
    assert all(row["low"] <= row["value"] <= row["high"] for row in found.values())
    assert "variations" not in accuracies([a for a in SMALL if a.kind == "original"])
    with pytest.raises(InputError, match="answers: there are none"):
        accuracies([])


def test_agreement_is_that_of_all_pairs_of_answers() -> None:
    found = consistency(SMALL)
    across, within = [], []
    for family in "ab":
        members: dict[str, list[bool]] = {}
        for answer in SMALL:
            if answer.family == family:
                members.setdefault(answer.member, []).append(answer.correct)
        across.append(np.mean([[x == y for x in m for y in k] for m, k in combinations(members.values(), 2)]))
        within.append(np.mean([[x == y for x, y in combinations(m, 2)] for m in members.values()]))
    assert found["across"]["value"] == pytest.approx(np.mean(across))
    assert found["within"]["value"] == pytest.approx(np.mean(within))
    assert found["across"]["n_families"] == 2
    single = answers(("a", "original", "a", "1"), ("a", "names", "a~n", "0"), ("b", "original", "b", "1"),
                     ("b", "names", "b~n", "1"))  # fmt: skip
    assert consistency(single)["across"]["value"] == 0.5 and "within" not in consistency(single)
    lone = answers(("c", "original", "c", "10"))
    assert consistency([*SMALL, *lone]) == found
    with pytest.raises(InputError, match="no family has two members"):
        consistency(answers(("a", "original", "a", "10")))


def world(n: int, lead: tuple[float, float], seed: int = 0) -> Signal:
    """Right answers score `lead` higher on originals, and on variations."""
    rng = np.random.default_rng(seed)
    rows = [(f"f{i:03}", kind, f"f{i:03}{kind[:2]}") for i in range(n) for kind in ("original", "names", "order")]
    made = [FamilyAnswer(f, kind, member, bool(k % 2)) for f, kind, member in rows for k in range(4)]
    scores = [rng.normal() + a.correct * lead[a.kind != "original"] for a in made]
    return judge_signal(made, scores, seed=1)


def test_verdicts() -> None:
    assert world(120, (2.0, 2.0)).verdict == "survives"
    assert world(120, (2.0, 0.0)).verdict == "brittle"
    assert world(120, (2.0, -2.0)).verdict == "brittle"
    assert world(120, (0.0, 2.0)).verdict == "no signal"
    assert world(40, (1.0, 0.3)).verdict == "inconclusive"


def test_few_families_decide_nothing() -> None:
    """Over one family a bootstrap has no width: a pack that kept .2 of its lead survived in a sixth of such worlds."""
    for n in (1, 5, MIN_MIXED - 1):
        found = world(n, (6.0, 6.0))
        assert (found.verdict, found.n_mixed) == ("inconclusive", n) and found.kept.low >= 0.5
    assert world(MIN_MIXED, (6.0, 6.0)).verdict == "survives"
    # Families without right and wrong answers to a variation do not count.
    plain = [FamilyAnswer(f"g{i}", kind, f"g{i}{kind}", kind == "names" or bool(k)) for i in range(20)
             for kind in ("original", "names") for k in range(2)]  # fmt: skip
    found = judge_signal(plain, [float(k % 2) for k in range(len(plain))])
    assert (found.verdict, found.n_mixed) == ("inconclusive", 0)


def test_what_goes_into_the_pack() -> None:
    found = judge_signal(SMALL, [float(i) for i in range(len(SMALL))])
    mark = replace(found, verdict="survives", kept=Interval(0.8, 0.6, 1.2, 0.1)).mark("hash", SMALL)
    assert mark == PackRephrasing(
        spec_hash="hash", verdict="survives", kept=0.8, interval=(0.6, 1.2), kinds=["names", "order"], n_families=2
    )
    # Nothing to keep, or nothing that is a number, is no share.
    nothing = replace(found, verdict="no signal", kept=Interval(0.8, 0.6, 1.2, 0.1)).mark("hash", SMALL)
    assert (nothing.kept, nothing.interval) == (None, None)
    for kept in (Interval(nan, nan, nan, nan), Interval(0.4, nan, nan, nan)):
        unsure = replace(found, verdict="inconclusive", kept=kept).mark("hash", SMALL)
        assert unsure.interval is None and unsure.kept == (None if isnan(kept.value) else 0.4)


def test_signal_in_exact_numbers() -> None:
    # Originals: 2 of 3 pairs in order. Variations: 2 of 2 in `a`; in `b` .5 (a tie) of 1, and m4 has no pair, so half.
    made = answers(
        ("b", "original", "m1", "10"),
        ("b", "names", "m0", "10"),
        ("a", "original", "m3", "110"),
        ("a", "names", "m2", "100"),
        ("b", "order", "m4", "11"),
    )
    scores = [2.0, 1.0, 5.0, 5.0, 3.0, 1.0, 2.0, 9.0, 8.0, 7.0, 0.0, 4.0]
    found = judge_signal(made, scores)
    assert found.originals.value == pytest.approx(2 / 3)
    assert found.variations.value == pytest.approx(2.25 / 2.5)
    assert found.kept.value == pytest.approx((2.25 / 2.5 - 0.5) / (2 / 3 - 0.5))


def test_families_without_a_variation_are_not_compared() -> None:
    both = answers(("b", "original", "b", "10"), ("b", "names", "b~n", "10"), ("a", "original", "a", "110"),
                   ("a", "names", "a~n", "100"))  # fmt: skip
    scores = [2.0, 1.0, 5.0, 5.0, 3.0, 1.0, 2.0, 9.0, 8.0, 7.0]
    lone = answers(("c", "original", "c", "1000"), ("d", "names", "d~n", "01"))
    found = judge_signal([*both, *lone], [*scores, 9.0, 0.0, 0.0, 0.0, 3.0, 1.0])
    assert found == judge_signal(both, scores)
    assert found.mark("hash", [*both, *lone]).n_families == 2
    with pytest.raises(InputError, match="answers: no question has an original and a variation"):
        judge_signal(lone, [1.0] * 6)


def test_the_order_of_answers_changes_nothing() -> None:
    """Members are put to their families by name, so that resampled families keep their own pairs."""
    rng = np.random.default_rng(3)
    rows = [
        (f"f{i}", kind, f"m{(7 * i + j) % 24:02}") for i in range(12) for j, kind in enumerate(("original", "names"))
    ]
    made = [FamilyAnswer(f, kind, member, bool(k % 2)) for f, kind, member in rows for k in range(4)]
    scores = [rng.normal() + 1.5 * a.correct * (int(a.family[1:]) % 3) for a in made]
    order = rng.permutation(len(made))
    found = judge_signal(made, scores)
    assert judge_signal([made[i] for i in order], [scores[i] for i in order]) == found
    assert found.originals.low < found.originals.value < found.originals.high
