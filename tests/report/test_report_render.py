"""The whole page: every number of the files is on it, model text is inert, and nothing comes from the network."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from html import unescape
from html.parser import HTMLParser
from pathlib import Path

import pytest

from mechreward.errors import InputError
from mechreward.report import write_report
from mechreward.report.render import _csp_hash

FakeRun = Callable[..., Path]


class _Page(HTMLParser):
    """The elements with their attributes, the text outside scripts and styles, and the scripts' contents."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.scripts: list[tuple[str | None, str]] = []
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        if tag == "script":
            self.scripts.append((dict(attrs).get("type"), ""))

    def handle_endtag(self, tag: str) -> None:  # noqa: ARG002
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[-1] = (self.scripts[-1][0], self.scripts[-1][1] + data)
        elif self._inside != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


@pytest.fixture(scope="module")
def parsed(page: str) -> _Page:
    return _Page(page)


def _section(page: str, name: str) -> str:
    return re.search(rf'<section id="{name}">.*?</section>', page, re.S).group()  # type: ignore[union-attr]


def _rows(section: str) -> list[list[str]]:
    bodies = re.findall(r"<tbody>(.*?)</tbody>", section, re.S)
    rows = [row for body in bodies for row in re.findall(r"<tr.*?</tr>", body, re.S)]
    return [[unescape(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row, re.S)] for row in rows]


def test_verdict_and_summary(parsed: _Page) -> None:
    for words in (
        "Dense training: accuracy rose by +0.259 [+0.171, +0.347], p = 0.0003 (0.153 to 0.412).",
        "Gate 1: pass. The pack separates right from wrong answers to the same question",
        "24 KNOWN, 16 UNKNOWN",
        "tiny-sae / block_2, block 2, 256 → 2,048",
        "8 features, mean pooled",
        "2 min 31 s",
        "outcome + dense against outcome only: +21.5 points (+12.8 to +30.1), p = 0.001",
        "16 questions, 64 responses; 95% intervals",
    ):
        assert words in parsed.text


def test_accuracy_table_is_exact(page: str) -> None:
    assert _rows(_section(page, "accuracy")) == [
        ["outcome only", "15.3%", "9.3 to 21.8%", "19.7%", "12.9 to 26.3%", "16", "64", "+4.4", "−1.8 to +10.6",
         "p = 0.162"],
        ["outcome + dense", "15.3%", "9.3 to 21.8%", "41.2%", "33.7 to 48.9%", "16", "64", "+25.9", "+17.1 to +34.7",
         "p < 0.001"],
    ]  # fmt: skip


def test_gate_table_is_exact(page: str) -> None:
    section = _section(page, "gate")
    assert _rows(section)[:2] == [
        ["feature reward", "0.842", "[0.790, 0.886]", "–", "–", "0.861", "[0.791, 0.931]"],
        ["mean log-probability", "0.584", "[0.521, 0.644]", "+0.258", "[0.178, 0.338]", "0.603", "[0.533, 0.673]"],
    ]
    assert len(_rows(section)) == 4
    assert "n: 22 mixed of 24 held-out questions, 192 responses, 28.0% of them right" in section
    assert "labels shuffled within questions: p &lt; 0.001" in section
    assert "c0ffee" * 10 in section


def test_features_table_takes_what_the_pack_lacks_from_the_contrast(page: str) -> None:
    rows = _rows(_section(page, "features"))
    assert rows[0] == ["17", "+1.000", "2.5", "+0.620", "< 0.001", "0.93", "0.9%"]
    assert rows[3] == ["650", "−0.700", "2.5", "−0.500", "0.003", "0.86", "32.5%"]
    assert len(rows) == 8


def test_responses_are_counted(page: str, fake_run: FakeRun, tmp_path: Path) -> None:
    import pandas as pd

    frame = pd.read_parquet(fake_run(tmp_path / "run", steps=1) / "responses" / "baseline.parquet")
    right, mixed = int(frame.correct.sum()), int(frame.groupby("question_id").correct.nunique().eq(2).sum())
    assert _rows(_section(page, "provenance"))[0] == ["baseline", "16", "64", str(right), str(mixed), "30.0", "16"]


