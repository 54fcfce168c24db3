"""The command line as a user meets it: exit codes, one sentence on bad input, the config file under the flags."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import mechreward
from mechreward.cli import main
from mechreward.cli.redteam_settings import RunSettings
from mechreward.cli.redteam_targets import of_run
from mechreward.features import load_pack, save_pack


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def questions(tmp_path: Path, rows: list[dict[str, str]]) -> str:
    path = tmp_path / "q.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


GOOD = [
    {"question": f"Ada has {20 + i} apples . how many apples does Ada have ?", "answer": str(20 + i)} for i in range(6)
]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--questions", "none.jsonl"), "none.jsonl"),
        (("--questions", "tiny:easy", "--verifier", "vibes"), "allowed are gsm8k_exact_match, math, choice, exact"),
        (("--questions", "tiny:easy", "--layer", "9", "--sae-k", "4"), "the model has blocks 0 to 4"),
        (("--questions", "tiny:easy", "--known", "1"), "known: 1.0 is not allowed (Input should be less than 1)"),
        (("--questions", "tiny:easy", "--samples", "1"), "samples: 1 is not allowed"),
        (("--config", "none.yaml"), "config: there is no file none.yaml"),
        (("--questions", "tiny:easy", "--out", "/dev/null/x"), "out: cannot write to the folder /dev/null/x"),
        (("--questions", "tiny:easy", "--limit", "1"), "leaves the unknown side empty"),
        (("--questions", "tiny:easy", "--temperature", "inf"), "temperature: inf is not allowed"),
        (("--questions", "tiny:easy", "--beta", "inf"), "beta: inf is not allowed"),
        (("--questions", "tiny:easy", "--limit", "9", "--chat"), "chat: the tokenizer of"),
        (("--questions", "tiny:easy", "--limit", "9", "--max-new-tokens", "9999"), "the model reads at most"),
    ],
)
def test_bad_flags(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: tuple[str, ...], sentence: str
) -> None:
    if "--out" not in arguments:
        arguments = (*arguments, "--out", str(tmp_path / "run"))
    code, _, error = run(capsys, "improve", *arguments)
    assert code == 2
    assert sentence in error
    assert error.startswith("error ")
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("rows", "sentence"),
    [
        ([{"q": "?", "answer": "1"}], "question"),
        ([GOOD[0], {"question": "how many ?", "answer": ""}], "answer"),
        ([{**GOOD[0], "id": "a"}, {**GOOD[1], "id": "a"}], "id"),
    ],
)
def test_bad_question_files(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, rows: list[dict[str, str]], sentence: str
) -> None:
    path = questions(tmp_path, rows)
    extra = ("--id-column", "id") if "id" in rows[0] else ()
    code, _, error = run(capsys, "improve", "--questions", path, *extra, "--out", str(tmp_path / "run"))
    assert code == 2
    assert error.startswith(f"error {sentence}")
    assert len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_sae_of_another_width(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import torch

    from mechreward.sae import SAE, SAEMeta, save_sae

    sae = SAE(
        architecture="relu",
        W_enc_DF=torch.ones(7, 3),
        b_enc_F=torch.zeros(3),
        W_dec_FD=torch.ones(3, 7),
        b_dec_D=torch.zeros(7),
        meta=SAEMeta("other", "", 1, "other", "model.layers.1"),
    )
    save_sae(sae, tmp_path / "sae")
    arguments = ("--questions", "tiny:easy", "--sae", str(tmp_path / "sae"), "--out", str(tmp_path / "run"))
    code, _, error = run(capsys, "improve", *arguments)
    assert code == 2
    assert "reads residuals of width 7, but tiny has width 128" in error
    assert not (tmp_path / "run").exists()


def test_config_file_lies_under_the_flags(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("questions: tiny:easy\nverifier: vibes\nlimit: 12\n")
    assert "'vibes'" in run(capsys, "improve", "--config", str(tmp_path / "c.yaml"))[2]
    code, _, error = run(capsys, "improve", "--config", str(tmp_path / "c.yaml"), "--verifier", "moods")
    assert (code, "'moods'" in error) == (2, True)
    (tmp_path / "c.yaml").write_text("questions: tiny:easy\nverifiers: exact\n")
    assert "verifiers: there is no such field" in run(capsys, "improve", "--config", str(tmp_path / "c.yaml"))[2]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"limit: abc\n", "limit: 'abc' is not allowed (Input should be a valid integer"),
        (b"limit: 0\n", "limit: 0 is not allowed (Input should be greater than or equal to 1)"),
        (b"arms: [dense, both]\n", "arms.1: 'both' is not allowed"),
        (b"generator_options: 3\n", "generator_options: 3 is not allowed"),
        (b"steps: 1\nlimit: 9\nsteps: 2\n", "is not valid YAML (line 3 gives 'steps' a second time)"),
        (b"generator_options: {a: 1, a: 2}\n", "is not valid YAML (line 1 gives 'a' a second time)"),
        (b"learning_rate: .inf\n", "learning_rate: inf is not allowed (Input should be a finite number)"),
        (b"\xff\xfe", "is not UTF-8 text (byte 0)"),
        (b"model: 2026-02-30\n", "is not valid YAML (day is out of range for month)"),
        (b"", "is empty; write a field a line"),
        (b"- 1", "holds list, where a mapping of fields is needed"),
    ],
)
def test_bad_config_files(capsys: pytest.CaptureFixture[str], tmp_path: Path, text: bytes, sentence: str) -> None:
    (tmp_path / "c.yaml").write_bytes(text)
    code, _, error = run(capsys, "improve", "--config", str(tmp_path / "c.yaml"), "--questions", "tiny:easy")
    assert (code, sentence in error, len(error.strip().splitlines())) == (2, True, 1)


def test_a_folder_is_no_config_file(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, error = run(capsys, "improve", "--config", str(tmp_path))
    assert (code, error) == (2, f"error config: cannot read {tmp_path} (Is a directory); name a YAML file\n")


def test_paths_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mechreward.cli.options import parse_settings
    from mechreward.config import ImproveConfig

    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("questions: tiny:easy\nout: ~/runs/x\n")
    config = parse_settings(ImproveConfig, ["--config=~/c.yaml"], "improve")
    assert config.out == tmp_path / "runs" / "x"
    assert parse_settings(ImproveConfig, ["--questions", "q", "--out=~/y"], "improve").out == tmp_path / "y"


def test_bad_questions_name_the_setting(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    asked = questions(tmp_path, [{"problem": "Capital of France?", "gold": "Paris"}])
    out = ("--out", str(tmp_path / "run"))
    for verb in ("improve", "eval", "discover"):
        code, _, error = run(capsys, verb, "--questions", asked, *out)
        assert (code, error.startswith("error question_column: there is no column 'question' in line 1")) == (2, True)
        columns = ("--question-column", "problem", "--answer-column", "gold")
        code, said, error = run(capsys, verb, "--questions", asked, *columns, *out)
        assert (code, error.startswith("error answer: 'Paris' is not a number")) == (2, True)
        assert "ask 1" not in said and "sample" not in said
        assert not (tmp_path / "run" / "config.yaml").exists()
    code, _, error = run(capsys, "sae", "train", "--layer", "1", "--task", asked, *out)
    assert (code, error.startswith("error question_column: there is no column")) == (2, True)


@pytest.mark.parametrize("verb", ["improve", "eval", "discover"])
def test_another_split_of_a_dataset(capsys: pytest.CaptureFixture[str], tmp_path: Path, verb: str) -> None:
    (tmp_path / "data").mkdir()
    Path(questions(tmp_path, GOOD)).rename(tmp_path / "data" / "train.jsonl")
    asked = ("--questions", str(tmp_path / "data"), "--out", str(tmp_path / "run"), "--max-new-tokens", "9999")
    assert "(split 'test') cannot be loaded as a Hugging Face dataset" in run(capsys, verb, *asked)[2]
    assert "the model reads at most" in run(capsys, verb, *asked, "--split", "train")[2]


@pytest.mark.filterwarnings("error")
def test_config_values_become_their_fields_types(tmp_path: Path) -> None:
    from mechreward.cli.options import parse_settings
    from mechreward.config import ImproveConfig

    # YAML reads 1e-5 as text; tyro, given text where a number belongs, warns.
    (tmp_path / "c.yaml").write_text("questions: tiny:easy\nlearning_rate: 1e-5\narms: [dense, outcome]\nout: runs/x\n")
    config = parse_settings(ImproveConfig, ["--config", str(tmp_path / "c.yaml"), "--steps", "3"], "improve")
    assert (config.learning_rate, config.arms, config.out, config.steps) == (
        1e-5,
        ("dense", "outcome"),
        Path("runs/x"),
        3,
    )


def test_gate_not_passed_is_exit_code_1(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    arguments = (
        "--questions",
        "tiny:easy",
        "--limit",
        "8",
        "--known",
        "0.5",
        "--max-new-tokens",
        "96",
        "--out",
        str(out),
    )
    code, said, _ = run(capsys, "improve", *arguments)
    assert code == 1
    assert "Nothing was trained." in said
    assert str(out / "report.html") in said


def test_train_ends_with_0_and_says_where_the_policy_is(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    short = "--limit 6 --steps 1 --eval-samples 1 --questions-per-step 1 --generations 2 --max-new-tokens 20".split()
    save_pack(load_pack("tiny/reasoning_pack").model_copy(update={"validation": None}), tmp_path / "pack.json")
    given = ("--pack", str(tmp_path / "pack.json"), "--questions", "tiny:easy", *short, "--out", str(out))
    code, _, error = run(capsys, "train", *given)
    assert code == 2 and error.endswith("train with it all the same with --ungated\n")
    code, said, _ = run(capsys, "train", *given, "--ungated")
    assert code == 0, "no gate was run here, so none has failed"
    assert f"policy (dense): {out}/checkpoints/dense/checkpoint-1\n" in said and f"report: {out}/report.html" in said
    assert run(capsys, "train", "--questions", "tiny:easy")[0] == 2
    settings = RunSettings(run=out, limit=1)
    assert list(of_run(settings).models) == ["before", "dense"]


def test_unknown_command_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, error = run(capsys, "imporve")
    assert (code, "'imporve' is not one of demo, improve" in error) == (2, True)
    code, said, _ = run(capsys)
    assert (code, "improve" in said) == (0, True)
    for verb in ("improve", "demo", "report", "info"):
        assert run(capsys, verb, "--help")[0] == 0


def test_sae_info_and_pack_show(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from mechreward.features import FeaturePack, PackFeature, sae_ref, save_pack
    from mechreward.sae import load_sae
    from mechreward.tiny import SAE_FOLDER

    code, said, _ = run(capsys, "sae", "info", str(SAE_FOLDER))
    assert (code, "128 -> 1024 features" in said) == (0, True)
    features = [PackFeature(id=5, weight=1.0, scale=2.0)]
    sae = sae_ref(load_sae(SAE_FOLDER))
    pack = FeaturePack(name="tiny/one", version="1", model_name="tiny", sae=sae, features=features)
    save_pack(pack, tmp_path / "pack.json")
    code, said, _ = run(capsys, "pack", "show", str(tmp_path / "pack.json"))
    assert (code, "gate 1: not run" in said) == (0, True)


def test_report_of_no_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, error = run(capsys, "report", str(tmp_path))
    assert code == 2
    assert str(tmp_path) in error


def sae_at(tmp_path: Path, layer: int) -> str:
    """The bundled SAE, as a file that says it reads another block."""
    from dataclasses import replace

    from mechreward.sae import load_sae, save_sae
    from mechreward.tiny import SAE_FOLDER

    sae = load_sae(SAE_FOLDER)
    save_sae(replace(sae, meta=replace(sae.meta, layer=layer, hook_name=f"model.layers.{layer}")), tmp_path / "moved")
    return str(tmp_path / "moved")


def test_sae_check(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from mechreward.tiny import SAE_FOLDER

    ask = ("--questions", "tiny:easy", "--limit", "6", "--max-new-tokens", "48")
    code, said, _ = run(capsys, "sae", "check", str(SAE_FOLDER), *ask)
    assert (code, "no finding" in said, "finding likely" in said) == (0, True, False)
    moved = sae_at(tmp_path, 4)
    code, said, _ = run(capsys, "sae", "check", moved, *ask)
    assert code == 1
    assert "finding likely a wrong layer: " in said and "on block 2 than on block 4" in said
    # The configuration file names the SAE; the flag --json leaves nothing but JSON.
    (tmp_path / "c.yaml").write_text(f"sae: {moved}\nquestions: tiny:easy\nlimit: 6\nmax_new_tokens: 48\n")
    code, said, _ = run(capsys, "sae", "check", "--config", str(tmp_path / "c.yaml"), "--json")
    record = json.loads(said)
    assert code == 1 and record["layer"] == 4 and record["findings"][0].startswith("likely a wrong layer: ")
    assert min(record["fvu_by_layer"], key=record["fvu_by_layer"].get) == "2"
    assert record["n_tokens"] > 6 * 48  # the prompts' tokens as well as those of six answers


def test_sae_check_on_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from mechreward.tiny import SAE_FOLDER

    (tmp_path / "t.txt").write_text("\n\n".join(row["question"] for row in GOOD))
    code, said, _ = run(capsys, "sae", "check", str(SAE_FOLDER), "--text", str(tmp_path / "t.txt"), "--json")
    # 6 texts of 13 tokens behind BOS, which is not read.
    record = json.loads(said)
    assert (code, record["n_tokens"], list(record["fvu_by_layer"])) == (0, 78, ["0", "1", "2", "3", "4"])


def test_sae_check_of_a_file_that_says_neither_layer_nor_k(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file

    from mechreward.tiny import SAE_FOLDER

    own = load_file(SAE_FOLDER / "sae_weights.safetensors")
    torch.save({**own, "d_model": own["b_dec"].numel()}, tmp_path / "sae_final.pt")
    ask = ("sae", "check", str(tmp_path), "--questions", "tiny:easy", "--limit", "6", "--max-new-tokens", "48")
    code, _, error = run(capsys, *ask, "--k", "16")
    assert code == 2 and "say it with layer=" in error
    k = str(json.loads((SAE_FOLDER / "cfg.json").read_text())["k"])
    code, said, _ = run(capsys, *ask, "--layer", "2", "--k", k)
    assert (code, "no finding" in said) == (0, True)


@pytest.mark.parametrize(
    "arguments",
    [
        ("discover", "--responses", "r.parquet"),
        ("gate", "--responses", "r.parquet", "--pack", "tiny/reasoning_pack"),
        ("eval", "--questions", "tiny:easy", "--limit", "2", "--fuzz", "--pack", "tiny/reasoning_pack"),
        ("features", "show", "--ids", "3", "--responses", "r.parquet"),
        ("steer", "inspect", "Ada has 12 apples ."),
        ("steer", "generate", "--questions", "tiny:easy", "--features", "3"),
        ("steer", "sweep", "--questions", "tiny:easy", "--features", "3"),
        ("steer", "repair", "--questions", "tiny:easy", "--limit", "4"),
        ("redteam", "--questions", "tiny:easy", "--pack", "tiny/reasoning_pack", "--out", "red.json"),
        ("serve", "--pack", "tiny/reasoning_pack"),
    ],
    ids=lambda arguments: "-".join(arguments[:2]),
)
def test_every_verb_hands_the_layer_and_k_of_an_sae_on(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...]
) -> None:
    import torch
    from safetensors.torch import load_file

    from mechreward.rollout import Response, save_responses
    from mechreward.tiny import SAE_FOLDER

    monkeypatch.chdir(tmp_path)
    save_responses(Path("r.parquet"), [Response("q", 0, (5,), (6,), "12", (-1.0,), "eos", correct=True)])
    own = load_file(SAE_FOLDER / "sae_weights.safetensors")
    torch.save({**own, "d_model": own["b_dec"].numel()}, "sae_final.pt")
    for flags, sentence in (
        ((), "say it with layer="),
        (("--layer", "2"), "say it with k="),
        (("--layer", "2", "--k", "99999"), "k: 99999"),
    ):
        code, _, error = run(capsys, *arguments, "--sae", "sae_final.pt", *flags)
        assert code == 2 and sentence in error and len(error.strip().splitlines()) == 1


def test_sae_check_of_an_sae_of_another_width(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    import torch

    from mechreward.sae import SAE, SAEMeta, save_sae

    weights = (torch.ones(7, 3), torch.zeros(3), torch.ones(3, 7), torch.zeros(7))
    save_sae(SAE("relu", *weights, SAEMeta("other", "", 1, "other", "model.layers.1")), tmp_path / "sae")
    code, _, error = run(capsys, "sae", "check", str(tmp_path / "sae"), "--questions", "tiny:easy", "--limit", "2")
    assert code == 2
    assert "sae: it reads residuals of width 7, but" in error and "has width 128" in error
    assert len(error.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("check", "none"), "questions: give either --questions or --text"),
        (("check", "--questions", "tiny:easy"), "sae"),
        (("check", "/none", "--questions", "tiny:easy"), "/none"),
        (("layers",), "questions: give either --questions"),
        (("layers", "--questions", "tiny:easy", "--responses", "x.parquet"), "questions: give either --questions"),
        (("layers", "--responses", "none.parquet"), "responses: there is no file none.parquet"),
        (
            ("layers", "--questions", "tiny:easy", "--layers", "1", "7"),
            "layer: 7 is out of range; the model has blocks",
        ),
        (("layers", "--questions", "tiny:easy", "--limit", "9"), "questions: 9 are too few; a layer sweep needs 10"),
        (("layers", "--questions", "tiny:easy", "--samples", "1"), "samples: 1 is not allowed"),
        (("layers", "--questions", "tiny:easy", "--verifier", "vibes"), "allowed are gsm8k_exact_match"),
        (("layers", "--questions", "tiny:easy", "--out", "/dev/null/x/y.json"), "out: cannot write to the folder"),
    ],
)
def test_bad_flags_of_sae(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], sentence: str) -> None:
    code, said, error = run(capsys, "sae", *arguments)
    assert code == 2
    assert sentence in error
    assert "sample" not in said  # found before any work is spent


def test_sae_layers(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from mechreward.models import load_model
    from mechreward.rollout import sample_responses, save_responses, verify_responses
    from mechreward.tasks import load_questions
    from mechreward.tiny import MODEL
    from mechreward.verifiers import gsm8k_exact_match

    out = tmp_path / "deep" / "layers.json"
    ask = ("--questions", "tiny:easy", "--limit", "24", "--samples", "5", "--max-new-tokens", "96", "--seed", "3")
    code, said, _ = run(capsys, "sae", "layers", *ask, "--layers", "2", "0", "--out", str(out))
    assert code == 0
    record = json.loads(out.read_text())
    within = {(p["layer"], p["position"]): p["within"]["value"] for p in record["probes"]}
    assert within[2, "step end"] > 0.95 > 0.75 > within[0, "step end"]
    assert record["best"]["layer"] == 2 and record["verdict"] in said.replace("\n", " ")
    (best,) = [line for line in said.splitlines() if "<- best" in line]
    assert best.split()[0] == "2" and "mean log-probability" in said and str(out) in said
    # The same answers from a file.
    loaded, questions = load_model(str(MODEL)), load_questions("tiny:easy", limit=24, seed=3)
    responses = sample_responses(loaded, questions, n=5, max_new_tokens=96, seed=3)
    save_responses(tmp_path / "r.parquet", verify_responses(responses, questions, gsm8k_exact_match))
    again = ("--responses", str(tmp_path / "r.parquet"), "--seed", "3", "--layers", "0", "2", "--out", str(out))
    assert run(capsys, "sae", "layers", *again)[0] == 0
    assert json.loads(out.read_text()) == record


def test_help_comes_before_the_libraries_that_train() -> None:
    """In a process of its own: here torch is loaded already."""
    code = """
import sys
from mechreward.cli.main import main
alone = "demo improve discover gate train eval redteam report info".split()
grouped = {"sae": "train check layers info", "steer": "inspect generate sweep repair", "pack": "list"}
grouped["features"] = "show"
for verb in alone + [f"{group} {verb}" for group, verbs in grouped.items() for verb in verbs.split()]:
    try:
        main([*verb.split(), "--help"])
    except SystemExit as ended:
        assert ended.code in (0, None), verb
    heavy = {"torch", "transformers", "scipy", "sklearn", "pandas"} & set(sys.modules)
    assert not heavy, (verb, heavy)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-500:]
    assert done.stdout.count("usage: mechreward") == 19


def test_the_version_and_the_module(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"{mechreward.__version__}\n"
    done = subprocess.run([sys.executable, "-m", "mechreward", "nothing"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stderr.startswith("error command: 'nothing' is not one of")


def test_a_wrong_column_is_named_by_its_option(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"question": "1 + 1 ?", "answer": "2"}) + "\n")
    with pytest.raises(SystemExit):
        main(["eval", "--questions", str(path), "--answer-column", "gold", "--out", str(tmp_path / "out")])
    assert capsys.readouterr().err.startswith("error answer_column: ")
