"""Gate 1 on planted worlds (known residuals, read through a real FeatureReward and SAE), and on a tiny random Llama."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

import mechreward.gates  # noqa: F401
from mechreward.errors import InputError
from mechreward.features import ContrastTable, PackRephrasing, PooledBatch, contrast
from mechreward.gates import (
    Gate1Result,
    Thresholds,
    check_held_out,
    compare,
    gate1,
    judge,
    label_permutation_p,
    read_scores,
)
from mechreward.gates.adversarial import Attacks
from mechreward.gates.gate1 import with_rephrasing
from mechreward.gates.judgement import Judgement
from mechreward.models import LoadedModel, ResidualBatch, read_residuals
from mechreward.reward import FeatureReward
from mechreward.rollout import Response, prompt_hashes
from mechreward.sae import SAE, SAEMeta

WIDTH, LAYER = 32, 1
READING = sys.modules["mechreward.gates.reading"]
# The package's `gate1` is the function.
GATE1 = sys.modules["mechreward.gates.gate1"]


@dataclass
class World:
    """Responses to mixed questions of varying difficulty, and what features 0 and 1 show on each of their tokens."""

    responses: list[Response]
    signal_N: np.ndarray
    difficulty_N: np.ndarray

    @property
    def labels(self) -> np.ndarray:
        return np.array([r.correct is True for r in self.responses])

    @property
    def questions(self) -> list[str]:
        return [r.question_id for r in self.responses]


def make_world(n_questions: int = 80, n_answers: int = 8, seed: int = 0, size: float = 0.0) -> World:
    """Right answers score `size` standard deviations more than wrong ones to the same question."""
    rng = np.random.default_rng(seed)
    rows, signal, difficulty = [], [], []
    for question in range(n_questions):
        chance = rng.uniform(0.1, 0.9)
        for sample in range(n_answers):
            right = bool(rng.random() < chance)
            ids = tuple(int(i) for i in rng.integers(4, 60, rng.integers(3, 9)))
            logprobs = tuple(float(x) for x in -rng.exponential(1, len(ids)))
            rows.append(Response(f"q{question}", sample, (len(rows) % 60,), ids, "", logprobs, "eos", correct=right))
            signal.append(5 + rng.normal() + size * right)
            difficulty.append(5 + 3 * chance)
    return World(rows, np.array(signal), np.array(difficulty))


def make_sae(layer: int = LAYER) -> SAE:
    meta = SAEMeta(release="r", sae_id="s", layer=layer, model_name="m", hook_name="")
    eye = torch.eye(WIDTH)
    return SAE("relu", eye, torch.zeros(WIDTH), eye.clone(), torch.zeros(WIDTH), meta)


@pytest.fixture
def loaded(tiny_llama: PreTrainedModel, char_tokenizer: PreTrainedTokenizerFast) -> LoadedModel:
    return LoadedModel(tiny_llama, char_tokenizer, "tiny")


def plant(monkeypatch: pytest.MonkeyPatch, columns: dict[int, np.ndarray]) -> None:
    """Lets the gate read residuals whose coordinate f is columns[f] of that response, on every token."""

    def fake(
        _model: object, prompts: list[list[int]], completions: list[list[int]], layer: int, batch_size: int
    ) -> Iterator[ResidualBatch]:
        assert layer == LAYER and len(prompts) == len(completions)
        for start in reversed(range(0, len(completions), batch_size)):
            rows = list(range(start, min(start + batch_size, len(completions))))
            longest = max(len(completions[row]) for row in rows)
            h_BTD = torch.zeros(len(rows), longest, WIDTH)
            mask_BT = torch.zeros(len(rows), longest, dtype=torch.bool)
            for place, row in enumerate(rows):
                mask_BT[place, : len(completions[row])] = True
                for feature, column in columns.items():
                    h_BTD[place, :, feature] = float(column[row])
            yield ResidualBatch(rows, h_BTD, mask_BT)

    monkeypatch.setattr(READING, "iter_residuals", fake)
    # These read the model itself, which knows nothing of the planted states; they have tests of their own.
    monkeypatch.setattr(GATE1, "_noise", lambda *_: None)
    monkeypatch.setattr(GATE1, "attack", lambda *_, **__: Attacks(1.0, 0.0, ()))


def run(
    monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel, world: World, score: np.ndarray, **options: object
) -> Gate1Result:
    plant(monkeypatch, {0: score})
    reward = FeatureReward({0: 1.0}, make_sae())
    return gate1(reward, world.responses, loaded, draws=300, **options)


def rows_by_name(result: Gate1Result) -> dict[str, dict]:
    return {row["name"]: row for row in result.table()}


def test_a_signal_within_questions_passes(monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel) -> None:
    world = make_world(size=1.2)
    result = run(monkeypatch, loaded, world, world.signal_N)
    assert result.verdict == "pass" and result.passed
    # Two unit normals 1.2 apart: AUROC = Phi(1.2 / sqrt 2) = .802.
    assert result.rows[0].within.value == pytest.approx(0.802, abs=0.03)
    assert result.rows[0].within.low < 0.802 < result.rows[0].within.high
    assert result.p_value == 1 / 301
    assert (
        "better than mean log-probability, least log-probability, length, format flag, bag of words, reward pre"
        in result.reason
    )
    assert (result.n_questions, result.n_responses, result.questions_needed) == (80, 640, None)
    assert 0.8 * 80 < result.n_mixed <= 80
    assert result.spec_hash == FeatureReward({0: 1.0}, make_sae()).spec_hash
    validation = result.validation()
    assert (validation.verdict, validation.spec_hash) == ("pass", result.spec_hash)
    assert validation.interval == (result.rows[0].within.low, result.rows[0].within.high)


def test_pure_difficulty_fails_though_its_auroc_is_high(monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel) -> None:
    world = make_world()
    result = run(monkeypatch, loaded, world, world.difficulty_N)
    assert result.verdict == "fail"
    assert result.rows[0].auroc.low > 0.7
    # Equal answers tie but for the rounding of a mean over their tokens.
    assert result.rows[0].within.value == pytest.approx(0.5, abs=0.05)
    assert "cannot be told from chance" in result.reason or "lies below 0.55" in result.reason


def test_shuffled_labels_fail(monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel) -> None:
    world = make_world(size=1.2)
    rng = np.random.default_rng(3)
    shuffled = rng.permutation(world.labels)
    world.responses = [replace(r, correct=bool(y)) for r, y in zip(world.responses, shuffled, strict=True)]
    assert run(monkeypatch, loaded, world, world.signal_N).verdict == "fail"


def test_the_wrong_sign_fails(monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel) -> None:
    world = make_world(size=-1.2)
    result = run(monkeypatch, loaded, world, world.signal_N)
    assert result.verdict == "fail" and result.rows[0].within.value < 0.25


def with_length_signal(world: World, seed: int = 4) -> World:
    """Right answers are some tokens shorter: length tells, and nothing else does."""
    rng = np.random.default_rng(seed)
    rows = []
    for response in world.responses:
        n = int(rng.integers(6, 12)) + (0 if response.correct else 3)
        ids = tuple(int(i) for i in rng.integers(4, 60, n))
        rows.append(replace(response, completion_ids=ids, logprobs=tuple(-rng.exponential(1, n))))
    return World(rows, world.signal_N, world.difficulty_N)


def test_a_reward_that_tracks_length_fails(monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel) -> None:
    world = with_length_signal(make_world())
    lengths = np.array([len(r.completion_ids) for r in world.responses], dtype=float)
    result = run(monkeypatch, loaded, world, 30 - lengths)
    rows = rows_by_name(result)
    assert rows["feature reward"]["low"] > 0.6 and result.p_value < 0.01
    # Shorter is better here: the baseline is turned round, and is then the same score.
    assert rows["length"]["within_auroc"] == pytest.approx(rows["feature reward"]["within_auroc"])
    assert result.verdict == "fail" and "length is as good" in result.reason


def test_a_noisy_length_reward_does_not_pass(monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel) -> None:
    world = with_length_signal(make_world())
    lengths = np.array([len(r.completion_ids) for r in world.responses], dtype=float)
    noise = np.random.default_rng(0).normal(0, 1, len(lengths))
    result = run(monkeypatch, loaded, world, 30 - lengths + noise)
    assert result.verdict == "fail" and "length is as good" in result.reason


def test_a_lexical_reward_fails(monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel) -> None:
    """Right answers hold token 7 more often, and every token has its worth: a reward that is the mean worth of an
    answer's tokens tells right from wrong, but what it tells is in the words."""
    world = make_world()
    rng = np.random.default_rng(5)
    rows = []
    for response in world.responses:
        ids = [i if i != 7 else 8 for i in response.completion_ids]
        ids[0] = 7 if rng.random() < (0.85 if response.correct else 0.15) else 9
        rows.append(replace(response, completion_ids=tuple(ids)))
    world.responses = rows
    worth = rng.normal(0, 0.3, 60)
    worth[7], worth[9] = 3, 1
    score = np.array([5 + worth[list(r.completion_ids)].mean() for r in rows])
    result = run(monkeypatch, loaded, world, score)
    by_name = rows_by_name(result)
    assert result.rows[0].within.low > 0.65 and result.p_value < 0.01
    assert by_name["bag of words"]["within_auroc"] > 0.75
    assert abs(by_name["reward predicted from words"]["difference"]) < 0.01
    assert result.verdict == "fail" and "reward predicted from words is as good" in result.reason
    # The noiseless detector of that one word, which a fitted bag of words only comes near to, does not pass either.
    fires = np.array([1.0 + (7 in r.completion_ids) for r in rows])
    result = run(monkeypatch, loaded, world, fires)
    assert result.rows[0].within.low > 0.8 and result.verdict != "pass"
    assert "reward predicted from words" in result.reason


