"""Experiment 2: the features alone, dense, with no outcome in the reward. What the pack by itself makes of a policy.

python experiments/02_feature_reward.py --config my.yaml --out runs/02
python experiments/02_feature_reward.py --smoke --out runs/02-smoke
"""

from __future__ import annotations

from typing import Any

from common import Trained, run

from mechreward.config import ImproveConfig
from mechreward.reward import FeatureReward, OutcomeReward


def rewards(feature: FeatureReward, _: OutcomeReward, __: ImproveConfig) -> list[Any]:
    return [feature]


def main(arguments: list[str] | None = None) -> list[Trained]:
    return run(__doc__, "dense", rewards, arguments)


if __name__ == "__main__":
    main()
