"""GSM8K's marker."""

from __future__ import annotations

import pytest

from mechreward.tasks import after_marker


@pytest.mark.parametrize(
    ("text", "first", "last"),
    [
        ("9 * 2 = 18\n#### 18", "18", "18"),
        ("#### 1\nmore\n####  2 \nend", "1", "2"),
        ("####", "", ""),
        ("####\n18", "", ""),
        ("### 18", None, None),
        ("", None, None),
    ],
)
def test_after_marker(text: str, first: str | None, last: str | None) -> None:
    assert after_marker(text) == first
    assert after_marker(text, last=True) == last
