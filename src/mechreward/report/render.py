"""Writes the page: one template, one style sheet, one small script, and the Vega bundle, all inside one file.

Model text is untrusted: jinja2 escapes it, JSON inside the page escapes `<`, and a content security policy lets no
request out and runs only the page's own two scripts (by hash; Vega's expressions are interpreted, not compiled).
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files
from pathlib import Path
from shlex import quote
from typing import Any

import jinja2
import vl_convert
from markupsafe import Markup

from mechreward.files import atomic_path
from mechreward.report import formats, tables, verdict
from mechreward.report.chains import make_views
from mechreward.report.charts import Figure, accuracy_figure, colours, gate_figure, train_figures
from mechreward.report.data import Run, read_run
from mechreward.report.rollouts import Gallery, make_gallery
from mechreward.report.study import (
    Study,
    arms_table,
    read_study,
    study_facts,
    study_figures,
    study_headline,
    survival_table,
)

TEMPLATES = files("mechreward.report") / "templates"


def write_report(run_dir: str | Path) -> Path:
    """Writes `report.html` into a run directory or a study's folder, from nothing but the files in it.

    Returns:
        The page's path.

    Raises:
        InputError: if `run_dir` is neither, or a file in it cannot be read.
    """
    folder = Path(run_dir)
    study = read_study(folder)
    page = render(read_run(folder)) if study is None else render_study(study)
    path = folder / "report.html"
    with atomic_path(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def render(run: Run) -> str:
    """The page of a run as text."""
    verb = "train" if run.is_given_pack else "improve"
    command = _again(f"mechreward {verb}", run.folder)
    return _page(
        "run",
        run.folder,
        headline=verdict.headline(run),
        cards=verdict.arm_cards(run),
        stages=verdict.stages(run),
        between_lines=verdict.between_lines(run),
        baseline_line=verdict.baseline_line(run),
        facts=verdict.facts(run),
        arms=run.arms,
        colours=colours(run.arms),
        gate=run.gate,
        given_gate=verdict.given_gate(run) if run.is_given_pack else None,
        spec_hash="" if run.given_pack is None else run.given_pack.spec_hash,
        pack=run.pack,
        gallery=_gallery(run),
        policies=(run.results or {}).get("policies") or {},
        views=[] if run.chains is None else make_views(run.chains),
        repair_table=tables.repair_table(run.results),
        missing=lambda file, stage: verdict.missing(run, file, stage),
        **_figures(run),
        **_tables(run),
        **_provenance(run.config, run.manifest, command),
    )


def render_study(study: Study) -> str:
    """The page of a study as text."""
    command = _again("mechreward gate --stage 2", study.folder)
    return _page(
        "study",
        study.folder,
        headline=study_headline(study),
        facts=study_facts(study),
        arms_table=arms_table(study),
        figures=study_figures(study),
        crashed=study.results.crashed,
        survival=study.survival,
        survival_table=None if study.survival is None else survival_table(study.survival),
        **_provenance(study.config, study.manifest, command),
    )


def _again(verb: str, folder: Path) -> str:
    """The command that runs it again, as a shell takes it: a folder's name may hold spaces."""
    return f"{verb} --config {quote(str(folder / 'config.yaml'))} --out {quote(f'{folder}-again')}"


def _page(kind: str, folder: Path, **parts: Any) -> str:
    scripts = [vega_bundle(), _read("report.js")]
    environment = jinja2.Environment(
        loader=jinja2.FunctionLoader(_read),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = "report.html.j2" if kind == "run" else "study.html.j2"
    return environment.get_template(template).render(
        css=Markup(_read("report.css")),
        scripts=[Markup(script) for script in scripts],
        script_hashes=[_csp_hash(script) for script in scripts],
        kind=kind,
        name=folder.resolve().name,
        f=formats,
        **parts,
    )


def _figures(run: Run) -> dict[str, Any]:
    main: list[Figure] = []
    other: list[Figure] = []
    if run.train is not None:
        main, other = train_figures(run.train, run.arms)
    return {
        "accuracy_figure": None if run.evals is None else accuracy_figure(run.evals, run.arms),
        "gate_figure": None if not (run.gate and run.gate["rows"]) else gate_figure(run.gate),
        "train_figures": main,
        "other_figures": other,
    }


def _tables(run: Run) -> dict[str, Any]:
    return {
        "accuracy_table": tables.accuracy_table(run.results, run.arms)
        if verdict.arm_cards(run) and run.results
        else None,
        "gate_table": None if run.gate is None else tables.gate_table(run.gate),
        "features_table": None if run.pack is None else tables.features_table(run.pack, run.features),
        "candidates_table": tables.candidates_table(run.features)
        if run.pack is None and run.features is not None
        else None,
        "responses_table": tables.responses_table(run) if run.responses else None,
    }


def _gallery(run: Run) -> Gallery | None:
    if run.rollouts is None or run.rollouts.empty:
        return None
    questions = run.questions
    answers = {} if questions is None else dict(zip(questions["id"], questions["answer"], strict=True))
    return make_gallery(run.rollouts, answers)


def _provenance(config: dict[str, Any] | None, manifest: dict[str, Any] | None, command: str) -> dict[str, Any]:
    manifest = dict(manifest or {})
    return {
        "config": config,
        "versions": manifest.pop("versions", None) or {},
        "hashes": manifest.pop("hashes", None) or {},
        "manifest": manifest,
        "command": command,
    }


@cache
def vega_bundle() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script (0.9 MB), as vl-convert carries it."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


def _read(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _csp_hash(script: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
