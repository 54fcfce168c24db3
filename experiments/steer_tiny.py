"""Does steering the *careful* features make the tiny reasoner right, how strongly, and is it the features that do it?

The reasoner reads each day of a story in one of two ways, by a coin it throws itself; one way is right. Features are
found on other problems than they are tried on, by `features.discover` (within-question contrast at step ends): those
that go with right answers are *careful*, those that go with wrong ones *shortcut*.

For each setting, mode and strength: accuracy of sampled answers (temperature 1, same seed in every arm, one answer
a question) with edits on the answer's tokens only, beside a random decoder row of the same norm (several draws), the
wrong sign, and the careful features with the shortcut ones pinned to 0. Intervals are Wilson's; differences are paired
by question, with McNemar's exact test.

The coin falls when a day's first operator is *sampled*; the features can only be read from there on. So beside accuracy
there is what they may well move, the operators after a day's first one: the share that is right on days begun wrong
(`switched`, which steering should raise) and on days begun right (`kept`, which it should not lower). Their intervals
resample questions.

    python experiments/steer_tiny.py --out runs/steer-tiny
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro
from statsmodels.stats.contingency_tables import mcnemar

from mechreward.errors import InputError
from mechreward.features import discover
from mechreward.files import write_json
from mechreward.gates import accuracy_interval, paired_test, wilson
from mechreward.models import LoadedModel, load_model
from mechreward.rollout import Response, sample_responses
from mechreward.sae import SAE, load_sae
from mechreward.steering import Scales, Variant, measure_scales
from mechreward.steering.fluency import fluency
from mechreward.tasks import Question
from mechreward.tiny import MODEL, SAE_FOLDER
from mechreward.tiny.world import Problem, Setting, label_chain, make_problem


@dataclass(frozen=True)
class Study:
    """Dose-response of steering on the bundled reasoner."""

    out: Path
    """Folder of the JSON file."""
    settings: tuple[str, ...] = ("easy", "long")
    """Problems of one day, or of three."""
    questions: int = 300
    """Questions each arm answers."""
    found_on: int = 150
    """Other questions, eight answers each, that features are found and calibrated on."""
    features: int = 5
    """Careful features, and shortcut features."""
    strengths: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0)
    """In units of each feature's 99th percentile."""
    modes: tuple[str, ...] = ("nudge", "pin")
    random_seeds: tuple[int, ...] = (0, 1)
    """Draws of random rows."""
    seed: int = 0


@dataclass(frozen=True)
class Bench:
    """What every arm of one setting shares."""

    loaded: LoadedModel
    sae: SAE
    scales: Scales
    problems: list[Problem]
    careful: list[int]
    shortcut: list[int]
    seed: int


def main(study: Study) -> None:
    loaded, sae = load_model(str(MODEL)), load_sae(str(SAE_FOLDER))
    results: dict[str, Any] = {"study": {**asdict(study), "out": str(study.out)}}
    for setting in study.settings:
        bench = prepare(loaded, sae, study, setting)  # type: ignore[arg-type]
        names = {"careful": bench.careful, "shortcut": bench.shortcut, "n": len(bench.problems)}
        print(f"\n{setting}: {names}\n{HEAD}")
        results[setting] = names | {"arms": []}
        for found in run(bench, study):
            print(line(found), flush=True)
            results[setting]["arms"].append(found)
            write_json(study.out / "steer_tiny.json", results)


def prepare(loaded: LoadedModel, sae: SAE, study: Study, setting: Setting) -> Bench:
    """Finds the features on problems of their own."""
    # The features of the easy setting serve both: long answers are too rarely right to contrast.
    rng = random.Random(f"steer-find-{study.seed}")
    problems = {str(i): make_problem("easy", rng) for i in range(study.found_on)}
    questions = [Question(name, problem.prompt, str(problem.answer)) for name, problem in problems.items()]
    answers = sample_responses(loaded, questions, n=8, max_new_tokens=80, seed=study.seed)
    judged = [judge(problems[answer.question_id], answer) for answer in answers]
    table = discover(loaded, sae, judged, pooling="step_end:.").frame
    table = table[(table["q_value"] < 0.05) & (table["stability"] >= 0.8)]
    careful = [int(i) for i in table[table["effect"] > 0]["id"][: study.features]]
    shortcut = [int(i) for i in table[table["effect"] < 0]["id"][: study.features]]
    if not careful:
        raise InputError("features: none goes with right answers; nothing to steer with")
    rng = random.Random(f"steer-try-{setting}-{study.seed}")
    tried = [make_problem(setting, rng) for _ in range(study.questions)]
    return Bench(loaded, sae, measure_scales(loaded, sae, judged), tried, careful, shortcut, study.seed)


def judge(problem: Problem, answer: Response) -> Response:
    return Response(**{**asdict(answer), "correct": label_chain(problem, answer.text).correct})


