"""SAE Lens' configuration and tensors as our reader, and back: ``cfg.json`` + ``sae_weights.safetensors``.

`loading` finds and reads files of every format and hands them over in this form. Strict where a wrong guess would read
wrong features: an unknown architecture or input normalisation, an unknown tensor or a hook other than a block's
residual stream is refused by name. Nothing here imports sae-lens, but for `require_sae_lens`.

An SAE may have been trained on a model whose writing weights were centered (TransformerLens'
`center_writing_weights`): the residual stream of a model with layer norm then lacks its mean over the width, and
nothing else changes. SAE Lens notes that among the options to load the model with; here it is the input normalisation
`center`, so that the SAE reads the plain model and its reconstruction gets the mean back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, cast, get_args

from safetensors.torch import save_file
from torch import Tensor

from mechreward.errors import InputError
from mechreward.files import atomic_path, write_json
from mechreward.sae.formats import layer_of_hook
from mechreward.sae.formats.files import read_safetensors
from mechreward.sae.formats.sae_lens import CONFIG, WEIGHTS
from mechreward.sae.kinds import Architecture, InputNorm
from mechreward.sae.sae import SAE, SAEMeta

SPARSITY = "sparsity.safetensors"
ARCHITECTURES: dict[str, Architecture] = {"topk": "topk", "standard": "relu", "jumprelu": "jumprelu", "gated": "gated"}
TENSORS: dict[Architecture, dict[str, str]] = {
    "gated": {"b_mag": "b_enc_F", "b_gate": "b_gate_F", "r_mag": "r_mag_F"},
    "jumprelu": {"b_enc": "b_enc_F", "threshold": "threshold_F"},
    "relu": {"b_enc": "b_enc_F"},
    "topk": {"b_enc": "b_enc_F"},
}
"""The tensors of length F of each architecture: SAE Lens' name and ours."""
CENTERED = {"center_writing_weights": True}
# The first release of sae-lens with this layout: older files are read by it in another way.
FORMAT_VERSION = "6.0.0"
# sae-lens adds this before it takes the logarithm of a frequency.
LEAST_FREQUENCY = 1e-10


def save_sae(sae: SAE, folder: str | Path) -> Path:
    """Writes `cfg.json` and `sae_weights.safetensors`, which sae-lens and `load_sae` both read; returns the folder.

    Firing frequencies, where the SAE has them, go into SAE Lens' `sparsity.safetensors`, as decimal logarithms.

    An old `cfg.json` is removed first and the new one written last: a killed save leaves a folder that does not load,
    never a mixture of two SAEs.

    Raises:
        InputError: if the folder cannot be written to.
    """
    folder = Path(folder)
    names = {"W_enc": "W_enc_DF", "W_dec": "W_dec_FD", "b_dec": "b_dec_D"} | TENSORS[sae.architecture]
    held = sae.weights()
    with atomic_path(folder / WEIGHTS) as temporary:
        save_file({name: held[field].cpu().contiguous() for name, field in names.items()}, temporary)
        (folder / CONFIG).unlink(missing_ok=True)
        (folder / SPARSITY).unlink(missing_ok=True)
    if sae.frequency_F is not None:
        with atomic_path(folder / SPARSITY) as temporary:
            save_file({"sparsity": (sae.frequency_F + LEAST_FREQUENCY).log10().cpu()}, temporary)
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
    own = TENSORS[architecture]
    _check_tensors(tensors, list(own), _size(cfg, "d_in"), _size(cfg, "d_sae"))
    metadata = cfg.get("metadata") or {}
    rest: dict[str, Any] = {field: tensors[name] for name, field in own.items()}
    return SAE(
        architecture=architecture,
        W_enc_DF=tensors["W_enc"],
        W_dec_FD=tensors["W_dec"],
        b_dec_D=tensors["b_dec"],
        k=_size(cfg, "k") if architecture == "topk" else None,
        apply_b_dec_to_input=_flag(cfg, "apply_b_dec_to_input", default=True),
        rescale_acts_by_decoder_norm=architecture == "topk"
        and _flag(cfg, "rescale_acts_by_decoder_norm", default=False),
        input_norm=_input_norm(cfg.get("normalize_activations", "none"), metadata),
        meta=_meta(metadata, release, sae_id),
        **rest,
    )


