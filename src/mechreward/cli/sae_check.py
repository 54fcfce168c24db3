"""`mechreward sae check`: does an SAE fit a model, and if not, what is likely wrong?"""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from mechreward.cli.asking import answered, asked
from mechreward.cli.options import parse_settings, quiet
from mechreward.cli.sae_settings import CheckSettings
from mechreward.cli.terminal import RichProgress, console
from mechreward.errors import InputError, named

if TYPE_CHECKING:
    from mechreward.models import LoadedModel
    from mechreward.sae import SAECheck
    from mechreward.sae.rows import Row


def check(arguments: list[str], prog: str) -> int:
    """Checks an SAE on a model's residuals: exit code 0 without findings, 1 with some."""
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--sae", *arguments]
    # No field of the settings: pydantic has a method of that name.
    as_json, arguments = "--json" in arguments, [argument for argument in arguments if argument != "--json"]
    settings = parse_settings(CheckSettings, arguments, prog)
    quiet()
    from mechreward.models import load_model
    from mechreward.sae import load_sae
    from mechreward.sae.on_model import check_on_model
    from mechreward.tiny import model_path

    if (settings.questions is None) == (settings.text is None):
        raise InputError("questions: give either --questions or --text, for the model to have something to read")
    sae = load_sae(settings.sae, settings.sae_id, device=settings.device, layer=settings.layer, k=settings.k)
    loaded = load_model(
        model_path(settings.model), adapter=settings.adapter, dtype=settings.dtype, device=settings.device
    )
    rows = _rows(settings, loaded, silent=as_json)
    found = check_on_model(sae, loaded, rows, max_tokens=settings.tokens, every_block=True)
    if as_json:
        console.print(json.dumps(found.to_dict(), indent=1), markup=False, soft_wrap=True)
    else:
        _show(settings, found)
    return 1 if found.findings else 0


def _rows(settings: CheckSettings, loaded: LoadedModel, silent: bool) -> list[Row]:
    """Prompts with the model's own answers, or text; all tokens but the first of each are read."""
    from mechreward.models import context_length
    from mechreward.sae import text_documents
    from mechreward.tasks import load_texts

    if settings.text is not None:
        with named(source="text"):
            texts = load_texts(settings.text, column=settings.text_column, limit=settings.limit)
        return [row for doc in text_documents(loaded.tokenizer, texts, context_length(loaded.model)) for row in doc]
    assert settings.questions is not None
    questions = asked(settings, settings.questions, settings.limit)
    stage: AbstractContextManager[Any] = nullcontext(lambda _: None)
    if not silent:
        stage = RichProgress().stage(f"sample {len(questions)} answers", len(questions))
    with stage as advance:
        responses = answered(settings, loaded, questions, 1, advance)
    return [(r.prompt_ids[:1], [*r.prompt_ids[1:], *r.completion_ids]) for r in responses]


def _show(settings: CheckSettings, found: SAECheck) -> None:
    console.print(f"[bold]{escape(settings.sae)}[/] on {escape(settings.model)}, {found.n_tokens} tokens")
    numbers = Table(box=None, show_header=False)
    for name, value, meaning in (
        ("L0", f"{found.l0:.1f}", "features active a token"),
        ("FVU", f"{found.fvu:.4f}", "variance unexplained, at its own block"),
        ("dead", f"{found.dead_share:.1%}", "features that fire on none of these tokens"),
        ("norm ratio", f"{found.norm_ratio:.3g}", "reconstruction over residual, about the mean"),
        ("cosine", f"{found.encoder_decoder_cosine:.2f}", "encoder column with decoder row"),
    ):
        numbers.add_row(name, value, f"[dim]{meaning}[/]")
    console.print(numbers)
    blocks = Table("block", "FVU", box=None)
    for layer, fvu in found.fvu_by_layer.items():
        mark = " [bold]<- the SAE reads it[/]" if layer == found.layer else ""
        blocks.add_row(str(layer), f"{fvu:.4g}{mark}")
    console.print(blocks)
    for finding in found.findings:
        console.print(f"[bold yellow]finding[/] {escape(finding)}", soft_wrap=True)
    if not found.findings:
        console.print("no finding")
