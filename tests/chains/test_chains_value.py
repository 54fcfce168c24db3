"""The value probe against a classifier fitted here on states read here."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from mechreward.chains import fit_value
from mechreward.errors import InputError
from mechreward.models import LoadedModel
from mechreward.rollout import Response


def made(n: int) -> list[Response]:
    rows = np.random.default_rng(0).integers(10, 40, (n, 5)).tolist()
    return [
        Response(f"q{i}", 0, (5, 6 + i % 3), tuple(ids[: 3 + i % 3]), "", (0.0,) * 5, "length", bool(ids[0] > 24))
        for i, ids in enumerate(rows)
    ]


@pytest.fixture
def loaded(tiny_llama, char_tokenizer) -> LoadedModel:
    return LoadedModel(tiny_llama, char_tokenizer, "llama")


def test_falls_are_differences_of_the_probes_value(loaded: LoadedModel) -> None:
    train, others = made(40)[:30], made(40)[30:]

    def states(response: Response) -> np.ndarray:
        ids = torch.tensor([[*response.prompt_ids, *response.completion_ids]])
        with torch.no_grad():
            hidden = loaded.model(ids, output_hidden_states=True).hidden_states[2]
        return hidden[0, len(response.prompt_ids) - 1 :].numpy()  # from the prompt's last token on

    h = np.concatenate([states(r) for r in train])
    y = np.concatenate([np.full(len(states(r)), r.correct) for r in train])
    scaler = StandardScaler().fit(h)
    reference = LogisticRegression(C=0.5, max_iter=500).fit(scaler.transform(h), y)
    got = fit_value(loaded, train, 1, penalty=2.0).falls(loaded, others, batch_size=3)
    for response, falls in zip(others, got, strict=True):
        value = reference.predict_proba(scaler.transform(states(response)))[:, 1]
        assert len(falls) == len(response.completion_ids)
        assert falls == pytest.approx((value[:-1] - value[1:]).tolist(), abs=2e-3)
        assert max(map(abs, falls)) > 0.01


def test_the_seed_draws_the_tokens_that_are_fitted(loaded: LoadedModel, monkeypatch) -> None:
    monkeypatch.setattr("mechreward.chains.value.MAX_TOKENS", 40)
    responses = made(30)
    one, same, other = (fit_value(loaded, responses, 1, seed=seed).falls(loaded, responses) for seed in (0, 0, 1))
    assert one == same != other


def test_bad_input_is_one_sentence(loaded: LoadedModel) -> None:
    responses = made(10)
    with pytest.raises(InputError, match="^responses: their verdicts are True; a value needs right and wrong ones"):
        fit_value(loaded, [r for r in responses if r.correct], 1)
    with pytest.raises(InputError, match="^responses: their verdicts are False, None, True; "):
        fit_value(loaded, [*responses, replace(responses[0], correct=None)], 1)
    with pytest.raises(InputError, match="^responses: their verdicts are nothing; "):
        fit_value(loaded, [], 1)
    with pytest.raises(InputError, match="^responses: one to q0 has an empty prompt"):
        fit_value(loaded, [replace(responses[0], prompt_ids=()), *responses[1:]], 1)
    with pytest.raises(InputError, match="^layer: 9 is out of range; the model has blocks 0 to 3$"):
        fit_value(loaded, responses, 9)
    for penalty in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(InputError, match=f"^penalty: {penalty} is not allowed; it must be above 0"):
            fit_value(loaded, responses, 1, penalty=penalty)


def test_the_probe_is_held_back_as_strongly_as_its_docstring_says(loaded: LoadedModel) -> None:
    found = [fit_value(loaded, made(30), 1, **options) for options in ({}, {"penalty": 20.0}, {"penalty": 2.0})]
    sizes = [float(np.linalg.norm(one.classifier[-1].coef_)) for one in found]
    assert sizes[0] == sizes[1] < sizes[2] and pytest.approx(0.05) == found[0].classifier[-1].C
