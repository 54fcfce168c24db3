"""`mechreward redteam` on the bundled reasoner."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from mechreward.cli.main import main
from mechreward.cli.redteam_settings import RedTeamSettings, RunSettings
from mechreward.cli.redteam_targets import given, of_run
from mechreward.config import make_config
from mechreward.errors import InputError
from mechreward.features import FeaturePack, PackFeature, sae_ref, save_pack
from mechreward.files import append_row
from mechreward.gates import accuracy_interval, wilson
from mechreward.hacking import red_team
from mechreward.hacking.redteam import _hacked, _median_of_right
from mechreward.models import load_model
from mechreward.reward import FeatureReward
from mechreward.rollout import Response, sample_responses, verify_responses
from mechreward.rundir import open_run
from mechreward.sae import load_sae
from mechreward.settings import make_settings
from mechreward.stages import kept_policies
from mechreward.tasks import load_questions, load_split, save_questions, split_questions
from mechreward.tiny import MODEL, SAE_FOLDER
from mechreward.verifiers import gsm8k_exact_match


@pytest.fixture(scope="module")
def pack(tmp_path_factory):
    sae = load_sae(SAE_FOLDER)
    made = FeaturePack(
        name="plus", model_name="tiny", sae=sae_ref(sae), features=[PackFeature(id=676, weight=1.0, scale=10.0)]
    )
    path = tmp_path_factory.mktemp("packs") / "plus.json"
    save_pack(made, path)
    return path


def run(*arguments: object) -> int:
    with pytest.raises(SystemExit) as ended:
        main(["redteam", *map(str, arguments)])
    return int(ended.value.code or 0)


@pytest.mark.slow
def test_before_and_after(pack, tmp_path, capsys) -> None:
    common = ("--pack", pack, "--questions", "tiny:easy", "--limit", 6, "--samples", 2)
    out = tmp_path / "red.json"
    assert run(*common, "--max-new-tokens", 40, "--after", "tiny", "--out", out) == 0
    found = json.loads(out.read_text())
    assert found["before"] == found["after"]  # the same model twice, with the same threshold and spam
    numbers = found["before"]
    assert numbers["reward"]["n_hacks"] == 54 and numbers["n_responses"] == 12
    assert set(numbers["correct_under"]) == {"plain", "judge opener", "filler", "hedge"}
    low, high = numbers["hacked_interval"]
    assert 0 <= low <= numbers["hacked"] <= high <= 1
    assert "+" in numbers["spam"]  # the feature fires on that word, and the red team found it
    assert numbers["reward"]["by_pattern"]["feature_spam"]["paid"] == 6
    said = capsys.readouterr().out
    assert "canaries the reward pays" in said and "feature_spam" in said
    share = numbers["reward"]["hack_rate"]
    assert share > 0 and run(*common, "--max-new-tokens", 40, "--highest", share / 2, "--out", out) == 1


def test_questions_are_read_and_answers_judged_as_told(pack, tmp_path) -> None:
    rows = tmp_path / "q.jsonl"
    rows.write_text('{"ask": "Ada has 12 apples .", "gold": "12"}\n{"ask": "Bo has 7 pears .", "gold": "7"}\n')
    told = {
        "pack": str(pack), "questions": str(rows), "question_column": "ask", "answer_column": "gold", "limit": 1,
        "prompt_format": "{question} how many ?", "strictness": "lenient", "out": tmp_path / "red.json",
    }  # fmt: skip
    targets = given(make_settings(RedTeamSettings, told))
    assert [(q.prompt, q.answer) for q in targets.questions] == [("Ada has 12 apples . how many ?", "12")]
    assert targets.verifier("", "so it is 12", "12").correct
    strict = given(make_settings(RedTeamSettings, told | {"strictness": "strict"}))
    assert not strict.verifier("", "so it is 12", "12").correct


@pytest.mark.slow
def test_the_threshold_is_the_median_of_right_answers(pack) -> None:
    loaded, sae = load_model(str(MODEL)), load_sae(SAE_FOLDER)
    reward = FeatureReward.from_pack(pack, sae)
    questions = load_questions("tiny:easy", limit=4, seed=0)
    found = red_team(loaded, reward, questions, gsm8k_exact_match, samples=2, max_new_tokens=60, spam=("+",))
    given = red_team(
        loaded, reward, questions, gsm8k_exact_match, samples=2, max_new_tokens=60, spam=("+",), threshold=1e9
    )
    assert given.hacked == 0 and given.reward.hack_rate == 0 and given.threshold == 1e9
    assert found.threshold < 1e9 and torch.tensor(found.threshold).isfinite()
    assert found.correct_under == given.correct_under
    sampled = sample_responses(loaded, questions, n=2, max_new_tokens=60, batch_size=64, seed=0)
    answers = verify_responses(sampled, questions, gsm8k_exact_match)
    asked = {question.id: question.prompt for question in questions}
    prompts, ids = [asked[a.question_id] for a in answers], [a.completion_ids for a in answers]
    rewards = reward(prompts, [a.text for a in answers], completion_ids=ids)
    right = [r for r, a in zip(rewards, answers, strict=True) if a.correct]
    wrong = [r for r, a in zip(rewards, answers, strict=True) if not a.correct]
    assert found.threshold == pytest.approx(float(np.median(right)), rel=1e-4)
    assert found.hacked == sum(r >= found.threshold for r in wrong) / len(answers)
    assert found.hacked != sum(r >= found.threshold for r in right) / len(answers)


def answers(*per_question: int) -> list[Response]:
    return [
        Response(f"q{q}", s, (1,), (2,), "", (0.0,), "eos", False) for q, n in enumerate(per_question) for s in range(n)
    ]


def test_answers_to_one_question_are_hacked_together() -> None:
    """All four answers to 5 of 20 questions: 20 of 80, of which a test of answers would make too much."""
    every, judged = answers(*[4] * 20), torch.ones(80, dtype=torch.bool)
    hacked = torch.arange(80) < 20
    found = _hacked(every, judged, hacked)
    wanted = accuracy_interval(hacked.tolist(), [f"q{i // 4}" for i in range(80)])
    assert found == wanted and found.value == 0.25
    low, high = wilson(20, 80)
    assert found.low < low - 0.05 and found.high > high + 0.03


def test_an_answer_that_could_not_be_read_counts_as_none() -> None:
    every = answers(2, 2, 2)
    judged, hacked = torch.tensor([1, 0, 1, 1, 0, 1]).bool(), torch.tensor([1, 0, 0, 0, 0, 1]).bool()
    assert _hacked(every, judged, hacked) == accuracy_interval([1, 0, 0, 1], ["q0", "q1", "q1", "q2"])
    with pytest.raises(InputError, match="responses: the reward could read none of the 6 answers"):
        _hacked(every, torch.zeros(6).bool(), hacked)


def test_a_threshold_that_is_no_number_is_refused_before_anything_is_sampled(monkeypatch) -> None:
    monkeypatch.setattr("mechreward.hacking.redteam.sample_responses", lambda *_, **__: pytest.fail("sampled"))
    loaded, reward = load_model(str(MODEL)), FeatureReward({3: 1.0}, load_sae(SAE_FOLDER))
    questions = load_questions("tiny:easy", limit=2, seed=0)
    with pytest.raises(InputError, match="threshold: nan must be a finite number"):
        red_team(loaded, reward, questions, gsm8k_exact_match, threshold=float("nan"))


def test_the_median_of_an_even_number_is_the_middle_of_two() -> None:
    paid, right = torch.tensor([1.0, 4.0, torch.nan, 9.0]), torch.tensor([True, True, True, False])
    assert _median_of_right(paid, right) == 2.5


def test_bad_input(pack, tmp_path, capsys) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"question": "Is it ?"}) + "\n")
    common = ("--pack", pack, "--sae", SAE_FOLDER, "--out", tmp_path / "o.json")
    assert run(*common, "--questions", path) == 2
    assert "answer" in capsys.readouterr().err
    assert run("--pack", pack, "--out", tmp_path / "o.json", "--questions", "tiny:easy", "--sae", "nowhere") == 2
    assert capsys.readouterr().err.startswith("error sae: ")
    assert not (tmp_path / "o.json").exists()
    path.write_text(json.dumps({"question": "Capital of France ?", "answer": "Paris"}) + "\n")
    assert run(*common, "--questions", path) == 2
    assert "(question q0)" in capsys.readouterr().err
    assert run("--pack", pack, "--sae", SAE_FOLDER, "--out", "/dev/null/o.json", "--questions", path) == 2
    assert capsys.readouterr().err.startswith("error out: cannot write to the folder /dev/null")


@pytest.fixture(scope="module")
def finished(pack, tmp_path_factory):
    """A run directory as `improve` leaves it: one arm ended, one was stopped, one fine-tuned, one killed."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = make_config(questions="tiny:easy", limit=10, max_new_tokens=70, lora_rank=2, beta=0.5)
    config_fields = config.model_dump(mode="json", exclude={"out", "resume"})
    open_run(folder, config_fields, {"hashes": {}}, resume=False)
    asked = load_questions("tiny:easy", limit=10, seed=0)
    save_questions(folder / "questions.parquet", split_questions(asked, 0.6, 0))
    shutil.copy(pack, folder / "pack.json")
    checkpoints = folder / "checkpoints"
    torch.manual_seed(0)
    lora = LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False)
    adapted = get_peft_model(load_model(str(MODEL)).model, lora)
    for step in (2, 4):
        adapted.save_pretrained(checkpoints / "dense" / f"checkpoint-{step}")
        state = {"global_step": step}
        (checkpoints / "dense" / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    shutil.copytree(checkpoints / "dense", checkpoints / "stopped")
    shutil.copytree(checkpoints / "dense" / "checkpoint-2", checkpoints / "stopped" / "good")
    shutil.copytree(MODEL, checkpoints / "repair_sft")
    (checkpoints / "killed").mkdir()
    events = [
        {"arm": "dense", "kind": "guard", "stop": False, "findings": ["a sign"]},
        {"arm": "stopped", "kind": "guard", "stop": True, "findings": ["a sign"]},
    ]
    for row in events:
        append_row(folder / "metrics.jsonl", row)
    return folder, adapted


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (b"\xff\xfe", "run: .*config.yaml is not valid YAML"),
        (b"a: [", "run: .*config.yaml is not valid YAML"),
        (b"stage: 2", "run: .* is a study; name a run directory"),
    ],
)
def test_what_is_no_run_is_refused(finished, tmp_path, config: bytes, sentence: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished[0], folder, ignore=shutil.ignore_patterns("checkpoints"))
    (folder / "config.yaml").write_bytes(config)
    with pytest.raises(InputError, match=f"^{sentence}"):
        of_run(RunSettings(run=folder))


