"""The verifiers by name, for command lines and configurations."""

from __future__ import annotations

from mechreward.errors import InputError
from mechreward.verifiers.exact_text import exact
from mechreward.verifiers.gsm8k import gsm8k_exact_match
from mechreward.verifiers.letter import choice
from mechreward.verifiers.maths import math
from mechreward.verifiers.verdict import Verifier

VERIFIERS = ("gsm8k_exact_match", "math", "choice", "exact")


def get_verifier(name: str) -> Verifier:
    """The verifier called `name`, one of `VERIFIERS`.

    Raises:
        InputError: if there is none of that name.
    """
    functions = (gsm8k_exact_match, math, choice, exact)
    if name not in VERIFIERS:
        raise InputError(f"verifier: there is no {name!r}; allowed are {', '.join(VERIFIERS)}")
    return functions[VERIFIERS.index(name)]
