"""A run directory is opened once, and taken up again only with the same settings and inputs."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import yaml

from mechreward.errors import InputError
from mechreward.files import read_json
from mechreward.rundir import make_manifest, open_run, stage_seed

SETTINGS = {"a": 1, "b": ["x"]}


def manifest(value: str = "1") -> dict[str, object]:
    return make_manifest(seed=3, device="cpu", packages=("torch",), hashes={"rows": value})


def test_a_setting_that_is_newer_than_the_run_has_its_default(tmp_path: Path) -> None:
    folder = open_run(tmp_path / "run", SETTINGS, manifest(), resume=False)
    newer = {**SETTINGS, "newer": 0.02}
    assert open_run(folder, newer, manifest(), resume=True, defaults={"newer": 0.02, "a": 99}) == folder
    with pytest.raises(InputError, match="^newer: 0.02 is not what the run in .* was started with"):
        open_run(folder, newer, manifest(), resume=True, defaults={"newer": 0.0})


def test_what_is_written(tmp_path: Path) -> None:
    folder = open_run(tmp_path / "run", SETTINGS, manifest(), resume=False)
    assert yaml.safe_load((folder / "config.yaml").read_text()) == SETTINGS
    stored = read_json(folder / "manifest.json")
    assert (stored["seed"], stored["device"], stored["hashes"], set(stored["versions"])) == (
        3, "cpu", {"rows": "1"}, {"torch"},
    )  # fmt: skip
    assert open_run(folder, SETTINGS, manifest(), resume=True) == folder


def test_several_processes_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="^processes: 2 were launched, and a run directory is written by one"):
        open_run(tmp_path / "run", SETTINGS, manifest(), resume=False)
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("WORLD_SIZE", "1")
    open_run(tmp_path / "run", SETTINGS, manifest(), resume=False)


def test_what_is_refused(tmp_path: Path) -> None:
    folder = open_run(tmp_path / "run", SETTINGS, manifest(), resume=False)
    with pytest.raises(InputError, match="out: .* holds a run already; give --resume"):
        open_run(folder, SETTINGS, manifest(), resume=False)
    with pytest.raises(InputError, match=r"a: 2 is not what the run in .* was started with \(1\)"):
        open_run(folder, {**SETTINGS, "a": 2}, manifest(), resume=True)
    with pytest.raises(InputError, match="resume: rows changed since the run in"):
        open_run(folder, SETTINGS, manifest("2"), resume=True)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(InputError, match="out: .* is not empty and holds no run"):
        open_run(tmp_path / "full", SETTINGS, manifest(), resume=True)


@pytest.mark.parametrize("text", [b"", b"- 1\n", b"a: b: c\n", b"\xff"])
def test_a_damaged_config_is_one_sentence(tmp_path: Path, text: bytes) -> None:
    folder = open_run(tmp_path / "run", SETTINGS, manifest(), resume=False)
    (folder / "config.yaml").write_bytes(text)
    with pytest.raises(InputError, match="out: .*config.yaml is damaged, so the run cannot go on; name a new folder"):
        open_run(folder, SETTINGS, manifest(), resume=True)


def test_a_seed_for_each_stage() -> None:
    assert len({stage_seed(seed, stage) for seed in (0, 1) for stage in ("sae", "answers")}) == 4
    assert stage_seed(0, "sae") == stage_seed(0, "sae")


def test_a_setting_or_an_input_that_the_run_did_not_know_is_a_change(tmp_path: Path) -> None:
    folder = open_run(tmp_path / "run", SETTINGS, manifest(), resume=False)
    with pytest.raises(InputError, match=r"^c: 3 is not what the run in .* was started with \(None\)"):
        open_run(folder, {**SETTINGS, "c": 3}, manifest(), resume=True)
    more = manifest()
    more["hashes"] = {"rows": "1", "sae": "2"}
    with pytest.raises(InputError, match="^resume: sae changed since the run in"):
        open_run(folder, SETTINGS, more, resume=True)
    more["hashes"] = {"rows": "1", "model": "3"}  # Of an earlier version, which did not record it.
    assert open_run(folder, SETTINGS, more, resume=True) == folder


def test_a_stage_s_seed_is_the_first_four_bytes_of_a_hash() -> None:
    digest = hashlib.sha256(b"9:sae").hexdigest()
    assert stage_seed(9, "sae") == int(digest[:8], 16) > 2**16


def test_a_run_killed_between_its_first_two_files_is_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object, **__: object) -> str:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("mechreward.rundir.yaml.safe_dump", killed)
        open_run(tmp_path / "run", SETTINGS, manifest(), resume=False)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["manifest.json"]
    (tmp_path / "run" / ".config.yaml.123.tmp").write_text("left by a kill that nothing catches")
    with pytest.raises(InputError, match="^out: .* is not empty and holds no run"):
        open_run(tmp_path / "run", SETTINGS, manifest("2"), resume=False)
    folder = open_run(tmp_path / "run", SETTINGS, manifest("2"), resume=True)
    assert yaml.safe_load((folder / "config.yaml").read_text()) == SETTINGS
    assert read_json(folder / "manifest.json")["hashes"] == {"rows": "2"}
