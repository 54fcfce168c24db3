"""`mechreward steer repair`: wrong answers to KNOWN questions made right by steering, against drawing again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from mechreward.cli.asking import answered, asked, load_given_sae
from mechreward.cli.options import parse_settings, quiet
from mechreward.cli.repair_settings import RepairSettings
from mechreward.cli.terminal import RichProgress, console, print_path
from mechreward.errors import InputError
from mechreward.files import make_folder, write_json

if TYPE_CHECKING:
    from mechreward.steering.repair_known import RepairConfig


def repair(arguments: list[str], prog: str) -> int:
    """Samples, repairs, writes the verified repairs and what they are worth; 1 if there are none."""
    settings = parse_settings(RepairSettings, arguments, prog)
    quiet()
    from mechreward.chains import Roller
    from mechreward.inputs import verifier_of
    from mechreward.models import load_model
    from mechreward.rollout import check_answers, save_responses, verify_responses
    from mechreward.steering.cuts import check_critical
    from mechreward.steering.repair import kept_repairs, save_repairs, summarise
    from mechreward.steering.repair_known import count_uncut, repair_known
    from mechreward.tasks import save_questions, split_questions
    from mechreward.tiny import model_path

    if settings.questions is None:
        raise InputError("questions: is needed; give a file, tiny:easy, reasoning-gym:NAME or a dataset id")
    config = _config(settings)
    verifier = verifier_of(settings.verifier, settings.strictness)
    questions = asked(settings, settings.questions, settings.limit)
    check_answers(questions, verifier)
    split = split_questions(questions, settings.known, settings.seed)
    check_critical(config.critical, split.known)
    sae = load_given_sae(settings, settings.model, settings.device, f"to steer {settings.model}")
    out = make_folder(settings.out)
    loaded = load_model(
        model_path(settings.model), adapter=settings.adapter, dtype=settings.dtype, device=settings.device
    )
    save_questions(out / "questions.parquet", split)
    total = len(split.known) * settings.samples
    with RichProgress().stage(f"sample {len(split.known)} KNOWN questions x {settings.samples}", total) as advance:
        drawn = answered(settings, loaded, split.known, settings.samples, advance)
    responses = verify_responses(drawn, split.known, verifier)
    save_responses(out / "responses" / "known.parquet", responses)
    roller = Roller(
        loaded,
        split.known,
        verifier,
        settings.max_new_tokens,
        temperature=settings.temperature,
        batch_size=settings.batch_size,
        seed=settings.seed,
    )
    with RichProgress().stage(f"repair, {settings.tries} tries a chain in each arm"):
        attempts = repair_known(roller, sae, responses, config)
    repairs = kept_repairs(attempts)
    save_repairs(out / "repairs.parquet", repairs)
    uncut = count_uncut(roller, responses, config.chains, attempts)
    found = {"n_kept": len(repairs), "n_uncut": uncut} | summarise(attempts)
    write_json(out / "repair.json", {"settings": settings.model_dump(mode="json")} | found)
    _show(found)
    for name in ("repairs.parquet", "repair.json"):
        print_path("wrote", out / name)
    return 0 if repairs else 1


def _config(settings: RepairSettings) -> RepairConfig:
    from mechreward.chains import ContrastiveConfig
    from mechreward.steering.repair_known import RepairConfig

    contrastive = ContrastiveConfig(
        lr=settings.contrast_learning_rate, epochs=settings.contrast_epochs, seed=settings.seed
    )
    same = set(RepairConfig.__dataclass_fields__) & set(type(settings).model_fields)
    return RepairConfig(contrastive=contrastive, **{name: getattr(settings, name) for name in same})


def _show(found: dict[str, Any]) -> None:
    table = Table("arm", "chains repaired", "95 %", "right tries", "95 %", "steered against it, p", box=None)
    for arm, row in found["arms"].items():
        tries = row["tries"]
        against = found["steered_against"].get(arm)
        table.add_row(
            arm,
            f"{row['repaired']} of {found['n_chains']} ({row['share']:.3f})",
            "{:.3f}-{:.3f}".format(*row["interval"]),
            f"{tries['share']:.3f} (n {tries['n']})",
            "{:.3f}-{:.3f}".format(*tries["interval"]),
            "" if against is None else f"{against['mcnemar_p']:.3g}",
        )
    console.print(table)
    if found["n_uncut"]:
        console.print(f"{found['n_uncut']} wrong chains have no critical token and were left alone")
