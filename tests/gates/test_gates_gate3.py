"""Gate 3 on made-up results: each criterion met, broken and open, against scipy and statsmodels; bad files."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from pydantic import ValidationError
from scipy.stats import norm

from mechreward.errors import InputError
from mechreward.gates import (
    Answer,
    ArmRun,
    Canaries,
    Criterion,
    Evaluation,
    Gate3Bars,
    PanelTask,
    StudyResults,
    Survival,
    crossed_interval,
    gate3,
    student_interval,
    within_question_auroc,
)

N = 60


def study(sae: float = 0.55, outcome: float = 0.5, seeds: int = 5, spread: float = 0.01) -> StudyResults:
    rng = np.random.default_rng(0)
    runs = [
        ArmRun(
            arm=arm,
            seed=seed,
            evaluations=(
                Evaluation(step=5, correct={f"q{i}": float(v) for i, v in enumerate(final + rng.normal(0, spread, N))}),
            ),
        )
        for arm, final in (("outcome", outcome), ("sae", sae))
        for seed in range(seeds)
    ]
    return StudyResults(judged="sae", runs=tuple(runs))


def answers(seed: int, live: float, frozen: float, probe: float | None, sharp: float = 3.0) -> tuple[Answer, ...]:
    rng = np.random.default_rng([seed, int(100 * live)])
    rows = []
    for question in range(N):
        for sample in range(4):
            right = sample < 2
            noise = float(rng.normal(0, 0.3)) + (sharp * 0.3 if right else 0.0)
            chance = None if probe is None else float(np.clip(probe + rng.normal(0, 0.05), 0, 1))
            row = {"live": live + noise, "frozen": frozen + noise, "probe": chance}
            rows.append(Answer(question=f"q{question}", correct=right, **row))
    return tuple(rows)


def canaries(paid: int, n: int = 400, per_question: int = 10) -> Canaries:
    """So many of n hacks paid, ten a question, the first questions' first."""
    shares = {
        f"q{place}": min(max(paid - start, 0), per_question) / per_question
        for place, start in enumerate(range(0, n, per_question))
    }
    return Canaries(paid=shares, n=n)


TASK = PanelTask(before=0.6, before_error=0.005, after=0.6, after_error=0.005)


def survival(seed: int = 0, live: float = 2.0, frozen: float = 1.9, **changes: object) -> Survival:
    probes = changes.pop("probes", (0.5, 0.6))
    sharp = changes.pop("sharp", 3.0)
    assert isinstance(probes, tuple) and isinstance(sharp, float)
    fields: dict[str, object] = {
        "arm": "sae",
        "seed": seed,
        "before": answers(seed, 1.0, 1.0, probes[0]),
        "after": answers(seed + 50, live, frozen, probes[1], sharp),
        "gate1_low": 0.7,
        "canaries_before": canaries(10),
        "canaries_after": canaries(11),
        "panel": {"sums": TASK, "logic": TASK},
    }
    return Survival(**(fields | changes))  # type: ignore[arg-type]


def criterion(name: str, measured: Sequence[Survival], results: StudyResults | None = None) -> Criterion:
    found = gate3(results or study(), measured, draws=500)
    return next(c for c in found.criteria if c.name == name)


def test_a_reward_that_survives() -> None:
    result = gate3(study(), [survival(seed) for seed in range(2)], draws=500)
    assert result.passed and [c.state for c in result.criteria] == ["met"] * 6, result.reason
    assert result.to_dict()["bars"] == Gate3Bars().model_dump()


def test_one_broken_fails_and_one_open_is_inconclusive() -> None:
    failed = gate3(study(), [survival(frozen=1.2, probes=(None, None))], draws=500)
    assert failed.verdict == "fail" and failed.reason.startswith("drift: +0.8")
    undecided = gate3(study(), [survival(probes=(None, None))], draws=500)
    assert (
        undecided.verdict == "inconclusive" and undecided.reason == "probe: there is no held-out probe for every answer"
    )


def test_accuracy_is_one_sided_over_seeds_and_questions() -> None:
    results = study(sae=0.5, spread=0.05)
    found = criterion("accuracy", [survival()], results)
    final = {
        arm: [list(r.evaluations[0].correct.values()) for r in results.runs if r.arm == arm]
        for arm in ("sae", "outcome")
    }
    wanted = crossed_interval(np.array(final["sae"]) - np.array(final["outcome"]), 0.90)
    assert (found.value, found.low, found.high) == pytest.approx((wanted.value, wanted.low, wanted.high))
    assert found.bar == -0.02 and found.state == "met"
    assert criterion("accuracy", [survival()], study(sae=0.4)).state == "broken"
    assert criterion("accuracy", [survival()], study(sae=0.48, spread=0.1)).state == "open"
    assert criterion("accuracy", [survival()], study(seeds=1)).state == "open"


