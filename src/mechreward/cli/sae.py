"""`mechreward sae`: look at a sparse autoencoder."""

from __future__ import annotations

import tyro
from rich.table import Table

from mechreward.cli.terminal import console


def info(sae: tyro.conf.Positional[str], sae_id: str | None = None) -> int:
    """Shape, layer and origin of an SAE (a folder or a SAE Lens release)."""
    from mechreward.sae import load_sae

    loaded = load_sae(sae, sae_id)
    meta = loaded.meta
    table = Table(box=None, show_header=False)
    for name, value in (
        ("architecture", f"{loaded.architecture}" + (f", k {loaded.k}" if loaded.k else "")),
        ("width", f"{loaded.d_model} -> {loaded.d_sae} features"),
        ("layer", f"output of block {meta.layer}"),
        ("model", meta.model_name or "not recorded"),
        ("hash", loaded.weights_hash),
    ):
        table.add_row(name, value)
    console.print(table)
    return 0
