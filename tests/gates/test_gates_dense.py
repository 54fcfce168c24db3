"""Rivals that read the same states, against hand-made states and naive loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mechreward.features import pooled_activations
from mechreward.gates import read_scores, within_question_auroc
from mechreward.gates.dense import dense_rivals, matched_pack, random_weight_sae, raw_direction
from mechreward.models import LoadedModel, read_residuals
from mechreward.reward import FeatureReward
from mechreward.rollout import Response
from mechreward.sae import SAE, SAEMeta

WIDTH, LAYER, FEATURES = 32, 1, 48


@pytest.fixture
def loaded(tiny_llama: PreTrainedModel, char_tokenizer: PreTrainedTokenizerFast) -> LoadedModel:
    return LoadedModel(tiny_llama, char_tokenizer, "tiny")


@pytest.fixture
def sae() -> SAE:
    weights = torch.randn(WIDTH, FEATURES, generator=torch.Generator().manual_seed(0))
    meta = SAEMeta(release="r", sae_id="s", layer=LAYER, model_name="m", hook_name="")
    return SAE("topk", weights, torch.zeros(FEATURES), 2 * weights.T.contiguous(), torch.zeros(WIDTH), meta, k=6)


def responses(n: int = 24) -> list[Response]:
    rng, rows = np.random.default_rng(0), []
    for row in range(n):
        ids = tuple(int(i) for i in rng.integers(4, 60, rng.integers(3, 9)))
        right = bool(rng.random() < 0.5)
        rows.append(Response(f"q{row // 4}", row % 4, (5 + row,), ids, "", (-1.0,) * len(ids), "eos", right))
    return rows


def test_raw_direction_by_hand(sae: SAE) -> None:
    pack = FeatureReward({3: 0.5, 7: -1.0}, sae).pack
    scaled = pack.model_copy(update={"features": [f.model_copy(update={"scale": 4.0}) for f in pack.features]})
    want = (0.5 * sae.W_dec_FD[3] - sae.W_dec_FD[7]).numpy()
    np.testing.assert_allclose(raw_direction(pack, sae), want, rtol=1e-6)
    np.testing.assert_allclose(raw_direction(scaled, sae), want / 4, rtol=1e-6)


def test_dense_rivals_find_a_direction_and_no_noise(sae: SAE) -> None:
    rng = np.random.default_rng(0)
    right, questions = rng.random(480) < 0.5, np.repeat(np.arange(60), 8).astype(str).tolist()
    states = rng.normal(size=(480, WIDTH)) + 3 * np.repeat(rng.normal(size=(60, WIDTH)), 8, axis=0)
    pack = FeatureReward({3: 1.0}, sae).pack
    noise = dense_rivals(pack, sae, states, right, questions)
    assert list(noise) == ["raw direction", "DiffMean", "dense probe"]
    assert all(abs(within_question_auroc(s, right, questions) - 0.5) < 0.09 for s in noise.values())
    direction = sae.W_dec_FD[3].numpy() / np.linalg.norm(sae.W_dec_FD[3])
    found = dense_rivals(pack, sae, states + 3 * right[:, None] * direction, right, questions)
    assert all(within_question_auroc(s, right, questions) > 0.85 for s in found.values())
    np.testing.assert_allclose(noise["raw direction"], states @ sae.W_dec_FD[3].numpy(), rtol=1e-5, atol=1e-5)


def test_random_weight_sae_has_the_shape_and_lengths_and_other_directions(sae: SAE) -> None:
    noise = random_weight_sae(sae, seed=1)
    assert (noise.architecture, noise.k, noise.W_enc_DF.shape) == ("topk", 6, sae.W_enc_DF.shape)
    torch.testing.assert_close(noise.W_enc_DF.norm(dim=0), sae.W_enc_DF.norm(dim=0))
    cosine_F = torch.nn.functional.cosine_similarity(noise.W_enc_DF, sae.W_enc_DF, dim=0)
    assert cosine_F.abs().mean() < 0.25 and noise.weights_hash != sae.weights_hash
    torch.testing.assert_close(noise.W_dec_FD.norm(dim=1), torch.ones(FEATURES))
    assert random_weight_sae(sae, seed=1).weights_hash == noise.weights_hash
    assert random_weight_sae(sae, seed=2).weights_hash != noise.weights_hash


def test_matched_pack_fires_as_often(sae: SAE, loaded: LoadedModel) -> None:
    rows, noise = responses(), random_weight_sae(sae, seed=5)
    # Many enough that several want the same one.
    pack = FeatureReward({i: 0.5 + i for i in range(0, 36, 3)}, sae).pack
    found = matched_pack(pack, sae, noise, rows, loaded)
    assert found is not None and len(set(found.feature_ids())) == 12
    own, other = (
        np.concatenate([b.acts_BF.numpy() for b in pooled_activations(loaded, s, rows, "mean")]) for s in (sae, noise)
    )
    share, spread = (other > 0).mean(0), other.std(0)
    left = set(np.flatnonzero(spread > 0))
    for feature, drawn in zip(pack.features, found.features, strict=True):
        gap = np.abs(share - (own[:, feature.id] > 0).mean())
        assert gap[drawn.id] == min(gap[list(left)]) and drawn.weight == feature.weight
        assert drawn.scale == pytest.approx(spread[drawn.id], rel=1e-5)
        left -= {drawn.id}
    assert found.sae.weights_hash == noise.weights_hash


def test_no_pack_of_an_sae_that_never_fires(sae: SAE, loaded: LoadedModel) -> None:
    eye = torch.eye(WIDTH)
    dead = SAE("relu", eye, torch.full((WIDTH,), -1e4), eye, torch.zeros(WIDTH), sae.meta)
    assert matched_pack(FeatureReward({3: 1.0}, sae).pack, sae, dead, responses(), loaded) is None


@pytest.mark.parametrize("aggregation", ["mean", "last_3"])
def test_states_and_the_noise_pack_are_read_over_the_rewards_tokens(
    sae: SAE, loaded: LoadedModel, aggregation: str
) -> None:
    rows, noise = responses(), random_weight_sae(sae, seed=5)
    reward, other = FeatureReward({3: 1.0}, sae, aggregation), FeatureReward({5: 0.5, 9: 2.0}, noise, aggregation)
    read = read_scores(reward, [], rows, loaded, noise=(noise, other.pack), batch_size=5)
    prompts, completions = [list(r.prompt_ids) for r in rows], [list(r.completion_ids) for r in rows]
    h_BTD, mask_BT = read_residuals(loaded.model, prompts, completions, LAYER)
    kept_BT = reward.readable(h_BTD, mask_BT)
    for row, state in enumerate(read.states_ND):
        own_TD = h_BTD[row][kept_BT[row]]
        want = own_TD.mean(0) if aggregation == "mean" else own_TD[-3:].mean(0)
        np.testing.assert_allclose(state, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(read.noise_N, other.compute(h_BTD, mask_BT), rtol=1e-4, atol=1e-4)
    assert read.packs_PN.shape == (0, 24) and read_scores(reward, [], rows, loaded).noise_N is None
