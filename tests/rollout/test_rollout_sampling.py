"""Sampling against forwards and loops of our own on tiny random models."""

from __future__ import annotations

import copy
import math
from collections import Counter
from dataclasses import replace

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from mechreward.errors import InputError
from mechreward.models import LoadedModel
from mechreward.rollout import continue_responses, sample_responses
from mechreward.rollout.decoding import Plan, Row, extend
from mechreward.tasks import Question

EOS, PAD = 1, 2
QUESTIONS = [Question(str(i), text, "1") for i, text in enumerate(["12+7=", "a", "sam has 3 +", "Q: x\nA:", "9"])]
ASK = {"n": 6, "max_new_tokens": 12, "seed": 3}


@pytest.fixture(scope="module")
def tiny_lora(tiny_llama):
    torch.manual_seed(7)
    model = get_peft_model(copy.deepcopy(tiny_llama), LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture(params=["tiny_llama", "tiny_qwen2", "tiny_gpt2", "tiny_lora"])
def loaded(request, char_tokenizer) -> LoadedModel:
    return LoadedModel(request.getfixturevalue(request.param), char_tokenizer, request.param)


@pytest.fixture
def llama(tiny_llama, char_tokenizer) -> LoadedModel:
    return LoadedModel(tiny_llama, char_tokenizer, "llama")


def with_eos(loaded: LoadedModel, ids: list[int]) -> LoadedModel:
    """The same model, ending on any of `ids`: as chat models do, and often enough to see ragged batches."""
    model = copy.deepcopy(loaded.model)
    model.generation_config.eos_token_id = ids
    return LoadedModel(model, loaded.tokenizer, loaded.name)


def forward_logprobs(model, prompt: tuple[int, ...], completion: tuple[int, ...]) -> torch.Tensor:
    """From one unpadded row: token t is predicted at the place before it."""
    with torch.no_grad():
        logits = model(torch.tensor([[*prompt, *completion]])).logits[0].double()
    values = [logits[len(prompt) + t - 1].log_softmax(-1)[token] for t, token in enumerate(completion)]
    return torch.stack(values)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5, "top_p": 0.7}], ids=["plain", "temperature"])
@pytest.mark.parametrize("batch_size", [4, 30])
def test_logprobs_are_those_of_the_model_at_temperature_one(
    loaded: LoadedModel, options: dict, batch_size: int
) -> None:
    """A batch of 30 is split when half have ended, so this also covers rows that go on in another batch."""
    many = with_eos(loaded, [EOS, *range(3, 12)])
    responses = sample_responses(many, QUESTIONS, batch_size=batch_size, **ASK, **options)
    assert len({len(r.completion_ids) for r in responses}) > 3
    for r in responses:
        want = forward_logprobs(loaded.model, r.prompt_ids, r.completion_ids)
        torch.testing.assert_close(torch.tensor(r.logprobs).double(), want, atol=1e-4, rtol=1e-4)


def test_responses_are_ordered_and_carry_what_was_asked(llama: LoadedModel) -> None:
    responses = sample_responses(llama, QUESTIONS, **ASK)
    assert [(r.question_id, r.sample) for r in responses] == [(str(q), s) for q in range(5) for s in range(6)]
    for r in responses:
        question = QUESTIONS[int(r.question_id)]
        assert list(r.prompt_ids) == llama.tokenizer(question.prompt)["input_ids"]
        assert r.text == llama.tokenizer.decode(r.completion_ids, skip_special_tokens=True)
        assert len(r.logprobs) == len(r.completion_ids) and r.correct is None
    assert len({r.completion_ids for r in responses}) > 20


def test_rows_end_at_the_first_eos_of_any_kind_and_hold_no_pads(llama: LoadedModel) -> None:
    eos = [EOS, 20, 21, 22, 23, 24, 25, 26]
    # Pads are never drawn here, so any in a response would be padding.
    model = with_eos(llama, eos)
    with torch.no_grad():
        head = model.model.get_output_embeddings()
        head.bias = nn.Parameter(torch.zeros(64).index_fill(0, torch.tensor([PAD]), -1e9))
    responses = sample_responses(model, QUESTIONS, **ASK)
    assert {r.finish for r in responses} == {"eos", "length"}
    for r in responses:
        assert PAD not in r.completion_ids
        assert not set(eos) & set(r.completion_ids[:-1])
        assert (r.completion_ids[-1] in eos) == (r.finish == "eos")
        assert len(r.completion_ids) == 12 if r.finish == "length" else len(r.completion_ids) <= 12
    assert any(r.finish == "eos" and len(r.completion_ids) < 12 for r in responses)


