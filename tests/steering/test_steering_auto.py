"""AutoConditional against thresholds and counts worked out text by text."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import sparse

from mechreward.errors import InputError
from mechreward.gates import wilson
from mechreward.models import load_model, norm_outliers, read_residuals
from mechreward.rollout import Response
from mechreward.sae import SAE, SAEMeta, load_sae
from mechreward.steering import Protocol, Variant, auto, autoconditional, contrast, token_labels
from mechreward.steering.auto import autosteer
from mechreward.steering.labels import Labels, neighbours
from mechreward.steering.sweep import Curve
from mechreward.tiny import MODEL, SAE_FOLDER

ADDED = [f"on Monday buys {n} : 40 + {n} = {40 + n} ." for n in range(1, 10)]
TAKEN = [f"on Monday loses {n} : 40 - {n} = {40 - n} ." for n in range(1, 12)]


@pytest.fixture(scope="module")
def variant() -> Variant:
    return Variant(load_model(str(MODEL)), load_sae(str(SAE_FOLDER)))


@pytest.mark.parametrize(("k", "share"), [(1, 0.05), (3, 0.4)])
def test_thresholds_and_errors_by_hand(variant: Variant, k: int, share: float) -> None:
    found = autoconditional(variant, ADDED, TAKEN, k=k, share=share)
    features = contrast(variant, ADDED[::2], TAKEN[::2], k).first.ids
    assert list(found.thresholds) == features and len(features) == k

    def peak(text: str, feature: int) -> float:
        seen = variant.inspect(text)
        return max(float(v) for v, counts in zip(seen.matrix([feature])[:, 0], seen.counted_T, strict=True) if counts)

    for feature, limit in found.thresholds.items():
        over = [peak(text, feature) > limit for text in TAKEN[::2]]
        allowed = int(share / k * (len(over) - 1))
        peaks = sorted(peak(text, feature) for text in TAKEN[::2])
        assert limit == peaks[len(peaks) - 1 - allowed] and sum(over) <= allowed
    for side, texts in ((found.wanted, ADDED[1::2]), (found.unwanted, TAKEN[1::2])):
        met = [any(peak(text, f) > limit for f, limit in found.thresholds.items()) for text in texts]
        assert (side.count, side.n, (side.low, side.high)) == (sum(met), len(met), wilson(sum(met), len(met)))
    assert found.wanted.count > 0.7 * found.wanted.n and found.condition.features() == set(features)
    # The condition holds on a token exactly where one of its features exceeds its threshold.
    seen = variant.inspect(ADDED[1])
    acts = {f: seen.matrix([f])[:, 0] for f in features}
    wanted = np.any([acts[f] > limit for f, limit in found.thresholds.items()], axis=0)
    assert np.array_equal(_holds(found.condition, acts), wanted)


def _holds(condition, acts) -> np.ndarray:
    return condition.holds({f: torch.tensor(values) for f, values in acts.items()}).numpy()


def test_bad_input(variant: Variant) -> None:
    with pytest.raises(InputError, match="wanted: 3 texts are given; half of them are held out"):
        autoconditional(variant, ADDED[:3], TAKEN)
    with pytest.raises(InputError, match="unwanted: 0 texts are given"):
        autoconditional(variant, ADDED, [])
    for k, share in ((0, 0.1), (1, 0.0), (1, 1.0)):
        with pytest.raises(InputError, match="k, share: .* are not allowed"):
            autoconditional(variant, ADDED, TAKEN, k=k, share=share)
    with pytest.raises(InputError, match="no feature is stronger"):
        autoconditional(variant, ADDED[:4], ADDED[:4])


@pytest.fixture
def swept(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What `sweep` is asked; its knee is 0.5, then none."""
    asked: list[tuple] = []

    def sweep(*given: object) -> Curve:
        asked.append(given)
        return Curve([], 0.5 if len(asked) == 1 else None)

    monkeypatch.setattr(auto, "sweep", sweep)
    return asked


def test_autosteer_by_a_description_takes_the_nearest_labels_alike(variant: Variant, swept: list[tuple]) -> None:
    labels = {3: "buys things", 5: "loses things", 8: "buys and buys", 9: "a name"}
    labelled = Variant(variant.loaded, variant.sae, labels=labels)
    protocol = Protocol(prompts=["a", "b"], score=lambda *_: 0.0)
    found, none = (autosteer(labelled, "buys", protocol, k=2, strengths=(0.5, 3.0)) for _ in range(2))
    assert found.weights == {3: 1.0, 8: 1.0} and found.edits == {3: 0.5, 8: 0.5} and none.edits == {}
    assert swept[0] == (labelled, found.weights, (0.5, 3.0), protocol)