def test_confident_answers_being_right_is_the_log_probability(
    monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel
) -> None:
    world = make_world()
    rows = [replace(r, logprobs=(-1.0 + 0.5 * r.correct + 0.01 * i,) * len(r.completion_ids))
            for i, r in enumerate(world.responses)]  # fmt: skip
    world.responses = rows
    score = np.array([r.logprobs[0] for r in rows]) + 20
    result = run(monkeypatch, loaded, world, score)
    assert result.verdict == "fail" and "mean log-probability is as good" in result.reason


def test_random_scores_do_not_pass() -> None:
    """40 worlds without signal; the whole of the gate but the forward and the baselines, which can only fail more."""
    passed = 0
    for seed in range(40):
        world = make_world(40, 8, seed=100 + seed)
        rows = compare(world.signal_N, {}, world.responses, draws=200, seed=seed)
        p_value = label_permutation_p(world.signal_N, world.labels, world.questions, draws=200, seed=seed)
        passed += judge(rows[0], [], p_value, 40, 40, Thresholds()).verdict == "pass"
    assert passed <= 2


def test_a_weak_signal_in_few_questions_is_inconclusive(monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel) -> None:
    world = make_world(30, 6, seed=0, size=0.4)
    result = run(monkeypatch, loaded, world, world.signal_N)
    assert result.verdict == "inconclusive"
    assert result.questions_needed is not None and 30 < result.questions_needed < 1000
    assert f"about {result.questions_needed:,} such questions would decide" in result.reason


