"""SAE Lens' directory format, both ways, against sae-lens itself; and every way a file can be wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mechreward.errors import InputError
from mechreward.sae import SAE, SAEMeta, from_sae_lens, load_sae, save_sae
from mechreward.sae.io import layer_of_hook

META = SAEMeta(release="lab/saes", sae_id="layer_2", layer=2, model_name="lab/model", hook_name="model.layers.2")
D, F = 5, 12


def weights(seed: int = 0) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,), "threshold": (F,)}
    shapes |= {"b_gate": (F,), "b_mag": (F,), "r_mag": (F,)}
    return {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}


def ours(architecture: str = "topk", **options: Any) -> SAE:
    w = weights()
    if architecture == "topk":
        options = {"k": 3, **options}
    if architecture == "jumprelu":
        options["threshold_F"] = w["threshold"].abs()
    if architecture == "gated":
        options |= {"b_gate_F": w["b_gate"], "r_mag_F": w["r_mag"]}
    return SAE(architecture, w["W_enc"], w["b_enc"], w["W_dec"], w["b_dec"], META, **options)  # type: ignore[arg-type]


def lens_object(architecture: str, **options: Any) -> Any:
    import sae_lens

    made = sae_lens.SAE.from_dict(
        {
            "architecture": architecture,
            "d_in": D,
            "d_sae": F,
            "metadata": {"hook_name": "blocks.7.hook_resid_post", "model_name": "gpt2"},
            **options,
        }
    )
    made.load_state_dict({name: weights(1)[name].clone() for name in made.state_dict()})
    return made


KINDS = [
    ("topk", {"k": 3}),
    ("topk", {"k": 3, "rescale_acts_by_decoder_norm": True}),
    ("topk", {"k": F, "apply_b_dec_to_input": False}),
    ("jumprelu", {}),
    ("jumprelu", {"apply_b_dec_to_input": False}),
    ("standard", {}),
    ("gated", {}),
    ("gated", {"apply_b_dec_to_input": False}),
    ("topk", {"k": 3, "normalize_activations": "layer_norm"}),
    ("standard", {"normalize_activations": "constant_norm_rescale"}),
]


@pytest.mark.parametrize(("architecture", "options"), KINDS)
def test_reads_what_sae_lens_saves(architecture: str, options: dict[str, Any], tmp_path: Path) -> None:
    lens = lens_object(architecture, **options)
    lens.save_model(tmp_path)
    h = torch.randn(40, D)
    for sae in (load_sae(tmp_path), from_sae_lens(lens, release="gpt2-small", sae_id="l7")):
        acts = lens.encode(h)
        assert (acts > 0).any()
        torch.testing.assert_close(sae.encode(h), acts, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(sae.decode(acts, h), lens.decode(acts), rtol=1e-6, atol=1e-6)
        assert (sae.meta.layer, sae.meta.model_name, sae.meta.hook_name) == (7, "gpt2", "blocks.7.hook_resid_post")
    assert (load_sae(tmp_path).meta.release, load_sae(tmp_path).meta.sae_id) == (str(tmp_path), "")
    assert (sae.meta.release, sae.meta.sae_id) == ("gpt2-small", "l7")


@pytest.mark.parametrize(
    ("architecture", "options"),
    [
        ("topk", {}),
        ("topk", {"rescale_acts_by_decoder_norm": True, "apply_b_dec_to_input": False}),
        ("jumprelu", {}),
        ("relu", {"apply_b_dec_to_input": False, "input_norm": "layer_norm"}),
        ("gated", {}),
    ],
)
def test_sae_lens_reads_what_we_save(architecture: str, options: dict[str, Any], tmp_path: Path) -> None:
    import sae_lens

    sae = ours(architecture, **options)
    assert save_sae(sae, tmp_path / "new" / "sae") == tmp_path / "new" / "sae"
    lens = sae_lens.SAE.load_from_disk(tmp_path / "new" / "sae")
    h = torch.randn(40, D)
    torch.testing.assert_close(lens.encode(h), sae.encode(h), rtol=1e-6, atol=1e-6)
    # Where terms cancel, a sum's rounding is in proportion to its terms: which comes first differs between machines.
    decoded = sae.decode(sae.encode(h), h)
    torch.testing.assert_close(lens.decode(lens.encode(h)), decoded, rtol=1e-6, atol=1e-6 * float(decoded.abs().max()))
    assert (lens.cfg.metadata.hook_name, lens.cfg.metadata.model_name) == (META.hook_name, META.model_name)
    again = load_sae(tmp_path / "new" / "sae")
    assert (again.weights_hash, again.meta, again.k) == (sae.weights_hash, META, sae.k)


def before_6(folder: Path, **keys: Any) -> Path:
    """A folder as sae-lens wrote it before version 6; those of 2024's first months name the hook `hook_point`."""
    names = ("W_enc", "b_enc", "W_dec", "b_dec")
    save_file({name: weights(1)[name] for name in names}, folder / "sae_weights.safetensors")
    cfg = {"d_in": D, "d_sae": F, "dtype": "torch.float32", "model_name": "gpt2-small", "l1_coefficient": 8e-5}
    (folder / "cfg.json").write_text(json.dumps(cfg | keys))
    return folder


