"""ReasonScore against the paper's formula by loops, and windows worked out by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from copy import deepcopy

import numpy as np
import pytest
import torch
from scipy import stats
from statsmodels.stats.multitest import multipletests
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mechreward.errors import InputError
from mechreward.features.halves import stability
from mechreward.features.means import QuestionMeans, varies
from mechreward.features.reasonscore import (
    DEFAULT_REASONING_VOCAB,
    Windows,
    compute_reasonscore,
    resolve_vocab_token_ids,
)
from mechreward.features.reasonscore_table import reasonscore_table
from mechreward.models import LoadedModel
from mechreward.rollout import Response, prompt_hashes
from mechreward.sae import SAE

VOCAB = {"wait": [7], "let me": [(3, 4)], "hmm": [8, (9, 9, 9)], "never": [63]}


def on(mask: torch.Tensor) -> list[int]:
    return mask.nonzero()[:, 0].tolist()


def test_windows_by_hand() -> None:
    tokens = torch.tensor([1, 2, 7, 5, 5, 5, 5, 3, 5, 3, 4, 5, 5, 5, 5])
    inside, outside, wait, let_me, hmm, never = Windows(VOCAB, 2, 3).rows(tokens)
    assert on(wait) == [0, 1, 2, 3, 4, 5]
    # The 3 at place 7 stands alone and is no "let me"; that of 9 and 10 reaches from 7 to 13.
    assert on(let_me) == [7, 8, 9, 10, 11, 12, 13]
    assert on(hmm) == on(never) == []
    assert on(inside) == [0, 1, 2, 3, 4, 5, 7, 8, 9, 10, 11, 12, 13]
    assert on(outside) == [6, 14]
    assert on(Windows(VOCAB, 0, 0).rows(torch.tensor([9, 9, 9, 9, 1]))[4]) == [0, 1, 2, 3]
    assert on(Windows(VOCAB, 0, 1).rows(torch.tensor([9, 9]))[4]) == []


def samples(seed: int, n: int, width: int = 32) -> list[tuple[torch.Tensor, torch.Tensor]]:
    rng = torch.Generator().manual_seed(seed)
    made = []
    for _ in range(n):
        length = int(torch.randint(20, 40, (1,), generator=rng))
        tokens = torch.randint(1, 12, (length,), generator=rng)
        made.append((torch.randn(length, width, generator=rng), tokens))
    return made


def naive(
    acts: list[np.ndarray], texts: list[list[int]], vocab: dict[str, list], before: int, after: int, alpha: float,
    more: list[np.ndarray] = (), more_texts: list[list[int]] = (),
) -> list[tuple[float, float, float, float]]:  # fmt: skip
    """s_i of arXiv 2503.18878, token by token."""

    def near(text: list[int], word: str) -> set[int]:
        found: set[int] = set()
        for spelling in vocab[word]:
            ids = [spelling] if isinstance(spelling, int) else list(spelling)
            for start in range(len(text)):
                if text[start : start + len(ids)] == ids:
                    found |= set(range(start - before, start + len(ids) + after))
        return found & set(range(len(text)))

    def mean(rows: list[np.ndarray]) -> np.ndarray:
        return np.mean(rows, axis=0) if rows else np.zeros(acts[0].shape[1])

    inside, outside, words = [], [], {word: [] for word in vocab}
    for act, text in zip(acts, texts, strict=True):
        every = set().union(*(near(text, word) for word in vocab))
        for place in range(len(text)):
            (inside if place in every else outside).append(act[place])
            for word in vocab:
                if place in near(text, word):
                    words[word].append(act[place])
    for act, text in zip(more, more_texts, strict=True):
        every = set().union(*(near(text, word) for word in vocab))
        outside += [act[place] for place in range(len(text)) if place not in every]
    plus, minus, by_word = mean(inside), mean(outside), np.stack([mean(rows) for rows in words.values()])
    result = []
    for i in range(len(plus)):
        entropy = 0.0
        for value in by_word[:, i]:
            q = value / by_word[:, i].sum() if value > 0 else 0.0
            entropy -= q * math.log(q) if q > 0 else 0.0
        entropy /= math.log(len(vocab))
        p, m = plus[i] / plus.sum(), minus[i] / minus.sum()
        result.append((p * entropy**alpha - m, entropy, p, m))
    return result


@pytest.mark.parametrize("with_baseline", [False, True])
def test_it_is_the_paper_s_formula(with_baseline: bool, random_sae: Callable[..., SAE]) -> None:
    sae, texts, more = random_sae("topk"), samples(0, 5), samples(1, 3) if with_baseline else []
    found = compute_reasonscore(sae, iter(texts), iter(more), VOCAB, 1, 2, entropy_alpha=0.4)
    expected = naive(
        [sae.encode(h).double().numpy() for h, _ in texts], [t.tolist() for _, t in texts], VOCAB, 1, 2, 0.4,
        [sae.encode(h).double().numpy() for h, _ in more], [t.tolist() for _, t in more],
    )  # fmt: skip
    for score in found:
        numbers = (score.reason_score, score.entropy, score.prob_reasoning, score.prob_baseline)
        assert numbers == pytest.approx(expected[score.feature_id], abs=1e-6)
    values = [score.reason_score for score in found]
    assert values == sorted(values, reverse=True) and len(found) == 48
    assert compute_reasonscore(sae, texts, more, VOCAB, 1, 2, 0.4, top_k=3) == found[:3]
    assert 0 < min(e[1] for e in expected if e[2] > 0.01) < 1


def test_defaults_are_the_paper_s(random_sae: Callable[..., SAE]) -> None:
    sae, texts = random_sae("relu"), samples(2, 4)
    assert compute_reasonscore(sae, texts, [], VOCAB) == compute_reasonscore(sae, texts, [], VOCAB, 2, 3, 0.7)
    assert len(DEFAULT_REASONING_VOCAB) == 10 and "let me" in DEFAULT_REASONING_VOCAB


def test_words_are_spelt_whole(char_tokenizer: PreTrainedTokenizerFast) -> None:
    a, b, space = char_tokenizer.convert_tokens_to_ids(["a", "b", " "])
    found = resolve_vocab_token_ids(char_tokenizer, ["a", "ab", " b"])
    assert set(found) == {"a", "ab", " b"}
    assert sorted(found["a"], key=str) == sorted([a, (space, a)], key=str)
    assert sorted(found["ab"]) == sorted([(a, b), (space, a, b)])
    assert found[" b"] == [(space, b)]
    assert resolve_vocab_token_ids(char_tokenizer, ["a"], add_leading_space=False) == {"a": [a]}
    with pytest.raises(InputError, match="cannot spell 'é'"):
        resolve_vocab_token_ids(char_tokenizer, ["é"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"reasoning_vocab": {"a": [62], "b": [63]}}, "none of its words occurs"),
        ({"reasoning_vocab": {"a": [1]}}, "1 words have no entropy"),
        ({"reasoning_vocab": {"a": [1], "b": []}}, "'b' has no token ids"),
        ({"context_before": 99, "context_after": 99}, "the windows take in every token"),
        ({"context_before": -1}, "-1 before and 3 after are not allowed"),
        ({"top_k": 0}, "top_k: 0 is not allowed"),
        ({"entropy_alpha": -1.0}, "entropy_alpha: -1.0 is not allowed"),
        ({"entropy_alpha": float("nan")}, "entropy_alpha: nan is not allowed"),
        ({"reasoning_samples": [(torch.zeros(3, 32), torch.zeros(4, dtype=torch.long))]}, "do not fit"),
        ({"reasoning_samples": [(torch.zeros(3, 16), torch.tensor([7, 1, 1]))]}, "the SAE reads width 32"),
    ],
)
def test_bad_input(change: dict[str, object], sentence: str, random_sae: Callable[..., SAE]) -> None:
    options = {"reasoning_samples": samples(0, 2), "baseline_samples": [], "reasoning_vocab": VOCAB} | change
    with pytest.raises(InputError, match=sentence):
        compute_reasonscore(random_sae("relu"), **options)  # type: ignore[arg-type]


def answers(tokenizer: PreTrainedTokenizerFast) -> list[Response]:
    rng = np.random.default_rng(0)
    rows = []
    for i in range(10):
        text = rng.choice(list("abcde12345"), 24)
        text[[3, 15]] = rng.choice(["X", "Y"], 2) if "X" in tokenizer.get_vocab() else ["I", "J"]
        ids = tokenizer.encode("".join(text), add_special_tokens=False)
        rows.append(Response(f"q{i % 4}", i, (0, 5), tuple(ids), "", (0.0,) * len(ids), "length", None))
    return rows


def test_table_of_a_models_own_answers(
    tiny_llama: PreTrainedModel, char_tokenizer: PreTrainedTokenizerFast, random_sae: Callable[..., SAE]
) -> None:
    model, sae, rows = deepcopy(tiny_llama), random_sae("topk"), answers(char_tokenizer)
    massive = char_tokenizer.convert_tokens_to_ids("a")
    with torch.no_grad():
        model.model.embed_tokens.weight[massive] *= 1000
    words = ["I", "J", "1"]
    table = reasonscore_table(
        LoadedModel(model, char_tokenizer, "tiny"), sae, rows, words=words, context_before=1, context_after=1,
        min_support=0.5, top_k=5, halves=4, batch_size=2,
    )  # fmt: skip
    assert (table.method, table.n_questions, table.n_responses) == ("reasonscore", 4, 10)
    assert (table.pooling, table.prompts) == ("mean", prompt_hashes([[0, 5]]))
    acts, texts = [], []
    for row in rows:
        with torch.no_grad():
            ids = torch.tensor([[*row.prompt_ids, *row.completion_ids]])
            h_TD = model(ids, output_hidden_states=True).hidden_states[2][0, 2:]
        acts.append(sae.encode(h_TD).double().numpy())
        texts.append(list(row.completion_ids))
    vocab = resolve_vocab_token_ids(char_tokenizer, words)
    kept = [[t for t, token in enumerate(text) if token != massive] for text in texts]
    sums = naive_kept(acts, texts, kept, vocab)
    frame = table.frame.set_index("id").sort_index()
    plus, minus, by_word = sums["inside"], sums["outside"], sums["words"]
    p, m = plus / plus.sum(), minus / minus.sum()
    q = by_word / np.maximum(by_word.sum(0), 1e-300)
    entropy = -np.where(q > 0, q * np.log(np.where(q > 0, q, 1)), 0).sum(0) / np.log(3)
    np.testing.assert_allclose(frame["effect"], p * entropy**0.7 - m, atol=1e-6)
    np.testing.assert_allclose(frame["entropy"], entropy, atol=1e-5)
    names = np.array([row.question_id for row in rows])
    per_question = np.stack([sums["share"][name] for name in np.unique(names)])
    least_p = 2.0 ** (1 - (np.abs(per_question) > 1e-9).sum(0))
    expected_p = np.maximum(stats.ttest_1samp(per_question, 0).pvalue, least_p)
    live = ~np.isnan(expected_p)
    np.testing.assert_allclose(frame["p_value"][live], expected_p[live], rtol=1e-3, atol=1e-5)
    means = np.stack([act[keep].mean(0) for act, keep in zip(acts, kept, strict=True)])
    support = (means > 0).mean(0)
    np.testing.assert_allclose(frame["support"], support)
    # A score of another sign than what p tests is not tested; there is one.
    same = np.sign(frame["effect"].to_numpy()) == np.sign(per_question.mean(0))
    assert ((support >= 0.5) & ~same).any()
    tested = (support >= 0.5) & same
    np.testing.assert_allclose(
        frame["q_value"][tested], multipletests(frame["p_value"][tested], method="fdr_bh")[1], rtol=1e-9
    )
    assert (frame["q_value"][~tested] == 1).all()
    spread = sum(((means[names == n] - means[names == n].mean(0)) ** 2).sum(0) for n in np.unique(names))
    np.testing.assert_allclose(frame["scale"], np.sqrt(spread / (10 - 4)), rtol=1e-3, atol=1e-6)
    assert frame["stability"].max() <= 1 and 0 < frame["stability"].sum() <= 10


def naive_kept(
    acts: list[np.ndarray], texts: list[list[int]], kept: list[list[int]], vocab: dict[str, list]
) -> dict[str, object]:
    """Means over kept tokens with windows of one before and one after; shares by question of rows i, i + 4, ..."""
    inside, outside, words = [], [], {word: [] for word in vocab}
    by_question: dict[str, tuple[list, list]] = {}
    for at, (act, text, keep) in enumerate(zip(acts, texts, kept, strict=True)):
        hits: dict[str, set[int]] = {word: set() for word in vocab}
        for word, spellings in vocab.items():
            for spelling in spellings:
                ids = [spelling] if isinstance(spelling, int) else list(spelling)
                for start in range(len(text)):
                    if text[start : start + len(ids)] == ids:
                        hits[word] |= set(range(start - 1, start + len(ids) + 1))
        every = set().union(*hits.values())
        pair = by_question.setdefault(f"q{at % 4}", ([], []))
        for place in keep:
            (inside if place in every else outside).append(act[place])
            pair[0 if place in every else 1].append(act[place])
            for word, found in hits.items():
                if place in found:
                    words[word].append(act[place])
    share = {}
    for name, (near, far) in by_question.items():
        plus, minus = np.mean(near, axis=0), np.mean(far, axis=0)
        share[name] = plus / plus.sum() - minus / minus.sum()
    return {
        "inside": np.mean(inside, axis=0),
        "outside": np.mean(outside, axis=0),
        "words": np.stack([np.mean(rows, axis=0) for rows in words.values()]),
        "share": share,
    }


def test_a_table_needs_words_and_questions(
    tiny_llama: PreTrainedModel, char_tokenizer: PreTrainedTokenizerFast, random_sae: Callable[..., SAE]
) -> None:
    policy, rows = LoadedModel(tiny_llama, char_tokenizer, "tiny"), answers(char_tokenizer)
    with pytest.raises(InputError, match="none of its words occurs"):
        reasonscore_table(policy, random_sae("relu"), rows, words=["zz", "yy"])
    with pytest.raises(InputError, match="1 questions have tokens inside and outside"):
        reasonscore_table(policy, random_sae("relu"), rows[::4], words=["I", "J"])
    with pytest.raises(InputError, match="4 answers are to 4"):
        reasonscore_table(policy, random_sae("relu"), rows[:4], words=["I", "J"])
    with pytest.raises(InputError, match="but tiny has width 32"):
        reasonscore_table(policy, random_sae("relu", d=16), rows, words=["I", "J"])
    with pytest.raises(InputError, match="entropy_alpha: -1.0 is not allowed"):
        reasonscore_table(policy, random_sae("relu"), rows, words=["I", "J"], entropy_alpha=-1.0)


def test_question_means_equal_scipy() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(0.3, 1, (9, 5))
    values[:, 3], values[:, 4] = 0.0, 0.7
    means = QuestionMeans(5, 4, 0)
    for value in values:
        means.add(value)
    np.testing.assert_allclose(means.p_values()[:3], stats.ttest_1samp(values, 0).pvalue[:3])
    assert means.p_values()[3:].tolist() == [1, 2 / 2**9]
    np.testing.assert_allclose(means.square_F, ((values - values.mean(0)) ** 2).sum(0), atol=1e-12)


def test_p_is_never_below_what_turning_signs_allows() -> None:
    """Against the exact test by enumeration: values alike, nearly alike, alike beside a 0; of one question, of none."""
    values = np.array([[0.7, 0.7, 0.7, 0, 0], [0.7, 0.7001, 0.7, 0, 0], [0.7, 0.6999, 0, 2, 0]])
    means = QuestionMeans(5, 2, 0)
    for value in values:
        means.add(value)
    turned = np.array([signs @ values / 3 for signs in np.array(list(itertools.product((-1, 1), repeat=3)))])
    exact = (np.abs(turned) >= np.abs(values.mean(0)) - 1e-9).mean(0)
    np.testing.assert_allclose(exact, [1 / 4, 1 / 4, 1 / 2, 1, 1])
    t_test = stats.ttest_1samp(values, 0).pvalue
    assert t_test[0] < 1e-30 and t_test[1] < 1e-6 and t_test[2] < 1 / 2
    np.testing.assert_allclose(means.p_values(), exact)


def test_stability_counts_halves_that_have_it_among_the_largest_of_its_sign() -> None:
    halves = np.array([[3.0, -2, 1, 9], [3, 2, 1, 9], [0, -2, 3, 9], [-3, -2, 1, 9]])
    found = stability(halves, np.array([1.0, -1, 1, 1]), np.array([True, True, True, False]), 2)
    assert found.tolist() == [2 / 4, 3 / 4, 3 / 4, 0]
    means = QuestionMeans(2, 2, 0)
    for value in ([5.0, 1], [1, 4], [6, 1], [1, 3]):
        means.add(np.array(value, dtype=np.float64))
    # Of each two questions a half takes one; the first feature sums to 13 over all.
    assert means._sum_SF.sum(0).tolist() == [13, 9]
    assert set(means.stability(np.array([True, True]), 1)) <= {0, 0.5, 1}


def test_what_varies_by_rounding_alone_does_not_vary() -> None:
    scale, mean = np.array([0.0, 1e-7, 1e-3, 0.0]), np.array([1.0, 1.0, 1.0, 0.0])
    assert varies(scale, mean).tolist() == [False, False, True, False]