def test_too_few_mixed_questions_are_said_in_words(monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel) -> None:
    world = make_world(40, 8, size=3.0)
    mixed = {"q3", "q9"}
    world.responses = [r if r.question_id in mixed else replace(r, correct=False) for r in world.responses]
    result = run(monkeypatch, loaded, world, world.signal_N)
    assert result.verdict == "inconclusive" and result.n_mixed == 2
    assert result.reason == "only 2 of 40 questions have both right and wrong answers, 20 are needed"


@pytest.mark.parametrize("right, word", [(True, "right"), (False, "wrong")])
def test_answers_all_alike_need_no_forward(
    monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel, right: bool, word: str
) -> None:
    monkeypatch.setattr(READING, "iter_residuals", None)
    world = make_world(20, 2)
    responses = [replace(r, correct=right) for r in world.responses]
    result = gate1(FeatureReward({0: 1.0}, make_sae()), responses, loaded)
    words = f"all answers are {word}, so none of 20 questions have both right and wrong answers, 20 are needed"
    assert (result.verdict, result.reason, result.rows) == ("inconclusive", words, ())
    assert result.validation().within_auroc is None and result.accuracy == float(right)
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["p_value"] is None


def make_table(world: World, columns: dict[int, np.ndarray]) -> ContrastTable:
    """The contrast of the planted features, each question in a batch."""
    acts = np.zeros((len(world.responses), WIDTH), dtype=np.float32)
    for feature, column in columns.items():
        acts[:, feature] = column
    questions = np.array(world.questions)
    batches = []
    for question in dict.fromkeys(world.questions):
        rows = np.flatnonzero(questions == question)
        labels = torch.tensor(world.labels[rows])
        batches.append(PooledBatch([question] * len(rows), labels, torch.tensor(acts[rows])))
    return contrast(batches)


def test_random_packs_are_scored_like_the_reward(monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel) -> None:
    world = make_world(size=1.2)
    rng = np.random.default_rng(1)
    columns = {0: world.signal_N} | {f: 5 + rng.normal(size=640) for f in range(1, 6)}
    plant(monkeypatch, columns)
    table = make_table(world, columns)
    result = gate1(FeatureReward({0: 1.0}, make_sae()), world.responses, loaded, table=table, n_random=4, draws=200)
    row = rows_by_name(result)["random features of equal frequency"]
    assert result.verdict == "pass"
    assert 0.5 <= row["within_auroc"] < 0.54 and row["difference_low"] > 0.2


