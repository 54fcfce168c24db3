"""Verdicts on rewards: all statistics, the baselines a reward must beat, Gate 1, Gates 2 and 3 (which judge results
files of runs), and the sweep that finds the block worth reading.

May be imported by hacking, steering, training, integrations, report, pipeline and cli; imports models, rollout,
features and reward.
"""

from mechreward.gates.adversarial import Attack, Attacks
from mechreward.gates.baselines import (
    bag_of_words,
    format_flag,
    length,
    mean_logprob,
    min_logprob,
    reward_from_words,
)
from mechreward.gates.correlations import others_mean, partial_spearman, plain_correlation
from mechreward.gates.crossed import Crossed, crossed_interval, hierarchical_bootstrap, seeds_needed, student_interval
from mechreward.gates.evidence import Correlations, Evidence, compare, judge_held_out, judge_scores
from mechreward.gates.gate1 import Gate1Result, check_held_out, check_rephrased, gate1
from mechreward.gates.gate2 import (
    ArmRun,
    Comparison,
    Crash,
    Evaluation,
    Gate2Bars,
    Gate2Result,
    StudyResults,
    gate2,
    judge_differences,
    median_steps,
    steps_to,
)
from mechreward.gates.gate3 import Answer, Canaries, Criterion, Gate3Bars, Gate3Result, PanelTask, Survival, gate3
from mechreward.gates.judgement import Judgement, ScoreRow, Thresholds, judge
from mechreward.gates.layers import LayerSweep, ProbeScore, sweep_layers
from mechreward.gates.reading import Readings, read_scores
from mechreward.gates.reported import read_reported
from mechreward.gates.statistics import (
    Interval,
    PairedResult,
    QuestionPairs,
    accuracy_interval,
    auroc,
    auroc_statistic,
    cluster_bootstrap,
    label_permutation_p,
    mean_rise,
    paired_test,
    question_means,
    question_pairs,
    ratio,
    welch,
    wilson,
    within_question_auroc,
)

__all__ = [
    "Answer",
    "Canaries",
    "Criterion",
    "Gate3Bars",
    "Gate3Result",
    "PanelTask",
    "Survival",
    "gate3",
    "ArmRun",
    "Comparison",
    "Crash",
    "Crossed",
    "Evaluation",
    "Gate2Bars",
    "Gate2Result",
    "StudyResults",
    "crossed_interval",
    "gate2",
    "hierarchical_bootstrap",
    "judge_differences",
    "median_steps",
    "seeds_needed",
    "steps_to",
    "Attack",
    "Attacks",
    "Correlations",
    "Readings",
    "format_flag",
    "min_logprob",
    "others_mean",
    "partial_spearman",
    "plain_correlation",
    "Evidence",
    "Gate1Result",
    "Interval",
    "Judgement",
    "LayerSweep",
    "PairedResult",
    "ProbeScore",
    "QuestionPairs",
    "ScoreRow",
    "Thresholds",
    "accuracy_interval",
    "auroc",
    "auroc_statistic",
    "bag_of_words",
    "check_held_out",
    "check_rephrased",
    "cluster_bootstrap",
    "compare",
    "gate1",
    "judge",
    "judge_held_out",
    "judge_scores",
    "label_permutation_p",
    "length",
    "mean_logprob",
    "mean_rise",
    "paired_test",
    "question_means",
    "question_pairs",
    "ratio",
    "student_interval",
    "read_reported",
    "read_scores",
    "reward_from_words",
    "sweep_layers",
    "welch",
    "wilson",
    "within_question_auroc",
]
