"""Tables that a whole run does not show."""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from mechreward.report import read_run
from mechreward.report.tables import (
    accuracy_table,
    candidates_table,
    features_table,
    gate_table,
    repair_table,
    responses_table,
)


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


def test_counts_are_those_after_training_and_intervals_each_their_own() -> None:
    before = {"accuracy": 0.1, "low": 0.05, "high": 0.2, "n_questions": 8, "n_responses": 16}
    after = {"accuracy": 0.3, "low": 0.2, "high": 0.45, "n_questions": 7, "n_responses": 1400}
    paired = {"difference": 0.2, "low": 0.1, "high": 0.3, "p_value": 0.01, "test": "sign"}
    results = {
        "arms": {"dense": {"before": before, "after": after, "paired": paired}, "b": {"before": before, "after": after}}
    }
    table = accuracy_table(results, ["b", "dense", "c"])
    counted = "10.0%", "5.0 to 20.0%", "30.0%", "20.0 to 45.0%", "7", "1,400"
    assert [row.cells for row in table.rows] == [
        ("b", *counted, "–", "–", "p –"),
        ("outcome + dense", *counted, "+20.0", "+10.0 to +30.0", "p = 0.010"),
    ]
    assert table.note == "Difference: after − before on the same questions; test: sign."


def test_ways_of_writing_on_stand_in_one_order_each_with_its_own_numbers() -> None:
    def arm(repaired: int, share: float) -> dict[str, object]:
        tries = {"share": share, "interval": [share / 2, share], "n": 20 + repaired}
        return {"repaired": repaired, "share": repaired / 10, "interval": [0.1, 0.2], "tries": tries}

    found = {
        "n_chains": 10, "arms": {"random": arm(1, 0.04), "resampled": arm(2, 0.1), "steered": arm(4, 0.2)},
        "steered_against": {"resampled": {"mcnemar_p": 0.25}, "random": {"mcnemar_p": 0.125}},
    }  # fmt: skip
    table = repair_table({"repair": found})
    assert table is not None and [row.strong for row in table.rows] == [True, False, False]
    assert [row.cells for row in table.rows] == [
        ("steered", "4 (40.0%)", "10.0 to 20.0%", "20.0%", "10.0 to 20.0%", "24", "–"),
        ("resampled", "2 (20.0%)", "10.0 to 20.0%", "10.0%", "5.0 to 10.0%", "22", "p = 0.250"),
        ("random", "1 (10.0%)", "10.0 to 20.0%", "4.0%", "2.0 to 4.0%", "21", "p = 0.125"),
    ]


def test_rows_that_need_not_be_beaten_are_marked() -> None:
    rows = [{"name": "pack"}, {"name": "length", "required": True}, {"name": "probe", "required": False}]
    gate = {"rows": rows, "n_mixed": 3, "n_questions": 5, "n_responses": 40}
    table = gate_table(gate)
    assert [row.cells[0] for row in table.rows] == ["pack", "length", "probe (reported)"]
    assert table.note == "n: 3 mixed of 5 held-out questions, 40 responses. Rows marked “reported” need not be beaten."


def test_a_small_q_is_not_printed_as_0() -> None:
    rows = [{"id": i, "weight": 1.0, "scale": 1.0, "name": "", "q_value": q} for i, q in enumerate((0.00099, 0.001))]
    assert [row.cells[4] for row in features_table({"features": rows}, None).rows] == ["< 0.001", "0.001"]
