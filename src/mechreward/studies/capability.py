"""What else a model can do: a panel of tasks, before and after training, each with its standard error.

Two panels. Any source of questions with gold answers makes one (`reasoning-gym:chain_sum`, a file, `tiny:long`), which
needs no network; lm-eval (EleutherAI's harness, the command `lm_eval`) makes the other where it is installed, in a
process of its own. A harness that fails is an error: its output never becomes a score of 0.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from typing import Any, NamedTuple

from mechreward.errors import InputError
from mechreward.files import make_folder, read_json
from mechreward.gates import PanelTask, accuracy_interval
from mechreward.models import LoadedModel
from mechreward.rollout import sample_responses, verify_responses
from mechreward.tasks import load_questions
from mechreward.tasks.load import PLACEHOLDER
from mechreward.verifiers import Verifier

METRICS = ("exact_match,strict-match", "acc_norm,none", "acc,none", "exact_match,none")
"""Which of lm-eval's numbers is a task's score: the first that it has."""


class Score(NamedTuple):
    """Accuracy on one task, with its standard error."""

    accuracy: float
    error: float


def panel_scores(
    loaded: LoadedModel,
    sources: Sequence[str],
    verifier: Verifier,
    *,
    n_questions: int = 50,
    samples: int = 1,
    max_new_tokens: int = 256,
    prompt_format: str = PLACEHOLDER,
    temperature: float = 1.0,
    batch_size: int = 64,
    seed: int = 0,
) -> dict[str, Score]:
    """Accuracy on each source of questions; standard errors cluster by question.

    Raises:
        InputError: for a source that `load_questions` does not know, or without gold answers.
    """
    scores = {}
    for source in sources:
        questions = load_questions(source, limit=n_questions, seed=seed, prompt_format=prompt_format)
        answers = sample_responses(
            loaded, questions, n=samples, max_new_tokens=max_new_tokens, temperature=temperature,
            batch_size=batch_size, seed=seed,
        )  # fmt: skip
        judged = verify_responses(answers, questions, verifier)
        found = accuracy_interval([a.correct is True for a in judged], [a.question_id for a in judged])
        scores[source] = Score(found.value, found.error)
    return scores


def lm_eval_scores(
    model: str, tasks: Sequence[str], out: Path, *, limit: int | None = None, timeout: float = 3600.0
) -> dict[str, Score]:
    """Scores of lm-eval's tasks, by the command `lm_eval` in a process of its own.

    Args:
        model: a Hugging Face id or a folder.
        out: folder for lm-eval's own files.
        limit: questions a task.

    Raises:
        InputError: if lm-eval is not installed, fails, takes longer than `timeout` seconds, or leaves no score.
    """
    command = shutil.which("lm_eval")
    if command is None:
        raise InputError("lm_eval: the command is not there; pip install lm-eval, or name sources of questions instead")
    arguments = ["--model", "hf", "--model_args", f"pretrained={model}", "--tasks", ",".join(tasks)]
    arguments += ["--output_path", str(make_folder(out))] + ([] if limit is None else ["--limit", str(limit)])
    try:
        ended = subprocess.run([command, *arguments], capture_output=True, text=True, timeout=timeout, check=False)
    except subprocess.TimeoutExpired as error:
        raise InputError(f"lm_eval: took longer than {timeout:g} seconds on {', '.join(tasks)}") from error
    if ended.returncode:
        last = (ended.stderr.strip() or ended.stdout.strip() or "it said nothing").splitlines()[-1]
        raise InputError(f"lm_eval: ended with exit code {ended.returncode} ({last})")
    written = sorted(out.rglob("results*.json"), key=lambda path: path.stat().st_mtime)
    if not written:
        raise InputError(f"lm_eval: ended well and left no results in {out}")
    return {task: read_score(read_json(written[-1]), task) for task in tasks}


def read_score(results: dict[str, Any], task: str) -> Score:
    """One task's score and standard error from lm-eval's results file.

    Raises:
        InputError: if the task or its score is not there, or is no number.
    """
    numbers = results.get("results", {}).get(task)
    if numbers is None:
        raise InputError(f"lm_eval: its results have no task {task!r}")
    name = next((metric for metric in METRICS if metric in numbers), None)
    if name is None:
        raise InputError(f"lm_eval: {task} has none of {', '.join(METRICS)}")
    score, error = numbers[name], numbers.get(name.replace(",", "_stderr,"))
    if not all(isinstance(value, int | float) and isfinite(value) for value in (score, error)):
        raise InputError(f"lm_eval: {task} has {name} = {score!r} with standard error {error!r}; both must be numbers")
    return Score(float(score), float(error))


def panel_of(before: dict[str, Score], after: dict[str, Score]) -> dict[str, PanelTask]:
    """The tasks of both, as Gate 3 reads them.

    Raises:
        InputError: if the two are of different tasks.
    """
    if before.keys() != after.keys():
        odd = min(before.keys() ^ after.keys())
        raise InputError(f"panel: {odd} was measured on one side only; both sides need the same tasks")
    return {
        task: PanelTask(
            before=score.accuracy, before_error=score.error, after=after[task].accuracy, after_error=after[task].error
        )
        for task, score in before.items()
    }
