"""Experiment 3: outcome and features together, as a CompositeReward whose weights say how much of each.

python experiments/03_hybrid.py --config my.yaml --out runs/03
python experiments/03_hybrid.py --smoke --out runs/03-smoke
"""

from __future__ import annotations

from typing import Any

from common import Trained, run

from mechreward.config import ImproveConfig
from mechreward.reward import CompositeReward, FeatureReward, OutcomeReward


def rewards(feature: FeatureReward, outcome: OutcomeReward, config: ImproveConfig) -> list[Any]:
    return [CompositeReward([outcome, feature], weights=[1.0, config.dense_weight])]


def main(arguments: list[str] | None = None) -> list[Trained]:
    return run(__doc__, "dense", rewards, arguments)


if __name__ == "__main__":
    main()
