"""Where each setting of the main job arrives: which questions, seeds and options every stage is called with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest

from mechreward import pipeline, stages
from mechreward.config import make_config
from mechreward.features import ContrastTable, FeaturePack, load_pack
from mechreward.files import read_json, read_jsonl
from mechreward.inputs import Inputs
from mechreward.models import LoadedModel
from mechreward.reward import FeatureReward
from mechreward.rollout import Response, load_responses, save_responses
from mechreward.rundir import stage_seed
from mechreward.sae import SAE, load_sae
from mechreward.tasks import Question, QuestionSplit, split_questions
from mechreward.tiny import SAE_FOLDER
from mechreward.verifiers import gsm8k_exact_match

SETTINGS: dict[str, Any] = {
    "questions": "tiny:easy", "samples": 3, "eval_samples": 2, "max_new_tokens": 7, "temperature": 0.7, "batch_size": 5,
    "chat": True, "seed": 9, "pooling": "last_4", "n_features": 6, "signs": "balanced", "dense_weight": 0.4,
    "credit": "potential", "gamma": 0.8, "step_end": ".", "steps": 12, "questions_per_step": 3, "generations": 4,
    "learning_rate": 2e-4, "beta": 0.5, "lora_rank": 2, "eval_every": 4, "save_every": 3,
}  # fmt: skip


@pytest.fixture(scope="module")
def sae() -> SAE:
    return load_sae(str(SAE_FOLDER))


@pytest.fixture(scope="module")
def pack() -> FeaturePack:
    return load_pack("tiny/reasoning_pack")


@pytest.fixture
def inputs(tiny_llama, char_tokenizer, sae: SAE, tmp_path: Path) -> Inputs:
    sides = ([Question(f"{side}{i}", f"{side} {i}", "1") for i in range(8)] for side in ("k", "u"))
    config = make_config(**SETTINGS, out=tmp_path / "run")
    return Inputs(
        config, QuestionSplit(*sides), gsm8k_exact_match, LoadedModel(tiny_llama, char_tokenizer, "m"), 2, sae
    )


def answers(questions: Sequence[Question], right: int) -> list[Response]:
    """One to each question, the first so many of them right."""
    return [
        Response(q.id, 0, (0, 5), (9, 1), "a", (-1.0, -1.0), "eos", correct=place < right)
        for place, q in enumerate(questions)
    ]


def recorded(
    patch: pytest.MonkeyPatch, name: str, result: Any, room: ModuleType = pipeline
) -> list[tuple[tuple[Any, ...], dict[str, Any]]]:
    """Puts a recorder in the place of one of the room's functions; `result` may be a function of its arguments."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []

    def stand_in(*arguments: Any, **options: Any) -> Any:
        calls.append((arguments, options))
        return result(*arguments, **options) if isinstance(result, Callable) else result  # type: ignore[arg-type]

    patch.setattr(room, name, stand_in)
    return calls