def test_a_pad_that_is_the_eos_token_ends_rows_once(llama: LoadedModel) -> None:
    """Models without a pad token: generate then fills ended rows with EOS."""
    tokenizer = copy.deepcopy(llama.tokenizer)
    tokenizer.pad_token = tokenizer.eos_token
    model = with_eos(llama, [EOS])
    with torch.no_grad():
        model.model.get_output_embeddings().bias = nn.Parameter(torch.zeros(64).index_fill(0, torch.tensor([EOS]), 9.0))
    responses = sample_responses(LoadedModel(model.model, tokenizer, "x"), QUESTIONS, **ASK)
    ended = [r for r in responses if r.finish == "eos"]
    assert len(ended) > 5 and all(r.completion_ids.count(EOS) == 1 for r in ended)


def test_the_seed_decides_and_the_global_random_state_is_left(llama: LoadedModel) -> None:
    torch.manual_seed(11)
    before = torch.get_rng_state()
    first = sample_responses(llama, QUESTIONS, **ASK)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(12)
    assert sample_responses(llama, QUESTIONS, **ASK) == first
    other = sample_responses(llama, QUESTIONS, **{**ASK, "seed": 4})
    assert [r.completion_ids for r in other] != [r.completion_ids for r in first]


@pytest.mark.parametrize("batch_size", [1, 5])
def test_greedy_equals_a_loop_without_cache_or_padding(loaded: LoadedModel, batch_size: int) -> None:
    responses = sample_responses(loaded, QUESTIONS, n=1, max_new_tokens=8, temperature=0.0, batch_size=batch_size)
    for r in responses:
        ids = list(r.prompt_ids)
        for _ in range(8):
            with torch.no_grad():
                ids.append(int(loaded.model(torch.tensor([ids])).logits[0, -1].argmax()))
            if ids[-1] == EOS:
                break
        assert list(r.completion_ids) == ids[len(r.prompt_ids) :]


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0}, {"top_p": 0.5}], ids=["plain", "hot", "nucleus"])
def test_first_tokens_are_drawn_from_the_distribution_asked_for(llama: LoadedModel, options: dict) -> None:
    """The model's own generation defaults would cut or sharpen it; they must not count."""
    model = copy.deepcopy(llama.model)
    model.generation_config.update(top_k=2, temperature=0.1, do_sample=True, repetition_penalty=5.0, min_p=0.3)
    loaded = LoadedModel(model, llama.tokenizer, "x")
    drawn = sample_responses(loaded, QUESTIONS[:1], n=4000, max_new_tokens=1, batch_size=4000, **options)
    with torch.no_grad():
        p = (model(torch.tensor([drawn[0].prompt_ids])).logits[0, -1] / options.get("temperature", 1.0)).softmax(-1)
    if "top_p" in options:
        order = p.argsort(descending=True)
        inside = order[: int((p[order].cumsum(0) < 0.5).sum()) + 1]
        p = torch.zeros_like(p).index_copy(0, inside, p[inside])
        p /= p.sum()
    counts = Counter(r.completion_ids[0] for r in drawn)
    for token, share in enumerate(p.tolist()):
        assert abs(counts[token] / 4000 - share) <= 5 * math.sqrt(share * (1 - share) / 4000) + 1e-9
    assert model.generation_config.top_k == 2  # and they are put back


def never_ending(model):
    model = copy.deepcopy(model)
    bias = torch.zeros(64).index_fill(0, torch.tensor([EOS]), -1e9)
    model.get_output_embeddings().bias = nn.Parameter(bias, requires_grad=False)
    return model


def test_a_stretch_stops_when_half_of_a_large_batch_has_ended(tiny_llama) -> None:
    rows = [Row(0, i, [0, 5 + i]) for i in range(16)]
    for row in rows[:4]:
        row.ids = [7] * 9  # room for one more token
    for row in rows[4:9]:
        row.ids = [7] * 7
    extend(never_ending(tiny_llama), rows, Plan((EOS,), PAD, 10, 1.0, 1.0))
    # After three tokens 4 + 5 rows are full, more than half; the other seven keep their three.
    assert [len(row.ids) for row in rows] == [10] * 9 + [3] * 7
    assert [len(row.logprobs) for row in rows] == [1] * 4 + [3] * 12


def test_a_stretch_goes_on_when_reading_again_would_cost_more(tiny_llama) -> None:
    rows = [Row(0, i, [0] * 60) for i in range(16)]
    for row in rows[:9]:
        row.ids = [7] * 7
    extend(never_ending(tiny_llama), rows, Plan((EOS,), PAD, 10, 1.0, 1.0))
    assert [len(row.ids) for row in rows] == [10] * 16


