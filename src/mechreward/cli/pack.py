"""`mechreward pack`: feature packs, bundled and on disk."""

from __future__ import annotations

import tyro
from rich.table import Table

from mechreward.cli.terminal import console


def list_packs() -> int:
    """Packs that came with mechreward."""
    from mechreward.features import catalog_names

    for name in catalog_names():
        console.print(name)
    return 0


def show(pack: tyro.conf.Positional[str]) -> int:
    """Features and gate record of a pack (a file or a bundled pack's name)."""
    from mechreward.features import load_pack

    loaded = load_pack(pack)
    table = Table("feature", "weight", "effect", "q", "stability", title=f"{loaded.name} {loaded.version}", box=None)
    for feature in loaded.features:
        numbers = (feature.weight, feature.effect, feature.q_value, feature.stability)
        table.add_row(str(feature.id), *("" if number is None else f"{number:.3g}" for number in numbers))
    console.print(table)
    found = loaded.validation
    console.print(f"gate 1: {found.verdict}, {found.n_questions} questions" if found else "gate 1: not run")
    return 0


def validate(pack: tyro.conf.Positional[str], sae: str | None = None) -> int:
    """Checks a pack's fields and, with `--sae`, that it belongs to that SAE."""
    from mechreward.features import check_pack, load_pack
    from mechreward.sae import load_sae

    loaded = load_pack(pack)
    if sae is not None:
        check_pack(loaded, load_sae(sae))
    console.print(f"{pack}: valid, {len(loaded.features)} features, spec {loaded.spec_hash[:12]}")
    return 0
