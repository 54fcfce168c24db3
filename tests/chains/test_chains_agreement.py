"""Counts of places by hand."""

from __future__ import annotations

import pytest

from mechreward.chains import Tally, agreement, first_below, locate, lowest
from mechreward.errors import InputError


def test_precision_and_recall_by_hand() -> None:
    found = locate([1, 2, None, 0, 5], [1, 3, 4, 0, None])
    assert (found.precision, found.recall) == (Tally(2, 4), Tally(2, 4))
    found = locate([1, None, None], [1, 1, 1])
    assert (found.precision, found.recall) == (Tally(1, 1), Tally(1, 3))
    assert locate([None], [1]).precision == Tally(0, 0)


def test_agreement_counts_where_both_name_a_place() -> None:
    assert agreement([1, 2, None, None, 0], [1, 3, 4, None, 0]) == Tally(2, 3)


def test_places_from_scores() -> None:
    assert lowest([0.3, 0.1, 0.2, 0.1]) == 1
    assert first_below([0.3, 0.1, 0.05], 0.1) == 2
    assert first_below([0.3], 0.1) is None


def test_bad_input_is_one_sentence() -> None:
    with pytest.raises(InputError, match="^true: none of 2 places is known"):
        locate([1, 2], [None, None])
    with pytest.raises(InputError, match="^places: 1 and 2 are given; both need one a response$"):
        locate([1], [1, 2])
    with pytest.raises(InputError, match="^scores: there are none"):
        lowest([])
