"""The chain view: parts, marks and features of each step as chains.json has them, and safe on the page."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from mechreward.report import write_report
from mechreward.report.chains import MAX_FIRED, make_views
from mechreward.report.tables import repair_table

SCRIPT = "<script>alert('chain')</script>"


def fired(*rows: tuple[int, float, str]) -> list[dict[str, Any]]:
    return [{"feature": f, "name": "sum" if f == 1 else "", "value": v, "side": side} for f, v, side in rows]


CHAINS = {
    "views": [
        {
            "kind": "repair", "question_id": "q-1", "prompt": f"Ada has 3 {SCRIPT} .", "answer": "5",
            "before": {"correct": False, "steps": [
                {"parts": [["kept", " 3"], ["critical", " -"], ["kept", f" 2 = 1 {SCRIPT} ."]],
                 "fired": fired((9, 1.5, "wrong"), (1, 0.25, "right"))},
                {"parts": [["kept", " #### 1"]], "fired": []},
            ]},
            "after": {"correct": True, "steps": [
                {"parts": [["kept", "3"], ["new", " + 2 = 5 ."]],
                 "fired": fired(*((f, 6.0 - f, "right") for f in range(1, MAX_FIRED + 3)))},
            ]},
        },
        {
            "kind": "dense", "question_id": "q-2", "prompt": "p", "answer": "7",
            "before": {"correct": True, "steps": [{"parts": [["kept", "a"]], "fired": []}]},
            "after": {"correct": False, "steps": [{"parts": [["new", "b"]], "fired": []}]},
        },
    ]
}  # fmt: skip
REPAIR = {
    "n_chains": 60,
    "arms": {
        "steered": {"repaired": 45, "share": 0.75, "interval": [0.628, 0.842],
                    "tries": {"share": 0.483, "interval": [0.392, 0.575], "n": 120}},
        "random": {"repaired": 39, "share": 0.65, "interval": [0.524, 0.758],
                   "tries": {"share": 0.392, "interval": [0.308, 0.475], "n": 120}},
    },
    "steered_against": {"random": {"mcnemar_p": 0.03125}},
}  # fmt: skip


def test_views_hold_every_part_and_the_strongest_features() -> None:
    repair, dense = make_views(CHAINS)
    assert (repair.label, dense.label) == ("repair", "outcome + dense")
    assert (repair.before.words, repair.after.words) == ("As it was sampled", "Written on with steering")
    assert (dense.before.words, dense.after.words) == ("Before training", "After training")
    assert [chain.outcome for v in (repair, dense) for chain in (v.before, v.after)] == [
        "wrong", "right", "right", "wrong",
    ]  # fmt: skip
    first, second = repair.before.steps
    assert first.parts[:4] == [("kept", "3"), ("kept", " "), ("critical", "-"), ("kept", " ")]
    assert second.parts == [("kept", "#### 1")]
    assert [(chip.text, chip.side) for chip in first.chips] == [("9 1.50", "wrong"), ("1 0.25", "right")]
    assert first.chips[1].title == "feature 1 sum, 0.250 of its size; goes with right chains"
    [step] = repair.after.steps
    assert [chip.text.split()[0] for chip in step.chips] == ["1", "2", "3", "4"] and step.more == 2


@pytest.fixture(scope="module")
def section(tmp_path_factory: pytest.TempPathFactory, fake_run: Callable[..., Path]) -> str:
    folder = fake_run(tmp_path_factory.mktemp("runs") / "chains")
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps(results | {"repair": REPAIR}))
    (folder / "chains.json").write_text(json.dumps(CHAINS))
    page = write_report(folder).read_text()
    found = re.search(r'<section id="chains">.*?</section>', page, re.S)
    assert found and '<a href="#chains">' in page
    return found[0]


def test_page_marks_the_critical_token_and_what_is_new(section: str) -> None:
    assert '3 <mark class="critical">-</mark> 2 = 1' in section
    assert '3 <span class="new">+ 2 = 5 .</span>' in section
    assert section.count("<li>") == 5 and section.count('class="view"') == 2
    assert '<i class="chip wrong" title="feature 9, 1.500 of its size; goes with wrong chains">9 1.50</i>' in section
    assert "<span>+2</span>" in section


def test_model_text_is_escaped(section: str) -> None:
    assert SCRIPT not in section and SCRIPT in unescape(section)


def test_repair_table(section: str) -> None:
    table = repair_table({"repair": REPAIR})
    assert table is not None and repair_table({"arms": {}}) is None and repair_table(None) is None
    assert [row.cells for row in table.rows] == [
        ("steered", "45 (75.0%)", "62.8 to 84.2%", "48.3%", "39.2 to 57.5%", "120", "–"),
        ("random", "39 (65.0%)", "52.4 to 75.8%", "39.2%", "30.8 to 47.5%", "120", "p = 0.031"),
    ]
    assert [row.strong for row in table.rows] == [True, False] and "n: 60 wrong chains" in section


def test_a_page_without_chains_has_no_such_section(page: str) -> None:
    assert 'id="chains"' not in page and 'href="#chains"' not in page