def run(bench: Bench, study: Study) -> Iterator[dict[str, Any]]:
    """Every arm at every strength."""
    base = arm(bench, "none", "none", 0.0, new_variant(bench), None)
    yield base
    for mode in study.modes:
        for strength in study.strengths:
            edited = new_variant(bench)
            edited.set(bench.careful, strength, mode)  # type: ignore[arg-type]
            yield arm(bench, "careful", mode, strength, edited, base)
            if bench.shortcut:
                both = edited.copy()
                both.set(bench.shortcut, 0.0, "pin")
                yield arm(bench, "careful, shortcut off", mode, strength, both, base)
            yield arm(bench, "wrong sign", mode, strength, edited.copy("wrong_sign"), base)
            for seed in study.random_seeds:
                yield arm(bench, f"random {seed}", mode, strength, edited.copy("random", seed), base)


def new_variant(bench: Bench) -> Variant:
    return Variant(bench.loaded, bench.sae, scales=bench.scales, where="completion")


def arm(
    bench: Bench, name: str, mode: str, strength: float, variant: Variant, base: dict[str, Any] | None
) -> dict[str, Any]:
    """One arm's accuracy with its interval, what it wrote, and the difference to the unsteered model."""
    prompts = [problem.prompt for problem in bench.problems]
    drawn = variant.generate(prompts, max_new_tokens=192, temperature=1.0, seed=bench.seed)
    answers = [answer for (answer,) in drawn]
    labels = [label_chain(problem, answer.text) for problem, answer in zip(bench.problems, answers, strict=True)]
    right = [label.correct for label in labels]
    later = [later_operators(problem, answer.text) for problem, answer in zip(bench.problems, answers, strict=True)]
    read = fluency(bench.loaded, answers)
    low, high = wilson(sum(right), len(right))
    found = {
        "arm": name,
        "mode": mode,
        "strength": strength,
        "accuracy": sum(right) / len(right),
        "low": low,
        "high": high,
        "follows_a_strategy": sum(label.strategy != "neither" for label in labels) / len(labels),
        "nll": read.nll,
        "repetition": read.repetition,
        "switched": share([wrong for wrong, _ in later]),
        "kept": share([begun_right for _, begun_right in later]),
        "right": right,
    }
    return found if base is None else found | paired(base["right"], right)


def later_operators(problem: Problem, text: str) -> tuple[list[bool], list[bool]]:
    """Whether each operator after a day's first is right: on days begun wrong, and on days begun right."""
    written = iter(re.findall(r"\d ([+-]) \d", text))
    begun_wrong: list[bool] = []
    begun_right: list[bool] = []
    for scene in problem.scenes:
        right = [sign == ("+" if step.sign > 0 else "-") for step, sign in zip(scene, written, strict=False)]
        if right:
            (begun_right if right[0] else begun_wrong).extend(right[1:])
    return begun_wrong, begun_right


def share(by_question: Sequence[list[bool]]) -> dict[str, Any]:
    values = [value for row in by_question for value in row]
    groups = [str(i) for i, row in enumerate(by_question) for _ in row]
    interval = accuracy_interval(values, groups)
    return {"value": interval.value, "low": interval.low, "high": interval.high, "n": len(values)}


def paired(before: Sequence[bool], after: Sequence[bool]) -> dict[str, Any]:
    numbers = [{str(i): float(value) for i, value in enumerate(side)} for side in (before, after)]
    result = paired_test(*numbers)
    table = [
        [sum((b, a) == (x, y) for b, a in zip(before, after, strict=True)) for y in (True, False)]
        for x in (True, False)
    ]
    p_value = float(mcnemar(table, exact=True).pvalue)
    return {"difference": result.difference, "interval": [result.low, result.high], "mcnemar_p": p_value}


HEAD = """| arm | mode | strength | accuracy | switched | kept | follows a strategy | NLL | difference | McNemar p |
|---|---|---|---|---|---|---|---|---|---|"""


def line(row: dict[str, Any]) -> str:
    def number(value: float, low: float, high: float) -> str:
        return f"{value:.3f} [{low:.3f}, {high:.3f}]"

    later = [number(row[name]["value"], row[name]["low"], row[name]["high"]) for name in ("switched", "kept")]
    change = ["", ""]
    if "interval" in row:
        change = [number(row["difference"], *row["interval"]), f"{row['mcnemar_p']:.2g}"]
    cells = [row["arm"], row["mode"], f"{row['strength']:g}", number(row["accuracy"], row["low"], row["high"]), *later]
    return " | ".join(["|", *cells, f"{row['follows_a_strategy']:.3f}", f"{row['nll']:.3f}", *change, "|"])[2:-2]


if __name__ == "__main__":
    main(tyro.cli(Study))
