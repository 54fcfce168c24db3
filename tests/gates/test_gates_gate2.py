"""Gate 2 on made-up results files: each verdict, steps to the target, pairing, crashes, bad files."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechreward.errors import InputError
from mechreward.gates import (
    ArmRun,
    Crash,
    Crossed,
    Evaluation,
    Gate2Bars,
    StudyResults,
    crossed_interval,
    gate2,
    judge_differences,
)
from mechreward.gates.gate2 import seeds_to_decide, steps_to

N = 40


def run(arm: str, seed: int, *accuracies: float, jitter: float = 0.02) -> ArmRun:
    """Evaluations every 5 steps; questions differ by a pattern of the seed's, the same in all arms."""
    pattern = np.random.default_rng(seed).normal(0, 0.05, N)
    noise = np.random.default_rng([seed, len(arm)]).normal(0, jitter, N)
    evaluations = [
        Evaluation(
            step=5 * place, correct={f"q{i}": min(max(float(a + d), 0.0), 1.0) for i, d in enumerate(pattern + noise)}
        )
        for place, a in enumerate(accuracies)
    ]
    return ArmRun(arm=arm, seed=seed, evaluations=tuple(evaluations))


def study(seeds: int = 5, **finals: float) -> StudyResults:
    runs = [run(arm, seed, 0.3, final) for arm, final in finals.items() for seed in range(seeds)]
    return StudyResults(judged="sae", runs=tuple(runs))


def test_a_better_reward_passes() -> None:
    result = gate2(study(outcome=0.5, sae=0.6, random=0.5, length=0.45))
    assert result.passed and result.verdict == "pass" and result.seeds_needed is None
    by = {(c.arm, c.against): c for c in result.comparisons}
    assert set(by) == {
        ("sae", "outcome"),
        ("random", "outcome"),
        ("length", "outcome"),
        ("sae", "random"),
        ("sae", "length"),
    }
    found = by["sae", "outcome"].found
    assert found is not None and found.low > 0.08 and found.high < 0.12
    final: dict[str, list[list[float]]] = {r.arm: [] for r in study(outcome=0.5, sae=0.6).runs}
    for r in study(outcome=0.5, sae=0.6).runs:
        final[r.arm].append(list(r.evaluations[-1].correct.values()))
    wanted = crossed_interval(np.array(final["sae"]) - np.array(final["outcome"]))
    assert (found.value, found.low, found.high) == pytest.approx((wanted.value, wanted.low, wanted.high))
    assert "against outcome +0." in result.reason and "against random +0." in result.reason
    assert by["sae", "outcome"].bootstrap is not None and by["sae", "outcome"].bootstrap[0] > 0.05


def test_as_good_as_random_features_is_futile() -> None:
    result = gate2(study(outcome=0.5, sae=0.6, random=0.6))
    assert result.verdict == "futile" and "less than +0.02 against random" in result.reason


def test_a_credit_of_its_own_is_held_against_random_features_of_that_credit() -> None:
    """What the credit does alone is no merit of the features: it passed against `random`, of another credit."""
    arms = {"outcome": 0.5, "sae/potential": 0.6, "random": 0.5, "random/potential": 0.6}
    results = study(**arms).model_copy(update={"judged": "sae/potential"})
    result = gate2(results)
    assert result.verdict == "futile" and "less than +0.02 against random/potential" in result.reason
    alone = gate2(results.model_copy(update={"runs": tuple(r for r in results.runs if r.arm != "random/potential")}))
    assert alone.verdict == "inconclusive" and "no arm 'random/potential'" in alone.reason
    assert gate2(study(outcome=0.5, sae=0.6, random=0.5, **{"random/potential": 0.6})).passed


def test_a_sure_gain_of_less_than_two_points_is_futile() -> None:
    result = gate2(study(outcome=0.5, sae=0.51, random=0.45))
    found = result.comparisons[0].found
    assert found is not None and found.low > 0 and found.high < 0.02
    assert result.verdict == "futile" and "against outcome" in result.reason.split("less than")[1]


