"""ReasonScore: which features fire where a text turns to reasoning, and at many of its words rather than at one.

Galichin et al., "I Have Covered All the Bases Here", arXiv 2503.18878. With windows of `before` to `after` tokens round
each occurrence of a reasoning word, mu+_i the mean activation of feature i inside them, mu-_i its mean over all other
tokens (the complement), and q_w the share of word w in the sum over words of the mean inside w's own windows:

    s_i = mu+_i / sum_j mu+_j * H_i^alpha  -  mu-_i / sum_j mu-_j        H_i = - sum_w q_w log q_w / log(words)

so that H_i is 1 where all words matter alike, and 0 where one does all. A word of several tokens, and a phrase, match
as a whole sequence; its windows reach from `before` its first to `after` its last token. Words count in the logarithm
whether they occur or not. Deviations: the complement can be joined by a corpus of its own (`baseline_samples`, its
tokens outside of windows); `reasonscore_table` leaves out tokens of massive norm, and adds a test and stability.

One pass; in memory are [words + 2, F] sums, and in the table as many for each half-sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mechreward.errors import InputError
from mechreward.features.pooling import TOKENS
from mechreward.sae import SAE

Array = NDArray[np.float64]
Sample = tuple[Tensor, Tensor]
"""(residuals [T, D], token ids [T])"""
Vocabulary = Mapping[str, Sequence[int | Sequence[int]]]
"""By word, the ways to spell it: a token id, or several in a row."""
INSIDE, OUTSIDE, WORDS = 0, 1, 2
"""Rows of sums: inside any window, outside all, and from `WORDS` on inside the windows of each word."""

DEFAULT_REASONING_VOCAB: tuple[str, ...] = (
    "alternatively",
    "hmm",
    "maybe",
    "wait",
    "perhaps",
    "let me",
    "therefore",
    "however",
    "but",
    "another",
)
"""The paper's ten words."""


@dataclass(frozen=True)
class FeatureScore:
    """ReasonScore of one feature and its parts."""

    feature_id: int
    reason_score: float
    entropy: float
    """H, from 0 to 1."""
    prob_reasoning: float
    """Its share of all activation inside the windows."""
    prob_baseline: float
    """Its share of all activation outside of them."""


@dataclass(frozen=True)
class Windows:
    """Which tokens count as near a reasoning word.

    Raises:
        InputError: if there are fewer than two words, one without a spelling, or a negative reach.
    """

    vocabulary: Vocabulary
    before: int = 2
    after: int = 3

    def __post_init__(self) -> None:
        if len(self.vocabulary) < 2:
            raise InputError(f"reasoning_vocab: {len(self.vocabulary)} words have no entropy; give at least 2")
        empty = next((word for word, spellings in self.vocabulary.items() if not spellings), None)
        if empty is not None:
            raise InputError(f"reasoning_vocab: {empty!r} has no token ids; give some or leave the word out")
        if self.before < 0 or self.after < 0:
            raise InputError(f"context: {self.before} before and {self.after} after are not allowed; give 0 or more")

    def rows(self, tokens_T: Int[Tensor, " t"]) -> Bool[Tensor, "r t"]:
        """[2 + words, T]: the tokens that each row of sums takes in."""
        near_WT = torch.stack([self._near(tokens_T, spellings) for spellings in self.vocabulary.values()])
        inside_T = near_WT.any(0)
        return torch.cat([inside_T[None], ~inside_T[None], near_WT])

    def _near(self, tokens_T: Tensor, spellings: Sequence[int | Sequence[int]]) -> Tensor:
        near_T = torch.zeros(len(tokens_T), dtype=torch.bool)
        for spelling in spellings:
            wanted = torch.tensor([spelling] if isinstance(spelling, int) else list(spelling))
            if len(wanted) > len(tokens_T):
                continue
            for start in (tokens_T.unfold(0, len(wanted), 1) == wanted).all(-1).nonzero()[:, 0].tolist():
                near_T[max(0, start - self.before) : start + len(wanted) + self.after] = True
        return near_T


