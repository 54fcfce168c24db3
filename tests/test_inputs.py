"""What a run starts from: where each setting arrives, what a resumed run refuses, lenient verdicts."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mechreward import inputs as room
from mechreward.config import ImproveConfig, make_config, make_train_config
from mechreward.errors import InputError
from mechreward.features import FeaturePack, PackFeature, sae_ref, save_pack
from mechreward.files import read_json
from mechreward.inputs import (
    Inputs,
    load_policy,
    load_reward,
    load_run_reward,
    load_sides,
    open_folder,
    prepare,
    verifier_of,
)
from mechreward.models import LoadedModel
from mechreward.sae import SAE, load_sae, save_sae
from mechreward.studies.config import make_study
from mechreward.tasks import Columns, Question, QuestionSplit, split_questions
from mechreward.tiny import MODEL, SAE_FOLDER
from mechreward.verifiers import gsm8k_exact_match

QUESTIONS = [Question(f"q{i}", f"what is {i} ?", str(i)) for i in range(20)]


@pytest.fixture(scope="module")
def sae() -> SAE:
    return load_sae(str(SAE_FOLDER))


def made(
    loaded: LoadedModel, sae: SAE | None, out: Path, *, answer: str = "19", config: Any = make_config, **more: Any
):
    known, unknown = QUESTIONS[:10], [*QUESTIONS[10:19], replace(QUESTIONS[19], answer=answer)]
    settings: ImproveConfig = config(questions="tiny:easy", out=out, **more)
    return Inputs(settings, QuestionSplit(known, unknown), gsm8k_exact_match, loaded, 2, sae)


@pytest.fixture
def loaded(tiny_llama, char_tokenizer) -> LoadedModel:
    return LoadedModel(tiny_llama, char_tokenizer, "m")


def test_lenient_takes_the_lenient_verdict() -> None:
    strict, lenient = (verifier_of("gsm8k_exact_match", kind) for kind in ("strict", "lenient"))
    for completion, verdicts in (("so 18", (False, True)), ("#### 18", (True, True)), ("so 17", (False, False))):
        assert (strict("", completion, "18").correct, lenient("", completion, "18").correct) == verdicts


def test_settings_arrive_where_questions_and_model_are_loaded(
    loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[Any, ...]] = []
    monkeypatch.setattr(room, "load_questions", lambda *given, **options: asked.append((given, options)) or QUESTIONS)
    monkeypatch.setattr(room, "load_model", lambda *given, **options: asked.append((given, options)) or loaded)
    config = make_config(
        questions="some:source", model="some/model", adapter="some/adapter", dtype="bfloat16", device="cuda:1",
        layer=1, id_column="i", question_column="q", answer_column="a", limit=20, seed=9, known=0.3,
        max_new_tokens=64,
        split="dev", prompt_format="Q: {question}", generator_options={"min_terms": 2},
    )  # fmt: skip
    found = prepare(config)
    assert asked == [
        (("some:source",), {
            "columns": Columns(id="i", question="q", answer="a"), "split": "dev", "limit": 20, "seed": 9,
            "prompt_format": "Q: {question}", "options": {"min_terms": 2},
        }),
        (("some/model",), {"adapter": "some/adapter", "dtype": "bfloat16", "device": "cuda:1"}),
    ]  # fmt: skip
    assert found.split == split_questions(QUESTIONS, 0.3, 9) != split_questions(QUESTIONS, 0.3, 0)
    assert (found.layer, found.sae, load_policy(config)) == (1, None, loaded)


def test_unknown_questions_may_come_from_a_second_source(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Any, dict[str, Any]]] = []
    others = [Question("q1", "what is 50 ?", "50")]

    def load(source: str, **options: Any) -> list[Question]:
        asked.append((source, options))
        return QUESTIONS if len(asked) % 2 else others

    monkeypatch.setattr(room, "load_questions", load)
    monkeypatch.setattr(room, "load_model", lambda *_, **__: loaded)
    fields: dict[str, Any] = {
        "questions": "some/source", "layer": 1, "id_column": "i", "limit": 20, "seed": 9, "max_new_tokens": 20,
        "generator_options": {"name": "main"}, "split": "train", "eval_questions": "some/other",
    }  # fmt: skip
    found = prepare(make_config(**fields, eval_split="dev", eval_limit=1, eval_generator_options={"name": "x"}))
    assert found.split == (QUESTIONS, [Question("eval-q1", "what is 50 ?", "50")])
    (first, known), (second, unknown) = asked
    assert (first, second) == ("some/source", "some/other")
    assert {name for name in known if known[name] != unknown[name]} == {"split", "limit", "seed", "options"}
    assert (unknown["split"], unknown["limit"], unknown["options"]) == ("dev", 1, {"name": "x"})
    # By default the split and, of one source, the options are those of the first.
    for source, options in (("some/other", {}), ("some/source", {"name": "main"})):
        prepare(make_config(**fields | {"eval_questions": source}))
        assert (asked[-1][1]["split"], asked[-1][1]["limit"], asked[-1][1]["options"]) == ("train", None, options)
    with pytest.raises(InputError, match="^eval_split: 'dev' means nothing to tiny:easy, which is no dataset$"):
        prepare(make_config(**fields | {"eval_questions": "tiny:easy", "eval_split": "dev"}))
    others[0] = Question("q1", "what is 50 ?", "fifty")
    asked.clear()
    with pytest.raises(InputError, match=r"^answer: 'fifty' is not a number.*\(question eval-q1\)"):
        prepare(make_config(**fields))
    others[0] = Question("q1", "5" * 500, "50")
    asked.clear()
    with pytest.raises(InputError, match="eval-q1.*needs 500 prompt tokens"):
        prepare(make_config(**fields))


def test_a_generator_asked_twice_gives_other_questions() -> None:
    twice = make_config(questions="tiny:easy", eval_questions="tiny:easy", limit=20, eval_limit=20)
    split = load_sides(twice, gsm8k_exact_match)
    assert len({q.prompt for side in split for q in side}) == 40


def test_an_adapter_and_a_new_one_are_refused(loaded: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "load_questions", lambda *_, **__: QUESTIONS)
    adapted = get_peft_model(copy.deepcopy(loaded.model), LoraConfig(r=2, target_modules="all-linear"))
    monkeypatch.setattr(room, "load_model", lambda *_, **__: replace(loaded, model=adapted))
    with pytest.raises(InputError, match="^lora_rank: 2, but the model has an adapter"):
        prepare(make_config(questions="some:source", layer=1, lora_rank=2))


def test_a_resumed_run_keeps_what_it_started_from(loaded: LoadedModel, sae: SAE, tmp_path: Path) -> None:
    out = open_folder(made(loaded, sae, tmp_path / "run"))
    assert set(read_json(out / "manifest.json")["hashes"]) == {"questions", "model", "sae"}
    assert open_folder(made(loaded, sae, out, resume=True)) == out
    other = replace(sae, b_dec_D=sae.b_dec_D + 1)
    trained = replace(loaded, model=copy.deepcopy(loaded.model))
    with torch.no_grad():
        next(trained.model.parameters()).view(-1)[0] += 1
    for changed, sentence in (
        (made(loaded, sae, out, resume=True, answer="20"), "^resume: questions changed since the run in"),
        (made(trained, sae, out, resume=True), "^resume: model changed since the run in"),
        (made(loaded, other, out, resume=True), "^resume: sae changed since the run in"),
        (made(loaded, sae, out, resume=True, seed=1), "^seed: 1 is not what the run in .* was started with"),
    ):
        with pytest.raises(InputError, match=sentence):
            open_folder(changed)


def test_a_study_may_go_on_with_more_workers(loaded: LoadedModel, sae: SAE, tmp_path: Path) -> None:
    out = open_folder(made(loaded, sae, tmp_path / "run", config=make_study))
    assert open_folder(made(loaded, sae, out, config=make_study, resume=True, workers=4)) == out
    with pytest.raises(InputError, match=r"^seeds: \[5\] is not what the run in"):
        open_folder(made(loaded, sae, out, config=make_study, resume=True, seeds=(5,)))


def test_the_sae_of_a_run_is_the_one_given_or_the_one_it_trained(sae: SAE, tmp_path: Path) -> None:
    other = replace(sae, b_dec_D=sae.b_dec_D + 1)
    save_sae(other, tmp_path / "sae")
    for read_with, more in ((sae, {}), (other, {"layer": 2})):
        save_pack(a_pack(read_with), tmp_path / "pack.json")
        reward = load_run_reward(make_config(questions="tiny:easy", **more), tmp_path)
        assert reward.sae.weights_hash == read_with.weights_hash
    save_pack(a_pack(sae), tmp_path / "pack.json")
    given = make_train_config(questions="tiny:easy", pack="long gone", model="some/model", sae=str(SAE_FOLDER))
    assert load_run_reward(given, tmp_path).sae.weights_hash == sae.weights_hash


def a_pack(sae: SAE, **names: Any) -> FeaturePack:
    ref = sae_ref(sae).model_copy(update=names)
    return FeaturePack(name="p", model_name="m", sae=ref, features=[PackFeature(id=3, weight=1.0, scale=2.0)])


def test_a_pack_is_read_with_the_sae_that_is_named_or_else_with_its_own(sae: SAE, tmp_path: Path) -> None:
    other = replace(sae, b_dec_D=sae.b_dec_D + 1)
    save_sae(other, tmp_path / "other")
    mine, path = str(tmp_path / "other"), tmp_path / "pack.json"
    save_pack(a_pack(other, release=mine, sae_id=""), path)
    for model, named in (("some/model", None), ("some/model", mine), ("tiny", mine)):
        assert load_reward(path, model, named).sae.weights_hash == other.weights_hash
    with pytest.raises(InputError, match="^sae: pack p was made for an SAE with weights_hash"):
        load_reward(path, "tiny")
    with pytest.raises(InputError, match="^sae: "):
        load_reward(path, "some/model", str(SAE_FOLDER))
    # The bundled pack names its SAE `tiny`, wherever the bundled model is read from.
    for model in ("tiny", str(MODEL)):
        assert load_reward("tiny/reasoning_pack", model).sae.weights_hash == sae.weights_hash
    with pytest.raises(InputError, match="layer"):
        load_reward("tiny/reasoning_pack", "tiny", layer=1)