FIRST = {"hook_point": "blocks.8.hook_resid_pre", "hook_point_layer": 8, "hook_point_head_index": None}
LATER = {"hook_name": "blocks.8.hook_resid_pre", "hook_layer": 8, "hook_head_index": None, "architecture": "standard"}


@pytest.mark.parametrize("keys", [FIRST, LATER])
def test_folders_older_than_version_6(keys: dict[str, Any], tmp_path: Path) -> None:
    import sae_lens

    sae, lens = load_sae(before_6(tmp_path, **keys)), sae_lens.SAE.load_from_disk(tmp_path)
    h = torch.randn(40, D)
    torch.testing.assert_close(sae.encode(h), lens.encode(h), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sae.decode(sae.encode(h)), lens.decode(lens.encode(h)), rtol=1e-6, atol=1e-6)
    # What enters block 8 is the output of block 7.
    assert (sae.layer, sae.model_name, sae.hook_name) == (7, "gpt2-small", lens.cfg.metadata.hook_name)
    with pytest.raises(InputError, match=r"layer: 8 was given, but .* says 7 \(blocks.8.hook_resid_pre\)"):
        load_sae(tmp_path, layer=8)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({**FIRST, "hook_point": "blocks.8.hook_mlp_out"}, "hook_name: 'blocks.8.hook_mlp_out' is not the output"),
        ({**LATER, "hook_name": "blocks.8.attn.hook_z"}, "hook_name: 'blocks.8.attn.hook_z' is not the output"),
        ({**FIRST, "hook_point_head_index": 3}, "an SAE of one attention head"),
        ({**LATER, "hook_head_index": 3}, "an SAE of one attention head"),
    ],
)
def test_hooks_of_folders_older_than_version_6(keys: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_sae(before_6(tmp_path, **keys), layer=7)


@pytest.mark.parametrize("norm", [{}, {"normalize_activations": None}, {"normalize_activations": False}])
def test_what_says_nothing_in_folders_older_than_version_6(norm: dict[str, Any], tmp_path: Path) -> None:
    import sae_lens

    before_6(tmp_path, **LATER, **norm)
    weights_file = tmp_path / "sae_weights.safetensors"
    save_file({**load_file(weights_file), "scaling_factor": torch.ones(F)}, weights_file)
    sae, lens = load_sae(tmp_path), sae_lens.SAE.load_from_disk(tmp_path)
    h = torch.randn(40, D)
    torch.testing.assert_close(sae.encode(h), lens.encode(h), rtol=1e-6, atol=1e-6)


def test_what_says_something_in_folders_older_than_version_6(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'expected_average_only_in' is not one of .* its scale is not in the file"):
        load_sae(before_6(tmp_path, **LATER, normalize_activations=True))
    before_6(tmp_path, **LATER)
    weights_file = tmp_path / "sae_weights.safetensors"
    save_file({**load_file(weights_file), "scaling_factor": torch.full((F,), 2.0)}, weights_file)
    with pytest.raises(InputError, match="the tensor 'scaling_factor' does not belong"):
        load_sae(tmp_path)


CENTERED = {"hook_name": "blocks.8.hook_resid_pre", "model_from_pretrained_kwargs": {"center_writing_weights": True}}


def test_an_sae_of_a_model_with_centered_writing_weights_reads_the_plain_one(tmp_path: Path) -> None:
    lens = lens_object("standard", metadata=CENTERED)
    h = torch.randn(40, D) + torch.randn(40, 1)
    centered = h - h.mean(-1, keepdim=True)
    acts = lens.encode(centered)
    assert not torch.allclose(lens.encode(h), acts, atol=0.1)
    lens.save_model(tmp_path)
    for sae in (from_sae_lens(lens, release="r"), load_sae(tmp_path)):
        torch.testing.assert_close(sae.encode(h), acts, rtol=1e-5, atol=1e-5)
        assert torch.equal(sae.read(h, [1, 5]) > 0, acts[:, [1, 5]] > 0)
        torch.testing.assert_close(sae.reader([1, 5])(h), acts[:, [1, 5]], rtol=1e-5, atol=1e-5)
        # The reconstruction gets the mean back: what is wrong with it is what is wrong with the SAE's own.
        error = h - sae.decode(sae.encode(h), h)
        torch.testing.assert_close(error, centered - lens.decode(acts), rtol=1e-5, atol=1e-5)
        total = (h - h.mean(0)).pow(2).sum().item()
        assert sae.fvu(h) == pytest.approx(error.pow(2).sum().item() / total, rel=1e-5)
        with pytest.raises(InputError, match="h: undoing center needs the residuals"):
            sae.decode(acts)
    assert sae.weights_hash != replace(sae, input_norm="none").weights_hash


def test_centering_is_kept_as_sae_lens_keeps_it(tmp_path: Path) -> None:
    import sae_lens

    sae = ours("relu", input_norm="center")
    lens = sae_lens.SAE.load_from_disk(save_sae(sae, tmp_path))
    assert lens.cfg.normalize_activations == "none"
    assert lens.cfg.metadata.model_from_pretrained_kwargs == {"center_writing_weights": True}
    assert load_sae(tmp_path).weights_hash == sae.weights_hash
    save_sae(ours("relu"), tmp_path)
    assert "model_from_pretrained_kwargs" not in json.loads((tmp_path / "cfg.json").read_text())["metadata"]


@pytest.mark.parametrize(
    ("options", "norm"), [({"center_writing_weights": False}, "none"), ({"fold_ln": False}, "none"), (None, "none")]
)
def test_other_options_of_the_model_change_nothing(options: object, norm: str) -> None:
    metadata = {**CENTERED, "model_from_pretrained_kwargs": options}
    assert from_sae_lens(lens_object("standard", metadata=metadata), release="r").input_norm == norm


def test_centering_beside_another_normalisation() -> None:
    # Layer norm takes the mean away by itself; scaling to a norm comes after it, which is no kind of ours.
    lens = lens_object("topk", k=3, normalize_activations="layer_norm", metadata=CENTERED)
    sae, h = from_sae_lens(lens, release="r"), torch.randn(40, D)
    torch.testing.assert_close(sae.encode(h), lens.encode(h - h.mean(-1, keepdim=True)), rtol=1e-5, atol=1e-5)
    lens = lens_object("standard", normalize_activations="constant_norm_rescale", metadata=CENTERED)
    with pytest.raises(InputError, match="'constant_norm_rescale' of a model with center_writing_weights is not"):
        from_sae_lens(lens, release="r")


def test_a_copy_does_not_follow_the_original() -> None:
    lens = lens_object("topk", k=3)
    sae = from_sae_lens(lens, release="r")
    before = sae.W_enc_DF.clone()
    lens.W_enc.data.zero_()
    assert torch.equal(sae.W_enc_DF, before)


def test_sub_folder_by_sae_id_and_overwriting(tmp_path: Path) -> None:
    save_sae(ours("jumprelu"), tmp_path / "layer_2")
    save_sae(ours(k=4), tmp_path / "layer_2")
    sae = load_sae(str(tmp_path), "layer_2")
    assert (sae.architecture, sae.k) == ("topk", 4)
    assert sorted(path.name for path in (tmp_path / "layer_2").iterdir()) == ["cfg.json", "sae_weights.safetensors"]


def test_firing_frequencies_are_kept_as_sae_lens_keeps_them(tmp_path: Path) -> None:
    share = torch.tensor([0.0, 1.0] + [0.01] * (F - 2))
    save_sae(replace(ours(), frequency_F=share), tmp_path)
    assert load_file(tmp_path / "sparsity.safetensors")["sparsity"].tolist()[:3] == pytest.approx([-10.0, 0.0, -2.0])
    again = load_sae(tmp_path)
    assert again.frequency_F is not None
    torch.testing.assert_close(again.frequency_F, share, rtol=1e-5, atol=1e-9)
    assert again.weights_hash == ours().weights_hash
    # A save without them leaves none of another SAE behind.
    save_sae(ours(k=4), tmp_path)
    assert load_sae(tmp_path).frequency_F is None
    save_file({"other": share}, tmp_path / "sparsity.safetensors")
    with pytest.raises(InputError, match="without the tensor 'sparsity'"):
        load_sae(tmp_path)


def test_half_precision_files_are_read_as_float32(tmp_path: Path) -> None:
    save_sae(ours("relu"), tmp_path)
    tensors = load_file(tmp_path / "sae_weights.safetensors")
    save_file({name: tensor.half() for name, tensor in tensors.items()}, tmp_path / "sae_weights.safetensors")
    sae = load_sae(tmp_path)
    assert sae.W_enc_DF.dtype == torch.float32
    assert torch.equal(sae.W_enc_DF, tensors["W_enc"].half().float())


@pytest.mark.parametrize(
    ("hook", "layer"),
    [
        ("model.layers.0", 0),
        ("model.language_model.layers.13", 13),
        ("layers.5", 5),
        ("transformer.h.11", 11),
        ("blocks.20.hook_resid_post", 20),
        ("blocks.8.hook_resid_pre", 7),
    ],
)
def test_layer_of_hook(hook: str, layer: int) -> None:
    assert layer_of_hook(hook) == layer


@pytest.mark.parametrize(
    "hook",
    [
        "blocks.3.hook_mlp_out",
        "model.layers.3.mlp",
        "blocks.0.hook_resid_pre",
        "blocks.3.attn.hook_z",
        "model.norm",
        "3",
    ],
)
def test_other_hooks_are_refused(hook: str) -> None:
    with pytest.raises(InputError, match=f"hook_name: '{hook}' is not the output of a decoder block"):
        layer_of_hook(hook)


def edit(folder: Path, drop: tuple[str, ...] = (), **changes: Any) -> None:
    cfg = json.loads((folder / "cfg.json").read_text())
    metadata = changes.pop("metadata", {})
    cfg = {key: value for key, value in {**cfg, **changes}.items() if key not in drop}
    if "metadata" in cfg:
        cfg["metadata"] = {k: v for k, v in {**cfg["metadata"], **metadata}.items() if k not in drop}
    (folder / "cfg.json").write_text(json.dumps(cfg))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architecture": "temporal"}, "architecture: 'temporal' is not one of topk, standard, jumprelu, gated"),
        ({"architecture": "gated"}, "the tensor 'b_gate' is missing"),
        ({"normalize_activations": "batch_norm"}, "normalize_activations: 'batch_norm' is not one of none, layer_norm"),
        ({"normalize_activations": "expected_average_only_in"}, "its scale is not in the file"),
        ({"normalize_activations": "center"}, "'center' is not one of none, layer_norm, constant_norm_rescale"),
        ({"reshape_activations": "hook_z"}, "reshape_activations: 'hook_z'"),
        ({"activation_fn_str": "topk"}, "activation_fn_str: 'topk' is the form before sae-lens 6"),
        ({"drop": ("architecture",)}, "the key 'architecture' is missing"),
        ({"drop": ("d_in",)}, "the key 'd_in' is missing"),
        ({"drop": ("d_sae",)}, "the key 'd_sae' is missing"),
        ({"drop": ("k",)}, "k: .* does not say how many features are kept a token; say it with k="),
        ({"k": 2.5}, "k: 2.5 in cfg.json is not a whole number"),
        ({"k": True}, "k: True in cfg.json is not a whole number"),
        ({"d_sae": 0}, "d_sae: 0 in cfg.json"),
        ({"k": F + 1}, f"k: {F + 1} is not between 1 and the SAE's {F} features"),
        ({"d_in": D + 1}, r"W_enc: shape \(5, 12\) is not \(6, 12\) as cfg.json says"),
        ({"architecture": "jumprelu"}, "the tensor 'threshold' is missing"),
        ({"drop": ("metadata",)}, "layer: .* does not say which decoder block it reads"),
        ({"drop": ("hook_name",)}, "layer: .* does not say which decoder block it reads"),
        ({"metadata": {"hook_name": "blocks.2.hook_mlp_out"}}, "hook_name: 'blocks.2.hook_mlp_out'"),
        ({"metadata": {"layer": 3}}, "metadata.layer: 3 does not agree with hook_name 'model.layers.2'"),
        ({"metadata": {"hook_head_index": 1}}, "metadata.hook_head_index"),
        ({"metadata": {"hook_name": 3}}, "metadata.hook_name: 3 in .* is not a name"),
        ({"metadata": {"model_name": ["gpt2"]}}, r"metadata.model_name: \['gpt2'\] in .* is not a name"),
        ({"apply_b_dec_to_input": "false"}, "apply_b_dec_to_input: 'false' in cfg.json is neither true nor false"),
        ({"rescale_acts_by_decoder_norm": 1}, "rescale_acts_by_decoder_norm: 1 in cfg.json is neither true nor false"),
    ],
)
def test_wrong_configurations(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    save_sae(ours(), tmp_path)
    edit(tmp_path, **changes)
    with pytest.raises(InputError, match=message):
        load_sae(tmp_path)


def test_metadata_that_are_none(tmp_path: Path) -> None:
    save_sae(ours(), tmp_path)
    cfg = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**cfg, "metadata": "x"}))
    with pytest.raises(InputError, match="metadata: 'x' in .* is not an object"):
        load_sae(tmp_path)


