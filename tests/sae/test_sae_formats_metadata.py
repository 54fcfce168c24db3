"""What a file says of layer, model and k, joined with what the caller says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mechreward.errors import InputError
from mechreward.sae.formats import Given, complete
from mechreward.sae.formats.metadata import part_of_path

SAID = {"architecture": "topk", "k": 8, "metadata": {"hook_name": "model.layers.5", "model_name": "Lab/Model", "x": 1}}
SILENT = {"architecture": "topk"}


def test_the_file_alone_and_the_caller_alone() -> None:
    assert complete(SAID, Given(), "f") == SAID
    assert complete(SILENT, Given(5, "lab/m", 3), "f") == {
        "architecture": "topk",
        "k": 3,
        "metadata": {"hook_name": "blocks.5.hook_resid_post", "model_name": "lab/m"},
    }
    assert complete({**SAID, "metadata": {"hook_name": "model.layers.5"}}, Given(), "f")["metadata"]["model_name"] == ""


def test_both_agree() -> None:
    assert complete(SAID, Given(5, "model", 8), "f")["metadata"] == {**SAID["metadata"], "model_name": "model"}  # type: ignore[dict-item]
    assert complete(SAID, Given(5, "other/MODEL", 8), "f")["metadata"]["model_name"] == "other/MODEL"
    assert SAID["metadata"]["model_name"] == "Lab/Model"  # type: ignore[index]


@pytest.mark.parametrize(
    ("said", "given"),
    [
        ("gpt2-small", "gpt2"),
        ("mistral-7b", "mistralai/Mistral-7B-v0.1"),
        ("google/gemma-3-270m-pt", "google/gemma-3-270m"),
    ],
)
def test_another_name_of_the_model_wins_with_a_warning(said: str, given: str, caplog: pytest.LogCaptureFixture) -> None:
    cfg = {**SAID, "metadata": {"hook_name": "model.layers.5", "model_name": said}}
    assert complete(cfg, Given(model_name=given), "f")["metadata"]["model_name"] == given
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("mechreward.sae.formats.metadata", "WARNING")
    assert record.getMessage() == f"model_name: {given!r} was given, but f says {said!r}; the given name is kept"


def test_no_warning_where_the_names_agree(caplog: pytest.LogCaptureFixture) -> None:
    for given in (Given(), Given(model_name="model"), Given(model_name="other/MODEL")):
        complete(SAID, given, "f")
    complete(SILENT, Given(5, "lab/m", 3), "f")
    assert caplog.records == []


@pytest.mark.parametrize(
    ("cfg", "given", "message"),
    [
        (SILENT, Given(k=3), "layer: f does not say which decoder block it reads; say it with layer="),
        (SILENT, Given(layer=3), "k: f does not say how many features are kept a token; say it with k="),
        (SAID, Given(layer=4), r"layer: 4 was given, but f says 5 \(model.layers.5\)"),
        (SAID, Given(k=4), "k: 4 was given, but f says 8"),
        (SAID, Given(layer=-1), "layer: -1 is not a whole number of at least 0"),
        (SAID, Given(layer=True), "layer: True is not a whole number"),
        ({**SAID, "architecture": "relu", "k": None}, Given(k=4), r"k: 4 was given, but f holds no TopK SAE \(relu\)"),
        ({"metadata": {"hook_name": "model.norm"}}, Given(layer=4), "hook_name: 'model.norm' is not the output"),
    ],
)
def test_gaps_and_contradictions(cfg: dict[str, Any], given: Given, message: str) -> None:
    with pytest.raises(InputError, match=message):
        complete(cfg, given, "f")


def test_layer_zero_is_a_layer() -> None:
    cfg = {"architecture": "jumprelu", "metadata": {"hook_name": "blocks.0.hook_resid_post"}}
    assert complete(cfg, Given(layer=0), "f")["metadata"]["hook_name"] == "blocks.0.hook_resid_post"
    with pytest.raises(InputError, match="layer: 0 was given, but f says 5"):
        complete(SAID, Given(layer=0), "f")


def test_the_nearest_part_of_a_path_counts() -> None:
    match = part_of_path(Path("/a/layer_1/b/layer_2/file"), r"^layer_(\d+)$")
    assert match is not None
    assert match[1] == "2"
    assert part_of_path(Path("/a/xlayer_1"), r"^layer_(\d+)$") is None


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "blob").write_text("")
    (tmp_path / "layer_4").symlink_to(tmp_path / "blob")
    assert part_of_path(tmp_path / "layer_4", r"^layer_(\d+)$") is not None
