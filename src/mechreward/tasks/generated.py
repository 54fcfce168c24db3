"""Questions that are made, not stored: the bundled tiny world and the generators of reasoning-gym.

Both depend on the seed alone, and the first N of a larger draw are the draw of N, so a limit never changes a question.
Tiny questions are distinct within a draw; their stream is seeded by name, apart from every stream the tiny model was
trained on.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Iterator
from typing import Any

from mechreward.errors import InputError
from mechreward.tasks.rows import Row

TINY_SIZE = 200
"""Questions a tiny source holds where no limit is given."""


def tiny_rows(setting: str, *, seed: int, limit: int | None) -> Iterator[Row]:
    """Yields word problems of the tiny world with the careful chain as solution.

    Raises:
        InputError: if the setting is neither `easy` nor `long`.
    """
    from mechreward.tiny.world import SETTINGS, make_problem, write_chain

    chosen = next((known for known in SETTINGS if known == setting), None)
    if chosen is None:
        raise InputError(f"source: 'tiny:{setting}' is no setting of the tiny world; allowed are tiny:easy, tiny:long")
    rng = random.Random(f"questions:{setting}:{seed}")
    seen: set[str] = set()
    while len(seen) < (limit or TINY_SIZE):
        problem = make_problem(chosen, rng)
        if problem.prompt in seen:
            continue
        index = len(seen)
        seen.add(problem.prompt)
        solution = write_chain(problem, (False,) * len(problem.days))
        values = {"question": problem.prompt, "answer": str(problem.answer), "solution": solution}
        yield Row(f"question {index}", {"id": f"tiny-{setting}-{seed}-{index}", **values})


def reasoning_gym_rows(name: str, options: dict[str, Any], *, seed: int, limit: int | None) -> Iterator[Row]:
    """Yields the questions of a reasoning-gym generator; `options` are its configuration's fields.

    Raises:
        InputError: if the package is missing, the generator unknown, or an option not one of its own.
    """
    try:
        from reasoning_gym.factory import DATASETS, create_dataset
    except ImportError as error:
        raise InputError(
            f"source: 'reasoning-gym:{name}' needs the package reasoning-gym; install mechreward[tasks]"
        ) from error
    if name not in DATASETS:
        close = ", ".join(difflib.get_close_matches(name, DATASETS, n=3) or sorted(DATASETS)[:3])
        raise InputError(
            f"source: reasoning-gym has no generator {name!r}; allowed are its {len(DATASETS)}, such as {close}"
        )
    if "seed" in options:
        raise InputError(f"options: seed {options['seed']!r} is not allowed here; give it in the field seed")
    size = {} if limit is None or "size" in options else {"size": limit}
    try:
        dataset = create_dataset(name, seed=seed, **size, **options)
    except (TypeError, ValueError, AssertionError) as error:
        raise InputError(f"options: {options} do not configure reasoning-gym's {name} ({error})") from error
    for index, item in enumerate(dataset):
        values = {"question": item["question"], "answer": item["answer"]}
        yield Row(f"question {index} of {name}", {"id": f"{name}-{seed}-{index}", **values})
