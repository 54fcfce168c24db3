"""Which training numbers are drawn, and what thinning keeps."""

from __future__ import annotations

import pandas as pd
import pytest

from mechreward.report.metrics import thinned, train_metrics


def test_rewards_come_first_then_named_then_the_rest() -> None:
    row = {"arm": "a", "seed": 0, "step": 1, "kind": "train", "epoch": 0.1, "zeta": 1.0, "kl": 0.1, "flag": True,
           "rewards/style/mean": 0.3, "rewards/outcome_reward/mean": 0.2, "empty": None, "loss": 0.0}  # fmt: skip
    found = train_metrics(pd.DataFrame([row]))
    assert [(m.column, m.title, m.main) for m in found] == [
        ("rewards/style/mean", "style", True),
        ("rewards/outcome_reward/mean", "Outcome reward", True),
        ("kl", "KL to the starting model", True),
        ("loss", "loss", False),
        ("zeta", "zeta", False),
    ]


def test_short_lines_keep_every_value_per_arm() -> None:
    frame = pd.DataFrame({"arm": ["b", "a", "a"], "seed": 0, "step": [1, 2, 1], "kl": [9.0, None, 4.0]})
    assert thinned(frame, "kl")[["arm", "step", "value", "trend"]].values.tolist() == [
        ["b", 1, 9.0, 9.0],
        ["a", 1, 4.0, 4.0],
    ]


def test_long_lines_become_300_means_and_a_moving_mean() -> None:
    frame = pd.DataFrame({"arm": "a", "seed": 0, "step": range(1, 901), "kl": [1.0, 2.0, 6.0] * 300})
    thin = thinned(frame, "kl")
    assert len(thin) == 300
    assert thin["value"].tolist() == [3.0] * 300
    assert thin["step"].tolist()[:2] == [2.0, 5.0]


def test_trend_is_a_centred_mean_over_a_fifteenth() -> None:
    frame = pd.DataFrame({"arm": "a", "step": range(45), "kl": [float(step**2) for step in range(45)]})
    trend = thinned(frame, "kl")["trend"]
    assert trend[10] == pytest.approx((81 + 100 + 121) / 3)
    assert trend[0] == pytest.approx(0.5)


def test_each_seed_is_a_line_of_its_own() -> None:
    frame = pd.DataFrame({"arm": "a", "seed": [0, 1, 0, 1], "step": [1, 1, 2, 2], "kl": [1.0, 5.0, 2.0, 6.0]})
    found = thinned(frame, "kl")[["arm", "seed", "step", "value", "trend"]]
    assert found.values.tolist() == [
        ["a", 0, 1, 1.0, 1.0], ["a", 0, 2, 2.0, 2.0], ["a", 1, 1, 5.0, 5.0], ["a", 1, 2, 6.0, 6.0],
    ]  # fmt: skip


def test_rows_without_a_seed_beside_some_with_one_are_a_line_too() -> None:
    frame = pd.DataFrame({"arm": "a", "seed": [0, None, None], "step": [1, 1, 2], "kl": [1.0, 5.0, 6.0]})
    assert thinned(frame, "kl")["value"].tolist() == [1.0, 5.0, 6.0]
    assert thinned(frame[1:].assign(loss=[None, 2.0]), "loss")["value"].tolist() == [2.0]


def test_a_long_line_is_thinned_in_the_order_of_its_steps() -> None:
    steps = [*range(600, 0, -1)]
    thin = thinned(pd.DataFrame({"arm": "a", "step": steps, "kl": [float(step) for step in steps]}), "kl")
    assert thin["step"].tolist() == [1.5 + 2 * place for place in range(300)] == thin["value"].tolist()
