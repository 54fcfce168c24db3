"""What the figures that a pack's authors report can mean: counts, bounds and conversions, none of it a new measurement.

The rank correlation of a score without ties with right and wrong is bounded by the share of right answers, at
sqrt(3 p (1 - p)), and is that bound times 2 AUROC - 1. So the same rho stands for very different AUROCs at different
accuracies, and a rho near its bound for a nearly perfect separation.
"""

from __future__ import annotations

from mechreward.features import ReportedFigures
from mechreward.gates.statistics import auroc_of_spearman, largest_spearman, wilson

NEARLY_PERFECT = 0.95
"""An AUROC above which a trivial reason is the first to look for."""


def read_reported(figures: ReportedFigures) -> list[str]:
    """Our reading of reported figures, a sentence each; fewer where fewer were reported."""
    n, right, rho = figures.n_questions, figures.n_correct, figures.spearman_rho
    if n is None or right is None:
        return ["The numbers of questions and of right answers were not reported, so the rest cannot be read."]
    if not 0 < right < n:
        return [f"{right} of {n} answers were right: with one kind of answer nothing can tell the two apart."]
    low, high = wilson(right, n)
    sentences = [
        f"{n - right} of {n} answers were wrong (accuracy {right / n:.2f}, 95 % interval {low:.2f} to {high:.2f}): "
        f"what is said of wrong answers rests on these {n - right}."
    ]
    if rho is not None:
        sentences += _of_rho(figures, n, right, rho)
    return [
        *sentences,
        "One answer a question: nothing is said of right and wrong answers to the same question, which is what is left "
        "of a reward in a GRPO group.",
        "No interval and no baseline (length, format, log-probability) was reported.",
    ]


def _of_rho(figures: ReportedFigures, n: int, right: int, rho: float) -> list[str]:
    most, auroc = largest_spearman(n, right), auroc_of_spearman(rho, n, right)
    sentences = [
        f"With {right} of {n} right a score without ties reaches a rank correlation of at most {most:.3f}; {rho:.3f} "
        "was reported.",
        f"For a score without ties {rho:.3f} is an AUROC of {auroc:.3f} over all answers.",
    ]
    if auroc > NEARLY_PERFECT:
        sentences.append(
            "That is a nearly perfect separation, so truncation, answer format, length or a leak is to be ruled out "
            "first."
        )
    if figures.pass_threshold is not None:
        bar, even = figures.pass_threshold, auroc_of_spearman(figures.pass_threshold, 1000, 500)
        sentences.append(
            f"Their bar of {bar:.2f} is an AUROC of {auroc_of_spearman(bar, n, right):.3f} at this accuracy and of "
            f"{even:.3f} where half the answers are right: a bar in rho moves with the accuracy."
        )
    return sentences