def test_a_random_pack_that_is_as_good_fails_the_reward(monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel) -> None:
    world = make_world(size=1.2)
    columns = dict.fromkeys(range(4), world.signal_N)
    plant(monkeypatch, columns)
    reward = FeatureReward({0: 1.0}, make_sae())
    result = gate1(reward, world.responses, loaded, table=make_table(world, columns), draws=200)
    assert result.verdict == "fail" and "random features of equal frequency is as good" in result.reason


def test_result_is_json_and_repeats(monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel) -> None:
    world = make_world(30, size=1.0)
    first = run(monkeypatch, loaded, world, world.signal_N, seed=5).to_dict()
    assert first == run(monkeypatch, loaded, world, world.signal_N, seed=5, batch_size=7).to_dict()
    assert json.loads(json.dumps(first, allow_nan=False)) == first
    assert first["thresholds"]["within_auroc"] == 0.55 and (first["seed"], first["draws"]) == (5, 300)
    assert [row["name"] for row in first["rows"]][:3] == [
        "feature reward",
        "mean log-probability",
        "least log-probability",
    ]
    other = run(monkeypatch, loaded, world, world.signal_N, seed=6).to_dict()
    assert other["rows"][0]["low"] != first["rows"][0]["low"]


def test_bad_input(monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel) -> None:
    world = make_world(30)
    reward = FeatureReward({0: 1.0}, make_sae())
    first = world.responses[0]
    with pytest.raises(InputError, match="there are none"):
        gate1(reward, [], loaded)
    with pytest.raises(InputError, match="question q0 has no tokens"):
        gate1(reward, [replace(first, completion_ids=(), logprobs=())], loaded)
    with pytest.raises(InputError, match="correct: it is None"):
        gate1(reward, [replace(first, correct=None)], loaded)
    with pytest.raises(InputError, match=r"logprobs: an answer to question q0 has 0 for \d tokens"):
        gate1(reward, [replace(first, logprobs=()), *world.responses[1:]], loaded)
    with pytest.raises(InputError, match="layer"):
        gate1(FeatureReward({0: 1.0}, make_sae(layer=9)), world.responses, loaded)
    world.signal_N[3] = np.nan
    with pytest.raises(InputError, match="NaN"):
        run(monkeypatch, loaded, world, world.signal_N)


def test_questions_that_the_pack_was_found_on_are_refused(monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel) -> None:
    world = make_world(30, size=2.0)
    plant(monkeypatch, {0: world.signal_N})
    reward = FeatureReward({0: 1.0}, make_sae())

    def of(*prompts: tuple[int, ...]) -> FeatureReward:
        provenance = {"prompts": list(prompt_hashes(prompts))}
        return FeatureReward(reward.pack.model_copy(update={"provenance": provenance}), reward.sae)

    asked = sorted({r.prompt_ids for r in world.responses})
    words = rf"questions: pack \S+ was found on 2 of these {len(asked)}, .* another --seed .* other rows .* --responses"
    with pytest.raises(InputError, match=words):
        gate1(of(asked[0], asked[7], (1, 2, 3)), world.responses, loaded, draws=100)
    assert gate1(of((1, 2, 3)), world.responses, loaded, draws=100).rows
    assert check_held_out(reward.pack, asked) is None


REPHRASED = {"kept": 0.9, "interval": (0.7, 1.1), "kinds": ["names"], "n_families": 50}


@pytest.mark.parametrize(
    ("measured", "verdict", "reason"),
    [
        ("survives", "pass", "AUROC within a question"),
        ("brittle", "fail", "in other words the pack's signal is: brittle"),
        ("inconclusive", "inconclusive", "in other words the pack's signal is: inconclusive"),
        ("no signal", "inconclusive", "in other words the pack's signal is: no signal"),
    ],
)
def test_another_wording_has_to_be_survived_where_that_is_asked(
    monkeypatch: pytest.MonkeyPatch, loaded: LoadedModel, measured: str, verdict: str, reason: str
) -> None:
    world = make_world(size=1.2)
    plant(monkeypatch, {0: world.signal_N})
    plain = FeatureReward({0: 1.0}, make_sae())
    asked = Thresholds(rephrased=True)

    def marked(spec_hash: str) -> FeatureReward:
        mark = PackRephrasing(spec_hash=spec_hash, verdict=measured, **REPHRASED)
        return FeatureReward(plain.pack.model_copy(update={"rephrasing": mark}), plain.sae)

    reward = marked(plain.spec_hash)
    assert reward.spec_hash == plain.spec_hash
    found = gate1(reward, world.responses, loaded, draws=300, thresholds=asked)
    assert found.verdict == verdict and found.reason.startswith(reason) and found.thresholds.rephrased
    assert gate1(reward, world.responses, loaded, draws=300).verdict == "pass"
    for other in (plain, marked("of another reward")):
        with pytest.raises(InputError, match="rephrased: whether pack .* was not measured; run mechreward eval --fuzz"):
            gate1(other, world.responses, loaded, draws=300, thresholds=asked)


