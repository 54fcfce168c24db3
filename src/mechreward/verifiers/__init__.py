"""Verifiers: whether a completion answers its question rightly, as plain functions `(prompt, completion, answer)`.

Strict and lenient extraction are judged apart. Importable by every room below; imports only `tasks`.
"""

from mechreward.verifiers.exact_text import exact
from mechreward.verifiers.gsm8k import gsm8k_exact_match
from mechreward.verifiers.letter import choice
from mechreward.verifiers.maths import math
from mechreward.verifiers.named import VERIFIERS, get_verifier
from mechreward.verifiers.number import parse_number
from mechreward.verifiers.text import as_text, cut_at_next_question
from mechreward.verifiers.verdict import Verdict, Verifier

__all__ = [
    "VERIFIERS",
    "Verdict",
    "Verifier",
    "as_text",
    "choice",
    "cut_at_next_question",
    "exact",
    "get_verifier",
    "gsm8k_exact_match",
    "math",
    "parse_number",
]
