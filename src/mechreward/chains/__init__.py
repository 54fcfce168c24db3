"""Chains: a response as steps and critical tokens, and the EXAMINER that is asked about them.

Imports models, tasks, verifiers and rollout; the rooms from `sae` on may import it.
"""

from mechreward.chains.agreement import Located, agreement, first_below, locate, lowest
from mechreward.chains.claims import Claim, Examined, Request, examine, fill_prompt, load_claims
from mechreward.chains.contrastive import ContrastiveConfig, ContrastivePair, contrastive_pair
from mechreward.chains.examiner import EndpointExaminer, Examiner, ExaminerError, LocalExaminer, Patience
from mechreward.chains.inquiry import (
    ask_clarifying,
    ask_feature,
    ask_paraphrases,
    ask_verdicts,
    check_expansions,
    check_feature,
    check_paraphrases,
    check_verdicts,
    expand,
    reword,
    step_subject,
    with_expansion,
)
from mechreward.chains.labels import Roller, Tally, first_wrong, label_by_rollouts, label_by_solution
from mechreward.chains.pieces import cut_long, token_entropies
from mechreward.chains.rollout_critical import Lost, rollout_critical
from mechreward.chains.spans import token_ends
from mechreward.chains.split import split_steps, step_starts
from mechreward.chains.steps import Step, decompose, step_of
from mechreward.chains.value import ValueProbe, fit_value

__all__ = [
    "Claim",
    "ContrastiveConfig",
    "ContrastivePair",
    "EndpointExaminer",
    "Examined",
    "Examiner",
    "ExaminerError",
    "LocalExaminer",
    "Located",
    "Lost",
    "Patience",
    "Request",
    "Roller",
    "Step",
    "Tally",
    "ValueProbe",
    "agreement",
    "ask_clarifying",
    "ask_feature",
    "ask_paraphrases",
    "ask_verdicts",
    "check_expansions",
    "check_feature",
    "check_paraphrases",
    "check_verdicts",
    "contrastive_pair",
    "cut_long",
    "decompose",
    "examine",
    "expand",
    "fill_prompt",
    "first_below",
    "first_wrong",
    "fit_value",
    "label_by_rollouts",
    "label_by_solution",
    "load_claims",
    "locate",
    "lowest",
    "reword",
    "rollout_critical",
    "split_steps",
    "step_of",
    "step_starts",
    "step_subject",
    "token_ends",
    "token_entropies",
    "with_expansion",
]