def test_wrong_tensors(tmp_path: Path) -> None:
    good = {name: weights()[name] for name in ("W_enc", "b_enc", "W_dec", "b_dec")}
    cases = {
        "the tensor 'b_dec' is missing": {k: v for k, v in good.items() if k != "b_dec"},
        "the tensor 'W_skip' does not belong": {**good, "W_skip": torch.zeros(D, D)},
        "the tensor 'threshold' does not belong": {**good, "threshold": weights()["threshold"]},
        r"W_dec: shape \(5, 12\) is not \(12, 5\)": {**good, "W_dec": good["W_enc"].clone()},
        "b_enc_F: .* NaN or infinity": {**good, "b_enc": torch.full((F,), float("nan"))},
    }
    save_sae(ours(), tmp_path)
    for message, tensors in cases.items():
        save_file(tensors, tmp_path / "sae_weights.safetensors")
        with pytest.raises(InputError, match=message):
            load_sae(tmp_path)


@pytest.mark.parametrize("size", [0, 7, 100, -1])
def test_truncated_weights(size: int, tmp_path: Path) -> None:
    save_sae(ours(), tmp_path)
    path = tmp_path / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(InputError, match="sae_weights.safetensors is damaged or cut short"):
        load_sae(tmp_path)


def test_missing_and_broken_files(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no file or folder"):
        load_sae(tmp_path / "nowhere")
    with pytest.raises(InputError, match="there is no file or folder ./nowhere"):
        load_sae("./nowhere")
    with pytest.raises(InputError, match="is in no format known here; looked for cfg.json"):
        load_sae(tmp_path)
    save_sae(ours(), tmp_path)
    with pytest.raises(InputError, match="there is no file or folder .*layer_9"):
        load_sae(tmp_path, "layer_9")
    (tmp_path / "cfg.json").write_text("[1]")
    with pytest.raises(InputError, match="must hold a JSON object, not list"):
        load_sae(tmp_path)
    (tmp_path / "cfg.json").write_text('{"architecture": ')
    with pytest.raises(InputError, match="not valid JSON"):
        load_sae(tmp_path)
    (tmp_path / "sae_weights.safetensors").unlink()
    with pytest.raises(InputError, match="has no sae_weights.safetensors"):
        load_sae(tmp_path)


def test_a_save_killed_half_way_does_not_load_as_a_mixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_sae(ours(), tmp_path)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mechreward.sae.io.write_json", killed)
    with pytest.raises(KeyboardInterrupt):
        save_sae(replace(ours(), b_enc_F=torch.ones(F), k=1), tmp_path)
    with pytest.raises(InputError, match="has no cfg.json"):
        load_sae(tmp_path)


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write to the folder"):
        save_sae(ours(), tmp_path / "file" / "sae")


def test_a_release_goes_through_sae_lens(monkeypatch: pytest.MonkeyPatch) -> None:
    import sae_lens

    asked: list[tuple[object, ...]] = []

    def from_pretrained(release: str, sae_id: str, device: str) -> Any:
        asked.append((release, sae_id, device))
        return lens_object("jumprelu")

    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", from_pretrained)
    sae = load_sae("gemma-scope-2b-pt-res", "layer_7/width_16k")
    assert asked == [("gemma-scope-2b-pt-res", "layer_7/width_16k", "cpu")]
    assert (sae.architecture, sae.meta.release, sae.meta.sae_id, sae.meta.layer) == (
        "jumprelu", "gemma-scope-2b-pt-res", "layer_7/width_16k", 7,
    )  # fmt: skip


def test_releases_that_cannot_be_loaded() -> None:
    with pytest.raises(
        InputError, match="sae: there is no file or folder 'gemma-scope', and a release needs an sae_id"
    ):
        load_sae("gemma-scope")
    with pytest.raises(InputError, match="sae-lens cannot load 'no-such' / 'x': Release no-such not found"):
        load_sae("no-such", "x")
    with pytest.raises(InputError, match="the hub does not give sae_final.pt of 'no/such': .*HF_HUB_OFFLINE"):
        load_sae("no/such", "x")  # the tests run without a network


def test_without_sae_lens_a_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(InputError, match=r'pip install "mechreward\[sae\]"'):
        load_sae("gemma-scope-2b-pt-res", "layer_7")


def test_neither_import_nor_a_folder_needs_sae_lens(tmp_path: Path) -> None:
    save_sae(ours(), tmp_path)
    code = f"import mechreward.sae as m, sys; m.load_sae({str(tmp_path)!r}); print('sae_lens' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
