"""Are attributions true? Exact ablation, completeness, rank correlation, and top features against random ones.

Exact ablation takes feature i out of the residual at every node, h' = h - f_i W_dec[i], and runs the model on: the
error and the other features stay as they were (in a TopK SAE nobody moves up into the free place).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from mechreward.errors import InputError
from mechreward.features.attribution import (
    STEPS,
    Method,
    attributed_nodes,
    check_attribution,
    iter_attributions,
    written,
)
from mechreward.features.nodes import Nodes, Places, read_nodes
from mechreward.features.targets import Target
from mechreward.models import LoadedModel
from mechreward.rollout import Response
from mechreward.sae import SAE

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Agreement:
    """Attribution against exact ablation over K features, both summed over the responses."""

    spearman: float
    """Rank correlation of the two sums."""
    spearman_each: float
    """Median over responses of the rank correlation within one, over the features that fire in it. Responses in which
    either is the same for all of these have none and are left out; NaN if no response is left."""
    feature_ids: list[int]
    attributed_RK: Array
    ablated_RK: Array


@dataclass(frozen=True)
class TopEffect:
    """Mean drop of m, over questions, when the K features of largest attribution are taken out, and K random ones."""

    top: float
    random: float
    difference: float
    low: float
    high: float
    """95 % percentile bootstrap interval of the difference, over questions."""
    n_questions: int
    n_responses: int


def ablation_effects(
    loaded: LoadedModel,
    sae: SAE,
    response: Response,
    target: Target,
    groups: Sequence[Sequence[int]],
    *,
    places: Places = "completion",
    batch_size: int = 16,
) -> Array:
    """m of the model less m without the features of each group: [G], in the units of m. One forward row a group.

    Raises:
        InputError: as `iter_attributions`, and for a feature that the SAE does not have.
    """
    check_attribution(loaded, sae, [response], [target], places, batch_size)
    nodes = read_nodes(loaded, sae, [response], [target], places)
    ids = sorted({feature for group in groups for feature in group})
    acts_NK, rows_KD = sae.read(nodes.h_ND, ids) * sae.residual_unit(nodes.h_ND), sae.decoder_rows(ids)
    member_GK = torch.tensor([[feature in set(group) for feature in ids] for group in groups], device=rows_KD.device)
    clean = nodes.value(nodes.h_BSD)
    drops = []
    for start in range(0, len(groups), batch_size):
        removed = [nodes.scattered((acts_NK * member_K) @ rows_KD) for member_K in member_GK[start:][:batch_size]]
        many = _repeated(nodes, len(removed))
        drops.append(clean - many.value(many.h_BSD - torch.cat(removed)))
    return torch.cat(drops).double().cpu().numpy() if drops else np.zeros(0)


def completeness(
    loaded: LoadedModel,
    sae: SAE,
    responses: Sequence[Response],
    targets: Sequence[Target],
    *,
    method: Method = "gradient",
    steps: int = STEPS,
    places: Places = "completion",
    batch_size: int = 8,
) -> pd.DataFrame:
    """Does what is attributed add up? One row a response, all in the units of m.

    Columns: clean, without_features (all features 0, error kept), without_both (error 0 too: only the decoder's bias is
    left), attributed (sum over features), error_attributed, gap (attributed less what taking the features out costs)
    and gap_with_error (the same with the error on both sides; NaN for `integrated`, which leaves the error alone).

    Raises:
        InputError: as `iter_attributions`.
    """
    read = attributed_nodes(
        loaded, sae, responses, targets, method=method, steps=steps, places=places, batch_size=batch_size
    )
    frames = []
    for nodes, batch in read:
        features_ND = written(nodes)
        bias_ND = sae.decode(torch.zeros(len(features_ND), sae.d_sae, device=sae.device), nodes.h_ND)
        without = nodes.value(nodes.h_BSD - nodes.scattered(features_ND))
        bare = nodes.value(nodes.h_BSD - nodes.scattered(nodes.h_ND - bias_ND))
        frames.append(_added_up(batch.value_B, without, bare, batch.attr_BF.sum(1), batch.error_B))
    frame = pd.concat(frames, ignore_index=True)
    return frame.assign(gap_with_error=np.nan) if method == "integrated" else frame


def ablation_agreement(
    loaded: LoadedModel,
    sae: SAE,
    responses: Sequence[Response],
    targets: Sequence[Target],
    *,
    method: Method = "gradient",
    steps: int = STEPS,
    n_features: int = 64,
    places: Places = "completion",
    seed: int = 0,
) -> Agreement:
    """Rank correlation (Spearman) of attribution and exact ablation, over features drawn at random among those that
    fire.

    Raises:
        InputError: as `iter_attributions`, and if fewer than two features fire.
    """
    attr_RF, fires_RF = _all(loaded, sae, responses, targets, method, steps, places)
    firing = np.flatnonzero(fires_RF.any(0))
    if len(firing) < 2 or n_features < 2:
        raise InputError(f"n_features: {min(n_features, len(firing))} features fire or are asked for; 2 are needed")
    rng = np.random.default_rng(seed)
    ids = sorted(rng.choice(firing, min(n_features, len(firing)), replace=False).tolist())
    ablated_RK = np.stack(
        [
            ablation_effects(loaded, sae, response, target, [[i] for i in ids], places=places)
            for response, target in zip(responses, targets, strict=True)
        ]
    )
    attributed_RK = attr_RF[:, ids]
    each = [
        stats.spearmanr(a[fires], b[fires]).statistic
        for a, b, fires in zip(attributed_RK, ablated_RK, fires_RF[:, ids], strict=True)
        if fires.sum() > 2 and np.ptp(a[fires]) > 0 and np.ptp(b[fires]) > 0
    ]
    both = stats.spearmanr(attributed_RK.sum(0), ablated_RK.sum(0)).statistic
    return Agreement(float(both), float(np.median(each)) if each else np.nan, ids, attributed_RK, ablated_RK)


def top_against_random(
    loaded: LoadedModel,
    sae: SAE,
    responses: Sequence[Response],
    targets: Sequence[Target],
    *,
    k: int = 10,
    draws: int = 10,
    method: Method = "gradient",
    steps: int = STEPS,
    places: Places = "completion",
    seed: int = 0,
) -> TopEffect:
    """Takes out each response's K features of largest attribution, and `draws` times K others that fire in it.

    Raises:
        InputError: as `iter_attributions`, if fewer than 2 K features fire in a response, or there are fewer than two
            questions.
    """
    if k < 1 or draws < 1:
        raise InputError(f"k, draws: {k} and {draws} are not allowed; both must be at least 1")
    questions = [response.question_id for response in responses]
    if len(set(questions)) < 2:
        raise InputError(f"responses: an interval needs at least 2 questions, there are {len(set(questions))}")
    attr_RF, fires_RF = _all(loaded, sae, responses, targets, method, steps, places)
    rng = np.random.default_rng(seed)
    drops = []
    for row, (response, target) in enumerate(zip(responses, targets, strict=True)):
        firing = np.flatnonzero(fires_RF[row])
        if len(firing) < 2 * k:
            raise InputError(f"k: {k} is too large; only {len(firing)} features fire in response {row}, 2 k are needed")
        order = firing[np.argsort(-attr_RF[row, firing], kind="stable")]
        others = [rng.choice(order[k:], k, replace=False).tolist() for _ in range(draws)]
        effects = ablation_effects(loaded, sae, response, target, [order[:k].tolist(), *others], places=places)
        drops.append((effects[0], effects[1:].mean()))
    means = pd.DataFrame(drops, columns=["top", "random"]).groupby(questions).mean()
    difference_Q = (means["top"] - means["random"]).to_numpy()
    interval = stats.bootstrap(
        (difference_Q,), np.mean, method="percentile", n_resamples=2000, rng=np.random.default_rng(seed)
    ).confidence_interval
    return TopEffect(
        float(means["top"].mean()), float(means["random"].mean()), float(difference_Q.mean()),
        float(interval.low), float(interval.high), len(means), len(responses),
    )  # fmt: skip


def _all(
    loaded: LoadedModel,
    sae: SAE,
    responses: Sequence[Response],
    targets: Sequence[Target],
    method: Method,
    steps: int,
    places: Places,
) -> tuple[Array, NDArray[np.bool_]]:
    """Attributions and whether each feature fires: [R, F]."""
    batches = list(iter_attributions(loaded, sae, responses, targets, method=method, steps=steps, places=places))
    attr_RF = torch.cat([batch.attr_BF for batch in batches]).double().cpu().numpy()
    return attr_RF, torch.cat([batch.fires_BF for batch in batches]).cpu().numpy()


def _added_up(clean_B: Tensor, without_B: Tensor, bare_B: Tensor, attr_B: Tensor, error_B: Tensor) -> pd.DataFrame:
    columns = {
        "clean": clean_B,
        "without_features": without_B,
        "without_both": bare_B,
        "attributed": attr_B,
        "error_attributed": error_B,
        "gap": attr_B - (clean_B - without_B),
        "gap_with_error": attr_B + error_B - (clean_B - bare_B),
    }
    return pd.DataFrame({name: values.double().cpu().numpy() for name, values in columns.items()})


def _repeated(nodes: Nodes, n: int) -> Nodes:
    """The same single row n times."""
    return replace(
        nodes,
        prompts=nodes.prompts * n,
        completions=nodes.completions * n,
        targets=nodes.targets * n,
        h_BSD=nodes.h_BSD.expand(n, -1, -1),
        mask_BS=nodes.mask_BS.expand(n, -1),
    )
