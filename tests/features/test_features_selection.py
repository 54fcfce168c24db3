"""What gets into a pack, with which numbers, and what is said when nothing does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch

from mechreward.errors import InputError
from mechreward.features import (
    ContrastTable,
    NoFeatures,
    PackRephrasing,
    PackValidation,
    ReportedFigures,
    build_pack,
    random_packs,
)
from mechreward.sae import SAE, SAEMeta


def make_sae(width: int) -> SAE:
    meta = SAEMeta(release="r", sae_id="s", layer=1, model_name="m", hook_name="")
    return SAE("relu", torch.eye(width), torch.zeros(width), torch.eye(width), torch.zeros(width), meta)


def make_table(effects: list[float], q: list[float], stability: list[float], **columns: list[float]) -> ContrastTable:
    n = len(effects)
    frame = pd.DataFrame({
        "id": range(n), "effect": effects, "difference": effects, "p_value": q, "q_value": q, "stability": stability,
        "support": [0.5] * n, "support_correct": [0.5] * n, "support_wrong": [0.5] * n, "scale": np.arange(1.0, n + 1),
    } | columns)  # fmt: skip
    order = (-frame["effect"].abs()).sort_values(kind="stable").index
    return ContrastTable(frame.loc[order].reset_index(drop=True), 30, 20, 160, pooling="mean")


def test_selection_and_weights() -> None:
    table = make_table([1.5, -2.0, 9.0, 8.0, 0.5], [0.01, 0.05, 0.06, 0.01, 0.01], [0.8, 0.9, 1.0, 0.79, 1.0])
    pack = build_pack(table, make_sae(5), name="p", model_name="m", provenance={"seed": 4})
    assert pack.feature_ids() == [1, 0, 4]
    r = np.array([-2.0, 1.5, 0.5])
    r = r / np.sqrt(r**2 + 4)
    np.testing.assert_allclose([f.weight for f in pack.features], r / np.abs(r).sum())
    assert [f.scale for f in pack.features] == [2.0, 1.0, 5.0]
    assert [(f.effect, f.q_value, f.stability) for f in pack.features][0] == (-2.0, 0.05, 0.9)
    assert pack.provenance["seed"] == 4 and pack.provenance["n_mixed"] == 20
    assert (pack.sae.layer, pack.sae.d_sae, pack.sae.weights_hash) == (1, 5, make_sae(5).weights_hash)


def test_n_features_keeps_the_largest_effects() -> None:
    table = make_table([1.0, -3.0, 2.0], [0.0] * 3, [1.0] * 3)
    assert build_pack(table, make_sae(3), name="p", model_name="m", n_features=2).feature_ids() == [1, 2]


def test_balanced_takes_half_of_each_sign_and_fewer_where_there_are_fewer() -> None:
    table = make_table([-5.0, -4.0, 1.0, -3.0, 2.0, 0.5, 9.0], [0.0] * 6 + [0.9], [1.0] * 7)

    def chosen(n_features: int) -> list[int]:
        pack = build_pack(table, make_sae(7), name="p", model_name="m", n_features=n_features, signs="balanced")
        assert pack.provenance["signs"] == "balanced"
        return pack.feature_ids()

    assert [chosen(n) for n in (2, 5, 6, 8)] == [[0, 4], [0, 1, 4, 2], [0, 1, 3, 4, 2, 5], [0, 1, 3, 4, 2, 5]]
    with pytest.raises(InputError, match="n_features: 1 is not allowed, it must be at least 2"):
        chosen(1)


def test_nothing_passes() -> None:
    table = make_table([0.3, -0.2, 0.0], [0.2, 0.04, 1.0], [0.9, 0.5, 0.9])
    words = r"no feature passes q <= 0.05 and stability >= 0.8 on 20 mixed questions \(1 of 3 .* 2 the second, .*0.30\)"
    with pytest.raises(NoFeatures, match=words):
        build_pack(table, make_sae(3), name="p", model_name="m")


def test_bad_arguments() -> None:
    table = make_table([1.0], [0.0], [1.0])
    with pytest.raises(InputError, match="n_features: 0 is not allowed"):
        build_pack(table, make_sae(1), name="p", model_name="m", n_features=0)
    with pytest.raises(InputError, match="sae: the table has 1 features, the SAE 2"):
        build_pack(table, make_sae(2), name="p", model_name="m")


def test_random_packs_match_frequency_and_know_no_labels() -> None:
    n = 200
    support = np.linspace(0, 1, n)
    effects = np.zeros(n)
    effects[[20, 180]] = [2.0, -1.0]
    significant = (effects == 0).astype(float)
    scale = np.arange(1.0, n + 1)
    scale[21] = 0
    columns = {"support": support.tolist(), "scale": scale.tolist()}
    table = make_table(effects.tolist(), significant.tolist(), [1.0] * n, **columns)
    pack = build_pack(table, make_sae(n), name="p", model_name="m")
    measured = {
        "validation": PackValidation(
            spec_hash=pack.spec_hash, verdict="pass", within_auroc=0.7, interval=(0.6, 0.8), n_questions=9
        ),
        "rephrasing": PackRephrasing(
            spec_hash=pack.spec_hash, verdict="survives", kept=1.0, interval=(0.9, 1.1), kinds=["names"], n_families=9
        ),
        "reported": ReportedFigures(source="them", n_questions=9),
    }
    packs = random_packs(pack.model_copy(update=measured), table, 50, seed=1, nearest=6)
    # What was measured was measured of other features.
    assert {(p.validation, p.rephrasing, p.reported) for p in packs} == {(None, None, None)}
    drawn = np.array([p.feature_ids() for p in packs])
    assert [f.weight for f in packs[0].features] == [f.weight for f in pack.features]
    assert all(f.scale == f.id + 1 for p in packs for f in p.features)
    # The six nearest of feature 20 are neither it nor the constant 21.
    assert {18, 19, 22, 23} <= set(drawn[:, 0]) <= {16, 17, 18, 19, 22, 23, 24}
    assert np.abs(drawn[:, 1] - 180).max() <= 4 and len(set(drawn[:, 1])) > 3
    assert not np.isin(drawn, [20, 21, 180]).any()
    assert packs == random_packs(pack, table, 50, seed=1, nearest=6)
    assert packs != random_packs(pack, table, 50, seed=2, nearest=6)


def test_random_packs_do_not_repeat_a_feature() -> None:
    table = make_table([2.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0], [1.0] * 4)
    pack = build_pack(table, make_sae(4), name="p", model_name="m")
    assert all(sorted(p.feature_ids()) == [2, 3] for p in random_packs(pack, table, 10))
    small = make_table([2.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0] * 3)
    with pytest.raises(InputError, match="only 1 other live features, a random pack needs 2"):
        random_packs(build_pack(small, make_sae(3), name="p", model_name="m"), small, 1)


def test_random_packs_keep_thresholds_in_scales() -> None:
    table = make_table([2.0, 0.0, 0.0], [0.0, 1.0, 1.0], [1.0] * 3, scale=[4.0, 1.0, 3.0])
    pack = build_pack(table, make_sae(3), name="p", model_name="m")
    [feature] = pack.features
    assert (feature.scale, feature.activation_threshold) == (4.0, 0.0)
    pack = pack.model_copy(update={"features": [feature.model_copy(update={"activation_threshold": 2.0})]})
    drawn = [p.features[0] for p in random_packs(pack, table, 20)]
    assert {(f.scale, f.activation_threshold) for f in drawn} == {(1.0, 0.5), (3.0, 1.5)}


def test_a_pack_is_pooled_as_its_features_were_found() -> None:
    table = make_table([1.0, 0.5], [0.0] * 2, [1.0] * 2)
    found = replace(table, pooling="last_4", prompts=("a", "b"))
    pack = build_pack(found, make_sae(2), name="p", model_name="m")
    assert pack.pooling == "last_4" and pack.found_on == pack.provenance["prompts"] == ["a", "b"]
    assert build_pack(found, make_sae(2), name="p", model_name="m", pooling="mean_last_4_tokens").pooling == "last_4"
    with pytest.raises(InputError, match="pooling: 'mean' is not allowed, .* found with 'last_4'"):
        build_pack(found, make_sae(2), name="p", model_name="m", pooling="mean")
    untold = replace(table, pooling=None)
    assert build_pack(untold, make_sae(2), name="p", model_name="m", pooling="max").pooling == "max"
    assert build_pack(untold, make_sae(2), name="p", model_name="m", pooling="max").found_on == []
    with pytest.raises(InputError, match="pooling: the table does not say"):
        build_pack(untold, make_sae(2), name="p", model_name="m")


def test_only_a_contrast_s_effect_is_cohen_s_d() -> None:
    table = make_table([4.0, -2.0], [0.0] * 2, [1.0] * 2, d=[1.0, -3.0])
    [first, second] = build_pack(replace(table, method="attribution"), make_sae(2), name="p", model_name="m").features
    assert (first.id, first.effect, first.metadata) == (0, None, {"attribution": 4.0})
    # Weights go by d: 1 / sqrt(5) and -3 / sqrt(13), whatever the units of the attribution.
    share = 5**-0.5 / (5**-0.5 + 3 * 13**-0.5)
    assert (first.weight, second.weight) == (pytest.approx(share), pytest.approx(share - 1))
    probe = make_table([4.0, -2.0], [0.0] * 2, [1.0] * 2)
    found = build_pack(replace(probe, method="probe"), make_sae(2), name="p", model_name="m").features
    assert [feature.effect for feature in found] == [None, None] and found[1].metadata == {"probe": -2.0}
    assert found[1].weight == pytest.approx(-(2**-0.5) / (2**-0.5 + 2 * 5**-0.5))


def test_random_packs_want_the_pack_s_own_table() -> None:
    table = make_table([2.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0], [1.0] * 4)
    pack = build_pack(table, make_sae(4), name="p", model_name="m")
    for n in (3, 5):
        other = make_table([0.0] * n, [1.0] * n, [1.0] * n)
        with pytest.raises(InputError, match=f"features: the table has {n} features, but the SAE of pack p has 4"):
            random_packs(pack, other, 1)
    shifted = replace(table, frame=table.frame.assign(id=table.frame["id"] + 1))
    with pytest.raises(InputError, match="features: the table has 4 features"):
        random_packs(pack, shifted, 1)
