"""The verdict from scores alone: what has to be beaten, what is only shown, and the correlations beside it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from mechreward.errors import InputError
from mechreward.features import HeldOutScores
from mechreward.gates import Evidence, judge_held_out, judge_scores, within_question_auroc
from mechreward.rollout import Response

REQUIRED = [
    "mean log-probability",
    "least log-probability",
    "length",
    "format flag",
    "bag of words",
    "reward predicted from words",
    "random features of equal frequency",
]


def responses(n_questions: int = 60, n_answers: int = 6, seed: int = 0) -> list[Response]:
    rng = np.random.default_rng(seed)
    rows = []
    for question in range(n_questions):
        for sample in range(n_answers):
            ids = tuple(int(i) for i in rng.integers(4, 40, rng.integers(4, 9)))
            logprobs = tuple(-rng.exponential(1, len(ids)))
            right = bool(rng.random() < 0.5)
            finish = "eos" if rng.random() < 0.8 else "length"
            found = "7" if rng.random() < 0.7 else None
            rows.append(Response(f"q{question}", sample, (0,), ids, "", logprobs, finish, right, extracted=found))
    return rows


def labels(rows: list[Response]) -> np.ndarray:
    return np.array([row.correct for row in rows], dtype=float)


def judged(rows: list[Response], scores: np.ndarray, **options: object) -> Evidence:
    return judge_scores(scores, rows, draws=200, **options)


def test_rows_and_which_of_them_decide() -> None:
    rows, rng = responses(), np.random.default_rng(1)
    scores = labels(rows) + rng.normal(size=360)
    random_PN = rng.normal(size=(3, 360))
    found = judged(rows, scores, random_PN=random_PN, reported={"dense probe": scores + labels(rows)})
    assert found.judgement.verdict == "pass", found.judgement.reason
    assert [row.name for row in found.rows] == ["feature reward", *REQUIRED, "dense probe"]
    assert [row.required for row in found.rows[1:]] == [True] * 7 + [False]
    # What is reported may be better than the reward; a rival that has to be beaten may not.
    assert found.rows[-1].difference.high < 0
    named = judged(rows, scores, random_PN=(scores + labels(rows))[None])
    assert named.judgement.verdict == "fail" and "random features of equal frequency" in named.judgement.reason


@pytest.mark.parametrize("name", ["mean log-probability", "least log-probability", "length", "format flag"])
def test_a_reward_that_is_a_rival_fails(name: str) -> None:
    """The labels follow the rival, so that the reward, its very copy, has all the signal there is."""
    rng, rows = np.random.default_rng(2), []
    for row in responses():
        right, n = row.correct, len(row.completion_ids)
        # A rare token of low probability moves the minimum more than the mean.
        logprobs = [-1.0 + 0.1 * x for x in rng.normal(size=n)]
        if name == "least log-probability":
            logprobs[0] = -3.0 + 1.0 * right + rng.normal()
            logprobs[1] += 2 - logprobs[0]
        if name == "mean log-probability":
            logprobs = [x + 0.05 * right for x in logprobs]
        if name == "length":
            n += 2 * right
            logprobs += [-1.0] * (2 * right)
        ids = tuple(int(i) for i in rng.integers(4, 40, n))
        finish = "eos" if rng.random() < (0.9 if right or name != "format flag" else 0.4) else "length"
        rows.append(replace(row, completion_ids=ids, logprobs=tuple(logprobs), finish=finish, extracted="7"))
    of = {
        "mean log-probability": lambda r: np.mean(r.logprobs),
        "least log-probability": lambda r: min(r.logprobs),
        "length": lambda r: len(r.completion_ids),
        "format flag": lambda r: r.finish == "eos",
    }
    scores = np.array([float(of[name](row)) for row in rows])
    found = judged(rows, scores)
    assert found.rows[0].within.low > 0.55
    assert found.judgement.verdict == "fail" and f"{name} is as good" in found.judgement.reason
    (rival,) = [row for row in found.rows if row.name == name]
    assert rival.difference.value == pytest.approx(0)


def test_correlations() -> None:
    rows = responses()
    scores = labels(rows) + np.random.default_rng(3).normal(size=360)
    found = judged(rows, scores).correlations
    assert found.plain.spearman == stats.spearmanr(scores, labels(rows)).statistic
    kept = np.repeat(labels(rows).reshape(-1, 6).mean(1), 6)
    columns = [
        [len(r.completion_ids) for r in rows],
        kept,
        [np.mean(r.logprobs) for r in rows],
        [r.finish == "length" for r in rows],
        [r.extracted is not None for r in rows],
    ]
    x = np.stack([np.ones(360), *(stats.rankdata(column) for column in columns)], axis=1)
    left = [y - x @ np.linalg.lstsq(x, y, rcond=None)[0] for y in map(stats.rankdata, (scores, labels(rows)))]
    assert found.partial.value == pytest.approx(stats.pearsonr(*left).statistic)
    assert found.partial.low < found.partial.value < found.partial.high
    x[:, 2] = stats.rankdata((kept * 6 - labels(rows)) / 5)
    left = [y - x @ np.linalg.lstsq(x, y, rcond=None)[0] for y in map(stats.rankdata, (scores, labels(rows)))]
    assert found.partial_others.value == pytest.approx(stats.pearsonr(*left).statistic)


def test_one_mixed_question_has_no_fitted_rivals_and_no_verdict() -> None:
    rows = [replace(r, correct=r.question_id == "q0" and r.sample == 0) for r in responses(5)]
    found = judged(rows, np.arange(30.0))
    assert [row.name for row in found.rows[1:]] == REQUIRED[:4]
    assert found.judgement.verdict == "inconclusive" and "only 1 of 5 questions has both" in found.judgement.reason
    assert found.rows[0].within.value == within_question_auroc(
        np.arange(30.0), labels(rows), [r.question_id for r in rows]
    )


def test_no_mixed_question() -> None:
    found = judged([replace(r, correct=True) for r in responses(5)], np.arange(30.0))
    assert (found.rows, found.p_value, found.correlations) == ((), None, None)
    assert found.judgement.reason.startswith("all answers are right, so none of 5 questions")


def test_bad_scores() -> None:
    rows = responses(5)
    with pytest.raises(InputError, match="scores: 3 for 30 responses, they must be as many"):
        judge_scores(np.ones(3), rows)
    with pytest.raises(InputError, match="1 of 30 are NaN or infinite"):
        judged(rows, np.array([np.nan, *range(29)]))


def test_cross_fitted_scores_are_judged_on_the_mixed_answers_they_belong_to() -> None:
    rows = [replace(r, correct=True) if r.question_id == "q3" else r for r in responses()]
    rng = np.random.default_rng(4)
    by_sample = sorted(rows, key=lambda r: r.sample)  # q0, q1 ... q0, q1 ...
    order = {name: place for place, name in enumerate(dict.fromkeys(r.question_id for r in by_sample))}
    kept = [r for r in sorted(by_sample, key=lambda r: order[r.question_id]) if r.question_id != "q3"]
    kept = [r for r in kept if {x.correct for x in rows if x.question_id == r.question_id} == {True, False}]
    scores = labels(kept) + rng.normal(size=len(kept))
    columns = {"SAE features": scores, "logistic probe": rng.normal(size=len(kept))}
    held_out = HeldOutScores([r.question_id for r in kept], labels(kept).astype(bool), columns)
    found = judge_held_out(held_out, by_sample, draws=200)
    want = within_question_auroc(scores, labels(kept), held_out.questions)
    assert found.rows[0].within.value == want and found.rows[-1].name == "logistic probe"
    assert not found.rows[-1].required
    with pytest.raises(InputError, match="not the ones that were scored"):
        judge_held_out(held_out, by_sample[:-6], draws=200)
    renamed = [replace(r, question_id=f"x{r.question_id}") for r in by_sample]
    with pytest.raises(InputError, match="not the ones that were scored"):
        judge_held_out(held_out, renamed, draws=200)
    wrong = [replace(r, correct=not r.correct) for r in by_sample]
    with pytest.raises(InputError, match="not the ones that were scored"):
        judge_held_out(held_out, wrong, draws=200)