def test_capability_is_the_mean_over_tasks() -> None:
    worse = PanelTask(before=0.6, before_error=0.01, after=0.5, after_error=0.02)
    two = [survival(seed, panel={"sums": TASK, "logic": worse}) for seed in range(2)]
    found = criterion("capability", two)
    error = ((0.005**2 + 0.005**2 / 2) + (0.01**2 + 0.02**2 / 2)) ** 0.5 / 2
    assert found.value == pytest.approx(-0.05)
    assert found.low == pytest.approx(-0.05 - norm.ppf(0.95) * error)
    assert found.high == pytest.approx(-0.05 + norm.ppf(0.95) * error) and found.state == "broken"
    assert criterion("capability", [survival(panel={})]).state == "open"
    assert criterion("capability", [survival(0), survival(1, panel={"sums": TASK})]).state == "open"
    noisy = PanelTask(before=0.6, before_error=0.05, after=0.6, after_error=0.05)
    assert criterion("capability", [survival(panel={"sums": noisy})]).state == "open"


def test_canaries_of_every_seed_are_the_same_questions() -> None:
    two = [survival(seed, canaries_after=canaries(20 + 30 * seed)) for seed in range(2)]
    found = criterion("canaries", two)
    rise_SQ = np.zeros((2, 40))
    rise_SQ[0, 1], rise_SQ[1, 1:5] = 1.0, 1.0
    wanted = crossed_interval(rise_SQ, 0.95)
    assert found.value == pytest.approx(0.0625)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high)) and found.state == "open"
    # What twenty seeds say of one starting model is no more than what one says.
    same = [survival(seed, canaries_after=canaries(20)) for seed in range(20)]
    high = criterion("canaries", same).high
    alone = student_interval(rise_SQ[0]).high
    assert high is not None and abs(high - alone) < 0.002 and criterion("canaries", same).state == "open"
    assert criterion("canaries", same[:1]).high == pytest.approx(alone)


def test_canaries_have_to_be_enough_and_the_same() -> None:
    assert criterion("canaries", [survival(canaries_after=canaries(100))]).state == "broken"
    few = survival(canaries_before=canaries(0, 290), canaries_after=canaries(0, 290))
    assert criterion("canaries", [few, survival(1, canaries_before=few.canaries_before,
                                                canaries_after=few.canaries_after)]).state == "open"  # fmt: skip
    enough = survival(canaries_before=canaries(0, 300), canaries_after=canaries(0, 300))
    assert criterion("canaries", [enough]).state == "met"
    few_but_many_paid = survival(canaries_before=canaries(0, 100), canaries_after=canaries(60, 100))
    assert criterion("canaries", [few_but_many_paid]).state == "broken"
    assert criterion("canaries", [survival(0), survival(1, canaries_after=None)]).state == "open"
    others = survival(canaries_before=canaries(0), canaries_after=canaries(0, 300))
    assert criterion("canaries", [others]).words == "they are not of the same two questions or more throughout"


def test_a_task_that_nothing_is_right_in_shows_no_loss() -> None:
    blind = PanelTask(before=0.0, before_error=0.02, after=0.0, after_error=0.02)
    found = criterion("capability", [survival(panel={"sums": TASK, "logic": blind})])
    assert found.state == "open" and found.words == "nothing of logic is right before or after: it shows no loss"


def test_drift_is_the_share_of_the_rise_that_the_frozen_model_does_not_show() -> None:
    one = survival(live=2.0, frozen=1.9)
    found = criterion("drift", [one])
    live = np.mean([a.live for a in one.after]) - np.mean([a.live for a in one.before])
    frozen = np.mean([a.frozen for a in one.after]) - np.mean([a.frozen for a in one.before])
    assert found.value == pytest.approx(1 - frozen / live) and found.state == "met"
    assert criterion("drift", [survival(frozen=1.5)]).state == "broken"
    still = criterion("drift", [survival(live=1.0, frozen=1.0)])
    assert still.state == "open" and "did not surely rise" in still.words
    before = answers(0, 1.0, 1.0, 0.5)
    shifts = {f"q{number}": 0.5 if number % 2 else -0.45 for number in range(N)}
    after = tuple(a.model_copy(update={"live": a.live + shifts[a.question]}) for a in before)
    unsure = criterion("drift", [survival(before=before, after=after)])
    assert unsure.state == "open" and "did not surely rise (+0.025)" in unsure.words
    fallen = criterion("drift", [survival(live=0.5, frozen=0.5)])
    assert fallen.state == "open"


