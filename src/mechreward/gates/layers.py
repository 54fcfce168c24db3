"""Layer sweep: at which block do the states tell right from wrong answers to the same question?

For each block and position a logistic probe is fitted on the responses' pooled states and cross-fitted by question: a
question's answers are scored by a probe that has seen none of them. States are centred within their question, so that
how hard a question is cannot help, and standardised. The number is the within-question AUROC with an interval clustered
by question. All blocks are read by one forward a batch. Questions whose answers are all right or all wrong say nothing
here and are not read.

The best row is the largest of blocks x positions numbers found on the same responses, so its value flatters it. So the
lead over the baselines is measured with the choice cross-fitted too: on each half of the questions the row is chosen,
by probes cross-fitted within that half, and its probe fitted; the other half is scored. The probes of the table would
not do: those that score one half are trained on the other, so that a chance agreement of the two halves raises both,
and the row that is best by it (on labels without a signal, 36 rows and 20 questions: .56 in place of .50). Probes of
half the questions are worse than those of the table, so that what is said of the choice errs on the low side.
Blocks whose interval overlaps the best one's are reported beside it: the lowest of them is the cheapest to read. An
AUROC of 1 has an interval without width, as every resample orders all pairs rightly.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy.typing import NDArray
from sklearn.model_selection import GroupKFold
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mechreward.errors import InputError
from mechreward.features.crossfit import centred, dense_probe_scores, probe_scores
from mechreward.features.pooling import check_responses
from mechreward.gates.baselines import length, mean_logprob
from mechreward.gates.evidence import compare
from mechreward.gates.judgement import ScoreRow
from mechreward.gates.statistics import Interval, cluster_bootstrap, question_pairs, ratio, within_question_auroc
from mechreward.models import LoadedModel, iter_blocks, n_blocks, norm_outliers
from mechreward.rollout import Response

Array = NDArray[np.float64]
POSITIONS = ("mean", "last", "step end")
"""Where a response's states are read: mean over all its tokens, its last token, mean over tokens that end a sentence or
a line (its last token where there is none)."""
MIN_MIXED = 10
"""Fewest questions with right and wrong answers: two a fold."""


@dataclass(frozen=True)
class ProbeScore:
    """What a probe of one block at one position makes of held-out questions."""

    layer: int
    position: str
    within: Interval
    """Within-question AUROC."""


@dataclass(frozen=True)
class LayerSweep:
    """All probes, by layer and position, and the baselines on the same responses."""

    probes: tuple[ProbeScore, ...]
    chosen: Interval
    """Within-question AUROC where each half of the questions is scored by the best probe of the other half alone."""
    baselines: tuple[ScoreRow, ...]
    """`difference` is the lead of `chosen`."""
    n_questions: int
    n_mixed: int
    n_responses: int
    """Answers to mixed questions: those the numbers rest on."""
    draws: int
    seed: int

    @property
    def best(self) -> ProbeScore:
        """The largest AUROC; of equal ones that of the lowest block."""
        return max(self.probes, key=lambda probe: (probe.within.value, -probe.layer))

    @property
    def alike(self) -> tuple[int, ...]:
        """Other blocks of which some position's interval overlaps the best one's."""
        bar = self.best.within.low
        return tuple(sorted({p.layer for p in self.probes if p.within.high >= bar} - {self.best.layer}))

    @property
    def beaten(self) -> bool:
        """Whether `chosen` leads every baseline by an interval above 0."""
        return all(row.difference is not None and row.difference.low > 0 for row in self.baselines)

    @property
    def verdict(self) -> str:
        """One or two sentences."""
        best = self.best
        found = f"Block {best.layer} tells right from wrong best ({best.position}: {_words(best.within)})"
        others = ", ".join(map(str, self.alike))
        close = f"; blocks {others} have intervals that overlap its own" if others else ""
        strongest = max(self.baselines, key=lambda row: row.within.value)
        against = f"{_words(self.chosen)}; {strongest.name} has {_words(strongest.within)}"
        unseen = f"On questions that had no say in the choice of block it is {against}."
        return f"{'' if self.beaten else 'No block beats the baselines. '}{found}{close}. {unseen}"

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON."""
        record = asdict(self)
        record["baselines"] = [{"name": r.name, "within": asdict(r.within), "lead": _lead(r)} for r in self.baselines]
        best = {"layer": self.best.layer, "position": self.best.position}
        return record | {"best": best, "alike": list(self.alike), "beaten": self.beaten, "verdict": self.verdict}


def sweep_layers(
    loaded: LoadedModel,
    responses: Sequence[Response],
    layers: Sequence[int] | None = None,
    *,
    draws: int = 2000,
    seed: int = 0,
    batch_size: int = 32,
) -> LayerSweep:
    """Reads verified responses at each block and scores a probe on questions it has not seen.

    Memory: mixed questions' responses x blocks x 3 states of the model's width, in float32.

    Args:
        layers: blocks to read; by default all.
        draws: bootstrap resamples.
        seed: of the folds and of the bootstrap.

    Raises:
        InputError: if fewer than `MIN_MIXED` questions have right and wrong answers, a block is not there, or a
            response has no tokens, no verdict or no log-probabilities.
    """
    check_responses(responses)
    mixed = _mixed(responses)
    questions, right = [r.question_id for r in mixed], np.array([r.correct is True for r in mixed])
    baselines = {"mean log-probability": [mean_logprob(mixed)], "length": [length(mixed)]}
    layers = range(n_blocks(loaded.model)) if layers is None else sorted(set(layers))
    states, probes = pooled_states(loaded, mixed, layers, batch_size=batch_size), []
    for (layer, position), states_ND in states.items():
        pairs = question_pairs(dense_probe_scores(states_ND, right, questions, seed=seed), right, questions)
        interval = cluster_bootstrap(ratio(pairs.wins_Q, pairs.pairs_Q), len(pairs.pairs_Q), draws=draws, seed=seed)
        probes.append(ProbeScore(layer, position, interval))
    apart_N = chosen_apart(list(states.values()), right, questions, seed=seed)
    chosen, *rows = compare(apart_N, baselines, mixed, draws=draws, seed=seed)
    return LayerSweep(
        probes=tuple(probes),
        chosen=chosen.within,
        baselines=tuple(rows),
        n_questions=len({r.question_id for r in responses}),
        n_mixed=len(set(questions)),
        n_responses=len(mixed),
        draws=draws,
        seed=seed,
    )