def test_every_number_of_the_metrics_is_in_a_chart(page: str, fake_run: FakeRun, tmp_path: Path) -> None:
    metrics = (fake_run(tmp_path / "run") / "metrics.jsonl").read_text().splitlines()
    specs = [json.loads(script) for kind, script in _Page(page).scripts if kind == "application/json"]
    drawn: set[float] = set()
    for spec in specs:
        for rows in spec["datasets"].values():
            drawn.update(value for row in rows for value in row.values() if isinstance(value, float))
    for row in map(json.loads, metrics):
        skipped = {"epoch"}
        numbers = {name: v for name, v in row.items() if isinstance(v, float) and name not in skipped}
        assert all(any(abs(v - seen) < 1e-12 for seen in drawn) for v in numbers.values())
    assert len(specs) == 2 + 10 + 1


def test_the_gate_chart_marks_chance_and_threshold(page: str) -> None:
    specs = [json.loads(script) for kind, script in _Page(page).scripts if kind == "application/json"]
    marks = [rows for spec in specs for rows in spec["datasets"].values() if "at" in rows[0]]
    assert marks == [[{"at": 0.5}, {"at": 0.55}]]


def test_arms_keep_their_colour_through_the_page(page: str) -> None:
    specs = [json.loads(script) for kind, script in _Page(page).scripts if kind == "application/json"]
    scales = {(*scale["domain"], *scale["range"]) for scale in _arm_scales(specs)}
    assert scales == {("outcome", "dense", "#3079cf", "#d9730d")}
    assert page.count("--arm:#d9730d") >= 10


def _arm_scales(node: object) -> list[dict]:
    if isinstance(node, list):
        return [scale for item in node for scale in _arm_scales(item)]
    if not isinstance(node, dict):
        return []
    colour = node.get("color")
    own = [colour["scale"]] if isinstance(colour, dict) and colour.get("field") == "arm" else []
    return own + [scale for item in node.values() for scale in _arm_scales(item)]


def test_at_least_ten_rollouts_with_colours_badges_and_hover_values(parsed: _Page, page: str) -> None:
    articles = [attributes for tag, attributes in parsed.elements if tag == "article"]
    assert len(articles) == 24
    assert {(a["data-arm"], a["data-outcome"]) for a in articles} == {
        (arm, outcome) for arm in ("outcome", "dense") for outcome in ("right", "wrong")
    }
    assert page.count("✓ right") == sum(a["data-outcome"] == "right" for a in articles)
    assert "24 of 32 logged rollouts" in parsed.text


def test_a_token_has_its_exact_reward_and_colour(fake_run: FakeRun, tmp_path: Path) -> None:
    import pandas as pd

    folder = fake_run(tmp_path / "run", steps=1, rollouts=1)
    frame = pd.read_parquet(folder / "rollouts.parquet")
    frame.at[0, "tokens"], frame.at[0, "completion"] = ["yes", "no"], "yes no"
    frame.at[0, "token_rewards"] = [0.5, -2.0]
    frame.to_parquet(folder / "rollouts.parquet")
    (folder / "metrics.jsonl").unlink()
    html = write_report(folder).read_text()
    assert (
        '<span style="background:rgba(0,128,108,0.150)" title="+0.5">yes</span> '
        '<span style="background:rgba(190,24,110,0.600)" title="-2">no</span>'
    ) in html
    assert "−2.000" in html and "+2.000" in html


def test_model_text_is_escaped_everywhere(fake_run: FakeRun, tmp_path: Path) -> None:
    import pandas as pd

    evil = "</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    folder = fake_run(tmp_path / "run", steps=2, rollouts=4)
    frame = pd.read_parquet(folder / "rollouts.parquet")
    for column in ("prompt", "completion", "question_id", "arm"):
        frame[column] = evil
    frame["tokens"] = [[evil] * len(tokens) for tokens in frame["tokens"]]
    frame.to_parquet(folder / "rollouts.parquet")
    row = {"arm": evil, "seed": 0, "step": 1, "kind": "train", evil: 0.5}
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    gate = json.loads((folder / "gate1.json").read_text())
    gate["reason"] = gate["rows"][1]["name"] = evil
    (folder / "gate1.json").write_text(json.dumps(gate))
    results = json.loads((folder / "results.json").read_text())
    (folder / "results.json").write_text(json.dumps(results | {"verdict": evil}))
    html = write_report(folder).read_text()
    assert evil not in html
    assert [kind for kind, _ in _Page(html).scripts].count(None) == 2
    assert not any(tag == "img" for tag, _ in _Page(html).elements)


