"""The one exception for input a user can mend."""

from __future__ import annotations


class InputError(ValueError):
    """Bad input: one sentence naming the field, the value and what is allowed. The command line exits with code 2."""
