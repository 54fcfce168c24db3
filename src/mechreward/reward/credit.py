"""From token rewards to token advantages: A_BT = A_outcome[:, None] + A_dense_BT, computed apart and added once.

Three steps, each a pure function, none of which looks at a masked position:

1. `token_credit`: rewards r_t -> credits C_t (what token t is held to account for), one of five modes.
2. `centre_groups`: C_t minus the group's baseline, the mean over its rows of each row's mean over tokens, so that a
   long completion has no more say in the baseline than a short one, as in GRPO's outcome baseline. Never divided by
   the group's own standard deviation (Dr. GRPO, 2503.20783): that would blow a group without real spread up to full
   size. A group whose credits are all equal (up to 1e-5 of their size, the noise of float32) gets exactly 0.
3. `dense_advantages`: the whole batch is scaled by one number so that the dense RMS is `weight` times the outcome
   advantage's RMS. Both RMS are row-weighted (mean over rows of the row's mean square) and taken over the rows of
   groups that have a spread. A batch in which no group has one (all right or all wrong) keeps the last RMS seen,
   which is handed in and out; it starts at 1.

Beside them stands `stage3_advantages`, the older library's own formula, which replaces the outcome advantage as well:
to be measured against, not to be trained with.

Every array keeps group order: rows g * G ... g * G + G - 1 are the samples of one prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechreward.errors import InputError
from mechreward.features.steps import last_of_steps, last_token

Credit = Literal["per_token", "return_to_go", "potential", "step", "trajectory", "stage3"]
_NOISE = 1e-5
_STAGE3_EPS = 1e-8


@dataclass(frozen=True)
class Advantages:
    """Advantages of one batch and what they were scaled by."""

    total_BT: Float[Tensor, "b t"]
    """Outcome plus dense, 0 where the loss mask is 0."""
    dense_BT: Float[Tensor, "b t"]
    """The dense part alone, already scaled."""
    outcome_rms: float
    """RMS of the outcome advantage over groups with a spread, or the last one seen: hand it to the next batch."""
    dense_rms: float
    """RMS of `dense_BT` over the groups with a spread in their credits; weight * outcome_rms, or 0 if there is none."""
    degenerate_share: float
    """Share of the groups whose outcomes were all equal."""


def dense_advantages(
    outcome_B: Float[Tensor, " b"],
    credit_BT: Float[Tensor, "b t"],
    mask_BT: Bool[Tensor, "b t"],
    loss_mask_BT: Bool[Tensor, "b t"],
    group_size: int,
    weight: float,
    last_outcome_rms: float = 1.0,
) -> Advantages:
    """A_BT = A_outcome[:, None] + s * D_BT with D the centred credits and s = weight * RMS(A_outcome) / RMS(D).

    Args:
        outcome_B: outcome advantages as the trainer made them.
        credit_BT: result of `token_credit`.
        mask_BT: tokens whose dense reward counts (the loss mask without unreadable tokens); others get dense 0.
        loss_mask_BT: tokens that are trained on; the total is 0 elsewhere.
        group_size: G, samples a prompt.
        weight: lambda >= 0.
        last_outcome_rms: `Advantages.outcome_rms` of the batch before.

    Raises:
        InputError: if the batch does not hold whole groups, or `weight` is negative.
    """
    _check(outcome_B, group_size, weight)
    spread_B = group_has_spread(outcome_B[:, None].double(), torch.ones_like(outcome_B[:, None]).bool(), group_size)
    outcome_rms = float(outcome_B.double()[spread_B].square().mean().sqrt()) if spread_B.any() else last_outcome_rms
    centred_BT = centre_groups(credit_BT, mask_BT, group_size)
    rms = row_weighted_rms(centred_BT, mask_BT, group_size)
    scale = weight * outcome_rms / rms if rms > 0 else 0.0
    dense_BT = (centred_BT.double() * scale).float()
    return Advantages(
        total_BT=(outcome_B.float()[:, None] + dense_BT).masked_fill(~loss_mask_BT, 0.0),
        dense_BT=dense_BT,
        outcome_rms=outcome_rms,
        dense_rms=rms * scale,
        degenerate_share=1.0 - float(spread_B.double().mean()),
    )


def stage3_advantages(
    outcome_reward_B: Float[Tensor, " b"],
    reward_BT: Float[Tensor, "b t"],
    mask_BT: Bool[Tensor, "b t"],
    prompt_lengths_B: Int[Tensor, " b"],
    group_size: int,
    weight: float,
) -> Advantages:
    """The advantages of the seed's notebook `stage3_qwen35_4b_rl_v2`, number for number.

    With n_i the unmasked tokens of row i, o_i its outcome reward and lambda the `weight`:

        R_i  = o_i + lambda * (sum_t r_it) / n_i
        A_i  = (R_i - mean R) / (std R + 1e-8)              over the group's rows
        z_it = (r_it - mean r) / (std r + 1e-8)             over all G * (W - 1) positions of the group
        total_it = A_i + lambda * z_it                      where unmasked

    with standard deviations of G - 1 and G * (W - 1) - 1 degrees of freedom, and W the longest prompt + completion in
    the batch: all positions but the first count, prompt and padding as zeros. Its four defects, each with a test:

    1. Dividing by the group's deviation cancels lambda where all answers are right or all wrong: the slightest spread
       of r then moves the policy as much as being right does (up to 1.5 with G = 4).
    2. The zeros of prompt and padding enter the z-score, so that tokens get a bonus (or a fine, if r is negative on
       average) for being there at all. It grows with the length of others and has nothing to do with features.
    3. The features count twice, in R and in z.
    4. z is myopic: a token answers for its own state alone, not for what made later states good.

    Args:
        outcome_reward_B: rewards, not advantages. A row that is NaN (could not be judged) is left out of its group's
            mean and deviation and has A_i = 0; the notebook had no such rows.
        reward_BT: token rewards of the completions.
        mask_BT: the tokens that are trained on. A token without a reward has 0 here, as there.
        prompt_lengths_B: prompt tokens a row, without padding.
        weight: lambda, raw; not a share of the outcome advantage's size.

    Returns:
        `outcome_rms` and `dense_rms` are those of A_i and of lambda * z_it; there is no RMS to carry on.

    Raises:
        InputError: if the batch does not hold whole groups of at least 2, `weight` is negative, or a prompt is empty.
    """
    _check(outcome_reward_B, group_size, weight)
    if group_size < 2:
        raise InputError(f"group_size: {group_size}; credit 'stage3' needs groups of at least 2")
    if (prompt_lengths_B < 1).any():
        raise InputError("prompt_lengths: a prompt has no tokens; each needs at least 1")
    values_BT = reward_BT.double().masked_fill(~mask_BT, 0.0)
    trajectory_B = outcome_reward_B.double() + weight * _row_mean(values_BT, mask_BT)
    scored_B = _z_in_group(trajectory_B, group_size)
    width = int((prompt_lengths_B + last_token(mask_BT) + 1).max())
    dense_BT = weight * _z_over_positions(values_BT, mask_BT, group_size, positions=group_size * (width - 1))
    total_BT = (scored_B[:, None] + dense_BT).masked_fill(~mask_BT, 0.0)
    column_B1, all_B1 = outcome_reward_B[:, None].double(), ~outcome_reward_B[:, None].isnan()
    return Advantages(
        total_BT=total_BT.float(),
        dense_BT=dense_BT.float(),
        outcome_rms=row_weighted_rms(scored_B[:, None], all_B1, group_size),
        dense_rms=row_weighted_rms(dense_BT, mask_BT, group_size),
        degenerate_share=1.0 - float(group_has_spread(column_B1, all_B1, group_size).double().mean()),
    )


def token_credit(
    reward_BT: Float[Tensor, "b t"],
    mask_BT: Bool[Tensor, "b t"],
    mode: str,
    gamma: float = 1.0,
    step_end_BT: Bool[Tensor, "b t"] | None = None,
) -> Float[Tensor, "b t"]:
    """What each token is credited with, before any baseline; t runs over a row's unmasked tokens only, 0 ... n-1.

    - `per_token`:     C_t = r_t. Myopic: the policy gradient of the reward at each token with its past held fixed;
      biased for the sum of rewards, of the least variance.
    - `return_to_go`:  C_t = sum_{s >= t} gamma^(s-t) r_s. With gamma = 1 its expected gradient is that of the expected
      sum of rewards (the policy gradient theorem), so that it also pays for length where r > 0.
    - `potential`:     C_t = gamma * Phi_{t+1} - Phi_t, see `shaping`: local credit for a rise of the running mean,
      biased. Summed over a whole return it would be a baseline, without any effect on the expected gradient.
    - `step`:          C_t = r_e, e the end of t's step; the row's last token ends the last step. Biased; the tokens of
      a step answer for the one value that was read when it was complete.
    - `trajectory`:    C_t = mean_s r_s. The expected gradient is that of the expected mean reward; no token is singled
      out.

    Returns:
        [B, T] float32, 0 where masked.

    Raises:
        InputError: unknown mode, `stage3` (no credit, but advantages: `stage3_advantages`), gamma outside 0 ... 1, or
            `step` without `step_end_BT`.
    """
    check_credit(mode, gamma)
    if mode == "stage3":
        raise InputError("credit: 'stage3' replaces the outcome advantage too; call stage3_advantages")
    values_BT = reward_BT.double().masked_fill(~mask_BT, 0.0)
    if mode == "return_to_go":
        values_BT = return_to_go(values_BT, mask_BT, gamma)
    elif mode == "potential":
        values_BT = shaping(values_BT, mask_BT, gamma)
    elif mode == "trajectory":
        values_BT = _row_mean(values_BT, mask_BT)[:, None].expand_as(values_BT)
    elif mode == "step":
        if step_end_BT is None:
            raise InputError("step_end: credit 'step' needs a mask of the tokens that end a step")
        values_BT = _value_at_step_end(values_BT, mask_BT, step_end_BT)
    return values_BT.float().masked_fill(~mask_BT, 0.0)


def check_credit(mode: str, gamma: float) -> None:
    """Raises InputError for an unknown credit mode or a gamma outside 0 ... 1."""
    if mode not in get_args(Credit):
        raise InputError(f"credit: {mode!r} is not one of {', '.join(get_args(Credit))}")
    if not 0.0 <= gamma <= 1.0:
        raise InputError(f"gamma: {gamma} is outside 0 ... 1")


def return_to_go(values_BT: Float[Tensor, "b t"], mask_BT: Bool[Tensor, "b t"], gamma: float) -> Float[Tensor, "b t"]:
    """G_t = r_t + gamma * G_{t+1}; masked tokens (tool output) are stepped over and cost no discount."""
    result_BT = torch.zeros_like(values_BT)
    future_B = values_BT.new_zeros(len(values_BT))
    for t in range(values_BT.shape[1] - 1, -1, -1):
        future_B = torch.where(mask_BT[:, t], values_BT[:, t] + gamma * future_B, future_B)
        result_BT[:, t] = future_B
    return result_BT.masked_fill(~mask_BT, 0.0)


def shaping(values_BT: Float[Tensor, "b t"], mask_BT: Bool[Tensor, "b t"], gamma: float) -> Float[Tensor, "b t"]:
    """Potential-based shaping (Ng, Harada and Russell 1999), F_t = gamma * Phi_{t+1} - Phi_t.

    Phi_t, the potential before token t is written, is the mean of r_0 ... r_{t-1}; Phi_0 = 0. The state after the last
    token is terminal, cut at the length limit or not, and has potential 0: F_{n-1} = -Phi_{n-1}. Hence the sum of
    gamma^(s-t) F_s over s >= t is exactly -Phi_t: over whole returns this is a baseline that no action can change
    (safe, variance only), and summed over a row it is 0. Used token by token it is local credit, and biased.
    """
    values_BT = values_BT.masked_fill(~mask_BT, 0.0)
    count_BT = mask_BT.cumsum(dim=1)
    before_BT = values_BT.cumsum(dim=1) - values_BT
    phi_BT = before_BT / (count_BT - 1).clamp(min=1)
    after_BT = values_BT.cumsum(dim=1) / count_BT.clamp(min=1)
    terminal_BT = count_BT == mask_BT.sum(dim=1, keepdim=True)
    return (gamma * after_BT.masked_fill(terminal_BT, 0.0) - phi_BT).masked_fill(~mask_BT, 0.0)


def centre_groups(
    credit_BT: Float[Tensor, "b t"], mask_BT: Bool[Tensor, "b t"], group_size: int
) -> Float[Tensor, "b t"]:
    """C_t minus its group's mean over non-empty rows of the row's masked mean; 0 where masked or without a spread."""
    values_BT = credit_BT.double().masked_fill(~mask_BT, 0.0)
    filled_G = mask_BT.any(dim=1).view(-1, group_size)
    baseline_G = _row_mean(values_BT, mask_BT).view(-1, group_size).sum(dim=1) / filled_G.sum(dim=1).clamp(min=1)
    centred_BT = values_BT - baseline_G.repeat_interleave(group_size)[:, None]
    keep_BT = mask_BT & group_has_spread(values_BT, mask_BT, group_size)[:, None]
    return centred_BT.float().masked_fill(~keep_BT, 0.0)


def group_has_spread(
    values_BT: Float[Tensor, "b t"], mask_BT: Bool[Tensor, "b t"], group_size: int
) -> Bool[Tensor, " b"]:
    """For each row, whether its group's unmasked values differ by more than 1e-5 of the largest magnitude."""
    if values_BT.shape[1] == 0:
        return mask_BT.any(dim=1)
    low_G = values_BT.masked_fill(~mask_BT, torch.inf).amin(dim=1).view(-1, group_size).amin(dim=1)
    high_G = values_BT.masked_fill(~mask_BT, -torch.inf).amax(dim=1).view(-1, group_size).amax(dim=1)
    largest_G = torch.maximum(low_G.abs(), high_G.abs())
    return (high_G - low_G > _NOISE * largest_G).repeat_interleave(group_size)


