"""Contexts, logit lens, labels and validation of features against what a test's own hooks and loops say."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mechreward.errors import InputError
from mechreward.features.contexts import Context, FeatureContexts, top_contexts
from mechreward.features.labels import Label, contexts_label, lens_label
from mechreward.features.lens import LensReading, lens_logits, logit_lens
from mechreward.features.validator import validate_feature
from mechreward.models import LoadedModel, find_blocks
from mechreward.rollout import Response
from mechreward.sae import SAE

TEXTS = ["abcde12345", "12<3>45", "fghij", "aaaaaaaaaaaaaaaa", "kl#12+3=4"]


@pytest.fixture
def policy(tiny_llama: PreTrainedModel, char_tokenizer: PreTrainedTokenizerFast) -> LoadedModel:
    return LoadedModel(tiny_llama, char_tokenizer, "tiny")


def rows(tokenizer: PreTrainedTokenizerFast) -> list[Response]:
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in TEXTS]
    return [
        Response(f"q{at}", at, (0, 5, 6), tuple(row), TEXTS[at], (0.0,) * len(row), "eos", at % 2 == 0)
        for at, row in enumerate(ids)
    ]


def acts_after(model: PreTrainedModel, sae: SAE, ids: list[int], layer: int) -> torch.Tensor:
    with torch.no_grad():
        h_SD = model(torch.tensor([ids]), output_hidden_states=True).hidden_states[layer + 1][0]
    return sae.encode(h_SD)


def test_contexts_are_the_highest_of_each_response(policy: LoadedModel, random_sae: Callable[..., SAE]) -> None:
    sae, responses = random_sae("topk"), rows(policy.tokenizer)
    per_row = [acts_after(policy.model, sae, [*r.prompt_ids, *r.completion_ids], 1)[3:] for r in responses]
    tallies = torch.stack([(acts > 0).any(0) for acts in per_row]).sum(0)
    ids = [int(tallies.argmax()), int((tallies == 1).nonzero()[0]), int((tallies == 0).nonzero()[0])]
    found = top_contexts(policy, sae, responses, ids, k=2, around=2, batch_size=2)
    for feature, contexts in zip(ids, found, strict=True):
        ranked = sorted(((float(acts[:, feature].max()), at) for at, acts in enumerate(per_row)), reverse=True)
        expected = [(peak, at) for peak, at in ranked if peak > 0][:2]
        assert contexts.feature_id == feature
        assert [(c.activation, c.sample) for c in contexts.contexts] == [
            (pytest.approx(p, rel=1e-4), a) for p, a in expected
        ]
        for context, (_, at) in zip(contexts.contexts, expected, strict=True):
            acts_T = per_row[at][:, feature]
            place = int(acts_T.argmax())
            assert context.position == place and context.correct == (at % 2 == 0) and context.question_id == f"q{at}"
            start = max(0, place - 2)
            assert context.acts == pytest.approx(acts_T[start : place + 3].tolist(), rel=1e-3, abs=1e-5)
            pieces = [policy.tokenizer.decode([token]) for token in responses[at].completion_ids[start : place + 3]]
            assert list(context.tokens) == pieces
        assert contexts.n_firing == sum(int((acts[:, feature] > 0).sum()) for acts in per_row)
        assert contexts.n_tokens == sum(len(r.completion_ids) for r in responses)
    assert [len(contexts.contexts) for contexts in found] == [2, 1, 0]


def test_of_equal_contexts_the_first_stay(policy: LoadedModel, random_sae: Callable[..., SAE]) -> None:
    sae, row = random_sae("relu"), rows(policy.tokenizer)[0]
    same = [Response("q", at, *tuple(vars(row).values())[2:]) for at in range(4)]
    feature = int(acts_after(policy.model, sae, [*row.prompt_ids, *row.completion_ids], 1)[3:].sum(0).argmax())
    (found,) = top_contexts(policy, sae, same, [feature], k=2, batch_size=1)
    assert [context.sample for context in found.contexts] == [0, 1]


def test_contexts_show_themselves_as_escaped_html() -> None:
    context = Context("<q>", 0, False, 1, 4.0, ("<b>", "x"), (2.0, 4.0))
    page = FeatureContexts(7, [context], 200, 3)._repr_html_()
    assert "&lt;b&gt;" in page and "<b>" not in page and "&lt;q&gt;" in page
    assert "feature 7, fires on 1.50% of tokens" in page and "wrong" in page
    assert 'title="2" style="background:rgba(255,140,0,0.50)"' in page and "0,1.00)" in page
    assert FeatureContexts(7, [], 10, 0)._repr_html_().count("<tr>") == 0


def test_lens_by_hand(policy: LoadedModel, random_sae: Callable[..., SAE]) -> None:
    model, sae = policy.model, random_sae("topk_rescaled")
    gain_D = torch.linspace(0.5, 2, 32)
    kept = model.model.norm.weight.data.clone()
    model.model.norm.weight.data.copy_(gain_D)
    found = logit_lens(policy, sae, [3, 40], k=4)
    model.model.norm.weight.data.copy_(kept)
    for reading, feature in zip(found, (3, 40), strict=True):
        row_D = sae.W_dec_FD[feature] / sae.W_dec_FD[feature].norm()
        logits_V = model.lm_head.weight.detach() @ (row_D / row_D.pow(2).mean().sqrt() * gain_D)
        up = logits_V.argsort(descending=True)
        assert reading.feature_id == feature
        assert [word for word, _ in reading.promoted] == [policy.tokenizer.decode([int(i)]) for i in up[:4]]
        assert [word for word, _ in reading.suppressed] == [policy.tokenizer.decode([int(i)]) for i in up.flip(0)[:4]]
        assert [value for _, value in reading.promoted] == pytest.approx(logits_V[up[:4]].tolist(), rel=1e-3)


@pytest.mark.parametrize("name", ["gemma2", "qwen3_5_image_text", "gemma4_image_text", "qwen3_5_moe", "deepseek_v3"])
def test_lens_goes_through_the_final_norm(name: str, tiny_model: Callable[[str], PreTrainedModel]) -> None:
    model, row_1D = tiny_model(name), torch.randn(1, 32)
    norm: nn.Module = model.get_decoder().norm
    with torch.no_grad():
        expected = norm(row_1D) @ model.get_output_embeddings().weight.T
    torch.testing.assert_close(lens_logits(model, row_1D), expected, rtol=1e-4, atol=1e-4)


def test_lens_drops_the_bias_of_a_layer_norm(tiny_gpt2: PreTrainedModel) -> None:
    norm, row_1D = tiny_gpt2.transformer.ln_f, torch.randn(1, 32)
    norm.bias.data += 5
    with torch.no_grad():
        found = lens_logits(tiny_gpt2, row_1D)
        norm.bias.data -= 5
        expected = (norm(row_1D) - norm.bias) @ tiny_gpt2.lm_head.weight.T
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)


def test_labels_say_where_they_come_from() -> None:
    lens = lens_label(LensReading(4, [(" so", 3.0), (" thus", 2.0), ("x", 1.0)], []), n=2)
    assert str(lens) == "promotes ' so', ' thus' (logit lens)" and lens.feature_id == 4
    contexts = [Context("q", 0, None, 0, 2.0, ("a", "b"), acts) for acts in ((1.0, 2.0), (0.0, 3.0), (5.0, 1.0))]
    found = contexts_label(FeatureContexts(4, contexts, 10, 3))
    assert str(found) == "highest on 'b' (2 of 3), 'a' (1 of 3) (top contexts)"
    assert contexts_label(FeatureContexts(4, [], 10, 0)) is None
    with pytest.raises(InputError, match="label of feature 4 is empty"):
        Label(4, " ", "user")


POSITIVE, NEGATIVE = ["abc", "abcdefgh", "ddd1234567890"], ["12", "3456", "k", "lmn+"]


@pytest.mark.parametrize("layer", [None, 1, 2])
def test_validation_is_a_true_auroc_at_the_right_layer(
    layer: int | None, policy: LoadedModel, random_sae: Callable[..., SAE]
) -> None:
    sae, aucs = random_sae("relu"), []
    for feature in range(12):
        scores = []
        for text in [*POSITIVE, *NEGATIVE]:
            ids = policy.tokenizer(text)["input_ids"]
            kept: list[torch.Tensor] = []
            block = find_blocks(policy.model)[1 if layer is None else layer]
            handle = block.register_forward_hook(lambda _m, _i, out, kept=kept: kept.append(out[0]))
            with torch.no_grad():
                policy.model(torch.tensor([ids]))
            handle.remove()
            scores.append(float(sae.encode(kept[0])[:, feature].max()))
        found = validate_feature(sae, policy.model, policy.tokenizer, feature, POSITIVE, NEGATIVE, 0.6, layer)
        expected = roc_auc_score([1] * 3 + [0] * 4, scores)
        assert found.auc == pytest.approx(expected) and found.validated == (expected >= 0.6)
        assert found.positive_mean == pytest.approx(sum(scores[:3]) / 3, rel=1e-4)
        assert found.negative_mean == pytest.approx(sum(scores[3:]) / 4, rel=1e-4)
        assert (found.feature_id, found.threshold, found.n_pos, found.n_neg) == (feature, 0.6, 3, 4)
        aucs.append(found.auc)
    assert min(aucs) < 0.5 < max(aucs)


def test_special_tokens_have_no_say(policy: LoadedModel, random_sae: Callable[..., SAE]) -> None:
    sae = random_sae("relu")
    for feature in range(8):
        ids = policy.tokenizer("<s><s>ab")["input_ids"]
        acts_SF = acts_after(policy.model, sae, ids, 1)
        found = validate_feature(sae, policy.model, policy.tokenizer, feature, ["<s><s>ab"], ["12"])
        assert found.positive_mean == pytest.approx(float(acts_SF[2:, feature].max()), rel=1e-4, abs=1e-6)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda c: top_contexts(c.policy, c.sae, rows(c.policy.tokenizer), [48]), "feature_ids: 48 is not a feature"),
        (
            lambda c: top_contexts(c.policy, c.sae, rows(c.policy.tokenizer), [1], k=0),
            "k, around: 0 and 10 are not allowed",
        ),
        (lambda c: top_contexts(c.policy, c.sae, [], [1]), "the batch is empty"),
        (lambda c: top_contexts(c.policy, c.make("relu", d=16), rows(c.policy.tokenizer), [1]), "tiny has width 32"),
        (lambda c: logit_lens(c.policy, c.sae, [1], k=65), "k: 65 is not allowed; give 1 to 64"),
        (lambda c: logit_lens(c.policy, c.make("relu", layer=4), [1]), "layer: 4 is out of range"),
        (
            lambda c: validate_feature(c.sae, c.policy.model, c.policy.tokenizer, 1, [], ["a"]),
            "positive_examples: there are none",
        ),
        (
            lambda c: validate_feature(c.sae, c.policy.model, c.policy.tokenizer, 1, ["a"], []),
            "negative_examples: there are none",
        ),
        (
            lambda c: validate_feature(c.sae, c.policy.model, c.policy.tokenizer, 48, ["a"], ["b"]),
            "48 is not a feature",
        ),
        (
            lambda c: validate_feature(c.sae, c.policy.model, c.policy.tokenizer, 1, ["a"], ["<s>"]),
            "text '<s>' has no token but",
        ),
        (
            lambda c: validate_feature(c.sae, c.policy.model, c.policy.tokenizer, 1, ["a"], ["b"], 1.5),
            "auc_threshold: 1.5 is not",
        ),
        (
            lambda c: validate_feature(c.sae, c.policy.model, c.policy.tokenizer, 1, ["a"], ["b"], 0.5, 4),
            "layer: 4 is out of",
        ),
    ],
)
def test_bad_input(
    call: Callable[..., object], sentence: str, policy: LoadedModel, random_sae: Callable[..., SAE]
) -> None:
    with pytest.raises(InputError, match=sentence):
        call(SimpleNamespace(policy=policy, sae=random_sae("relu"), make=random_sae))
