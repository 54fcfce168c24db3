"""`mechreward sae`: look at a sparse autoencoder."""

from __future__ import annotations

import tyro
from rich.table import Table

from mechreward.cli.terminal import console


def info(
    sae: tyro.conf.Positional[str], sae_id: str | None = None, layer: int | None = None, k: int | None = None
) -> int:
    """Shape, layer and origin of an SAE: a file or folder in any known format, or a SAE Lens release.

    Args:
        sae: The file, folder or release.
        sae_id: Which SAE of a release.
        layer: The block it reads, where its file does not say.
        k: Active features a token, where a TopK SAE's file does not say.
    """
    from mechreward.sae import load_sae

    loaded = load_sae(sae, sae_id, layer=layer, k=k)
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
