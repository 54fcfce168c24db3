"""GSM8K's answer marker: a worked solution ends in a line ``#### 18`` (Cobbe et al. 2021, arXiv 2110.14168)."""

from __future__ import annotations

MARKER = "####"


def after_marker(text: str, *, last: bool = False) -> str | None:
    """The rest of the line after the first (or last) ``####``, stripped; None where the text has no marker.

    >>> after_marker("9 * 2 = 18 dollars.\\n#### 18")
    '18'
    """
    before, marker, rest = text.rpartition(MARKER) if last else text.partition(MARKER)
    del before
    if not marker:
        return None
    lines = rest.splitlines()
    return lines[0].strip() if lines else ""
