"""Where downloads of this library go: the environment variable `MECHREWARD_CACHE_DIR`, else ``~/.cache/mechreward``.

Only what we download ourselves goes there, which is the TopK checkpoints of hub repositories (`load_topk_sae`). The
releases that sae-lens loads, models and data sets stay in Hugging Face's own cache (`HF_HUB_CACHE`): sae-lens takes no
folder, and a second copy of a model helps nobody.
"""

from __future__ import annotations

import os
from pathlib import Path

from mechreward.files import make_folder

VARIABLE = "MECHREWARD_CACHE_DIR"


def cache_dir() -> Path:
    """The folder for downloads; it is made if it is missing.

    Raises:
        InputError: if it cannot be made or written to.
    """
    named = os.environ.get(VARIABLE)
    return make_folder(Path(named).expanduser() if named else Path.home() / ".cache" / "mechreward")
