"""Training against scikit-learn itself, held-out numbers against naive loops, and what must not leak."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, roc_auc_score

from mechreward.errors import InputError
from mechreward.probes import train_linear_probe
from mechreward.probes.train import calibration_error, platt


def answers(n=120, t=5, d=6, gap=1.5, seed=0):
    """Half of the answers right; the first coordinate of every token tells, with noise."""
    generator = torch.Generator().manual_seed(seed)
    right_N = torch.arange(n) % 2 == 0
    h_NTD = torch.randn(n, t, d, generator=generator)
    h_NTD[..., 0] += gap * (right_N.float()[:, None] - 0.5)
    length_N = torch.randint(1, t + 1, (n,), generator=generator)
    return h_NTD * 3 + 1, torch.arange(t) < length_N[:, None], right_N.numpy(), [f"q{i // 4}" for i in range(n)]


def test_single_states_are_sklearns_logistic_regression() -> None:
    h_NTD, _, right_N, _ = answers(t=1)
    x = h_NTD[:, 0].double().numpy()
    z = (x - x.mean(0)) / x.std(0)
    expected = LogisticRegression(C=0.05, max_iter=500).fit(z, right_N).decision_function(z)
    probe = train_linear_probe(h_NTD[:, 0], right_N).probe
    np.testing.assert_allclose(probe.logits(h_NTD[:, 0]).numpy(), expected, atol=1e-3)


def test_a_long_answer_has_no_more_say() -> None:
    h_NTD, mask_NT, right_N, _ = answers(t=4)
    x, y, share = [], [], []
    for row in range(len(right_N)):
        for place in range(4):
            if mask_NT[row, place]:
                x.append(h_NTD[row, place].numpy())
                y.append(right_N[row])
                share.append(1 / mask_NT[row].sum().item())
    x = np.array(x, dtype=np.float64)
    z = (x - x.mean(0)) / x.std(0)
    expected = LogisticRegression(C=0.05, max_iter=500).fit(z, y, share).decision_function(z)
    probe = train_linear_probe(h_NTD, right_N, mask=mask_NT, pooling="mean").probe
    np.testing.assert_allclose(probe.logits(torch.from_numpy(x)).numpy(), expected, atol=1e-3)


@pytest.mark.parametrize("pooling", ["max", "min", "mean", "attention"])
def test_held_out_numbers_are_those_of_the_probabilities(pooling) -> None:
    h_NTD, mask_NT, right_N, groups = answers()
    found = train_linear_probe(h_NTD, right_N, "p", mask=mask_NT, groups=groups, pooling=pooling, layer=2)
    p_N = found.probabilities_N
    assert found.held_out_auroc == pytest.approx(roc_auc_score(right_N, p_N)) and 0.6 < found.held_out_auroc < 1
    assert found.brier == pytest.approx(((p_N - right_N) ** 2).mean()) and found.brier < 0.25
    assert found.held_out_accuracy == pytest.approx(np.mean((p_N >= 0.5) == right_N))
    known = found.probe.row_proba(h_NTD, mask_NT).numpy() >= 0.5
    assert found.train_accuracy == pytest.approx(np.mean(known == right_N))
    assert (found.n_answers, found.n_groups, found.probe.layer, found.probe.pooling) == (120, 30, 2, pooling)
    assert found.calibration_error == pytest.approx(calibration_error(p_N, right_N)) and found.calibration_error < 0.2


def test_labels_of_ones_own_question_do_not_leak() -> None:
    # Each question has a mark of its own and one label: memorised it would be perfect, held out it is chance.
    generator = torch.Generator().manual_seed(0)
    marks = torch.randn(30, 40, generator=generator)
    states = marks.repeat_interleave(4, 0) + 0.01 * torch.randn(120, 40, generator=generator)
    right = (torch.rand(30, generator=generator) > 0.5).repeat_interleave(4).numpy()
    groups = [f"q{i // 4}" for i in range(120)]
    together = train_linear_probe(states, right, groups=groups)
    apart = train_linear_probe(states, right)  # as if each answer were a question of its own
    assert apart.train_accuracy > 0.95 and apart.held_out_auroc > 0.9
    assert together.held_out_auroc < 0.75


def test_attention_finds_the_token_that_tells() -> None:
    generator = torch.Generator().manual_seed(1)
    right_N = torch.arange(60) % 2 == 0
    h_NTD = torch.randn(60, 6, 3, generator=generator)
    place_N = torch.randint(0, 6, (60,), generator=generator)
    h_NTD[torch.arange(60), place_N, 1] = 6.0  # marks the token
    h_NTD[torch.arange(60), place_N, 0] = torch.where(right_N, 3.0, -3.0)
    found = {
        pooling: train_linear_probe(h_NTD, right_N.numpy(), pooling=pooling, penalty=1.0, folds=2).held_out_auroc
        for pooling in ("attention", "mean")
    }
    assert found["attention"] > 0.97 > found["mean"]


def test_attention_is_at_a_minimum_of_its_loss() -> None:
    h_NTD, mask_NT, right_N, _ = answers(n=40, t=3, d=3)
    probe = train_linear_probe(h_NTD, right_N, mask=mask_NT, pooling="attention", penalty=0.5, folds=2).probe
    tokens = h_NTD[mask_NT]
    mean, std = tokens.mean(0), tokens.std(0, correction=0)

    def loss(weight, query, bias):
        total = 0.5 * (weight.square().sum() + query.square().sum())
        for row, right in enumerate(right_N):
            x = (h_NTD[row, mask_NT[row]] - mean) / std
            z = ((x @ query).softmax(0) * (x @ weight + bias)).sum()
            total = total + 0.5 * torch.nn.functional.softplus(-z if right else z)
        return total

    weight, query = probe.weight * std, probe.query * std
    bias = torch.tensor(probe.bias) + probe.weight @ mean
    learnt = [value.clone().requires_grad_(True) for value in (weight, query, bias)]
    loss(*learnt).backward()
    assert max(value.grad.abs().max().item() for value in learnt) < 0.05


def test_platt_by_hand_and_calibration_of_the_probe() -> None:
    scores, right = np.array([0.0, 1.0, 2.0, 3.0]), np.array([False, True, False, True])
    slope, intercept = platt(scores, right)
    z = (scores - 1.5) / scores.std()
    expected = LogisticRegression(C=1.0).fit(z[:, None], right).decision_function(z[:, None])
    np.testing.assert_allclose(slope * scores + intercept, expected)
    assert platt([-s for s in scores], right) == (0.0, 0.0)  # the wrong way round says nothing: the share of right
    assert platt([0.0, 0.0, 0.0, 1.0], [True, True, True, False])[1] == pytest.approx(math.log(3))
    with pytest.raises(InputError, match="all are of one class"):
        platt(scores, [True] * 4)
    with pytest.raises(InputError, match="NaN or infinite"):
        platt([math.nan, 1.0], [True, False])


def test_calibration_error_by_hand() -> None:
    # Bins [0, .1): .05 against 1 of 2 right; [.9, 1]: .95 and 1.0 against 2 of 2.
    probabilities, right = [0.05, 0.05, 0.95, 1.0], [True, False, True, True]
    assert calibration_error(probabilities, right) == pytest.approx((2 * 0.45 + 2 * 0.025) / 4)
    assert calibration_error([0.5, 0.5], [True, False]) == 0
    assert brier_score_loss([1, 0], [0.5, 0.5]) == 0.25


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.ones(120, dtype=bool)}, "labels: all 120 are of one class"),
        ({"labels": np.ones(7, dtype=bool)}, "do not fit; one label"),
        ({"groups": ["q"] * 120}, "groups: 1 is too few"),
        ({"penalty": 0.0}, "penalty: 0.0 must be above 0"),
        ({"penalty": math.nan}, "penalty: nan must be above 0"),
        ({"folds": 1}, "folds: 1 is not at least 2"),
        ({"labels": [None, True] * 60}, "labels: must be a list of true and false"),
        ({"labels": [math.nan, 1.0] * 60}, "labels: must be a list of true and false"),
        ({"labels": ["0", "1"] * 60}, "labels: must be a list of true and false"),
        ({"labels": np.ones((120, 1))}, "labels: must be a list of true and false"),
        ({"mask": torch.zeros(120, 5, dtype=torch.bool)}, "mask: row 0 has no tokens"),
        ({"hidden_states": torch.full((120, 5, 6), math.nan)}, "hidden_states: some are NaN"),
        ({"groups": ["a"] * 60 + ["b"] * 60, "labels": np.arange(120) < 60}, "a fold holds one class only"),
    ],
)
def test_bad_input(change, message) -> None:
    h_NTD, mask_NT, right_N, groups = answers()
    given = {"hidden_states": h_NTD, "labels": right_N, "mask": mask_NT, "groups": groups} | change
    with pytest.raises(InputError, match=message):
        train_linear_probe(**given)
