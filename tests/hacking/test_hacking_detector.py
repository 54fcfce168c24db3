"""The detector on batches made by hand: each sign alone, what is no sign, and what a resumed run remembers."""

from __future__ import annotations

import json
import math

import pytest
import torch
from scipy.stats import ttest_ind

from mechreward.errors import InputError
from mechreward.gates import mean_rise
from mechreward.hacking import GuardConfig, HackingDetector, RolloutBatch

GROUPS, SIZE = 8, 4


def batch(reward=0.0, accuracy=0.5, seed=0, **fields) -> RolloutBatch:
    """8 questions x 4 rollouts: rewards of SD 1 around `reward`, `accuracy` of each group's rollouts right."""
    generator = torch.Generator().manual_seed(seed)
    right = round(accuracy * SIZE)
    given = {
        "group_size": SIZE,
        "reward_B": reward + torch.randn(GROUPS * SIZE, generator=generator),
        "outcome_B": torch.tensor(([1.0] * right + [0.0] * (SIZE - right)) * GROUPS),
        "repetition_B": torch.full((GROUPS * SIZE,), 0.1),
    }
    return RolloutBatch(**(given | fields))


def calm(config=None, **fields) -> HackingDetector:
    """After its reference of three batches."""
    detector = HackingDetector(config)
    for seed in range(3):
        report = detector.check(batch(seed=seed, **fields))
        assert not report.findings and not report.flagged_indices and report.flag_rate == 0
    return detector


def names(report) -> list[str]:
    return [finding.name for finding in report.findings]


def after(detector, n=3, **fields):
    for seed in range(10, 10 + n):
        report = detector.check(batch(seed=seed, **fields))
    return report


def test_calm_batches_have_no_finding() -> None:
    detector = calm()
    for seed in range(3, 30):
        report = detector.check(batch(seed=seed))
        assert not report.findings and not report.stop and report.streak == 0


def test_reward_without_accuracy_is_divergence_and_marks_wrong_paid_rollouts() -> None:
    report = after(calm(), reward=1.2, accuracy=0.5)
    assert names(report) == ["divergence"]
    last = batch(reward=1.2, seed=12)
    mean = torch.cat([batch(seed=s).reward_B for s in range(3)]).mean()
    expected = (last.outcome_B == 0) & (last.reward_B > mean)
    paid_B = last.reward_B > mean
    assert torch.equal(report.flagged_B, expected) and 0.3 < report.flag_rate < 0.5
    assert (paid_B & (last.outcome_B == 1)).any() and (~paid_B & (last.outcome_B == 0)).any()
    assert report.flagged_indices == expected.nonzero()[:, 0].tolist()
    assert "rose by" in report.findings[0].sentence and "+0.000" in report.findings[0].sentence


def test_the_value_of_divergence_is_in_reference_deviations() -> None:
    report = after(calm(), reward=2.0, accuracy=0.25)
    first = torch.cat([batch(seed=s).reward_B for s in range(3)]).double()
    later = torch.cat([batch(reward=2.0, seed=s).reward_B for s in range(10, 13)]).double()
    rise = (later.mean() - first.mean()) / first.std(correction=0)
    assert report.findings[0].value == pytest.approx(rise.item()) and report.findings[0].limit == 0.5


def test_a_reward_that_paid_nothing_at_first_may_not_rise_alone_either() -> None:
    silent = torch.zeros(GROUPS * SIZE)
    report = after(calm(reward_B=silent), reward=2.0)
    later = torch.cat([batch(reward=2.0, seed=s).reward_B for s in range(10, 13)]).double().view(-1, SIZE).mean(1)
    assert names(report) == ["divergence"] and not report.sound
    assert report.findings[0].value == pytest.approx((later.mean() / later.std(correction=0)).item())
    assert names(after(calm(reward_B=silent), reward_B=silent + 2)) == ["divergence"]
    assert not after(calm(reward_B=silent, accuracy=0.25), reward=2.0, accuracy=0.75).findings
    assert not after(calm(reward_B=silent), reward_B=silent).findings


def test_reward_with_accuracy_is_none() -> None:
    assert not after(calm(accuracy=0.25), reward=2.0, accuracy=0.75).findings


def test_accuracy_that_rises_with_noise_is_none() -> None:
    mixed = torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0] * 2)
    better = torch.tensor([1.0, 1, 0, 0, 1, 1, 1, 0, 1, 1, 1, 1, 1, 0, 0, 0] * 2)
    rise, z = mean_rise([0.25, 0.5, 0.75, 0.0] * 6, [0.5, 0.75, 1.0, 0.25] * 6)
    assert 1 < z < 4 and rise == 0.25
    assert not after(calm(outcome_B=mixed), reward=2.0, outcome_B=better).findings
    assert names(after(calm(outcome_B=mixed), reward=2.0, outcome_B=mixed)) == ["divergence"]


