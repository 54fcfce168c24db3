"""Loads an SAE from wherever it is: files in any format of `formats`, a hub repository, a release through sae-lens.

Local files never need sae-lens (which costs seconds to import). A release name goes through
`sae_lens.SAE.from_pretrained` once, and the weights are copied into our own reader. A hub repository with a TopK
checkpoint of the first mechreward (`sae_final.pt`), as in that library's quickstart, is downloaded into `cache_dir`.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)

from mechreward.errors import InputError
from mechreward.models import find_device
from mechreward.sae.cache import cache_dir
from mechreward.sae.formats import Given, complete, find_format
from mechreward.sae.io import require_sae_lens, sae_from_parts, with_frequencies
from mechreward.sae.sae import SAE

TOPK_FILE, TOPK_NOTES = "sae_final.pt", "sae_final.json"


def load_sae(
    release: str | Path,
    sae_id: str | None = None,
    *,
    device: str = "cpu",
    layer: int | None = None,
    model_name: str | None = None,
    k: int | None = None,
) -> SAE:
    """Loads an SAE: finds its format and turns it into our frozen reader.

    Args:
        release: a file or folder (`sae.formats` has one module a format), a release name or hub repository that
            sae-lens knows, or a hub repository that holds `sae_final.pt`.
        sae_id: the SAE within the release; for a folder, a file or folder in it.
        device: where the weights go, such as "cuda:0"; "auto" is CUDA where there is one (`find_device`).
        layer: 0-based decoder block whose output it reads, where the file does not say so.
        model_name: model it was trained on; counts before what the file says.
        k: features kept a token, where a TopK SAE's file does not say so.

    Raises:
        InputError: if nothing is found there; if what is found is damaged, incomplete or of an unsupported kind; if it
            does not tell its layer (or k) and neither does the caller; if file and caller do not agree on it; if the
            device is not there; or if the hub refuses a repository or cannot be asked.
    """
    given, target = Given(layer, model_name, k), find_device(device)
    path = Path(release).expanduser()
    if path.exists():
        return _load_files(path, sae_id, given).to(target)
    if isinstance(release, Path) or path.is_absolute() or release.startswith((".", "~")):
        raise InputError(f"sae: there is no file or folder {release}")
    if (checkpoint := _topk_checkpoint(release)) is not None:
        return _label(_load_files(checkpoint, None, _with_layer_of(sae_id, given)), release, sae_id or "").to(target)
    return _load_release(release, sae_id, given).to(target)


def load_topk_sae(
    checkpoint: str | Path,
    device: str | None = None,
    model_name: str | None = None,
    layer: int | None = None,
    release: str = "",
    sae_id: str = "",
) -> SAE:
    """Loads a TopK checkpoint of the first mechreward; `load_sae` does the same and more.

    Args:
        checkpoint: `sae_final.pt` (or its folder), or a hub repository that holds it.
        device: where the weights go; the CPU if not given.
        model_name: model it was trained on; counts before what the `.json` beside it says.
        layer: block that it reads, where the `.json` does not say so.
        release: label to keep instead of the path.
        sae_id: label to keep.

    Raises:
        InputError: as `load_sae`, and if it is no TopK SAE.
    """
    sae = load_sae(checkpoint, device=device or "cpu", layer=layer, model_name=model_name)
    if sae.architecture != "topk":
        raise InputError(f"checkpoint: {checkpoint} holds no TopK SAE ({sae.architecture}); load it with load_sae")
    return _label(sae, release or sae.release, sae_id or sae.sae_id)


def _load_files(path: Path, sae_id: str | None, given: Given) -> SAE:
    found = find_format(path / sae_id if sae_id else path, given.layer)
    cfg, tensors = found.read()
    sae = sae_from_parts(complete(cfg, given, found.path), tensors, release=str(path), sae_id=sae_id or "")
    return with_frequencies(sae, found.path)


def _load_release(release: str, sae_id: str | None, given: Given) -> SAE:
    if sae_id is None:
        raise InputError(f"sae: there is no file or folder {release!r}, and a release needs an sae_id beside its name")
    lens = require_sae_lens()
    try:
        lens_sae = lens.SAE.from_pretrained(release, sae_id, device="cpu")
    except (ValueError, KeyError, OSError) as error:
        raise InputError(f"sae: sae-lens cannot load {release!r} / {sae_id!r}: {error}") from error
    tensors = {name: tensor.detach().clone() for name, tensor in lens_sae.state_dict().items()}
    cfg = complete(lens_sae.cfg.to_dict(), given, f"{release} / {sae_id}")
    return sae_from_parts(cfg, tensors, release=release, sae_id=sae_id)


def _topk_checkpoint(repository: str) -> Path | None:
    """The downloaded `sae_final.pt` of a hub repository, with its notes beside it; None if it has none."""
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        return None
    checkpoint = _from_hub(repository, TOPK_FILE)
    if checkpoint is not None:
        _from_hub(repository, TOPK_NOTES)  # without notes, the layer comes from sae_id or the caller
    return checkpoint


def _from_hub(repository: str, name: str) -> Path | None:
    """A downloaded file of a hub repository; None where the hub says that there is no such file or repository.

    Raises:
        InputError: if the hub refuses it or cannot be asked, with the reason.
    """
    folder = cache_dir() / "hub"
    try:
        return Path(hf_hub_download(repository, name, cache_dir=folder))
    except GatedRepoError as error:  # by its class a RepositoryNotFoundError, too
        raise _refusal(repository, name, error) from error
    except (RemoteEntryNotFoundError, RepositoryNotFoundError, HFValidationError):
        return None
    except LocalEntryNotFoundError as error:
        # The hub cannot be asked, or does not answer; what it said before is in the cache.
        if try_to_load_from_cache(repository, name, cache_dir=folder) is _CACHED_NO_EXIST:
            return None
        raise _refusal(repository, name, error.__cause__ or error) from error
    except (OSError, HTTPError) as error:
        raise _refusal(repository, name, error) from error


def _refusal(repository: str, name: str, reason: BaseException) -> InputError:
    return InputError(f"sae: the hub does not give {name} of {repository!r}: {' '.join(str(reason).split())}")


def _with_layer_of(sae_id: str | None, given: Given) -> Given:
    """What the caller says, with the layer that an id such as `layer_18` names."""
    named = re.fullmatch(r"layer_(\d+)", sae_id or "")
    if not named:
        return given
    if given.layer not in (None, int(named[1])):
        raise InputError(f"layer: {given.layer} was given, but sae_id says {sae_id!r}")
    return replace(given, layer=int(named[1]))


def _label(sae: SAE, release: str, sae_id: str) -> SAE:
    return replace(sae, meta=replace(sae.meta, release=release, sae_id=sae_id))
