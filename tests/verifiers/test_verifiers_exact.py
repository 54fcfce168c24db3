"""Exact text."""

from __future__ import annotations

import pytest

from mechreward.errors import InputError
from mechreward.verifiers import Verdict, exact


@pytest.mark.parametrize(
    ("completion", "verdict"),
    [
        ("New York", Verdict(True, "New York", "match", True)),
        ("  New \t York\n", Verdict(True, "New York", "match", True)),
        ("It is in the east.\n#### New  York", Verdict(True, "New York", "match", True)),
        ("#### Boston\n#### New York\nDone", Verdict(True, "New York", "match", False)),
        ("New York\nQ: And now?\nA: Boston", Verdict(True, "New York", "match", True)),
        ("new york", Verdict(False, "new york", "different text", False)),
        ("It is New York.", Verdict(False, "It is New York.", "different text", True)),
        ("It is Old-New York", Verdict(False, "It is Old-New York", "different text", False)),
        ("New York City", Verdict(False, "New York City", "different text", False)),
        ("New York\n####", Verdict(False, None, "nothing after ####", False)),
        (" \n", Verdict(False, None, "empty response", False)),
    ],
)
def test_exact(completion: str, verdict: Verdict) -> None:
    assert exact("Where?", completion, " New  York ") == verdict
    assert exact("Where?\n#### New York", completion) == verdict


def test_no_gold_is_refused() -> None:
    with pytest.raises(InputError, match="^answer: none was given"):
        exact("Where?", "New York")
