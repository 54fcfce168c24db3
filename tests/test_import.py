"""`import mechreward` is quick, imports nothing heavy, and its lazy attributes are all there."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

import mechreward

BUDGET_SECONDS = 0.5
HEAVY = (
    "accelerate altair datasets jinja2 jaxtyping math_verify numpy pandas peft pyarrow pydantic reasoning_gym sae_lens "
    "safetensors scipy sklearn statsmodels torch transformers trl"
).split()
PUBLIC = (
    "CompositeReward FeaturePack FeatureReward OutcomeReward load_model load_pack load_sae save_pack verifiers".split()
)


def import_times(statement: str) -> dict[str, float]:
    """Cumulative import time in seconds of every module that a fresh interpreter imports for `statement`."""
    command = [sys.executable, "-X", "importtime", "-c", statement]
    table = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    rows = re.findall(r"^import time:\s+\d+ \|\s+(\d+) \|\s+(\S+)$", table, flags=re.MULTILINE)
    return {module: int(microseconds) / 1e6 for microseconds, module in rows}


def test_import_is_quick_and_light() -> None:
    runs = [import_times("import mechreward") for _ in range(3)]
    assert min(run["mechreward"] for run in runs) < BUDGET_SECONDS
    assert {module.split(".")[0] for module in runs[0]} & set(HEAVY) == set()


def test_heavy_imports_would_be_seen() -> None:
    # The instrument itself: without this, a change in the table's format would make the test above pass for ever.
    times = import_times("import mechreward, numpy")
    assert {"mechreward", "numpy"} <= set(times)
    assert times["numpy"] > 0.005


@pytest.mark.parametrize("name", PUBLIC)
def test_lazy_attribute_resolves(name: str) -> None:
    assert name in dir(mechreward)
    assert getattr(mechreward, name).__name__.split(".")[-1] == name


def test_everything_listed_resolves() -> None:
    for name in dir(mechreward):
        getattr(mechreward, name)
    assert set(mechreward.__all__) <= set(dir(mechreward))


def test_lazy_attribute_is_the_rooms_own() -> None:
    from mechreward.reward import FeatureReward
    from mechreward.sae import load_sae

    assert mechreward.FeatureReward is FeatureReward
    assert mechreward.load_sae is load_sae


def test_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        mechreward.no_such_name  # noqa: B018


def test_version_is_the_distributions() -> None:
    from importlib.metadata import version

    assert mechreward.__version__ == version("mechreward")
