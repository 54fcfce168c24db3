"""The arms' rewards on hand-sized states: a direction is exactly linear, controls pay what they say."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from mechreward.errors import InputError
from mechreward.features import ContrastTable, FeaturePack, PackFeature, sae_ref
from mechreward.gates import within_question_auroc
from mechreward.gates.dense import raw_direction
from mechreward.models import LoadedModel, blocks, iter_residuals, n_blocks
from mechreward.reward import FeatureReward
from mechreward.rollout import Response
from mechreward.sae import SAE, SAEMeta
from mechreward.studies import rewards
from mechreward.studies.rewards import (
    arm_reward,
    certainty_score,
    control_reward,
    direction_reward,
    direction_sae,
    length_score,
    noise_score,
    probe_reward,
    shuffled_pack,
)

SHAPE = {
    "vocab_size": 32, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 32, "eos_token_id": 1, "bos_token_id": 0,
    "pad_token_id": 2,
}  # fmt: skip
META = SAEMeta(release="r", sae_id="i", layer=1, model_name="m", hook_name="model.layers.1")


def states(seed: int = 0, shape: tuple[int, ...] = (3, 5, 4)) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def found(width: int = 4) -> FeatureReward:
    generator = torch.Generator().manual_seed(2)
    w_DF = torch.randn(width, 6, generator=generator)
    sae = SAE("relu", w_DF, torch.zeros(6), w_DF.T.contiguous(), torch.zeros(width), META)
    features = [PackFeature(id=i, weight=w, scale=s) for i, w, s in ((0, 0.5, 1.0), (2, -0.3, 2.0), (5, 0.2, 0.5))]
    return FeatureReward(FeaturePack(name="p", model_name="m", sae=sae_ref(sae), features=features), sae)


def test_a_direction_pays_its_projection_on_every_token() -> None:
    weight_D, h_BTD = np.array([1.0, -2.0, 0.5, 0.0]), states()
    mask_BT = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]], dtype=torch.bool)
    reward = direction_reward(weight_D, 0.25, META, "d", scale=2.0)
    reward_BT, readable_BT = reward.score_tokens(h_BTD, mask_BT)
    wanted = (h_BTD @ torch.tensor(weight_D, dtype=torch.float32) + 0.25) / 2
    assert torch.equal(readable_BT, mask_BT)
    torch.testing.assert_close(reward_BT, wanted * mask_BT)
    assert (reward_BT < 0).any() and (reward_BT > 0).any()
    other = direction_reward(weight_D * 2, 0.25, META, "d", scale=2.0)
    assert other.spec_hash != reward.spec_hash and reward.layer == 1


@pytest.mark.parametrize("bad", [np.zeros(4), np.array([1.0, np.nan, 0.0, 0.0])])
def test_no_direction(bad: np.ndarray) -> None:
    with pytest.raises(InputError, match="direction: its weights must be finite and not all 0"):
        direction_reward(bad, 0.0, META, "d")


def test_length_pays_the_number_of_tokens() -> None:
    mask_BT = torch.tensor([[1, 1, 1], [1, 0, 0]], dtype=torch.bool)
    assert length_score(states(shape=(2, 3, 4)), mask_BT).tolist() == [[3, 3, 3], [1, 1, 1]]


def test_noise_depends_on_the_row_alone() -> None:
    h_BTD, mask_BT = states(), torch.ones(3, 5, dtype=torch.bool)
    first = noise_score(h_BTD, mask_BT)
    assert torch.equal(first, noise_score(h_BTD, mask_BT))
    assert torch.equal(first[1:2], noise_score(h_BTD[1:2], mask_BT[1:2]))
    assert len(set(first.flatten().tolist())) == 15
    many = noise_score(states(1, (400, 5, 4)), torch.ones(400, 5, dtype=torch.bool))
    assert abs(float(many.mean())) < 0.1 and abs(float(many.std()) - 1) < 0.1
    mask_BT[0, 3:] = False
    moved = h_BTD.clone()
    moved[0, 4] += 1
    assert torch.equal(noise_score(h_BTD, mask_BT), noise_score(moved, mask_BT)), "masked states do not count"
    long_BTD, long_BT = states(2, (1, 40, 4)), torch.ones(1, 40, dtype=torch.bool)
    long_BT[0, 20:] = False
    alone = noise_score(long_BTD[:, :20], long_BT[:, :20])
    assert torch.equal(noise_score(long_BTD, long_BT)[:, :20], alone), "nor does how wide a batch is padded"


def loaded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> LoadedModel:
    return LoadedModel(model, tokenizer, "tiny-llama")


def test_certainty_is_the_divergence_from_uniform(
    tiny_llama: PreTrainedModel, char_tokenizer: PreTrainedTokenizerFast
) -> None:
    prompt, completion = [5, 6, 7], [8, 9, 10, 11]
    last = n_blocks(tiny_llama) - 1
    [batch] = iter_residuals(tiny_llama, [prompt], [completion], last)
    certainty_BT = certainty_score(tiny_llama)(batch.h_BTD, batch.mask_BT)
    with torch.no_grad():
        p_TV = tiny_llama(torch.tensor([prompt + completion])).logits[0, 3:].softmax(-1)
    uniform = 1 / p_TV.shape[-1]
    wanted_T = (uniform * (uniform / p_TV).log()).sum(-1)
    torch.testing.assert_close(certainty_BT[0], wanted_T, rtol=1e-4, atol=1e-5)
    reward = control_reward("certainty", loaded(tiny_llama, char_tokenizer), 1)
    assert reward.layer == last
    reward.check_model(tiny_llama)
    paid_BT, readable_BT = reward.score_tokens(batch.h_BTD, batch.mask_BT)
    torch.testing.assert_close(paid_BT[readable_BT], certainty_BT[readable_BT])


@pytest.mark.parametrize("cap", [None, 0.5])
def test_certainty_is_that_of_capped_logits(cap: float | None) -> None:
    torch.manual_seed(0)
    model = Gemma2ForCausalLM(Gemma2Config(**SHAPE, query_pre_attn_scalar=8, final_logit_softcapping=cap)).eval()
    model.lm_head.weight.data.normal_()
    [batch] = iter_residuals(model, [[5, 6, 7]], [[8, 9, 10, 11]], 1)
    with torch.no_grad():
        p_TV = model(torch.arange(5, 12)[None]).logits[0, 3:].softmax(-1)
        found_T = certainty_score(model)(batch.h_BTD, batch.mask_BT)[0]
    wanted_T = (1 / 32 * (1 / 32 / p_TV).log()).sum(-1)
    torch.testing.assert_close(found_T, wanted_T, rtol=1e-4, atol=1e-5)


def test_a_model_that_scales_its_logits_has_no_certainty() -> None:
    model = GraniteForCausalLM(GraniteConfig(**SHAPE, logits_scaling=4.0)).eval()
    with pytest.raises(InputError, match="^certainty: GraniteForCausalLM does more to its logits than norm and head"):
        certainty_score(model)


def test_length_and_noise_need_no_last_norm(
    tiny_llama: PreTrainedModel, char_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blocks, "FINAL_NORMS", ("final_layernorm",))
    model = loaded(tiny_llama, char_tokenizer)
    assert [control_reward(kind, model, 1).layer for kind in ("length", "noise")] == [1, 1]
    with pytest.raises(InputError, match="^model: LlamaModel keeps no final norm under final_layernorm"):
        control_reward("certainty", model, 1)


def test_controls_have_hashes_of_their_own(
    tiny_llama: PreTrainedModel, char_tokenizer: PreTrainedTokenizerFast
) -> None:
    both = [control_reward(kind, loaded(tiny_llama, char_tokenizer), 1) for kind in ("length", "noise")]
    assert both[0].spec_hash != both[1].spec_hash and both[0].layer == 1
    h_BTD, mask_BT = states(shape=(2, 6, 32)), torch.ones(2, 6, dtype=torch.bool)
    h_BTD[0, 1] *= 1000
    mask_BT[1, 4:] = False
    paid_BT, readable_BT = both[0].score_tokens(h_BTD, mask_BT)
    assert (
        not readable_BT[0, 1] and paid_BT[0].tolist() == [6, 0, 6, 6, 6, 6] and paid_BT[1].tolist() == [4] * 4 + [0] * 2
    )


def test_half_of_the_signs_are_turned() -> None:
    pack = found().pack
    turned = shuffled_pack(pack, 0)
    ratios = [b.weight / a.weight for a, b in zip(pack.features, turned.features, strict=True)]
    assert sorted(ratios) == [-1, -1, 1] and turned.feature_ids() == pack.feature_ids()
    assert turned.spec_hash != pack.spec_hash and shuffled_pack(pack, 0) == turned
    assert any(shuffled_pack(pack, seed) != turned for seed in range(1, 6))


def table() -> ContrastTable:
    return ContrastTable(pd.DataFrame({"id": range(6), "support": [0.5] * 6, "scale": [1.0] * 6}), 8, 8, 32)


def answers() -> list[Response]:
    rng = np.random.default_rng(0)
    rows = []
    for question in range(8):
        for sample in range(4):
            right = sample % 2 == 0
            ids = [int(rng.integers(4, 60)) for _ in range(3)] + ([20, 20] if right else [30, 30])
            rows.append(
                Response(f"q{question}", sample, (4, 5 + question), tuple(ids), "", (0.0,) * 5, "eos", correct=right)
            )
    return rows


def test_the_probe_tells_right_from_wrong_a_token(
    tiny_llama: PreTrainedModel, char_tokenizer: PreTrainedTokenizerFast
) -> None:
    base = found(32)
    rows = answers()
    reward = probe_reward(base, rows, loaded(tiny_llama, char_tokenizer))
    prompts, completions = (
        [list(ids) for ids in zip_] for zip_ in zip(*[(r.prompt_ids, r.completion_ids) for r in rows], strict=True)
    )
    scores, right = np.zeros(len(rows)), np.array([r.correct for r in rows])
    for batch in iter_residuals(tiny_llama, prompts, completions, reward.layer):
        scores[batch.rows] = reward.compute(batch.h_BTD, batch.mask_BT).numpy()
    assert within_question_auroc(scores, right, [r.question_id for r in rows]) > 0.95 and abs(scores.mean()) < 1e-3
    assert arm_reward("sae", base, table(), rows, loaded(tiny_llama, char_tokenizer), 0) is base
    with pytest.raises(InputError, match="correct: all answers are alike"):
        probe_reward(base, [replace(r, correct=True) for r in rows], loaded(tiny_llama, char_tokenizer))


def test_the_raw_direction_is_the_packs(tiny_llama: PreTrainedModel, char_tokenizer: PreTrainedTokenizerFast) -> None:
    base = found()
    policy = loaded(tiny_llama, char_tokenizer)
    reward = arm_reward("direction", base, table(), [], policy, 0)
    random = arm_reward("random", base, table(), [], policy, 0)
    assert set(random.feature_ids()) == {1, 3, 4} and random.sae is base.sae
    turned = arm_reward("shuffled", base, table(), [], policy, 3)
    assert turned.pack == FeatureReward.from_pack(shuffled_pack(base.pack, 3), base.sae).pack
    assert arm_reward("length", base, table(), [], policy, 0).name == "length"
    h_BTD, mask_BT = states(), torch.ones(3, 5, dtype=torch.bool)
    wanted = h_BTD @ torch.tensor(raw_direction(base.pack, base.sae), dtype=torch.float32)
    torch.testing.assert_close(reward.score_tokens(h_BTD, mask_BT)[0], wanted)


def test_a_direction_s_decoder_writes_the_projection_back() -> None:
    weight_D, h_BTD = torch.tensor([1.0, -2.0, 0.5, 0.0]), states()
    sae = direction_sae(weight_D.double().numpy(), 0.0, META)
    written = sae.decode(sae.encode(h_BTD[0]), h_BTD[0])
    torch.testing.assert_close(written, (h_BTD[0] @ weight_D)[:, None] * weight_D / weight_D.square().sum())


def test_the_probe_is_a_regression_on_centred_and_standardised_means(
    tiny_llama: PreTrainedModel, char_tokenizer: PreTrainedTokenizerFast
) -> None:
    """Written out with numpy and scikit-learn; what it pays is its log-odds a token, on average 0."""
    base, rows = found(32), answers()
    means = []
    for row in rows:
        [batch] = iter_residuals(tiny_llama, [list(row.prompt_ids)], [list(row.completion_ids)], base.layer)
        means.append(batch.h_BTD[0].double().mean(0).numpy())
    states_ND, right_N = np.array(means), np.array([row.correct for row in rows])
    offsets_ND = np.repeat(states_ND.reshape(8, 4, 32).mean(1), 4, axis=0)
    x_ND = states_ND - offsets_ND
    spread_D = x_ND.std(0)
    fitted = LogisticRegression(C=0.05, max_iter=500).fit(x_ND / spread_D, right_N)
    weight_D = fitted.coef_[0] / spread_D
    reward = probe_reward(base, rows, loaded(tiny_llama, char_tokenizer))
    paid, readable = reward.score_tokens(
        torch.tensor(states_ND, dtype=torch.float32)[:, None], torch.ones(32, 1).bool()
    )
    wanted = (states_ND - states_ND.mean(0)) @ weight_D
    assert readable.all() and paid[:, 0].numpy() == pytest.approx(wanted, rel=0.02, abs=0.02 * np.abs(wanted).max())


def test_the_failed_arm_is_found_under_shuffled_labels(
    tiny_llama: PreTrainedModel, char_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, rows, asked = found(), answers(), []
    pooled = FeatureReward(base.pack.model_copy(update={"pooling": "max"}), base.sae)
    effects = {"id": range(6), "effect": [0.1, -0.9, 0.3, -2.0, 0.0, 0.5], "scale": [1.0, 2.0, 3.0, 0.0, 1.0, 4.0]}

    def discover(_: LoadedModel, sae: SAE, given: list[Response], **options: object) -> ContrastTable:
        asked.append((sae, given, options))
        return ContrastTable(pd.DataFrame(effects), 8, 8, 32)

    monkeypatch.setattr(rewards, "discover", discover)
    for seed in (5, 6):
        reward = arm_reward("failed", pooled, table(), rows, loaded(tiny_llama, char_tokenizer), seed)
        # The largest |effect| of feature 3 counts for nothing: it never fires.
        assert [(f.id, f.weight, f.scale) for f in reward.pack.features] == [
            (1, pytest.approx(-1 / 3), 2.0), (5, pytest.approx(1 / 3), 4.0), (2, pytest.approx(1 / 3), 3.0),
        ]  # fmt: skip
        sae, given, options = asked.pop()
        order = np.random.default_rng(seed).permutation(32)
        assert [one.correct for one in given] == [rows[at].correct for at in order] != [one.correct for one in rows]
        assert [one.completion_ids for one in given] == [one.completion_ids for one in rows]
        assert sae is base.sae and options == {"pooling": "max", "seed": seed} and reward.pack.pooling == "max"


def test_random_features_are_drawn_by_the_seed_and_controls_hash_their_block(
    tiny_llama: PreTrainedModel, char_tokenizer: PreTrainedTokenizerFast
) -> None:
    wide, policy = found(), loaded(tiny_llama, char_tokenizer)
    generator = torch.Generator().manual_seed(2)
    w_DF = torch.randn(4, 60, generator=generator)
    sae = SAE("relu", w_DF, torch.zeros(60), w_DF.T.contiguous(), torch.zeros(4), META)
    base = FeatureReward(FeaturePack(name="p", model_name="m", sae=sae_ref(sae), features=wide.pack.features), sae)
    many = ContrastTable(pd.DataFrame({"id": range(60), "support": [0.5] * 60, "scale": [1.0] * 60}), 8, 8, 32)
    drawn = [arm_reward("random", base, many, [], policy, seed).feature_ids() for seed in (0, 1, 2, 1)]
    assert drawn[1] == drawn[3] and len({tuple(ids) for ids in drawn}) == 3
    assert control_reward("noise", policy, 1).spec_hash != control_reward("noise", policy, 2).spec_hash
