"""dictionary_learning (Marks, Karvonen, Mueller): `ae.pt` and `config.json`, one folder a trainer.

Definition (saprmarks/dictionary_learning 60ec6bf, `dictionary.py`, `trainers/`), with ``trainer.dict_class`` of the
configuration::

    AutoEncoder             ReLU((h - bias) @ encoder.weight.T + encoder.bias);      h' = acts @ decoder.weight.T + bias
    AutoEncoderNew          ReLU(h @ encoder.weight.T + encoder.bias);               h' = ... + decoder.bias
    GatedAutoEncoder        x = (h - decoder_bias) @ encoder.weight.T
                            ReLU(exp(r_mag) * x + mag_bias) where x + gate_bias > 0; h' = ... + decoder_bias
    JumpReluAutoEncoder     pre = h @ W_enc + b_enc; ReLU(pre) where pre > threshold; h' = acts @ W_dec + b_dec
    AutoEncoderTopK         the k largest of ReLU((h - b_dec) @ encoder.weight.T + encoder.bias); threshold unused
    BatchTopKSAE            the same ReLU where it exceeds `threshold`, one number for all features
    MatryoshkaBatchTopKSAE  as BatchTopKSAE, with W_enc [D, F] and W_dec [F, D] not transposed

A batch TopK threshold below 0 was never measured (training stopped too early), so it is refused; so is the snapshot of
an unfinished training. Files at `checkpoints/ae_{step}.pt` belong to the `config.json` of their trainer.

Deviation: `AutoEncoder.from_pretrained` there gives the decoder's columns norm 1 by default. As sae-lens, and as the
class itself, we leave activations in the units of the file; what is rebuilt is the same.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from mechreward.errors import InputError
from mechreward.sae.formats.files import Parts, read_config, require_files, size, taken, value
from mechreward.sae.formats.metadata import hook_of_layer

CONFIG, WEIGHTS = "config.json", "ae.pt"


@dataclass(frozen=True)
class Kind:
    """How one class of dictionary stores what SAE Lens names."""

    architecture: str
    names: Mapping[str, str]
    """SAE Lens' name to the file's; a name that ends in `.weight` is that of a transposed matrix."""
    apply_b_dec_to_input: bool
    ignored: tuple[str, ...] = ()


LINEAR = {"W_enc": "encoder.weight", "W_dec": "decoder.weight"}
PLAIN = {"W_enc": "W_enc", "b_enc": "b_enc", "W_dec": "W_dec", "b_dec": "b_dec"}
GATES = {"b_gate": "gate_bias", "b_mag": "mag_bias", "r_mag": "r_mag"}
TOPK = {**LINEAR, "b_enc": "encoder.bias", "b_dec": "b_dec"}
KINDS = {
    "AutoEncoder": Kind("standard", {**LINEAR, "b_enc": "encoder.bias", "b_dec": "bias"}, True),
    "AutoEncoderNew": Kind("standard", {**LINEAR, "b_enc": "encoder.bias", "b_dec": "decoder.bias"}, False),
    "GatedAutoEncoder": Kind("gated", {**LINEAR, **GATES, "b_dec": "decoder_bias"}, True),
    "JumpReluAutoEncoder": Kind("jumprelu", {**PLAIN, "threshold": "threshold"}, False),
    "AutoEncoderTopK": Kind("topk", TOPK, True, ("k", "threshold")),
    "BatchTopKSAE": Kind("jumprelu", {**TOPK, "threshold": "threshold"}, True, ("k",)),
    "MatryoshkaBatchTopKSAE": Kind("jumprelu", {**PLAIN, "threshold": "threshold"}, True, ("k", "group_sizes")),
}
ONE_THRESHOLD = ("BatchTopKSAE", "MatryoshkaBatchTopKSAE")


def convert(path: Path, state: Mapping[str, Any]) -> Parts:
    """Turns the state dictionary in `ae.pt`, with the `config.json` beside it or one level up.

    Raises:
        InputError: if the two do not agree, or are not what the format defines.
    """
    source = config_of(path)
    require_files(source.parent, CONFIG)
    trainer = value(read_config(source), "trainer", source, dict)
    if "optimizer" in state:
        raise InputError(f"sae: {path} is a snapshot of an unfinished training, not an SAE; finish the training first")
    dict_class = value(trainer, "dict_class", source, str)
    if dict_class not in KINDS:
        raise InputError(f"dict_class: {dict_class!r} in {source} is not one of {', '.join(KINDS)}")
    d, f = size(trainer, "activation_dim", source), size(trainer, "dict_size", source)
    kind = KINDS[dict_class]
    cfg = {
        "architecture": kind.architecture,
        "d_in": d,
        "d_sae": f,
        "apply_b_dec_to_input": kind.apply_b_dec_to_input,
        "metadata": _metadata(trainer, source),
    }
    if kind.architecture == "topk":
        cfg["k"] = _k(trainer, state, source)
    return cfg, _tensors(kind, state, path, d, f, one_threshold=dict_class in ONE_THRESHOLD)


def config_of(path: Path) -> Path:
    """Where the configuration of a file of weights lies."""
    folder = path.parent.parent if path.parent.name == "checkpoints" else path.parent
    return folder / CONFIG


def _tensors(
    kind: Kind, state: Mapping[str, Any], path: Path, d: int, f: int, *, one_threshold: bool
) -> dict[str, Tensor]:
    sizes: dict[str, tuple[int, ...]] = {"W_enc": (d, f), "W_dec": (f, d), "b_dec": (d,)}
    shapes = {theirs: sizes.get(ours, (f,)) for ours, theirs in kind.names.items()}
    shapes |= {name: shape[::-1] for name, shape in shapes.items() if _transposed(name)}
    if one_threshold:
        shapes["threshold"] = ()
    read = taken(state, shapes, path, kind.ignored)
    tensors = {ours: read[name].T if _transposed(name) else read[name] for ours, name in kind.names.items()}
    if one_threshold:
        if tensors["threshold"] < 0:
            raise InputError(f"threshold: {tensors['threshold'].item():g} in {path} was never measured; train longer")
        tensors["threshold"] = tensors["threshold"].expand(f)
    return tensors


def _transposed(name: str) -> bool:
    return name.endswith(".weight")


def _k(trainer: Mapping[str, Any], state: Mapping[str, Any], source: Path) -> int:
    k = size(trainer, "k", source)
    stored = state.get("k", k)
    if int(stored) != k:
        raise InputError(f"k: {k} in {source}, but {int(stored)} with the weights")
    return k


def _metadata(trainer: Mapping[str, Any], source: Path) -> dict[str, Any]:
    place = str(trainer.get("submodule_name") or "")
    if any(other in place for other in ("mlp", "attn", "attention", "resid_pre", "resid_mid")):
        raise InputError(f"submodule_name: {place!r} in {source} is not the output of a decoder block (resid_post)")
    metadata: dict[str, Any] = {}
    if isinstance(trainer.get("layer"), int):
        metadata["hook_name"] = hook_of_layer(trainer["layer"])
    if isinstance(trainer.get("lm_name"), str):
        metadata["model_name"] = trainer["lm_name"]
    return metadata
