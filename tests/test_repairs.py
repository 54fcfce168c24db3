"""The repair arms of the main job on the bundled model: their files, what each trains on; UNKNOWN stays out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from peft import PeftModel

from mechreward import repairs
from mechreward.comparison import verdict_words
from mechreward.config import make_config
from mechreward.errors import InputError
from mechreward.features import NoFeatures
from mechreward.files import read_json, read_jsonl
from mechreward.inputs import prepare
from mechreward.models import load_model
from mechreward.pipeline import improve
from mechreward.rollout import load_responses
from mechreward.steering import Pair, load_repairs, save_repairs
from mechreward.tasks import load_split
from mechreward.tiny import MODEL
from mechreward.views import REPAIRS, write_views

QUICK: dict[str, Any] = {
    "questions": "tiny:easy", "limit": 64, "known": 0.75, "samples": 6, "eval_samples": 2, "max_new_tokens": 60,
    "pooling": "step_end:.", "ungated": True, "method": "repair", "critical": "solution", "tries": 1, "epochs": 1,
    "questions_per_step": 16, "lora_rank": 4, "sft_learning_rate": 2e-3, "dpo_learning_rate": 1e-3,
}  # fmt: skip
ARMS = ("rejection_sft", "repair_sft", "repair_dpo")


class Killed(BaseException):
    """What a kill looks like from inside."""


@contextmanager
def recorded(kill_at: str | None = None) -> Iterator[list[tuple[str, float, list[Pair], set[str]]]]:
    """What `finetune` was called with: method, rate, pairs, ids of UNKNOWN; killed once `kill_at` is trained."""
    calls: list[tuple[str, float, list[Pair], set[str]]] = []
    inner = repairs.finetune

    def finetune(loaded, pairs: Sequence[Pair], method: str, split, config, callbacks):
        calls.append((method, config.learning_rate, list(pairs), {q.id for q in split.unknown}))
        policy = inner(loaded, pairs, method, split, config, callbacks)
        if callbacks[0].arm == kill_at:
            raise Killed
        return policy

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(repairs, "finetune", finetune)
        yield calls


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list]:
    out = tmp_path_factory.mktemp("repair") / "run"
    with recorded() as calls:
        improve(make_config(**QUICK, out=out))
    return out, calls


def test_arms_stand_side_by_side(finished: tuple[Path, list]) -> None:
    out, _ = finished
    results, split = read_json(out / "results.json"), load_split(out / "questions.parquet")
    unknown = {question.id for question in split.unknown}
    assert sorted(results["arms"]) == sorted(ARMS)
    for arm in ARMS:
        answers = load_responses(out / "responses" / f"final-{arm}.parquet")
        assert {response.question_id for response in answers} == unknown
        after = results["arms"][arm]["after"]
        assert after["n_responses"] == len(answers) == 2 * len(unknown)
        assert after["accuracy"] == pytest.approx(sum(bool(r.correct) for r in answers) / len(answers))
    assert [(row["arm"], row["against"]) for row in results["between"]] == [
        ("repair_sft", "rejection_sft"),
        ("repair_dpo", "rejection_sft"),
    ]
    after = {arm: results["arms"][arm]["after"]["accuracy"] for arm in ARMS}
    for row in results["between"]:
        assert row["difference"] == pytest.approx(after[row["arm"]] - after["rejection_sft"])
    assert "SFT on repairs against SFT on sampled right answers: " in results["verdict"]
    kept = load_repairs(out / "repairs.parquet")
    assert results["repair"]["n_kept"] == len(kept) == results["repair"]["arms"]["steered"]["repaired"] > 0
    assert results["repair"] == read_json(out / "repair.json")


def test_what_each_arm_trains_on(finished: tuple[Path, list]) -> None:
    out, calls = finished
    kept = load_repairs(out / "repairs.parquet")
    known = load_responses(out / "responses" / "known.parquet")
    assert [(method, rate) for method, rate, _, _ in calls] == [("sft", 2e-3), ("sft", 2e-3), ("dpo", 1e-3)]
    rejection, *repaired = (pairs for _, _, pairs, _ in calls)
    assert all(pairs == [one.pair() for one in kept] for pairs in repaired)
    assert len(rejection) == len(kept)
    right = {(r.question_id, r.completion_ids) for r in known if r.correct}
    assert {(pair.question_id, pair.right_ids) for pair in rejection} <= right


def test_nothing_of_unknown_is_trained_on_or_steered_with(finished: tuple[Path, list]) -> None:
    out, calls = finished
    for _, _, pairs, unknown in calls:
        assert unknown and not unknown & {pair.question_id for pair in pairs}
    seen = pd.read_parquet(out / "responses" / "known.parquet")
    assert not unknown & set(seen["question_id"])
    assert not unknown & {one.question_id for one in load_repairs(out / "repairs.parquet")}


def test_metrics_and_models_of_the_arms(finished: tuple[Path, list]) -> None:
    out, _ = finished
    rows, results = read_jsonl(out / "metrics.jsonl"), read_json(out / "results.json")
    n = len(load_repairs(out / "repairs.parquet"))
    steps = -(-n // QUICK["questions_per_step"])
    for arm in ARMS:
        mine = [row for row in rows if row["arm"] == arm]
        assert [row["step"] for row in mine if row["kind"] == "train"] == list(range(1, steps + 1))
        evals = [(row["step"], row["accuracy"]) for row in mine if row["kind"] == "eval"]
        numbers = results["arms"][arm]
        assert evals == [(0, numbers["before"]["accuracy"]), (steps, numbers["after"]["accuracy"])]
        assert isinstance(load_model(str(MODEL), adapter=str(out / "checkpoints" / arm)).model, PeftModel)


def test_chains_are_shown_before_and_after(finished: tuple[Path, list]) -> None:
    out, _ = finished
    views, tokenizer = read_json(out / "chains.json")["views"], load_model(str(MODEL)).tokenizer
    kept = {one.question_id: one for one in load_repairs(out / "repairs.parquet")}
    questions = {q.id: q for q in load_split(out / "questions.parquet").known}
    assert len(views) == min(REPAIRS, len(kept)) and len({view["question_id"] for view in views}) == len(views)
    for view in views:
        one, question = kept[view["question_id"]], questions[view["question_id"]]
        assert (view["kind"], view["prompt"], view["answer"]) == ("repair", question.prompt, question.answer)
        before, after = (
            [part for step in view[side]["steps"] for part in step["parts"]] for side in ("before", "after")
        )
        assert "".join(text for _, text in before) == one.wrong_text
        assert "".join(text for _, text in after) == one.repaired_text
        assert [text.strip() for mark, text in before if mark == "critical"] == [
            tokenizer.decode(one.wrong_ids[one.cut])
        ]
        new = "".join(text for mark, text in after if mark == "new")
        assert new.strip() == tokenizer.decode(one.repaired_ids[one.cut :], skip_special_tokens=True).strip()
        edits = [edit for rule in json.loads(one.edits)["rules"] for edit in rule["edits"]]
        sides = {edit["feature"]: "right" if edit["value"] > 0 else "wrong" for edit in edits}
        fired = [row for side in ("before", "after") for step in view[side]["steps"] for row in step["fired"]]
        assert fired and all(sides[row["feature"]] == row["side"] for row in fired)
        assert (view["before"]["correct"], view["after"]["correct"]) == (False, True)


def test_going_on_with_a_finished_run_repeats_nothing(finished: tuple[Path, list]) -> None:
    out, _ = finished
    files = [*(out / "responses").glob("*.parquet"), out / "repairs.parquet", out / "metrics.jsonl"]
    times, results = {path: path.stat().st_mtime_ns for path in files}, read_json(out / "results.json")
    with recorded() as calls:
        again = improve(make_config(**QUICK, out=out, resume=True)).results
    assert not calls and again["arms"] == results["arms"]
    assert times == {path: path.stat().st_mtime_ns for path in files}
    with pytest.raises(InputError, match="^method: 'both' is not what the run"):
        improve(make_config(**{**QUICK, "method": "both"}, out=out, resume=True))


def test_killed_and_resumed_equals_uninterrupted(finished: tuple[Path, list], tmp_path: Path) -> None:
    whole, _ = finished
    out = before_training(whole, tmp_path / "run")
    with recorded("repair_sft"), pytest.raises(Killed):
        improve(make_config(**QUICK, out=out, resume=True))
    with recorded() as calls:
        improve(make_config(**QUICK, out=out, resume=True))
    assert [method for method, _, _, _ in calls] == ["sft", "dpo"]
    results, expected = read_json(out / "results.json"), read_json(whole / "results.json")
    assert results["arms"] == expected["arms"] and results["between"] == expected["between"]
    for arm in ARMS:
        name = f"responses/final-{arm}.parquet"
        assert load_responses(out / name) == load_responses(whole / name)
    assert logged(out) == logged(whole)


def before_training(whole: Path, out: Path) -> Path:
    """A copy of a run that was killed when its repairs were whole."""
    shutil.copytree(whole, out)
    shutil.rmtree(out / "checkpoints")
    for path in (out / "metrics.jsonl", out / "results.json", *(out / "responses").glob("final-*")):
        path.unlink()
    return out


def logged(folder: Path) -> list[tuple]:
    rows = read_jsonl(folder / "metrics.jsonl")
    return sorted((r["arm"], r["kind"], r["step"], r.get("loss", r.get("accuracy"))) for r in rows)


def _stop(error: InputError) -> Callable[..., Any]:
    def repair_known(*_: object) -> Any:
        raise error

    return repair_known


def test_a_repair_that_cannot_be_ends_in_words(
    finished: tuple[Path, list], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in "abc":
        (before_training(finished[0], tmp_path / name) / "repair.json").unlink()
    monkeypatch.setattr(repairs, "repair_known", _stop(NoFeatures("features: none to steer with")))
    outcome = improve(make_config(**QUICK, out=tmp_path / "a", resume=True))
    assert outcome.verdict == "Repair stopped: features: none to steer with."
    assert outcome.results["arms"] == {} and outcome.report.exists()
    monkeypatch.setattr(repairs, "repair_known", _stop(InputError("responses: none is wrong")))
    with pytest.raises(InputError, match="none is wrong"):
        improve(make_config(**QUICK, out=tmp_path / "b", resume=True))
    assert read_json(tmp_path / "b" / "results.json")["verdict"] == "Repair stopped: responses: none is wrong."
    monkeypatch.setattr(repairs, "repair_known", lambda *_: [])
    monkeypatch.setattr(repairs, "summarise", lambda _: {})
    with pytest.raises(InputError, match="^repairs: no try by steering came out right"):
        improve(make_config(**QUICK, out=tmp_path / "c", resume=True))


def test_methods_and_their_arms() -> None:
    grpo, repair, both = (
        make_config(questions="tiny:easy", method=name, arms=("outcome", "dense"), critical="contrast")
        for name in ("grpo", "repair", "both")
    )
    every = (*ARMS, "repair_cdpo")
    assert (grpo.grpo_arms, grpo.repair_arms) == (("outcome", "dense"), ())
    assert (repair.grpo_arms, repair.repair_arms) == ((), every)
    assert (both.grpo_arms, both.repair_arms) == (("outcome", "dense"), every)
    for critical in ("rollouts", "solution"):
        assert make_config(questions="tiny:easy", method="both", critical=critical).repair_arms == ARMS
    with pytest.raises(InputError, match="method: 'sft' is not allowed"):
        make_config(questions="tiny:easy", method="sft")


def test_bad_input_is_found_before_anything_is_written(tmp_path: Path) -> None:
    path = tmp_path / "bare.jsonl"
    rows = [{"question": f"Ada has 2{i} apples .", "answer": "3"} for i in range(8)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    bare = QUICK | {"questions": str(path), "out": tmp_path / "run"}
    with pytest.raises(InputError, match=r"^critical: solution needs worked solutions, and question .* has none"):
        improve(make_config(**bare))
    assert not (tmp_path / "run").exists()


def test_an_adapter_is_refused(finished: tuple[Path, list], tmp_path: Path) -> None:
    adapter = str(finished[0] / "checkpoints" / "repair_sft")
    with pytest.raises(InputError, match="^adapter: .* cannot be fine-tuned by repair; merge it"):
        improve(make_config(**QUICK, adapter=adapter, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_cdpo_takes_the_scores_of_the_critical_tokens() -> None:
    known = [_repaired("k0", (0.1, 0.9)), _repaired("k1", (0.2, 0.8))]
    assert [pair.wrong_scores for pair in repairs.arm_pairs("repair_cdpo", known, [], 0)] == [(0.1, 0.9), (0.2, 0.8)]


def _repaired(question_id: str, scores: tuple[float, ...]) -> repairs.Repaired:
    return repairs.Repaired(question_id, 0, (1,), (5, 6), 1, (5, 7), "a b", "a c", "[]", scores)


def test_verdict_names_the_arms() -> None:
    paired = {"difference": 0.1, "low": 0.02, "high": 0.2, "p_value": 0.01}
    arm = {"before": {"accuracy": 0.5}, "after": {"accuracy": 0.6}, "paired": paired}
    between = [paired | {"arm": "repair_cdpo", "against": "rejection_sft"}]
    assert verdict_words({"arms": {"repair_cdpo": arm}, "between": between}) == (
        "DPO on critical tokens: accuracy rose by +0.100 [+0.020, +0.200], p = 0.0100 (0.500 to 0.600). "
        "DPO on critical tokens against SFT on sampled right answers: final accuracy rose by "
        "+0.100 [+0.020, +0.200], p = 0.0100."
    )


def test_chains_without_text_are_not_shown(finished: tuple[Path, list], tmp_path: Path) -> None:
    out = tmp_path / "run"
    shutil.copytree(finished[0], out)
    (out / "chains.json").unlink()
    kept = load_repairs(out / "repairs.parquet")[:2]
    inputs = prepare(make_config(**QUICK, out=out, resume=True))
    silent = replace(kept[0], wrong_ids=(inputs.loaded.tokenizer.eos_token_id,), wrong_text="", cut=0)
    save_repairs(out / "repairs.parquet", [silent, kept[1]])
    write_views(inputs, out, inputs.sae)
    assert [view["question_id"] for view in read_json(out / "chains.json")["views"]] == [kept[1].question_id]


def test_wrong_chains_without_a_critical_token_are_counted(finished: tuple[Path, list]) -> None:
    out, _ = finished
    known, record = load_responses(out / "responses" / "known.parquet"), read_json(out / "repair.json")
    wrong = {response.question_id for response in known if response.correct is False}
    assert record["n_uncut"] == len(wrong) - record["n_chains"]
