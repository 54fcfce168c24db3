"""What an SAE's features add to, or lose against, dense readings of the same residual stream.

Within-question AUROC of each cross-fitted score of a discovery, and the features' lead over each dense reading, paired
on the same questions; intervals are a percentile bootstrap clustered by question. Nothing is turned round.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from mechreward.features.discovery import FEATURES, HeldOutScores
from mechreward.gates.statistics import Interval, cluster_bootstrap, question_pairs, ratio


@dataclass(frozen=True)
class Equivalent:
    """One way to read the residual stream, on questions its fit had not seen."""

    name: str
    within: Interval
    """Within-question AUROC."""
    lead: Interval | None
    """AUROC of the features less this one; None for the features themselves."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def compare_equivalents(held_out: HeldOutScores, *, draws: int = 2000, seed: int = 0) -> tuple[Equivalent, ...]:
    """A row for each score of the discovery, the features first.

    Raises:
        InputError: if a score is NaN or infinite.
    """
    pairs = {name: question_pairs(s, held_out.right_N, held_out.questions) for name, s in held_out.scores.items()}
    ours, rows = pairs[FEATURES], []
    for name, row in pairs.items():
        n = len(row.pairs_Q)
        within = cluster_bootstrap(ratio(row.wins_Q, row.pairs_Q), n, draws=draws, seed=seed)
        lead = cluster_bootstrap(ratio(ours.wins_Q - row.wins_Q, row.pairs_Q), n, draws=draws, seed=seed)
        rows.append(Equivalent(name, within, None if name == FEATURES else lead))
    return tuple(rows)
