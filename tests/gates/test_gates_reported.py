"""Rank correlation and AUROC against scipy, scikit-learn and the closed form; the sentences against known numbers."""

from __future__ import annotations

from math import isnan, sqrt

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import spearmanr
from sklearn.metrics import roc_auc_score

from mechreward.features import ReportedFigures
from mechreward.gates.reported import read_reported
from mechreward.gates.statistics import auroc_of_spearman, largest_spearman


@given(n=st.integers(3, 400), data=st.data())
def test_the_largest_rank_correlation_in_closed_form(n: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(1, n - 1))
    p = right / n
    assert largest_spearman(n, right) == pytest.approx(sqrt(3 * p * (1 - p)) * n / sqrt(n * n - 1))


@given(seed=st.integers(0, 10_000))
def test_the_auroc_of_a_rank_correlation(seed: int) -> None:
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(40) < rng.integers(1, 40))
    scores = rng.normal(size=40) + labels
    rho = spearmanr(scores, labels).statistic
    assert abs(rho) <= largest_spearman(40, int(labels.sum())) + 1e-9
    assert auroc_of_spearman(rho, 40, int(labels.sum())) == pytest.approx(roc_auc_score(labels, scores))


def test_a_score_with_ties_can_go_beyond() -> None:
    labels = np.arange(10) >= 5
    assert spearmanr(labels, labels).statistic == pytest.approx(1) and largest_spearman(10, 5) < 0.88


def test_one_class() -> None:
    assert isnan(largest_spearman(5, 0)) and isnan(largest_spearman(5, 5))


def test_the_published_figures() -> None:
    """11 wrong of 100, a largest rho of .542, and what .540 would mean there."""
    figures = ReportedFigures(source="s", n_questions=100, n_correct=89, spearman_rho=0.54, pass_threshold=0.3)
    sentences = read_reported(figures)
    assert sentences[0].startswith("11 of 100 answers were wrong (accuracy 0.89, 95 % interval 0.81 to 0.94)")
    assert sentences[1] == (
        "With 89 of 100 right a score without ties reaches a rank correlation of at most 0.542; 0.540 was reported."
    )
    assert "0.540 is an AUROC of 0.998" in sentences[2]
    assert "nearly perfect" in sentences[3]
    assert "bar of 0.30 is an AUROC of 0.777 at this accuracy and of 0.673 where half" in sentences[4]
    assert "same question" in sentences[5] and "No interval" in sentences[6] and len(sentences) == 7


def test_fewer_figures_fewer_sentences() -> None:
    milder = ReportedFigures(source="s", n_questions=100, n_correct=43, spearman_rho=0.52)
    assert len(read_reported(milder)) == 5 and not any("nearly perfect" in line for line in read_reported(milder))
    assert len(read_reported(ReportedFigures(source="s", n_questions=100, n_correct=43))) == 3
    assert read_reported(ReportedFigures(source="s", n_questions=9, n_correct=9))[0].startswith("9 of 9 answers were")
    assert read_reported(ReportedFigures(source="s", n_questions=9, n_correct=0))[0].startswith("0 of 9 answers were")
    assert "not reported" in read_reported(ReportedFigures(source="s", n_questions=9))[0]
