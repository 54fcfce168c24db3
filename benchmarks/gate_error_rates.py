"""How often Gate 1 passes what it must not (false passes), and what it should (power), on worlds whose truth is known.

Every world is made-up answers (tokens, log-probabilities, labels, lengths) and a made-up score of them; `judge_scores`,
the very function that `gate1` calls, gives the verdict on them. No model is run.

Null worlds, in which the score knows nothing of an answer beyond its question, its length or its words:

- `labels permuted`: a score with signal, the labels then shuffled within each question;
- `random pack`: random features of a made-up SAE whose features track difficulty, length, or nothing;
- `length`: right answers are longer, the score is length, bent and blurred;
- `difficulty`: the score is the question's own chance of a right answer, blurred;
- `words`: right answers use other words, the score is the mean worth, or the presence, of words;
- `log-probability`: right answers are likelier, the score is their mean log-probability, blurred;
- `length and words`: both of these, added;
- `found on noise`: features are searched on one half of the questions (`contrast`, the best 20 of 200 whatever their
  q) and judged on the other: the winner's curse.

Worlds with a signal add what makes the within-question AUROC of the score exactly what the cell says. `copies` is the
share of answers that are copies of another one to the same question: answers that are not independent.

    python benchmarks/gate_error_rates.py --worlds 40 --kinds words signal
"""

from __future__ import annotations

import json
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy.stats import norm

from mechreward.features import FeaturePack, PooledBatch, build_pack, contrast, random_packs
from mechreward.gates import judge_scores, wilson
from mechreward.rollout import Response
from mechreward.sae import SAE, SAEMeta

Array = NDArray[np.float64]
SIGNAL = "signal"
ANSWERS = 8
VOCABULARY = 150
FEATURES = 200
PACK = 20
SIZES = (100, 300, 1000)
AUROCS = (0.55, 0.60, 0.65, 0.75)


@dataclass(frozen=True)
class Setting:
    """Error rates of Gate 1 in made-up worlds."""

    worlds: int = 200
    """Worlds a cell."""
    kinds: tuple[str, ...] = ()
    """Only these kinds, `signal` among them; all by default."""
    sizes: tuple[int, ...] = SIZES
    """Questions a world, 8 answers to each."""
    aurocs: tuple[float, ...] = AUROCS
    """Planted within-question AUROCs."""
    odd: bool = True
    """Also cells of other accuracies, of copied answers, and of a log-probability that tells."""
    draws: int = 300
    """Bootstrap resamples and label shuffles a world; the gate's own default is 2,000."""
    seed: int = 0
    """Each world's seed follows from it, the cell's place in the list of cells, and the world's number."""
    processes: int = 2
    """Worlds judged at a time."""
    json: Path | None = None
    """Write the numbers to this file."""
    smoke: bool = False
    """Two worlds a cell of 30 questions: does it run?"""


@dataclass(frozen=True)
class Cell:
    """One line of a table."""

    kind: str
    n_questions: int
    auroc: float = 0.5
    """Of the planted signal."""
    accuracy: float = 0.5
    copies: float = 0.0
    rival: float = 0.5
    """Within-question AUROC of the mean log-probability."""


@dataclass
class World:
    """One row an answer, sorted by question; what is not given a signal by the kind has none."""

    cell: Cell
    rng: np.random.Generator
    right_N: NDArray[np.bool_]
    chance_N: Array
    """The question's own chance of a right answer."""
    length_N: NDArray[np.int64]
    logprob_N: Array
    words_NT: NDArray[np.int64]
    """Cut at `length_N`."""

    def blurred(self, score_N: Array, most: float = 1.0) -> Array:
        """The score with noise of up to `most` of its own spread."""
        noise_N = self.rng.normal(size=len(score_N))
        return score_N + self.rng.uniform(0, most) * score_N.std() * noise_N

    @property
    def questions(self) -> list[str]:
        return [f"q{row // ANSWERS:05d}" for row in range(len(self.right_N))]

    def responses(self, source_N: NDArray[np.int64]) -> list[Response]:
        """Row n is a copy of answer `source_N[n]`."""
        rows = []
        for at, (question, row) in enumerate(zip(self.questions, source_N, strict=True)):
            n = int(self.length_N[row])
            ids = tuple(self.words_NT[row, :n].tolist())
            logprobs = (float(self.logprob_N[row]),) * n
            correct = bool(self.right_N[row])
            rows.append(Response(question, at % ANSWERS, (0,), ids, "", logprobs, "eos", correct=correct))
        return rows


