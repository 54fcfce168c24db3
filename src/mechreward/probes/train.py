"""Training a probe on the states of right and wrong answers, and what it is worth on questions it has not seen.

- `max`, `min` and `mean` fit scikit-learn's logistic regression on single tokens, each with its answer's label and a
  weight of one over the answer's tokens, so that long answers have no more say. A state and its mean are told apart by
  the same direction; what differs is how the tokens' log-odds are pooled when the probe is used.
- `attention` fits query and direction together, by L-BFGS on the same loss with the same penalty.

States are standardised and the standardisation is folded into the weights. Held-out numbers are cross-fitted by group
(question): an answer is scored by a probe that saw none of its question. Platt's slope and intercept of the shipped
probe come from these held-out log-odds; for the Brier score and the calibration error each fold is calibrated on the
other folds, so that no answer takes part in its own calibration.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import ArrayLike, NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss, roc_auc_score
from sklearn.model_selection import GroupKFold
from torch import Tensor

from mechreward.errors import InputError
from mechreward.probes.probe import LinearProbe, Pooling, pool_logits

Array = NDArray[np.float64]
PENALTY = 0.05
"""scikit-learn's C. Strong, as states have more dimensions than there are answers, often."""
BINS = 10
MIN_GROUPS = 2


@dataclass(frozen=True)
class ProbeTrainingResult:
    """A probe fitted on all answers, and numbers from answers to questions it had not seen."""

    probe: LinearProbe
    held_out_auroc: float
    """Right against wrong, over all answers."""
    held_out_accuracy: float
    """At probability .5."""
    brier: float
    """Mean squared distance of held-out probabilities from the labels; .25 for a coin."""
    calibration_error: float
    """Expected calibration error of the held-out probabilities, ten bins of equal width."""
    train_accuracy: float
    """On the answers it was fitted on: flatters it."""
    probabilities_N: Array
    """Held-out probabilities, in the order of the answers."""
    n_answers: int
    n_groups: int

    def numbers(self) -> dict[str, float | int]:
        """All but the probe and the probabilities."""
        names = ("held_out_auroc", "held_out_accuracy", "brier", "calibration_error", "train_accuracy")
        return {name: float(getattr(self, name)) for name in names} | {
            "n_answers": self.n_answers,
            "n_groups": self.n_groups,
        }


def train_linear_probe(
    hidden_states: Tensor,
    labels: ArrayLike,
    name: str = "probe",
    *,
    mask: Bool[Tensor, "n t"] | None = None,
    groups: Sequence[str] | None = None,
    layer: int | None = None,
    pooling: Pooling = "max",
    penalty: float = PENALTY,
    folds: int = 5,
    seed: int = 0,
    metadata: dict[str, Any] | None = None,
) -> ProbeTrainingResult:
    """Fits a probe and measures it on held-out groups.

    Args:
        hidden_states: [N, D], or [N, T, D] with `mask`; of any float type.
        labels: one an answer, true for the class the probe speaks for.
        mask: tokens that count; all if None.
        groups: question of each answer; each answer is its own group if None.
        penalty: scikit-learn's C, over 0; the smaller the stronger.

    Raises:
        InputError: shapes that do not fit, NaN or infinite states, labels that are not true or false or of one class,
            too few groups or folds, a penalty that is not above 0, or an answer without tokens.
    """
    h_NTD = hidden_states[:, None] if hidden_states.ndim == 2 else hidden_states
    h_NTD = h_NTD.detach().float().cpu()
    mask_NT = torch.ones(h_NTD.shape[:2], dtype=torch.bool) if mask is None else mask.cpu()
    right_N = _labels(labels)
    names = np.arange(len(right_N)).astype(str) if groups is None else np.asarray(groups, dtype=str)
    _check(h_NTD, mask_NT, right_N, names)
    if not penalty > 0:
        raise InputError(f"penalty: {penalty} must be above 0")
    if folds < 2:
        raise InputError(f"folds: {folds} is not at least 2; held-out numbers need another part to train on")

    def fit(rows: NDArray[Any]) -> LinearProbe:
        fitter = _fit_attention if pooling == "attention" else _fit_tokens
        return fitter(h_NTD[rows], mask_NT[rows], right_N[rows], penalty, pooling)

    parts = list(_folds(folds, seed, names))
    z_N = np.empty(len(right_N))
    for training, scored in parts:
        if right_N[training].all() or not right_N[training].any():
            raise InputError("labels: a fold holds one class only; more groups with both are needed")
        z_N[scored] = fit(training).pooled_logits(h_NTD[scored], mask_NT[scored]).double().numpy()
    p_N = np.empty(len(right_N))
    for others, scored in parts:
        slope, intercept = platt(z_N[others], right_N[others])
        p_N[scored] = 1 / (1 + np.exp(-(slope * z_N[scored] + intercept)))
    slope, intercept = platt(z_N, right_N)
    probe = replace(
        fit(np.arange(len(right_N))),
        name=name,
        layer=layer,
        slope=slope,
        intercept=intercept,
        metadata=metadata or {},
    )
    known_N = probe.row_proba(h_NTD, mask_NT).numpy() >= 0.5
    return ProbeTrainingResult(
        probe=probe,
        held_out_auroc=float(roc_auc_score(right_N, p_N)),
        held_out_accuracy=float(((p_N >= 0.5) == right_N).mean()),
        brier=float(brier_score_loss(right_N, p_N)),
        calibration_error=calibration_error(p_N, right_N),
        train_accuracy=float((known_N == right_N).mean()),
        probabilities_N=p_N,
        n_answers=len(right_N),
        n_groups=len(set(names)),
    )


