"""The feature packs that come with the library, as files: `MODEL/NAME.json`, and what judged each beside it.

Data and a loader, free of any other room: `features.load_pack` makes packs of these bytes. A gate's full record stands
beside its pack as `NAME.gate1.json`. `TEMPLATE` is where a new pack starts from, and is none; `pack.schema.json` is the
JSON Schema of a pack, for editors and for other languages.
"""

from __future__ import annotations

from importlib.resources import files as package_files
from importlib.resources.abc import Traversable

from mechreward.errors import InputError

SCHEMA = "pack.schema.json"
TEMPLATE = "TEMPLATE"


def catalog_names() -> list[str]:
    """Names of the bundled packs, "model/pack", sorted."""
    return sorted(_packs())


def read_bundled(name: str) -> bytes:
    """The file of a bundled pack.

    Raises:
        InputError: if there is no pack of that name, listing those there are.
    """
    packs = _packs()
    if name.removesuffix(".json") not in packs:
        bundled = ", ".join(sorted(packs)) or "none"
        raise InputError(f"pack: {name} is neither a file nor a bundled pack (bundled: {bundled})")
    return packs[name.removesuffix(".json")].read_bytes()


def catalog_folder() -> Traversable:
    """Where the packs, the template and the schema are."""
    return package_files("mechreward").joinpath("catalogs")


def _packs() -> dict[str, Traversable]:
    root = catalog_folder()
    folders = [folder for folder in root.iterdir() if folder.is_dir() and folder.name != TEMPLATE]
    entries = [(folder, entry) for folder in folders for entry in folder.iterdir() if entry.name.endswith(".json")]
    named = {f"{folder.name}/{entry.name.removesuffix('.json')}": entry for folder, entry in entries}
    return {name: entry for name, entry in named.items() if not name.endswith(".gate1")}
