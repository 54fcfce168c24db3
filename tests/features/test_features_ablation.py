"""Exact ablation against forwards by hand, and the checks of attribution where the truth is known."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy

import numpy as np
import pytest
import torch
from scipy import stats
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mechreward.errors import InputError
from mechreward.features.ablation import ablation_agreement, ablation_effects, completeness, top_against_random
from mechreward.features.attribution import iter_attributions
from mechreward.features.targets import Target, answer_target
from mechreward.models import LoadedModel, load_model
from mechreward.rollout import Response, sample_responses, verify_responses
from mechreward.sae import SAE, load_sae
from mechreward.tasks import load_questions
from mechreward.tiny import MODEL, SAE_FOLDER
from mechreward.verifiers import gsm8k_exact_match

KINDS = ("relu", "jumprelu", "gated", "topk", "topk_rescaled", "layer_norm", "constant_norm")


def response(question: str, completion: list[int]) -> Response:
    return Response(question, 0, (0, 5, 9), tuple(completion), "", (0.0,) * len(completion), "eos", True)


ROWS = [response("a", [11, 12, 13, 14, 15, 16]), response("b", [21, 22, 23, 24]), response("a", [31, 32, 33, 34, 35])]
TARGETS = [Target(3, 6), Target(2, 3, "logit", baseline=40), Target(2, 4)]


@pytest.fixture
def policy(tiny_llama: PreTrainedModel, char_tokenizer: PreTrainedTokenizerFast) -> LoadedModel:
    return LoadedModel(tiny_llama, char_tokenizer, "tiny")


@pytest.fixture
def toy(tiny_llama: PreTrainedModel, char_tokenizer: PreTrainedTokenizerFast) -> LoadedModel:
    """Linear after its last block, and small."""
    model = deepcopy(tiny_llama)
    model.model.norm = nn.Identity()
    with torch.no_grad():
        model.lm_head.weight.mul_(0.01)
    return LoadedModel(model, char_tokenizer, "toy")


def logit(policy: LoadedModel, row: Response, target: Target, layer: int, h_SD: torch.Tensor | None) -> float:
    """m of one row by a hook of the test's own; None leaves the block alone."""
    block = policy.model.model.layers[layer]
    handle = block.register_forward_hook(lambda _m, _i, out: out if h_SD is None else h_SD[None])
    with torch.no_grad():
        logits_SV = policy.model(torch.tensor([[*row.prompt_ids, *row.completion_ids]])).logits[0]
    handle.remove()
    values_SV = logits_SV.log_softmax(-1) if target.kind == "logprob" else logits_SV
    total = 0.0
    for place in range(target.start, target.end):
        values_V = values_SV[len(row.prompt_ids) + place - 1]
        baseline = 0.0 if target.baseline is None else float(values_V[target.baseline])
        total += float(values_V[row.completion_ids[place]]) - baseline
    return total


def states(policy: LoadedModel, row: Response, layer: int) -> torch.Tensor:
    with torch.no_grad():
        ids = torch.tensor([[*row.prompt_ids, *row.completion_ids]])
        return policy.model(ids, output_hidden_states=True).hidden_states[layer + 1][0]


@pytest.mark.parametrize("kind", KINDS)
def test_ablation_takes_out_what_decode_says_the_feature_writes(
    kind: str, policy: LoadedModel, random_sae: Callable[..., SAE]
) -> None:
    sae = random_sae(kind)
    for row, target in zip(ROWS, TARGETS, strict=True):
        h_SD = states(policy, row, 1)
        acts_SF = sae.encode(h_SD)
        firing = (acts_SF[3:].sum(0) > 0).nonzero()[:3, 0].tolist()
        groups = [[firing[0]], firing, [], [firing[2], firing[2]]]
        found = ablation_effects(policy, sae, row, target, groups, batch_size=3)
        for group, effect in zip(groups, found, strict=True):
            kept_SF = acts_SF.clone()
            kept_SF[3:, group] = 0
            without_SD = h_SD - (sae.decode(acts_SF, h_SD) - sae.decode(kept_SF, h_SD))
            drop = logit(policy, row, target, 1, None) - logit(policy, row, target, 1, without_SD)
            assert effect == pytest.approx(drop, rel=1e-3, abs=1e-4)
        assert found[2] == pytest.approx(0, abs=1e-5) and abs(found[1]) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_attribution_equals_exact_ablation_on_a_linear_toy(
    kind: str, toy: LoadedModel, random_sae: Callable[..., SAE]
) -> None:
    sae, target = random_sae(kind, layer=3), Target(2, 6, "logit", baseline=40)
    exact = ablation_effects(toy, sae, ROWS[0], target, [[i] for i in range(sae.d_sae)], batch_size=48)
    assert np.abs(exact).max() > 1e-3
    for method in ("gradient", "integrated"):
        (batch,) = iter_attributions(toy, sae, ROWS[:1], [target], method=method, steps=3)
        np.testing.assert_allclose(batch.attr_BF[0].numpy(), exact, atol=1e-6)


