"""Which features of the bundled SAE tell the planted choice, from the world's own labels and not from right or wrong.

Two answers, both AUROCs of a feature's activation for "read backwards", on problems of their own:

- over responses: the pooled activation, for the strategy of the whole response (easy problems, one day each);
- over tokens: the activation at one kind of token (`measure.positions`), for the day's own coin, on tokens from a day's
  first operator on (long problems, three days each). Stricter: a feature that only fires in some contexts tells the
  strategy once it is pooled, but not at each token.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import rankdata

from mechreward.features import pooled_activations
from mechreward.models import LoadedModel, iter_residuals
from mechreward.sae import SAE
from mechreward.tiny.measure import OPERATORS, POSITIONS, Sampled, positions
from mechreward.tiny.world import label_chain

Array = NDArray[np.float64]
STEP_END = "step_end:."


def told_by_responses(loaded: LoadedModel, sae: SAE, sampled: Sampled, pooling: str) -> Array:
    """[F]: AUROC of each pooled feature for the shortcut, over responses that follow a strategy to the letter."""
    pairs = zip(sampled.responses, sampled.strategies, strict=True)
    followed = [(response, strategy == "shortcut") for response, strategy in pairs if strategy != "neither"]
    # Whole questions are put together when they are read: by question, then, as they come.
    followed.sort(key=lambda pair: pair[0].question_id)
    acts_NF = torch.cat([b.acts_BF for b in pooled_activations(loaded, sae, [r for r, _ in followed], pooling)])
    return aurocs(acts_NF.numpy(), np.array([flipped for _, flipped in followed]))


def told_by_tokens(loaded: LoadedModel, sae: SAE, sampled: Sampled) -> dict[str, Array]:
    """[F] for each kind of token: AUROC of each feature for the day's coin."""
    prompts = [list(r.prompt_ids) for r in sampled.responses]
    completions = [list(r.completion_ids) for r in sampled.responses]
    acts: dict[str, list[NDArray[np.float32]]] = {kind: [] for kind in POSITIONS}
    coins: dict[str, list[bool]] = {kind: [] for kind in POSITIONS}
    for batch in iter_residuals(loaded.model, prompts, completions, sae.layer, batch_size=64):
        for row, h_TD in zip(batch.rows, batch.h_BTD, strict=True):
            response = sampled.responses[row]
            flips = label_chain(sampled.problems[response.question_id], response.text).flips
            if flips is None:
                continue
            pieces = loaded.tokenizer.convert_ids_to_tokens(completions[row])
            coin_T, acts_TF = token_coins(pieces, flips), sae.encode(h_TD[: len(pieces)]).cpu().numpy()
            for kind, places in positions(pieces).items():
                known = [t for t in places if coin_T[t] is not None]
                acts[kind].append(acts_TF[known])
                coins[kind] += [coin_T[t] is True for t in known]
    return {kind: aurocs(np.concatenate(acts[kind]), np.array(coins[kind])) for kind in POSITIONS}


def token_coins(pieces: Sequence[str], flips: Sequence[bool]) -> list[bool | None]:
    """For each token the coin of its day; None before the day's first operator and from the answer's mark on."""
    coins: list[bool | None] = []
    day, thrown, over = -1, False, False
    for piece in pieces:
        if piece == "▁on":
            day, thrown = day + 1, False
        thrown = thrown or piece in OPERATORS
        over = over or piece.startswith("▁####")
        coins.append(flips[day] if thrown and not over else None)
    return coins


def aurocs(acts_NF: NDArray[np.float32], label_N: NDArray[np.bool_]) -> Array:
    """AUROC of every column, ties half."""
    n_true, n_false = int(label_N.sum()), int((~label_N).sum())
    above_F = rankdata(acts_NF, axis=0)[label_N].sum(0) - n_true * (n_true + 1) / 2
    return np.asarray(above_F / (n_true * n_false))
