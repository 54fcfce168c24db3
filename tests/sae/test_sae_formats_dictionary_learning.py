"""dictionary_learning folders against the `encode` and `decode` of its classes, and against sae-lens."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mechreward.errors import InputError
from mechreward.sae import load_sae

D, F, K = 6, 16, 4
THRESHOLD = 0.3
LINEAR = {"encoder.weight": (F, D), "decoder.weight": (D, F)}
PLAIN = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
SHAPES: dict[str, dict[str, tuple[int, ...]]] = {
    "AutoEncoder": {**LINEAR, "encoder.bias": (F,), "bias": (D,)},
    "AutoEncoderNew": {**LINEAR, "encoder.bias": (F,), "decoder.bias": (D,)},
    "GatedAutoEncoder": {**LINEAR, "decoder_bias": (D,), "r_mag": (F,), "gate_bias": (F,), "mag_bias": (F,)},
    "JumpReluAutoEncoder": {**PLAIN, "threshold": (F,)},
    "AutoEncoderTopK": {**LINEAR, "encoder.bias": (F,), "b_dec": (D,)},
    "BatchTopKSAE": {**LINEAR, "encoder.bias": (F,), "b_dec": (D,)},
    "MatryoshkaBatchTopKSAE": PLAIN,
}
BUFFERS: dict[str, dict[str, Tensor]] = {
    "AutoEncoderTopK": {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(9.0)},
    "BatchTopKSAE": {"k": torch.tensor(K, dtype=torch.int), "threshold": torch.tensor(THRESHOLD)},
    "MatryoshkaBatchTopKSAE": {
        "k": torch.tensor(K, dtype=torch.int),
        "threshold": torch.tensor(THRESHOLD),
        "group_sizes": torch.tensor([4, 12]),
    },
}


def state(dict_class: str) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    made = {name: torch.randn(shape, generator=g) * 0.4 for name, shape in SHAPES[dict_class].items()}
    return {**made, **BUFFERS.get(dict_class, {})}


def write(folder: Path, dict_class: str, held: dict[str, Any] | None = None, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    trainer = {"dict_class": dict_class, "activation_dim": D, "dict_size": F, "layer": 12, "lm_name": "lab/model"}
    trainer |= {"k": K, "submodule_name": "resid_post_layer_12"} | changes
    trainer = {key: value for key, value in trainer.items() if value is not None}
    (folder / "config.json").write_text(json.dumps({"trainer": trainer, "buffer": {"ctx_len": 128}}))
    torch.save(state(dict_class) if held is None else held, folder / "ae.pt")
    return folder


def formula(dict_class: str, w: dict[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    """`encode` and `decode` of `dictionary.py` and `trainers/`, class by class."""
    if dict_class == "AutoEncoder":
        acts = ((x - w["bias"]) @ w["encoder.weight"].T + w["encoder.bias"]).relu()
        return acts, acts @ w["decoder.weight"].T + w["bias"]
    if dict_class == "AutoEncoderNew":
        acts = (x @ w["encoder.weight"].T + w["encoder.bias"]).relu()
        return acts, acts @ w["decoder.weight"].T + w["decoder.bias"]
    if dict_class == "GatedAutoEncoder":
        x_enc = (x - w["decoder_bias"]) @ w["encoder.weight"].T
        gate = (x_enc + w["gate_bias"] > 0).float()
        acts = gate * (w["r_mag"].exp() * x_enc + w["mag_bias"]).relu()
        return acts, acts @ w["decoder.weight"].T + w["decoder_bias"]
    if dict_class == "JumpReluAutoEncoder":
        pre = x @ w["W_enc"] + w["b_enc"]
        acts = (pre * (pre > w["threshold"])).relu()
        return acts, acts @ w["W_dec"] + w["b_dec"]
    if dict_class == "MatryoshkaBatchTopKSAE":
        post = ((x - w["b_dec"]) @ w["W_enc"] + w["b_enc"]).relu()
        acts = post * (post > w["threshold"])
        return acts, acts @ w["W_dec"] + w["b_dec"]
    post = ((x - w["b_dec"]) @ w["encoder.weight"].T + w["encoder.bias"]).relu()
    if dict_class == "BatchTopKSAE":
        acts = post * (post > w["threshold"])
    else:
        top = post.topk(K, dim=-1)
        acts = torch.zeros_like(post).scatter_(-1, top.indices, top.values)
    return acts, acts @ w["decoder.weight"].T + w["b_dec"]


@pytest.mark.parametrize("dict_class", SHAPES)
def test_formula(dict_class: str, h_ND: Tensor, agrees: Callable[..., None], tmp_path: Path) -> None:
    folder = write(tmp_path, dict_class)
    expected = formula(dict_class, state(dict_class), h_ND)
    for path in (folder, folder / "ae.pt"):
        sae = load_sae(path)
        agrees(sae, *expected)
    assert (sae.layer, sae.model_name) == (12, "lab/model")
    assert sae.k == (K if dict_class == "AutoEncoderTopK" else None)


# sae-lens reads AutoEncoderNew without its decoder's bias.
@pytest.mark.parametrize("dict_class", [name for name in SHAPES if name != "AutoEncoderNew"])
def test_as_sae_lens(
    dict_class: str, h_ND: Tensor, agrees: Callable[..., None], lens_loader: Callable[..., Any], tmp_path: Path
) -> None:
    folder = write(tmp_path / "trainer_0", dict_class)
    lens = lens_loader("dictionary_learning_1", tmp_path, "lab/saes", "trainer_0")
    agrees(load_sae(folder), lens.encode(h_ND), lens.decode(lens.encode(h_ND)))


def test_checkpoints_belong_to_their_trainer(h_ND: Tensor, agrees: Callable[..., None], tmp_path: Path) -> None:
    write(tmp_path, "AutoEncoderTopK")
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "ae.pt").rename(tmp_path / "checkpoints" / "ae_100.pt")
    sae = load_sae(tmp_path, "checkpoints/ae_100.pt")
    agrees(sae, *formula("AutoEncoderTopK", state("AutoEncoderTopK"), h_ND))


def test_a_trainer_fed_by_a_plain_iterator_writes_no_buffer(tmp_path: Path) -> None:
    write(tmp_path, "AutoEncoder")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"trainer": config["trainer"]}))
    assert load_sae(tmp_path).layer == 12


@pytest.mark.parametrize(
    ("dict_class", "changes", "message"),
    [
        ("IdentityDict", {}, "dict_class: 'IdentityDict' in .* is not one of AutoEncoder, "),
        ("AutoEncoderTopK", {"k": K + 1}, "k: 5 in .*config.json, but 4 with the weights"),
        ("AutoEncoderTopK", {"k": None}, "k: .*config.json lacks this key"),
        ("AutoEncoder", {"activation_dim": D + 1}, r"encoder.weight: shape \(16, 6\) in .* is not \(16, 7\)"),
        ("JumpReluAutoEncoder", {"dict_size": F + 1}, r"W_enc: shape \(6, 16\) in .* is not \(6, 17\)"),
        ("AutoEncoder", {"layer": None}, "layer: .* does not say which decoder block it reads"),
        ("AutoEncoder", {"submodule_name": "mlp_out_layer_12"}, "submodule_name: 'mlp_out_layer_12' in .* is not"),
        ("AutoEncoder", {"submodule_name": "attention_out_layer_12"}, "'attention_out_layer_12' in .* is not"),
        ("AutoEncoder", {"submodule_name": "resid_pre"}, "submodule_name: 'resid_pre'"),
    ],
)
def test_wrong_configurations(dict_class: str, changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    held = state(dict_class) if dict_class in SHAPES else state("AutoEncoder")
    with pytest.raises(InputError, match=message):
        load_sae(write(tmp_path, dict_class, held, **changes))


def test_wrong_weights(tmp_path: Path) -> None:
    plain, batch = state("AutoEncoder"), state("BatchTopKSAE")
    cases: list[tuple[str, str, dict[str, Any]]] = [
        ("AutoEncoder", "the tensor 'bias' is missing", state("AutoEncoderNew")),
        ("AutoEncoder", "'r_mag' in .* does not belong", {**plain, "r_mag": torch.zeros(F)}),
        ("AutoEncoder", r"decoder.weight: shape \(16, 6\)", {**plain, "decoder.weight": torch.zeros(F, D)}),
        ("AutoEncoder", "b_dec_D: .* NaN or infinity", {**plain, "bias": torch.full((D,), torch.nan)}),
        ("BatchTopKSAE", "threshold: -1 in .* was never measured", {**batch, "threshold": torch.tensor(-1.0)}),
        ("BatchTopKSAE", r"threshold: shape \(16,\) in .* is not \(\)", {**batch, "threshold": torch.zeros(F)}),
        (
            "JumpReluAutoEncoder",
            r"threshold: shape \(\)",
            {**state("JumpReluAutoEncoder"), "threshold": torch.tensor(1.0)},
        ),
        ("AutoEncoder", "snapshot of an unfinished training", {"step": 1, "ae": plain, "optimizer": {}}),
    ]
    for dict_class, message, held in cases:
        with pytest.raises(InputError, match=message):
            load_sae(write(tmp_path, dict_class, held))


def test_without_its_configuration_it_is_not_known(tmp_path: Path) -> None:
    (write(tmp_path, "AutoEncoder") / "config.json").unlink()
    with pytest.raises(
        InputError, match=r"ae.pt, with encoder.weight, .* is in no format known here; .*config.json \+ ae.pt"
    ):
        load_sae(tmp_path)
