"""`mechreward discover`: which features go with right answers to the same question?"""

from __future__ import annotations

from dataclasses import asdict
from math import isnan
from pathlib import Path
from typing import TYPE_CHECKING

from rich.table import Table

from mechreward.cli.asking import answers, load_given_sae
from mechreward.cli.discover_settings import DiscoverSettings
from mechreward.cli.options import parse_settings, quiet
from mechreward.cli.terminal import RichProgress, console, print_path
from mechreward.errors import InputError, named
from mechreward.files import make_folder, write_json

if TYPE_CHECKING:
    from mechreward.features import ContrastTable, HeldOutScores
    from mechreward.gates.equivalents import Equivalent
    from mechreward.models import LoadedModel
    from mechreward.rollout import Response
    from mechreward.sae import SAE

SHOWN = 10
"""Rows of the table that are printed."""
OTHERS = ("attribution", "reasonscore")
"""Methods that rank features by something else than right against wrong, and are not compared with dense readings."""
COLUMNS = ("effect", "q_value", "auroc", "rank_q_value", "family_p_value", "entropy", "stability", "support")
"""Columns that are printed, where the method has them."""


def discover(arguments: list[str], prog: str) -> int:
    """Reads verified responses, ranks all features and writes table, pack and comparison; 1 if no feature passes."""
    settings = parse_settings(DiscoverSettings, arguments, prog)
    quiet()
    from mechreward.features import DEFAULT_REASONING_VOCAB, resolve_vocab_token_ids, save_contrast
    from mechreward.features.aggregation import build_aggregation
    from mechreward.features.discovery import CROSS_FIT
    from mechreward.gates.equivalents import compare_equivalents
    from mechreward.inputs import FIT, check_given_sae
    from mechreward.models import load_model
    from mechreward.tiny import model_path

    with named(aggregation="pooling", k="pooling"):
        build_aggregation(settings.pooling)
    if (settings.questions is None) == (settings.responses is None):
        raise InputError("questions: give either --questions, to be answered, or --responses, a file of answers")
    make_folder(settings.out)
    loaded = load_model(
        model_path(settings.model), adapter=settings.adapter, dtype=settings.dtype, device=settings.device
    )
    if settings.method == "reasonscore":
        resolve_vocab_token_ids(loaded.tokenizer, settings.words or DEFAULT_REASONING_VOCAB)
    sae = _sae(settings, loaded)
    # Of two questions each would be held out of a fit of one.
    least, what = (2, "a ranking") if settings.method in OTHERS else (CROSS_FIT, "a cross-fitted contrast")
    responses = answers(settings, loaded, least=least, what=what, keep=settings.out / "responses.parquet")
    fit = check_given_sae(sae, loaded, responses)
    held_out: HeldOutScores | None = None
    rows: tuple[Equivalent, ...] = ()
    if settings.method in OTHERS:
        table = _other(settings, loaded, sae, responses)
    else:
        table, held_out = _explore(settings, loaded, sae, responses)
        rows = compare_equivalents(held_out, seed=settings.seed)
    write_json(settings.out / FIT, fit.to_dict())
    save_contrast(table, settings.out / "features.parquet")
    _show(table)
    if held_out is not None:
        _show_equivalents(rows, held_out)
    write_json(
        settings.out / "discovery.json",
        {
            "method": table.method,
            "n_questions": table.n_questions,
            "n_mixed": table.n_mixed,
            "n_responses": table.n_responses,
            "chance_effect": None if isnan(table.chance_effect) else table.chance_effect,
            "held_out": [row.to_dict() for row in rows],
            "held_out_without_features": 0 if held_out is None else held_out.n_empty,
            "settings": settings.model_dump(mode="json"),
        },
    )
    passed = _save_pack(settings, loaded, sae, table)
    for name in ("features.parquet", "discovery.json", *(("pack.json",) if passed else ())):
        print_path("wrote", settings.out / name)
    return 0 if passed else 1


def _sae(settings: DiscoverSettings, loaded: LoadedModel) -> SAE:
    from mechreward.models import check_layer, d_model

    sae = load_given_sae(settings, settings.model, settings.device, "and was not given")
    check_layer(loaded.model, sae.layer)
    if sae.d_model != d_model(loaded.model):
        width = d_model(loaded.model)
        raise InputError(f"sae: {sae.release} reads residuals of width {sae.d_model}, but {settings.model} has {width}")
    return sae