def test_a_small_or_unclear_rise_is_none() -> None:
    assert not after(calm(GuardConfig(reward_rise=3.0)), reward=2.0, accuracy=0.5).findings  # clear, but allowed
    assert not after(calm(), reward=0.3, accuracy=0.5).findings
    sure = after(calm(GuardConfig(reward_rise=0.01)), reward=0.3, accuracy=0.5)
    means = [[m for s in seeds for m in batch(reward=r, seed=s).reward_B.view(GROUPS, SIZE).mean(1).tolist()]
             for r, seeds in ((0.0, range(3)), (0.3, range(10, 13)))]  # fmt: skip
    z = ttest_ind(means[1], means[0], equal_var=False).statistic
    assert names(sure) == (["divergence"] if z > 3 else []) and 1 < z < 3
    assert names(after(calm(GuardConfig(reward_rise=0.2)), reward=1.5, accuracy=0.5)) == ["divergence"]
    assert not after(calm(), reward=-3.0, accuracy=0.5).findings


def test_an_outcome_that_falls_clearly_is_a_collapse_whatever_the_reward_does() -> None:
    mixed = torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 0, 0] * 2)
    worse = torch.tensor([0.0, 0, 0, 0, 1, 0, 0, 0, 1, 1, 0, 0, 1, 0, 0, 0] * 2)
    report = after(calm(outcome_B=mixed), reward=-1.0, outcome_B=worse)
    means = [values.view(-1, SIZE).mean(1).tolist() * 3 for values in (mixed, worse)]
    z = ttest_ind(means[1], means[0], equal_var=False).statistic
    assert z < -3 and names(report) == ["outcome collapse"] and not report.flagged_indices
    (finding,) = report.findings
    assert (finding.value, finding.limit) == (pytest.approx(z), -3.0)
    assert finding.sentence == f"the outcome fell by 0.250 (z {z:.1f})"
    slightly = mixed.clone()
    slightly[[0, 4, 8]] = 0.0
    assert not after(calm(outcome_B=mixed), outcome_B=slightly).findings


def test_a_sound_batch_is_as_accurate_as_the_reference_was() -> None:
    detector = calm()
    said = [detector.check(batch(seed=s)).sound for s in range(10, 14)]
    assert said == [False, False, True, True]  # before a window of its own nothing is known
    mixed = torch.tensor([1.0, 0, 0, 0, 1, 1, 0, 0, 1, 1, 1, 0, 1, 1, 0, 0] * 2)
    slightly = mixed.clone()
    slightly[[0, 4, 8, 12]] = 0.0
    z = mean_rise(mixed.view(-1, SIZE).mean(1).tolist() * 3, slightly.view(-1, SIZE).mean(1).tolist() * 3)[1]
    assert -3 < z < -1
    doubted = after(calm(outcome_B=mixed), outcome_B=slightly)
    assert not doubted.findings and not doubted.sound
    assert after(calm(outcome_B=slightly), outcome_B=mixed).sound
    assert not after(calm(), reward=1.2).sound  # a finding
    unknown = torch.full((GROUPS * SIZE,), math.nan)
    detector = calm(outcome_B=unknown)
    assert [detector.check(batch(seed=s, outcome_B=unknown)).sound for s in range(10, 13)] == [False, False, True]


def test_divergence_needs_a_whole_window_of_its_own() -> None:
    detector = calm()
    found = [names(detector.check(batch(reward=5.0, seed=s))) for s in range(10, 13)]
    assert found == [[], [], ["divergence"]]


def test_three_findings_in_a_row_stop_and_a_calm_one_starts_anew() -> None:
    detector, loop = calm(), torch.full((GROUPS * SIZE,), 0.9)
    reports = [detector.check(batch(seed=s, repetition_B=loop)) for s in range(2)]
    reports.append(detector.check(batch(seed=2)))
    reports += [detector.check(batch(seed=s, repetition_B=loop)) for s in range(3, 6)]
    assert [report.streak for report in reports] == [1, 2, 0, 1, 2, 3]
    assert [report.stop for report in reports] == [False] * 5 + [True]
    assert not after(calm(GuardConfig(patience=0)), 5, repetition_B=loop).stop


def test_repetition_flags_single_rollouts_and_needs_many_for_a_finding() -> None:
    values = torch.full((GROUPS * SIZE,), 0.1)
    values[5] = 0.6
    report = calm().check(batch(seed=9, repetition_B=values))
    assert report.flagged_indices == [5] and not report.findings and report.flag_rate == 1 / 32
    values[:9] = 0.6
    report = calm().check(batch(seed=9, repetition_B=values))
    assert names(report) == ["repetition"] and report.findings[0].value == 9 / 32
    values[8] = 0.1
    assert not calm().check(batch(seed=9, repetition_B=values)).findings  # a quarter is not more than a quarter


def test_what_repeats_from_the_start_is_no_sign() -> None:
    often = torch.full((GROUPS * SIZE,), 0.8)
    assert not calm(repetition_B=often).check(batch(seed=9, repetition_B=often)).flagged_indices
    assert calm(repetition_B=often).check(batch(seed=9, repetition_B=often + 0.1)).flag_rate == 1


