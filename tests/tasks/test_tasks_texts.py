"""Documents from each kind of source, and the one sentence on each kind of mistake."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from mechreward.errors import InputError
from mechreward.tasks import load_texts


def test_blank_lines_part_the_documents_of_a_text_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n\none\n two\n\n \nthree\n\n\nfour", encoding="utf-8-sig")
    assert load_texts(path) == ["one\n two", "three", "four"]
    assert load_texts(path, limit=2) == ["one\n two", "three"]


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "a.txt").write_text("one\n")
    assert load_texts("~/a.txt") == load_texts(Path("~/a.txt")) == ["one"]


def test_a_column_of_every_kind_of_table(tmp_path: Path) -> None:
    rows = [{"text": " a b ", "n": 1}, {"text": "", "n": 2}, {"text": "c", "n": 3}]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pd.DataFrame(rows).to_csv(tmp_path / "t.csv", index=False)
    pd.DataFrame(rows).to_parquet(tmp_path / "t.parquet")
    for suffix in ("jsonl", "csv", "parquet"):
        assert load_texts(tmp_path / f"t.{suffix}") == ["a b", "c"]
        assert load_texts(tmp_path / f"t.{suffix}", column="n", limit=2) == ["1", "2"]


def test_a_folder_that_datasets_can_read(tmp_path: Path) -> None:
    for split, text in (("train", "yes"), ("test", "no")):
        pd.DataFrame([{"text": text}]).to_parquet(tmp_path / f"{split}-00000.parquet")
    assert load_texts(tmp_path) == ["yes"]
    assert load_texts(tmp_path, split="test") == ["no"]
    assert load_texts(tmp_path, options={"data_files": {"train": str(tmp_path / "test-00000.parquet")}}) == ["no"]


@pytest.mark.parametrize(
    ("name", "content", "options", "message"),
    [
        ("none.txt", None, {}, "text: there is no file .*none.txt"),
        ("none.jsonl", None, {}, "there is no file .*none.jsonl"),
        ("a.txt", b"\n \n", {}, "text: .*a.txt holds no text"),
        ("a.txt", b"\xff\xfe", {}, r"a.txt is not UTF-8 text \(byte 0\)"),
        ("a.jsonl", b'{"t": 1}', {}, "text_column: there is no column 'text' in line 1 of .*the columns there are: t"),
        ("a.xlsx", b"x", {}, "text: '.*a.xlsx' is a .xlsx file; allowed are a .txt, .jsonl, .csv or .parquet file"),
        ("a.txt", b"x", {"options": {"name": "b"}}, r"text_options: \['name'\] mean nothing to .*a.txt"),
        ("a.txt", b"x", {"limit": 0}, "limit: 0 is not a number of documents"),
    ],
)
def test_mistakes(tmp_path: Path, name: str, content: bytes | None, options: dict[str, Any], message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_texts(tmp_path / name, **options)