def test_autosteer_by_pairs_takes_the_fit_s_weights(
    variant: Variant, swept: list[tuple], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []
    monkeypatch.setattr(auto, "sparse_fit", lambda *given: asked.append(given) or {7: 1.0, 2: -0.25})
    protocol, pairs = Protocol(prompts=["a", "b"], score=lambda *_: 0.0), [("a", "b"), ("c", "d")]
    found = variant.autosteer(pairs, protocol, k=4)
    assert asked == [(variant, pairs, 4)] and found.edits == {7: 0.5, 2: -0.125}
    assert swept == [(variant, {7: 1.0, 2: -0.25}, (0.25, 0.5, 1.0, 2.0), protocol)]


def test_token_labels_are_the_tokens_that_hold_most_of_a_feature(
    variant: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Summed over all responses, on completion tokens alone, without those of massive norm: here the first of each."""

    def outliers(h_BTD: torch.Tensor, mask_BT: torch.Tensor) -> torch.Tensor:
        return norm_outliers(h_BTD, mask_BT) & (torch.arange(mask_BT.shape[1]) > 0)

    monkeypatch.setattr("mechreward.steering.labels.norm_outliers", outliers)
    tokenizer = variant.loaded.tokenizer
    texts = ("Ada has 2 apples .", ADDED[0]), ("Ben has 40 pens .", TAKEN[3]), ("Ada", ADDED[4] + " " + TAKEN[0])
    rows = [(tokenizer(a)["input_ids"], tokenizer(b, add_special_tokens=False)["input_ids"]) for a, b in texts]
    given = [Response(str(i), 0, tuple(p), tuple(c), "", (0.0,) * len(c), "eos") for i, (p, c) in enumerate(rows)]
    wanted: dict[int, dict[int, float]] = {}
    for prompt, completion in rows:
        h, mask = read_residuals(variant.loaded.model, [prompt], [completion], variant.sae.meta.layer)
        acts = variant.sae.encode(h[0]).numpy()
        for token, row, counts in zip(completion, acts, outliers(h, mask)[0].tolist(), strict=True):
            for feature in np.flatnonzero(row) if counts else ():
                held = wanted.setdefault(int(feature), {})
                held[token] = held.get(token, 0.0) + float(row[feature])
    found = token_labels(variant.loaded, variant.sae, given, tokens=2, batch_size=2)
    assert found.keys() == wanted.keys() and max(len(held) for held in wanted.values()) > 2
    for feature, held in wanted.items():
        best = sorted(held, key=lambda token: -held[token])[:2]
        if len({round(value, 4) for value in held.values()}) == len(held):
            assert found[feature] == " ".join(tokenizer.decode([token]).strip() for token in best)


def test_search_is_among_the_features_named_and_nearest_first() -> None:
    labels = Labels({3: "buys apples", 5: "buys", 8: "sells", 9: ""})
    assert labels.search("buys").ids == [5, 3] and labels.search("buys", k=1).ids == [5]
    assert labels.search("buys", among=[8, 3, 7]).ids == [3]
    with pytest.raises(InputError, match="^labels: there are none to search"):
        labels.search("buys", among=[9, 7])


def test_neighbours_are_those_of_the_mean_of_unit_columns_and_none_of_the_named() -> None:
    rows_FD = torch.tensor([[3.0, 0.0], [0.0, 1.0], [1.0, 1.0], [2.0, 0.5], [0.5, 2.0]])
    meta = SAEMeta("r", "s", 1, "m", "h")
    sae = SAE("relu", torch.ones(2, 5), torch.zeros(5), rows_FD, torch.zeros(2), meta)
    assert neighbours(sae, [0], 9) == [3, 2, 4, 1] and neighbours(sae, [0, 1], 2)[0] == 2
    acts_TF = sparse.csr_array(np.array([[9.0, 0, 1, 0, 0], [0, 1, 0, 0, 1], [0, 1, 0, 0, 1], [9, 0, 0, 0, 0]]))
    # By columns of length 1 features 0 and 1 count alike, though 0 is nine times as large: .5 for 4, .35 for 2.
    assert neighbours(sae, [0, 1], 9, acts_TF) == [4, 2, 3]
    with pytest.raises(InputError, match=r"^features: \[3\] fire on none of these tokens"):
        neighbours(sae, [3], 1, acts_TF)