def test_a_pack_that_fails_anyway_fails_for_both_reasons() -> None:
    mark = PackRephrasing(spec_hash="", verdict="brittle", **REPHRASED)
    pack = FeatureReward({0: 1.0}, make_sae()).pack
    pack = pack.model_copy(update={"rephrasing": mark.model_copy(update={"spec_hash": pack.spec_hash})})
    assert with_rephrasing(Judgement("fail", "length is as good"), pack) == Judgement(
        "fail", "length is as good; in other words the pack's signal is: brittle"
    )
    unsure = pack.model_copy(update={"rephrasing": pack.rephrasing.model_copy(update={"verdict": "inconclusive"})})
    for verdict in ("fail", "inconclusive"):
        assert with_rephrasing(Judgement(verdict, "why"), unsure) == Judgement(verdict, "why")


@pytest.mark.parametrize("aggregation", ["mean", "max", "last"])
def test_scores_are_the_rewards_own_on_a_real_model(loaded: LoadedModel, aggregation: str) -> None:
    world = make_world(6, 4)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(WIDTH, 48, generator=generator)
    meta = SAEMeta(release="r", sae_id="s", layer=LAYER, model_name="m", hook_name="")
    sae = SAE("topk", weights, torch.zeros(48), weights.T.contiguous(), torch.zeros(WIDTH), meta, k=6)
    reward = FeatureReward({3: 0.5, 7: -1.0, 11: 0.25}, sae, aggregation=aggregation)
    unscaled = FeatureReward({5: 1.0, 40: 0.5}, sae).pack
    features = [feature.model_copy(update={"scale": 0.5 + i}) for i, feature in enumerate(unscaled.features)]
    other = FeatureReward(unscaled.model_copy(update={"features": features}), sae, aggregation=aggregation)
    read = read_scores(reward, [other.pack, reward.pack], world.responses, loaded, batch_size=5)
    judged_N, packs_PN = read.judged_N, read.packs_PN
    prompts = [list(r.prompt_ids) for r in world.responses]
    completions = [list(r.completion_ids) for r in world.responses]
    h_BTD, mask_BT = read_residuals(loaded.model, prompts, completions, LAYER)
    np.testing.assert_allclose(judged_N, reward.compute(h_BTD, mask_BT), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(packs_PN[0], other.compute(h_BTD, mask_BT), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(packs_PN[1], judged_N, rtol=1e-4, atol=1e-4)
    assert len(np.unique(judged_N)) > 10


@pytest.mark.parametrize("aggregation", ["mean", "max", "last_3", "weighted_mean", "step_end:."])
def test_the_gate_pools_as_the_reward_pays(loaded: LoadedModel, aggregation: str) -> None:
    """The gate's score, the reward as a trainer calls it, and its own pack as a baseline are the same numbers."""
    dot = 59
    responses = [
        replace(r, completion_ids=tuple(dot if i % 3 == 0 else i for i in r.completion_ids))
        for r in make_world(4, 4).responses
    ]
    reward = FeatureReward({0: 1.0, 3: -0.5, 9: 2.0}, make_sae(), aggregation=aggregation)
    read = read_scores(reward, [reward.pack], responses, loaded, batch_size=5)
    judged_N, packs_PN = read.judged_N, read.packs_PN
    reward.bind(loaded.model, loaded.tokenizer)
    # The prompts are single characters, which the tokenizer gives back one to one.
    prompts = [loaded.tokenizer.decode(list(response.prompt_ids)) for response in responses]
    kept = [i for i, r in enumerate(responses) if loaded.tokenizer(prompts[i])["input_ids"] == list(r.prompt_ids)]
    paid = reward(prompts, [""] * len(prompts), completion_ids=[list(r.completion_ids) for r in responses])
    assert len(kept) >= 10 and len({round(float(judged_N[i]), 4) for i in kept}) >= 10
    np.testing.assert_allclose([paid[i] for i in kept], judged_N[kept], rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(packs_PN[0], judged_N, rtol=1e-4, atol=1e-5)
