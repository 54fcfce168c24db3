"""The one exception for input a user can mend."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """Bad input: one sentence naming the field, the value and what is allowed. The command line exits with code 2."""


@contextmanager
def named(**fields: str) -> Iterator[None]:
    """Lets an InputError from inside name the field that the user gave, as `named(source="questions")` does."""
    try:
        yield
    except InputError as error:
        field, _, rest = str(error).partition(":")
        if field not in fields:
            raise
        raise type(error)(f"{fields[field]}:{rest}") from error