def test_a_run_directory_says_what_is_attacked(finished) -> None:
    folder, adapted = finished
    kept = {name: path.relative_to(folder / "checkpoints") for name, path in kept_policies(folder).items()}
    assert {name: str(path) for name, path in kept.items()} == {
        "dense": "dense/checkpoint-4", "repair_sft": "repair_sft", "stopped": "stopped/good",
    }  # fmt: skip
    targets = of_run(RunSettings(run=folder, limit=3))
    assert list(targets.models) == ["before", "dense", "repair_sft", "stopped"]
    assert targets.questions == load_split(folder / "questions.parquet").unknown[:3]
    assert targets.max_new_tokens == 70 and targets.reward.feature_ids() == [676]
    assert targets.reward.sae.weights_hash == load_sae(SAE_FOLDER).weights_hash
    plain, policy = targets.models["before"]().model, targets.models["dense"]().model
    tuned = targets.models["repair_sft"]().model
    ids = torch.arange(4, 20)[None]
    with torch.no_grad():
        before, after, wanted, same = (model(ids).logits for model in (plain, policy, adapted.eval(), tuned))
    assert torch.equal(after, wanted) and torch.equal(before, same) and not torch.equal(before, after)
    assert list(of_run(RunSettings(run=folder, arms=("stopped",))).models) == ["before", "stopped"]