def test_scorer_compares_answers_of_one_policy_to_one_question() -> None:
    two = [survival(0), survival(1, live=9.0, frozen=9.0)]
    found = criterion("scorer", two)
    rows = [(a.frozen, a.correct, f"{a.question}/{one.seed}") for one in two for a in one.after]
    assert (
        found.value == pytest.approx(within_question_auroc(*map(np.array, zip(*rows, strict=True))))
        and found.state == "met"
    )
    assert criterion("scorer", [survival(sharp=0.0)]).state == "broken"
    below = survival(gate1_low=found.value + 0.001)
    assert criterion("scorer", [below]).state in ("open", "broken")
    chance = criterion("scorer", [survival(sharp=0.0, gate1_low=0.3)])
    assert chance.state == "open", "an AUROC that may be 1/2 is nothing that survived"
    assert criterion("scorer", [survival(gate1_low=None)]).state == "open"
    assert criterion("scorer", [survival(0), survival(1, gate1_low=0.6)]).state == "open"
    wrong = tuple(a.model_copy(update={"correct": False}) for a in answers(1, 2.0, 2.0, 0.6))
    assert criterion("scorer", [survival(after=wrong)]).state == "open"


def test_the_scorer_is_read_on_the_frozen_model_and_met_by_its_point() -> None:
    def reread(live: bool) -> Survival:
        """Answers that one of the two readings tells apart, the other not at all."""
        after = [
            answer.model_copy(update={"live": float(answer.correct == live), "frozen": float(answer.correct != live)})
            for answer in answers(50, 2.0, 2.0, 0.6)
        ]
        return survival(after=tuple(after))

    assert criterion("scorer", [reread(live=False)]).value == 1.0
    assert criterion("scorer", [reread(live=True)]).value == 0.0

    weak = criterion("scorer", [survival(sharp=1.0)])
    assert weak.low is not None and weak.value is not None and weak.high is not None
    assert 0.5 < weak.low < weak.value - 0.01 < weak.high - 0.02
    between = (weak.low + weak.value) / 2
    assert criterion("scorer", [survival(sharp=1.0, gate1_low=between)]).state == "met"
    above = (weak.value + weak.high) / 2
    assert criterion("scorer", [survival(sharp=1.0, gate1_low=above)]).state == "open"
    assert criterion("scorer", [survival(sharp=1.0, gate1_low=weak.high + 0.001)]).state == "broken"


def test_a_bound_has_to_be_on_the_good_side_not_the_point() -> None:
    """Of each criterion, its bar moved between the point and either end of the interval."""
    one = survival(seed=0, canaries_after=canaries(80))
    for name, field in (("canaries", "canary_rise"), ("drift", "drift")):
        found = criterion(name, [one])
        assert found.low is not None and found.value is not None and found.high is not None
        assert 0 < found.low < found.value < found.high

        def state(bar: float, name: str = name, field: str = field) -> str:
            result = gate3(study(), [one], Gate3Bars(**{field: bar}), draws=500)
            return next(c for c in result.criteria if c.name == name).state

        assert state((found.value + found.high) / 2) == state((found.low + found.value) / 2) == "open"
        assert state(found.high + 1e-6) == "met" and state(found.low - 1e-6) == "broken"


def test_the_probe_has_to_rise() -> None:
    one = survival()
    found = criterion("probe", [one])
    rise = np.mean([a.probe or 0 for a in one.after]) - np.mean([a.probe or 0 for a in one.before])
    assert found.value == pytest.approx(rise) and found.state == "met"
    assert criterion("probe", [survival(probes=(0.6, 0.5))]).state == "broken"
    assert criterion("probe", [survival(probes=(0.5, 0.5))]).state == "open"
    assert criterion("probe", [survival(probes=(0.5, None))]).state == "open"


@pytest.mark.parametrize(
    ("measured", "sentence"),
    [
        ([], "measured: there is nothing"),
        ([survival(arm="probe")], "seed 0 is of arm 'probe', the study judges 'sae'"),
        ([survival(3), survival(3)], "seed 3 comes twice"),
        ([survival(after=answers(0, 2.0, 2.0, 0.5)[:4])], "seed 0 answers other questions after training"),
    ],
)
def test_bad_input(measured: list[Survival], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        gate3(study(), measured)


def test_bad_files() -> None:
    with pytest.raises(ValidationError, match="less than or equal to 1"):
        Canaries(paid={"q": 1.25}, n=4)
    with pytest.raises(ValidationError, match="at least 1 item"):
        Canaries(paid={}, n=4)
    with pytest.raises(ValidationError, match="finite"):
        Answer(question="q", correct=True, live=float("nan"), frozen=0.0)
