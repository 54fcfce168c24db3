"""Verifiers by name."""

from __future__ import annotations

import pytest

from mechreward import verifiers
from mechreward.errors import InputError


def test_every_name_is_the_function_of_that_name() -> None:
    assert verifiers.VERIFIERS == ("gsm8k_exact_match", "math", "choice", "exact")
    assert [verifiers.get_verifier(name) for name in verifiers.VERIFIERS] == [
        verifiers.gsm8k_exact_match,
        verifiers.math,
        verifiers.choice,
        verifiers.exact,
    ]


@pytest.mark.parametrize("name", ["gsm8k", "", "Exact"])
def test_unknown_names_are_refused_with_the_known_ones(name: str) -> None:
    allowed = "gsm8k_exact_match, math, choice, exact"
    with pytest.raises(InputError, match=f"^verifier: there is no '{name}'; allowed are {allowed}$"):
        verifiers.get_verifier(name)
