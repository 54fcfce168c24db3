"""The tiny world: word problems, their two strategies, and the truth about any chain.

A problem tells how a count changes over one day (`easy`, 3-5 steps) or three days (`long`, 8-12 steps). A chain works
it out one sentence a step and ends in ``#### answer``. Two strategies write chains:

- *careful*: a gain is added, a loss is taken away;
- *shortcut*: reads a whole day backwards, so that every gain is taken away and every loss added.

Which one is followed is one fair coin a day, thrown where the day's first operator is written; everything after is
forced, so a later operator is right or wrong only together with the first. The rule is built so that words, length and
log-probability carry nothing about the choice: days have as many gains as losses (or one of either more, evenly), every
value has two digits under both strategies, and careful and shortcut throw the same number of coins. What tells them
apart is the *exclusive or* of a verb in the question and an operator in the chain: a state the model has to keep.
"""

from __future__ import annotations

import itertools
import random
import re
from dataclasses import dataclass
from typing import Literal, NamedTuple

Setting = Literal["easy", "long"]
SETTINGS: tuple[Setting, ...] = ("easy", "long")

DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")
NAMES = (
    "Ada",
    "Ben",
    "Cleo",
    "Dan",
    "Eva",
    "Finn",
    "Gwen",
    "Hugo",
    "Iris",
    "Jack",
    "Kira",
    "Leo",
    "Mona",
    "Nils",
    "Olga",
    "Paul",
)
LOWEST, HIGHEST = 10, 99


@dataclass(frozen=True)
class Theme:
    """A family of problems: an opening with a count, six verbs that raise it, six that lower it, and what is asked."""

    opening: str
    gains: tuple[str, ...]
    losses: tuple[str, ...]
    ask: str


THEMES = (
    Theme(
        "{name} has {n} apples .",
        ("picks", "buys", "gathers", "finds", "wins", "receives"),
        ("eats", "sells", "drops", "donates", "loses", "cooks"),
        "how many apples does {name} have ?",
    ),
    Theme(
        "{name} owns {n} marbles .",
        ("wins", "finds", "buys", "trades-in", "receives", "collects"),
        ("loses", "sells", "lends", "drops", "gifts", "trades-out"),
        "how many marbles does {name} own ?",
    ),
    Theme(
        "{name} saved {n} coins .",
        ("earns", "finds", "receives", "wins", "collects", "inherits"),
        ("spends", "loses", "lends", "donates", "pays", "invests"),
        "how many coins does {name} hold ?",
    ),
    Theme(
        "the bus of {name} carries {n} riders .",
        ("boards", "welcomes", "loads", "accepts", "admits", "adds"),
        ("unloads", "releases", "drops", "expels", "transfers", "removes"),
        "how many riders are on the bus ?",
    ),
    Theme(
        "{name} runs a library with {n} books .",
        ("buys", "receives", "adds", "restores", "prints", "accepts"),
        ("lends", "loses", "sells", "discards", "donates", "removes"),
        "how many books are in the library ?",
    ),
    Theme(
        "the farm of {name} keeps {n} sheep .",
        ("buys", "breeds", "adopts", "rescues", "welcomes", "wins"),
        ("sells", "loses", "shears-off", "transfers", "donates", "releases"),
        "how many sheep are on the farm ?",
    ),
    Theme(
        "{name} bakes and has {n} rolls .",
        ("bakes", "buys", "makes", "prepares", "receives", "adds"),
        ("eats", "sells", "burns", "serves", "donates", "discards"),
        "how many rolls does {name} have ?",
    ),
    Theme(
        "the pond of {name} holds {n} fish .",
        ("breeds", "buys", "adds", "rescues", "catches", "adopts"),
        ("sells", "releases", "eats", "cooks", "loses", "removes"),
        "how many fish are in the pond ?",
    ),
    Theme(
        "{name} has {n} stamps in an album .",
        ("collects", "buys", "trades-in", "finds", "inherits", "receives"),
        ("sells", "trades-out", "gifts", "loses", "tears", "lends"),
        "how many stamps are in the album ?",
    ),
    Theme(
        "the garden of {name} shows {n} roses .",
        ("plants", "grows", "buys", "adds", "restores", "raises"),
        ("cuts", "picks-off", "sells", "loses", "gifts", "removes"),
        "how many roses are in the garden ?",
    ),
    Theme(
        "{name} stores {n} boxes .",
        ("loads", "receives", "packs", "accepts", "makes", "adds"),
        ("ships", "unloads", "returns", "discards", "burns", "transfers"),
        "how many boxes does {name} store ?",
    ),
    Theme(
        "the team of {name} scored {n} points .",
        ("scores", "earns", "wins", "adds", "gains", "collects"),
        ("forfeits", "loses", "drops", "wastes", "pays", "returns"),
        "how many points does the team have ?",
    ),
    Theme(
        "{name} drives with {n} liters .",
        ("refills", "buys", "pumps-in", "adds", "receives", "loads"),
        ("burns", "spills", "leaks", "wastes", "lends", "pumps-out"),
        "how many liters does {name} have ?",
    ),
    Theme(
        "the choir of {name} counts {n} singers .",
        ("welcomes", "hires", "trains", "admits", "gains", "adopts"),
        ("fires", "loses", "retires", "transfers", "releases", "expels"),
        "how many singers are in the choir ?",
    ),
    Theme(
        "{name} charged a robot to {n} units .",
        ("charges", "stores", "gains", "restores", "pumps-in", "harvests"),
        ("spends", "leaks", "wastes", "burns", "transfers", "pumps-out"),
        "how many units does the robot hold ?",
    ),
    Theme(
        "{name} knows {n} songs .",
        ("learns", "writes", "hears", "gathers", "trains", "prepares"),
        ("forgets", "drops", "gifts", "skips", "discards", "retires"),
        "how many songs does {name} know ?",
    ),
)