def test_on_batch_sees_every_response_once(llama: LoadedModel) -> None:
    batches = []
    responses = sample_responses(
        with_eos(llama, [EOS, *range(3, 12)]), QUESTIONS, batch_size=16, on_batch=batches.append, **ASK
    )
    seen = [response for batch in batches for response in batch]
    assert len(batches) > 2 and len(seen) == 30
    assert sorted(seen, key=lambda r: (r.question_id, r.sample)) == responses


def test_chat_puts_the_prompt_into_the_template(llama: LoadedModel) -> None:
    tokenizer = copy.deepcopy(llama.tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}?{% endfor %}{% if add_generation_prompt %}A:{% endif %}"
    )
    loaded = LoadedModel(llama.model, tokenizer, "x")
    r = sample_responses(loaded, QUESTIONS[:1], n=1, max_new_tokens=2, chat=True)[0]
    assert tokenizer.decode(r.prompt_ids) == "12+7=?A:"
    with pytest.raises(InputError, match="^chat: the tokenizer of llama has no chat template"):
        sample_responses(llama, QUESTIONS, n=1, max_new_tokens=2, chat=True)


def test_a_training_model_is_sampled_in_evaluation_mode_and_left_in_training_mode(tiny_gpt2, char_tokenizer) -> None:
    model = copy.deepcopy(tiny_gpt2)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    quiet = sample_responses(LoadedModel(model.eval(), char_tokenizer, "x"), QUESTIONS, **ASK)
    loud = sample_responses(LoadedModel(model.train(), char_tokenizer, "x"), QUESTIONS, **ASK)
    assert quiet == loud and all(module.training for module in model.modules())


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"n": 0}, "n: 0 is too small"),
        ({"max_new_tokens": 0}, "max_new_tokens: 0 is too small"),
        ({"batch_size": 0}, "batch_size: 0 is too small"),
        ({"temperature": -1.0}, "temperature: -1.0 is not allowed"),
        ({"temperature": float("nan")}, "temperature: nan is not allowed"),
        ({"top_p": 0.0}, "top_p: 0.0 is out of range"),
        ({"top_p": 1.1}, "top_p: 1.1 is out of range"),
        ({"temperature": 0.0, "n": 2}, "n: 2 greedy responses"),
        ({"max_new_tokens": 251}, "questions: 2 needs 11 prompt tokens + 251 new ones; the model reads at most 256"),
        ({"questions": [Question("e", "", "1")]}, "questions: the prompt of e has no tokens"),
    ],
)
def test_bad_arguments_are_one_sentence(llama: LoadedModel, options: dict, sentence: str) -> None:
    arguments = {"questions": QUESTIONS, "n": 1, "max_new_tokens": 4, **options}
    with pytest.raises(InputError) as caught:
        sample_responses(llama, **arguments)
    assert str(caught.value).startswith(sentence)


def test_a_tokenizer_of_a_larger_vocabulary_is_refused(llama: LoadedModel) -> None:
    tokenizer = copy.deepcopy(llama.tokenizer)
    tokenizer.add_tokens(["€"])
    with pytest.raises(InputError, match="tokenizer: it gave token 64 for q; the model knows 0 to 63"):
        sample_responses(LoadedModel(llama.model, tokenizer, "x"), [Question("q", "5€", "1")], n=1, max_new_tokens=2)


def test_continuing_keeps_what_was_kept_and_draws_the_rest_anew(llama: LoadedModel) -> None:
    many = with_eos(llama, [EOS, *range(3, 12)])
    responses = [r for r in sample_responses(many, QUESTIONS, **ASK) if len(r.completion_ids) > 4][:6]
    starts = [i % 5 for i in range(len(responses))]
    many_more = continue_responses(many, responses, starts, n=5, max_new_tokens=12, batch_size=7, seed=1)
    assert [len(group) for group in many_more] == [5] * len(responses)
    for response, start, group in zip(responses, starts, many_more, strict=True):
        assert [r.sample for r in group] == [0, 1, 2, 3, 4]
        assert {(r.question_id, r.prompt_ids) for r in group} == {(response.question_id, response.prompt_ids)}
        for r in group:
            assert r.completion_ids[:start] == response.completion_ids[:start]
            assert r.text == llama.tokenizer.decode(r.completion_ids, skip_special_tokens=True)
            want = forward_logprobs(llama.model, r.prompt_ids, r.completion_ids)
            torch.testing.assert_close(torch.tensor(r.logprobs).double(), want, atol=1e-4, rtol=1e-4)
            assert (r.completion_ids[-1] in [EOS, *range(3, 12)]) == (r.finish == "eos")
        assert len({r.completion_ids for r in group}) > 1


