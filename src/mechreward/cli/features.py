"""`mechreward features show`: what do these features do?"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from mechreward.cli.asking import load_given_sae
from mechreward.cli.features_settings import FeaturesSettings
from mechreward.cli.options import parse_settings, quiet
from mechreward.cli.terminal import console, print_path
from mechreward.errors import InputError
from mechreward.files import atomic_path

if TYPE_CHECKING:
    from mechreward.features.contexts import Context, FeatureContexts
    from mechreward.features.labels import Label
    from mechreward.features.lens import LensReading

RESPONSES = "responses/known.parquet"
"""Where a run directory keeps the responses that features were found on."""


def show(arguments: list[str], prog: str) -> int:
    """Prints each feature's labels, logit lens and highest contexts."""
    settings = parse_settings(FeaturesSettings, arguments, prog)
    quiet()
    from mechreward.features.contexts import top_contexts
    from mechreward.features.lens import logit_lens
    from mechreward.models import load_model
    from mechreward.rollout import load_responses
    from mechreward.tiny import model_path

    ids = _ids(settings.ids)
    responses = load_responses(settings.responses / RESPONSES if settings.responses.is_dir() else settings.responses)
    sae = load_given_sae(settings, settings.model, settings.device, "and was not given")
    loaded = load_model(
        model_path(settings.model), adapter=settings.adapter, dtype=settings.dtype, device=settings.device
    )
    found = top_contexts(loaded, sae, responses, ids, settings.contexts)
    readings = logit_lens(loaded, sae, ids, settings.tokens)
    for contexts, reading in zip(found, readings, strict=True):
        _show(contexts, reading, _labels(settings, contexts, reading))
    if settings.html is not None:
        _write(settings.html, found)
    return 0


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise InputError(f"ids: {text!r} is not a list of feature ids; write them as 1,2,3") from error


def _labels(settings: FeaturesSettings, contexts: FeatureContexts, reading: LensReading) -> list[Label]:
    from mechreward.features.labels import contexts_label, lens_label
    from mechreward.features.neuronpedia_client import NeuronpediaClient

    labels = [lens_label(reading), contexts_label(contexts)]
    if settings.neuronpedia is not None:
        model, slash, source = settings.neuronpedia.partition("/")
        if not slash:
            raise InputError(f"neuronpedia: {settings.neuronpedia!r} is not allowed; write model/source")
        labels.insert(0, NeuronpediaClient().get_feature(model, source, contexts.feature_id).label())
    return [label for label in labels if label is not None]


def _show(contexts: FeatureContexts, reading: LensReading, labels: list[Label]) -> None:
    rate = contexts.n_firing / contexts.n_tokens
    console.print(f"[bold]feature {contexts.feature_id}[/], fires on {rate:.2%} of {contexts.n_tokens} tokens")
    for label in labels:
        console.print(f"  {escape(str(label))}", soft_wrap=True)
    for word, tokens in (("for", reading.promoted), ("against", reading.suppressed)):
        console.print(f"  {word}: {escape(', '.join(f'{t!r} {value:.2f}' for t, value in tokens))}", soft_wrap=True)
    table = Table("activation", "answer", "question", "context", box=None)
    for context in contexts.contexts:
        verdict = {True: "right", False: "wrong", None: ""}[context.correct]
        table.add_row(f"{context.activation:.3g}", verdict, escape(context.question_id), _coloured(context))
    console.print(table)


def _coloured(context: Context) -> str:
    """The tokens, those bold at which the feature fires at half its height or more."""
    parts = zip(context.tokens, context.acts, strict=True)
    return " ".join(
        f"[bold yellow]{escape(t)}[/]" if act >= context.activation / 2 else escape(t)
        for t, act in ((token.replace("\n", "\\n"), act) for token, act in parts)
    )


def _write(path: Path, found: list[FeatureContexts]) -> None:
    body = "\n".join(contexts._repr_html_() for contexts in found)
    with atomic_path(path) as temporary:
        temporary.write_text(f'<!doctype html>\n<meta charset="utf-8">\n<title>features</title>\n{body}\n')
    print_path("wrote", path)
