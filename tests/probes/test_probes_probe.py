"""Probes by hand, and against scikit-learn and a naive loop."""

from __future__ import annotations

import json
import logging
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression

from mechreward.errors import InputError
from mechreward.probes import LinearProbe, load_probe, probe_names, save_probe


def probe(**fields) -> LinearProbe:
    given = {"weight": torch.tensor([1.0, -2.0]), "bias": 0.5, "d_model": 2, "pooling": "max", **fields}
    return LinearProbe(**given)


H_BTD = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [3.0, 0.0]], [[0.0, 0.0], [9.0, 9.0], [9.0, 9.0]]])
MASK_BT = torch.tensor([[True, True, True], [True, False, False]])
# Token log-odds: 1.5, -1.5, 3.5 in row 0; 0.5 in row 1.


def test_log_odds_of_each_state() -> None:
    assert probe().logits(H_BTD)[0].tolist() == [1.5, -1.5, 3.5]
    assert probe().predict(H_BTD)[0].tolist() == [True, False, True]
    assert probe().predict_proba(H_BTD)[0, 0].item() == pytest.approx(1 / (1 + math.exp(-1.5)))
    assert probe(bias=0.0).predict(torch.zeros(1, 2)).tolist() == [True]  # log-odds 0 count as the class


@pytest.mark.parametrize(
    ("pooling", "expected"),
    [("max", [3.5, 0.5]), ("min", [-1.5, 0.5]), ("mean", [3.5 / 3, 0.5])],
)
def test_pooling_by_hand(pooling, expected) -> None:
    assert probe(pooling=pooling).pooled_logits(H_BTD, MASK_BT).tolist() == pytest.approx(expected)


def test_attention_pooling_by_hand() -> None:
    weighted = probe(pooling="attention", query=torch.tensor([1.0, 0.0]))
    shares = np.exp([1.0, 0.0, 3.0])
    expected = float(shares @ np.array([1.5, -1.5, 3.5]) / shares.sum())
    assert weighted.pooled_logits(H_BTD, MASK_BT).tolist() == pytest.approx([expected, 0.5])


@pytest.mark.parametrize("pooling", ["max", "min", "mean", "attention"])
def test_masked_states_have_no_say_and_empty_rows_are_nan(pooling) -> None:
    query = torch.tensor([1.0, 1.0]) if pooling == "attention" else None
    one, mask_BT = probe(pooling=pooling, query=query), MASK_BT.clone()
    other_BTD = H_BTD.clone()
    other_BTD[1, 1:] = torch.nan
    torch.testing.assert_close(one.row_proba(other_BTD, mask_BT), one.row_proba(H_BTD, mask_BT))
    mask_BT[1] = False
    assert one.row_proba(H_BTD, mask_BT).isnan().tolist() == [False, True]
    assert one.row_proba(H_BTD[:, :0], mask_BT[:, :0]).isnan().all()


@pytest.mark.parametrize(("pooling", "first"), [("max", -1.0), ("min", 1.0)])
def test_a_masked_token_is_not_one_at_the_origin(pooling, first) -> None:
    h_BTD = torch.tensor([[[first, 0.0], [0.0, 0.0]]])  # the second has log-odds .5, and is masked
    one = probe(pooling=pooling)
    assert one.pooled_logits(h_BTD, torch.tensor([[True, False]])).item() == 0.5 + first


def test_calibration_moves_pooled_log_odds_only() -> None:
    one = probe(slope=0.5, intercept=-1.0)
    assert one.row_proba(H_BTD, MASK_BT)[0].item() == pytest.approx(1 / (1 + math.exp(-(0.5 * 3.5 - 1.0))))
    assert one.predict_proba(H_BTD)[0, 0].item() == pytest.approx(1 / (1 + math.exp(-1.5)))


@given(st.lists(st.floats(-5, 5, width=32), min_size=1, max_size=6))
def test_max_and_min_mirror_each_other(values) -> None:
    h_BTD = torch.tensor([[[v, 0.0] for v in values]])
    mask_BT = torch.ones(1, len(values), dtype=torch.bool)
    up = probe(pooling="max", bias=0.0).pooled_logits(h_BTD, mask_BT)
    down = probe(pooling="min", weight=torch.tensor([-1.0, 2.0]), bias=0.0).pooled_logits(h_BTD, mask_BT)
    assert up.item() == pytest.approx(-down.item())


def test_from_sklearn_gives_its_log_odds() -> None:
    x = np.random.default_rng(0).normal(size=(50, 3))
    model = LogisticRegression().fit(x, x[:, 0] > 0)
    made = LinearProbe.from_sklearn(model, "s", layer=3)
    np.testing.assert_allclose(made.logits(torch.from_numpy(x)).numpy(), model.decision_function(x), atol=1e-5)
    assert (made.layer, made.name, made.d_model) == (3, "s", 3)
    with pytest.raises(InputError, match="estimator: has 3 rows of coefficients"):
        LinearProbe.from_sklearn(LogisticRegression().fit(x, np.arange(50) % 3))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_model": 3}, "weight: has 2 entries, but d_model is 3"),
        ({"pooling": "median"}, "pooling: 'median' is not one of max, min, attention, mean"),
        ({"pooling": "attention"}, "query: pooling 'attention' needs a query"),
        ({"query": torch.ones(2)}, "query: pooling 'max' takes no query"),
        ({"pooling": "attention", "query": torch.ones(3)}, "query: has 3 entries"),
        ({"bias": math.nan}, "holds NaN or infinity"),
        ({"weight": torch.tensor([math.inf, 0.0])}, "holds NaN or infinity"),
        ({"pooling": "attention", "query": torch.tensor([math.nan, 0.0])}, "holds NaN or infinity"),
    ],
)
def test_bad_probes(fields, message) -> None:
    with pytest.raises(InputError, match=message):
        probe(**fields)


