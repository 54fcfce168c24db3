"""What it saves to read a prompt once for all of its completions, against the same residuals read in one piece.

One reading up to `--layer` of the answers to `--questions` questions, `--generations` to each, sampled from the model
itself. Both ways in turns; a ratio is of one turn, in seconds of the clock and of the processor. A hook that does
nothing is what makes the library read in one piece (`models/prefix.py`). The states of both are compared before timing.

    OMP_NUM_THREADS=1 python benchmarks/shared_prompts.py
    python benchmarks/shared_prompts.py --model SmolLM2-135M-Instruct.Q4_1.gguf --layer 15 --source tiny:easy
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from grpo_overhead import Seconds, now
from read_features import device_name
from rich.console import Console
from rich.table import Table

from mechreward.models import LoadedModel, find_blocks, iter_blocks, load_model, read_residuals
from mechreward.rollout import Response, sample_responses
from mechreward.tasks import load_questions
from mechreward.tiny import MODEL

CLOSE = 1e-4
"""How far the states may be apart, relative to the largest."""


@dataclass(frozen=True)
class Setting:
    """Time of reading residuals with shared prompts against reading in one piece."""

    model: str = str(MODEL)
    """A model folder, id or GGUF file; the bundled reasoner if not given."""
    layer: int = 2
    """Block to read up to."""
    source: tuple[str, ...] = ("tiny:easy", "tiny:long")
    """What is asked, as `mechreward improve` takes it; a row each."""
    questions: int = 16
    """Questions."""
    generations: int = 8
    """Answers to each."""
    max_new_tokens: int = 160
    """Longest answer."""
    batch_size: int = 32
    """Rows a forward."""
    rounds: int = 9
    """Turns."""
    device: str = "cpu"
    """`cpu` or `cuda`."""
    json: Path | None = None
    """Write the numbers to this file."""


def main() -> None:
    setting = tyro.cli(Setting)
    loaded = load_model(setting.model, device=setting.device)
    rows = [measure(setting, loaded, source) for source in setting.source]
    where = f"{Path(setting.model).name}, block {setting.layer}, {device_name(setting.device)}"
    title = f"Reading {setting.questions} x {setting.generations} answers; {where}, {torch.get_num_threads()} threads"
    table = Table(
        "questions", "prompt", "answer", "whole s", "shared s", "ratio", "range", "of the processor", title=title
    )
    for row in rows:
        lengths = f"{row['prompt_tokens']:.0f}", f"{row['answer_tokens']:.0f}"
        ratio = f"{row['ratio']:.3f}", f"{row['low']:.3f}-{row['high']:.3f}", f"{row['processor_ratio']:.3f}"
        table.add_row(str(row["source"]), *lengths, f"{row['whole']:.3f}", f"{row['shared']:.3f}", *ratio)
    Console(width=120).print(table)
    if setting.json is not None:
        head = {"torch": torch.__version__, "device": device_name(setting.device), "setting": vars(setting)}
        setting.json.write_text(json.dumps(head | {"rows": rows}, indent=1, default=str))


def measure(setting: Setting, loaded: LoadedModel, source: str) -> dict[str, float | str]:
    questions = load_questions(source, limit=setting.questions)
    answers = sample_responses(
        loaded, questions, n=setting.generations, max_new_tokens=setting.max_new_tokens, temperature=1.0
    )
    compare(setting, loaded, answers)
    turns = []
    for _ in range(setting.rounds):
        with in_one_piece(loaded):
            whole = seconds(setting, loaded, answers)
        turns.append((whole, seconds(setting, loaded, answers)))
    clock, processor = ([shared[at] / whole[at] for whole, shared in turns] for at in (0, 1))
    return {
        "source": source,
        "prompt_tokens": statistics.mean(len(answer.prompt_ids) for answer in answers),
        "answer_tokens": statistics.mean(len(answer.completion_ids) for answer in answers),
        "whole": statistics.median(whole[0] for whole, _ in turns),
        "shared": statistics.median(shared[0] for _, shared in turns),
        "ratio": statistics.median(clock),
        "low": min(clock),
        "high": max(clock),
        "processor_ratio": statistics.median(processor),
        "n": len(turns),
    }


def compare(setting: Setting, loaded: LoadedModel, answers: list[Response]) -> None:
    given = prompts(answers), completions(answers), setting.layer, setting.batch_size
    shared_BTD, _ = read_residuals(loaded.model, *given)
    with in_one_piece(loaded):
        whole_BTD, _ = read_residuals(loaded.model, *given)
    apart = float((shared_BTD - whole_BTD).abs().max() / whole_BTD.abs().max())
    if apart > CLOSE:
        raise SystemExit(f"the states differ by {apart:.1e} of the largest; nothing is timed")


def seconds(setting: Setting, loaded: LoadedModel, answers: list[Response]) -> Seconds:
    started = now(setting.device)
    for _ in iter_blocks(loaded.model, prompts(answers), completions(answers), [setting.layer], setting.batch_size):
        pass
    ended = now(setting.device)
    return ended[0] - started[0], ended[1] - started[1]


@contextmanager
def in_one_piece(loaded: LoadedModel) -> Iterator[None]:
    handle = find_blocks(loaded.model)[0].register_forward_hook(lambda *_: None)
    try:
        yield
    finally:
        handle.remove()


def prompts(answers: list[Response]) -> list[tuple[int, ...]]:
    return [answer.prompt_ids for answer in answers]


def completions(answers: list[Response]) -> list[tuple[int, ...]]:
    return [answer.completion_ids for answer in answers]


if __name__ == "__main__":
    main()
