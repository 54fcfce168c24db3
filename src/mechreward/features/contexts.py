"""Where features fire most in the user's own responses: the tokens round each response's highest activation.

One pass over the residuals, a heap of k contexts a feature: nothing else is kept. A response gives a feature at most
one context, that of its highest token, so that one long repetition does not fill the list. Tokens of massive norm are
left out, as they are from the reward.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from torch import Tensor

from mechreward.errors import InputError
from mechreward.features.nodes import check_fit
from mechreward.models import LoadedModel, iter_residuals, norm_outliers
from mechreward.rollout import Response
from mechreward.sae import SAE


@dataclass(frozen=True)
class Context:
    """Some tokens in a row of one response, and the feature's activation at each (0 where it is not read)."""

    question_id: str
    sample: int
    correct: bool | None
    position: int
    """Place of the highest activation in the completion, from 0."""
    activation: float
    tokens: tuple[str, ...]
    acts: tuple[float, ...]

    def html(self, top: float) -> str:
        """The tokens, the stronger coloured the nearer they come to `top`."""
        spans = (
            f'<span title="{act:.3g}" style="background:rgba(255,140,0,{act / top if top > 0 else 0:.2f})">'
            f"{escape(token)}</span>"
            for token, act in zip(self.tokens, self.acts, strict=True)
        )
        return f'<code style="white-space:pre-wrap">{"".join(spans)}</code>'


@dataclass(frozen=True)
class FeatureContexts:
    """A feature's highest contexts, highest first; shows itself as HTML in a notebook."""

    feature_id: int
    contexts: list[Context]
    n_tokens: int
    """Tokens read."""
    n_firing: int
    """Of these, tokens at which it fires."""

    def _repr_html_(self) -> str:
        top = self.contexts[0].activation if self.contexts else 0.0
        rows = "".join(
            f"<tr><td>{context.activation:.3g}</td><td>{_verdict(context.correct)}</td>"
            f"<td>{escape(context.question_id)}</td><td>{context.html(top)}</td></tr>"
            for context in self.contexts
        )
        rate = self.n_firing / self.n_tokens
        return f"<table><caption>feature {self.feature_id}, fires on {rate:.2%} of tokens</caption>{rows}</table>"


def top_contexts(
    loaded: LoadedModel,
    sae: SAE,
    responses: Sequence[Response],
    feature_ids: Sequence[int],
    k: int = 5,
    *,
    around: int = 10,
    batch_size: int = 32,
) -> list[FeatureContexts]:
    """The `k` responses in which each feature fires highest; fewer, or none, where it fires in fewer.

    Args:
        around: tokens shown before and after the highest one.

    Raises:
        InputError: if a feature id is out of range, the SAE does not fit the model, there are no responses or one
            without tokens, or an argument is out of its range.
    """
    check_fit(loaded, sae)
    sae.decoder_rows(feature_ids)  # checks the ids before any forward
    if k < 1 or around < 0:
        raise InputError(f"k, around: {k} and {around} are not allowed; give at least 1 and 0")
    heaps: list[list[tuple[float, int, Context]]] = [[] for _ in feature_ids]
    n_tokens, firing = 0, [0] * len(feature_ids)
    prompts, completions = [list(r.prompt_ids) for r in responses], [list(r.completion_ids) for r in responses]
    for batch in iter_residuals(loaded.model, prompts, completions, sae.layer, batch_size):
        keep_BT = norm_outliers(batch.h_BTD, batch.mask_BT)
        acts_BTK = sae.read(batch.h_BTD, feature_ids).masked_fill(~keep_BT[..., None].to(sae.device), 0).cpu()
        n_tokens += int(keep_BT.sum())
        for at, row in enumerate(batch.rows):
            for column, heap in enumerate(heaps):
                acts_T = acts_BTK[at, : len(completions[row]), column]
                firing[column] += int((acts_T > 0).sum())
                _offer(heap, k, row, responses[row], acts_T, around, loaded)
    return [
        FeatureContexts(feature, [entry[2] for entry in sorted(heap, reverse=True)], n_tokens, fires)
        for feature, heap, fires in zip(feature_ids, heaps, firing, strict=True)
    ]


def _offer(
    heap: list[tuple[float, int, Context]],
    k: int,
    row: int,
    response: Response,
    acts_T: Tensor,
    around: int,
    loaded: LoadedModel,
) -> None:
    """Puts a response on a feature's heap if it is among the k highest; of equal ones the first response is."""
    highest = float(acts_T.max())
    if highest <= 0 or (len(heap) == k and (highest, -row) < heap[0][:2]):
        return
    position = int(acts_T.argmax())
    start, stop = max(0, position - around), position + around + 1
    tokens = tuple(str(loaded.tokenizer.decode([token])) for token in response.completion_ids[start:stop])
    acts = tuple(acts_T[start:stop].tolist())
    context = Context(response.question_id, response.sample, response.correct, position, highest, tokens, acts)
    heapq.heappush(heap, (highest, -row, context))
    if len(heap) > k:
        heapq.heappop(heap)


def _verdict(correct: bool | None) -> str:
    return {True: "right", False: "wrong", None: ""}[correct]