def test_bad_states() -> None:
    with pytest.raises(InputError, match="reads width 2, but the states have 3"):
        probe().logits(torch.ones(4, 3))
    with pytest.raises(InputError, match="NaN or infinite"):
        probe().logits(torch.tensor([math.nan, 0.0]))


@pytest.mark.parametrize("name", ["correctness", "correctness.v2", "a.safetensors"])
def test_saved_and_loaded(tmp_path, name) -> None:
    made = probe(
        pooling="attention", query=torch.tensor([0.25, 3.0]), slope=0.5, intercept=2.0, layer=4, metadata={"q": [1]}
    )
    path = save_probe(made, tmp_path / name)
    assert path.name == name.removesuffix(".safetensors") + ".safetensors"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    for source in (path, tmp_path / name):
        found = load_probe(source)
        assert torch.equal(found.weight, made.weight) and torch.equal(found.query, made.query)
        for field in ("bias", "d_model", "name", "metadata", "layer", "pooling", "slope", "intercept"):
            assert getattr(found, field) == getattr(made, field)


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    save_probe(probe(bias=1.5), tmp_path / "mine")
    assert load_probe("~/mine").bias == load_probe("~/mine.safetensors").bias == 1.5


def test_a_probe_is_frozen_whatever_becomes_of_the_tensors_it_was_made_of() -> None:
    weight, query = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 0.0])
    made = probe(weight=weight, pooling="attention", query=query)
    weight.mul_(9), query.mul_(9)
    assert made.weight.tolist() == [1.0, -2.0] and made.query.tolist() == [0.5, 0.0]


@pytest.mark.parametrize(("value", "shown"), [(np.int64(3), ".*3.*"), (float("nan"), "nan")])
def test_what_is_no_json_value_is_not_saved(tmp_path, value, shown) -> None:
    with pytest.raises(InputError, match=f"^metadata: auroc = {shown} cannot be saved; it must be a JSON value$"):
        save_probe(probe(metadata={"n": 1, "auroc": value}), tmp_path / "p")
    assert not list(tmp_path.iterdir())


def test_two_names_that_differ_after_the_dot_are_two_files(tmp_path) -> None:
    save_probe(probe(bias=1.0), tmp_path / "p.v1")
    save_probe(probe(bias=2.0), tmp_path / "p.v2")
    assert (load_probe(tmp_path / "p.v1").bias, load_probe(tmp_path / "p.v2").bias) == (1.0, 2.0)
    with pytest.raises(InputError, match="neither a file nor a bundled probe"):
        load_probe(tmp_path / "p")


def test_files_that_are_no_probe(tmp_path) -> None:
    broken = tmp_path / "b.safetensors"
    broken.write_bytes(b"no")
    with pytest.raises(InputError, match="not a whole safetensors file"):
        load_probe(broken)
    save_file({"weight": torch.ones(2)}, broken)
    with pytest.raises(InputError, match="holds no probe"):
        load_probe(broken)
    save_file({"weight": torch.ones(2)}, broken, metadata={"mechreward_probe": '{"bias": 1}'})
    with pytest.raises(InputError, match="Field required"):
        load_probe(broken)


HEADER = {
    "name": "x", "bias": 0.0, "d_model": 2, "layer": 3, "pooling": "max", "slope": 1, "intercept": 0.0, "metadata": {},
}  # fmt: skip


@pytest.mark.parametrize(
    ("header", "field"),
    [
        ("{bad", "header"),
        ("[1]", "header"),
        (json.dumps(HEADER | {"bias": "x"}), "bias"),
        (json.dumps(HEADER | {"layer": "3"}), "layer"),
        (json.dumps(HEADER | {"layer": -1}), "layer"),
        (json.dumps(HEADER | {"metadata": None}), "metadata"),
        (json.dumps(HEADER | {"odd": 1}), "odd"),
    ],
)
def test_damaged_headers(tmp_path, header, field) -> None:
    path = tmp_path / "p.safetensors"
    save_file({"weight": torch.ones(2)}, path, metadata={"mechreward_probe": json.dumps(HEADER)})
    assert (load_probe(path).layer, load_probe(path).slope) == (3, 1)
    save_file({"weight": torch.ones(2)}, path, metadata={"mechreward_probe": header})
    with pytest.raises(InputError, match=f"probe: {field} of .*p.safetensors is not a probe's") as refused:
        load_probe(path)
    assert len(str(refused.value).splitlines()) == 1


def test_the_bundled_probe_reads_another_block_than_the_sae(caplog) -> None:
    assert "tiny/correctness_probe_l3" in probe_names()
    with caplog.at_level(logging.WARNING):
        found = load_probe("tiny/correctness_probe_l3")
    assert (found.layer, found.d_model, found.pooling) == (3, 128, "attention")
    assert found.metadata["questions_seed"] != 0
    assert found.metadata["held_out"]["held_out_auroc"] > 0.95