class Step(NamedTuple):
    """One change of the count: the verb, its amount (1-9), and its true sign."""

    verb: str
    amount: int
    sign: int


@dataclass(frozen=True)
class Problem:
    """A word problem with everything needed to write or judge a chain for it."""

    prompt: str
    start: int
    days: tuple[str, ...]
    scenes: tuple[tuple[Step, ...], ...]

    @property
    def answer(self) -> int:
        return self.start + sum(step.sign * step.amount for scene in self.scenes for step in scene)

    @property
    def n_steps(self) -> int:
        return sum(map(len, self.scenes))


class ChainLabel(NamedTuple):
    """The truth about one sampled chain."""

    strategy: Literal["careful", "shortcut", "neither"]
    correct: bool
    first_wrong_step: int | None
    """0-based step whose operator or value first departs from the careful chain; None if there is none."""
    flips: tuple[bool, ...] | None
    """For each day, whether it was read backwards; None for `neither`."""


def scene_sizes(setting: Setting, rng: random.Random) -> tuple[int, ...]:
    if setting == "easy":
        return (rng.choice((3, 4, 5)),)
    return rng.choice(((2, 2, 4), (2, 4, 2), (4, 2, 2), (2, 4, 4), (4, 2, 4), (4, 4, 2), (4, 4, 4)))


def _scene(size: int, gains: list[str], losses: list[str], rng: random.Random) -> tuple[Step, ...]:
    """Steps of one day: half gains, half losses (an odd size has one more of either), whose changes do not cancel."""
    n_gains = size // 2 + (rng.random() < 0.5 if size % 2 else 0)
    signs = [1] * n_gains + [-1] * (size - n_gains)
    rng.shuffle(signs)
    verbs = [gains.pop() if sign > 0 else losses.pop() for sign in signs]
    while True:
        amounts = [rng.randint(1, 9) for _ in signs]
        if sum(s * a for s, a in zip(signs, amounts, strict=True)):
            return tuple(map(Step, verbs, amounts, signs))


