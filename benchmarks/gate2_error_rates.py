"""How often Gate 2 is wrong in made-up studies: false passes where arms are equal, power where one is better.

A study is 5 or 8 paired seeds x 64 or 400 questions, 4 answers each. An arm's chance of a right answer is the
question's own (beta, mean .5), plus the arm's gain, a seed's luck (common to all questions, so that the difference of
two arms has the given SD over seeds) and a reaction of arm and question (SD 4 points, the same in all seeds). The
verdict is the gate's own (`gates.gate2.judge_differences`); beside it, what the percentiles of the hierarchical
bootstrap alone would have said against outcome-only.

- null     all arms are equal
- noise    outcome-only and random are equal, the judged arm gains 0, and the random arm loses 10 points: only one
           comparison guards
- power    the judged arm gains 5 points over both

    python benchmarks/gate2_error_rates.py --studies 2000 --json runs/gate2-rates.json
"""

from __future__ import annotations

import time
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import tyro
from numpy.typing import NDArray

from mechreward.files import write_json
from mechreward.gates import Gate2Bars, crossed_interval, hierarchical_bootstrap, judge_differences, wilson

Array = NDArray[np.float64]
ANSWERS = 4
REACTION = 0.04
GAINS = {"null": (0.0, 0.0), "noise": (0.0, -0.1), "power": (0.05, 0.0)}
"""What the judged and the random arm gain over outcome-only."""


@dataclass(frozen=True)
class Setting:
    """Error rates of Gate 2 in made-up studies."""

    studies: int = 2000
    """Studies a cell."""
    seeds: tuple[int, ...] = (5, 8)
    questions: tuple[int, ...] = (64, 400)
    spreads: tuple[float, ...] = (0.01, 0.03)
    """SD over seeds of the difference of two arms, by training's luck alone."""
    bootstraps: int = 400
    """Studies a cell whose bootstrap is drawn too."""
    seed: int = 0
    json: Path | None = None
    """Write the numbers to this file."""
    smoke: bool = False
    """Twenty studies a cell: does it run?"""


@dataclass(frozen=True)
class Cell:
    """One line of the table."""

    kind: str
    n_seeds: int
    n_questions: int
    spread: float


def study(cell: Cell, rng: np.random.Generator) -> dict[str, Array]:
    """Final accuracies [S, Q] of the three arms."""
    judged, random = GAINS[cell.kind]
    chance_Q = rng.beta(1.5, 1.5, cell.n_questions)
    finals = {}
    for arm, gain in (("outcome", 0.0), ("judged", judged), ("random", random)):
        luck_S = rng.normal(0, cell.spread / np.sqrt(2), cell.n_seeds)
        reaction_Q = rng.normal(0, REACTION / np.sqrt(2), cell.n_questions)
        p_SQ = np.clip(chance_Q * (1 - 0.2) + 0.1 + gain + reaction_Q + luck_S[:, None], 0, 1)
        finals[arm] = rng.binomial(ANSWERS, p_SQ) / ANSWERS
    return finals


def rates(cell: Cell, setting: Setting) -> dict[str, Any]:
    """Verdicts in a cell, with Wilson intervals of the share of passes."""
    rng = np.random.default_rng((setting.seed, cell.n_seeds, cell.n_questions, list(GAINS).index(cell.kind)))
    verdicts = {"pass": 0, "futile": 0, "inconclusive": 0}
    above, above_bootstrap, covered, drawn = 0, 0, 0, 0
    truth = GAINS[cell.kind][0]
    for place in range(setting.studies):
        finals = study(cell, rng)
        d_SQ = finals["judged"] - finals["outcome"]
        found = {name: crossed_interval(finals["judged"] - finals[name]) for name in ("outcome", "random")}
        verdicts[judge_differences(found, cell.n_seeds, Gate2Bars())[0]] += 1
        above += found["outcome"].low > 0
        covered += found["outcome"].low <= truth <= found["outcome"].high
        if place < setting.bootstraps:
            drawn += 1
            above_bootstrap += hierarchical_bootstrap(d_SQ, draws=500, seed=place)[0] > 0
    low, high = wilson(verdicts["pass"], setting.studies)
    numbers = {"rate": verdicts["pass"] / setting.studies, "low": low, "high": high}
    shares = {"over_outcome": above / setting.studies, "over_outcome_bootstrap": above_bootstrap / drawn}
    return asdict(cell) | verdicts | numbers | shares | {"covered": covered / setting.studies}


def line(row: dict[str, Any]) -> str:
    """A row of the table in docs/gate2.md."""
    n = row["pass"] + row["futile"] + row["inconclusive"]
    return (
        f"| {row['kind']} | {row['n_seeds']} | {row['n_questions']} | {100 * row['spread']:.0f} | {row['rate']:.1%} "
        f"[{row['low']:.1%}, {row['high']:.1%}] | {row['futile'] / n:.1%} | {row['inconclusive'] / n:.1%} | "
        f"{row['over_outcome']:.1%} | {row['over_outcome_bootstrap']:.1%} | {row['covered']:.1%} |"
    )


HEAD = (
    "| arms | seeds | questions | SD over seeds, points | pass, with its interval | futile | inconclusive | "
    "lower bound against outcome > 0 | the same by bootstrap percentiles | interval covers the truth |\n"
    "|---|---|---|---|---|---|---|---|---|---|"
)


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    """Prints the table, and writes it where `--json` says."""
    setting = tyro.cli(Setting, args=arguments)
    if setting.smoke:
        setting = replace(setting, studies=20, bootstraps=5)
    started = time.perf_counter()
    cells = [Cell(*values) for values in product(GAINS, setting.seeds, setting.questions, setting.spreads)]
    rows = [rates(cell, setting) for cell in cells]
    if setting.json is not None:
        write_json(setting.json, {"setting": asdict(setting) | {"json": str(setting.json)}, "rows": rows})
    print(HEAD)
    for row in rows:
        print(line(row))
    print(f"{setting.studies} studies a cell, {time.perf_counter() - started:.0f} s")
    return rows


if __name__ == "__main__":
    main()
