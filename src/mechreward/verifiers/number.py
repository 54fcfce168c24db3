"""Plain numbers as people write answers, read exactly.

A number may carry a sign (also a typographic minus), thousands commas, a currency sign on either side, a percent sign,
a full stop and Markdown emphasis; but for the sign, none of these changes its value (`18 %` is 18). Values are
`Decimal`: `18.00` is 18 and no two different numbers are ever equal. Commas must part groups of three: `1,2` is none.
"""

from __future__ import annotations

import re
from decimal import Decimal

_SIGN = r"[-+−]"
_CURRENCY = r"\\?[$€£¥₹]"
_INTEGER = r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)"
_BODY = rf"(?:{_INTEGER}(?:\.[0-9]+)?|(?<![0-9.])\.[0-9]+)"
_NUMBER = re.compile(
    rf"(?P<sign>{_SIGN})?(?:{_CURRENCY}[ ]?)?(?P<sign2>{_SIGN})?(?P<body>{_BODY})\.?(?:[ ]?(?:{_CURRENCY}|\\?%))?"
)
# In running text a minus is a sign only where nothing stands before it that it could be taken from: `12-7` ends on 7.
_IN_TEXT = re.compile(rf"(?:(?<![\w)\].])[-−])?(?:{_CURRENCY}[-−]?)?{_BODY}")
_EMPHASIS = "*_`"
SCALE = (
    r"\b(?:(?:hundred|thousand|million|billion|trillion|dozen|lakh|crore)s?|(?:ten|hundred|thousand|million)ths|thirds"
    r"|squared|cubed|factorial)\b"
)
"""Words behind a number that change its value."""


def tidy_number(text: str) -> str | None:
    """The number a text consists of, with nothing but its sign, digits and point; None if it is not one plain number.

    >>> tidy_number("**-$1,234.50**.")
    '-1234.50'
    """
    bare = text.strip().rstrip(".,;").strip(_EMPHASIS).strip()
    found = _NUMBER.fullmatch(bare)
    if found is None or (found["sign"] and found["sign2"]):
        return None
    negative = (found["sign"] or found["sign2"]) in ("-", "−")
    return ("-" if negative else "") + found["body"].replace(",", "")


def parse_number(text: str) -> Decimal | None:
    """The exact value of a text that is one plain number; None if it is not.

    >>> parse_number("$1,234.00") == parse_number("1234")
    True
    """
    tidied = tidy_number(text)
    return None if tidied is None else Decimal(tidied)


def last_number(text: str) -> Decimal | None:
    """The last number anywhere in a text; None if it has none."""
    found = None
    for found in _IN_TEXT.finditer(text):  # noqa: B007 - the last one is wanted
        pass
    return parse_number(found[0]) if found else None
