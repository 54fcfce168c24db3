"""`mechreward sae layers`: which block tells right from wrong answers to the same question?"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from mechreward.cli.asking import answers
from mechreward.cli.options import parse_settings, quiet
from mechreward.cli.sae_settings import LayersSettings
from mechreward.cli.terminal import RichProgress, console, print_path
from mechreward.errors import InputError
from mechreward.files import make_folder, write_json

if TYPE_CHECKING:
    from mechreward.gates import Interval, LayerSweep


def layers(arguments: list[str], prog: str) -> int:
    """Scores a probe of every block on held-out questions, beside what needs no look inside."""
    settings = parse_settings(LayersSettings, arguments, prog)
    quiet()
    from mechreward.gates import sweep_layers
    from mechreward.gates.layers import MIN_MIXED
    from mechreward.models import check_layer, load_model
    from mechreward.tiny import model_path

    if (settings.questions is None) == (settings.responses is None):
        raise InputError("questions: give either --questions, to be answered, or --responses, a file of answers")
    if settings.out is not None:
        make_folder(settings.out.parent)
    loaded = load_model(
        model_path(settings.model), adapter=settings.adapter, dtype=settings.dtype, device=settings.device
    )
    for layer in settings.layers:
        check_layer(loaded.model, layer)
    responses = answers(settings, loaded, least=MIN_MIXED, what="a layer sweep")
    with RichProgress().stage(f"read and probe {len(responses)} responses"):
        sweep = sweep_layers(loaded, responses, settings.layers or None, seed=settings.seed)
    _show(sweep)
    if settings.out is not None:
        write_json(settings.out, sweep.to_dict())
        print_path("numbers:", settings.out)
    return 0


def _show(sweep: LayerSweep) -> None:
    from mechreward.gates.layers import POSITIONS

    console.print(
        f"AUROC within questions, 95 % interval: {sweep.n_responses} answers to {sweep.n_mixed} questions with right "
        f"and wrong ones (of {sweep.n_questions})",
        soft_wrap=True,
    )
    table = Table("block", *POSITIONS, "", box=None)
    for layer in dict.fromkeys(probe.layer for probe in sweep.probes):
        cells = [_cell(probe.within) for probe in sweep.probes if probe.layer == layer]
        mark = "[bold]<- best[/]" if layer == sweep.best.layer else "~ overlaps" if layer in sweep.alike else ""
        table.add_row(str(layer), *cells, mark)
    console.print(table)
    baselines = Table("baseline", "", box=None)
    for row in sweep.baselines:
        baselines.add_row(row.name, _cell(row.within))
    console.print(baselines)
    console.print(sweep.verdict, markup=False, soft_wrap=True)


def _cell(interval: Interval) -> str:
    return f"{interval.value:.3f} ({interval.low:.2f}-{interval.high:.2f})"
