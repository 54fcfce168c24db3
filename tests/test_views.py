"""What chains.json shows, with features that are made up: which chains, read with which ids and sizes, how marked."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from mechreward import views
from mechreward.chains import Step
from mechreward.config import make_config
from mechreward.features import FeaturePack, load_pack, save_pack
from mechreward.features.fired import FiredStep
from mechreward.files import read_json
from mechreward.inputs import Inputs
from mechreward.models import LoadedModel
from mechreward.rollout import Response, save_responses
from mechreward.sae import SAE, load_sae
from mechreward.steering import Repaired, save_repairs
from mechreward.tasks import Question, QuestionSplit
from mechreward.tiny import SAE_FOLDER
from mechreward.verifiers import gsm8k_exact_match

PACK: FeaturePack = load_pack("tiny/reasoning_pack")
UP, DOWN = PACK.features[0].id, next(i for i in range(9999) if i not in PACK.feature_ids())


@pytest.fixture(scope="module")
def sae() -> SAE:
    return load_sae(str(SAE_FOLDER))


@pytest.fixture
def inputs(tiny_llama, char_tokenizer, sae: SAE, tmp_path: Path) -> Inputs:
    sides = ([Question(f"{side}{i}", f"{side} {i} ?", str(i)) for i in range(13)] for side in ("k", "u"))
    config = make_config(questions="tiny:easy", method="both", critical="solution", out=tmp_path)
    loaded = LoadedModel(tiny_llama, char_tokenizer, "m")
    save_pack(PACK, tmp_path / "pack.json")
    return Inputs(config, QuestionSplit(*sides), gsm8k_exact_match, loaded, 2, sae)


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What `fired_steps` is asked; the first feature it is given fires in the only step of the first response."""
    asked: list[tuple[Any, ...]] = []

    def fired_steps(
        _: LoadedModel, __: SAE, prompts: Sequence[Any], ids: Sequence[Any], sizes: Mapping[int, float]
    ) -> list[list[FiredStep]]:
        asked.append((list(map(tuple, prompts)), list(map(tuple, ids)), dict(sizes)))
        found = [((next(iter(sizes)), 1.23456),), ()]
        return [[FiredStep(Step("", 0, 0, 0, len(row)), fires)] for row, fires in zip(ids, found, strict=True)]

    monkeypatch.setattr(views, "fired_steps", fired_steps)
    return asked


def repaired(inputs: Inputs, place: int) -> Repaired:
    texts = f"ab{place % 10}cd", f"ab{place % 10}efg"
    ids = [tuple(inputs.loaded.tokenizer(text)["input_ids"]) for text in texts]
    edits = [
        {"feature": UP, "value": 1.0, "mode": "pin", "size": 2.5},
        {"feature": DOWN, "value": 0.0, "mode": "pin", "size": 0.5},
    ]
    rules = json.dumps({"rules": [{"edits": edits[:: 1 if place else -1], "condition": None, "vector": None}]})
    return Repaired(f"k{place}", 0, (0, 10 + place), ids[0], 3, ids[1], texts[0], texts[1], rules)


def test_repairs_are_taken_evenly_and_read_in_the_units_that_they_were_pinned_in(
    inputs: Inputs, sae: SAE, tmp_path: Path, read: list
) -> None:
    made = [repaired(inputs, place) for place in range(13)]
    save_repairs(tmp_path / "repairs.parquet", made)
    for name in ("baseline", "final-dense"):
        save_responses(tmp_path / "responses" / f"{name}.parquet", [])
    views.write_views(inputs, tmp_path, sae)
    shown = read_json(tmp_path / "chains.json")["views"]
    assert [view["question_id"] for view in shown] == [f"k{place}" for place in (0, 2, 4, 6, 8, 10)]
    for (prompts, ids, sizes), one in zip(read, made[:12:2], strict=True):
        assert (prompts, ids) == ([one.prompt_ids] * 2, [one.wrong_ids, one.repaired_ids])
        assert sizes == {UP: 2.5, DOWN: 0.5}
    (wrong,), (right,) = shown[1]["before"]["steps"], shown[1]["after"]["steps"]
    assert wrong["parts"] == [["kept", "ab2"], ["critical", "c"], ["kept", "d"]]
    assert right["parts"] == [["kept", "ab2"], ["new", "efg"]]
    name = PACK.features[0].name
    assert wrong["fired"] == [{"feature": UP, "name": name, "value": 1.2346, "side": "right"}] and not right["fired"]
    assert shown[0]["before"]["steps"][0]["fired"] == [{"feature": DOWN, "name": "", "value": 1.2346, "side": "wrong"}]
    assert (shown[1]["prompt"], shown[1]["answer"]) == ("k 2 ?", "2")
    views.write_views(inputs, tmp_path, sae)
    assert len(read) == 6, "what is there is not read again"


def test_responses_are_read_in_the_pack_s_units_and_marked_from_where_they_part(
    inputs: Inputs, sae: SAE, tmp_path: Path, read: list
) -> None:
    save_repairs(tmp_path / "repairs.parquet", [])

    def answer(text: str, correct: bool, prompt: int) -> Response:
        ids = tuple(inputs.loaded.tokenizer(text)["input_ids"])
        return Response("u3", 1, (0, prompt), ids, text, (0.0,) * len(ids), "eos", correct)

    old, new = answer("ab1cd", False, 7), answer("ab2", True, 8)
    save_responses(tmp_path / "responses" / "baseline.parquet", [old])
    save_responses(tmp_path / "responses" / "final-dense.parquet", [new])
    views.write_views(inputs, tmp_path, sae)
    (view,) = read_json(tmp_path / "chains.json")["views"]
    assert read == [
        ([(0, 7), (0, 8)], [old.completion_ids, new.completion_ids], {f.id: f.scale for f in PACK.features})
    ]
    assert (view["kind"], view["before"]["correct"], view["after"]["correct"]) == ("dense", False, True)
    assert view["before"]["steps"][0]["parts"] == [["kept", "ab1cd"]]
    assert view["after"]["steps"][0]["parts"] == [["kept", "ab"], ["new", "2"]]
    first = PACK.features[0]
    side = "right" if first.weight > 0 else "wrong"
    assert view["before"]["steps"][0]["fired"] == [
        {"feature": first.id, "name": first.name, "value": 1.2346, "side": side}
    ]
