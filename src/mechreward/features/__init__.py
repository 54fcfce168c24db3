"""From verified responses to a feature pack: pooled activations, within-question contrast, selection, the pack file.

May be imported by every room below it (reward, gates, hacking, steering, training, report, pipeline, cli); imports
models, rollout and sae.
"""

from mechreward.catalogs import catalog_names
from mechreward.features.ablation import (
    Agreement,
    TopEffect,
    ablation_agreement,
    ablation_effects,
    completeness,
    top_against_random,
)
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
from mechreward.features.attribution import AttributionBatch, iter_attributions
from mechreward.features.attribution_table import attribution_table
from mechreward.features.contexts import Context, FeatureContexts, top_contexts
from mechreward.features.contrast import ContrastTable, contrast, load_contrast, save_contrast
from mechreward.features.discovery import HeldOutScores, Search, discover, explore
from mechreward.features.labels import Label, contexts_label, lens_label
from mechreward.features.lens import LensReading, logit_lens
from mechreward.features.neuronpedia_client import NeuronpediaClient, NeuronpediaFeature
from mechreward.features.pack import (
    FeaturePack,
    PackFeature,
    PackPrompt,
    PackRephrasing,
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
from mechreward.features.reasonscore import (
    DEFAULT_REASONING_VOCAB,
    FeatureScore,
    compute_reasonscore,
    resolve_vocab_token_ids,
)
from mechreward.features.reasonscore_table import reasonscore_table
from mechreward.features.selection import NoFeatures, build_pack, check_table, random_packs, sae_ref, select
from mechreward.features.steps import step_ends
from mechreward.features.targets import Target, answer_target
from mechreward.features.validator import ValidationResult, validate_feature

__all__ = [
    "Aggregation",
    "Agreement",
    "AttributionBatch",
    "Context",
    "ContrastTable",
    "DEFAULT_REASONING_VOCAB",
    "FeatureContexts",
    "FeaturePack",
    "FeatureScore",
    "HeldOutScores",
    "Label",
    "LastKAggregation",
    "LensReading",
    "MaxAggregation",
    "MeanAggregation",
    "NeuronpediaClient",
    "NeuronpediaFeature",
    "NoFeatures",
    "PackFeature",
    "PackPrompt",
    "PackRephrasing",
    "PackValidation",
    "PerTokenAggregation",
    "PooledBatch",
    "Pooling",
    "ReportedFigures",
    "SAERef",
    "Search",
    "StepEndAggregation",
    "Target",
    "TopEffect",
    "ValidationResult",
    "WeightedMeanAggregation",
    "ablation_agreement",
    "ablation_effects",
    "answer_target",
    "attribution_table",
    "build_aggregation",
    "build_pack",
    "catalog_names",
    "check_pack",
    "check_table",
    "completeness",
    "compute_reasonscore",
    "contexts_label",
    "contrast",
    "discover",
    "explore",
    "iter_attributions",
    "lens_label",
    "load_contrast",
    "load_pack",
    "logit_lens",
    "pack_prompt",
    "pool_features",
    "pooled_activations",
    "prompt_mismatch",
    "random_packs",
    "reasonscore_table",
    "resolve_vocab_token_ids",
    "sae_ref",
    "save_contrast",
    "save_pack",
    "select",
    "spec_hash",
    "step_ends",
    "template_hash",
    "top_against_random",
    "top_contexts",
    "unacceptable",
    "validate_feature",
    "weighted_sum",
]
