"""`mechreward steer`: look at the features of a text, answer with edits, and find the strength that is worth having."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import tyro
from rich.markup import escape
from rich.table import Table

from mechreward.cli.asking import load_given_sae
from mechreward.cli.options import parse_settings, quiet
from mechreward.cli.shared_settings import SAESettings
from mechreward.cli.steer_settings import GenerateSettings, SweepSettings
from mechreward.cli.terminal import RichProgress, console, print_path
from mechreward.errors import InputError, named
from mechreward.settings import make_settings

if TYPE_CHECKING:
    from mechreward.steering import Curve


def inspect(
    text: tyro.conf.Positional[str],
    model: str = "tiny",
    sae: str | None = None,
    sae_id: str | None = None,
    layer: int | None = None,
    k: int | None = None,
    top: int = 10,
    by: Literal["frequency", "mean", "max", "sum"] = "max",
    token: int | None = None,
) -> int:
    """The features that fire on a text.

    Args:
        text: What the model reads.
        model: A Hugging Face id or folder, a .gguf file, or `tiny`.
        sae: A folder or file, or a SAE Lens release; the bundled one for `tiny`.
        sae_id: Which SAE of a release.
        layer: Block that the SAE reads (0-based), where its file does not say so.
        k: Active features a token, where a TopK SAE's file does not say so.
        top: How many features.
        by: Order by the share of tokens they fire on, or by mean, largest or summed activation.
        token: Only this token of the text, from 0.
    """
    quiet()
    from mechreward.models import load_model
    from mechreward.steering import Variant
    from mechreward.tiny import model_path

    given = make_settings(SAESettings, {"sae": sae, "sae_id": sae_id, "layer": layer, "k": k})
    reader = load_given_sae(given, model, "cpu", f"to read {model}")
    seen = Variant(load_model(model_path(model)), reader).inspect(text)
    with named(k="top"):
        found = seen.top(top, by) if token is None else seen.at(token, top)
    where = f"{len(seen.tokens)} tokens" if token is None else f"token {token}, {seen.tokens[token]!r}"
    table = Table("feature", "activation" if token is not None else by, title=escape(where), box=None)
    for feature, value in found:
        table.add_row(str(feature.id), f"{value:.4g}")
    console.print(table)
    return 0


def generate(arguments: list[str], prog: str) -> int:
    """Answers with and without edits, one under the other."""
    settings = parse_settings(GenerateSettings, arguments, prog)
    quiet()
    from mechreward.cli.steer_targets import check_edits_alone, load_variant, prompt_ids, questions_of

    if bool(settings.features) == (settings.edits is not None):
        raise InputError("features: give either --features or --edits, for there to be something to steer")
    check_edits_alone(settings)
    questions = questions_of(settings)
    with RichProgress().stage("calibrate"):
        variant = load_variant(settings, settings.edits)
    if settings.features:
        variant.set(list(settings.features), settings.strength, settings.mode)
    prompts = prompt_ids(variant.loaded, settings, questions)
    plain = variant.copy()
    plain.reset()
    answers = [
        [
            response.text
            for (response,) in arm.generate(
                prompts,
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                batch_size=settings.batch_size,
                seed=settings.seed,
            )
        ]
        for arm in (plain, variant)
    ]
    for question, before, after in zip(questions, *answers, strict=True):
        console.print(f"[bold]{escape(question.prompt)}[/]", soft_wrap=True)
        console.print(f"  as it is  {escape(before)}", soft_wrap=True)
        console.print(f"  steered   {escape(after)}", soft_wrap=True)
    return 0


def sweep(arguments: list[str], prog: str) -> int:
    """Finds the strength: exit code 0 with a knee, 1 without one."""
    settings = parse_settings(SweepSettings, arguments, prog)
    quiet()
    from mechreward.cli.steer_targets import load_variant, prompt_ids, questions_of
    from mechreward.files import write_json
    from mechreward.inputs import verifier_of
    from mechreward.rollout import Response, verify_responses
    from mechreward.steering import Protocol
    from mechreward.steering import sweep as run
    from mechreward.steering.sweep import check_strengths

    if not settings.features:
        raise InputError("features: is needed; give the ids of the features to edit, --features 3 17")
    verifier, questions = verifier_of(settings.verifier, settings.strictness), questions_of(settings)
    check_strengths(settings.strengths, len(questions))

    def score(place: int, response: Response) -> float:
        if settings.contains is not None:
            return float(settings.contains in response.text)
        question = questions[place]
        (judged,) = verify_responses([replace(response, question_id=question.id)], [question], verifier)
        return float(judged.correct is True)

    with RichProgress().stage("calibrate"):
        variant = load_variant(settings)
    protocol = Protocol(
        prompts=prompt_ids(variant.loaded, settings, questions),
        score=score,
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        batch_size=settings.batch_size,
        seed=settings.seed,
    )
    features = list(settings.features)
    with RichProgress().stage(f"sweep {len(settings.strengths)} strengths"):
        curve = run(variant, features, settings.strengths, protocol, mode=settings.mode, controls=settings.controls)
    _show(curve)
    if settings.out is not None:
        write_json(settings.out, {"knee": curve.knee, "points": curve.rows()})
        print_path("curve:", settings.out)
    return 1 if curve.knee is None else 0


def _show(curve: Curve) -> None:
    table = Table("arm", "strength", "behaviour", "95 %", "difference", "p", "NLL", "repeats", "fluent", box=None)
    for row in curve.rows():
        paired = ("", "") if row["p_value"] is None else (f"{row['difference']:+.3f}", f"{row['p_value']:.3g}")
        interval = f"{row['low']:.3f}-{row['high']:.3f}"
        numbers = (f"{row['nll']:.3f}", f"{row['repetition']:.2f}", "yes" if row["fluent"] else "NO")
        table.add_row(row["arm"], f"{row['strength']:g}", f"{row['behaviour']:.3f}", interval, *paired, *numbers)
    console.print(table)
    found = "no fluent strength gains anything" if curve.knee is None else f"knee at strength {curve.knee:g}"
    console.print(f"{found} (n {curve.points[0].n_prompts} questions)")
