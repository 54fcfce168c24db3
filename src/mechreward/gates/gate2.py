"""Gate 2: is the reward a better one than outcome alone, and than random features? Judged from a study's results.

A study trains arms on the same seeds and tests them on the same questions (`mechreward.studies`). Two differences in
final accuracy decide, each over seeds x questions (`gates.crossed`), against the outcome-only arm and against the arm
with random features that fire as often:

- futile        an upper 95 % bound is under +2 points: whatever there is, it is too little to pay for
- pass          both lower 95 % bounds are above 0, and nothing is futile
- inconclusive  otherwise, with the number of seeds that would decide; always so with fewer than five seeds

An arm with a credit of its own (`sae/potential`) is held against random features of that same credit
(`random/potential`): against `random` a credit that helps would pass for features that do.

A certain gain of less than 2 points is futile, not a pass. The other arms are reported beside, and steps to 90 % of the
outcome-only arm's final accuracy, where a dense reward should show first. The bars were fixed before any study was run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from math import inf
from statistics import median
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from mechreward.errors import InputError
from mechreward.gates.crossed import Array, Crossed, crossed_interval, hierarchical_bootstrap, seeds_needed
from mechreward.settings import Settings, Share, Whole

Verdict = Literal["pass", "futile", "inconclusive"]
BASE, CONTROL = "outcome", "random"
TARGET = 0.9
"""Share of the outcome-only arm's mean final accuracy that `steps_to` asks for."""


class Evaluation(Settings):
    """Accuracy on every test question after so many steps."""

    step: Whole
    correct: Annotated[dict[str, Annotated[float, Field(ge=0, le=1)]], Field(min_length=1)]
    """Share of right answers, by question id."""


class ArmRun(Settings):
    """One arm trained with one seed."""

    arm: Annotated[str, Field(min_length=1)]
    seed: int
    evaluations: Annotated[tuple[Evaluation, ...], Field(min_length=1)]
    """In order of steps; the last one is final."""

    @property
    def curve(self) -> list[tuple[int, float]]:
        """Step and mean accuracy of each evaluation."""
        return [(e.step, float(np.mean(list(e.correct.values())))) for e in self.evaluations]


class Crash(Settings):
    """A run that ended without a result."""

    arm: str
    seed: int
    error: str


class StudyResults(Settings):
    """What a study left: `results.json`."""

    judged: Annotated[str, Field(min_length=1)]
    """The arm that is on trial."""
    runs: tuple[ArmRun, ...]
    crashed: tuple[Crash, ...] = ()


class Gate2Bars(Settings):
    """What decides; written into the result."""

    futile: Share = 0.02
    """An upper bound under it is too little."""
    min_seeds: Annotated[int, Field(ge=2)] = 5
    """Fewest paired seeds for any verdict but inconclusive."""


@dataclass(frozen=True)
class Comparison:
    """One arm less another in final accuracy."""

    arm: str
    against: str
    found: Crossed | None
    """None with fewer than two seeds in common."""
    bootstrap: tuple[float, float] | None
    """The hierarchical bootstrap's interval, reported only."""
    seeds: tuple[int, ...]


@dataclass(frozen=True)
class ArmSummary:
    """One arm over its seeds."""

    arm: str
    seeds: tuple[int, ...]
    start: float
    final: float
    steps_to_target: tuple[int | None, ...]
    """By seed, the first evaluated step at the target; None where it was never reached."""
    median_steps: float | None
    """Median of them, never counting as later than any step; None if that is never."""