def compute_reasonscore(
    sae: SAE,
    reasoning_samples: Iterable[Sample],
    baseline_samples: Iterable[Sample],
    reasoning_vocab: Vocabulary,
    context_before: int = 2,
    context_after: int = 3,
    entropy_alpha: float = 0.7,
    top_k: int | None = None,
    device: torch.device | str | None = None,
) -> list[FeatureScore]:
    """All features by ReasonScore, highest first (of equal ones the lowest id first).

    Args:
        reasoning_samples: residuals [T, D] and token ids [T] of the texts in which words are looked for.
        baseline_samples: more texts for the negative side, may be empty: the paper's own formula has none.
        reasoning_vocab: as `resolve_vocab_token_ids` makes it.
        context_before, context_after: tokens of a window before and after a word.
        entropy_alpha: exponent of H, 0 or more.
        top_k: return only so many.
        device: where the SAE works; by default where it is.

    Raises:
        InputError: if no word occurs, a sample's shapes do not fit, or an argument is not allowed.
    """
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k: {top_k} is not allowed; it must be at least 1")
    check_alpha(entropy_alpha)
    windows = Windows(reasoning_vocab, context_before, context_after)
    sae = sae if device is None else sae.to(device)
    sums_RF, counts_R = np.zeros((WORDS + len(reasoning_vocab), sae.d_sae)), np.zeros(WORDS + len(reasoning_vocab))
    for samples, rows in ((reasoning_samples, slice(None)), (baseline_samples, slice(OUTSIDE, OUTSIDE + 1))):
        for h_TD, tokens_T in samples:
            if h_TD.ndim != 2 or tokens_T.shape != h_TD.shape[:1]:
                shapes = f"{tuple(h_TD.shape)} and {tuple(tokens_T.shape)}"
                raise InputError(f"samples: shapes {shapes} do not fit; residuals are [T, D] and token ids [T]")
            sums, counts = sample_sums(sae, h_TD, windows.rows(tokens_T.cpu()))
            sums_RF[rows] += sums[rows]
            counts_R[rows] += counts[rows]
    check_found(counts_R)
    score_F, entropy_F, inside_F, outside_F = scores(sums_RF, counts_R, entropy_alpha)
    order = np.argsort(-score_F, kind="stable")[:top_k]
    return [
        FeatureScore(int(i), float(score_F[i]), float(entropy_F[i]), float(inside_F[i]), float(outside_F[i]))
        for i in order
    ]


def resolve_vocab_token_ids(
    tokenizer: PreTrainedTokenizerBase,
    words: Sequence[str] = DEFAULT_REASONING_VOCAB,
    add_leading_space: bool = True,
) -> dict[str, list[int | tuple[int, ...]]]:
    """By word, its spellings in this tokenizer: an id where one token spells it, else all of them in order.

    Args:
        add_leading_space: also the spelling after a space, which most tokenizers have tokens of its own for.

    Raises:
        InputError: if a word has no token, or one that the tokenizer does not know.
    """
    found: dict[str, list[int | tuple[int, ...]]] = {}
    for word in words:
        variants = [word, " " + word] if add_leading_space and not word.startswith(" ") else [word]
        spelt = {tuple(tokenizer.encode(variant, add_special_tokens=False)) for variant in variants}
        unknown = tokenizer.unk_token_id
        spelt = {ids for ids in spelt if ids and (unknown is None or unknown not in ids)}
        if not spelt:
            raise InputError(f"words: the tokenizer cannot spell {word!r}; leave it out")
        found[word] = [ids[0] if len(ids) == 1 else ids for ids in sorted(spelt)]
    return found


def sample_sums(sae: SAE, h_TD: Float[Tensor, "t d"], rows_RT: Bool[Tensor, "r t"]) -> tuple[Array, Array]:
    """Sums [R, F] of all features over the tokens of each row, and how many tokens those are [R]."""
    sums_RF = torch.zeros(len(rows_RT), sae.d_sae, device=sae.device, dtype=torch.float64)
    weight_RT = rows_RT.to(sae.device, torch.float32)
    for start in range(0, len(h_TD), TOKENS):
        piece = slice(start, start + TOKENS)
        sums_RF += weight_RT[:, piece] @ sae.encode(h_TD[piece])
    return sums_RF.cpu().numpy(), rows_RT.sum(1).double().cpu().numpy()


def check_alpha(alpha: float) -> None:
    """Raises:
    InputError: for an exponent with which features of a single word would come first, or none at all.
    """
    if not 0 <= alpha < float("inf"):
        raise InputError(f"entropy_alpha: {alpha} is not allowed; it must be a finite number of 0 or more")


def check_found(counts_R: Array) -> None:
    """Raises:
    InputError: if no word occurs, or nothing is left outside of the windows.
    """
    if not counts_R[INSIDE]:
        raise InputError("reasoning_vocab: none of its words occurs; give words that do, in this tokenizer's ids")
    if not counts_R[OUTSIDE]:
        raise InputError("context: the windows take in every token; give shorter ones or longer texts")


def scores(sums_RF: Array, counts_R: Array, alpha: float) -> tuple[Array, Array, Array, Array]:
    """ReasonScore, entropy, and shares inside and outside, of every feature: four times [F]."""
    mean_RF = sums_RF / np.maximum(counts_R, 1)[:, None]
    inside_F, outside_F = share(mean_RF[INSIDE]), share(mean_RF[OUTSIDE])
    word_WF = mean_RF[WORDS:]
    total_F = word_WF.sum(0)
    share_WF = np.divide(word_WF, total_F, out=np.zeros_like(word_WF), where=total_F > 0)
    terms_WF = share_WF * np.log(share_WF, out=np.zeros_like(share_WF), where=share_WF > 0)
    entropy_F = np.clip(-terms_WF.sum(0) / np.log(len(word_WF)), 0, 1)
    return inside_F * entropy_F**alpha - outside_F, entropy_F, inside_F, outside_F


def share(mean_F: Array) -> Array:
    """Each feature's part of the sum; 0 for all where nothing fires."""
    total = mean_F.sum()
    return mean_F / total if total > 0 else np.zeros_like(mean_F)