def platt(scores: ArrayLike, labels: ArrayLike) -> tuple[float, float]:
    """Slope and intercept that turn scores into log-odds of the label: one-dimensional logistic regression, a little
    held back (C = 1 on standardised scores) so that scores which separate the classes stay finite.

    The slope is never negative: scores that go the wrong way on held-out answers say nothing, and are not turned round.

    Raises:
        InputError: if a score is not finite or the labels are of one class.
    """
    values, right = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=bool)
    if not np.isfinite(values).all():
        raise InputError("scores: some are NaN or infinite; calibration needs finite ones")
    if right.all() or not right.any():
        raise InputError("labels: all are of one class; calibration needs both")
    mean, std = values.mean(), values.std() or 1.0
    model = LogisticRegression(C=1.0).fit(((values - mean) / std)[:, None], right)
    slope = float(model.coef_[0, 0]) / float(std)
    if slope <= 0:
        share = right.mean()
        return 0.0, float(np.log(share / (1 - share)))
    return slope, float(model.intercept_[0] - slope * mean)


def calibration_error(probabilities: ArrayLike, labels: ArrayLike, bins: int = BINS) -> float:
    """Expected calibration error (Naeini et al. 2015): mean distance between probability and frequency over bins of
    equal width, weighted by how many fall into each."""
    p_N, right_N = np.asarray(probabilities, dtype=np.float64), np.asarray(labels, dtype=np.float64)
    place_N = np.minimum((p_N * bins).astype(int), bins - 1)
    apart = np.bincount(place_N, p_N - right_N, bins)
    return float(np.abs(apart).sum() / len(p_N))


def _fit_tokens(h_NTD: Tensor, mask_NT: Tensor, right_N: NDArray[Any], penalty: float, pooling: Pooling) -> LinearProbe:
    x_MD = h_NTD[mask_NT].double().numpy()
    row_M = mask_NT.nonzero()[:, 0].numpy()
    share_M = 1.0 / mask_NT.sum(1).numpy()[row_M]
    mean_D, std_D = x_MD.mean(0), x_MD.std(0)
    std_D[std_D == 0] = 1.0
    model = LogisticRegression(C=penalty, max_iter=500).fit((x_MD - mean_D) / std_D, right_N[row_M], share_M)
    weight_D = model.coef_[0] / std_D
    bias = float(model.intercept_[0] - weight_D @ mean_D)
    return LinearProbe(torch.from_numpy(weight_D), bias, len(weight_D), pooling=pooling)


def _fit_attention(
    h_NTD: Tensor, mask_NT: Tensor, right_N: NDArray[Any], penalty: float, pooling: Pooling
) -> LinearProbe:
    tokens_MD = h_NTD[mask_NT]
    mean_D, std_D = tokens_MD.mean(0), tokens_MD.std(0, correction=0)
    std_D[std_D == 0] = 1.0
    x_NTD = ((h_NTD - mean_D) / std_D).masked_fill(~mask_NT[..., None], 0.0)
    target_N = torch.from_numpy(right_N.astype(np.float32))
    query_D, weight_D = torch.zeros_like(mean_D), torch.zeros_like(mean_D)
    bias = torch.zeros(1)
    learnt = [value.requires_grad_(True) for value in (query_D, weight_D, bias)]
    solver = torch.optim.LBFGS(learnt, max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        z_N = pool_logits(x_NTD @ weight_D + bias, mask_NT, "attention", x_NTD @ query_D)
        fit = torch.nn.functional.binary_cross_entropy_with_logits(z_N, target_N, reduction="sum")
        total = penalty * fit + 0.5 * (weight_D.square().sum() + query_D.square().sum())
        total.backward()
        return total

    with torch.enable_grad():
        solver.step(loss)
    query_D, weight_D, bias = (value.detach() for value in learnt)
    weight_D, query_D = weight_D / std_D, query_D / std_D
    shift = float(bias) - float(weight_D @ mean_D)
    return LinearProbe(weight_D, shift, len(weight_D), pooling=pooling, query=query_D)


def _labels(labels: ArrayLike) -> NDArray[Any]:
    """As booleans. None, NaN and text all would be taken for one of the two."""
    given_N = np.asarray(labels)
    if given_N.ndim != 1 or not all(label in (0, 1) for label in given_N.tolist()):
        raise InputError("labels: must be a list of true and false, one an answer; verify answers without a verdict")
    return given_N.astype(bool)


def _folds(folds: int, seed: int, names: NDArray[Any]) -> Any:
    count = min(folds, len(set(names)))
    return GroupKFold(count, shuffle=True, random_state=seed).split(names, groups=names)


def _check(
    h_NTD: Float[Tensor, "n t d"],
    mask_NT: Bool[Tensor, "n t"],
    right_N: NDArray[Any],
    names: NDArray[Any],
) -> None:
    if not len(h_NTD) == len(right_N) == len(names) or mask_NT.shape != h_NTD.shape[:2]:
        shapes = f"{tuple(h_NTD.shape)}, {len(right_N)} labels, {len(names)} groups, mask {tuple(mask_NT.shape)}"
        raise InputError(f"hidden_states: {shapes} do not fit; one label, group and mask row an answer is needed")
    if not h_NTD[mask_NT].isfinite().all():
        raise InputError("hidden_states: some are NaN or infinite; all must be finite")
    if not mask_NT.any(1).all():
        raise InputError(f"mask: row {int((~mask_NT.any(1)).nonzero()[0])} has no tokens; leave such answers out")
    if right_N.all() or not right_N.any():
        raise InputError(f"labels: all {len(right_N)} are of one class; a probe needs both")
    if len(set(names)) < MIN_GROUPS:
        raise InputError(f"groups: {len(set(names))} is too few; held-out numbers need at least {MIN_GROUPS}")