def _reach(scenes: tuple[tuple[Step, ...], ...]) -> int:
    """The furthest any strategy takes the count from its start, up or down (the two are equal by symmetry)."""
    before, reach = 0, 0
    for scene in scenes:
        path = list(itertools.accumulate(s.sign * s.amount for s in scene))
        reach = max(reach, before + max(map(abs, path)))
        before += abs(path[-1])
    return reach


def _nets_are_distinct(scenes: tuple[tuple[Step, ...], ...]) -> bool:
    """True if no set of days read backwards leaves the answer unchanged."""
    nets = [sum(s.sign * s.amount for s in scene) for scene in scenes]
    subsets = itertools.chain.from_iterable(itertools.combinations(nets, r) for r in range(1, len(nets) + 1))
    return all(sum(subset) != 0 for subset in subsets)


def make_problem(setting: Setting, rng: random.Random) -> Problem:
    """Draws one problem. The same `rng` state gives the same problem."""
    theme, name = rng.choice(THEMES), rng.choice(NAMES)
    sizes = scene_sizes(setting, rng)
    first_day = rng.randrange(len(DAYS) - len(sizes) + 1)
    days = DAYS[first_day : first_day + len(sizes)]
    while True:
        gains, losses = rng.sample(theme.gains, 6), rng.sample(theme.losses, 6)
        scenes = tuple(_scene(size, gains, losses, rng) for size in sizes)
        reach = _reach(scenes)
        if 2 * reach <= HIGHEST - LOWEST and _nets_are_distinct(scenes):
            break
    start = rng.randint(LOWEST + reach, HIGHEST - reach)
    story = [theme.opening.format(name=name, n=start)]
    for day, scene in zip(days, scenes, strict=True):
        story.append(f"on {day} {name} " + " , ".join(f"{s.verb} {s.amount}" for s in scene) + " .")
    story.append(theme.ask.format(name=name))
    return Problem(" ".join(story), start, days, scenes)


def write_chain(problem: Problem, flips: tuple[bool, ...]) -> str:
    """The chain that reads the days marked in `flips` backwards. No day marked: the careful chain."""
    count, sentences = problem.start, []
    for day, scene, flip in zip(problem.days, problem.scenes, flips, strict=True):
        for i, step in enumerate(scene):
            sign = -step.sign if flip else step.sign
            result = count + sign * step.amount
            head = f"on {day} " if i == 0 else ""
            sum_ = f"{count} {'+' if sign > 0 else '-'} {step.amount} = {result}"
            sentences.append(f"{head}{step.verb} {step.amount} : {sum_} .")
            count = result
    return " ".join([*sentences, f"#### {count}"])


def draw_flips(problem: Problem, rng: random.Random, coin: float = 0.5) -> tuple[bool, ...]:
    """One coin a day; heads, with probability `coin`, reads it backwards."""
    return tuple(rng.random() < coin for _ in problem.days)


_SENTENCE = re.compile(r"[^.]+ \.|#### -?\d+")


def label_chain(problem: Problem, text: str) -> ChainLabel:
    """Compares a sampled chain with every chain the two strategies can write for the problem."""
    text = " ".join(text.split())
    careful = _SENTENCE.findall(write_chain(problem, (False,) * len(problem.days)))
    written = _SENTENCE.findall(text)
    n_steps = problem.n_steps
    wrong = next((i for i in range(n_steps) if i >= len(written) or written[i] != careful[i]), None)
    correct = written[-1:] == careful[-1:]
    for flips in itertools.product((False, True), repeat=len(problem.days)):
        if text == write_chain(problem, flips):
            return ChainLabel("shortcut" if any(flips) else "careful", correct, wrong, flips)
    return ChainLabel("neither", correct, wrong, None)
