"""Prompts of the pack's form pass; each way of being of another form is named, with both forms."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mechreward.features import PackFeature, PackPrompt, pack_prompt, prompt_mismatch, sae_ref, template_hash
from mechreward.features.pack import FeaturePack
from mechreward.reward import FeatureReward
from mechreward.sae import SAE, SAEMeta

FORMAT = "Question: {question}\nAnswer:"


def chat(*messages: tuple[str, str]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in messages]


@given(question=st.text())
def test_any_question_in_the_format_fits(char_tokenizer, question: str) -> None:
    prompt = FORMAT.replace("{question}", question)
    assert prompt_mismatch(PackPrompt(format=FORMAT), [prompt], char_tokenizer) is None
    assert prompt_mismatch(PackPrompt(format=FORMAT, chat=True), [chat(("user", prompt))], char_tokenizer) is None
    assert prompt_mismatch(PackPrompt(), [question], char_tokenizer) is None


def test_the_words_of_the_format_are_no_pattern(char_tokenizer) -> None:
    asked = PackPrompt(format="(a.c) {question}")
    assert prompt_mismatch(asked, ["(a.c) 1?"], char_tokenizer) is None
    assert prompt_mismatch(asked, ["(abc) 1?"], char_tokenizer) is not None


WRONG = [
    (PackPrompt(format=FORMAT), "2+2=", r"plain prompts 'Question: .*', but is read on a plain prompt '2\+2='"),
    (PackPrompt(format=FORMAT), "Question: 2?\nAnswer: ", "a plain prompt"),
    (PackPrompt(format=FORMAT), "So: Question: 2?\nAnswer:", "a plain prompt"),
    (
        PackPrompt(),
        chat(("user", "2?")),
        r"plain prompts '\{question\}', but is read on a chat prompt \(roles user\) '2",
    ),
    (
        PackPrompt(chat=True),
        "2?",
        r"chat prompts '\{question\}' \(roles user; template unknown\), .* a plain prompt '2",
    ),
    (PackPrompt(chat=True), chat(("system", "Be brief."), ("user", "2?")), r"a chat prompt \(roles system, user\)"),
    (PackPrompt(format=FORMAT, chat=True), chat(("user", "2?")), r"a chat prompt \(roles user\) '2\?'"),
]


@pytest.mark.parametrize("asked, prompt, message", WRONG)
def test_another_form_is_named(char_tokenizer, asked: PackPrompt, prompt: object, message: str) -> None:
    found = prompt_mismatch(asked, [prompt], char_tokenizer)
    assert found is not None
    with pytest.raises(AssertionError, match=message):
        raise AssertionError(found)


def test_one_prompt_among_many_is_enough(char_tokenizer) -> None:
    fits = "Question: 1?\nAnswer:"
    found = prompt_mismatch(PackPrompt(format=FORMAT), [fits, fits, "x" * 200], char_tokenizer)
    assert found is not None and found.endswith("'" + "x" * 120 + "...'")


def test_another_chat_template(char_tokenizer) -> None:
    first, other, none = (copy.deepcopy(char_tokenizer) for _ in range(3))
    first.chat_template, other.chat_template, none.chat_template = "{{ a }}", "{{ b }}", None
    asked = pack_prompt("{question}", True, first)
    assert asked.template_hash == template_hash(first) != template_hash(other)
    prompts = [chat(("user", "2?"))]
    assert prompt_mismatch(asked, prompts, first) is None
    for here, name in ((other, str(template_hash(other))[:12]), (none, "unknown")):
        found = prompt_mismatch(asked, prompts, here)
        assert found is not None and str(asked.template_hash)[:12] in found and found.endswith(f"template is {name}")
    # Without chat no template is used, so that none is kept and none compared.
    plain = pack_prompt("{question}", False, first)
    assert plain.template_hash is None and prompt_mismatch(plain, ["2?"], other) is None
    unknown = PackPrompt(chat=True)
    assert prompt_mismatch(unknown, prompts, other) is None


def test_templates_by_name(char_tokenizer) -> None:
    named = copy.deepcopy(char_tokenizer)
    named.chat_template = {"default": "{{ a }}", "tools": "{{ b }}"}
    assert len(str(template_hash(named))) == 64


def test_a_reward_warns_once(char_tokenizer, caplog: pytest.LogCaptureFixture) -> None:
    eye = torch.eye(4)
    meta = SAEMeta(release="r", sae_id="s", layer=2, model_name="m", hook_name="")
    sae = SAE("relu", eye, torch.zeros(4), eye.clone(), torch.zeros(4), meta)
    fields = {"name": "p", "model_name": "", "sae": sae_ref(sae), "features": [PackFeature(id=0, weight=1, scale=1)]}
    with caplog.at_level(logging.WARNING, logger="mechreward"):
        FeatureReward(FeaturePack(**fields), sae).check_prompts(["2?"], char_tokenizer)
        reward = FeatureReward(FeaturePack(prompt=PackPrompt(format=FORMAT), **fields), sae, name="mine")
        reward.check_prompts(["Question: 1?\nAnswer:"], char_tokenizer)
        assert caplog.messages == []
        reward.check_prompts(["2?"], char_tokenizer)
        reward.check_prompts(["3?"], char_tokenizer)
    assert len(caplog.messages) == 1 and caplog.messages[0].startswith("mine: the pack was found on plain prompts")