def test_it_adds_up_on_a_linear_toy(toy: LoadedModel, random_sae: Callable[..., SAE]) -> None:
    sae, targets = random_sae("gated", layer=3), [Target(1, 4, "logit")] * 3
    frame = completeness(toy, sae, ROWS, targets, batch_size=2)
    for at, (row, target) in enumerate(zip(ROWS, targets, strict=True)):
        h_SD = states_of_last_block(toy, row)
        acts_SF = sae.encode(h_SD)
        features_SD = sae.decode(acts_SF) - sae.b_dec_D
        without_SD, bare_SD = h_SD.clone(), h_SD.clone()
        without_SD[3:] -= features_SD[3:]
        bare_SD[3:] = sae.b_dec_D
        assert frame["clean"][at] == pytest.approx(logit(toy, row, target, 3, None), abs=1e-5)
        assert frame["without_features"][at] == pytest.approx(logit(toy, row, target, 3, without_SD), abs=1e-5)
        assert frame["without_both"][at] == pytest.approx(logit(toy, row, target, 3, bare_SD), abs=1e-5)
    assert frame["attributed"].abs().min() > 1e-3 and frame["error_attributed"].abs().min() > 1e-3
    np.testing.assert_allclose(frame[["gap", "gap_with_error"]], 0, atol=1e-5)


def states_of_last_block(policy: LoadedModel, row: Response) -> torch.Tensor:
    """The last of `hidden_states` is the state after the final norm, which is the identity here."""
    return states(policy, row, 3)


def test_the_gap_is_what_is_left(policy: LoadedModel, random_sae: Callable[..., SAE]) -> None:
    sae = random_sae("topk")
    few, many = (completeness(policy, sae, ROWS, TARGETS, method="integrated", steps=n) for n in (1, 50))
    cost = many["clean"] - many["without_features"]
    np.testing.assert_allclose(many["gap"], many["attributed"] - cost, atol=1e-6)
    assert many["gap"].abs().max() < 0.1 * cost.abs().max()
    assert many["gap"].abs().sum() < few["gap"].abs().sum()
    assert many["gap_with_error"].isna().all()


def test_agreement_is_the_rank_correlation_of_both(policy: LoadedModel, random_sae: Callable[..., SAE]) -> None:
    sae = random_sae("relu")
    found = ablation_agreement(policy, sae, ROWS, TARGETS, n_features=40, seed=4)
    assert len(found.feature_ids) == 40 == len(set(found.feature_ids))
    (batch,) = iter_attributions(policy, sae, ROWS, TARGETS)
    np.testing.assert_allclose(found.attributed_RK, batch.attr_BF[:, found.feature_ids], rtol=1e-5)
    for row, target, effects in zip(ROWS, TARGETS, found.ablated_RK, strict=True):
        expected = ablation_effects(policy, sae, row, target, [[i] for i in found.feature_ids])
        np.testing.assert_allclose(effects, expected, atol=1e-5)
    both = stats.spearmanr(found.attributed_RK.sum(0), found.ablated_RK.sum(0)).statistic
    assert found.spearman == pytest.approx(both)
    singly = [stats.spearmanr(a, b).statistic for a, b in zip(found.attributed_RK, found.ablated_RK, strict=True)]
    assert min(abs(both - one) for one in singly) > 1e-3, singly  # so that one response alone would show
    fires = batch.fires_BF[:, found.feature_ids].numpy()
    each = [
        stats.spearmanr(a[f], b[f]).statistic
        for a, b, f in zip(found.attributed_RK, found.ablated_RK, fires, strict=True)
    ]
    assert found.spearman_each == pytest.approx(np.median(each))
    assert ablation_agreement(policy, sae, ROWS, TARGETS, n_features=40, seed=5).feature_ids != found.feature_ids


