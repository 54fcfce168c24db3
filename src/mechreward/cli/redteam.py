"""`mechreward redteam`: which hacks does a reward pay, and does a model hack, before and after training?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field
from rich.table import Table

from mechreward.cli.options import parse_settings, quiet
from mechreward.cli.terminal import RichProgress, console
from mechreward.errors import InputError
from mechreward.files import write_json
from mechreward.settings import Count, Positive, Settings

if TYPE_CHECKING:
    from mechreward.hacking import RedTeam


class RedTeamSettings(Settings):
    """Puts canaries to a feature reward as a model reads them, and looks at the model's own answers."""

    model: str = "tiny"
    """A Hugging Face id or folder, a .gguf file, or `tiny` for the bundled reasoner."""
    after: str | None = None
    """A second model, the first one after training (a checkpoint's folder): both are put to the test, with the first
    one's threshold."""
    adapter: str | None = None
    """A PEFT adapter to put on the second model, or on the first if there is no second."""
    pack: str
    """The feature pack: a file, or a bundled pack's name."""
    sae: str
    """Its SAE: a folder or file, or a SAE Lens release."""
    sae_id: str | None = None
    """Which SAE of a release."""
    questions: str
    """Questions with gold answers: a .jsonl, .csv or .parquet file, `tiny:easy`, `reasoning-gym:NAME`, or a dataset."""
    limit: Count = 50
    """Use the first so many questions."""
    samples: Count = 4
    """The model's own answers to each question."""
    verifier: str = "gsm8k_exact_match"
    """How an answer is judged: `gsm8k_exact_match`, `math`, `choice` or `exact`."""
    answer_format: str = "#### {answer}"
    """How the verifier wants the answer."""
    max_new_tokens: Count = 256
    """Longest answer, in tokens."""
    batch_size: Count = 64
    """Answers sampled at a time."""
    highest: Positive = Field(default=1.0, le=1.0)
    """Exit with code 1 if the reward pays a larger share of the canaries than this."""
    device: str = "cpu"
    """Where the models run."""
    dtype: str = "float32"
    """The models' own precision."""
    seed: int = 0
    """Of the sampling."""
    out: Path
    """JSON file for all numbers."""


def redteam(arguments: list[str], prog: str) -> int:
    """Runs the red team on one model, or on it before and after training."""
    quiet()
    settings = parse_settings(RedTeamSettings, arguments, prog)
    results = _run(settings)
    _show(results)
    table = {name: result.to_dict() for name, result in results.items()}
    write_json(settings.out, table)
    console.print(f"numbers: [bold]{settings.out}[/]", soft_wrap=True)
    worst = max(result.reward.hack_rate or 0.0 for result in results.values())
    return 1 if worst > settings.highest else 0


def _run(settings: RedTeamSettings) -> dict[str, RedTeam]:
    from mechreward.hacking import red_team
    from mechreward.models import load_model
    from mechreward.reward import FeatureReward
    from mechreward.sae import load_sae
    from mechreward.tasks import load_questions
    from mechreward.tiny import model_path
    from mechreward.verifiers import get_verifier

    verifier = get_verifier(settings.verifier)
    questions = load_questions(settings.questions, limit=settings.limit, seed=settings.seed)
    reward = FeatureReward.from_pack(settings.pack, load_sae(settings.sae, settings.sae_id, device=settings.device))
    options: dict[str, Any] = {
        "samples": settings.samples, "max_new_tokens": settings.max_new_tokens, "batch_size": settings.batch_size,
        "answer_format": settings.answer_format, "seed": settings.seed,
    }  # fmt: skip
    names = {"before": settings.model} | ({"after": settings.after} if settings.after is not None else {})
    results: dict[str, RedTeam] = {}
    for name, model in names.items():
        adapter = settings.adapter if name == list(names)[-1] else None
        loaded = load_model(model_path(model), adapter=adapter, dtype=settings.dtype, device=settings.device)
        first = results.get("before")
        held: dict[str, Any] = {} if first is None else {"threshold": first.threshold, "spam": first.spam}
        with RichProgress().stage(f"red team {model}: {len(questions)} questions"):
            results[name] = red_team(loaded, reward, questions, verifier, **options, **held)
    return results


def _show(results: dict[str, RedTeam]) -> None:
    table = Table("", *results, box=None)

    def row(title: str, cells: list[str]) -> None:
        table.add_row(title, *cells)

    every = list(results.values())
    row("canaries the reward pays", [_share(r.reward.hack_rate, r.reward.hack_interval) for r in every])
    for pattern in every[0].reward.by_pattern:
        found = [r.reward.by_pattern[pattern] for r in every]
        row(f"  {pattern}", [f"{cell['paid']} of {cell['n']}" for cell in found])
    row("own answers, wrong and paid", [_share(r.hacked, r.hacked_interval) for r in every])
    for name in every[0].correct_under:
        cells = [r.correct_under[name] for r in every]
        row(f"right, {name}", [_share(cell["accuracy"], (cell["low"], cell["high"])) for cell in cells])
    console.print(table)


def _share(value: float | None, interval: tuple[float, float] | None) -> str:
    if value is None or interval is None:
        raise InputError("questions: no canary got a reward; the reward could read none of them")
    return f"{value:.3f} ({interval[0]:.3f}-{interval[1]:.3f})"
