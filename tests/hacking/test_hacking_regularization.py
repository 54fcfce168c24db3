"""Regularisers by hand, and what each needs."""

from __future__ import annotations

import math

import pytest
import torch

from mechreward.errors import InputError
from mechreward.hacking import (
    Regularizers,
    entropy_bonus,
    feature_diversity_bonus,
    kl_penalty,
    regularised,
    repetition,
    reward_variance_penalty,
)

POLICY, REF = torch.tensor([[-1.0, -2.0]]), torch.tensor([[-3.0, -1.5]])
MASK = torch.tensor([[True, True]])


def test_kl_and_entropy_by_hand() -> None:
    assert kl_penalty(POLICY, REF, "none").tolist() == [[2.0, -0.5]]
    assert kl_penalty(POLICY, REF).item() == 0.75 and kl_penalty(POLICY, REF, "sum").item() == 1.5
    assert entropy_bonus(POLICY).item() == 1.5 and entropy_bonus(POLICY, "none").tolist() == [[1.0, 2.0]]
    with pytest.raises(InputError, match="reduction: 'max'"):
        kl_penalty(POLICY, REF, "max")


def test_their_means_are_kl_and_entropy() -> None:
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.3, 0.3, 0.4])
    drawn = torch.multinomial(p, 200_000, replacement=True)
    exact = (p * (p / q).log()).sum().item()
    assert kl_penalty(p.log()[drawn], q.log()[drawn]).item() == pytest.approx(exact, abs=0.01)
    assert entropy_bonus(p.log()[drawn]).item() == pytest.approx(-(p * p.log()).sum().item(), abs=0.01)


def test_no_gradient_flows() -> None:
    policy = POLICY.clone().requires_grad_(True)
    assert not kl_penalty(policy, REF).requires_grad and not entropy_bonus(policy).requires_grad


def test_diversity_by_hand() -> None:
    acts = torch.tensor([[[1.0, 0.0], [3.0, 0.0]], [[1.0, 0.0], [0.0, 1.0]], [[3.0, 0.0], [0.0, 1.0]], [[0.0] * 2] * 2])
    mixed = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(2)
    assert feature_diversity_bonus(acts).tolist() == pytest.approx([0.0, 1.0, mixed, 0.0])
    mask = torch.tensor([[True, False]] * 4)
    assert feature_diversity_bonus(acts, mask).tolist() == [0.0] * 4
    assert feature_diversity_bonus(acts[..., :1]).tolist() == [0.0] * 4


def test_variance_by_hand() -> None:
    rewards, mask = torch.tensor([[1.0, 3.0, 50.0], [2.0, 2.0, 2.0]]), torch.tensor([[True, True, False], [False] * 3])
    assert reward_variance_penalty(rewards, mask).tolist() == [1.0, 0.0]
    assert reward_variance_penalty(rewards[1:]).tolist() == [0.0]


def test_all_terms_with_their_signs() -> None:
    rewards, acts = torch.tensor([[1.0, 3.0]]), torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
    given = {"policy_logps_BT": POLICY, "ref_logps_BT": REF, "acts_BTK": acts}
    assert regularised(rewards, MASK, Regularizers(variance=0.5), **given).tolist() == [[0.5, 2.5]]
    assert regularised(rewards, MASK, Regularizers(diversity=2.0), **given).tolist() == [[3.0, 5.0]]
    assert regularised(rewards, MASK, Regularizers(entropy=0.1), **given)[0].tolist() == pytest.approx([1.1, 3.2])
    assert regularised(rewards, MASK, Regularizers(kl=0.1), **given)[0].tolist() == pytest.approx([0.8, 3.05])
    assert regularised(rewards, torch.tensor([[True, False]]), Regularizers(kl=0.1), **given)[0, 1] == 0
    assert torch.equal(regularised(rewards, MASK, Regularizers()), rewards)
    for name in ("kl", "entropy", "diversity"):
        with pytest.raises(InputError, match=f"regularizers.{name}: what it is computed from is not at hand"):
            regularised(rewards, MASK, Regularizers(**{name: 0.1}))


def test_weights_are_checked() -> None:
    assert not Regularizers().any and Regularizers(kl=0.1).any
    for value in (-0.1, math.inf, math.nan):
        with pytest.raises(InputError, match="regularizers.entropy"):
            Regularizers(entropy=value)


def test_repetition_by_hand() -> None:
    assert repetition([[1, 2, 3, 4, 1, 2, 3, 4], [1, 2, 3], [5] * 8, []]).tolist() == pytest.approx(
        [0.2, 0.0, 0.8, 0.0]
    )
    assert repetition([[1, 2, 1, 2, 3]], n=2).tolist() == pytest.approx([0.25])
