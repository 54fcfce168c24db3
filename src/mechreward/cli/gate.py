"""`mechreward gate`: finds the gate; of the first, does a pack tell right from wrong answers to the same question?"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from mechreward.cli.asking import answers, load_given_reward
from mechreward.cli.gate_settings import GateSettings
from mechreward.cli.gate_study import gate_study, gate_survival
from mechreward.cli.options import parse_settings, quiet
from mechreward.cli.terminal import RichProgress, console, print_path
from mechreward.errors import InputError
from mechreward.files import make_folder, write_json

if TYPE_CHECKING:
    from mechreward.gates import Correlations, Gate1Result, Interval

NOT_RECORDED = "note: the pack does not record the questions it was found on; that these are others is not checked"


def gate(arguments: list[str], prog: str) -> int:
    """The gate that `--stage` names, the first if it names none.

    Raises:
        InputError: if there is no such gate.
    """
    stage = _stage(arguments)
    stages = {"1": gate_pack, "2": gate_study, "3": gate_survival}
    if stage not in stages:
        raise InputError(f"stage: {stage!r} is not one of {', '.join(stages)}")
    return stages[stage](arguments, prog)


def _stage(arguments: list[str]) -> str:
    for at, argument in enumerate(arguments):
        if argument == "--stage" and at + 1 < len(arguments):
            return arguments[at + 1]
        if argument.startswith("--stage="):
            return argument.removeprefix("--stage=")
    return "1"


def gate_pack(arguments: list[str], prog: str) -> int:
    """Judges a pack, prints the table, writes gate1.json and the pack with its verdict; 1 unless it passes."""
    settings = parse_settings(GateSettings, arguments, prog)
    quiet()
    from mechreward.features import check_table, load_contrast, save_pack
    from mechreward.gates import Thresholds, check_held_out, check_rephrased, gate1
    from mechreward.models import load_model
    from mechreward.tiny import model_path

    if (settings.questions is None) == (settings.responses is None):
        raise InputError("questions: give either --questions, to be answered, or --responses, a file of answers")
    reward = load_given_reward(settings, settings.pack, settings.model, settings.device)
    table = None if settings.features is None else load_contrast(settings.features)
    if table is not None:
        check_table(table, reward.pack)
    if settings.rephrased:
        check_rephrased(reward.pack)
    make_folder(settings.out)
    loaded = load_model(
        model_path(settings.model), adapter=settings.adapter, dtype=settings.dtype, device=settings.device
    )
    reward.check_model(loaded.model)
    if not reward.pack.found_on:
        console.print(NOT_RECORDED, soft_wrap=True)
    others, keep = partial(check_held_out, reward.pack), settings.out / "gate1-responses.parquet"
    responses = answers(settings, loaded, least=2, what="Gate 1", keep=keep, check=others)
    with RichProgress().stage(f"gate 1: {len(responses)} responses"):
        result = gate1(
            reward,
            responses,
            loaded,
            table=table,
            thresholds=Thresholds(rephrased=settings.rephrased),
            draws=settings.draws,
            seed=settings.seed,
            batch_size=settings.read_batch_size,
        )
    _show(result)
    write_json(settings.out / "gate1.json", result.to_dict())
    save_pack(reward.pack.model_copy(update={"validation": result.validation()}), settings.out / "pack.json")
    for name in ("gate1.json", "pack.json"):
        print_path("wrote", settings.out / name)
    return 0 if result.passed else 1


def _show(result: Gate1Result) -> None:
    console.print(
        f"{result.n_responses} answers to {result.n_questions} questions, {result.n_mixed} of them with right and "
        f"wrong ones; {result.accuracy:.1%} right",
        soft_wrap=True,
    )
    table = Table(
        "score", "AUROC within questions", "the reward's lead", "over all answers", "has to be beaten", box=None
    )
    for place, row in enumerate(result.rows):
        wanted = "" if place == 0 else "yes" if row.required else "reported"
        lead = "" if row.difference is None else _words(row.difference)
        table.add_row(row.name, _words(row.within), lead, _words(row.auroc), wanted)
    console.print(table)
    if result.correlations is not None:
        _show_correlations(result.correlations)
    if result.attacks is not None:
        right, wrong = result.attacks.right_median, result.attacks.wrong_median
        console.print(f"median reward: right answers {right:.3g}, wrong {wrong:.3g}; strings that deserve nothing:")
        for attack in result.attacks.attacks:
            mark = "[bold red] reaches the right answers[/]" if attack.reaches else ""
            console.print(f"  {attack.name} {attack.median:.3g} {escape(attack.tokens)}{mark}", soft_wrap=True)
        for name, why in result.attacks.left_out.items():
            console.print(f"  {name} left out: {why}", markup=False, soft_wrap=True)
    console.print(f"[bold]Gate 1: {result.verdict}[/] {escape(result.reason)}", soft_wrap=True)


def _show_correlations(found: Correlations) -> None:
    plain = found.plain
    console.print(
        f"over all answers, as others report it: Spearman {plain.spearman:.3f} (p {plain.spearman_p:.2g}; at this "
        f"accuracy a score without ties reaches at most {plain.largest_spearman:.3f}), Pearson {plain.pearson:.3f} "
        f"(p {plain.pearson_p:.2g}); "
        f"Spearman with length, question, log-probability, truncation and format held fixed {_words(found.partial)}",
        soft_wrap=True,
    )


def _words(interval: Interval) -> str:
    return f"{interval.value:.3f} ({interval.low:.3f} to {interval.high:.3f})"
