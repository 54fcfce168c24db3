"""Questions of a Hugging Face dataset, or of a local folder `datasets` can read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mechreward.errors import InputError
from mechreward.tasks.rows import Row, is_file

_HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def is_dataset(source: str) -> bool:
    """Whether a source names a Hugging Face dataset or a folder that `datasets` can read."""
    return not is_file(source) and (_HUB_ID.fullmatch(source) is not None or (source != "" and Path(source).is_dir()))


def hub_rows(name: str, options: dict[str, Any], *, split: str) -> Iterator[Row]:
    """Yields the rows of one split; `options` go to `datasets.load_dataset` (`{"name": "main"}` names a configuration).

    A folder that `Dataset.save_to_disk` wrote has no splits and is taken whole.

    Raises:
        InputError: if there is no such dataset, configuration or split, or it cannot be read from here.
    """
    from datasets import Dataset, load_dataset, load_from_disk
    from datasets.exceptions import DatasetGenerationError

    saved = (Path(name) / "state.json").is_file()
    try:
        dataset = load_from_disk(name, **options) if saved else load_dataset(name, split=split, **options)
    except (FileNotFoundError, ConnectionError, ValueError, TypeError, DatasetGenerationError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(
            f"source: {name!r} (split {split!r}) cannot be loaded as a Hugging Face dataset ({reason}); "
            "name a dataset id, a .jsonl, .csv or .parquet file, tiny:easy, tiny:long or reasoning-gym:NAME"
        ) from error
    if not isinstance(dataset, Dataset):
        raise InputError(f"options: {options} make {name!r} a {type(dataset).__name__}; it must load as one Dataset")
    for number, values in enumerate(dataset, start=1):
        yield Row(f"row {number} of {name}", dict(values))