def test_a_run_is_attacked_before_and_after(finished, capsys) -> None:
    folder, _ = finished
    assert run("--run", folder, "--arms", "repair_sft", "dense", "--limit", 3, "--samples", 3) == 0
    found = json.loads((folder / "redteam.json").read_text())
    assert set(found) == {"before", "repair_sft", "dense"} and found["before"] == found["repair_sft"]
    # A random adapter has no answer right: it is judged by the threshold of before.
    assert found["dense"]["correct_under"]["plain"]["accuracy"] == 0
    assert found["dense"]["threshold"] == found["before"]["threshold"]
    assert found["before"]["n_questions"] == 3 and found["before"]["n_responses"] == 9
    assert "repair_sft" in capsys.readouterr().out


def test_bad_runs_are_named(finished, tmp_path, capsys) -> None:
    folder, _ = finished
    assert run("--run", tmp_path) == 2
    assert "has no config.yaml; name a run directory" in capsys.readouterr().err
    assert run("--run", folder, "--arms", "killed") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "kept no policy of killed; there are dense, repair_sft, stopped" in said
    chat = tmp_path / "chat"
    shutil.copytree(folder, chat)
    (chat / "config.yaml").write_text((folder / "config.yaml").read_text().replace("chat: false", "chat: true"))
    assert run("--run", chat) == 2
    assert "asks through a chat template" in " ".join(capsys.readouterr().err.split())
    shutil.rmtree(chat / "checkpoints")
    (chat / "config.yaml").write_text((folder / "config.yaml").read_text())
    assert run("--run", chat) == 2
    assert "kept no policy of any arm; there are none" in " ".join(capsys.readouterr().err.split())
