"""`mechreward pack`: feature packs, bundled and on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import tyro
from rich.markup import escape
from rich.table import Table

from mechreward.cli.terminal import console
from mechreward.errors import InputError

if TYPE_CHECKING:
    from mechreward.features import FeaturePack, PackFeature


def list_packs() -> int:
    """Packs that came with mechreward, and what is known of each."""
    from mechreward.features import catalog_names, load_pack

    for name in catalog_names():
        pack = load_pack(name)
        console.print(f"{name}  ({len(pack.features)} features)  validation: {pack.status}", soft_wrap=True)
    return 0


def show(pack: tyro.conf.Positional[str]) -> int:
    """All there is in a pack.

    Args:
        pack: A file, or a bundled pack's name.
    """
    from mechreward.features import load_pack

    loaded = load_pack(pack)
    table = Table("feature", "weight", "scale", "from", "effect", "q", "stability", "name", box=None)
    for feature in loaded.features:
        table.add_row(*_cells(feature))
    console.print(f"[bold]{escape(loaded.name)}[/] {escape(loaded.version)}  {escape(loaded.description)}")
    console.print(table)
    for name, value in _facts(loaded).items():
        console.print(f"{name}: {escape(str(value))}", soft_wrap=True)
    return 0


def validate(packs: tyro.conf.Positional[list[str]], sae: str | None = None, reported: bool = False) -> int:
    """Whether packs may go into the catalogue; exit code 1 if one may not.

    Args:
        packs: files, or names of bundled packs.
        sae: the packs' SAE, to check that they belong together.
        reported: take the figures of a pack's authors in the place of a gate; they stay marked as not reproduced.
    """
    from mechreward.features import load_pack, unacceptable
    from mechreward.sae import load_sae

    if not packs:
        raise InputError("packs: none was given; name files or bundled packs (`mechreward pack list`)")
    loaded_sae = None if sae is None else load_sae(sae)
    wanting = 0
    for name in packs:
        pack = load_pack(name, loaded_sae)
        findings = unacceptable(pack, loaded_sae, reported=reported)
        wanting += bool(findings)
        verdict = "not acceptable" if findings else "acceptable"
        what = f"{len(pack.features)} features, spec {pack.spec_hash[:12]}, {pack.status}"
        console.print(f"{name}: {verdict}, {what}", markup=False, soft_wrap=True)
        for finding in findings:
            console.print(f"  {escape(finding)}", soft_wrap=True)
    return 1 if wanting else 0


def schema(out: Path | None = None) -> int:
    """Prints the JSON Schema of a pack, or writes it.

    Args:
        out: where to write it.
    """
    import json

    from mechreward.features import FeaturePack
    from mechreward.files import write_json

    found = FeaturePack.model_json_schema()
    if out is None:
        console.print(json.dumps(found, indent=1, sort_keys=True), markup=False, soft_wrap=True)
    else:
        write_json(out, found)
        console.print(str(out))
    return 0


def _cells(feature: PackFeature) -> list[str]:
    threshold = feature.activation_threshold or None
    numbers = (feature.weight, feature.scale, threshold, feature.effect, feature.q_value, feature.stability)
    cells = ["" if number is None else f"{number:.3g}" for number in numbers]
    return [str(feature.id), *cells, escape(feature.name)]


def _facts(pack: FeaturePack) -> dict[str, object]:
    ref, prompt, found = pack.sae, pack.prompt, pack.validation
    where = f"{ref.release} / {ref.sae_id}, block {ref.layer}, {ref.d_model} -> {ref.d_sae}"
    facts: dict[str, object] = {
        "model": pack.model_name,
        "sae": f"{where}, weights {ref.weights_hash[:12] if ref.weights_hash else 'not recorded'}",
        "reading": f"{pack.readout}, pooled by {pack.pooling!r}",
        "prompt": "not recorded" if prompt is None else f"{prompt.format!r}, {'chat' if prompt.chat else 'plain'}",
        "spec": pack.spec_hash,
    }
    listed = {name: value for name, value in pack.provenance.items() if name != "prompts"}
    facts |= {f"provenance {name}": value for name, value in listed.items()}
    facts["found on"] = f"{len(pack.found_on)} recorded questions" if pack.found_on else "questions not recorded"
    facts |= {f"metadata {name}": value for name, value in pack.metadata.items()}
    facts["validation"] = pack.status
    if found is not None and found.within_auroc is not None and found.interval is not None:
        low, high = found.interval
        numbers = f"{found.within_auroc:.3f} (95 % interval {low:.3f} to {high:.3f})"
        facts["within-question AUROC"] = f"{numbers}, {found.n_questions} questions"
    if pack.rephrased is not None and pack.rephrasing is not None and pack.rephrasing.interval is not None:
        low, high = pack.rephrasing.interval
        kept = f"{pack.rephrasing.kept:.2f} of its lead (95 % interval {low:.2f} to {high:.2f})"
        facts["kept in other words"] = f"{kept}, {pack.rephrasing.n_families} questions"
    if pack.reported is not None:
        figures = pack.reported.model_dump(exclude={"status", "reading", "claims"}, exclude_none=True)
        facts |= {f"reported {name}": value for name, value in (figures | pack.reported.claims).items()}
        facts |= {f"our reading {n}": line for n, line in enumerate(pack.reported.reading, 1)}
    return facts
