"""What credits do to the expected gradient: exact, by enumerating every trajectory of a tiny softmax policy.

The policy writes up to three tokens of a vocabulary of two, with a logit pair of its own for every prefix; token 1 may
stand for the end of the text. A token's reward is any number that depends on the whole prefix up to it.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch

from mechreward.reward import dense_advantages, token_credit
from mechreward.reward.credit import return_to_go, shaping

LENGTH = 3
Prefix = tuple[int, ...]


def trajectories(stops: bool) -> list[Prefix]:
    """All texts: of full length, or ended by token 1; 000 is then the one that was cut at the limit."""
    full = list(product((0, 1), repeat=LENGTH))
    if not stops:
        return full
    return sorted({text[: text.index(1) + 1] if 1 in text else text for text in full})


def tables(seed: int) -> tuple[dict[Prefix, torch.Tensor], dict[Prefix, float]]:
    """Logits of each prefix, taking gradients, and the reward of the last token of each prefix."""
    generator = torch.Generator().manual_seed(seed)
    prefixes = [prefix for n in range(LENGTH + 1) for prefix in product((0, 1), repeat=n)]
    logits = {p: torch.randn(2, generator=generator, dtype=torch.float64).requires_grad_() for p in prefixes}
    rewards = {p: torch.randn((), generator=generator, dtype=torch.float64).item() for p in prefixes}
    return logits, rewards


def batch(texts: list[Prefix], rewards: dict[Prefix, float]) -> tuple[torch.Tensor, torch.Tensor]:
    reward, mask = torch.zeros(len(texts), LENGTH, dtype=torch.float64), torch.zeros(len(texts), LENGTH).bool()
    for row, text in enumerate(texts):
        reward[row, : len(text)] = torch.tensor([rewards[text[: t + 1]] for t in range(len(text))])
        mask[row, : len(text)] = True
    return reward, mask


def log_probabilities(texts: list[Prefix], logits: dict[Prefix, torch.Tensor]) -> list[torch.Tensor]:
    return [
        torch.stack([logits[text[:t]].log_softmax(0)[text[t]] for t in range(len(text))])  # log pi(a_t | s_t)
        for text in texts
    ]


def expected_gradient(texts: list[Prefix], logits: dict[Prefix, torch.Tensor], credit_BT: torch.Tensor) -> torch.Tensor:
    """sum over texts of p(text) * sum_t C_t * grad log pi(a_t | s_t), flat."""
    total = torch.zeros((), dtype=torch.float64)
    for log_p_T, credit_T in zip(log_probabilities(texts, logits), credit_BT.double(), strict=True):
        total = total + log_p_T.sum().exp().detach() * (log_p_T * credit_T[: len(log_p_T)]).sum()
    return flat_gradient(total, logits)


def flat_gradient(total: torch.Tensor, logits: dict[Prefix, torch.Tensor]) -> torch.Tensor:
    parts = torch.autograd.grad(total, list(logits.values()), allow_unused=True)
    return torch.cat([torch.zeros(2, dtype=torch.float64) if part is None else part for part in parts])


@pytest.mark.parametrize("stops", [False, True])
@pytest.mark.parametrize("seed", range(5))
def test_fact_1_over_whole_returns_shaping_has_no_expected_gradient(seed: int, stops: bool) -> None:
    texts = trajectories(stops)
    logits, rewards = tables(seed)
    assert sum(log_p.sum().exp().item() for log_p in log_probabilities(texts, logits)) == pytest.approx(1.0)
    reward_BT, mask_BT = batch(texts, rewards)
    whole = return_to_go(shaping(reward_BT, mask_BT, 1.0), mask_BT, 1.0)
    assert whole.abs().max() > 0.1  # it is not that nothing is paid
    assert expected_gradient(texts, logits, whole).abs().max() < 1e-13
    # The instrument sees a gradient where there is one: the same shaping token by token, and the reward itself.
    for credit in (shaping(reward_BT, mask_BT, 1.0), return_to_go(reward_BT, mask_BT, 1.0)):
        assert expected_gradient(texts, logits, credit).abs().max() > 1e-2


@pytest.mark.parametrize("seed", range(3))
def test_fact_1_it_leaves_the_outcome_gradient_as_it_is(seed: int) -> None:
    texts = trajectories(stops=True)
    logits, rewards = tables(seed)
    reward_BT, mask_BT = batch(texts, rewards)
    outcome_BT = torch.tensor([float(sum(text) % 2) for text in texts], dtype=torch.float64)[:, None] * mask_BT
    both = outcome_BT + 3.0 * return_to_go(shaping(reward_BT, mask_BT, 1.0), mask_BT, 1.0)
    alone = expected_gradient(texts, logits, outcome_BT)
    assert alone.abs().max() > 1e-2
    assert (expected_gradient(texts, logits, both) - alone).abs().max() < 1e-13


@pytest.mark.parametrize("seed", range(3))
def test_fact_1_as_a_mode_it_is_local_credit_and_biased(seed: int) -> None:
    """`potential` in `token_credit` is not summed over the return, so it does move the policy."""
    texts = trajectories(stops=False)
    logits, rewards = tables(seed)
    reward_BT, mask_BT = batch(texts, rewards)
    gradient = expected_gradient(texts, logits, token_credit(reward_BT, mask_BT, "potential"))
    local = expected_gradient(texts, logits, shaping(reward_BT, mask_BT, 1.0))
    assert gradient.abs().max() > 1e-2 and torch.allclose(gradient, local, atol=1e-6)


@pytest.mark.parametrize("stops", [False, True])
@pytest.mark.parametrize(("mode", "mean"), [("return_to_go", False), ("trajectory", True)])
def test_unbiased_modes_have_the_gradient_of_what_they_pay(mode: str, mean: bool, stops: bool) -> None:
    texts = trajectories(stops)
    logits, rewards = tables(7)
    reward_BT, mask_BT = batch(texts, rewards)
    paid_B = reward_BT.sum(1) / (mask_BT.sum(1) if mean else 1)
    chances = log_probabilities(texts, logits)
    objective = torch.stack([p.sum().exp() * paid for p, paid in zip(chances, paid_B, strict=True)]).sum()
    gradient = expected_gradient(texts, logits, token_credit(reward_BT, mask_BT, mode))
    truth = flat_gradient(objective, logits)
    assert truth.abs().max() > 1e-2 and torch.allclose(gradient, truth, atol=1e-6)


def test_fact_2_its_sum_broadcast_in_grpo_is_no_effect_at_all() -> None:
    # Three tokens and whole numbers, so that running means are exact in binary.
    reward = torch.tensor([[1.0, 2.0, 4.0], [8.0, -2.0, 6.0], [3.0, 5.0, 0.0], [-7.0, 1.0, 1.0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 1], [1, 1, 0], [1, 0, 0]]).bool()
    outcome = torch.tensor([0.7, -0.7, 0.3, -0.3])
    summed = shaping(reward.double(), mask, 1.0).sum(dim=1, keepdim=True).expand(4, 3).float()
    result = dense_advantages(outcome, summed, mask, mask, 2, weight=1.0)
    assert torch.equal(result.total_BT, outcome[:, None] * mask) and result.dense_rms == 0.0


def test_fact_3_without_a_terminal_zero_the_final_state_is_paid() -> None:
    reward, mask = (
        torch.tensor([[1.0, 2.0, 6.0], [4.0, 2.0, 0.0]]).double(),
        torch.tensor([[1, 1, 1], [1, 1, 0]]).bool(),
    )
    shaped = shaping(reward, mask, 1.0)
    final_phi = torch.tensor([3.0, 3.0]).double()
    kept = shaped.clone()  # as Gao's Delta has it: the last token keeps what Phi had reached
    kept[0, 2] += final_phi[0]
    kept[1, 1] += final_phi[1]
    assert kept.sum(dim=1).tolist() == [3.0, 3.0]  # Phi_T - Phi_0
    assert shaped.sum(dim=1).tolist() == [0.0, 0.0]
    assert [shaped[0, 2].item(), shaped[1, 1].item()] == [-1.5, -4.0]


@pytest.mark.parametrize("seed", range(3))
def test_fact_3_and_4_what_is_not_terminal_biases_the_gradient(seed: int) -> None:
    """Paying Phi at the end of every text, or of the cut text alone, is no baseline any more."""
    texts = trajectories(stops=True)
    logits, rewards = tables(seed)
    reward_BT, mask_BT = batch(texts, rewards)
    shaped = shaping(reward_BT, mask_BT, 1.0)
    phi_B = reward_BT.sum(1) / mask_BT.sum(1)
    for unpaid in ([True] * len(texts), [text == (0,) * LENGTH for text in texts]):
        kept = shaped.clone()
        for row, text in enumerate(texts):
            kept[row, len(text) - 1] += phi_B[row] * unpaid[row]
        assert expected_gradient(texts, logits, return_to_go(kept, mask_BT, 1.0)).abs().max() > 1e-3


def test_fact_4_a_cut_at_the_limit_is_an_end_like_any_other() -> None:
    reward = torch.tensor([[1.0, 2.0, 6.0, 4.0]]).double()
    whole, cut = torch.ones(1, 4).bool(), torch.tensor([[1, 1, 0, 0]]).bool()
    assert shaping(reward, cut, 1.0).tolist() == [[1.0, -1.0, 0.0, 0.0]]  # -Phi of what was written before the cut
    assert shaping(reward, whole, 1.0)[0, :2].tolist() == [1.0, 0.5]
