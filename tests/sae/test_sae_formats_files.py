"""Reading files of weights: nothing in them is run, and what is damaged or unknown is named."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from mechreward.errors import InputError
from mechreward.sae import load_sae
from mechreward.sae.formats.files import (
    matrix_shape,
    read_config,
    read_npz,
    read_safetensors,
    read_torch,
    require_files,
    size,
    taken,
    value,
)

HERE = Path("x.json")


class Code:
    """What a hostile file does: it names a function that unpickling calls."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_torch_file_is_refused_and_not_run(zipped: bool, tmp_path: Path) -> None:
    code = Code(f"touch {tmp_path / 'ran'}")
    torch.save({"W_enc": torch.zeros(2, 3), "x": code}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    for read in (read_torch, load_sae):
        with pytest.raises(InputError, match=r"a.pt carries code or classes \(posix.system\) .*; it is refused"):
            read(tmp_path / "a.pt")
    assert not (tmp_path / "ran").exists()


def test_a_whole_module_is_refused(tmp_path: Path) -> None:
    torch.save(nn.Linear(2, 2), tmp_path / "a.pth")
    with pytest.raises(InputError, match=r"a.pth carries code or classes \(torch.nn.modules.linear.Linear\)"):
        load_sae(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_plain_values_are_read(zipped: bool, tmp_path: Path) -> None:
    held = {"a": torch.arange(3.0), "k": 4, "name": "TopK", "inner": {"b": [1, 2]}}
    torch.save(held, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped)
    read = read_torch(tmp_path / "a.pt")
    assert torch.equal(read.pop("a"), held.pop("a"))
    assert read == held


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0, 0.02, 0.3, 0.7, 0.999])
def test_damaged_torch_files(share: float, zipped: bool, tmp_path: Path) -> None:
    torch.save(
        {"a": torch.randn(40, 40), "b": torch.randn(9)}, tmp_path / "a.pt", _use_new_zipfile_serialization=zipped
    )
    whole = (tmp_path / "a.pt").read_bytes()
    (tmp_path / "a.pt").write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(InputError, match="a.pt is damaged"):
        load_sae(tmp_path / "a.pt")


def test_other_things_than_torch_dictionaries(tmp_path: Path) -> None:
    (tmp_path / "a.pt").write_text("not weights at all")
    with pytest.raises(InputError, match="a.pt is damaged or is no torch file"):
        read_torch(tmp_path / "a.pt")
    torch.save([torch.zeros(2)], tmp_path / "a.pt")
    with pytest.raises(InputError, match="a.pt holds a list, not a dictionary of tensors"):
        read_torch(tmp_path / "a.pt")


def test_npz(tmp_path: Path) -> None:
    path = tmp_path / "params.npz"
    np.savez(path, a=np.arange(6, dtype="f4").reshape(2, 3))
    assert torch.equal(read_npz(path)["a"], torch.arange(6.0).view(2, 3))
    whole = path.read_bytes()
    for length in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InputError, match="params.npz is (damaged or cut short|no archive of plain arrays)"):
            load_sae(tmp_path, layer=0)
    changed = whole.replace(np.arange(6, dtype="f4").tobytes(), np.zeros(6, dtype="f4").tobytes())
    path.write_bytes(changed)
    with pytest.raises(InputError, match="params.npz is damaged or cut short .*CRC"):
        read_npz(path)


def test_npz_with_objects_is_refused_and_not_run(tmp_path: Path) -> None:
    np.savez(tmp_path / "params.npz", w_enc=np.array([Code(f"touch {tmp_path / 'ran'}")], dtype=object))
    with pytest.raises(InputError, match="params.npz is no archive of plain arrays, and nothing else is read"):
        load_sae(tmp_path, layer=0)
    with (tmp_path / "params.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(InputError, match="is no archive of plain arrays"):
        load_sae(tmp_path, layer=0)
    assert not (tmp_path / "ran").exists()


def test_safetensors_and_json(tmp_path: Path) -> None:
    save_file({"a": torch.ones(3)}, tmp_path / "a.safetensors")
    assert torch.equal(read_safetensors(tmp_path / "a.safetensors")["a"], torch.ones(3))
    (tmp_path / "a.safetensors").write_bytes((tmp_path / "a.safetensors").read_bytes()[:-1])
    with pytest.raises(InputError, match="a.safetensors is damaged or cut short"):
        load_sae(tmp_path / "a.safetensors")
    with pytest.raises(InputError, match="has no b.safetensors"):
        read_safetensors(tmp_path / "b.safetensors")
    (tmp_path / "a.json").write_text("[1]")
    with pytest.raises(InputError, match="a.json must hold a JSON object, not list"):
        read_config(tmp_path / "a.json")
    with pytest.raises(InputError, match="has no b.json; this format holds a.json and b.json"):
        require_files(tmp_path, "a.json", "b.json")


def test_values() -> None:
    cfg = {"k": 3, "zero": 0, "flag": True, "name": "x"}
    assert (value(cfg, "name", HERE, str), value(cfg, "flag", HERE, bool), size(cfg, "k", HERE)) == ("x", True, 3)
    for key, message in (
        ("other", "other: x.json lacks this key"),
        ("flag", "flag: True in x.json is not a int"),
        ("zero", "zero: 0 in x.json is not a whole number of at least 1"),
        ("name", "name: 'x' in x.json is not a int"),
    ):
        with pytest.raises(InputError, match=message):
            size(cfg, key, HERE)


def test_taken_is_exact_and_float32() -> None:
    held = {"a": torch.ones(2, 3).half(), "k": 4, "b": torch.zeros(2)}
    read = taken(held, {"a": (2, 3), "b": (2,)}, HERE, ignored=("k", "never there"))
    assert list(read) == ["a", "b"]
    assert read["a"].dtype == torch.float32
    for shapes, ignored, message in (
        ({"a": (2, 3)}, ("k",), "'b' in x.json does not belong"),
        ({"a": (2, 3), "b": (2,)}, (), "'k' in x.json does not belong"),
        ({"a": (3, 2), "b": (2,)}, ("k",), r"a: shape \(2, 3\) in x.json is not \(3, 2\)"),
        ({"a": (2, 3), "b": (2,), "k": ()}, (), "the tensor 'k' is missing in x.json"),
    ):
        with pytest.raises(InputError, match=message):
            taken(held, shapes, HERE, ignored)
    assert matrix_shape(held, "a", HERE) == (2, 3)
    with pytest.raises(InputError, match=r"b: shape \(2,\) in x.json is not that of a matrix"):
        matrix_shape(held, "b", HERE)
    with pytest.raises(InputError, match="the tensor 'k' is missing"):
        matrix_shape(held, "k", HERE)