def test_a_response_without_any_effect_has_no_rank_correlation(
    policy: LoadedModel, random_sae: Callable[..., SAE]
) -> None:
    nothing = Target(2, 3, "logit", token=40, baseline=40)
    sae, targets = random_sae("relu"), [TARGETS[0], nothing, TARGETS[2]]
    found = ablation_agreement(policy, sae, ROWS, targets, n_features=40)
    assert not found.attributed_RK[1].any() and not found.ablated_RK[1].any()
    (batch,) = iter_attributions(policy, sae, ROWS, targets)
    fires = batch.fires_BF[:, found.feature_ids].numpy()
    each = [stats.spearmanr(found.attributed_RK[r][fires[r]], found.ablated_RK[r][fires[r]]).statistic for r in (0, 2)]
    assert found.spearman_each == pytest.approx(np.median(each))


def test_top_against_random_on_a_linear_toy(toy: LoadedModel, random_sae: Callable[..., SAE]) -> None:
    """There the drop is the sum of attributions, and with many draws the random drop is the mean of the others'."""
    sae, targets = random_sae("relu", layer=3), [Target(2, 4, "logit")] * 3
    found = top_against_random(toy, sae, ROWS, targets, k=4, draws=60)
    tops, others = [], []
    for row, target in zip(ROWS, targets, strict=True):
        (batch,) = iter_attributions(toy, sae, [row], [target])
        attr = np.sort(batch.attr_BF[0][batch.fires_BF[0]].numpy())[::-1]
        tops.append(attr[:4].sum())
        others.append(4 * attr[4:].mean())
    question = [(tops[0] + tops[2]) / 2 - (others[0] + others[2]) / 2, tops[1] - others[1]]
    assert found.top == pytest.approx(((tops[0] + tops[2]) / 2 + tops[1]) / 2, abs=1e-5)
    assert found.random == pytest.approx(((others[0] + others[2]) / 2 + others[1]) / 2, abs=0.1 * found.top)
    assert found.difference == pytest.approx(found.top - found.random, abs=1e-6)
    # Two questions: every resample is one of the two or their mean.
    assert (found.low, found.high) == pytest.approx((min(question), max(question)), abs=0.1 * found.top)
    assert (found.n_questions, found.n_responses) == (2, 3)


def test_on_the_bundled_model() -> None:
    """Gradient x activation ranks as exact ablation does, and its top features matter where random ones do not."""
    policy, sae = load_model(str(MODEL)), load_sae(SAE_FOLDER)
    questions = load_questions("tiny:easy", limit=6, seed=3)
    sampled = sample_responses(policy, questions, n=1, max_new_tokens=96, seed=3)
    responses = [r for r in verify_responses(sampled, questions, gsm8k_exact_match) if r.correct][:2]
    answers = [answer_target(policy.tokenizer, row) for row in responses]
    assert [
        policy.tokenizer.decode(r.completion_ids[t.start : t.end]) for r, t in zip(responses, answers, strict=True)
    ] == [r.extracted for r in responses]
    targets = answers
    agreement = ablation_agreement(policy, sae, responses, targets, n_features=50)
    assert len(agreement.feature_ids) == 50 and agreement.spearman >= 0.8 and agreement.spearman_each >= 0.8
    effect = top_against_random(policy, sae, responses, targets, draws=3)
    assert effect.low > 1 and abs(effect.random) < 0.5


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda p, s: ablation_effects(p, s, ROWS[0], TARGETS[0], [[48]]), "feature_ids: 48 is not a feature"),
        (lambda p, s: ablation_agreement(p, s, ROWS, TARGETS, n_features=1), "n_features: 1 features fire"),
        (lambda p, s: top_against_random(p, s, ROWS, TARGETS, k=30), "k: 30 is too large"),
        (lambda p, s: top_against_random(p, s, ROWS, TARGETS, k=0), "k, draws: 0 and 10 are not allowed"),
        (lambda p, s: top_against_random(p, s, ROWS[:1], TARGETS[:1], k=1), "needs at least 2 questions, there are 1"),
    ],
)
def test_bad_input(
    call: Callable[[LoadedModel, SAE], object], sentence: str, policy: LoadedModel, random_sae: Callable[..., SAE]
) -> None:
    with pytest.raises(InputError, match=sentence):
        call(policy, random_sae("relu"))
