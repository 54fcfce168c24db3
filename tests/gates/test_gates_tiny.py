"""Gate 1 on the bundled reasoner, where the truth is known: it passes what it should and nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch

from mechreward.features import ContrastTable, FeaturePack, PackFeature, build_pack, discover, pool_features, sae_ref
from mechreward.features.pooling import pooled_activations
from mechreward.gates import Gate1Result, dense, gate1, reading
from mechreward.models import LoadedModel, iter_residuals, load_model
from mechreward.reward import FeatureReward
from mechreward.rollout import Response, sample_responses, verify_responses
from mechreward.sae import SAE, load_sae
from mechreward.tasks import load_questions
from mechreward.tiny import MODEL, SAE_FOLDER
from mechreward.verifiers import gsm8k_exact_match

pytestmark = pytest.mark.slow
N_FEATURES = 20


@dataclass(frozen=True)
class World:
    loaded: LoadedModel
    sae: SAE
    discovery: list[Response]
    held_out: list[Response]
    table: ContrastTable


@pytest.fixture(scope="module")
def world() -> World:
    loaded, sae = load_model(str(MODEL)), load_sae(SAE_FOLDER)
    questions = load_questions("tiny:easy", limit=160, seed=3)
    responses = sample_responses(loaded, questions, n=8, max_new_tokens=96, seed=3)
    responses = verify_responses(responses, questions, gsm8k_exact_match)
    discovery, held_out = responses[: 60 * 8], responses[60 * 8 :]
    return World(loaded, sae, discovery, held_out, discover(loaded, sae, discovery))


@pytest.fixture(scope="module", autouse=True)
def _states_are_read_once() -> Iterator[None]:
    """What no pack has a part in, states and activations of the same responses, is read for the first and kept."""
    kept: dict[tuple[object, ...], list[Any]] = {}

    def once(inner: Callable[..., Iterator[Any]], key: Callable[..., tuple[object, ...]]) -> Callable[..., Any]:
        def read(*given: Any) -> list[Any]:
            name = (inner, *key(*given))
            if name not in kept:
                kept[name] = list(inner(*given))
            return kept[name]

        return read

    def of_rows(_model: object, prompts: list[list[int]], completions: list[list[int]], *rest: int):
        return str((prompts, completions)), rest

    def of_sae(_loaded: object, sae: SAE, responses: list[Response], pooling: str):
        return sae.weights_hash, tuple(responses), pooling

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reading, "iter_residuals", once(iter_residuals, of_rows))
        patch.setattr(dense, "pooled_activations", once(pooled_activations, of_sae))
        yield


def judged(world: World, pack: FeaturePack) -> Gate1Result:
    return gate1(FeatureReward(pack, world.sae), world.held_out, world.loaded, table=world.table)


def pack_of(world: World, ids: list[int], weights: list[float]) -> FeaturePack:
    """These features at their own scale, so that each takes part."""
    scales = world.table.frame.set_index("id")["scale"]
    features = [
        PackFeature(id=i, weight=w, scale=float(scales[i])) for i, w in zip(ids, weights, strict=True) if scales[i] > 0
    ]
    return FeaturePack(name="tiny/made", version="1", model_name="tiny", sae=sae_ref(world.sae), features=features)


def test_the_discovered_pack_passes(world: World) -> None:
    pack = build_pack(world.table, world.sae, name="tiny/found", model_name="tiny", n_features=N_FEATURES)
    result = judged(world, pack)
    assert result.verdict == "pass", result.reason
    assert result.rows[0].within.low > 0.8
    assert result.n_questions == 100


def test_length_features_do_not_pass(world: World) -> None:
    """The features whose mean activation is best explained by the length of the response, signed to grow with it."""
    pooled_NF, lengths = pooled(world, world.discovery)
    ids = np.argsort(-explained(pooled_NF, lengths))[:N_FEATURES]
    signs = [float(np.sign(np.corrcoef(pooled_NF[:, i], lengths)[0, 1])) for i in ids]
    result = judged(world, pack_of(world, ids.tolist(), signs))
    assert result.verdict != "pass"
    assert result.rows[0].within.low < 0.55


def pooled(world: World, responses: list[Response]) -> tuple[np.ndarray, np.ndarray]:
    prompts, completions = [list(r.prompt_ids) for r in responses], [list(r.completion_ids) for r in responses]
    found = np.zeros((len(responses), world.sae.d_sae))
    for batch in iter_residuals(world.loaded.model, prompts, completions, world.sae.meta.layer):
        found[batch.rows] = pool_features(world.sae, batch.h_BTD, batch.mask_BT, "mean").numpy()
    return found, np.array([len(ids) for ids in completions], dtype=float)


def test_lexical_features_do_not_pass(world: World) -> None:
    """Features that fire on one token whatever the strategy: a token's identity explains when they fire."""
    ids = lexical_ids(world)
    result = judged(world, pack_of(world, ids, [1.0] * len(ids)))
    assert len(ids) == N_FEATURES
    assert result.verdict != "pass"
    assert result.rows[0].within.low < 0.55


