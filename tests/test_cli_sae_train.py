"""`mechreward sae train` as a user meets it: flags over a config file, what is printed, one sentence on bad input."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from mechreward.cli import main
from mechreward.files import read_jsonl

YAML = """
task: [tiny:easy]
limit: 20
layer: 1
expansion: 1
k: 7
tokens: 256
batch_size: 64
eval_every: 2
held_out_tokens: 40
"""


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["sae", "train", *arguments])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def test_config_under_flags_and_what_is_printed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from mechreward.sae import load_sae

    (tmp_path / "c.yaml").write_text(YAML)
    out = tmp_path / "sae"
    # A list of YAML is taken for a tuple without a word.
    warnings.simplefilter("error", UserWarning)
    flags = ("--config", str(tmp_path / "c.yaml"), "--out", str(out))
    code, said, _ = run(capsys, *flags, "--k", "5", "--own-answers", "1", "--max-new-tokens", "4")
    assert code == 0
    assert load_sae(out).k == 5
    points = read_jsonl(out / "metrics.jsonl")
    assert [point["step"] for point in points] == [2, 4]
    for point in points:
        assert f"FVU {point['fvu']:.4f}  L0 {point['l0']:.1f}  dead {point['dead_share']:.1%}" in said
    assert "128 -> 128 features, topk" in said
    assert f"on {40} held-out tokens" in said
    assert f"safetensors): {out}" in said
    assert str(out / "metrics.jsonl") in said
    code, _, error = run(capsys, *flags, "--k", "5", "--own-answers", "1", "--max-new-tokens", "4")
    assert (code, "give --resume" in error) == (2, True)
    code, again, _ = run(capsys, *flags, "--k", "5", "--own-answers", "1", "--max-new-tokens", "4", "--resume")
    assert (code, again.splitlines()[-3:]) == (0, said.splitlines()[-3:])


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        (("--layer", "1"), "text, task: neither was given"),
        (("--layer", "-1", "--task", "tiny:easy"), "layer: -1 is not allowed"),
        (("--layer", "1", "--task", "tiny:easy", "--k", "0"), "k: 0 is not allowed"),
        (
            ("--layer", "1", "--task", "tiny:easy", "--k", "2000"),
            "k: 2000 is not between 1 and the SAE's 1024 features",
        ),
        (("--layer", "1", "--text", "a.json"), "text: 'a.json' is a .json file; allowed are a .txt, .jsonl"),
        (("--layer", "1", "--text", "a.txt", "b.txt"), "text: there is no file a.txt"),
        (("--config", "none.yaml"), "config: there is no file none.yaml"),
    ],
)
def test_bad_flags(capsys: pytest.CaptureFixture[str], tmp_path: Path, flags: tuple[str, ...], sentence: str) -> None:
    code, _, error = run(capsys, *flags, "--out", str(tmp_path / "run"))
    assert (code, error.startswith("error "), len(error.strip().splitlines())) == (2, True, 1)
    assert sentence in error
    assert not (tmp_path / "run").exists()


def test_help_names_every_field(capsys: pytest.CaptureFixture[str]) -> None:
    from mechreward.recipe import SAERecipe

    code, said, _ = run(capsys, "--help")
    assert code == 0
    for name in SAERecipe.model_fields:
        assert "--" + name.replace("_", "-") in said
    with pytest.raises(SystemExit):
        main(["sae", "--help"])
    assert "train" in capsys.readouterr().out