def row_weighted_rms(values_BT: Float[Tensor, "b t"], mask_BT: Bool[Tensor, "b t"], group_size: int) -> float:
    """Square root of the mean over rows of the row's masked mean square, over rows of groups with any value not 0."""
    square_B = _row_mean(values_BT.double().square(), mask_BT)
    live_B = (values_BT != 0).any(dim=1).view(-1, group_size).any(dim=1).repeat_interleave(group_size)
    live_B = live_B & mask_BT.any(dim=1)
    return float(square_B[live_B].mean().sqrt()) if live_B.any() else 0.0


def _row_mean(values_BT: Tensor, mask_BT: Tensor) -> Tensor:
    return values_BT.masked_fill(~mask_BT, 0.0).sum(dim=1) / mask_BT.sum(dim=1).clamp(min=1)


def _z_in_group(values_B: Tensor, group_size: int) -> Tensor:
    """(x - mean) / (std + 1e-8) over the group's values that are no NaN; 0 for those that are."""
    values_GN = values_B.view(-1, group_size)
    seen_GN = ~values_GN.isnan()
    off_GN = (values_GN - values_GN.nanmean(dim=1, keepdim=True)).masked_fill(~seen_GN, 0.0)
    freedom_G = (seen_GN.sum(dim=1, keepdim=True) - 1).clamp(min=1)
    std_G = (off_GN.square().sum(dim=1, keepdim=True) / freedom_G).sqrt()
    return (off_GN / (std_G + _STAGE3_EPS)).flatten()


