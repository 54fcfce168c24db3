"""Welch's test against scipy column by column, and Cohen's d by hand."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from mechreward.errors import InputError
from mechreward.gates import welch


def test_welch_by_column() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0.4, 1.0, (9, 5)), rng.normal(0.0, 3.0, (14, 5))
    found = welch(a, b)
    for column in range(5):
        x, y = a[:, column], b[:, column]
        assert found["p_value"][column] == pytest.approx(stats.ttest_ind(x, y, equal_var=False).pvalue)
        assert found["difference"][column] == pytest.approx(x.mean() - y.mean())
        pooled = np.sqrt((((x - x.mean()) ** 2).sum() + ((y - y.mean()) ** 2).sum()) / 21)
        assert found["effect"][column] == pytest.approx((x.mean() - y.mean()) / pooled)
    np.testing.assert_allclose(found["q_value"], stats.false_discovery_control(found["p_value"]))


def test_a_column_without_spread_is_not_tested() -> None:
    found = welch([[1.0, 1.0], [1.0, 2.0]], [[3.0, 4.0], [3.0, 6.0], [3.0, 5.0]])
    assert found["p_value"][0] == 1.0 and found["effect"][0] == 0.0 and found["difference"][0] == -2.0
    assert found["p_value"][1] < 1.0


@pytest.mark.parametrize("second", [[[1.0]], [[1.0, 2.0], [1.0, 2.0]]])
def test_samples_that_cannot_be_compared(second: list[list[float]]) -> None:
    with pytest.raises(InputError, match="samples: shapes"):
        welch([[1.0], [2.0]], second)