def test_noise_is_inconclusive_and_says_how_many_seeds_decide() -> None:
    rng = np.random.default_rng(0)
    runs = [
        run(arm, seed, 0.3, final + rng.normal(0, 0.08))
        for arm, final in (("outcome", 0.5), ("sae", 0.55), ("random", 0.5))
        for seed in range(5)
    ]
    result = gate2(StudyResults(judged="sae", runs=tuple(runs)))
    assert result.verdict == "inconclusive" and result.seeds_needed is not None and result.seeds_needed > 5
    assert f"about {result.seeds_needed} seeds would decide" in result.reason


def test_few_seeds_and_no_random_arm_never_pass() -> None:
    few = gate2(study(4, outcome=0.5, sae=0.9, random=0.5))
    assert (
        few.verdict == "inconclusive"
        and few.reason.startswith("4 paired seeds, 5 are needed")
        and few.seeds_needed == 5
    )
    assert gate2(study(4, outcome=0.5, sae=0.9, random=0.5), Gate2Bars(min_seeds=4)).passed
    alone = gate2(study(outcome=0.5, sae=0.9))
    assert alone.verdict == "inconclusive" and "no arm 'random'" in alone.reason
    one = gate2(study(1, outcome=0.5, sae=0.9))
    assert one.verdict == "inconclusive" and one.comparisons[0].found is None


def test_pairs_only_seeds_in_common_and_names_crashes() -> None:
    runs = tuple(r for r in study(6, outcome=0.5, sae=0.6, random=0.5).runs if (r.arm, r.seed) != ("sae", 2))
    crash = Crash(arm="sae", seed=2, error="RuntimeError: out of memory")
    result = gate2(StudyResults(judged="sae", runs=runs, crashed=(crash,)))
    assert result.comparisons[0].seeds == (0, 1, 3, 4, 5)
    assert result.passed and "1 runs crashed (sae seed 2)" in result.reason
    assert result.to_dict()["crashed"] == [{"arm": "sae", "seed": 2, "error": "RuntimeError: out of memory"}]


def test_where_nothing_can_be_judged_the_crash_is_named() -> None:
    crashes = tuple(Crash(arm=arm, seed=0, error=f"MemoryError: of {arm}") for arm in ("sae", "random"))
    with pytest.raises(InputError, match="runs: there are none; .*; sae seed 0 crashed: MemoryError: of sae$"):
        gate2(StudyResults(judged="sae", runs=(), crashed=crashes))
    with pytest.raises(InputError, match="no finished run of arm 'sae'; there are outcome; sae seed 0 crashed: Mem"):
        gate2(StudyResults(judged="sae", runs=(run("outcome", 0, 0.5),), crashed=crashes))


def test_pairing_removes_what_a_seed_has_in_common() -> None:
    shifts = [-0.2, -0.1, 0.0, 0.1, 0.2]
    runs = [
        run(arm, seed, 0.3, final + shifts[seed])
        for arm, final in (("outcome", 0.5), ("sae", 0.6), ("random", 0.5))
        for seed in range(5)
    ]
    found = gate2(StudyResults(judged="sae", runs=tuple(runs))).comparisons[0].found
    assert found is not None and found.error < 0.01 and found.value == pytest.approx(0.1, abs=0.02)


def test_steps_to_ninety_percent_of_outcomes_final_accuracy() -> None:
    runs = [run("outcome", s, 0.2, 0.3, 0.5, jitter=0) for s in range(5)]
    runs += [run("sae", s, 0.2, 0.46 if s < 3 else 0.3, 0.47 if s < 4 else 0.3, jitter=0) for s in range(5)]
    result = gate2(StudyResults(judged="sae", runs=tuple(runs)))
    outcome, sae = result.arms
    mean = np.mean([list(r.evaluations[-1].correct.values()) for r in runs if r.arm == "outcome"])
    assert result.target == pytest.approx(0.9 * mean)
    assert outcome.steps_to_target == (10,) * 5
    assert sae.steps_to_target[4] is None and sae.median_steps in (5.0, 10.0)
    assert outcome.start == pytest.approx(np.mean([r.curve[0][1] for r in runs if r.arm == "outcome"]))
    never = [run("outcome", s, 0.2, 0.5, jitter=0) for s in range(2)]
    never += [run("sae", s, 0.1, 0.1, jitter=0) for s in range(2)]
    assert gate2(StudyResults(judged="sae", runs=tuple(never))).arms[1].median_steps is None