def test_greedy_from_anywhere_is_greedy_from_the_start(loaded: LoadedModel) -> None:
    greedy = {"n": 1, "max_new_tokens": 8, "temperature": 0.0}
    responses = sample_responses(loaded, QUESTIONS, **greedy)
    for start in (0, 3, 7):
        starts = [min(start, len(r.completion_ids)) for r in responses]
        again = continue_responses(loaded, responses, starts, **greedy)
        assert [group[0].completion_ids for group in again] == [r.completion_ids for r in responses]


def test_a_response_that_is_kept_whole_is_drawn_no_further(llama: LoadedModel) -> None:
    responses = sample_responses(with_eos(llama, [EOS, *range(3, 12)]), QUESTIONS, **ASK)
    ended = next(r for r in responses if r.finish == "eos")
    cut = next(r for r in responses if r.finish == "length")
    many = with_eos(llama, [EOS, *range(3, 12)])
    starts = [len(ended.completion_ids), 12]
    groups = continue_responses(many, [ended, cut], starts, n=2, max_new_tokens=12)
    for response, group in zip([ended, cut], groups, strict=True):
        kept = (response.completion_ids, response.logprobs, response.finish, response.text)
        assert [(r.completion_ids, r.logprobs, r.finish, r.text) for r in group] == [kept] * 2
    assert continue_responses(many, [], [], n=2, max_new_tokens=12) == []


def test_continuations_follow_the_distribution_after_the_kept_tokens(llama: LoadedModel) -> None:
    response = sample_responses(llama, QUESTIONS[:1], n=1, max_new_tokens=4)[0]
    drawn = continue_responses(llama, [response], [2], n=3000, max_new_tokens=3, batch_size=3000, seed=2)[0]
    with torch.no_grad():
        ids = torch.tensor([[*response.prompt_ids, *response.completion_ids[:2]]])
        p = llama.model(ids).logits[0, -1].softmax(-1)
    counts = Counter(r.completion_ids[2] for r in drawn)
    for token, share in enumerate(p.tolist()):
        assert abs(counts[token] / 3000 - share) <= 5 * math.sqrt(share * (1 - share) / 3000) + 1e-9


@pytest.mark.parametrize(
    ("starts", "options", "sentence"),
    [
        ([-1], {}, "starts: -1 is out of range for a response to 0; allowed are 0 to 4"),
        ([5], {}, "starts: 5 is out of range for a response to 0; allowed are 0 to 4"),
        ([3], {"max_new_tokens": 2}, "starts: 3 is out of range for a response to 0; allowed are 0 to 2"),
        ([1, 1], {}, "starts: 2 are given for 1 responses; give one each"),
        ([1], {"max_new_tokens": 252}, "questions: 0 needs 5 prompt tokens + 252 new ones"),
        ([1], {"n": 0}, "n: 0 is too small"),
    ],
)
def test_bad_starts_are_one_sentence(llama: LoadedModel, starts: list[int], options: dict, sentence: str) -> None:
    responses = sample_responses(never_ending_loaded(llama), QUESTIONS[:1], n=1, max_new_tokens=4)
    with pytest.raises(InputError) as caught:
        continue_responses(llama, responses, starts, **{"n": 1, "max_new_tokens": 8, **options})
    assert str(caught.value).startswith(sentence)


@pytest.mark.parametrize("token", [64, -1])
def test_a_kept_token_that_the_model_does_not_know_is_one_sentence(llama: LoadedModel, token: int) -> None:
    """Of another model's responses; on a GPU it would be a device assertion, after which nothing works."""
    response = sample_responses(never_ending_loaded(llama), QUESTIONS[:1], n=1, max_new_tokens=4)[0]
    foreign = replace(response, completion_ids=(*response.completion_ids[:2], token))
    with pytest.raises(InputError, match=f"^responses: one to 0 holds token {token}; the model knows 0 to 63; "):
        continue_responses(llama, [foreign], [3], n=1, max_new_tokens=8)
    assert continue_responses(llama, [foreign], [2], n=1, max_new_tokens=3)  # what is not kept does not matter


def never_ending_loaded(loaded: LoadedModel) -> LoadedModel:
    return LoadedModel(never_ending(loaded.model), loaded.tokenizer, loaded.name)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nan_logits_are_one_sentence(tiny_llama, char_tokenizer, temperature) -> None:
    broken = copy.deepcopy(tiny_llama)
    broken.get_decoder().layers[-1].mlp.down_proj.weight.data[0, 0] = math.nan
    with pytest.raises(InputError, match="model: its logits are NaN after the prompt; check its weights and dtype"):
        sample_responses(
            LoadedModel(broken, char_tokenizer, "broken"), QUESTIONS, n=1, max_new_tokens=4, temperature=temperature
        )
