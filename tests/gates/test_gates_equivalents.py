"""Features beside dense readings: AUROCs and leads against the statistics they are made of."""

from __future__ import annotations

import numpy as np
import pytest

from mechreward.features.discovery import DENSE_PROBE, DIRECTION, FEATURES, HeldOutScores
from mechreward.gates.equivalents import compare_equivalents
from mechreward.gates.statistics import within_question_auroc


def test_rows_and_paired_leads() -> None:
    rng = np.random.default_rng(0)
    questions = [f"q{i // 6}" for i in range(180)]
    right = np.tile([True, False, True, False, False, False], 30)
    noise = rng.normal(size=(3, 180))
    scores = {
        DIRECTION: noise[0],
        FEATURES: noise[1] + 1.5 * right,
        DENSE_PROBE: noise[1] + 1.5 * right,
    }
    rows = compare_equivalents(HeldOutScores(questions, right, scores), draws=400, seed=1)
    by_name = {row.name: row for row in rows}
    aurocs = {name: within_question_auroc(score, right, questions) for name, score in scores.items()}
    assert {name: row.within.value for name, row in by_name.items()} == pytest.approx(aurocs)
    assert by_name[FEATURES].lead is None
    lead = by_name[DIRECTION].lead
    assert lead is not None and lead.value == pytest.approx(aurocs[FEATURES] - aurocs[DIRECTION])
    assert 0 < lead.low < lead.value < lead.high
    same = by_name[DENSE_PROBE].lead
    assert same is not None and (same.value, same.low, same.high) == (0, 0, 0)
    assert by_name[FEATURES].within.low < aurocs[FEATURES] < by_name[FEATURES].within.high
    assert rows[0].to_dict()["within"]["value"] == rows[0].within.value