def lexical_ids(world: World) -> list[int]:
    """Those of largest share of activation variance explained by token identity, among features that fire."""
    token_N, acts_NF = [], []
    for response in world.discovery[:80]:
        h_BTD = next(
            iter(
                iter_residuals(
                    world.loaded.model,
                    [list(response.prompt_ids)],
                    [list(response.completion_ids)],
                    world.sae.meta.layer,
                )
            )
        ).h_BTD
        acts_NF.append(world.sae.encode(h_BTD[0]))
        token_N += response.completion_ids
    explained_F = explained(torch.cat(acts_NF).numpy(), np.array(token_N))
    return [int(i) for i in np.argsort(-explained_F)[:N_FEATURES]]


def explained(acts_NF: np.ndarray, kind_N: np.ndarray) -> np.ndarray:
    """Share of each feature's variance that lies between kinds (eta squared); -1 for features that hardly fire."""
    total_F = ((acts_NF - acts_NF.mean(0)) ** 2).sum(0)
    groups = [acts_NF[kind_N == kind] for kind in np.unique(kind_N)]
    within_F = sum(((group - group.mean(0)) ** 2).sum(0) for group in groups)
    return np.where((acts_NF > 0).mean(0) > 0.01, 1 - within_F / np.maximum(total_F, 1e-9), -1.0)


@pytest.mark.parametrize("seed", range(5))
def test_random_features_do_not_pass(world: World, seed: int) -> None:
    """Random live features of random sign: what the gate says of a pack nobody looked for."""
    rng = random.Random(seed)
    frame = world.table.frame
    live = [int(i) for i in frame["id"][frame["scale"] > 0]]
    found = build_pack(world.table, world.sae, name="tiny/found", model_name="tiny", n_features=N_FEATURES)
    ids = rng.sample(sorted(set(live) - set(found.feature_ids())), N_FEATURES)
    result = judged(world, pack_of(world, ids, [rng.choice((-1.0, 1.0)) for _ in ids]))
    assert result.verdict != "pass"


def test_shuffled_labels_do_not_pass(world: World) -> None:
    """The same search on labels dealt anew within each question finds nothing that holds."""
    rng = random.Random(0)
    shuffled: list[Response] = []
    for start in range(0, len(world.discovery), 8):
        group = world.discovery[start : start + 8]
        labels = [response.correct for response in group]
        rng.shuffle(labels)
        shuffled += [replace(r, correct=label) for r, label in zip(group, labels, strict=True)]
    table = discover(world.loaded, world.sae, shuffled)
    options = {"name": "tiny/shuffled", "model_name": "tiny", "q_max": 1.0, "min_stability": 0.0}
    result = judged(world, build_pack(table, world.sae, n_features=N_FEATURES, **options))
    assert result.verdict != "pass"
    assert result.rows[0].within.low < 0.55
