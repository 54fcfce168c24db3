"""Fine-tuning against AdamW steps written out by hand, and what may not be trained on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from peft import PeftModel

from mechreward.errors import InputError
from mechreward.models import LoadedModel
from mechreward.rollout import Response
from mechreward.steering.pairs import Pair, check_known, rejection_pairs
from mechreward.tasks import Question, QuestionSplit
from mechreward.training.finetune import FinetuneConfig, finetune

KNOWN = [Question(f"k{i}", f"{i}+{i}=", str(2 * i)) for i in range(3)]
UNKNOWN = [Question("u0", "7+8=", "15"), Question("u1", "a", "b")]
SPLIT = QuestionSplit(KNOWN, UNKNOWN)
# Of different lengths, so that padding and masks matter.
PAIRS = [
    Pair("k0", (0, 4, 47, 4, 48), (9, 8, 1), (5, 6, 7, 1), (1.0, 0.1, 0.7, 1.0)),
    Pair("k1", (0, 5, 47, 5), (6, 1), (7, 7, 1), (0.9, 0.0, 0.5)),
    Pair("k2", (0, 6, 47, 6, 48, 48), (10, 11, 12, 13, 1), (11, 1), (0.2, 1.0)),
]
LR, BETA = 1e-3, 0.5


@pytest.fixture
def loaded(tiny_llama, char_tokenizer) -> LoadedModel:
    return LoadedModel(copy.deepcopy(tiny_llama), char_tokenizer, "llama")


def logprobs(model: torch.nn.Module, prompt: Sequence[int], completion: Sequence[int]) -> torch.Tensor:
    """[T], of one unpadded row."""
    logits = model(torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[range(len(completion)), list(completion)]


def sft_loss(model, _reference) -> torch.Tensor:
    rows = [logprobs(model, pair.prompt_ids, pair.right_ids) for pair in PAIRS]
    return -torch.cat(rows).mean()


def dpo_loss(weighted: bool) -> Callable[..., torch.Tensor]:
    def loss(model, reference) -> torch.Tensor:
        total = torch.zeros(())
        for pair in PAIRS:
            sums = []
            for ids in (pair.right_ids, pair.wrong_ids):
                with torch.no_grad():
                    base = logprobs(reference, pair.prompt_ids, ids)
                sums.append(logprobs(model, pair.prompt_ids, ids) - base)
            weights = torch.tensor([1 - s for s in pair.wrong_scores]) if weighted else 1.0
            total = total - F.logsigmoid(BETA * (sums[0].sum() - (weights * sums[1]).sum()))
        return total / len(PAIRS)

    return loss


LOSSES = {"sft": sft_loss, "dpo": dpo_loss(weighted=False), "cdpo": dpo_loss(weighted=True)}


def by_hand(start: torch.nn.Module, loss: Callable[..., torch.Tensor], steps: int) -> torch.nn.Module:
    model = copy.deepcopy(start).train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.0)
    for _ in range(steps):
        loss(model, start).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.mark.parametrize("method", ["sft", "dpo", "cdpo"])
def test_two_steps_are_those_written_by_hand(method, loaded, tiny_llama) -> None:
    config = FinetuneConfig(epochs=2, batch_size=3, learning_rate=LR, beta=BETA)
    trained = finetune(loaded, PAIRS, method, SPLIT, config).model
    expected = by_hand(tiny_llama, LOSSES[method], 2)
    assert not trained.training
    for (name, mine), theirs, old in zip(
        trained.named_parameters(), expected.parameters(), tiny_llama.parameters(), strict=True
    ):
        # AdamW divides a gradient by its own size, so that of one that is all rounding a step is, too.
        off = (mine - theirs).abs()
        assert (off > LR / 20).float().mean() <= 0.005 and off.max() < LR / 4, f"{name}: {off.max()}"
        assert not torch.equal(mine, old)
    with torch.no_grad():
        assert LOSSES[method](trained, tiny_llama).item() == pytest.approx(
            LOSSES[method](expected, tiny_llama).item(), abs=2e-4
        )


@pytest.mark.parametrize("method", ["sft", "dpo", "cdpo"])
def test_lora_leaves_the_base_alone_and_moves_the_right_way(method, loaded, tiny_llama) -> None:
    config = FinetuneConfig(epochs=3, batch_size=3, learning_rate=1e-2, beta=BETA, lora_rank=2)
    trained = finetune(loaded, PAIRS, method, SPLIT, config).model
    assert isinstance(trained, PeftModel)
    with torch.no_grad():
        before, after = (
            [
                sum(float(logprobs(model, pair.prompt_ids, getattr(pair, side)).sum()) for pair in PAIRS)
                for side in ("right_ids", "wrong_ids")
            ]
            for model in (tiny_llama, trained)
        )
        assert after[0] - before[0] > max(0.0, after[1] - before[1])
        with trained.disable_adapter():
            assert float(LOSSES["sft"](trained, None)) == float(LOSSES["sft"](tiny_llama, None))


def refused(loaded, sentence: str, pairs=PAIRS, method="sft", **options) -> None:
    before = copy.deepcopy(loaded.model.state_dict())
    with pytest.raises(InputError, match=sentence):
        finetune(loaded, pairs, method, SPLIT, FinetuneConfig(**options) if options else None)
    assert all(torch.equal(before[name], value) for name, value in loaded.model.state_dict().items())


def test_nothing_of_unknown_can_enter_training(loaded) -> None:
    ids = char_ids(loaded, UNKNOWN[0].prompt)
    for method in ("sft", "dpo", "cdpo"):
        smuggled = [*PAIRS, replace(PAIRS[0], question_id="u1")]
        refused(loaded, "question u1 is UNKNOWN; only KNOWN questions may be trained on", smuggled, method)
        # Nor under another name: neither an unlisted one, nor that of a KNOWN question.
        renamed = [*PAIRS, replace(PAIRS[1], question_id="u1~names-0")]
        refused(loaded, "u1~names-0 is on neither side", renamed, method)
        copied = [*PAIRS, replace(PAIRS[2], prompt_ids=ids)]
        refused(loaded, "that of k2 has the prompt of UNKNOWN question u0", copied, method)


def test_an_id_on_both_sides_is_unknown(loaded) -> None:
    both = QuestionSplit([*KNOWN, UNKNOWN[0]], UNKNOWN)
    with pytest.raises(InputError, match="u0 is UNKNOWN"):
        check_known([replace(PAIRS[0], question_id="u0")], both, loaded)
    check_known(PAIRS, SPLIT, loaded)


def test_a_prompt_of_unknown_is_known_by_its_chat_template_too(loaded) -> None:
    tokenizer = copy.deepcopy(loaded.tokenizer)
    tokenizer.chat_template = "{% for turn in messages %}Q: {{ turn['content'] }}\nA:{% endfor %}"
    chatty = replace(loaded, tokenizer=tokenizer)
    copied = [replace(PAIRS[0], prompt_ids=char_ids(loaded, "Q: 7+8=\nA:"))]
    check_known(copied, SPLIT, chatty)
    with pytest.raises(InputError, match="that of k0 has the prompt of UNKNOWN question u0"):
        check_known(copied, SPLIT, chatty, chat=True)


def char_ids(loaded, text: str) -> tuple[int, ...]:
    return tuple(loaded.tokenizer(text)["input_ids"])


def test_bad_pairs_are_refused_before_anything_is_trained(loaded) -> None:
    plain = [Pair("k0", (4, 5), (6, 1))]
    refused(loaded, "pairs: there are none", [])
    refused(loaded, "method: 'ppo' is not known; use one of sft, dpo, cdpo", PAIRS, "ppo")
    refused(loaded, "that of k0 has no wrong response; dpo needs one, sft does not", plain, "dpo")
    refused(loaded, "that of k1 has 2 scores for 3 wrong tokens", [replace(PAIRS[1], wrong_scores=(0.1, 0.2))], "cdpo")
    refused(loaded, "that of k2 has a score outside 0 to 1", [replace(PAIRS[2], wrong_scores=(1.5, 0.0))], "cdpo")
    refused(loaded, "that of k0 has no prompt or no right response", [Pair("k0", (4,), ())])
    # The last pair: what comes before it would be trained on.
    long = replace(PAIRS[2], right_ids=(9,) * 251)
    refused(loaded, "a response of k2 has 257 tokens with its prompt; the model reads at most 256", [*PAIRS, long])
    stray = replace(PAIRS[2], prompt_ids=(0, 64))
    refused(loaded, "that of k2 holds token 64; the model knows 0 to 63", [*PAIRS, stray])
    wrong = {"wrong_ids": (9,) * 251, "wrong_scores": (0.5,) * 251}
    refused(loaded, "a response of k2 has 257 tokens", [*PAIRS, replace(PAIRS[2], **wrong)], "dpo")
    refused(loaded, "that of k0 holds token -1", [replace(PAIRS[0], wrong_ids=(-1, 4, 5, 1))], "cdpo")
    inf = float("inf")
    options = [("epochs", 0), ("batch_size", 0), ("learning_rate", 0.0), ("beta", 0.0), ("learning_rate", inf)]
    for field, value in (*options, ("beta", inf), ("seed", -1), ("seed", 2**32)):
        with pytest.raises(InputError, match=f"{field}: {value} is"):
            FinetuneConfig(**{field: value})
    with pytest.raises(InputError, match="lora_rank: -1"):
        FinetuneConfig(lora_rank=-1)


def test_a_pair_may_fill_the_context_and_sft_looks_at_no_wrong_response(loaded, tiny_llama) -> None:
    full = replace(PAIRS[0], right_ids=(9,) * 251, wrong_ids=(64,) * 300, wrong_scores=())
    trained = finetune(loaded, [full], "sft", SPLIT, FinetuneConfig(learning_rate=LR)).model
    start = dict(tiny_llama.named_parameters())
    assert all(not torch.equal(value, start[name]) for name, value in trained.named_parameters() if "proj" in name)


def response(question: str, sample: int, correct: bool) -> Response:
    return Response(question, sample, (4,), (5, sample, 1), "", (0.0,) * 3, "eos", correct)


def test_rejection_takes_right_responses_in_turns() -> None:
    responses = [response("a", i, True) for i in range(6)] + [response("b", i, i < 2) for i in range(6)]
    drawn = rejection_pairs(responses, 6, seed=3)
    assert [pair.question_id for pair in drawn].count("b") == 2
    assert {pair.question_id for pair in drawn[:2]} == {"a", "b"} == {pair.question_id for pair in drawn[2:4]}
    assert len({(pair.question_id, pair.right_ids) for pair in drawn}) == 6
    assert all(pair.right_ids[1] < 2 for pair in drawn if pair.question_id == "b")
    assert not any(pair.wrong_ids for pair in drawn)
    assert drawn == rejection_pairs(responses, 6, seed=3) != rejection_pairs(responses, 6, seed=4)
    for n in (0, 9):
        with pytest.raises(InputError, match="allowed are 1 to the 8 there are"):
            rejection_pairs(responses, n)
