"""From verified responses to a feature pack: pooled activations, within-question contrast, selection, the pack file.

May be imported by every room below it (reward, gates, hacking, steering, training, report, pipeline, cli); imports
models, rollout and sae.
"""

from mechreward.catalogs import catalog_names
from mechreward.features.acceptance import unacceptable
from mechreward.features.aggregation import (
    Aggregation,
    LastKAggregation,
    MaxAggregation,
    MeanAggregation,
    PerTokenAggregation,
    StepEndAggregation,
    WeightedMeanAggregation,
    build_aggregation,
)
from mechreward.features.contrast import ContrastTable, contrast, load_contrast, save_contrast
from mechreward.features.discovery import HeldOutScores, Search, discover, explore
from mechreward.features.pack import (
    FeaturePack,
    PackFeature,
    PackPrompt,
    PackValidation,
    Pooling,
    ReportedFigures,
    SAERef,
    check_pack,
    load_pack,
    save_pack,
    spec_hash,
    weighted_sum,
)
from mechreward.features.pooling import PooledBatch, pool_features, pooled_activations
from mechreward.features.prompts import pack_prompt, prompt_mismatch, template_hash
from mechreward.features.selection import NoFeatures, build_pack, random_packs, sae_ref, select
from mechreward.features.steps import step_ends

__all__ = [
    "Aggregation",
    "ContrastTable",
    "FeaturePack",
    "HeldOutScores",
    "LastKAggregation",
    "MaxAggregation",
    "MeanAggregation",
    "NoFeatures",
    "PackFeature",
    "PackPrompt",
    "PackValidation",
    "PerTokenAggregation",
    "PooledBatch",
    "Pooling",
    "ReportedFigures",
    "SAERef",
    "Search",
    "StepEndAggregation",
    "WeightedMeanAggregation",
    "build_aggregation",
    "build_pack",
    "catalog_names",
    "check_pack",
    "contrast",
    "discover",
    "explore",
    "load_contrast",
    "load_pack",
    "pack_prompt",
    "pool_features",
    "pooled_activations",
    "prompt_mismatch",
    "random_packs",
    "sae_ref",
    "save_contrast",
    "save_pack",
    "select",
    "spec_hash",
    "step_ends",
    "template_hash",
    "unacceptable",
    "weighted_sum",
]