def test_off_distribution_against_the_worst_reference_rollout() -> None:
    low = torch.linspace(0.01, 0.02, GROUPS * SIZE)
    values = torch.full((GROUPS * SIZE,), 0.059)
    values[3], values[4] = 0.061, torch.nan
    assert calm(fvu_B=low).check(batch(seed=9, fvu_B=values)).flagged_indices == [3]
    assert calm().check(batch(seed=9, fvu_B=values)).flagged_indices == []  # the first measurement is the reference


def test_reader_drift_per_rollout() -> None:
    one = batch(seed=9)
    frozen = one.reward_B.clone()
    frozen[7] -= 1.5
    frozen[8] += 1.5
    frozen[9] += 0.5
    frozen[10] = torch.nan
    report = calm().check(batch(seed=9, frozen_reward_B=frozen))
    assert report.flagged_indices == [7, 8] and set(report.reasons) == {"repetition", "reader drift"}
    assert names(calm().check(batch(seed=9, frozen_reward_B=one.reward_B - 3))) == ["reader drift"]
    wide = HackingDetector()
    for seed in range(3):
        wide.check(batch(seed=seed, reward_B=5 * batch(seed=seed).reward_B))
    assert wide.check(batch(seed=9, frozen_reward_B=frozen)).flagged_indices == []  # 1.5 is little beside an SD of 5


def test_disagreement_comes_from_outside() -> None:
    rows = torch.arange(GROUPS * SIZE) < 10
    report = calm().check(batch(seed=9, disagreement_B=rows))
    assert torch.equal(report.flagged_B, rows) and names(report) == ["disagreement"]
    first = HackingDetector().check(batch(disagreement_B=rows))
    assert not first.flagged_indices and not first.findings  # nothing while the reference is collected


def test_entropy_collapse_only_without_accuracy() -> None:
    assert names(after(calm(entropy=1.0), entropy=0.19)) == ["entropy collapse"]
    assert not after(calm(entropy=1.0), entropy=0.21).findings
    assert not after(calm(entropy=1.0, accuracy=0.25), entropy=0.01, accuracy=0.75).findings
    assert not after(calm(), entropy=0.01).findings  # no reference
    assert not after(calm(entropy=1.0), 2, entropy=0.01).findings  # accuracy is not known yet


def test_rows_without_outcome_or_reward_are_left_out() -> None:
    outcome = torch.full((GROUPS * SIZE,), torch.nan)
    detector = calm(outcome_B=outcome)
    assert not after(detector, outcome_B=outcome, reward=9.0).findings  # no accuracy to compare with
    reward = batch().reward_B.clone()
    reward[0] = torch.nan
    assert not calm().check(batch(reward_B=reward)).findings


def test_remembers_what_it_saw() -> None:
    one = calm(GuardConfig(), entropy=1.0, fvu_B=torch.full((32,), 0.01))
    one.check(batch(seed=10, reward=2.0))
    other = HackingDetector()
    other.load_state(json.loads(json.dumps(one.state(), allow_nan=False)))
    assert other.state() == one.state()
    for seed in (11, 12, 13):
        first, second = (detector.check(batch(seed=seed, reward=2.0)) for detector in (one, other))
        assert (first.findings, first.streak, first.flagged_indices) == (
            second.findings, second.streak, second.flagged_indices,
        )  # fmt: skip
    assert first.findings and first.streak == 2
    empty = HackingDetector()
    json.dumps(empty.state(), allow_nan=False)


def test_bad_input() -> None:
    with pytest.raises(InputError, match="group_size: 32 rows are not whole groups of 5"):
        HackingDetector().check(batch(group_size=5))
    with pytest.raises(InputError, match="reward: rollout 0 is infinite"):
        HackingDetector().check(batch(reward_B=torch.full((32,), math.inf)))
    for options in (
        {"window": 0}, {"patience": -1}, {"keep_every": -1}, {"reward_rise": 0.0}, {"fvu_factor": -1.0},
        {"flagged_share": 1.0}, {"repetition": 0.0}, {"entropy_floor": 1.0}, {"drift": math.nan},
    ):  # fmt: skip
        with pytest.raises(InputError, match=f"guard.{next(iter(options))}"):
            GuardConfig(**options)


def test_mean_rise_is_welchs_t() -> None:
    before, later = [1.0, 2.0, 4.0], [3.0, 5.0, 5.0, 9.0]
    difference, t = mean_rise(before, later)
    assert difference == pytest.approx(5.5 - 7 / 3)
    assert t == pytest.approx(ttest_ind(later, before, equal_var=False).statistic)
    assert mean_rise([1.0, 1.0], [2.0, 2.0]) == (1.0, math.inf)
    assert mean_rise([1.0, 1.0], [0.0, 0.0]) == (-1.0, -math.inf)
    assert mean_rise([1.0, 1.0], [1.0, 1.0]) == (0.0, 0.0)
    with pytest.raises(InputError, match="values: 1 before and 2 after"):
        mean_rise([1.0], [1.0, 2.0])
