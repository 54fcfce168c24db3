"""Loading by name or path: options, hub repositories, the seed's `load_topk_sae`, and what is never imported."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub.errors import (
    DisabledRepoError,
    GatedRepoError,
    HfHubHTTPError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
)
from safetensors.torch import save_file

import mechreward as mr
from mechreward.errors import InputError
from mechreward.sae import SAE, SAEMeta, cache_dir, load_sae, load_topk_sae, save_sae

D, F, K = 6, 16, 4


def checkpoint() -> dict[str, Any]:
    g = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D, F), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
    made = {name: torch.randn(shape, generator=g) for name, shape in shapes.items()}
    return {**made, "d_model": D, "d_sae": F, "k": K, "step": 9}


def lens_folder(folder: Path) -> Path:
    w = checkpoint()
    meta = SAEMeta("r", "", 2, "lab/model", "model.layers.2")
    return save_sae(SAE("topk", w["W_enc"], w["b_enc"], w["W_dec"], w["b_dec"], meta, k=K), folder)


def test_options_have_to_agree_with_a_sae_lens_folder(tmp_path: Path) -> None:
    folder = lens_folder(tmp_path)
    assert load_sae(folder, layer=2, model_name="model", k=K).model_name == "model"
    for options, message in (
        ({"layer": 3}, r"layer: 3 was given, but .* says 2 \(model.layers.2\)"),
        ({"k": 5}, "k: 5 was given, but .* says 4"),
    ):
        with pytest.raises(InputError, match=message):
            load_sae(folder, **options)  # type: ignore[arg-type]
    assert load_sae(folder, model_name="lab/another-name").model_name == "lab/another-name"


def test_options_fill_what_a_sae_lens_folder_leaves_out(tmp_path: Path) -> None:
    folder = lens_folder(tmp_path)
    cfg = json.loads((folder / "cfg.json").read_text())
    (folder / "cfg.json").write_text(json.dumps({k: v for k, v in cfg.items() if k not in ("metadata", "k")}))
    sae = load_sae(folder, layer=7, model_name="m", k=3)
    assert (sae.layer, sae.model_name, sae.k) == (7, "m", 3)


def test_options_have_to_agree_with_a_release(monkeypatch: pytest.MonkeyPatch) -> None:
    import sae_lens

    made = sae_lens.SAE.from_dict(
        {"architecture": "topk", "d_in": D, "d_sae": F, "k": K, "metadata": {"hook_name": "blocks.7.hook_resid_post"}}
    )
    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", lambda *_, **__: made)
    sae = load_sae(release="some-release", sae_id="x", layer=7, model_name="m", k=K)
    assert (sae.layer, sae.model_name, sae.release, sae.sae_id) == (7, "m", "some-release", "x")
    with pytest.raises(InputError, match="layer: 6 was given, but some-release / x says 7"):
        load_sae("some-release", "x", layer=6)


def test_names_of_the_seed() -> None:
    assert mr.SAEHandle is SAE
    assert mr.load_topk_sae is load_topk_sae
    assert mr.load_sae is load_sae


def test_load_topk_sae(tmp_path: Path) -> None:
    path = tmp_path / "sae_final.pt"
    torch.save(checkpoint(), path)
    with pytest.raises(InputError, match="layer: .* does not say which decoder block"):
        load_topk_sae(path)
    sae = load_topk_sae(str(path), "cpu", "Qwen/Qwen3.5-4B", 18)
    assert (sae.layer, sae.model_name, sae.k, sae.release, sae.sae_id) == (18, "Qwen/Qwen3.5-4B", K, str(path), "")
    assert torch.equal(sae.W_enc_DF, checkpoint()["W_enc"])
    labelled = load_topk_sae(path, layer=18, release="lab/x", sae_id="layer_18")
    assert (labelled.release, labelled.sae_id, labelled.layer) == ("lab/x", "layer_18", 18)
    torch.save({f"{side}coder_linear.{kind}": torch.zeros(shape) for side, kind, shape in (
        ("en", "weight", (F, D)), ("en", "bias", (F,)), ("de", "weight", (D, F)), ("de", "bias", (D,)),
    )}, path)  # fmt: skip
    with pytest.raises(InputError, match="checkpoint: .* holds no TopK SAE"):
        load_topk_sae(path, layer=18)


def answered(kind: type[HfHubHTTPError], status: int) -> HfHubHTTPError:
    """What the hub's client makes of an answer."""
    response = SimpleNamespace(status_code=status, headers={}, request=None)
    return kind(f"{status} Client Error.\n\nRead it at the hub.", response=response)  # type: ignore[arg-type]