def test_steps_to_counts_equality() -> None:
    even = ArmRun(
        arm="a",
        seed=0,
        evaluations=tuple(Evaluation(step=s, correct={"q": v}) for s, v in ((0, 0.25), (4, 0.5), (8, 1))),
    )
    assert (steps_to(even, 0.5), steps_to(even, 0.51), steps_to(even, 1.01)) == (4, 8, None)


def crossed(value: float, half: float, seeds: int = 5) -> Crossed:
    return Crossed(value, value - half, value + half, half / 2.8, 4.0, seeds, 1000, (half / 2.8) ** 2 * seeds, 0.0, 0.0)


@given(st.floats(-0.2, 0.2), st.floats(0.001, 0.2), st.floats(-0.2, 0.2), st.floats(0.001, 0.2))
def test_verdicts_follow_the_bounds(a: float, ha: float, b: float, hb: float) -> None:
    found = {"outcome": crossed(a, ha), "random": crossed(b, hb)}
    verdict, reason, needed = judge_differences(found, 5, Gate2Bars())
    futile = min(a + ha, b + hb) < 0.02
    assert verdict == ("futile" if futile else "pass" if min(a - ha, b - hb) > 0 else "inconclusive")
    assert (needed is None) or (verdict == "inconclusive" and needed > 5)
    assert ("would decide" in reason) == (verdict == "inconclusive")


def test_the_nearest_verdict_is_planned_for() -> None:
    bars = Gate2Bars()
    good, better = crossed(0.05, 0.06), crossed(0.1, 0.12)
    both = seeds_to_decide({"outcome": good, "random": better}, bars)
    one = seeds_to_decide({"outcome": good, "random": crossed(0.1, 0.01)}, bars)
    assert both == one and both is not None
    loose = Crossed(0.05, -0.01, 0.11, 0.005, 1.0, 5, 1000, 0.005**2 * 5, 0.0, 0.0)
    assert seeds_to_decide({"outcome": loose}, bars) == 6, "an open verdict takes at least one seed more"
    below = seeds_to_decide({"outcome": crossed(-0.1, 0.13), "random": good}, bars)
    assert below is not None and below < both, "far under 2 points, futile is nearer than a pass"
    assert seeds_to_decide({"outcome": crossed(0.02, 0.5), "random": crossed(-0.0, 100.0)}, bars) is None


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda runs: runs[:0], "runs: there are none"),
        (lambda runs: runs[:2], "no finished run of arm 'sae'; there are outcome"),
        (lambda runs: runs[2:], "no finished run of arm 'outcome'"),
        (lambda runs: (*runs, runs[0]), "outcome seed 0 is there twice"),
        (
            lambda runs: (*runs, run("sae", 9, 0.1)),
            r"sae seed 9 was evaluated at steps \[0\]; they must rise and end at 5",
        ),
        (
            lambda runs: (*runs, ArmRun(arm="sae", seed=9, evaluations=(Evaluation(step=5, correct={"z": 1.0}),))),
            "sae seed 9 was tested on other questions at step 5",
        ),
    ],
)
def test_bad_results(change: object, sentence: str) -> None:
    runs = study(2, outcome=0.5, sae=0.6).runs
    with pytest.raises(InputError, match=sentence):
        gate2(StudyResults(judged="sae", runs=change(runs)))  # type: ignore[operator]


@pytest.mark.parametrize("judged", ["outcome", "random", "random/potential"])
def test_a_control_cannot_be_judged(judged: str) -> None:
    with pytest.raises(InputError, match=f"judged: '{judged}' is what an arm is judged against"):
        gate2(StudyResults(judged=judged, runs=study(2, outcome=0.5, random=0.6).runs))


def test_error_rates_in_made_up_studies() -> None:
    path = Path(__file__).parents[2] / "benchmarks" / "gate2_error_rates.py"
    spec = importlib.util.spec_from_file_location("gate2_error_rates", path)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script
    spec.loader.exec_module(script)
    rows = script.main(["--studies", "150", "--bootstraps", "1", "--seeds", "5", "--questions", "64"])
    rate = {(row["kind"], row["spread"]): row["rate"] for row in rows}
    assert max(rate[kind, spread] for kind in ("null", "noise") for spread in (0.01, 0.03)) <= 0.05
    assert rate["power", 0.01] > rate["null", 0.01] + 0.1