def _explore(
    settings: DiscoverSettings, loaded: LoadedModel, sae: SAE, responses: list[Response]
) -> tuple[ContrastTable, HeldOutScores]:
    from mechreward.features import Search, explore

    search = Search(
        method=settings.method,
        pooling=settings.pooling,
        min_support=settings.min_support,
        min_each=settings.min_each,
        halves=settings.halves,
        permutations=settings.permutations,
        seed=settings.seed,
    )
    title = f"{settings.method}: {sae.d_sae} features, {len(responses)} responses"
    with RichProgress().stage(title, len(responses)) as advance:
        return explore(
            loaded,
            sae,
            responses,
            search,
            n_features=settings.n_features,
            q_max=settings.q_max,
            min_stability=settings.min_stability,
            signs=settings.signs,
            batch_size=settings.read_batch_size,
            on_batch=advance,
        )


def _other(settings: DiscoverSettings, loaded: LoadedModel, sae: SAE, responses: list[Response]) -> ContrastTable:
    from mechreward.features import DEFAULT_REASONING_VOCAB, answer_target, attribution_table, reasonscore_table

    title = f"{settings.method}: {sae.d_sae} features, {len(responses)} responses"
    with RichProgress().stage(title, len(responses)) as advance:
        if settings.method == "reasonscore":
            return reasonscore_table(
                loaded, sae, responses, words=settings.words or DEFAULT_REASONING_VOCAB,
                min_support=settings.min_support, halves=settings.halves, seed=settings.seed,
                batch_size=settings.read_batch_size, on_batch=advance,
            )  # fmt: skip
        targets = [answer_target(loaded.tokenizer, response) if response.correct else None for response in responses]
        return attribution_table(
            loaded, sae, responses, targets, min_support=settings.min_support, halves=settings.halves,
            seed=settings.seed, batch_size=settings.read_batch_size, on_batch=advance,
        )  # fmt: skip


def _save_pack(settings: DiscoverSettings, loaded: LoadedModel, sae: SAE, table: ContrastTable) -> bool:
    """Writes the pack; False, with the reason on the terminal, if no feature passes the selection."""
    from mechreward.features import NoFeatures, build_pack, save_pack
    from mechreward.features.prompts import pack_prompt

    source = settings.questions or str(settings.responses)
    # How the answers of a file were asked for is not known.
    asked = settings.questions is not None
    prompt = pack_prompt(settings.prompt_format, settings.chat, loaded.tokenizer) if asked else None
    try:
        pack = build_pack(
            table,
            sae,
            name=f"{Path(settings.model).name}/{Path(source).name.replace(':', '-')}",
            model_name=settings.model,
            n_features=settings.n_features,
            q_max=settings.q_max,
            min_stability=settings.min_stability,
            signs=settings.signs,
            prompt=prompt,
            provenance={"questions": source, "method": table.method, "seed": settings.seed},
        )
    except NoFeatures as nothing:
        (settings.out / "pack.json").unlink(missing_ok=True)
        console.print(f"no pack: {nothing}", markup=False, soft_wrap=True)
        return False
    save_pack(pack, settings.out / "pack.json")
    return True


def _show(table: ContrastTable) -> None:
    of_what = {"attribution": "whose answer is found", "reasonscore": "with tokens near and far from reasoning words"}
    kind = of_what.get(table.method, "with right and wrong ones")
    console.print(
        f"{table.n_responses} answers to {table.n_mixed} questions {kind} (of {table.n_questions})", soft_wrap=True
    )
    columns = [name for name in COLUMNS if name in table.frame]
    shown = Table("feature", *(name.removesuffix("_value").replace("_", " ") for name in columns), box=None)
    for row in table.frame.head(SHOWN).to_dict("records"):
        shown.add_row(str(row["id"]), *(f"{row[name]:.3g}" for name in columns))
    console.print(shown)


def _show_equivalents(rows: tuple[Equivalent, ...], held_out: HeldOutScores) -> None:
    table = Table("on questions not seen", "AUROC within questions", "lead of the features", box=None)
    for row in rows:
        table.add_row(row.name, *("" if i is None else _cell(**asdict(i)) for i in (row.within, row.lead)))
    console.print(table)
    if held_out.n_empty:
        console.print(f"no feature passed for {held_out.n_empty} of these answers; they count as ties", soft_wrap=True)


def _cell(value: float, low: float, high: float, error: float) -> str:  # noqa: ARG001
    return f"{value:.3f} ({low:.3f} to {high:.3f})"
