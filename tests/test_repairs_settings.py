"""Where the settings of repair arrive: how chains are tried, what each arm is fine-tuned with, and from which seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mechreward import repairs
from mechreward.chains import ContrastiveConfig
from mechreward.config import make_config
from mechreward.files import append_row, read_json, read_jsonl
from mechreward.inputs import Inputs
from mechreward.models import LoadedModel
from mechreward.rollout import Response, save_responses
from mechreward.rundir import stage_seed
from mechreward.sae import SAE, load_sae
from mechreward.steering import Pair, RepairConfig, Repaired, rejection_pairs
from mechreward.tasks import Question, QuestionSplit
from mechreward.tiny import SAE_FOLDER
from mechreward.training import FinetuneConfig
from mechreward.verifiers import gsm8k_exact_match

SETTINGS: dict[str, Any] = {
    "questions": "tiny:easy", "method": "repair", "critical": "contrast", "contrast_learning_rate": 5e-3,
    "contrast_epochs": 3, "tries": 6, "pooling": "last_4", "max_new_tokens": 7, "temperature": 0.7, "batch_size": 5,
    "seed": 9, "epochs": 4, "questions_per_step": 3, "lora_rank": 2, "chat": True, "learning_rate": 1e-9,
    "sft_learning_rate": 2e-3, "dpo_learning_rate": 3e-4,
}  # fmt: skip


@pytest.fixture(scope="module")
def sae() -> SAE:
    return load_sae(str(SAE_FOLDER))


@pytest.fixture
def inputs(tiny_llama, char_tokenizer, sae: SAE, tmp_path: Path) -> Inputs:
    sides = ([Question(f"{side}{i}", f"{side} {i}", "1") for i in range(4)] for side in ("k", "u"))
    loaded = LoadedModel(tiny_llama, char_tokenizer, "m")
    return Inputs(make_config(**SETTINGS, out=tmp_path), QuestionSplit(*sides), gsm8k_exact_match, loaded, 2, sae)


def answers(questions: Sequence[Question], right: int) -> list[Response]:
    return [
        Response(q.id, 0, (0, 5), (9, place, 1), "a", (-1.0,) * 3, "eos", correct=place < right)
        for place, q in enumerate(questions)
    ]


def repaired(name: str) -> Repaired:
    return Repaired(name, 0, (0, 5), (5, 6), 1, (5, 7), "a b", "a c", "[]", (0.2, 0.9))


def test_chains_are_tried_as_the_settings_say(
    inputs: Inputs, sae: SAE, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []
    kept = [repaired("k0"), repaired("k1")]
    monkeypatch.setattr(repairs, "repair_known", lambda *given: asked.append(given) or [])
    monkeypatch.setattr(repairs, "kept_repairs", lambda _: kept)
    monkeypatch.setattr(repairs, "summarise", lambda _: {"n_chains": 3})
    monkeypatch.setattr(repairs, "count_uncut", lambda _roller, _responses, most, _attempts: most)
    given = answers(inputs.split.known, 2)
    for _ in range(2):  # the second time from what the first has left
        assert repairs.repair_stage(inputs, tmp_path, sae, given) == kept
    ((roller, reader, responses, chosen),) = asked
    assert (roller.loaded, roller.questions, reader, responses) == (inputs.loaded, inputs.split.known, sae, given)
    assert (roller.max_new_tokens, roller.temperature, roller.batch_size) == (7, 0.7, 5)
    assert roller.seed == stage_seed(9, "repair") and roller.verifier is inputs.verifier
    contrastive = ContrastiveConfig(lr=5e-3, epochs=3, seed=9)
    assert chosen == RepairConfig(critical="contrast", contrastive=contrastive, tries=6, pooling="last_4")
    assert read_json(tmp_path / "repair.json") == {"n_chains": 3, "n_kept": 2, "n_uncut": chosen.chains}


@pytest.mark.parametrize(("arm", "method", "rate"), [("repair_sft", "sft", 2e-3), ("repair_cdpo", "cdpo", 3e-4)])
def test_an_arm_is_fine_tuned_as_the_settings_say(
    inputs: Inputs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arm: Any, method: str, rate: float
) -> None:
    fresh, asked = replace(inputs.loaded, name="fresh"), []
    metrics = tmp_path / "metrics.jsonl"
    append_row(metrics, {"arm": "other", "seed": 9, "step": 77, "kind": "train"})

    def finetune(*given: Any, callbacks: Sequence[Any]) -> LoadedModel:
        asked.append((*given, [(one.path, one.arm, one.seed) for one in callbacks]))
        for step in (1, 2):
            append_row(metrics, {"arm": arm, "seed": 9, "step": step, "kind": "train"})
        return fresh

    monkeypatch.setattr(repairs, "load_policy", lambda _: fresh)
    monkeypatch.setattr(repairs, "finetune", finetune)
    save_responses(tmp_path / "responses" / "baseline.parquet", answers(inputs.split.unknown, 1))
    pairs = [repaired("k0").pair()]
    for _ in range(2):
        repairs.run_repair_arm(inputs, tmp_path, arm, pairs, lambda _: answers(inputs.split.unknown, 3))
    options = FinetuneConfig(
        epochs=4, batch_size=3, learning_rate=rate, lora_rank=2, chat=True, seed=stage_seed(9, "finetune") % 2**31
    )
    assert asked == [(fresh, pairs, method, inputs.split, options, [(metrics, arm, 9)])]
    rows = [(row["step"], row["kind"], row.get("accuracy")) for row in read_jsonl(metrics) if row["arm"] == arm]
    assert rows == [(0, "eval", 0.25), (1, "train", None), (2, "train", None), (2, "eval", 0.75)]
    assert (tmp_path / "checkpoints" / arm / "config.json").exists()


def test_rejection_draws_by_a_seed_of_its_own_as_many_as_there_are_repairs() -> None:
    known = [Question(f"k{i}", f"k {i}", "1") for i in range(12)]
    given, two = answers(known, 9), [repaired("k0"), repaired("k1")]
    drawn: list[Pair] = repairs.arm_pairs("rejection_sft", two, given, 9)
    assert drawn == rejection_pairs(given, 2, stage_seed(9, "rejection"))
    assert drawn != rejection_pairs(given, 2, 0) and drawn != repairs.arm_pairs("rejection_sft", two, given, 8)
    # Nor do they depend on the order in which the responses are given.
    assert {p.question_id for p in repairs.arm_pairs("rejection_sft", two, given[::-1], 9)} == {
        p.question_id for p in drawn
    }
