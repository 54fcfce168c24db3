"""`mechreward redteam` on the bundled reasoner."""

from __future__ import annotations

import json

import pytest
import torch

from mechreward.cli.main import main
from mechreward.features import FeaturePack, PackFeature, sae_ref, save_pack
from mechreward.hacking import red_team
from mechreward.models import load_model
from mechreward.reward import FeatureReward
from mechreward.sae import load_sae
from mechreward.tasks import load_questions
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
    common = ("--pack", pack, "--sae", SAE_FOLDER, "--questions", "tiny:easy", "--limit", 6, "--samples", 2)
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


def test_bad_input(pack, tmp_path, capsys) -> None:
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"question": "Is it ?"}) + "\n")
    common = ("--pack", pack, "--sae", SAE_FOLDER, "--out", tmp_path / "o.json")
    assert run(*common, "--questions", path) == 2
    assert "answer" in capsys.readouterr().err
    assert not (tmp_path / "o.json").exists()
