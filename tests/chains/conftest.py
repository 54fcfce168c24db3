"""Tokenizers of each kind, made here, and sampled chains of the bundled reasoner."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from mechreward.models import LoadedModel, load_model
from mechreward.rollout import Response, sample_responses, verify_responses
from mechreward.tasks import Question
from mechreward.tiny import MODEL
from mechreward.tiny.world import Problem, make_problem, write_chain
from mechreward.verifiers import gsm8k_exact_match

CORPUS = [
    "Mr. Smith has 3.14 apples. He eats one, e.g. a red one.\n\nSo $x = 1.5$ and \\[ a = b \\] holds.",
    "1. Compute 12 + 3 = 15.\n2. Then 15 - 4 = 11.\n```python\nprint(11)\n```\nThe answer is 11.",
    "Is it so? Yes! It is … 好。行。 naïve café → 7 €.",
] * 4  # fmt: skip


def byte_level() -> PreTrainedTokenizerFast:
    """GPT-2's kind: bytes, spaces in front of words, several tokens a character where it has several bytes."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, special_tokens=["<|end|>"])
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>", pad_token="<|end|>")


def sentence_piece() -> PreTrainedTokenizerFast:
    """Llama 2's kind: `▁` for spaces, one prepended to the text and dropped again, bytes for what it does not know."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer.train_from_iterator(
        ["Mr. Smith has 3 apples. He eats one.\n so 12 + 3 = 15"] * 4,
        trainers.BpeTrainer(vocab_size=330, special_tokens=special),
    )
    # Byte tokens have to be ordinary ones: special tokens are skipped while decoding.
    state = tokenizer.to_str()
    tokenizer = Tokenizer.from_str(_ordinary_bytes(state))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _ordinary_bytes(state: str) -> str:
    content = json.loads(state)
    content["added_tokens"] = [token for token in content["added_tokens"] if not token["content"].startswith("<0x")]
    return json.dumps(content)


@pytest.fixture(scope="session")
def tokenizers(char_tokenizer) -> dict[str, PreTrainedTokenizerFast]:
    return {"bytes": byte_level(), "pieces": sentence_piece(), "characters": char_tokenizer}


@dataclass(frozen=True)
class Sampled:
    """Responses of the bundled reasoner to fresh `long` problems, verified, and the truth of each."""

    loaded: LoadedModel
    questions: list[Question]
    problems: dict[str, Problem]
    responses: list[Response]

    def problem(self, response: Response) -> Problem:
        return self.problems[response.question_id]


def sample_world(n_questions: int, n: int, seed: int, setting: str = "long") -> Sampled:
    loaded, rng = load_model(str(MODEL)), random.Random(f"chains-{setting}-{seed}")
    problems = {f"q{i}": make_problem(setting, rng) for i in range(n_questions)}
    questions = [
        Question(name, p.prompt, str(p.answer), write_chain(p, (False,) * len(p.days))) for name, p in problems.items()
    ]
    responses = sample_responses(loaded, questions, n=n, max_new_tokens=192, seed=seed)
    return Sampled(loaded, questions, problems, verify_responses(responses, questions, gsm8k_exact_match))


@pytest.fixture(scope="session")
def sampled() -> Sampled:
    return sample_world(8, 3, seed=0)


@pytest.fixture(scope="session")
def easy() -> Sampled:
    """Chains of one day: right half of the time, and short."""
    return sample_world(3, 4, seed=1, setting="easy")
