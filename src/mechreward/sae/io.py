"""SAEs on disk and on the hub, in SAE Lens' directory format: ``cfg.json`` + ``sae_weights.safetensors``.

A folder is read and written without importing sae-lens (which costs seconds); a release name goes through
``sae_lens.SAE.from_pretrained`` once, and the weights are copied into our own reader. Strict where a wrong guess would
read wrong features: an unknown architecture, an input normalisation, an unknown tensor or a hook other than a block's
residual stream is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mechreward.errors import InputError
from mechreward.files import atomic_path, read_json, write_json
from mechreward.sae.sae import SAE, Architecture, SAEMeta

CONFIG, WEIGHTS = "cfg.json", "sae_weights.safetensors"
ARCHITECTURES: dict[str, Architecture] = {"topk": "topk", "standard": "relu", "jumprelu": "jumprelu"}
# The first release of sae-lens with this layout: older files are read by it in another way.
FORMAT_VERSION = "6.0.0"


def load_sae(release_or_path: str | Path, sae_id: str | None = None, *, device: str = "cpu") -> SAE:
    """Loads an SAE from a folder in SAE Lens' format, or from a release through sae-lens.

    Args:
        release_or_path: an existing folder, or a release name or hub repository that sae-lens knows.
        sae_id: the SAE within the release; for a folder, a sub-folder of it.
        device: where the weights go.

    Raises:
        InputError: if nothing is found there, or what is found is damaged, incomplete or of an unsupported kind.
    """
    path = Path(release_or_path).expanduser()
    if path.exists():
        return _load_folder(path, sae_id).to(device)
    if isinstance(release_or_path, Path) or path.is_absolute() or str(release_or_path).startswith((".", "~")):
        raise InputError(f"sae: there is no folder {release_or_path}")
    return _load_release(release_or_path, sae_id).to(device)


def save_sae(sae: SAE, folder: str | Path) -> Path:
    """Writes `cfg.json` and `sae_weights.safetensors`, which sae-lens and `load_sae` both read; returns the folder.

    An old `cfg.json` is removed first and the new one written last: a killed save leaves a folder that does not load,
    never a mixture of two SAEs.

    Raises:
        InputError: if the folder cannot be written to.
    """
    folder = Path(folder)
    tensors = {_lens_name(name): tensor.cpu().contiguous() for name, tensor in sae.weights().items()}
    with atomic_path(folder / WEIGHTS) as temporary:
        save_file(tensors, temporary)
        (folder / CONFIG).unlink(missing_ok=True)
    write_json(folder / CONFIG, _config(sae))
    return folder


def from_sae_lens(lens_sae: Any, *, release: str, sae_id: str = "") -> SAE:
    """Copies a `sae_lens.SAE` into a frozen reader; the original is not touched and not needed afterwards.

    Raises:
        InputError: if it is of a kind that the reader does not support.
    """
    tensors = {name: tensor.detach().clone() for name, tensor in lens_sae.state_dict().items()}
    return sae_from_parts(lens_sae.cfg.to_dict(), tensors, release=release, sae_id=sae_id)


def sae_from_parts(cfg: Mapping[str, Any], tensors: Mapping[str, Tensor], *, release: str, sae_id: str) -> SAE:
    """A reader from SAE Lens' configuration and tensors. `release` and `sae_id` are used where the metadata has none.

    Raises:
        InputError: naming the key or tensor that is missing, unknown, or of the wrong shape.
    """
    architecture = _architecture(cfg)
    names = ["W_enc", "b_enc", "W_dec", "b_dec", *(["threshold"] if architecture == "jumprelu" else [])]
    _check_tensors(tensors, names, _size(cfg, "d_in"), _size(cfg, "d_sae"))
    return SAE(
        architecture=architecture,
        W_enc_DF=tensors["W_enc"],
        b_enc_F=tensors["b_enc"],
        W_dec_FD=tensors["W_dec"],
        b_dec_D=tensors["b_dec"],
        threshold_F=tensors.get("threshold"),
        k=_size(cfg, "k") if architecture == "topk" else None,
        apply_b_dec_to_input=bool(cfg.get("apply_b_dec_to_input", True)),
        rescale_acts_by_decoder_norm=architecture == "topk" and bool(cfg.get("rescale_acts_by_decoder_norm", False)),
        meta=_meta(cfg.get("metadata") or {}, release, sae_id),
    )


def layer_of_hook(hook_name: str) -> int:
    """The 0-based decoder block whose output a hook point reads.

    Knows module paths of Hugging Face models (``model.layers.3``, ``transformer.h.3``) and TransformerLens names
    (``blocks.3.hook_resid_post``; ``blocks.4.hook_resid_pre`` is the output of block 3).

    Raises:
        InputError: for any other hook point.
    """
    if match := re.search(r"(?:^|\.)(?:layers|h)\.(\d+)$|^blocks\.(\d+)\.hook_resid_post$", hook_name):
        return int(match[1] or match[2])
    if match := re.search(r"^blocks\.([1-9]\d*)\.hook_resid_pre$", hook_name):
        return int(match[1]) - 1
    raise InputError(
        f"hook_name: {hook_name!r} is not the output of a decoder block; "
        "allowed are names such as model.layers.3, transformer.h.3, blocks.3.hook_resid_post"
    )


def require_sae_lens() -> ModuleType:
    """Imports sae-lens (seconds, 500 MB) only where it is needed.

    Raises:
        InputError: if it is not installed.
    """
    try:
        import sae_lens
    except ImportError as error:
        raise InputError('sae: this needs sae-lens, which is not installed; pip install "mechreward[sae]"') from error
    return sae_lens


def _load_folder(path: Path, sae_id: str | None) -> SAE:
    folder = path / sae_id if sae_id else path
    for name in (CONFIG, WEIGHTS):
        if not (folder / name).is_file():
            raise InputError(f"sae: {folder} has no {name}; an SAE folder holds {CONFIG} and {WEIGHTS}")
    cfg = read_json(folder / CONFIG)
    if not isinstance(cfg, dict):
        raise InputError(f"sae: {folder / CONFIG} must hold a JSON object, not {type(cfg).__name__}")
    try:
        tensors = load_file(folder / WEIGHTS)
    except SafetensorError as error:
        raise InputError(f"sae: {folder / WEIGHTS} is damaged or cut short ({error})") from error
    return sae_from_parts(cfg, tensors, release=str(path), sae_id=sae_id or "")


def _load_release(release: str, sae_id: str | None) -> SAE:
    if sae_id is None:
        raise InputError(f"sae_id: the release {release!r} needs one (there is no folder of that name)")
    lens = require_sae_lens()
    try:
        lens_sae = lens.SAE.from_pretrained(release, sae_id, device="cpu")
    except (ValueError, KeyError, OSError) as error:
        raise InputError(f"sae: sae-lens cannot load {release!r} / {sae_id!r}: {error}") from error
    return from_sae_lens(lens_sae, release=release, sae_id=sae_id)


def _architecture(cfg: Mapping[str, Any]) -> Architecture:
    _require(cfg, "architecture")
    if cfg["architecture"] not in ARCHITECTURES:
        raise InputError(f"architecture: {cfg['architecture']!r} is not one of {', '.join(ARCHITECTURES)}")
    # Files older than sae-lens 6 keep the activation function apart: a TopK SAE calls itself "standard" there.
    for key in ("activation_fn", "activation_fn_str"):
        if cfg.get(key, "relu") != "relu":
            raise InputError(f"{key}: {cfg[key]!r} is the form before sae-lens 6; load it there and save it again")
    for key in ("normalize_activations", "reshape_activations"):
        if cfg.get(key, "none") != "none":
            raise InputError(f"{key}: {cfg[key]!r} is not supported; only 'none' is")
    return ARCHITECTURES[cfg["architecture"]]


def _require(cfg: Mapping[str, Any], key: str) -> None:
    if key not in cfg:
        raise InputError(f"{CONFIG}: the key {key!r} is missing")


def _size(cfg: Mapping[str, Any], key: str) -> int:
    _require(cfg, key)
    if type(cfg[key]) is not int or cfg[key] < 1:
        raise InputError(f"{key}: {cfg[key]!r} in {CONFIG} is not a whole number of at least 1")
    return cfg[key]


def _check_tensors(tensors: Mapping[str, Tensor], names: list[str], d: int, f: int) -> None:
    shapes = {"W_enc": (d, f), "b_enc": (f,), "W_dec": (f, d), "b_dec": (d,), "threshold": (f,)}
    if missing := sorted(set(names) - set(tensors)):
        raise InputError(f"{WEIGHTS}: the tensor {missing[0]!r} is missing")
    if unknown := sorted(set(tensors) - set(names)):
        raise InputError(f"{WEIGHTS}: the tensor {unknown[0]!r} does not belong to this architecture")
    for name in names:
        if tuple(tensors[name].shape) != shapes[name]:
            raise InputError(f"{name}: shape {tuple(tensors[name].shape)} is not {shapes[name]} as {CONFIG} says")


def _meta(metadata: Mapping[str, Any], release: str, sae_id: str) -> SAEMeta:
    if not metadata.get("hook_name"):
        raise InputError(f"metadata.hook_name: missing in {CONFIG}, so the layer is not known")
    if metadata.get("hook_head_index") is not None:
        raise InputError("metadata.hook_head_index: an SAE of one attention head does not read the residual stream")
    layer = layer_of_hook(metadata["hook_name"])
    if metadata.get("layer", layer) != layer:
        raise InputError(f"metadata.layer: {metadata['layer']} does not agree with hook_name {metadata['hook_name']!r}")
    return SAEMeta(
        release=metadata.get("release") or release,
        sae_id=metadata.get("sae_id") or sae_id,
        layer=layer,
        model_name=metadata.get("model_name") or "",
        hook_name=metadata["hook_name"],
    )


def _lens_name(name: str) -> str:
    return name.rpartition("_")[0]


def _config(sae: SAE) -> dict[str, Any]:
    cfg: dict[str, Any] = {
        "architecture": {ours: theirs for theirs, ours in ARCHITECTURES.items()}[sae.architecture],
        "d_in": sae.d_model,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {
            "sae_lens_version": FORMAT_VERSION,
            "model_name": sae.meta.model_name,
            "hook_name": sae.meta.hook_name,
            "layer": sae.meta.layer,
            "release": sae.meta.release,
            "sae_id": sae.meta.sae_id,
        },
    }
    if sae.architecture == "topk":
        cfg |= {"k": sae.k, "rescale_acts_by_decoder_norm": sae.rescale_acts_by_decoder_norm}
    return cfg