@dataclass(frozen=True)
class Gate2Result:
    """The verdict on the judged arm, why, and the tables it rests on."""

    verdict: Verdict
    reason: str
    seeds_needed: int | None
    judged: str
    target: float
    """Accuracy that `steps_to_target` counts to."""
    comparisons: tuple[Comparison, ...]
    arms: tuple[ArmSummary, ...]
    crashed: tuple[Crash, ...]
    bars: Gate2Bars

    @property
    def passed(self) -> bool:
        """Whether the verdict is pass."""
        return self.verdict == "pass"

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON values."""
        plain = {"crashed": [crash.model_dump() for crash in self.crashed], "bars": self.bars.model_dump()}
        return asdict(self) | plain


def gate2(results: StudyResults, bars: Gate2Bars | None = None, *, draws: int = 2000, seed: int = 0) -> Gate2Result:
    """Judges a study.

    Args:
        results: of at least the judged and the outcome-only arm; without the random arm (`control_of`) there is no
            pass.
        draws, seed: of the bootstrap that is reported beside.

    Raises:
        InputError: the judged arm is one of those two, an arm and seed come twice, runs were tested on different
            questions or end at different steps, or there is no run of the judged or the outcome-only arm.
    """
    bars = bars or Gate2Bars()
    accuracies = finals(results)
    names = list(dict.fromkeys(run.arm for run in results.runs))
    control = control_of(results.judged)
    if results.judged in (BASE, control):
        raise InputError(f"judged: {results.judged!r} is what an arm is judged against; name another arm")
    for needed in (results.judged, BASE):
        if needed not in names:
            raise InputError(
                f"runs: there is no finished run of arm {needed!r}; there are {', '.join(names)}{_crash(results)}"
            )
    pairs = [(arm, BASE) for arm in names if arm != BASE]
    pairs += [(results.judged, arm) for arm in names if arm not in (results.judged, BASE)]
    comparisons = tuple(_compare(accuracies, arm, against, draws, seed) for arm, against in pairs)
    target = TARGET * float(np.mean([values_Q.mean() for values_Q in accuracies[BASE].values()]))
    arms = tuple(_summary(name, [run for run in results.runs if run.arm == name], target) for name in names)
    deciding = [c for c in comparisons if c.arm == results.judged and c.against in (BASE, control)]
    few = min(len(comparison.seeds) for comparison in deciding)
    verdict, reason, needed_seeds = judge_differences(
        {c.against: c.found for c in deciding if c.found is not None}, few, bars, control
    )
    if results.crashed:
        reason += f"; {len(results.crashed)} runs crashed ({_names(results.crashed)})"
    return Gate2Result(
        verdict, reason, needed_seeds, results.judged, target, comparisons, arms, results.crashed, bars
    )  # fmt: skip


def pooled(studies: Sequence[StudyResults]) -> StudyResults:
    """Studies of the same settings and other seeds as one, with the arms that all of them have.

    That the settings were the same, only who ran them knows; `gate2` sees to it that questions and steps are, and that
    no seed comes twice.

    Raises:
        InputError: if they judge different arms.
    """
    judged = list(dict.fromkeys(study.judged for study in studies))
    if len(judged) != 1:
        raise InputError(
            f"judged: the studies judge {' and '.join(judged)}; only studies of one judged arm can be pooled"
        )
    named = [{run.arm for run in study.runs} | {crash.arm for crash in study.crashed} for study in studies]
    shared = set.intersection(*named)
    return StudyResults(
        judged=judged[0],
        runs=tuple(run for study in studies for run in study.runs if run.arm in shared),
        crashed=tuple(crash for study in studies for crash in study.crashed if crash.arm in shared),
    )


def control_of(arm: str) -> str:
    """The arm of random features with the arm's own credit."""
    _, slash, credit = arm.partition("/")
    return CONTROL + slash + credit


def _names(crashed: Sequence[Crash]) -> str:
    return ", ".join(f"{crash.arm} seed {crash.seed}" for crash in crashed)


def _crash(results: StudyResults) -> str:
    """The first of the crashes: where runs are missing, why is likely there."""
    return "".join(f"; {crash.arm} seed {crash.seed} crashed: {crash.error}" for crash in results.crashed[:1])


