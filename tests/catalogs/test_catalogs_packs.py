"""Every pack of the catalogue: what is ours carries its gate, what is not says so, and the schema is up to date."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from mechreward.catalogs import SCHEMA, catalog_folder, catalog_names
from mechreward.features import FeaturePack, load_pack, unacceptable
from mechreward.files import read_json
from mechreward.gates import read_reported
from mechreward.reward import FeatureReward
from mechreward.sae import load_sae
from mechreward.tiny import SAE_FOLDER

ROOT = Path(__file__).parents[2]
OURS = ["tiny/reasoning_pack"]
THEIRS = {"qwen3.5-4b/reasoning_pack": (18, 2560, 40960), "qwen3.6-35b-a3b/reasoning_pack": (23, 2048, 32768)}


def test_the_catalogue() -> None:
    assert catalog_names() == sorted([*OURS, *THEIRS])


@pytest.mark.parametrize("name", OURS)
def test_our_packs_are_acceptable(name: str) -> None:
    pack, sae = load_pack(name), load_sae(SAE_FOLDER)
    assert unacceptable(pack, sae) == []
    assert pack.name == name and FeatureReward.from_pack(name, sae=sae).gate_passed
    assert pack.validation is not None
    gate = read_json(Path(str(catalog_folder().joinpath(f"{name}.gate1.json"))))
    judged = gate["rows"][0]
    assert (gate["spec_hash"], gate["verdict"]) == (pack.spec_hash, pack.validation.verdict)
    assert (judged["within_auroc"], judged["low"], judged["high"]) == (
        pack.validation.within_auroc, *pack.validation.interval
    )  # fmt: skip
    assert gate["n_questions"] == pack.validation.n_questions == 150
    assert pack.provenance["n_questions"] == 150 and pack.provenance["seed"] == gate["seed"]


@pytest.mark.parametrize("name", THEIRS)
def test_their_packs_are_marked(name: str) -> None:
    pack = load_pack(name)
    assert unacceptable(pack, reported=True) == []
    assert unacceptable(pack)[0].endswith("what is there is reported by its authors, not reproduced")
    assert pack.name == name and not pack.gate_passed and pack.validation is None
    assert (pack.sae.layer, pack.sae.d_model, pack.sae.d_sae) == THEIRS[name]
    assert sorted(f.weight for f in pack.features) == [-1.0] * 10 + [1.0] * 10
    assert all((f.effect or 0) * f.weight > 1 for f in pack.features)
    assert pack.reported is not None and pack.reported.reading == read_reported(pack.reported)


def test_our_reading_of_their_numbers() -> None:
    first, second = (load_pack(name).reported for name in THEIRS)
    assert first is not None and second is not None
    assert first.reading[0].startswith("11 of 100 answers were wrong") and "at most 0.542; 0.540" in first.reading[1]
    assert second.reading[0].startswith("57 of 100 answers were wrong") and "at most 0.858; 0.522" in second.reading[1]


def test_the_schema_is_up_to_date() -> None:
    """`mechreward pack schema --out src/mechreward/catalogs/pack.schema.json` writes it."""
    found = json.loads(catalog_folder().joinpath(SCHEMA).read_bytes())
    assert found == FeaturePack.model_json_schema()
    assert found["additionalProperties"] is False and "activation_threshold" in str(found["$defs"]["PackFeature"])


def test_the_template_is_a_pack_that_wants_only_its_gate() -> None:
    path = Path(str(catalog_folder().joinpath("TEMPLATE/pack.json")))
    assert unacceptable(load_pack(path)) == ["validation: Gate 1 has not judged the pack"]


LOAD = """
import mechreward as mr
from mechreward.features import catalog_names
from mechreward.sae import load_sae
from mechreward.tiny import SAE_FOLDER
print(mr.__file__)
for name in catalog_names():
    pack = mr.load_pack(name)
    print(name, len(pack.features), pack.status)
print(mr.FeatureReward.from_pack("tiny/reasoning_pack", sae=load_sae(SAE_FOLDER)).gate_passed)
"""


@pytest.mark.slow
def test_every_pack_loads_from_an_installed_wheel(tmp_path: Path) -> None:
    """Installed into an environment of its own, which borrows the dependencies alone; run from another folder."""
    source, wheels = tmp_path / "source", tmp_path / "wheels"
    shutil.copytree(ROOT / "src", source / "src", ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    build = [sys.executable, "-m", "pip", "wheel", ".", "--quiet", "--no-deps", "--no-build-isolation"]
    subprocess.run([*build, "--wheel-dir", str(wheels)], cwd=source, check=True, capture_output=True)
    venv.create(tmp_path / "venv", with_pip=False)
    [site] = (tmp_path / "venv").glob("lib/python*/site-packages")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", str(site)]
    subprocess.run([*install, str(next(wheels.glob("*.whl")))], check=True, capture_output=True)
    # Appended behind the environment's own packages: a .pth of plain paths, whose own .pth files (ours is editable)
    # are not read.
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    (site / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    python = tmp_path / "venv" / "bin" / "python"
    ran = subprocess.run([str(python), "-c", LOAD], cwd=tmp_path, check=True, capture_output=True, text=True)
    lines = ran.stdout.splitlines()
    assert lines[0].startswith(str(site))
    assert lines[1:] == [
        "qwen3.5-4b/reasoning_pack 20 reported by its authors, not reproduced",
        "qwen3.6-35b-a3b/reasoning_pack 20 reported by its authors, not reproduced",
        f"tiny/reasoning_pack {len(load_pack('tiny/reasoning_pack').features)} gate 1: pass",
        "True",
    ]
