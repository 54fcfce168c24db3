"""Experiment 1: outcome alone. The bar that every dense reward has to pass, on the same questions and seeds.

python experiments/01_baseline.py --config my.yaml --out runs/01
python experiments/01_baseline.py --smoke --out runs/01-smoke
"""

from __future__ import annotations

from typing import Any

from common import Trained, run

from mechreward.config import ImproveConfig
from mechreward.reward import FeatureReward, OutcomeReward


def rewards(_: FeatureReward, outcome: OutcomeReward, __: ImproveConfig) -> list[Any]:
    return [outcome]


def main(arguments: list[str] | None = None) -> list[Trained]:
    return run(__doc__, "outcome", rewards, arguments)


if __name__ == "__main__":
    main()