def _z_over_positions(values_BT: Tensor, mask_BT: Tensor, group_size: int, positions: int) -> Tensor:
    """(x - mean) / (std + 1e-8) over `positions` places a group, of which all but the unmasked hold 0; 0 if masked."""

    def group_sum(of_BT: Tensor) -> Tensor:
        return of_BT.sum(dim=1).view(-1, group_size).sum(dim=1).repeat_interleave(group_size)[:, None]

    mean_B1 = group_sum(values_BT) / positions
    off_BT = (values_BT - mean_B1).masked_fill(~mask_BT, 0.0)
    zeros_B1 = positions - group_sum(mask_BT)
    std_B1 = ((group_sum(off_BT.square()) + zeros_B1 * mean_B1.square()) / (positions - 1)).sqrt()
    return off_BT / (std_B1 + _STAGE3_EPS)


def _value_at_step_end(values_BT: Tensor, mask_BT: Tensor, step_end_BT: Tensor) -> Tensor:
    positions_T = torch.arange(values_BT.shape[1], device=values_BT.device)
    # The nearest end at or after t: a running minimum from the right over the positions of ends.
    beyond = values_BT.shape[1]
    end_BT = torch.where(last_of_steps(mask_BT, step_end_BT), positions_T, beyond).flip(1).cummin(dim=1).values.flip(1)
    return values_BT.gather(1, end_BT.clamp(max=beyond - 1))


def _check(outcome_B: Tensor, group_size: int, weight: float) -> None:
    if group_size < 1 or len(outcome_B) % group_size:
        raise InputError(f"group_size: {len(outcome_B)} rows are not whole groups of {group_size}")
    if weight < 0:
        raise InputError(f"weight: {weight} is negative; the dense share must be 0 or more")
