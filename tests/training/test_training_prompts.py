"""The trainer says so, once, where the pack's features were found on prompts of another form than it trains on."""

from __future__ import annotations

import logging

import pytest

from mechreward.features import FeaturePack, PackFeature, PackPrompt, ReportedFigures, sae_ref
from mechreward.reward import FeatureReward


def pack_of(sae, **fields) -> FeaturePack:
    features = [PackFeature(id=3, weight=1.0, scale=1.0)]
    return FeaturePack(name="p", model_name="", sae=sae_ref(sae), features=features, **fields)


@pytest.mark.parametrize(
    ("prompt", "warnings"),
    [(None, 0), (PackPrompt(), 0), (PackPrompt(chat=True), 1), (PackPrompt(format="Question: {question}"), 1)],
)
def test_another_form_of_prompt_warns_once(
    tmp_path, model, sae, char_tokenizer, caplog, make, score, prompt: PackPrompt | None, warnings: int
) -> None:
    trainer = make(tmp_path, model, [FeatureReward(pack_of(sae, prompt=prompt), sae)], char_tokenizer)
    with caplog.at_level(logging.WARNING, logger="mechreward"):
        score(trainer)
        score(trainer)
    found = [message for message in caplog.messages if "is read on a plain prompt '12+3='" in message]
    assert len(found) == warnings


def test_figures_of_a_packs_authors_are_no_gate(tmp_path, model, sae, char_tokenizer, caplog, make) -> None:
    pack = pack_of(sae, reported=ReportedFigures(source="them", claims={"verdict": "PASS"}))
    make(tmp_path, model, [FeatureReward(pack, sae)], char_tokenizer)
    [warning] = [message for message in caplog.messages if "carries no passed gate" in message]
    assert "reported by its authors, not reproduced" in warning
