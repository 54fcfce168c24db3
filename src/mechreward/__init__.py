"""A training signal inside a language model: SAE features that go with correct reasoning, gated, rewarded per token.

`import mechreward as mr` is light: every name below is loaded when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "CompositeReward": "reward",
    "ConstantSchedule": "reward",
    "CosineSchedule": "reward",
    "FeaturePack": "features",
    "FeatureReward": "reward",
    "InputError": "errors",
    "LastKAggregation": "reward",
    "LinearAnnealSchedule": "reward",
    "LinearProbe": "probes",
    "MaxAggregation": "reward",
    "MeanAggregation": "reward",
    "OutcomeReward": "reward",
    "PerTokenAggregation": "reward",
    "Question": "tasks",
    "SAE": "sae",
    "SAEHandle": "sae",
    "StepSchedule": "reward",
    "Variant": "steering",
    "WeightSchedule": "reward",
    "WeightedMeanAggregation": "reward",
    "build_aggregation": "reward",
    "build_normalization": "reward",
    "build_pack": "features",
    "contrast": "features",
    "gate1": "gates",
    "improve": "pipeline",
    "load_model": "models",
    "load_pack": "features",
    "load_probe": "probes",
    "load_questions": "tasks",
    "load_sae": "sae",
    "load_topk_sae": "sae",
    "make_config": "config",
    "make_train_config": "config",
    "pooled_activations": "features",
    "read_residuals": "models",
    "sample_responses": "rollout",
    "save_pack": "features",
    "save_probe": "probes",
    "save_sae": "sae",
    "split_questions": "tasks",
    "train_linear_probe": "probes",
    "train_sae": "sae",
    "verify_responses": "rollout",
    "write_report": "report",
}
_ROOMS = (
    "models", "tasks", "verifiers", "rollout", "sae", "probes", "features", "reward", "gates", "hacking", "steering",
    "training", "integrations", "report", "tiny",
)  # fmt: skip

__all__ = ["__version__", *_HOMES, *_ROOMS]


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"mechreward.{_HOMES[name]}"), name)
    if name in _ROOMS:
        return import_module(f"mechreward.{name}")
    raise AttributeError(f"module 'mechreward' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
