"""Does discovery find the features that tell the planted choice of the tiny reasoner, and is it better at step ends?

For each seed: eight answers each to easy problems, features by `contrast` pooled over all tokens and at step ends; and,
on fresh problems, which features tell the strategy (`mechreward.tiny.truth`). Precision is the share of the first ten
features that do, recall the share of min(10, features that do) among them. Also the AUROC within questions of the ten
as a pack, cross-fitted, and beside it the dense readings; and how many of the ten features that tell the day's coin
best token by token are among the ten found.

    python experiments/tiny_discovery.py --json runs/tiny_discovery.json
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from mechreward.features import Search, explore
from mechreward.gates.equivalents import compare_equivalents
from mechreward.models import LoadedModel, load_model
from mechreward.sae import SAE, load_sae
from mechreward.tiny import MODEL, SAE_FOLDER
from mechreward.tiny.measure import Sampled, sample_setting
from mechreward.tiny.truth import STEP_END, told_by_responses, told_by_tokens

FIRST = 10


@dataclass(frozen=True)
class Settings:
    """What the experiment is told."""

    seeds: int = 5
    questions: int = 40
    """Easy problems to discover on, and as many to know the truth from."""
    tells: float = 0.95
    """A feature tells the strategy if its AUROC is at least this, or at most 1 less this."""
    methods: tuple[str, ...] = ("contrast", "probe")
    json: Path | None = None


def main(settings: Settings) -> None:
    loaded, sae = load_model(str(MODEL)), load_sae(SAE_FOLDER)
    by_token = told_by_tokens(loaded, sae, sample_setting(loaded, "long", settings.questions, 1000))
    rows = []
    for seed in range(settings.seeds):
        found_on = sample_setting(loaded, "easy", settings.questions, seed)
        known_from = sample_setting(loaded, "easy", settings.questions, 500 + seed)
        for pooling in ("mean", STEP_END):
            truth = np.abs(told_by_responses(loaded, sae, known_from, pooling) - 0.5) >= settings.tells - 0.5
            for method in settings.methods:
                row = measure(loaded, sae, found_on, truth, by_token, Search(method=method, pooling=pooling, seed=seed))
                rows.append({"seed": seed, **row})
                print(json.dumps(rows[-1]), flush=True)
    if settings.json is not None:
        record = {"settings": asdict(settings), "rows": rows}
        settings.json.write_text(json.dumps(record, indent=1, default=str))


def measure(
    loaded: LoadedModel, sae: SAE, sampled: Sampled, truth: Any, by_token: dict[str, Any], search: Search
) -> dict[str, Any]:
    started = time.perf_counter()
    stability = 0.8 if search.method == "contrast" else 0.3
    table, held_out = explore(loaded, sae, sampled.responses, search, n_features=FIRST, min_stability=stability)
    passed = table.frame[(table.frame["q_value"] <= 0.05) & (table.frame["effect"] != 0)]
    first = passed["id"].to_numpy()[:FIRST]
    hits = int(truth[first].sum())
    tokens = np.stack([np.abs(auroc - 0.5) for auroc in by_token.values()]).max(0)
    best = set(np.argsort(-tokens)[:FIRST].tolist())
    return {
        "method": search.method,
        "pooling": search.pooling,
        "n_responses": table.n_responses,
        "truth": int(truth.sum()),
        "found": len(first),
        "precision": hits / max(len(first), 1),
        "recall": hits / min(FIRST, int(truth.sum())),
        "best_by_token": len(best & set(first.tolist())) / FIRST,
        "within": {row.name: asdict(row.within) for row in compare_equivalents(held_out, seed=search.seed)},
        "seconds": round(time.perf_counter() - started, 1),
    }


if __name__ == "__main__":
    main(tyro.cli(Settings))