def test_nothing_comes_from_the_network(parsed: _Page, page: str) -> None:
    for tag, attributes in parsed.elements:
        for name in ("src", "href", "data", "action", "poster", "srcset", "xlink:href"):
            assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
    assert {tag for tag, _ in parsed.elements}.isdisjoint({"link", "iframe", "object", "embed", "base"})
    style = re.search(r"<style>(.*?)</style>", page, re.S).group(1)  # type: ignore[union-attr]
    assert "url(" not in style and "@import" not in style
    assert not re.search(r"\bimport\s*[({'\"]", parsed.scripts[-1][1])


def test_the_policy_allows_the_page_s_own_two_scripts_and_no_request(parsed: _Page) -> None:
    policies = [a["content"] for tag, a in parsed.elements if a.get("http-equiv") == "Content-Security-Policy"]
    running = [script for kind, script in parsed.scripts if kind is None]
    hashes = " ".join(f"'{_csp_hash(script)}'" for script in running)
    assert policies == [f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src {hashes}"]
    assert len(running) == 2


def test_size_and_determinism(page: str, fake_run: FakeRun, tmp_path: Path) -> None:
    assert len(page.encode()) < 5_000_000
    again = write_report(fake_run(tmp_path / "whole")).read_text()
    assert again.replace(str(tmp_path), "") == re.sub(r"/\S*?(?=/whole)", "", page)


def test_a_failed_gate_is_told_honestly(fake_run: FakeRun, tmp_path: Path) -> None:
    html = write_report(fake_run(tmp_path / "run", gate="fail")).read_text()
    text = _Page(html).text
    assert "Gate 1 did not pass (fail). The reason stands in gate1.json. Nothing was trained." in text
    assert 'class="verdict bad"' in html
    assert "0.521" in text and "[0.462, 0.579]" in text
    stopped = "It stopped after Gate 1, whose verdict is “fail”."
    assert f"metrics.jsonl is not in this run directory: the run did not reach training. {stopped}" in text
    assert f"rollouts.parquet is not in this run directory: the run did not reach training. {stopped}" in text
    assert re.search(r"Before training, \d+ of 64 answers to 16 UNKNOWN questions were right\.", text)
    assert "Training : not reached" in text.replace("  ", " ")


def test_a_gate_without_mixed_questions_has_words_for_a_table(fake_run: FakeRun, tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", gate="inconclusive")
    gate = json.loads((folder / "gate1.json").read_text())
    (folder / "gate1.json").write_text(json.dumps(gate | {"rows": [], "n_mixed": 0, "p_value": None}))
    assert "No score could be computed: n: 0 mixed of 24 held-out questions" in write_report(folder).read_text()


def test_a_run_that_just_began_names_every_missing_file(fake_run: FakeRun, tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "run", gate="fail")
    for path in [*folder.glob("*.*"), *folder.glob("responses/*")]:
        if path.name != "config.yaml":
            path.unlink()
    text = _Page(write_report(folder).read_text()).text
    assert "Unfinished: Gate 1 was not reached." in text
    for file, stage in (
        ("metrics.jsonl", "training"),
        ("gate1.json", "Gate 1"),
        ("pack.json", "a pack of features"),
        ("rollouts.parquet", "training"),
        ("responses/", "sampling"),
        ("manifest.json", "its first stage"),
    ):
        assert f"{file} is not in this run directory: the run did not reach {stage}." in text


def test_what_was_run_is_all_there(parsed: _Page) -> None:
    for words in ("--config", "learning_rate 1e-05", "torch 2.13.0", "sae " + "ab12" * 16, "created 2026-03-04"):
        assert words in parsed.text, words


def test_the_command_can_be_pasted_whatever_the_folder_is_called(fake_run: FakeRun, tmp_path: Path) -> None:
    folder = fake_run(tmp_path / "my run's", steps=4)
    (command,) = re.findall(r"<pre><code>(.*?)</code>", write_report(folder).read_text())
    wanted = ["mechreward", "improve", "--config", str(folder / "config.yaml"), "--out", f"{folder}-again"]
    assert shlex.split(unescape(command)) == wanted


def test_refuses_what_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="run_dir"):
        write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []
