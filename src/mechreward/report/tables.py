"""The page's tables as rows of finished strings, so that the template decides looks only."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd

from mechreward.report import formats as f
from mechreward.report.data import Run

MAX_FEATURES = 50
REPAIR_ARMS = ("steered", "resampled", "random")


@dataclass(frozen=True)
class Column:
    """A column's heading, and whether it holds numbers (set right)."""

    title: str
    numeric: bool = True


@dataclass(frozen=True)
class Row:
    """Finished cells; `strong` marks the row a section is about."""

    cells: tuple[str, ...]
    strong: bool = False


@dataclass(frozen=True)
class Table:
    """A table and the note under it."""

    columns: tuple[Column, ...]
    rows: list[Row]
    note: str = ""


def accuracy_table(results: dict[str, Any], arms: Sequence[str]) -> Table:
    """Before and after of every arm, in the order of `arms`, with n, 95 % intervals and the paired test."""
    columns = (
        Column("Arm", numeric=False),
        Column("Before"),
        Column("95% interval"),
        Column("After"),
        Column("95% interval"),
        Column("Questions"),
        Column("Responses"),
        Column("Difference, points"),
        Column("95% interval"),
        Column("Paired test"),
    )
    rows = [Row(_accuracy_cells(name, results["arms"][name])) for name in arms if name in results["arms"]]
    tests = sorted({arm["paired"]["test"] for arm in results["arms"].values() if arm.get("paired")})
    note = "Difference: after − before on the same questions"
    return Table(columns, rows, f"{note}; test: {', '.join(tests)}." if tests else f"{note}.")


def _accuracy_cells(name: str, arm: dict[str, Any]) -> tuple[str, ...]:
    before, after, paired = arm["before"], arm["after"], arm.get("paired") or {}
    return (
        f.arm_label(name),
        f.percent(before["accuracy"]),
        f.percent_interval(before["low"], before["high"]),
        f.percent(after["accuracy"]),
        f.percent_interval(after["low"], after["high"]),
        f.count(after["n_questions"]),
        f.count(after["n_responses"]),
        f.points(paired.get("difference")),
        f.points_interval(paired.get("low"), paired.get("high")),
        f.p_value(paired.get("p_value")),
    )


def repair_table(results: dict[str, Any] | None) -> Table | None:
    """How wrong chains were written on from the same places: steered, drawn again, along random rows; None without."""
    found = (results or {}).get("repair")
    if found is None:
        return None
    columns = (
        Column("Written on", numeric=False),
        Column("Chains repaired"),
        Column("95% interval"),
        Column("Right tries"),
        Column("95% interval"),
        Column("Tries"),
        Column("Steered against it"),
    )
    arms = sorted(found["arms"], key=REPAIR_ARMS.index)
    rows = [Row(_repair_cells(name, found["arms"][name], found), strong=name == "steered") for name in arms]
    note = (
        f"n: {f.count(found['n_chains'])} wrong chains, one a KNOWN question. A chain is repaired if one of its tries "
        "is right. Steered against it: McNemar's exact test on the same chains. Resampled: nothing edited; random: "
        "the same edits along random decoder rows of the same norm."
    )
    return Table(columns, rows, note)


def _repair_cells(name: str, arm: dict[str, Any], found: dict[str, Any]) -> tuple[str, ...]:
    against, tries = found["steered_against"].get(name), arm["tries"]
    return (
        name,
        f"{f.count(arm['repaired'])} ({f.percent(arm['share'])})",
        f.percent_interval(*arm["interval"]),
        f.percent(tries["share"]),
        f.percent_interval(*tries["interval"]),
        f.count(tries["n"]),
        f.MISSING if against is None else f.p_value(against["mcnemar_p"]),
    )


def gate_table(gate: dict[str, Any]) -> Table:
    """The judged reward and every baseline, in the gate's own order; `rows[0]` is the judged one and set strong."""
    columns = (
        Column("Score", numeric=False),
        Column("AUROC within a question"),
        Column("95% interval"),
        Column("The reward's lead"),
        Column("95% interval"),
        Column("AUROC over all answers"),
        Column("95% interval"),
    )
    rows = [Row(_gate_cells(row), strong=index == 0) for index, row in enumerate(gate["rows"])]
    counts = f"{f.count(gate['n_mixed'])} mixed of {f.count(gate['n_questions'])} held-out questions"
    note = f"n: {counts}, {f.count(gate['n_responses'])} responses"
    if gate.get("accuracy") is not None:
        note += f", {f.percent(gate['accuracy'])} of them right"
    if gate.get("p_value") is not None:
        note += f"; labels shuffled within questions: {f.p_value(gate['p_value'])}"
    return Table(columns, rows, " ".join([f"{note}.", *_gate_notes(gate)]))


def _gate_notes(gate: dict[str, Any]) -> list[str]:
    """What is reported beside the table: correlations over all answers, and what strings that deserve nothing get."""
    notes, found, attacks = [], gate.get("correlations"), gate.get("attacks")
    if any(not row.get("required", True) for row in gate["rows"]):
        notes.append("Rows marked “reported” need not be beaten.")
    if found:
        plain, partial = found["plain"], found["partial"]
        notes.append(
            f"Over all answers: Spearman {f.signed(plain['spearman'])} (at this accuracy a score without ties reaches "
            f"at most {f.number(plain['largest_spearman'])}), Pearson {f.signed(plain['pearson'])}; Spearman with "
            f"length, question, log-probability, truncation and format held fixed {f.signed(partial['value'])} "
            f"{f.interval(partial['low'], partial['high'])}."
        )
    if attacks:
        paid = ", ".join(f"{row['name']} {f.signed(row['median'])}" for row in attacks["attacks"])
        bar = f.signed(attacks["right_median"])
        notes.append(f"Median reward of right answers {bar}; of strings that deserve nothing: {paid}.")
        notes += [f"Left out: {name} ({why})." for name, why in attacks.get("left_out", {}).items()]
    return notes


def _gate_cells(row: dict[str, Any]) -> tuple[str, ...]:
    return (
        row["name"] if row.get("required", True) else f"{row['name']} (reported)",
        f.number(row.get("within_auroc")),
        f.interval(row.get("low"), row.get("high")),
        f.signed(row.get("difference")),
        f.interval(row.get("difference_low"), row.get("difference_high")),
        f.number(row.get("auroc")),
        f.interval(row.get("auroc_low"), row.get("auroc_high")),
    )


def features_table(pack: dict[str, Any], features: pd.DataFrame | None) -> Table:
    """The pack's features, heaviest first; what the pack does not say is taken from features.parquet by id."""
    columns: tuple[Column, ...] = (
        Column("Feature"),
        Column("Name", numeric=False),
        Column("Weight"),
        Column("Scale"),
        Column("Effect"),
        Column("q"),
        Column("Stability"),
        Column("Support"),
    )
    held = _by_id(features)
    ordered = sorted(pack["features"], key=lambda feature: -abs(feature["weight"]))
    rows = [Row(_feature_cells({**held.get(feature["id"], {}), **_given(feature)})) for feature in ordered]
    if not any(row.cells[1] for row in rows):
        columns = columns[:1] + columns[2:]
        rows = [Row(row.cells[:1] + row.cells[2:]) for row in rows]
    left_out = len(rows) - MAX_FEATURES
    note = f"{left_out} more features are in pack.json." if left_out > 0 else ""
    return Table(columns, rows[:MAX_FEATURES], note)


def candidates_table(features: pd.DataFrame) -> Table:
    """The strongest features of a contrast that gave no pack: how near the run came."""
    columns = (Column("Feature"), Column("Effect"), Column("q"), Column("Stability"), Column("Support"))
    strongest = features.sort_values("effect", key=abs, ascending=False, kind="stable").head(10)
    cells = [_feature_cells({"weight": None, **feature}) for feature in _by_id(strongest).values()]
    rows = [Row((row[0], *row[4:])) for row in cells]
    return Table(columns, rows, f"The 10 largest effects of {f.count(len(features))} features; none went into a pack.")


def _feature_cells(feature: dict[str, Any]) -> tuple[str, ...]:
    q = feature.get("q_value")
    return (
        str(feature["id"]),
        feature.get("name") or "",
        f.signed(feature["weight"]),
        f.general(feature.get("scale")),
        f.signed(feature.get("effect")),
        "< 0.001" if q is not None and q < 0.001 else f.number(q),
        f.number(feature.get("stability"), 2),
        f.percent(feature.get("support")),
    )


def _by_id(features: pd.DataFrame | None) -> dict[int, dict[str, Any]]:
    if features is None or "id" not in features:
        return {}
    return {int(row["id"]): {str(key): value for key, value in row.items()} for row in features.to_dict("records")}


def _given(feature: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in feature.items() if value is not None}


def responses_table(run: Run) -> Table:
    """What was sampled and judged, stage by stage: plain counts."""
    columns = (
        Column("Stage", numeric=False),
        Column("Questions"),
        Column("Responses"),
        Column("Right"),
        Column("Mixed questions"),
        Column("Mean length, tokens"),
        Column("Cut at the limit"),
    )
    rows = [Row((stage, *_response_cells(frame))) for stage, frame in run.responses.items()]
    return Table(columns, rows, "Mixed questions have both right and wrong answers: only they can tell a good score.")


def _response_cells(frame: pd.DataFrame) -> tuple[str, ...]:
    right = frame["correct"].fillna(False).astype(bool)
    share = right.groupby(frame["question_id"]).mean()
    return (
        f.count(len(share)),
        f.count(len(frame)),
        f.count(int(right.sum())),
        f.count(int(((share > 0) & (share < 1)).sum())),
        f.number(float(frame["completion_ids"].map(len).mean()), 1),
        f.count(int((frame["finish"] == "length").sum())) if "finish" in frame else f.MISSING,
    )