def unanswered(cause: BaseException) -> LocalEntryNotFoundError:
    """What it makes of an answer that is none, and of no network, where the cache has no such file."""
    error = LocalEntryNotFoundError("An error happened while trying to locate the file on the Hub.")
    error.__cause__ = cause
    return error


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A hub of one repository, `lab/topk`, whose files are in the folder that this gives."""
    files = tmp_path / "repository"
    files.mkdir()
    monkeypatch.setenv("MECHREWARD_CACHE_DIR", str(tmp_path / "cache"))

    def download(repository: str, filename: str, cache_dir: Path) -> str:
        assert cache_dir == tmp_path / "cache" / "hub"
        if repository != "lab/topk":
            raise answered(RepositoryNotFoundError, 401)
        if not (files / filename).exists():
            raise answered(RemoteEntryNotFoundError, 404)
        return str(files / filename)

    monkeypatch.setattr("mechreward.sae.loading.hf_hub_download", download)
    return files


def test_a_hub_repository_with_a_topk_checkpoint(hub: Path) -> None:
    torch.save(checkpoint(), hub / "sae_final.pt")
    sae = load_sae(release="lab/topk", sae_id="layer_18")  # as in the seed's quickstart
    assert (sae.layer, sae.release, sae.sae_id, sae.k) == (18, "lab/topk", "layer_18", K)
    assert load_sae("lab/topk", layer=3).layer == 3
    assert load_sae("lab/topk", "layer_18", layer=18).layer == 18
    with pytest.raises(InputError, match="layer: 3 was given, but sae_id says 'layer_18'"):
        load_sae("lab/topk", "layer_18", layer=3)
    with pytest.raises(InputError, match="layer: .* does not say"):
        load_sae("lab/topk")
    (hub / "sae_final.json").write_text(json.dumps({"layer": 17, "model": "lab/model"}))
    assert load_topk_sae("lab/topk").layer == 17
    assert load_topk_sae("lab/topk").model_name == "lab/model"
    with pytest.raises(InputError, match="layer: 18 was given, but .* says 17"):
        load_sae("lab/topk", "layer_18")


@pytest.mark.usefixtures("hub")
def test_other_repositories_go_to_sae_lens(monkeypatch: pytest.MonkeyPatch) -> None:
    import sae_lens

    def from_pretrained(*_: object, **__: object) -> None:
        raise ValueError("asked sae-lens")

    monkeypatch.setattr(sae_lens.SAE, "from_pretrained", from_pretrained)
    with pytest.raises(InputError, match="sae-lens cannot load 'lab/other' / 'x': asked sae-lens"):
        load_sae("lab/other", "x")


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (answered(GatedRepoError, 401), "401 Client Error. Read it at the hub."),
        (answered(DisabledRepoError, 403), "403 Client Error. Read it at the hub."),
        (answered(HfHubHTTPError, 401), "401 Client Error. Read it at the hub."),
        (unanswered(answered(HfHubHTTPError, 429)), "429 Client Error. Read it at the hub."),
        (unanswered(OfflineModeIsEnabled("HF_HUB_OFFLINE is set")), "HF_HUB_OFFLINE is set"),
        (LocalEntryNotFoundError("not in the cache"), "not in the cache"),
        (HTTPError("the proxy is down"), "the proxy is down"),
        (OSError("no space left"), "no space left"),
    ],
)
@pytest.mark.parametrize("failing", ["sae_final.pt", "sae_final.json"])
def test_a_hub_that_does_not_say_no_is_quoted(
    error: Exception, reason: str, failing: str, hub: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(checkpoint(), hub / "sae_final.pt")

    def download(repository: str, filename: str, cache_dir: Path) -> str:
        del repository, cache_dir
        if filename == failing:
            raise error
        return str(hub / filename)

    monkeypatch.setattr("mechreward.sae.loading.hf_hub_download", download)
    for sae_id in (None, "layer_18"):
        with pytest.raises(InputError) as caught:
            load_sae("lab/topk", sae_id)
        assert str(caught.value) == f"sae: the hub does not give {failing} of 'lab/topk': {reason}"


@pytest.mark.usefixtures("hub")
def test_a_hub_that_says_no_leaves_it_to_the_user_to_say_more() -> None:
    with pytest.raises(InputError, match="there is no file or folder 'lab/other', and a release needs an sae_id"):
        load_sae("lab/other")


def test_the_hub_is_not_asked_for_a_name_that_it_cannot_have() -> None:
    with pytest.raises(InputError, match="there is no file or folder 'lab--x/y', and a release needs an sae_id"):
        load_sae("lab--x/y")


def test_without_a_network_what_the_hub_said_before_counts(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MECHREWARD_CACHE_DIR", str(tmp_path))
    with pytest.raises(InputError, match="the hub does not give sae_final.pt of 'lab/other': .*HF_HUB_OFFLINE"):
        load_sae("lab/other")  # the tests run without a network
    # As the hub's client keeps it that revision `main`, the commit `abc`, has no such file.
    folder = tmp_path / "hub" / "models--lab--other"
    for path, text in ((folder / "refs" / "main", "abc"), (folder / ".no_exist" / "abc" / "sae_final.pt", "")):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    with pytest.raises(InputError, match="there is no file or folder 'lab/other', and a release needs an sae_id"):
        load_sae("lab/other")


def test_cache_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MECHREWARD_CACHE_DIR", str(tmp_path / "a" / "b"))
    assert cache_dir() == tmp_path / "a" / "b"
    assert cache_dir().is_dir()
    monkeypatch.delenv("MECHREWARD_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / "mechreward"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MECHREWARD_CACHE_DIR", str(tmp_path / "file" / "x"))
    with pytest.raises(InputError, match="cannot write to the folder"):
        cache_dir()


def test_no_local_file_needs_sae_lens(tmp_path: Path) -> None:
    w = {name: tensor for name, tensor in checkpoint().items() if isinstance(tensor, torch.Tensor)}
    arrays = {**{name.lower(): tensor.numpy() for name, tensor in w.items()}, "threshold": np.zeros(F, "f4")}
    np.savez(tmp_path / "params.npz", **arrays)
    torch.save(checkpoint(), tmp_path / "sae_final.pt")
    (tmp_path / "sparsify").mkdir()
    (tmp_path / "sparsify" / "cfg.json").write_text(json.dumps({"d_in": D, "num_latents": F, "k": K}))
    held = {"encoder.weight": w["W_enc"].T.contiguous(), "encoder.bias": w["b_enc"]}
    save_file({**held, "W_dec": w["W_dec"], "b_dec": w["b_dec"]}, tmp_path / "sparsify" / "sae.safetensors")
    lens_folder(tmp_path / "lens")
    code = f"""
import sys
import mechreward as mr
for name in ("params.npz", "sae_final.pt", "sparsify", "lens"):
    print(mr.load_sae({str(tmp_path)!r}, name, layer=2).architecture, "sae_lens" in sys.modules)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out == "jumprelu False\n" + "topk False\n" * 3


def test_a_device_that_is_not_there_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="device: cuda:99 is not there"):
        load_sae(tmp_path, device="cuda:99")