def test_answers_are_drawn_as_the_settings_say(inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(_: LoadedModel, questions: Sequence[Question], **options: Any) -> list[Response]:
        options["on_batch"]([None] * 4)
        return answers(questions, 2)

    drawn = recorded(monkeypatch, "sample_responses", draw, stages)
    recorded(monkeypatch, "verify_responses", lambda responses, *_: responses, stages)
    policy, done = replace(inputs.loaded, name="trained"), []
    for stage, sample in (("known", pipeline.sample_known), ("baseline", stages.sample_baseline)):
        found = sample(inputs, tmp_path, stages.silent)
        assert load_responses(tmp_path / "responses" / f"{stage}.parquet") == found
        assert sample(inputs, tmp_path, stages.silent) == found
    stages.answer_unknown(inputs, policy)
    stages.verified(inputs, policy, inputs.split.known, 6, 7, done.append)
    asked = [(loaded.name, questions, options["n"], options["seed"]) for (loaded, questions), options in drawn]
    assert asked == [
        ("m", inputs.split.known, 3, stage_seed(9, "known")),
        ("m", inputs.split.unknown, 2, stage_seed(9, "baseline")),
        ("trained", inputs.split.unknown, 2, stage_seed(9, "baseline")),
        ("trained", inputs.split.known, 6, 7),
    ]
    same = {"max_new_tokens": 7, "temperature": 0.7, "batch_size": 5, "chat": True}
    assert all(same.items() <= options.items() for _, options in drawn) and done == [4]


def test_unknown_questions_are_looked_for_in_the_form_that_they_are_asked_in(
    inputs: Inputs, pack: FeaturePack, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = recorded(monkeypatch, "tokenise_prompts", [(0, 5)])
    pipeline.check_unseen(inputs, pack)
    assert asked == [((inputs.loaded, inputs.split.unknown), {"max_new_tokens": 7, "chat": True})]


def test_discovery_is_asked_for_what_the_settings_say(
    inputs: Inputs, sae: SAE, pack: FeaturePack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = ContrastTable(pd.DataFrame({"id": [1]}), 8, 5, 32)
    found, built = recorded(monkeypatch, "discover", table), recorded(monkeypatch, "build_pack", pack)
    recorded(monkeypatch, "save_contrast", None)
    given = answers(inputs.split.known, 4)
    assert pipeline.discover_pack(inputs, tmp_path, sae, given, stages.silent) == (pack, table)
    assert found == [((inputs.loaded, sae, given), {"pooling": "last_4", "seed": stage_seed(9, "discover")})]
    ((arguments, options),) = built
    assert arguments == (table, sae) and (options["n_features"], options["signs"]) == (6, "balanced")
    assert options["provenance"] == {"questions": "tiny:easy", "n_questions": 8, "n_mixed": 5, "seed": 9}
    assert options["name"] == "tiny/tiny-easy" and load_pack(tmp_path / "pack.json") == pack


@pytest.mark.parametrize("ungated", [False, True])
def test_the_gate_sees_the_half_that_discovery_has_not_seen_and_its_verdict_counts(
    inputs: Inputs, sae: SAE, pack: FeaturePack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ungated: bool
) -> None:
    config = inputs.config.model_copy(update={"ungated": ungated, "chat": False})
    inputs, table = replace(inputs, config=config), ContrastTable(pd.DataFrame({"id": [1]}), 8, 5, 32)
    given = answers(inputs.split.known, 4)
    results = {"arms": {"dense": {}}, "between": [], "verdict": "It rose."}
    for name, result in (
        ("prepare", inputs), ("open_folder", tmp_path), ("sample_baseline", given), ("sample_known", given),
        ("get_sae", sae), ("run_repairs", {}), ("write_views", None), ("compare_arms", results), ("load_pack", pack),
    ):  # fmt: skip
        recorded(monkeypatch, name, result)
    recorded(monkeypatch, "write_report", tmp_path / "r.html", stages)
    found = recorded(monkeypatch, "discover_pack", (pack, table))
    judged = recorded(monkeypatch, "judge_pack", {"verdict": "inconclusive", "reason": "too few"})
    trained = recorded(monkeypatch, "run_arm", None)
    outcome = pipeline.improve(config)
    halves = split_questions(inputs.split.known, 0.5, stage_seed(9, "gate"))
    seen, tested = ([r.question_id for r in calls[0][0][-2]] for calls in (found, judged))
    assert sorted(seen) == sorted(q.id for q in halves.known) and sorted(tested) == sorted(q.id for q in halves.unknown)
    assert not outcome.passed and len(trained) == int(ungated)
    assert outcome.verdict == (
        "Trained without a passed gate (inconclusive). It rose."
        if ungated
        else "Gate 1 did not pass (inconclusive): too few. Nothing was trained."
    )
    assert read_json(tmp_path / "results.json")["verdict"] == outcome.verdict


@pytest.mark.parametrize(("arm", "weight"), [("dense", 0.4), ("outcome", 0.0)])
def test_an_arm_is_trained_as_the_settings_say(
    inputs: Inputs,
    sae: SAE,
    pack: FeaturePack,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arm: Any,
    weight: float,
) -> None:
    fresh, policy = replace(inputs.loaded, name="fresh"), replace(inputs.loaded, name="trained")

    def train(*_: Any, evaluate: Callable[[LoadedModel, int], None], **__: Any) -> LoadedModel:
        evaluate(policy, 4)
        return policy

    recorded(monkeypatch, "load_policy", fresh, stages)
    trained = recorded(monkeypatch, "train_arm", train, stages)
    asked = recorded(monkeypatch, "answer_unknown", answers(inputs.split.unknown, 6), stages)
    save_responses(tmp_path / "responses" / "baseline.parquet", answers(inputs.split.unknown, 2))
    reward = FeatureReward(pack, sae)
    # A run that was killed while it wrote its first row.
    (tmp_path / "metrics.jsonl").write_text('{"arm": "outc')
    stages.run_arm(inputs, tmp_path, arm, reward, stages.silent)
    ((arguments, options),) = trained
    loaded, questions, (first, _), config, folder = arguments
    assert (loaded, questions, first, folder) == (fresh, inputs.split.known, reward, tmp_path / "checkpoints" / arm)
    for name in set(asdict(config)) & set(SETTINGS):
        assert getattr(config, name) == SETTINGS[name]
    dense = options["dense"]
    assert (dense.weight, dense.credit, dense.gamma, dense.step_end) == (weight, "potential", 0.8, ".")
    assert [policy for (_, policy), _ in asked] == [policy, policy]
    rows = [(row["arm"], row["seed"], row["step"], row["accuracy"]) for row in read_jsonl(tmp_path / "metrics.jsonl")]
    assert rows == [(arm, 9, 0, 0.25), (arm, 9, 4, 0.75)]
    assert load_responses(tmp_path / "responses" / f"final-{arm}.parquet") == answers(inputs.split.unknown, 6)
    stages.run_arm(inputs, tmp_path, arm, reward, stages.silent)
    assert len(trained) == 1, "what is there is not trained again"
