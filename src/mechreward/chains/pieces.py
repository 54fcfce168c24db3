"""A long response cut into pieces at the ends of its steps, so that an SAE reads no further than it was trained to.

SAEs reconstruct badly past the context they were trained on. Each piece is read as a completion of its own: as few
pieces as the limit allows and, among those, cut where the model was least sure how to go on. High entropy marks a fork
in the reasoning, where the least of what is before is needed; the seed calls it entropy-based batching. Where one step
alone is longer than the limit it is cut inside, as rarely as possible.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mechreward.chains.steps import Step
from mechreward.errors import InputError
from mechreward.models import LoadedModel, iter_logits

Ids = Sequence[Sequence[int]]


def token_entropies(
    loaded: LoadedModel, prompt_ids: Ids, completion_ids: Ids, batch_size: int = 8
) -> list[list[float]]:
    """Entropy, in nats, of the distribution each completion token was drawn from; one list a row.

    Raises:
        InputError: as `iter_logits`.
    """
    entropies: list[list[float]] = [[] for _ in completion_ids]
    for batch in iter_logits(loaded.model, prompt_ids, completion_ids, batch_size):
        entropy_BT = torch.distributions.Categorical(logits=batch.logits_BTV).entropy()
        for row, values_T, mask_T in zip(batch.rows, entropy_BT, batch.mask_BT, strict=True):
            entropies[row] = values_T[mask_T].tolist()
    return entropies


def cut_long(steps: Sequence[Step], entropies: Sequence[float], max_tokens: int) -> list[tuple[int, int]]:
    """Token spans of the pieces, in order; together they cover the response.

    Exact, by dynamic programming over the places where a cut may be. The least of: cuts inside a step, then pieces,
    then minus the summed entropy of the tokens that the cuts stand before.

    Args:
        entropies: of each token, as `token_entropies` gives them.
        max_tokens: most tokens a piece may have. The prompt counts too where the SAE reads it: take its length off.

    Raises:
        InputError: without steps, with another number of entropies than tokens, or for a limit below 1.
    """
    if max_tokens < 1:
        raise InputError(f"max_tokens: {max_tokens} is too small; a piece has at least 1 token")
    if not steps:
        raise InputError("steps: the chain has none; there is nothing to cut")
    n_tokens = steps[-1].token_end
    if len(entropies) != n_tokens:
        raise InputError(f"entropies: {len(entropies)} are given for {n_tokens} tokens; give one each")
    boundaries = {step.token_end for step in steps}
    best: dict[int, tuple[int, int, float, int]] = {0: (0, 0, 0.0, -1)}  # by end: the cost so far, and where from
    starts = [0]  # within reach
    for end in _places(steps, max_tokens):
        starts = [start for start in starts if end - start <= max_tokens]
        cost = 0.0 if end == n_tokens else -entropies[end]
        within = int(end not in boundaries)
        best[end] = min((best[start][0] + within, best[start][1] + 1, best[start][2] + cost, start) for start in starts)
        starts.append(end)
    ends = [n_tokens]
    while ends[-1]:
        ends.append(best[ends[-1]][3])
    ends.reverse()
    return list(zip(ends[:-1], ends[1:], strict=True))


def _places(steps: Sequence[Step], max_tokens: int) -> list[int]:
    """Where a piece may end: at ends of steps, and anywhere inside a step that is too long for one piece."""
    too_long = [step for step in steps if step.token_end - step.token_start > max_tokens]
    inside = {place for step in too_long for place in range(step.token_start + 1, step.token_end)}
    return sorted(inside | {step.token_end for step in steps})
