"""Discovery on the tiny reasoner against the planted choice, and the truth it is measured by."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from mechreward.features import discover
from mechreward.models import LoadedModel, load_model
from mechreward.sae import SAE, load_sae
from mechreward.tiny import MODEL, SAE_FOLDER
from mechreward.tiny.measure import sample_setting
from mechreward.tiny.truth import STEP_END, aurocs, token_coins, told_by_responses, told_by_tokens


@pytest.fixture(scope="module")
def bundled() -> tuple[LoadedModel, SAE]:
    return load_model(str(MODEL)), load_sae(SAE_FOLDER)


def test_aurocs_equal_sklearn() -> None:
    rng = np.random.default_rng(0)
    acts, label = np.round(rng.normal(size=(50, 4)) * 2).astype(np.float32), rng.random(50) < 0.4
    np.testing.assert_allclose(aurocs(acts, label), [roc_auc_score(label, column) for column in acts.T])


def test_coins_by_hand() -> None:
    pieces = "▁on ▁Monday ▁buys ▁3 ▁: ▁20 ▁+ ▁3 ▁. ▁on ▁Friday ▁9 ▁- ▁1 ▁. ▁#### ▁2".split()
    coins = token_coins(pieces, (True, False))
    assert coins == [None] * 6 + [True] * 3 + [None] * 3 + [False] * 3 + [None] * 2


def test_the_first_ten_features_tell_the_planted_choice(bundled: tuple[LoadedModel, SAE]) -> None:
    """Found by right and wrong on some problems; what they tell is measured on others by the world's own labels."""
    loaded, sae = bundled
    found_on, known_from = (sample_setting(loaded, "easy", 16, seed) for seed in (0, 500))
    for pooling in ("mean", STEP_END):
        truth_F = np.abs(told_by_responses(loaded, sae, known_from, pooling) - 0.5) >= 0.45
        table = discover(loaded, sae, found_on.responses, pooling=pooling, permutations=19)
        first = table.frame["id"].to_numpy()[:10]
        assert 5 <= truth_F.sum() < 200
        assert truth_F[first].sum() / min(10, truth_F.sum()) >= 0.8
        assert (table.frame["q_value"][:10] < 0.05).all() and (table.frame["family_p_value"][:10] <= 0.05).all()


def test_some_features_tell_the_coin_token_by_token(bundled: tuple[LoadedModel, SAE]) -> None:
    loaded, sae = bundled
    told = told_by_tokens(loaded, sae, sample_setting(loaded, "long", 3, 0))
    assert set(told) == {"all tokens", "before operator", "operator", "result", "step end"}
    assert all(auroc.shape == (1024,) and auroc.min() >= 0 and auroc.max() <= 1 for auroc in told.values())
    assert max(np.abs(told["step end"] - 0.5)) > 0.45 and np.median(np.abs(told["step end"] - 0.5)) < 0.1