def apart(auroc: float) -> float:
    """How many standard deviations lie between two normals of this AUROC."""
    return float(np.sqrt(2) * norm.ppf(auroc))


def make_world(cell: Cell, rng: np.random.Generator) -> World:
    """Accuracy varies from question to question (a beta distribution of that mean, uniform at .5)."""
    n = cell.n_questions * ANSWERS
    chance_N = np.repeat(rng.beta(2 * cell.accuracy, 2 - 2 * cell.accuracy, cell.n_questions), ANSWERS)
    right_N = rng.random(n) < chance_N
    longer = apart(0.68) if "length" in cell.kind else 0.0
    length_N = np.clip(np.round(30 + 6 * rng.normal(size=n) + 6 * longer * right_N), 5, 60).astype(np.int64)
    likelier = apart(0.68 if cell.kind == "log-probability" else cell.rival)
    hard_N = np.repeat(rng.normal(size=cell.n_questions), ANSWERS)
    logprob_N = -2 + 0.2 * (rng.normal(size=n) + hard_N + likelier * right_N)
    return World(cell, rng, right_N, chance_N, length_N, logprob_N, draw_words(cell, rng, right_N))


def worth(cell: Cell) -> Array:
    """What each word tells, the same in all worlds of a cell: a few words tell much."""
    return np.random.default_rng(cell.n_questions).standard_t(3, VOCABULARY)


def draw_words(cell: Cell, rng: np.random.Generator, right_N: NDArray[np.bool_]) -> NDArray[np.int64]:
    """[N, 60] words of Zipf's frequencies; where words tell, right answers prefer those of worth."""
    frequency_V = 1 / np.arange(1, VOCABULARY + 1)
    tilt = 0.06 if "words" in cell.kind else 0.0
    words_NT = np.zeros((len(right_N), 60), dtype=np.int64)
    for label in (False, True):
        weight_V = frequency_V * np.exp((tilt if label else -tilt) * worth(cell))
        rows = right_N == label
        words_NT[rows] = rng.choice(VOCABULARY, (int(rows.sum()), 60), p=weight_V / weight_V.sum())
    return words_NT


# ---- scores: each kind's own, and five random packs beside it


def plain_random(world: World) -> Array:
    """[5, N]: what a question has in common, and noise."""
    shape = (5, world.cell.n_questions)
    return np.repeat(world.rng.normal(size=shape), ANSWERS, axis=1) + world.rng.normal(size=(5, len(world.right_N)))


def of_words(world: World) -> Array:
    """Mean worth of an answer's words, or how often the ten best words stand in it."""
    worth_NT = worth(world.cell)[world.words_NT]
    inside_NT = np.arange(60) < world.length_N[:, None]
    if world.rng.random() < 0.5:
        return np.asarray((worth_NT * inside_NT).sum(1) / inside_NT.sum(1))
    best_NT = np.isin(world.words_NT, np.argsort(-worth(world.cell))[:10])
    return np.asarray((best_NT & inside_NT).sum(1), dtype=np.float64)


def of_length(world: World) -> Array:
    """Length itself, its logarithm or its square."""
    length_N = world.length_N.astype(np.float64)
    return [length_N, np.log(length_N), length_N**2][int(world.rng.integers(3))]


def standard(score_N: Array) -> Array:
    return (score_N - score_N.mean()) / score_N.std()


def planted(world: World, auroc: float) -> Array:
    """A question's own level, noise, and so much more for right answers."""
    level_N = np.repeat(world.rng.normal(size=world.cell.n_questions), ANSWERS)
    return level_N + world.rng.normal(size=len(level_N)) + apart(auroc) * world.right_N


