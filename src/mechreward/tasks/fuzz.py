"""Fuzzing: other questions that ask for the same reasoning, a family around each original.

Problems of the tiny world are read back from their text and told anew, with the right answer worked out anew:

- `names`: of somebody else;
- `numbers`: other amounts and another start, so another answer;
- `order`: each day's changes in another order;
- `irrelevant`: with a sentence about somebody else's things after the opening;
- `paraphrase`: each change in a sentence of its own.

Any other text takes `irrelevant` alone, a sentence in front of it: nothing else can be changed with the answer known.
Every change keeps what the bundled model was trained to write: counts of two digits, read either way, and an answer
that the right reading alone gives.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from mechreward.errors import InputError
from mechreward.tasks.question import Question
from mechreward.tiny.world import HIGHEST, LOWEST, NAMES, THEMES, Problem, Step, Theme, write_chain

ASIDE = "The weather was fine all day. "
TRIES = 200
"""Draws of a variation before it is given up."""


@dataclass(frozen=True)
class Variation:
    """A question that was made from another one."""

    of: str
    """Id of the original."""
    kind: str
    question: Question
    """Its id is the original's, `~`, the kind and a number: never that of a question that was there before."""

    @classmethod
    def make(cls, original: Question, kind: str, index: int, **changed: str) -> Variation:
        """The original with some fields changed, as the `index`-th of its kind."""
        return cls(original.id, kind, replace(original, id=f"{original.id}~{kind}-{index}", **changed))


@dataclass(frozen=True)
class Story:
    """A problem of the tiny world as what it is told from."""

    theme: Theme
    name: str
    problem: Problem
    aside: str = ""
    apart: bool = False
    """Each change in a sentence of its own."""

    def tell(self) -> str:
        """The prompt; equal to the world's own for a story that was read from it."""
        told = [self.theme.opening.format(name=self.name, n=self.problem.start), *([self.aside] if self.aside else [])]
        for day, scene in zip(self.problem.days, self.problem.scenes, strict=True):
            changes = [f"{step.verb} {step.amount}" for step in scene]
            sentences = changes if self.apart else [" , ".join(changes)]
            told += [f"on {day} {self.name} {sentence} ." for sentence in sentences]
        return " ".join([*told, self.theme.ask.format(name=self.name)])


def read_story(prompt: str) -> Story | None:
    """A tiny problem's story; None for any other text."""
    for theme in THEMES:
        opening = re.escape(theme.opening).replace(r"\{name\}", r"(?P<name>\w+)").replace(r"\{n\}", r"(?P<n>\d+)")
        ask = re.escape(theme.ask).replace(r"\{name\}", r"\w+")
        found = re.fullmatch(rf"{opening} (?P<days>.*) {ask}", prompt)
        if found is None:
            continue
        days = re.findall(r"on (\w+) \w+ ([^.]+) \.", found["days"])
        scenes = tuple(tuple(_step(theme, change) for change in scene.split(" , ")) for _, scene in days)
        story = Story(theme, found["name"], Problem(prompt, int(found["n"]), tuple(day for day, _ in days), scenes))
        return story if story.tell() == prompt else None
    return None


def _step(theme: Theme, change: str) -> Step:
    verb, amount = change.split(" ")
    return Step(verb, int(amount), 1 if verb in theme.gains else -1)


def allowed_kinds(questions: Sequence[Question]) -> tuple[str, ...]:
    """The kinds that the text of every question allows: all for problems of the tiny world, else `irrelevant`."""
    told = all(read_story(question.prompt) is not None for question in questions)
    return tuple(KINDS) if told else ("irrelevant",)


def fuzz(questions: Sequence[Question], kinds: Sequence[str], n: int = 1, seed: int = 0) -> list[Variation]:
    """Up to `n` variations of each kind of each question, none twice and none equal to an original.

    A question may have fewer: few steps have few orders, and some of these break the rule on two digits. The caller can
    tell by the number that comes back.

    Raises:
        InputError: for no kinds, an unknown kind, one that a question's text does not allow, n below 1, or a kind of
            which no question has a variation.
    """
    if not kinds or n < 1:
        raise InputError(f"kinds: {list(kinds)}, {n} of each; at least one kind, and 1 of each, are needed")
    for kind in kinds:
        if kind not in KINDS:
            raise InputError(f"kinds: {kind!r} is not known; allowed are {', '.join(KINDS)}")
    seen = {question.prompt for question in questions}
    made = [
        _variation(question, kind, index, seen, random.Random(f"fuzz:{seed}:{question.id}:{kind}:{index}"))
        for question in questions
        for kind in kinds
        for index in range(n)
    ]
    found = [variation for variation in made if variation is not None]
    barren = set(kinds) - {variation.kind for variation in found}
    if barren:
        raise InputError(f"kinds: none of {len(questions)} questions has a variation of the kind {min(barren)}")
    return found


def _variation(question: Question, kind: str, index: int, seen: set[str], rng: random.Random) -> Variation | None:
    story = read_story(question.prompt)
    if story is None:
        if kind != "irrelevant" or index:
            raise InputError(
                f"kinds: {kind} {index} of {question.id} needs a problem of the tiny world; any other text takes one "
                "irrelevant sentence alone"
            )
        return Variation.make(question, kind, index, prompt=ASIDE + question.prompt)
    for _ in range(TRIES):
        told = KINDS[kind](story, rng)
        prompt = told.tell()
        # Other numbers may come to the answer there was.
        fresh = kind != "numbers" or told.problem.answer != story.problem.answer
        if fresh and prompt not in seen and is_sound(told.problem):
            seen.add(prompt)
            answer, solution = str(told.problem.answer), write_chain(told.problem, (False,) * len(told.problem.days))
            return Variation.make(question, kind, index, prompt=prompt, answer=answer, solution=solution)
    return None


def is_sound(problem: Problem) -> bool:
    """Whether every count has two digits, whichever days are read backwards, and no such reading gives the answer."""
    finals = []
    for signs in itertools.product((1, -1), repeat=len(problem.scenes)):
        count = problem.start
        for sign, scene in zip(signs, problem.scenes, strict=True):
            for step in scene:
                count += sign * step.sign * step.amount
                if not LOWEST <= count <= HIGHEST:
                    return False
        finals.append(count)
    return finals.count(problem.answer) == 1


def _names(story: Story, rng: random.Random) -> Story:
    return replace(story, name=rng.choice(NAMES))


def _numbers(story: Story, rng: random.Random) -> Story:
    scenes = tuple(tuple(s._replace(amount=rng.randint(1, 9)) for s in scene) for scene in story.problem.scenes)
    return replace(story, problem=replace(story.problem, start=rng.randint(LOWEST, HIGHEST), scenes=scenes))


def _order(story: Story, rng: random.Random) -> Story:
    scenes = tuple(tuple(rng.sample(scene, len(scene))) for scene in story.problem.scenes)
    return replace(story, problem=replace(story.problem, scenes=scenes))


def _irrelevant(story: Story, rng: random.Random) -> Story:
    other = rng.choice([theme for theme in THEMES if theme != story.theme])
    who = rng.choice([name for name in NAMES if name != story.name])
    return replace(story, aside=other.opening.format(name=who, n=rng.randint(LOWEST, HIGHEST)))


def _paraphrase(story: Story, _: random.Random) -> Story:
    return replace(story, apart=True)


KINDS: dict[str, Callable[[Story, random.Random], Story]] = {
    "names": _names,
    "numbers": _numbers,
    "order": _order,
    "irrelevant": _irrelevant,
    "paraphrase": _paraphrase,
}
"""What a question can be changed by."""
