"""Tables that a whole run does not show."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from mechreward.report import read_run
from mechreward.report.tables import candidates_table, features_table, responses_table


def _contrast(n: int) -> pd.DataFrame:
    rows = [
        {"id": i, "effect": (-1) ** i * i / 10, "q_value": 0.5, "stability": 0.25, "support": i / 100} for i in range(n)
    ]
    return pd.DataFrame(rows)


def test_candidates_are_the_ten_largest_effects_of_either_sign() -> None:
    table = candidates_table(_contrast(12))
    assert [row.cells for row in table.rows[:2]] == [
        ("11", "−1.100", "0.500", "0.25", "11.0%"),
        ("10", "+1.000", "0.500", "0.25", "10.0%"),
    ]
    assert len(table.rows) == 10
    assert table.note == "The 10 largest effects of 12 features; none went into a pack."


def test_a_pack_s_own_numbers_stand_before_the_contrast_s_and_names_show_if_any() -> None:
    pack = {"features": [
        {"id": 1, "weight": 0.5, "scale": 2.0, "name": "", "effect": None, "q_value": None, "stability": None},
        {"id": 2, "weight": -1, "scale": 1.5, "name": "carry", "effect": 0.75, "q_value": 0.0002, "stability": 1.0},
    ]}  # fmt: skip
    table = features_table(pack, _contrast(3))
    assert [row.cells for row in table.rows] == [
        ("2", "carry", "−1.000", "1.5", "+0.750", "< 0.001", "1.00", "2.0%"),
        ("1", "", "+0.500", "2", "−0.100", "0.500", "0.25", "1.0%"),
    ]
    assert [row.cells[1] for row in features_table({"features": [pack["features"][0]]}, None).rows] == ["+0.500"]


def test_a_large_pack_is_cut_and_says_so() -> None:
    pack = {"features": [{"id": i, "weight": 1.0, "scale": 1.0, "name": ""} for i in range(60)]}
    table = features_table(pack, None)
    assert (len(table.rows), table.note) == (50, "10 more features are in pack.json.")


def test_only_questions_with_both_kinds_of_answer_are_mixed(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "responses").mkdir()
    rows = [("all", True), ("all", True), ("none", False), ("none", None), ("both", True), ("both", False)]
    frame = pd.DataFrame(rows, columns=["question_id", "correct"])
    frame["completion_ids"], frame["finish"] = [[1], [1, 2], [1], [1], [1], [1, 2, 3]], ["eos"] * 5 + ["length"]
    frame.to_parquet(tmp_path / "responses" / "known.parquet")
    table = responses_table(read_run(tmp_path))
    assert [row.cells for row in table.rows] == [("known", "3", "6", "3", "1", "1.5", "1")]