def finals(results: StudyResults) -> dict[str, dict[int, Array]]:
    """Final accuracy by arm, seed and question, questions in sorted order.

    Raises:
        InputError: as `gate2` for runs that do not fit together.
    """
    runs = results.runs
    if not runs:
        needed = "a study needs at least the judged and the outcome-only arm"
        raise InputError(f"runs: there are none; {needed}{_crash(results)}")
    questions = sorted(runs[0].evaluations[-1].correct)
    last = runs[0].evaluations[-1].step
    found: dict[str, dict[int, Array]] = {}
    for run in runs:
        steps = [evaluation.step for evaluation in run.evaluations]
        where = f"runs: {run.arm} seed {run.seed}"
        if run.seed in found.setdefault(run.arm, {}):
            raise InputError(f"{where} is there twice; each arm and seed may come once")
        if steps != sorted(set(steps)) or steps[-1] != last:
            raise InputError(f"{where} was evaluated at steps {steps}; they must rise and end at {last} in all runs")
        for evaluation in run.evaluations:
            if sorted(evaluation.correct) != questions:
                raise InputError(f"{where} was tested on other questions at step {evaluation.step} than the first run")
        final = run.evaluations[-1].correct
        found[run.arm][run.seed] = np.array([final[question] for question in questions])
    return found


def _compare(finals: dict[str, dict[int, Array]], arm: str, against: str, draws: int, seed: int) -> Comparison:
    both = tuple(sorted(finals[arm].keys() & finals[against].keys()))
    if len(both) < 2:
        return Comparison(arm, against, None, None, both)
    d_SQ = np.stack([finals[arm][s] - finals[against][s] for s in both])
    bootstrap = hierarchical_bootstrap(d_SQ, draws=draws, seed=seed)
    return Comparison(arm, against, crossed_interval(d_SQ), bootstrap, both)


def _summary(arm: str, runs: Sequence[ArmRun], target: float) -> ArmSummary:
    runs = sorted(runs, key=lambda run: run.seed)
    steps = tuple(steps_to(run, target) for run in runs)
    start, final = (float(np.mean([run.curve[place][1] for run in runs])) for place in (0, -1))
    seeds = tuple(run.seed for run in runs)
    return ArmSummary(arm, seeds, start, final, steps, median_steps(steps))


def steps_to(run: ArmRun, target: float) -> int | None:
    """The first evaluated step with at least that accuracy; None if there is none."""
    return next((step for step, accuracy in run.curve if accuracy >= target), None)


def median_steps(steps: Sequence[int | None]) -> float | None:
    """Median of what `steps_to` gives, never counting as later than any step; None if that is never."""
    middle = median([inf if step is None else step for step in steps])
    return None if middle == inf else float(middle)


def judge_differences(
    found: dict[str, Crossed], few: int, bars: Gate2Bars, control: str = CONTROL
) -> tuple[Verdict, str, int | None]:
    """Verdict, reason and the seeds that would decide, from the judged arm's differences by the arm they are against.

    Args:
        few: fewest paired seeds of any of them.
        control: the arm besides outcome-only that a pass has to beat.
    """
    measured = "; ".join(f"against {name} {words(value)}" for name, value in found.items())
    if few < bars.min_seeds:
        short = f"{few} paired seeds, {bars.min_seeds} are needed"
        return "inconclusive", f"{short}; {measured}" if measured else short, bars.min_seeds
    small = [name for name, value in found.items() if value.high < bars.futile]
    if small:
        return "futile", f"{measured}: less than {bars.futile:+.2f} against {' and '.join(small)}", None
    if control not in found:
        return "inconclusive", f"{measured}; there is no arm {control!r}, which a pass has to beat", None
    if all(value.low > 0 for value in found.values()):
        return "pass", measured, None
    needed = seeds_to_decide(found, bars)
    number = "no practicable number of" if needed is None else f"about {needed}"
    return "inconclusive", f"{measured}; {number} seeds would decide", needed


def seeds_to_decide(found: dict[str, Crossed], bars: Gate2Bars) -> int | None:
    """The nearest verdict: a pass needs every comparison, futile needs one; never fewer than one seed more."""
    to_pass = [1 if value.low > 0 else seeds_needed(value, value.value) for value in found.values()]
    to_futile = [seeds_needed(value, bars.futile - value.value) for value in found.values()]
    routes = [seeds for seeds in to_futile if seeds is not None]
    passing = [seeds for seeds in to_pass if seeds is not None]
    routes += [max(passing)] if len(passing) == len(to_pass) else []
    most = max(value.n_seeds for value in found.values())
    return max(min(routes), most + 1) if routes else None


def words(found: Crossed) -> str:
    """A difference with its interval."""
    return f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
