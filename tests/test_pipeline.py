"""The main job on the bundled model: stages, outcomes in words, resuming, and what bad input leaves behind."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import yaml

from mechreward.comparison import verdict_words
from mechreward.config import ImproveConfig, make_config, make_train_config
from mechreward.errors import InputError
from mechreward.features import load_pack, save_pack
from mechreward.files import read_json
from mechreward.inputs import prepare
from mechreward.models import load_model
from mechreward.pipeline import check_unseen, get_sae, improve, sample_known, train
from mechreward.rollout import Response, load_responses, prompt_hashes, tokenise_prompts
from mechreward.rundir import stage_seed
from mechreward.stages import answer_unknown, kept_policies, silent
from mechreward.tasks import load_split
from mechreward.tiny import MODEL
from mechreward.views import RESPONSES, by_turns

QUICK: dict[str, Any] = {
    "questions": "tiny:easy",
    "limit": 100,
    "known": 0.8,
    "eval_samples": 2,
    "max_new_tokens": 96,
    "arms": ("outcome", "dense"),
    "steps": 2,
    "questions_per_step": 2,
    "generations": 4,
    "eval_every": 1,
    "save_every": 1,
}
FINDS = QUICK | {"samples": 4}
"""Of a run that looks for its pack."""
TIMINGS = {"runtime_s", "dense/reader_seconds", "step_time", "train_runtime"}


class Killed(BaseException):
    """What a kill looks like from inside: nothing catches it."""


class Killer:
    """Progress that raises when the given stage has counted once."""

    def __init__(self, stage: str) -> None:
        self.kill_at = stage

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Callable[[int], None]]:  # noqa: ARG002
        def advance(_: int) -> None:
            if title.startswith(self.kill_at):
                raise Killed

        yield advance


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run") / "whole"
    assert improve(make_config(**FINDS, out=out)).passed
    return out


def test_a_run_leaves_every_file(finished: Path) -> None:
    files = {str(path.relative_to(finished)) for path in finished.rglob("*") if path.is_file()}
    assert {
        "config.yaml", "manifest.json", "questions.parquet", "responses/baseline.parquet", "responses/known.parquet",
        "features.parquet", "pack.json", "gate1.json", "metrics.jsonl", "rollouts.parquet", "results.json",
        "responses/final-outcome.parquet", "responses/final-dense.parquet", "report.html",
    } <= files  # fmt: skip
    assert not [name for name in files if name.endswith(".tmp")]


def test_results_hold_both_arms_with_n_and_intervals(finished: Path) -> None:
    results = read_json(finished / "results.json")
    n_unknown = len(load_split(finished / "questions.parquet").unknown)
    for arm in ("outcome", "dense"):
        for when in ("before", "after"):
            numbers = results["arms"][arm][when]
            assert numbers["low"] <= numbers["accuracy"] <= numbers["high"]
            assert (numbers["n_questions"], numbers["n_responses"]) == (n_unknown, 2 * n_unknown)
    assert results["arms"]["outcome"]["before"] == results["arms"]["dense"]["before"]
    [between] = results["between"]
    assert (between["arm"], between["against"], between["n_questions"]) == ("dense", "outcome", n_unknown)


def test_arms_see_the_same_questions_and_unknown_ones_never(finished: Path) -> None:
    rollouts = pd.read_parquet(finished / "rollouts.parquet")
    unknown = {q.id for q in load_split(finished / "questions.parquet").unknown}
    by_arm = {arm: list(rows["question_id"]) for arm, rows in rollouts.groupby("arm")}
    assert by_arm["outcome"] == by_arm["dense"]
    assert not unknown & set(rollouts["question_id"])
    assert not unknown & set(pd.read_parquet(finished / "responses" / "known.parquet")["question_id"])


def test_chains_of_each_arm_before_and_after(finished: Path) -> None:
    views = read_json(finished / "chains.json")["views"]
    assert [view["kind"] for view in views] == ["outcome"] * RESPONSES + ["dense"] * RESPONSES
    weights = {feature["id"]: feature["weight"] for feature in read_json(finished / "pack.json")["features"]}
    unknown = {q.id for q in load_split(finished / "questions.parquet").unknown}
    before = load_responses(finished / "responses" / "baseline.parquet")
    for view in views:
        after = load_responses(finished / "responses" / f"final-{view['kind']}.parquet")
        old, new = (
            "".join(text for step in view[side]["steps"] for _, text in step["parts"]) for side in ("before", "after")
        )
        both = zip(before, after, strict=True)
        assert any((a.question_id, a.text, b.text) == (view["question_id"], old, new) for a, b in both)
        assert view["question_id"] in unknown
        same = "".join(text for step in view["after"]["steps"] for mark, text in step["parts"] if mark == "kept")
        assert old.startswith(same.rstrip()) and new.startswith(same) and (old == new or new != same)
        fired = [row for side in ("before", "after") for step in view[side]["steps"] for row in step["fired"]]
        assert all(row["side"] == ("right" if weights[row["feature"]] > 0 else "wrong") for row in fired)
    assert any(step["fired"] for view in views for step in view["before"]["steps"])


def test_responses_are_shown_by_turns() -> None:
    def responses(verdicts: str) -> list[Response]:
        return [
            Response(f"q{i // 2}", i % 2, (1,), (2,), "" if one == " " else one, (0.0,), "eos", one == "r")
            for i, one in enumerate(verdicts)
        ]

    before, after = responses("wwwrrw wr"), responses("rrwrwrww ")[::-1]
    pairs = by_turns(before, after, 9)
    assert [(old.question_id, old.sample) == (new.question_id, new.sample) for old, new in pairs] == [True] * 7
    assert [old.text + new.text for old, new in pairs] == ["wr", "rw", "ww", "rr", "wr", "ww", "wr"]
    assert [(old.question_id, old.sample) for old, _ in pairs][:2] == [("q0", 0), ("q2", 0)]
    assert len(by_turns(before, after, 3)) == 3


def test_metrics_have_a_row_a_step_and_an_evaluation(finished: Path) -> None:
    rows = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    for arm in ("outcome", "dense"):
        mine = [row for row in rows if row["arm"] == arm]
        assert [row["step"] for row in mine if row["kind"] == "train"] == [1, 2]
        assert [row["step"] for row in mine if row["kind"] == "eval"] == [0, 1, 2]
    last = next(row for row in rows if row["kind"] == "eval" and row["arm"] == "dense" and row["step"] == 2)
    assert last["accuracy"] == read_json(finished / "results.json")["arms"]["dense"]["after"]["accuracy"]


def test_the_gated_pack_is_the_one_that_trained(finished: Path) -> None:
    pack, gate = read_json(finished / "pack.json"), read_json(finished / "gate1.json")
    assert gate["verdict"] == pack["validation"]["verdict"] == "pass"
    assert gate["spec_hash"] == pack["validation"]["spec_hash"]
    run = read_json(finished / "checkpoints" / "dense" / "run.json")
    assert [spec for spec, _ in run["features"]] == [gate["spec_hash"]]


@pytest.mark.slow
def test_killed_twice_and_resumed_equals_uninterrupted(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    for stage, resume in (("sample known", False), ("train dense", True)):
        with pytest.raises(Killed):
            improve(make_config(**FINDS, out=out, resume=resume), Killer(stage))
    improve(make_config(**FINDS, out=out, resume=True))
    for name in ("pack.json", "gate1.json"):
        assert read_json(out / name) == read_json(finished / name)
    assert _untimed(read_json(out / "results.json")) == _untimed(read_json(finished / "results.json"))
    assert _metrics(out) == _metrics(finished)
    for name in ("rollouts.parquet", "responses/final-dense.parquet"):
        pd.testing.assert_frame_equal(_sorted(out / name), _sorted(finished / name))


def _trains(finished: Path, **changes: Any) -> dict[str, Any]:
    """Settings of a run with the pack of `finished`, on the same questions."""
    return QUICK | {"pack": str(finished / "pack.json")} | changes


def test_train_with_the_gated_pack_killed_and_resumed_is_the_main_jobs_own_end(finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(Killed):
        train(make_train_config(**_trains(finished), out=out), Killer("train dense"))
    outcome = train(make_train_config(**_trains(finished), out=out, resume=True))
    assert outcome.passed
    assert outcome.results["policies"] == {arm: f"checkpoints/{arm}/checkpoint-2" for arm in ("dense", "outcome")}
    assert all((out / name).exists() for name in ("sae.json", "chains.json"))
    assert not [name for name in ("features.parquet", "gate1.json", "responses/known.parquet") if (out / name).exists()]
    assert _metrics(out) == _metrics(finished)
    for name in ("rollouts", "responses/baseline", "responses/final-dense", "responses/final-outcome"):
        ours, theirs = (_sorted(folder / f"{name}.parquet") for folder in (out, finished))
        pd.testing.assert_frame_equal(ours, theirs)
    for name in ("arms", "between"):
        assert read_json(out / "results.json")[name] == read_json(finished / "results.json")[name]
    again = train(make_train_config(**_trains(finished), out=out, resume=True))
    assert _untimed(again.results) == _untimed(outcome.results)
    page = outcome.report.read_text()
    assert "The pack was given; gate 1: pass. Its AUROC within a question was" in page
    assert "mechreward train --config" in page and "checkpoints/dense/checkpoint-2" in page
    # The file that the settings name holds another reward now.
    mine = tmp_path / "mine.json"
    save_pack(load_pack(finished / "pack.json"), mine)
    stored = yaml.safe_load((out / "config.yaml").read_text()) | {"pack": str(mine), "ungated": True}
    (out / "config.yaml").write_text(yaml.safe_dump(stored))
    moved = make_train_config(**_trains(finished, pack=str(mine), ungated=True), out=out, resume=True)
    assert _untimed(train(moved).results) == _untimed(outcome.results)
    save_pack(load_pack(mine).model_copy(update={"pooling": "max"}), mine)
    with pytest.raises(InputError, match="^resume: pack changed since the run in"):
        train(moved)


def test_the_policy_a_run_names_is_the_one_it_tested(finished: Path) -> None:
    inputs = prepare(make_config(**QUICK))
    assert read_json(finished / "results.json")["policies"].keys() == {"outcome", "dense"}
    policy = load_model(kept_policies(finished)["dense"])
    answers = answer_unknown(inputs, policy)
    kept = load_responses(finished / "responses" / "final-dense.parquet")
    assert [(a.question_id, a.completion_ids) for a in answers] == [(k.question_id, k.completion_ids) for k in kept]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pack": "nowhere.json"}, "pack: nowhere.json is neither a file nor a bundled pack"),
        ({"known": 0.3}, "questions: pack tiny/tiny-easy was found on "),
        ({"eval_questions": "ITSELF"}, "eval_questions: 8 of these 8 questions are KNOWN ones too"),
        (
            {"eval_questions": "FOUND ON"},
            "eval_questions: pack tiny/tiny-easy was found on 8 of these 8, and would look",
        ),
        ({"seed": -1}, "seed: -1 is out of range"),
        ({"arms": ()}, "arms: () is not allowed"),
        ({"arms": ("dense", "dense")}, "arms: dense, dense has one twice"),
        ({"eval_split": "dev"}, "eval_split: 'dev' is of eval_questions, which were not given"),
        ({"eval_questions": "nowhere.csv"}, "eval_questions: "),
        ({"layer": 1}, "layer: "),
        ({"sae": "nowhere"}, "sae: "),
        ({"eval_limit": 5}, "eval_limit: 5 is of eval_questions, which were not given"),
        ({"eval_questions": "tiny:long", "known": 0.5}, "known: 0.5 is not allowed with eval_questions"),
        ({"n_features": 3}, "n_features: there is no such field"),
    ],
)
def test_train_finds_bad_input_before_anything_is_written(
    finished: Path, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    fields = _trains(finished, **change)
    if "eval_questions" in change and "known" not in change:
        del fields["known"]
    if change.get("eval_questions") in ("ITSELF", "FOUND ON"):
        known, found_on = load_split(finished / "questions.parquet").known, load_pack(finished / "pack.json").found_on
        prompts = tokenise_prompts(load_model(MODEL), known, max_new_tokens=96, chat=False)
        seen = [q for q, mine in zip(known, prompts, strict=True) if prompt_hashes([mine])[0] in found_on][:8]
        path = tmp_path / "seen.jsonl"
        path.write_text("".join(json.dumps({"question": q.prompt, "answer": q.answer}) + "\n" for q in seen))
        fields["eval_questions"] = str(path)
        if change["eval_questions"] == "ITSELF":
            fields |= {"questions": str(path), "limit": None}
        else:
            fields["questions"] = "tiny:long"
    with pytest.raises(InputError) as error:
        train(make_train_config(**fields, out=tmp_path / "run"))
    assert str(error.value).startswith(message)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_a_pack_without_a_passed_gate_trains_only_when_told_to(finished: Path, tmp_path: Path) -> None:
    ungated = load_pack(finished / "pack.json").model_copy(update={"validation": None})
    save_pack(ungated, tmp_path / "pack.json")
    fields = {
        "questions": "tiny:easy", "eval_questions": "tiny:long", "limit": 6, "eval_limit": 3, "steps": 1,
        "eval_samples": 1, "questions_per_step": 1, "generations": 2, "max_new_tokens": 20,
        "pack": str(tmp_path / "pack.json"), "out": tmp_path / "run",
    }  # fmt: skip
    with pytest.raises(InputError, match="^pack: tiny/tiny-easy .* carries no passed gate.*; train .* with --ungated$"):
        train(make_train_config(**fields))
    assert not (tmp_path / "run").exists()
    # The outcome alone is not paid for features.
    alone = train(make_train_config(**fields | {"out": tmp_path / "alone"}, arms=("outcome",)))
    assert alone.verdict.startswith("Outcome training: ")
    outcome = train(make_train_config(**fields, ungated=True))
    assert not outcome.passed and outcome.verdict.startswith("Trained without a passed gate (gate 1: not run). Dense")
    assert "The pack was given; gate 1: not run. Trained all the same (ungated)." in outcome.report.read_text()
    split = load_split(tmp_path / "run" / "questions.parquet")
    assert ([len(side) for side in split], {q.id[:5] for q in split.unknown}) == ([6, 3], {"eval-"})
    rollouts = pd.read_parquet(tmp_path / "run" / "rollouts.parquet")
    assert set(rollouts["question_id"]) <= {q.id for q in split.known}


def test_a_pack_that_does_not_name_its_questions_is_warned_of(finished: Path) -> None:
    pack = load_pack(finished / "pack.json")
    inputs = prepare(make_train_config(**_trains(finished)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_unseen(inputs, pack)
    with pytest.warns(UserWarning, match="^pack: tiny/tiny-easy does not record its questions"):
        check_unseen(inputs, pack.model_copy(update={"provenance": {}}))


def _untimed(row: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in TIMINGS}


def _metrics(out: Path) -> list[dict[str, Any]]:
    rows = [_untimed(json.loads(line)) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return sorted(rows, key=lambda row: (row["arm"], row["kind"], row["step"]))


def _sorted(path: Path) -> pd.DataFrame:
    frame = pd.read_parquet(path)
    keys = [key for key in ("arm", "step", "question_id", "sample", "completion") if key in frame]
    return frame.sort_values(keys, kind="stable", ignore_index=True)


def test_finished_run_resumes_to_the_same_report(finished: Path) -> None:
    before = _untimed(read_json(finished / "results.json"))
    outcome = improve(make_config(**FINDS, out=finished, resume=True))
    assert _untimed(outcome.results) == before


def test_run_is_refused_or_resumed_but_never_mixed(finished: Path) -> None:
    with pytest.raises(InputError, match=r"^out: .* holds a run already; give --resume"):
        improve(make_config(**FINDS, out=finished))
    with pytest.raises(InputError, match=r"^steps: 3 is not what the run in .* was started with \(2\)"):
        improve(make_config(**FINDS | {"steps": 3}, out=finished, resume=True))


def test_too_few_questions_end_in_words_not_in_training(tmp_path: Path) -> None:
    config = make_config(**QUICK | {"limit": 8, "known": 0.5}, out=tmp_path / "run")
    outcome = improve(config)
    assert not outcome.passed
    assert outcome.verdict.startswith("There is no pack to gate: features: no feature passes q <= 0.05")
    assert outcome.verdict.endswith("Nothing was trained.")
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert outcome.report.exists()


def test_one_known_question_is_too_few(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="^questions: one of them is KNOWN, and discovery and Gate 1 need one each"):
        improve(make_config(**QUICK | {"limit": 2, "known": 0.5}, out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_all_wrong_is_an_error_with_a_report(tmp_path: Path) -> None:
    questions = tmp_path / "impossible.jsonl"
    rows = [{"question": f"Ada has 2{i} apples . how many apples does Ada have ?", "answer": "1000"} for i in range(8)]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "run"
    with pytest.raises(InputError, match="correct: all 16 answers are wrong"):
        improve(make_config(**QUICK | {"questions": str(questions), "limit": None, "known": 0.5}, out=out))
    assert "Stopped before Gate 1" in read_json(out / "results.json")["verdict"]
    assert (out / "report.html").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"questions": "none.jsonl"}, "none.jsonl"),
        ({"questions": "tiny:hard"}, "tiny:hard"),
        ({"verifier": "vibes"}, "verifier: "),
        ({"model": "no/such/folder", "layer": 1}, "no/such/folder"),
        ({"layer": 99}, "layer: 99"),
        ({"sae": "nowhere"}, "nowhere"),
        ({"limit": 1}, "known: "),
        ({"layer": 1, "sae_k": 1025}, "sae_k: 1025 is not between 1 and the SAE's 1024 features"),
    ],
)
def test_bad_input_is_found_before_anything_is_written(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        improve(make_config(**QUICK | change, out=tmp_path / "run"))
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_unwritable_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"^out: cannot write to the folder"):
        improve(make_config(**QUICK, out=tmp_path / "file" / "run"))


def test_a_folder_with_other_files_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match=r"^out: .* is not empty and holds no run"):
        improve(make_config(**QUICK, out=tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_bundled_sae_and_own_sae() -> None:
    assert prepare(make_config(**QUICK)).sae is not None
    assert prepare(make_config(**QUICK | {"layer": 1})).sae is None
    assert prepare(make_config(**QUICK | {"layer": 1})).layer == 1


def test_a_given_sae_is_checked_on_the_known_responses(tmp_path: Path) -> None:
    """Healthy: recorded without a word. Said to read another block: recorded, and warned of, once."""
    inputs = prepare(make_config(**QUICK | {"limit": 10, "max_new_tokens": 40, "samples": 2}))
    responses = sample_known(inputs, tmp_path, silent)
    sae = inputs.sae
    assert sae is not None
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert get_sae(inputs, tmp_path, responses, silent) is sae
    healthy = read_json(tmp_path / "sae.json")
    assert (healthy["findings"], healthy["layer"], list(healthy["fvu_by_layer"])) == ([], 2, ["2"])
    moved = replace(sae, meta=replace(sae.meta, layer=4))
    with pytest.warns(UserWarning, match="^sae: likely a wrong layer: .* on block 2 than on block 4"):
        get_sae(replace(inputs, sae=moved), tmp_path / "moved", responses, silent)
    wrong = read_json(tmp_path / "moved" / "sae.json")
    assert wrong["layer"] == 4 and len(wrong["findings"]) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_sae(replace(inputs, sae=moved), tmp_path / "moved", responses, silent)


def test_killed_right_after_an_sae_is_trained_its_fit_is_not_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = {"limit": 24, "samples": 4, "layer": 2, "sae_expansion": 1, "sae_k": 8, "sae_tokens": 1024}
    inputs = prepare(make_config(**QUICK | small))
    responses = sample_known(inputs, tmp_path, silent)

    def killed(*_: object) -> None:
        raise Killed

    for name in ("save_sae", "write_json"):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(f"mechreward.pipeline.{name}", killed)
            get_sae(inputs, tmp_path, responses, silent)
    get_sae(inputs, tmp_path, responses, silent)
    assert read_json(tmp_path / "sae.json").keys() == {"fvu", "l0", "dead_share"}


def test_stage_seeds_differ_and_depend_on_the_seed() -> None:
    seeds = {stage_seed(seed, stage) for seed in (0, 1) for stage in ("known", "baseline", "gate")}
    assert len(seeds) == 6


@pytest.mark.parametrize(
    ("low", "high", "p_value", "words"),
    [
        (0.01, 0.2, 0.04, "accuracy rose by"),
        (-0.2, -0.01, 0.04, "accuracy fell by"),
        (-0.1, 0.1, 0.04, "inconclusive, accuracy changed by"),
        (0.25, 0.3, 0.5, "inconclusive, accuracy changed by"),
    ],
)
def test_verdict_says_what_interval_and_test_allow(low: float, high: float, p_value: float, words: str) -> None:
    paired = {"difference": (low + high) / 2, "low": low, "high": high, "p_value": p_value}
    arm = {"before": {"accuracy": 0.5}, "after": {"accuracy": 0.5 + (low + high) / 2}, "paired": paired}
    assert words in verdict_words({"arms": {"dense": arm}, "between": []})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "questions: is needed and was not given"),
        ({"questions": "tiny:easy", "stpes": 3}, "stpes: there is no such field; there are questions, model"),
        ({"questions": "tiny:easy", "known": 1.5}, "known: 1.5 is not allowed (Input should be less than 1)"),
        ({"questions": "tiny:easy", "arms": ("magic",)}, "arms.0: 'magic' is not allowed"),
        ({"questions": "tiny:easy", "sae_id": "layer_12"}, "sae_id: 'layer_12' is of sae, which was not given"),
        ({"questions": "tiny:easy", "pooling": "last_0"}, "pooling: 'last_0' is not allowed"),
        ({"questions": "tiny:easy", "sae_tokens": 511}, "sae_tokens: 511 is not allowed (Input should be greater"),
    ],
)
def test_make_config_names_field_value_and_what_is_allowed(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as error:
        make_config(**values)
    assert str(error.value).startswith(message)


def test_config_survives_yaml(tmp_path: Path) -> None:
    from mechreward.settings import read_fields

    config = make_config(**QUICK)
    (tmp_path / "c.yaml").write_text(json.dumps(config.model_dump(mode="json")))
    assert ImproveConfig(**read_fields(ImproveConfig, tmp_path / "c.yaml")) == config