def chosen_apart(
    states: Sequence[NDArray[Any]], right_N: NDArray[np.bool_], questions: Sequence[str], *, seed: int = 0
) -> Array:
    """Each half of the questions scored by a probe of whichever of `states` [N, D] is best on the other half; of equal
    ones the first. The half that is scored has no part in the choice, nor in any probe."""
    names = np.asarray(questions)
    chosen_N = np.zeros(len(names))
    for choosing, scored in GroupKFold(2, shuffle=True, random_state=seed).split(names, groups=names):
        right, half = right_N[choosing], names[choosing].tolist()
        aurocs = [
            within_question_auroc(dense_probe_scores(s[choosing], right, half, seed=seed), right, half) for s in states
        ]
        x_ND = centred(states[int(np.argmax(aurocs))], questions)
        chosen_N[scored] = probe_scores(x_ND[choosing], right, x_ND[scored])
    return chosen_N


@torch.no_grad()
def pooled_states(
    loaded: LoadedModel, responses: Sequence[Response], layers: Sequence[int], *, batch_size: int = 32
) -> dict[tuple[int, str], NDArray[np.float32]]:
    """States [N, D] of each response by block and position, without tokens of massive norm.

    Raises:
        InputError: as `iter_blocks`.
    """
    prompts = [list(response.prompt_ids) for response in responses]
    completions = [list(response.completion_ids) for response in responses]
    ends = [step_ends(loaded.tokenizer, ids) for ids in completions]
    found: dict[tuple[int, str], list[Any]] = {}
    for batch in iter_blocks(loaded.model, prompts, completions, layers, batch_size):
        end_BT = torch.zeros(batch.mask_BT.shape, dtype=torch.bool)
        for row, at in enumerate(batch.rows):
            end_BT[row, ends[at]] = True
        for layer, h_BTD in batch.h_BTD.items():
            for position, pooled_BD in _pooled(h_BTD, batch.mask_BT, end_BT.to(h_BTD.device)).items():
                rows = found.setdefault((layer, position), [None] * len(responses))
                for at, pooled_D in zip(batch.rows, pooled_BD.cpu().numpy(), strict=True):
                    rows[at] = pooled_D
    return {key: np.stack(rows) for key, rows in found.items()}


def step_ends(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[int]:
    """Places of tokens that end a sentence or a line. A point that a digit follows at once is none: 3.5."""
    pieces = tokenizer.convert_ids_to_tokens(list(ids))
    following = [*pieces[1:], ""]
    return [t for t, (piece, after) in enumerate(zip(pieces, following, strict=True)) if _ends_step(piece, after)]


def _ends_step(piece: str, after: str) -> bool:
    # Byte-level vocabularies write a line feed as U+010A, byte-fallback ones as <0x0A>.
    if "\n" in piece or "\u010a" in piece or piece == "<0x0A>":
        return True
    return piece.endswith((".", "!", "?")) and not after[:1].isdigit()


def _pooled(
    h_BTD: Float[Tensor, "b t d"], mask_BT: Bool[Tensor, "b t"], end_BT: Bool[Tensor, "b t"]
) -> dict[str, Float[Tensor, "b d"]]:
    keep_BT = norm_outliers(h_BTD, mask_BT.to(h_BTD.device))
    last_BT = keep_BT & (keep_BT.flip(1).cumsum(1).flip(1) == 1)
    step_BT = keep_BT & end_BT
    step_BT = torch.where(step_BT.any(1, keepdim=True), step_BT, last_BT)
    return {
        position: (h_BTD * at_BT[..., None]).sum(1) / at_BT.sum(1, keepdim=True)
        for position, at_BT in zip(POSITIONS, (keep_BT, last_BT, step_BT), strict=True)
    }


def _mixed(responses: Sequence[Response]) -> list[Response]:
    """Answers to questions that have right and wrong ones."""
    right = {response.question_id for response in responses if response.correct}
    wrong = {response.question_id for response in responses if not response.correct}
    n_mixed, n_questions = len(right & wrong), len(right | wrong)
    if n_mixed < MIN_MIXED:
        which = "all answers are right" if not wrong else "all answers are wrong" if not right else ""
        raise InputError(
            f"responses: {n_mixed} of {n_questions} questions have both right and wrong answers"
            f"{which and f' ({which})'}; a layer sweep needs at least {MIN_MIXED}"
        )
    return [response for response in responses if response.question_id in right & wrong]


def _lead(row: ScoreRow) -> dict[str, float] | None:
    return None if row.difference is None else asdict(row.difference)


def _words(interval: Interval) -> str:
    return f"AUROC within questions {interval.value:.3f}, {interval.low:.3f} to {interval.high:.3f}"
