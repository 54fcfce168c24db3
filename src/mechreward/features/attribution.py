"""How much each SAE feature does for a number m of a response: gradient x activation, and integrated gradients.

With the features as nodes and the SAE's error kept (`nodes`), the effect of setting feature i to 0 is estimated by

    gradient     attr_i = f_i * (W_dec[i] . grad_h m)      one backward for all features and tokens
    integrated   the same with grad_h m averaged over `steps` points between all features at 0 and at their own values,
                 at shares 0, 1/S, ..., (S - 1)/S of them, the error kept (left Riemann sum)

summed over the tokens that are nodes: attribution patching and its integrated form with zero ablation (Marks et al.,
Sparse Feature Circuits, 2403.19647). Deviations: they walk from the clean values to the ablated ones, which puts their
left sum's surplus point at the other end; we explain one layer's SAE, not a circuit of many.

Both are estimates. `ablation` compares them with the truth: completeness, exact ablation, top features against random.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechreward.errors import InputError
from mechreward.features.nodes import Nodes, Places, check_fit, read_nodes
from mechreward.features.pooling import TOKENS
from mechreward.features.targets import Target, check_targets
from mechreward.models import LoadedModel, vocabulary_size
from mechreward.models.residuals import check_rows
from mechreward.rollout import Response
from mechreward.sae import SAE

Method = Literal["gradient", "integrated"]
STEPS = 10
"""Points of the integral."""


@dataclass(frozen=True)
class AttributionBatch:
    """Some responses: `rows` are their places in the input. All float32, on the model's device."""

    rows: list[int]
    value_B: Float[Tensor, " b"]
    """m of the unchanged model, in nats or logits."""
    attr_BF: Float[Tensor, "b f"]
    """Share of m that each feature is said to carry, in the units of m; summed over tokens."""
    error_B: Float[Tensor, " b"]
    """The same of the SAE's error; 0 for `integrated`, whose path leaves it alone."""
    acts_BF: Float[Tensor, "b f"]
    """Mean activation over the nodes, in the SAE's units."""
    fires_BF: Bool[Tensor, "b f"]
    """Whether the feature fires at any node."""


def iter_attributions(
    loaded: LoadedModel,
    sae: SAE,
    responses: Sequence[Response],
    targets: Sequence[Target],
    *,
    method: Method = "gradient",
    steps: int = STEPS,
    places: Places = "completion",
    batch_size: int = 8,
) -> Iterator[AttributionBatch]:
    """Streams attributions, batch by batch in input order; a batch holds [batch_size, F] numbers.

    Args:
        targets: what is explained of each response.
        method: `gradient` takes one backward a batch, `integrated` takes `steps`.
        places: at which tokens features are nodes: those of the `completion`, or `all`, the prompt's too.

    Raises:
        InputError: at once for an SAE that does not fit, a target out of range or with no node before it, or an
            argument that is not allowed; on the way for a gradient or state that is not finite.
    """
    read = attributed_nodes(
        loaded, sae, responses, targets, method=method, steps=steps, places=places, batch_size=batch_size
    )
    return (batch for _, batch in read)


def attributed_nodes(
    loaded: LoadedModel,
    sae: SAE,
    responses: Sequence[Response],
    targets: Sequence[Target],
    *,
    method: Method,
    steps: int,
    places: Places,
    batch_size: int,
) -> Iterator[tuple[Nodes, AttributionBatch]]:
    """As `iter_attributions`, with the nodes that each batch was read from."""
    check_attribution(loaded, sae, responses, targets, places, batch_size)
    if method not in get_args(Method):
        raise InputError(f"method: {method!r} is not one of {', '.join(get_args(Method))}")
    if steps < 1:
        raise InputError(f"steps: {steps} is too small; it must be at least 1")
    return _stream(loaded, sae, responses, targets, method, steps, places, batch_size)


def check_attribution(
    loaded: LoadedModel,
    sae: SAE,
    responses: Sequence[Response],
    targets: Sequence[Target],
    places: Places,
    batch_size: int,
) -> None:
    """Raises:
    InputError: naming what does not fit, before any forward.
    """
    check_fit(loaded, sae)
    check_targets(responses, targets, vocabulary_size(loaded.model))
    check_rows(loaded.model, [r.prompt_ids for r in responses], [r.completion_ids for r in responses], batch_size)
    if places not in get_args(Places):
        raise InputError(f"places: {places!r} is not one of {', '.join(get_args(Places))}")
    for row, (response, target) in enumerate(zip(responses, targets, strict=True)):
        if not response.prompt_ids:
            raise InputError(f"responses: response {row} has no prompt; something has to stand before the first token")
        if places == "completion" and target.end < 2:
            raise InputError(
                f"target: nothing of the completion stands before token 0 of response {row}; use places='all'"
            )


def _stream(
    loaded: LoadedModel,
    sae: SAE,
    responses: Sequence[Response],
    targets: Sequence[Target],
    method: Method,
    steps: int,
    places: Places,
    batch_size: int,
) -> Iterator[tuple[Nodes, AttributionBatch]]:
    for start in range(0, len(responses), batch_size):
        piece = slice(start, start + batch_size)
        nodes = read_nodes(loaded, sae, responses[piece], targets[piece], places)
        rows = list(range(len(responses))[piece])
        yield nodes, _attribute(nodes, rows, steps if method == "integrated" else 0)


def _attribute(nodes: Nodes, rows: list[int], steps: int) -> AttributionBatch:
    m_B, g_ND = _integrated(nodes, steps) if steps else nodes.gradient(nodes.h_BSD)
    sae, n_rows = nodes.sae, len(rows)
    rows_FD = sae.decoder_rows(range(sae.d_sae))
    attr_BF, acts_BF = torch.zeros(2, n_rows, sae.d_sae, device=g_ND.device)
    error_B = torch.zeros(n_rows, device=g_ND.device)
    for start in range(0, len(g_ND), TOKENS):
        piece = slice(start, start + TOKENS)
        h, g, row = nodes.h_ND[piece], g_ND[piece], nodes.row_N[piece]
        acts_NF = sae.encode(h)
        attr_BF.index_add_(0, row, acts_NF * ((g * sae.residual_unit(h)) @ rows_FD.T))
        acts_BF.index_add_(0, row, acts_NF)
        if not steps:
            error_B.index_add_(0, row, ((h - sae.decode(acts_NF, h)) * g).sum(-1))
    count_B1 = torch.bincount(nodes.row_N, minlength=n_rows)[:, None]
    return AttributionBatch(rows, m_B, attr_BF, error_B, acts_BF / count_B1.clamp(min=1), acts_BF > 0)


def _integrated(nodes: Nodes, steps: int) -> tuple[Tensor, Tensor]:
    """m of the unchanged model, and the gradient averaged along the path."""
    written_BSD = nodes.scattered(written(nodes))
    total_ND = torch.zeros_like(nodes.h_ND)
    for step in range(steps):
        total_ND += nodes.gradient(nodes.h_BSD - (1 - step / steps) * written_BSD)[1]
    return nodes.value(nodes.h_BSD), total_ND / steps


def written(nodes: Nodes) -> Float[Tensor, "n d"]:
    """What all features together write at each node, without the decoder's bias."""
    sae, parts = nodes.sae, []
    for h in nodes.h_ND.split(TOKENS):
        acts_NF = sae.encode(h)
        parts.append(sae.decode(acts_NF, h) - sae.decode(torch.zeros_like(acts_NF), h))
    return torch.cat(parts)