def with_frequencies(sae: SAE, folder: Path) -> SAE:
    """The SAE with the firing frequencies that lie beside its weights, if there are any.

    Raises:
        InputError: if their file is damaged or does not hold them.
    """
    if not (folder / SPARSITY).is_file():
        return sae
    frequencies = read_safetensors(folder / SPARSITY)
    if "sparsity" not in frequencies:
        raise InputError(f"{SPARSITY}: {folder} holds one without the tensor 'sparsity'; delete it, it only saves time")
    return replace(sae, frequency_F=10 ** frequencies["sparsity"].double())


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


def _architecture(cfg: Mapping[str, Any]) -> Architecture:
    _require(cfg, "architecture")
    if cfg["architecture"] not in ARCHITECTURES:
        raise InputError(f"architecture: {cfg['architecture']!r} is not one of {', '.join(ARCHITECTURES)}")
    # Files older than sae-lens 6 keep the activation function apart: a TopK SAE calls itself "standard" there.
    for key in ("activation_fn", "activation_fn_str"):
        if cfg.get(key, "relu") != "relu":
            raise InputError(f"{key}: {cfg[key]!r} is the form before sae-lens 6; load it there and save it again")
    if cfg.get("reshape_activations", "none") != "none":
        raise InputError(f"reshape_activations: {cfg['reshape_activations']!r} is not supported; only 'none' is")
    return ARCHITECTURES[cfg["architecture"]]


def _input_norm(name: str, metadata: Mapping[str, Any]) -> InputNorm:
    known = [norm for norm in get_args(InputNorm) if norm != "center"]
    if name not in known:
        no_scale = "; its scale is not in the file, fold it into the weights first"
        why = no_scale if name == "expected_average_only_in" else ""
        raise InputError(f"normalize_activations: {name!r} is not one of {', '.join(known)}{why}")
    # Layer norm takes the mean away by itself.
    if not (metadata.get("model_from_pretrained_kwargs") or {}).get("center_writing_weights") or name == "layer_norm":
        return cast(InputNorm, name)
    if name != "none":
        raise InputError(f"normalize_activations: {name!r} of a model with center_writing_weights is not supported")
    return "center"


def _require(cfg: Mapping[str, Any], key: str) -> None:
    if key not in cfg:
        raise InputError(f"{CONFIG}: the key {key!r} is missing")


def _size(cfg: Mapping[str, Any], key: str) -> int:
    _require(cfg, key)
    if type(cfg[key]) is not int or cfg[key] < 1:
        raise InputError(f"{key}: {cfg[key]!r} in {CONFIG} is not a whole number of at least 1")
    return cfg[key]


def _flag(cfg: Mapping[str, Any], key: str, *, default: bool) -> bool:
    if not isinstance(found := cfg.get(key, default), bool):
        raise InputError(f"{key}: {found!r} in {CONFIG} is neither true nor false")
    return found


def _check_tensors(tensors: Mapping[str, Tensor], names: list[str], d: int, f: int) -> None:
    names = ["W_enc", "W_dec", "b_dec", *names]
    shapes = {"W_enc": (d, f), "W_dec": (f, d), "b_dec": (d,)}
    if missing := sorted(set(names) - set(tensors)):
        raise InputError(f"{WEIGHTS}: the tensor {missing[0]!r} is missing")
    if unknown := sorted(set(tensors) - set(names)):
        raise InputError(f"{WEIGHTS}: the tensor {unknown[0]!r} does not belong to this architecture")
    for name in names:
        shape = shapes.get(name, (f,))
        if tuple(tensors[name].shape) != shape:
            raise InputError(f"{name}: shape {tuple(tensors[name].shape)} is not {shape} as {CONFIG} says")


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


def _config(sae: SAE) -> dict[str, Any]:
    cfg: dict[str, Any] = {
        "architecture": {ours: theirs for theirs, ours in ARCHITECTURES.items()}[sae.architecture],
        "d_in": sae.d_model,
        "d_sae": sae.d_sae,
        "dtype": "float32",
        "device": "cpu",
        "apply_b_dec_to_input": sae.apply_b_dec_to_input,
        "normalize_activations": "none" if sae.input_norm == "center" else sae.input_norm,
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
    if sae.input_norm == "center":
        cfg["metadata"]["model_from_pretrained_kwargs"] = CENTERED
    if sae.architecture == "topk":
        cfg |= {"k": sae.k, "rescale_acts_by_decoder_norm": sae.rescale_acts_by_decoder_norm}
    return cfg
