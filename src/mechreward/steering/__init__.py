"""Steering: edits of the residual stream along SAE features, while the model runs and without changing it.

`Variant` is the front: nudge, pin and scale features, under conditions, and look at what fires. Imports the rooms up to
gates and hacking; training, report, pipeline and cli may import it.
"""

from mechreward.steering.auto import AutoConditional, AutoSteer, autoconditional, autosteer
from mechreward.steering.conditions import Condition
from mechreward.steering.cuts import Cut, find_cuts
from mechreward.steering.edits import Edit, Mode, Rule
from mechreward.steering.examples import Contrast, contrast, steering_vector
from mechreward.steering.features import Feature, FeatureGroup
from mechreward.steering.fluency import fluency, repetition
from mechreward.steering.hook import Editor, Prefixes
from mechreward.steering.inspection import Fired, Inspection
from mechreward.steering.labels import token_labels
from mechreward.steering.pairs import Pair, check_known, rejection_pairs
from mechreward.steering.repair import Attempt, Repaired, kept_repairs, load_repairs, repair, save_repairs, summarise
from mechreward.steering.repair_known import RepairConfig, repair_known
from mechreward.steering.scales import Scales, measure_scales
from mechreward.steering.sweep import Curve, Point, Protocol, sweep
from mechreward.steering.variant import Variant
from mechreward.steering.watches import GenerationAborted, Moment

__all__ = [
    "Attempt",
    "Cut",
    "Pair",
    "RepairConfig",
    "Repaired",
    "check_known",
    "find_cuts",
    "kept_repairs",
    "load_repairs",
    "rejection_pairs",
    "repair",
    "repair_known",
    "save_repairs",
    "summarise",
    "AutoConditional",
    "AutoSteer",
    "autoconditional",
    "Contrast",
    "Curve",
    "Point",
    "Protocol",
    "autosteer",
    "contrast",
    "fluency",
    "repetition",
    "steering_vector",
    "sweep",
    "Condition",
    "Edit",
    "Editor",
    "Feature",
    "FeatureGroup",
    "Fired",
    "GenerationAborted",
    "Inspection",
    "Mode",
    "Moment",
    "Prefixes",
    "Rule",
    "Scales",
    "Variant",
    "measure_scales",
    "token_labels",
]
