"""Whole files or none, strict numbers, half lines left out."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest

from mechreward.errors import InputError
from mechreward.files import append_row, atomic_path, read_json, read_jsonl, sha256_bytes, write_json


def test_a_file_is_replaced_when_it_is_whole_and_left_as_it_was_otherwise(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "a.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("first")
        assert not path.exists() and temporary.parent == path.parent and str(os.getpid()) in temporary.name
    with pytest.raises(ZeroDivisionError), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_text() == "first" and list(path.parent.iterdir()) == [path]


def test_json_has_sorted_keys_and_strict_numbers(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"b": 1, "a": [0.5]})
    assert path.read_text() == '{\n "a": [\n  0.5\n ],\n "b": 1\n}\n' and read_json(path) == {"a": [0.5], "b": 1}
    for bad in (float("nan"), float("inf")):
        with pytest.raises(ValueError, match="JSON compliant"):
            write_json(path, {"a": bad})
        with pytest.raises(ValueError, match="JSON compliant"):
            append_row(tmp_path / "a.jsonl", {"a": bad})
    assert read_json(path) == {"a": [0.5], "b": 1}


def test_rows_are_added_and_a_half_one_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    assert read_jsonl(path) == []
    for row in ({"a": 1}, {"a": 2}):
        append_row(path, row)
    with path.open("a") as file:
        file.write('{"a": 3}')
    assert read_jsonl(path) == [{"a": 1}, {"a": 2}]
    append_row(path, {"a": "ä"})
    assert read_jsonl(path) == [{"a": 1}, {"a": 2}, {"a": "ä"}] and path.read_text().count("\n") == 3
    alone = tmp_path / "b.jsonl"
    alone.write_text('{"a": 1, "b')
    append_row(alone, {"a": 2})
    assert alone.read_text() == '{"a": 2}\n'
    path.write_text('{"a": 1}\n{"a"\n')
    with pytest.raises(InputError, match=r"^path: .*a.jsonl holds a line that is not JSON"):
        read_jsonl(path)


def test_what_cannot_be_read_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"^path: cannot read {tmp_path} .Is a directory.; name a JSON file$"):
        read_json(tmp_path)
    (tmp_path / "a.json").write_bytes(b"{\xff}\n")
    with pytest.raises(InputError, match=r"^path: .*a.json is not valid JSON \(byte 1 is not UTF-8\)$"):
        read_json(tmp_path / "a.json")
    with pytest.raises(InputError, match=r"^path: .*a.json holds a line that is not JSON \(byte 1 is not UTF-8\)$"):
        read_jsonl(tmp_path / "a.json")


def test_a_hash_is_over_all_chunks_in_order() -> None:
    assert sha256_bytes(b"ab", b"c") == hashlib.sha256(b"abc").hexdigest() == sha256_bytes(b"a", b"bc")
    assert sha256_bytes(b"c", b"ab") != sha256_bytes(b"ab", b"c")