def score(world: World) -> tuple[Array, Array]:
    """The judged score and the random packs' scores, by the cell's kind."""
    kind = world.cell.kind
    if kind in ("random pack", "found on noise"):
        return of_pack(world)
    made: dict[str, Callable[[], Array]] = {
        SIGNAL: lambda: planted(world, world.cell.auroc),
        "labels permuted": lambda: planted(world, 0.75),
        "length": lambda: world.blurred(of_length(world)),
        "difficulty": lambda: world.blurred(world.chance_N),
        "words": lambda: world.blurred(of_words(world)),
        "log-probability": lambda: world.blurred(world.logprob_N),
        "length and words": lambda: world.blurred(standard(of_length(world)) + standard(of_words(world))),
    }
    return made[kind](), plain_random(world)


NULLS = (
    "labels permuted", "random pack", "length", "difficulty", "words", "log-probability", "length and words",
    "found on noise",
)  # fmt: skip


def of_pack(world: World) -> tuple[Array, Array]:
    """A pack of a made-up SAE, found (or drawn) on as many other questions, and random packs matched to it."""
    other = make_world(world.cell, world.rng)
    seed = int(world.rng.integers(2**31))
    frequency_F = world.rng.uniform(0.05, 0.9, FEATURES)
    loads_3F = world.rng.normal(size=(3, FEATURES)) * (world.rng.random((3, FEATURES)) < 0.3)
    table = contrast(batches(other, activations(other, frequency_F, loads_3F)), halves=2, seed=seed)
    eye = torch.eye(FEATURES)
    meta = SAEMeta(release="made", sae_id="up", layer=0, model_name="none", hook_name="")
    sae = SAE("relu", eye, torch.zeros(FEATURES), eye, torch.zeros(FEATURES), meta)
    pack = build_pack(
        table, sae, name="noise", model_name="none", n_features=PACK, q_max=1.0, min_stability=0.0, pooling="mean"
    )
    if world.cell.kind == "random pack":
        pack = random_packs(pack, table, 1, seed=seed, nearest=100)[0]
    acts_NF = activations(world, frequency_F, loads_3F)
    random_PN = np.stack([read(p, acts_NF) for p in random_packs(pack, table, 5, seed=seed)])
    return read(pack, acts_NF), random_PN


def read(pack: FeaturePack, acts_NF: Array) -> Array:
    return np.asarray(acts_NF[:, pack.feature_ids()] @ [f.weight / f.scale for f in pack.features])


def activations(world: World, frequency_F: Array, loads_3F: Array) -> Array:
    """[N, F]: features fire by difficulty, length and a level of the question's own, never by the label."""
    level_N = np.repeat(world.rng.normal(size=world.cell.n_questions), ANSWERS)
    drive_N3 = np.stack([2 * world.chance_N - 1, standard(world.length_N.astype(float)), level_N], axis=1)
    drive_NF = norm.ppf(frequency_F) + drive_N3 @ loads_3F + world.rng.normal(size=(len(level_N), FEATURES))
    return np.maximum(drive_NF, 0)


def batches(world: World, acts_NF: Array) -> Iterator[PooledBatch]:
    for start in range(0, len(acts_NF), ANSWERS):
        rows = slice(start, start + ANSWERS)
        acts_GF = torch.tensor(acts_NF[rows], dtype=torch.float32)
        yield PooledBatch(world.questions[rows], torch.tensor(world.right_N[rows]), acts_GF)


# ---- judging


@dataclass(frozen=True)
class Verdict:
    """Of one world."""

    verdict: str
    within: float
    seconds: float
    reason: str


def judge_world(cell: Cell, setting: Setting, seed: tuple[int, ...]) -> Verdict:
    torch.set_num_threads(1)
    rng = np.random.default_rng(seed)
    world = make_world(cell, rng)
    score_N, random_PN = score(world)
    if cell.kind == "labels permuted":
        world.right_N = rng.permuted(world.right_N.reshape(-1, ANSWERS), axis=1).ravel()
    source_N = sources(cell, rng)
    responses = world.responses(source_N)
    started = time.perf_counter()
    found = judge_scores(
        score_N[source_N], responses, random_PN=random_PN[:, source_N], draws=setting.draws, seed=seed[-1]
    )
    within = found.rows[0].within.value
    return Verdict(found.judgement.verdict, within, time.perf_counter() - started, found.judgement.reason)


def sources(cell: Cell, rng: np.random.Generator) -> NDArray[np.int64]:
    """Which answer each row shows: its own, or (a share `copies` of rows) the first one to the same question."""
    own_N = np.arange(cell.n_questions * ANSWERS)
    return np.where(rng.random(len(own_N)) < cell.copies, own_N - own_N % ANSWERS, own_N)


def cells(setting: Setting) -> list[Cell]:
    """The null table, the power table, and some cells each one thing away from accuracy .5 and independent answers."""
    middle = setting.sizes[len(setting.sizes) // 2]
    nulls = [Cell(kind, n) for kind in NULLS for n in setting.sizes]
    odd = [{"accuracy": 0.2}, {"accuracy": 0.8}, {"copies": 0.4}] if setting.odd else []
    rival = [{"rival": 0.6}] if setting.odd else []
    nulls += [Cell(kind, middle, **change) for kind in ("labels permuted", "words", "difficulty") for change in odd]
    power = [Cell(SIGNAL, n, auroc) for auroc in setting.aurocs for n in setting.sizes]
    power += [Cell(SIGNAL, middle, 0.65, **change) for change in (*odd, *rival)]
    return nulls + power


def summary(cell: Cell, verdicts: list[Verdict]) -> dict[str, object]:
    """A cell's rates, each with its Wilson interval."""
    n, counts = len(verdicts), Counter(verdict.verdict for verdict in verdicts)
    low, high = wilson(counts["pass"], n)
    return asdict(cell) | {
        "worlds": n,
        "pass": counts["pass"],
        "fail": counts["fail"],
        "inconclusive": counts["inconclusive"],
        "rate": counts["pass"] / n,
        "low": low,
        "high": high,
        "within": float(np.mean([verdict.within for verdict in verdicts])),
        "seconds": float(np.median([verdict.seconds for verdict in verdicts])),
    }


def table(rows: list[dict[str, Any]], signal: bool) -> Table:
    title = "Power: worlds with a signal that pass" if signal else "False passes: worlds without a signal that pass"
    columns = (
        "kind",
        "questions",
        "planted",
        "setting",
        "worlds",
        "pass",
        "95 % interval",
        "fail",
        "undecided",
        "seen",
    )
    made = Table(*columns, title=title, box=None)
    for row in rows:
        if (row["kind"] == SIGNAL) == signal:
            made.add_row(*cells_of(row))
    return made


def cells_of(row: dict[str, Any]) -> tuple[str, ...]:
    odd = [f"accuracy {row['accuracy']:g}"] * (row["accuracy"] != 0.5)
    odd += [f"copies {row['copies']:g}"] * (row["copies"] > 0) + [f"log-prob {row['rival']:g}"] * (row["rival"] != 0.5)
    return (
        row["kind"],
        f"{row['n_questions']:,}",
        f"{row['auroc']:.2f}",
        ", ".join(odd),
        str(row["worlds"]),
        f"{row['rate']:.1%}",
        f"{row['low']:.1%} to {row['high']:.1%}",
        f"{row['fail'] / row['worlds']:.0%}",
        f"{row['inconclusive'] / row['worlds']:.0%}",
        f"{row['within']:.3f}",
    )


def main(arguments: list[str] | None = None) -> list[dict[str, Any]]:
    setting = tyro.cli(Setting, args=arguments, description=Setting.__doc__)
    if setting.smoke:
        setting = replace(setting, worlds=4, sizes=(30,), draws=200, processes=1)
    started, rows = time.perf_counter(), []
    with ProcessPoolExecutor(setting.processes, get_context("spawn")) as pool:
        for index, cell in enumerate(cells(setting)):
            if setting.kinds and cell.kind not in setting.kinds:
                continue
            seeds = [(setting.seed, index, world) for world in range(setting.worlds)]
            rows.append(summary(cell, list(pool.map(partial(judge_world, cell, setting), seeds, chunksize=4))))
            if setting.json is not None:
                head = {"setting": asdict(setting), "runtime_s": time.perf_counter() - started}
                setting.json.write_text(json.dumps(head | {"rows": rows}, indent=1, default=str))
    console = Console(width=140)
    for signal in (False, True):
        console.print(table(rows, signal))
    console.print(f"{time.perf_counter() - started:.0f} s")
    return rows


if __name__ == "__main__":
    main()
