"""What fires in each step, against reading each token by itself."""

from __future__ import annotations

import pytest
import torch

from mechreward.chains import decompose
from mechreward.errors import InputError
from mechreward.features.fired import FIRES, fired_steps
from mechreward.models import LoadedModel, load_model, read_residuals
from mechreward.sae import SAE, load_sae
from mechreward.tiny import MODEL, SAE_FOLDER

PROMPT = "Ada has 20 apples ."
TEXTS = ("on Monday buys 5 : 20 + 5 = 25 . gives 2 : 25 - 2 = 23 . #### 23", "on Monday buys 5 : 20 - 5 = 15 . #### 15")
SIZES = {660: 5.0, 835: 20.0, 408: 7.0, 12: 1.0, 831: 50.0, 111: 1e4}


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    return load_model(str(MODEL))


@pytest.fixture(scope="module")
def sae() -> SAE:
    return load_sae(str(SAE_FOLDER))


def test_each_step_has_its_own_peaks(loaded: LoadedModel, sae: SAE) -> None:
    prompt = loaded.tokenizer(PROMPT, add_special_tokens=True)["input_ids"]
    rows = [loaded.tokenizer(text, add_special_tokens=False)["input_ids"] for text in TEXTS]
    found = fired_steps(loaded, sae, [prompt] * 2, rows, SIZES)
    assert any(one.fired for steps in found for one in steps)
    for ids, steps in zip(rows, found, strict=True):
        assert [one.step for one in steps] == decompose(loaded.tokenizer, ids)
        h_BTD, _ = read_residuals(loaded.model, [prompt], [ids], sae.meta.layer)
        acts_TF = torch.stack([sae.encode(h_D[None])[0] for h_D in h_BTD[0]])
        for one in steps:
            expected = {}
            for feature, size in SIZES.items():
                peak = max(float(acts_TF[t, feature]) for t in range(one.step.token_start, one.step.token_end)) / size
                if peak > FIRES:
                    expected[feature] = peak
            assert dict(one.fired) == pytest.approx(expected, rel=1e-4)
            values = [value for _, value in one.fired]
            assert values == sorted(values, reverse=True)
    acts_TF = sae.encode(read_residuals(loaded.model, [prompt], [rows[1]], sae.meta.layer)[0][0])
    assert 0 < float(acts_TF[:, 111].max()) / SIZES[111] < FIRES
    # Some features are on in the prompt or in other steps alone, and some fire too weakly to be shown.
    assert len({tuple(feature for feature, _ in one.fired) for one in found[0]}) > 1


def test_a_response_without_text_is_refused(loaded: LoadedModel, sae: SAE) -> None:
    with pytest.raises(InputError, match="hold no text"):
        fired_steps(loaded, sae, [[5]], [[loaded.tokenizer.eos_token_id]], SIZES)
