"""Numbers: exact value whatever the dress, and nothing else taken for one."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechreward.verifiers.number import last_number, parse_number, tidy_number


@pytest.mark.parametrize(
    ("text", "tidy"),
    [
        ("18", "18"),
        (" 18. ", "18"),
        ("18.00", "18.00"),
        ("1,234", "1234"),
        ("12,345,678.9", "12345678.9"),
        ("$18", "18"),
        ("\\$ 18", "18"),
        ("18 €", "18"),
        ("18%", "18"),
        ("18 \\%", "18"),
        ("-5", "-5"),
        ("+5", "5"),
        ("−5", "-5"),
        ("-$5", "-5"),
        ("$-5", "-5"),
        ("**-$1,234.50**.", "-1234.50"),
        (".5", ".5"),
        ("007", "007"),
    ],
)
def test_tidy_number_reads_a_dressed_number(text: str, tidy: str) -> None:
    assert tidy_number(text) == tidy


@pytest.mark.parametrize(
    "text",
    [
        "",
        "-",
        "$",
        "abc",
        "1,2",
        "1,23",
        "1234,567",
        "1,2345",
        "1.2.3",
        "1/2",
        "1e5",
        "--5",
        "-$-5",
        "5 6",
        "18 dollars",
        "٣",
    ],
)
def test_tidy_number_refuses_what_is_not_one_plain_number(text: str) -> None:
    assert tidy_number(text) is None
    assert parse_number(text) is None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("He has 5 apples and 18.", "18"),
        ("12-7", "7"),
        ("12 - 7 = 5, that is 12 -7", "-7"),
        ("x = -7", "-7"),
        ("(3)-4", "4"),
        ("it costs $1,234.50 today", "1234.50"),
        ("a loss of -$3", "-3"),
        ("a loss of $-3", "-3"),
        ("1,2,3", "3"),
        ("half is .5", ".5"),
        ("rose 20%", "20"),
    ],
)
def test_last_number_of_running_text(text: str, value: str) -> None:
    assert last_number(text) == Decimal(value)


def test_last_number_of_text_without_one() -> None:
    assert last_number("no number at all") is None


_DRESSES = ("{}", "{}.", " {} ", "${}", "{}%", "**{}**", "{}.00", "${}.0", "+{}", "€{}", "`{}`")


@settings(deadline=None, derandomize=True)
@given(st.integers(min_value=0, max_value=10**15), st.sampled_from(_DRESSES), st.booleans())
def test_dress_never_changes_the_value(value: int, dress: str, commas: bool) -> None:
    assert parse_number(dress.format(f"{value:,}" if commas else value)) == value


@settings(deadline=None, derandomize=True)
@given(st.integers(-(10**15), 10**15), st.integers(-(10**15), 10**15), st.booleans())
def test_numbers_are_equal_only_to_themselves(one: int, other: int, commas: bool) -> None:
    assert (parse_number(f"{one:,}" if commas else str(one)) == parse_number(str(other))) == (one == other)


@settings(deadline=None, derandomize=True)
@given(st.decimals(allow_nan=False, allow_infinity=False, places=6, min_value=-1e9, max_value=1e9))
def test_decimals_are_read_exactly(value: Decimal) -> None:
    assert parse_number(f"{value:f}") == value
    assert last_number(f"so it is {value:f}") == value
