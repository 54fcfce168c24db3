"""`mechreward discover` as a user meets it: files, exit codes, bad input in one sentence."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from mechreward.cli import main
from mechreward.features import discover, load_contrast, load_pack
from mechreward.models import load_model
from mechreward.rollout import Response, load_responses, prompt_hashes, save_responses
from mechreward.sae import SAE, SAEMeta, load_sae, save_sae
from mechreward.tiny import MODEL, SAE_FOLDER


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(["discover", *map(str, arguments)])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def responses() -> list[Response]:
    """Made-up answers of the bundled model; a right one ends in another token than a wrong one."""
    rng, rows = random.Random(0), []
    for question in range(20):
        prompt = tuple(rng.randrange(30, 90) for _ in range(5))
        for sample in range(6):
            right = sample % 2 == 0
            ids = (*(rng.randrange(30, 90) for _ in range(4)), 7 if right else 20)
            rows.append(Response(f"q{question}", sample, prompt, ids, "", (-1.0,) * 5, "eos", correct=right))
    return rows


def test_table_pack_and_comparison(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    save_responses(tmp_path / "r.parquet", responses())
    out = tmp_path / "run"
    code, text, error = run(
        capsys, "--responses", tmp_path / "r.parquet", "--pooling", "last", "--n-features", 5, "--out", out,
        "--permutations", 19,
    )  # fmt: skip
    assert code == 0, error
    assert "120 answers to 20 questions" in text and "logistic probe" in text and "pack.json" in text
    table, pack = load_contrast(out / "features.parquet"), load_pack(out / "pack.json")
    alone = discover(load_model(str(MODEL)), load_sae(SAE_FOLDER), responses(), pooling="last", permutations=19)
    pd.testing.assert_frame_equal(table.frame, alone.frame, check_flags=False)
    assert pack.feature_ids() == table.frame["id"][:5].tolist() and pack.pooling == "last" and pack.prompt is None
    record = json.loads((out / "discovery.json").read_text())
    assert [row["name"] for row in record["held_out"]] == ["SAE features", "difference of means", "logistic probe"]
    assert record["held_out"][0]["within"]["value"] > 0.9 and record["held_out"][0]["lead"] is None
    assert record["chance_effect"] == table.chance_effect and record["n_mixed"] == 20
    assert pack.found_on == list(prompt_hashes(r.prompt_ids for r in responses()))


def test_an_sae_of_another_model_is_said(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    save_responses(tmp_path / "r.parquet", responses())
    torch.manual_seed(0)
    own = load_sae(SAE_FOLDER)
    rotation_DD = torch.linalg.qr(torch.randn(own.d_model, own.d_model)).Q
    meta = replace(own.meta, model_name="other/model")
    other = replace(own, W_enc_DF=rotation_DD @ own.W_enc_DF, W_dec_FD=own.W_dec_FD @ rotation_DD.T, meta=meta)
    save_sae(other, tmp_path / "other")
    arguments = ("--responses", tmp_path / "r.parquet", "--pooling", "last", "--permutations", 0)
    said = "^sae: likely a wrong base model.*it says it was made for 'other/model'"
    with pytest.warns(UserWarning, match=said):
        run(capsys, *arguments, "--sae", tmp_path / "other", "--out", tmp_path / "wrong")
    recwarn.clear()
    run(capsys, *arguments, "--out", tmp_path / "right")
    assert not [each for each in recwarn if str(each.message).startswith("sae: ")]
    fits = [json.loads((tmp_path / name / "sae.json").read_text())["fvu"] for name in ("right", "wrong")]
    assert fits[0] < 0.2 and fits[1] > 0.5


def test_probe_method(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    save_responses(tmp_path / "r.parquet", responses())
    arguments = ("--responses", tmp_path / "r.parquet", "--pooling", "last", "--method", "probe", "--out", tmp_path)
    code, _, _ = run(capsys, *arguments, "--min-stability", "0.1", "--halves", 4, "--permutations", 0)
    assert code == 0
    table = load_contrast(tmp_path / "features.parquet")
    assert table.method == "probe" and 0 < (table.frame["effect"] != 0).sum() < 60
    assert json.loads((tmp_path / "discovery.json").read_text())["chance_effect"] is None
    assert load_pack(tmp_path / "pack.json").provenance["method"] == "probe"


def test_no_feature_passes(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    save_responses(tmp_path / "r.parquet", responses())
    (tmp_path / "pack.json").write_text("of an earlier run")
    code, text, _ = run(capsys, "--responses", tmp_path / "r.parquet", "--q-max", 0, "--out", tmp_path)
    assert code == 1
    assert "no pack: features: no feature passes q <= 0" in text and "they count as ties" in text
    assert (tmp_path / "features.parquet").exists() and not (tmp_path / "pack.json").exists()


def test_bad_input(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    save_responses(tmp_path / "r.parquet", responses())
    save_responses(tmp_path / "right.parquet", [replace(r, correct=True) for r in responses()])
    save_responses(tmp_path / "raw.parquet", [replace(r, correct=None) for r in responses()])
    meta = SAEMeta("other", "", 1, "other", "model.layers.1")
    other = SAE("relu", torch.ones(7, 3), torch.zeros(3), torch.ones(3, 7), torch.zeros(7), meta)
    save_sae(other, tmp_path / "sae")
    given = ("--responses", tmp_path / "r.parquet")
    for arguments, sentence in [
        ((), "questions: give either --questions, to be answered, or --responses"),
        ((*given, "--questions", "tiny:easy"), "questions: give either"),
        (("--responses", "none.parquet"), "responses: there is no file none.parquet"),
        (("--responses", tmp_path / "right.parquet"), "correct: all 120 answers are right"),
        (("--responses", tmp_path / "raw.parquet"), "correct: it is None in an answer to question q0"),
        ((*given, "--pooling", "median"), "error pooling: 'median' is not one of"),
        ((*given, "--pooling", "last_0"), "error pooling: 0 is not allowed; the last k tokens must be at least 1"),
        ((*given, "--method", "attribution", "--pooling", "max"), "pooling: 'max' is not allowed, method attribution"),
        ((*given, "--method", "attribution", "--words", "wait"), "words: ('wait',) is not allowed, method attribution"),
        ((*given, "--method", "reasonscore", "--min-each", "1"), "min_each: 1 is not allowed, method reasonscore"),
        ((*given, "--method", "reasonscore", "--permutations", "0"), "permutations: 0 is not allowed, method reason"),
        ((*given, "--words", "wait"), "words: ('wait',) is not allowed, method contrast has no use for it"),
        ((*given, "--method", "reasonscore", "--words", "on"), "words: ('on',) is not allowed, one word has no"),
        (("--questions", "tiny:easy", "--method", "reasonscore"), "words: the tokenizer cannot spell 'alternatively'"),
        ((*given, "--signs", "balanced", "--n-features", "1"), "n_features: 1 is not allowed, it must be at least 2"),
        ((*given, "--halves", "3"), "halves: 3 is not allowed"),
        ((*given, "--min-support", "2"), "min_support: 2.0 is not allowed"),
        ((*given, "--sae", tmp_path / "sae"), "reads residuals of width 7, but tiny has 128"),
        ((*given, "--sae", "./nowhere"), "sae: there is no file or folder ./nowhere"),
        ((*given, "--model", MODEL), "sae: is needed and was not given"),
        (("--questions", "tiny:easy", "--limit", "1"), "questions: 1 are too few; a cross-fitted contrast needs 3"),
        (("--questions", "tiny:nope"), "error questions: 'tiny:nope' is no setting of the tiny world"),
        (
            (*given, "--sae", "nowhere"),
            "error sae: there is no file or folder 'nowhere', and a release needs an sae_id",
        ),
    ]:
        code, _, error = run(capsys, *arguments, "--out", tmp_path / "run")
        assert code == 2, arguments
        assert sentence in error and error.startswith("error ") and len(error.strip().splitlines()) == 1
        assert not list((tmp_path / "run").glob("*")) if (tmp_path / "run").exists() else True


def test_answers_are_kept_though_there_is_nothing_to_contrast(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sampled = ("--questions", "tiny:easy", "--limit", "3", "--samples", "2", "--max-new-tokens", "4")
    code, said, error = run(capsys, *sampled, "--out", tmp_path)
    assert code == 2 and "correct: all 6 answers are wrong" in error
    kept = load_responses(tmp_path / "responses.parquet")
    assert [(response.sample, response.correct) for response in kept] == [(0, False), (1, False)] * 3
    assert str(tmp_path / "responses.parquet") in said.replace("\n", "")
