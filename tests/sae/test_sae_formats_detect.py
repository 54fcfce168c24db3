"""Which format a path holds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mechreward.errors import InputError
from mechreward.sae.formats import find_format
from mechreward.sae.formats.detect import LOOKED_FOR

FOUR = {name: torch.zeros(2, 2) for name in ("W_enc", "W_dec", "b_enc", "b_dec")}


def make(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize(
    ("names", "format_name"),
    [
        (("cfg.json", "sae_weights.safetensors"), "SAE Lens"),
        (("cfg.json",), "SAE Lens"),
        (("sae_weights.safetensors",), "SAE Lens"),
        (("cfg.json", "sae.safetensors"), "sparsify"),
        (("params.npz",), "Gemma Scope"),
        (("config.json", "params.safetensors"), "Gemma Scope 2"),
        (("hyperparams.json",), "Llama Scope"),
    ],
)
def test_folders(names: tuple[str, ...], format_name: str, tmp_path: Path) -> None:
    folder = make(tmp_path, *names)
    found = find_format(folder)
    assert (found.name, found.path) == (format_name, folder)


def test_files_of_those_folders(tmp_path: Path) -> None:
    make(tmp_path / "a", "cfg.json", "sae.safetensors")
    make(tmp_path / "b", "hyperparams.json", "checkpoints/final.safetensors")
    np.savez(tmp_path / "x.npz", a=np.zeros(1))
    assert find_format(tmp_path / "a" / "sae.safetensors").path == tmp_path / "a"
    assert find_format(tmp_path / "b" / "checkpoints" / "final.safetensors").name == "Llama Scope"
    assert find_format(tmp_path / "x.npz").path == tmp_path / "x.npz"


@pytest.mark.parametrize(
    ("file", "held", "format_name"),
    [
        ("a.pth", {"encoder_linear.weight": torch.zeros(1)}, "Goodfire"),
        ("1.pt", {"encoder.weight": torch.zeros(1), "latent_bias": torch.zeros(1)}, "OpenAI"),
        ("sae_final.pt", {**FOUR, "d_model": 2, "k": 1}, "TopK of the first mechreward"),
        ("layer3.sae.pt", FOUR, "Qwen-Scope"),
    ],
)
def test_torch_files(file: str, held: dict[str, object], format_name: str, tmp_path: Path) -> None:
    torch.save(held, tmp_path / file)
    for path in (tmp_path / file, tmp_path):
        found = find_format(path)
        assert (found.name, found.path) == (format_name, tmp_path / file)


def test_a_config_beside_openais_file_is_not_its_own(tmp_path: Path) -> None:
    make(tmp_path, "config.json")
    torch.save({"encoder.weight": torch.zeros(1), "latent_bias": torch.zeros(1)}, tmp_path / "8.pt")
    assert find_format(tmp_path / "8.pt").name == "OpenAI"
    torch.save({"encoder_linear.weight": torch.zeros(1)}, tmp_path / "m.pth")
    assert find_format(tmp_path / "m.pth").name == "Goodfire"


def test_dictionary_learning_needs_its_configuration(tmp_path: Path) -> None:
    torch.save({"encoder.weight": torch.zeros(1)}, tmp_path / "ae.pt")
    with pytest.raises(InputError, match="ae.pt, with encoder.weight, is in no format known here"):
        find_format(tmp_path)
    make(tmp_path, "config.json")
    torch.save({}, tmp_path / "other.pt")  # ae.pt is found among others
    assert find_format(tmp_path).name == "dictionary_learning"


def test_what_is_unknown_is_told_what_was_looked_for(tmp_path: Path) -> None:
    make(tmp_path, "README.md", "weights.bin")
    save_file(FOUR, tmp_path / "w.safetensors")
    for path in (tmp_path, tmp_path / "README.md", tmp_path / "weights.bin", tmp_path / "w.safetensors"):
        with pytest.raises(InputError) as caught:
            find_format(path)
        assert str(path) in str(caught.value)
        assert all(wanted in str(caught.value) for wanted in LOOKED_FOR)
    with pytest.raises(InputError, match="there is no file or folder .*nowhere"):
        find_format(tmp_path / "nowhere")


def test_four_plain_tensors_of_no_known_name_are_not_guessed_at(tmp_path: Path) -> None:
    torch.save(FOUR, tmp_path / "weights.pt")
    with pytest.raises(InputError, match="with W_enc, W_dec, b_enc, b_dec, is in no format known here"):
        find_format(tmp_path / "weights.pt")
