"""What the model card states: accuracy, obedience to the two strategies, and where the strategy can be read.

For each setting, responses are sampled at temperature 1 to problems never trained on. At every block and reading
position a logistic probe is cross-fitted by question (five folds) on states centred within their question, and judged
by its AUROC *within* questions, beside bag of words, length and mean log-probability on the same responses.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from mechreward.gates import bag_of_words, length, mean_logprob, within_question_auroc
from mechreward.models import LoadedModel, iter_residuals, n_blocks
from mechreward.rollout import Response, sample_responses
from mechreward.tasks import Question
from mechreward.tiny.world import Problem, Setting, label_chain, make_problem

SAMPLES = 8
OPERATORS = ("▁+", "▁-")
POSITIONS = ("all tokens", "before operator", "operator", "result", "step end")
"""Mean over these tokens: where the operator is predicted, the operator, the result's last digit, the full stop."""


@dataclass(frozen=True)
class Sampled:
    """Responses to problems of one setting, with the truth about each."""

    problems: dict[str, Problem]
    responses: list[Response]
    right: list[bool]
    strategies: list[str]


def sample_setting(loaded: LoadedModel, setting: Setting, n_questions: int, seed: int) -> Sampled:
    """Eight responses each to fresh problems, labelled by the world."""
    rng = random.Random(f"measure-{setting}-{seed}")
    problems = {f"{setting}-{i}": make_problem(setting, rng) for i in range(n_questions)}
    questions = [Question(id=name, prompt=p.prompt, answer=str(p.answer)) for name, p in problems.items()]
    responses = sample_responses(loaded, questions, n=SAMPLES, max_new_tokens=192, seed=seed)
    labels = [label_chain(problems[r.question_id], r.text) for r in responses]
    responses = [replace(r, correct=label.correct) for r, label in zip(responses, labels, strict=True)]
    return Sampled(problems, responses, [label.correct for label in labels], [label.strategy for label in labels])


def behaviour(sampled: Sampled) -> dict[str, Any]:
    """Accuracy, share of mixed questions, share of chains that follow a strategy to the letter."""
    right = np.array(sampled.right).reshape(-1, SAMPLES)
    return {
        "n_questions": len(right),
        "n_responses": right.size,
        "accuracy": float(right.mean()),
        "mixed_questions": float(((right.sum(1) > 0) & (right.sum(1) < SAMPLES)).mean()),
        "follows_a_strategy": float(np.mean([strategy != "neither" for strategy in sampled.strategies])),
    }


def readability(loaded: LoadedModel, sampled: Sampled) -> dict[str, Any]:
    """Within-question AUROC of text baselines, and of probes at every block and position."""
    questions = [response.question_id for response in sampled.responses]
    baselines = {
        "mean log-probability": mean_logprob(sampled.responses),
        "length": length(sampled.responses),
        "bag of words": bag_of_words(sampled.responses),
    }
    scores = {name: within_question_auroc(s, sampled.right, questions) for name, s in baselines.items()}
    probes = {}
    for layer in range(n_blocks(loaded.model)):
        pooled = pooled_states(loaded, sampled.responses, layer)
        for position in POSITIONS:
            probe_scores = cross_fitted(pooled[position], sampled.right, questions)
            probes[f"block {layer}, {position}"] = within_question_auroc(probe_scores, sampled.right, questions)
    return {"baselines": scores, "probes": probes, "best_probe": max(probes, key=lambda name: probes[name])}


def pooled_states(loaded: LoadedModel, responses: Sequence[Response], layer: int) -> dict[str, NDArray[np.float32]]:
    """Mean residual at each kind of position; [responses, D] each."""
    prompts, completions = [list(r.prompt_ids) for r in responses], [list(r.completion_ids) for r in responses]
    pooled: dict[str, list[Any]] = {position: [None] * len(responses) for position in POSITIONS}
    for batch in iter_residuals(loaded.model, prompts, completions, layer, batch_size=64):
        for row, h_TD in zip(batch.rows, batch.h_BTD, strict=True):
            pieces = loaded.tokenizer.convert_ids_to_tokens(completions[row])
            for position, at in positions(pieces).items():
                pooled[position][row] = h_TD[at].mean(0).cpu().numpy()
    return {position: np.stack(rows) for position, rows in pooled.items()}


def positions(pieces: Sequence[str]) -> dict[str, list[int]]:
    """Where in a chain's tokens each kind of position is; all tokens for a kind that does not occur."""
    everywhere = list(range(len(pieces)))
    operators = [t for t, piece in enumerate(pieces) if piece in OPERATORS]
    stops = [t for t, piece in enumerate(pieces) if piece == "▁."]
    found = (everywhere, [t - 1 for t in operators if t], operators, [t - 1 for t in stops if t], stops)
    return {position: at or everywhere for position, at in zip(POSITIONS, found, strict=True)}


def cross_fitted(features: NDArray[np.float32], right: Sequence[bool], questions: Sequence[str]) -> NDArray[np.float64]:
    """Scores of a logistic probe that has not seen the question it scores."""
    codes = np.unique(questions, return_inverse=True)[1]
    means = np.zeros((codes.max() + 1, features.shape[1]))
    np.add.at(means, codes, features)
    centred = features - (means / np.bincount(codes)[:, None])[codes]
    probe = make_pipeline(StandardScaler(), LogisticRegression(C=0.05, max_iter=500))
    scores: NDArray[np.float64] = cross_val_predict(
        probe, centred, np.array(right), groups=codes, cv=GroupKFold(5), method="decision_function"
    )
    return scores
