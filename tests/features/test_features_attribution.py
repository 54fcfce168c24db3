"""Attribution against hand-worked linear models, finite differences, naive loops with hooks of their own, and scipy."""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from statsmodels.stats.multitest import multipletests
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from mechreward.errors import InputError
from mechreward.features.attribution import AttributionBatch, iter_attributions
from mechreward.features.attribution_table import attribution_table
from mechreward.features.targets import Target, answer_target
from mechreward.models import LoadedModel
from mechreward.rollout import Response, prompt_hashes
from mechreward.sae import SAE

KINDS = ("relu", "jumprelu", "gated", "topk", "topk_rescaled", "layer_norm", "constant_norm")


def response(
    prompt: list[int], completion: list[int], question: str = "q", extracted: str | None = None, correct: bool = True
) -> Response:
    logprobs = tuple(0.0 for _ in completion)
    return Response(
        question, 0, tuple(prompt), tuple(completion), "", logprobs, "eos", correct, correct, extracted, None
    )


ROWS = [
    response([0, 5, 9], [11, 12, 13, 14, 15], "a"),
    response([0, 7], [21, 22, 23], "b"),
    response([0, 8, 6, 4], [31, 32, 33, 34], "c"),
]
TARGETS = [Target(3, 5), Target(2, 3, "logit", baseline=40), Target(1, 2, token=50)]


def loaded(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> LoadedModel:
    return LoadedModel(model, tokenizer, "tiny")


def linear(model: PreTrainedModel) -> PreTrainedModel:
    """Nothing but the unembedding after the last block, and small enough that float32 resolves 1e-7."""
    model = deepcopy(model)
    model.model.norm = nn.Identity()
    with torch.no_grad():
        model.lm_head.weight.mul_(0.01)
    return model


def everything(*args: object, **options: object) -> AttributionBatch:
    batches = list(iter_attributions(*args, **options))  # type: ignore[arg-type]
    return AttributionBatch(
        [row for batch in batches for row in batch.rows],
        *(
            torch.cat([getattr(batch, name) for batch in batches])
            for name in ("value_B", "attr_BF", "error_B", "acts_BF", "fires_BF")
        ),
    )


def states(model: PreTrainedModel, layer: int, row: Response) -> Tensor:
    """Output of a block, by a hook of the test's own."""
    kept: list[Tensor] = []
    handle = model.model.layers[layer].register_forward_hook(lambda _m, _i, out: kept.append(out))
    with torch.no_grad():
        model(torch.tensor([[*row.prompt_ids, *row.completion_ids]]))
    handle.remove()
    return kept[0][0]


def run_with(model: PreTrainedModel, layer: int, row: Response, h_SD: Tensor) -> Tensor:
    """Logits [S, V] when the block puts out `h_SD`."""
    handle = model.model.layers[layer].register_forward_hook(lambda _m, _i, _out: h_SD[None])
    logits = model(torch.tensor([[*row.prompt_ids, *row.completion_ids]])).logits[0]
    handle.remove()
    return logits


def measured(logits_SV: Tensor, row: Response, target: Target) -> Tensor:
    total = torch.zeros(())
    for place in range(target.start, target.end):
        values_V = logits_SV[len(row.prompt_ids) + place - 1]
        if target.kind == "logprob":
            values_V = values_V.log_softmax(-1)
        total = total + values_V[row.completion_ids[place] if target.token is None else target.token]
        if target.baseline is not None:
            total = total - values_V[target.baseline]
    return total


def test_targets_measure_logits_and_log_probabilities(
    tiny_llama: PreTrainedModel, char_tokenizer: PreTrainedTokenizerFast, random_sae: Callable[..., SAE]
) -> None:
    targets = [Target(1, 4), Target(0, 3, "logit", baseline=9), Target(2, 3, "logprob", token=3, baseline=5)]
    found = everything(loaded(tiny_llama, char_tokenizer), random_sae("relu"), ROWS, targets)
    for value, row, target in zip(found.value_B, ROWS, targets, strict=True):
        with torch.no_grad():
            logits = tiny_llama(torch.tensor([[*row.prompt_ids, *row.completion_ids]])).logits[0]
        assert float(value) == pytest.approx(float(measured(logits, row, target)), rel=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_linear_toy_by_hand(
    kind: str, tiny_llama: PreTrainedModel, char_tokenizer: PreTrainedTokenizerFast, random_sae: Callable[..., SAE]
) -> None:
    """m = h . W_U there, so that attr_i = f_i times what the decoder writes for feature i, . W_U."""
    model, sae = linear(tiny_llama), random_sae(kind, layer=3)
    target = Target(2, 5, "logit", baseline=40)
    row = ROWS[0]
    found = everything(loaded(model, char_tokenizer), sae, [row], [target])
    h_SD, W_VD = states(model, 3, row), model.lm_head.weight
    expected_F, error = torch.zeros(sae.d_sae), 0.0
    for place in range(2, 5):
        h_D = h_SD[len(row.prompt_ids) + place - 1]
        g_D = W_VD[row.completion_ids[place]] - W_VD[40]
        acts_F = sae.encode(h_D)
        back_D = sae.decode(acts_F, h_D)
        for i in acts_F.nonzero()[:, 0].tolist():
            without_F = acts_F.clone()
            without_F[i] = 0
            expected_F[i] += (back_D - sae.decode(without_F, h_D)) @ g_D
        error += ((h_D - back_D) @ g_D).item()
    assert expected_F.abs().max() > 1e-3
    torch.testing.assert_close(found.attr_BF[0], expected_F.detach(), atol=1e-6, rtol=1e-4)
    assert float(found.error_B[0]) == pytest.approx(error, abs=1e-5)


@pytest.mark.parametrize("places", ["completion", "all"])
def test_gradient_equals_finite_differences(
    places: str, tiny_llama: PreTrainedModel, char_tokenizer: PreTrainedTokenizerFast, random_sae: Callable[..., SAE]
) -> None:
    sae, model = random_sae("topk"), deepcopy(tiny_llama).double()
    found = everything(loaded(model, char_tokenizer), sae, ROWS, TARGETS, places=places)
    for at, (row, target) in enumerate(zip(ROWS, TARGETS, strict=True)):
        h_SD = states(model, 1, row)
        acts_SF = sae.encode(h_SD.float())
        if places == "completion":
            acts_SF[: len(row.prompt_ids)] = 0
        for i in found.attr_BF[at].abs().argsort(descending=True)[:4].tolist():
            step_SD = (acts_SF[:, i, None] * sae.W_dec_FD[i]).double()
            with torch.no_grad():
                up, down = (measured(run_with(model, 1, row, h_SD + s * 1e-4 * step_SD), row, target) for s in (1, -1))
            assert float(found.attr_BF[at, i]) == pytest.approx(float(up - down) / 2e-4, rel=2e-2, abs=2e-3)
        n = len(row.completion_ids) if places == "completion" else len(h_SD)
        torch.testing.assert_close(found.acts_BF[at], acts_SF.sum(0) / n, rtol=1e-4, atol=1e-5)
        assert torch.equal(found.fires_BF[at], (acts_SF > 0).any(0))


@pytest.mark.parametrize("steps", [1, 4])
def test_integrated_gradients_equal_a_loop(
    steps: int, tiny_llama: PreTrainedModel, char_tokenizer: PreTrainedTokenizerFast, random_sae: Callable[..., SAE]
) -> None:
    sae = random_sae("layer_norm")
    found = everything(loaded(tiny_llama, char_tokenizer), sae, ROWS, TARGETS, method="integrated", steps=steps)
    assert found.error_B.tolist() == [0, 0, 0]
    for at, (row, target) in enumerate(zip(ROWS, TARGETS, strict=True)):
        h_SD, start = states(tiny_llama, 1, row), len(row.prompt_ids)
        acts_SF = sae.encode(h_SD)
        error_SD = h_SD - sae.decode(acts_SF, h_SD)
        total_SF = torch.zeros_like(acts_SF)
        for step in range(steps):
            leaf_SF = (acts_SF * step / steps).requires_grad_()
            mean, std = h_SD.mean(-1, keepdim=True), h_SD.std(-1, keepdim=True)
            node_SD = (leaf_SF @ sae.W_dec_FD + sae.b_dec_D) * std + mean + error_SD
            mixed_SD = torch.cat([h_SD[:start], node_SD[start:]])
            m = measured(run_with(tiny_llama, 1, row, mixed_SD), row, target)
            total_SF += torch.autograd.grad(m, leaf_SF)[0]
        expected_F = (acts_SF * total_SF / steps)[start:].sum(0)
        torch.testing.assert_close(found.attr_BF[at], expected_F, rtol=1e-3, atol=1e-3)
        assert expected_F.abs().max() > 0.1


def test_rows_do_not_depend_on_their_batch(
    tiny_model: Callable[[str], PreTrainedModel],
    char_tokenizer: PreTrainedTokenizerFast,
    random_sae: Callable[..., SAE],
) -> None:
    for name in ("llama", "qwen3_5"):
        policy, sae = loaded(tiny_model(name), char_tokenizer), random_sae("topk")
        together = everything(policy, sae, ROWS, TARGETS, batch_size=3)
        alone = everything(policy, sae, ROWS, TARGETS, batch_size=1)
        assert together.rows == alone.rows == [0, 1, 2]
        for name in ("value_B", "attr_BF", "error_B", "acts_BF"):
            torch.testing.assert_close(getattr(together, name), getattr(alone, name), rtol=1e-3, atol=1e-3)


def test_tokens_of_massive_norm_are_no_nodes(
    tiny_llama: PreTrainedModel, char_tokenizer: PreTrainedTokenizerFast, random_sae: Callable[..., SAE]
) -> None:
    model, sae = deepcopy(tiny_llama), random_sae("relu")
    with torch.no_grad():
        model.model.embed_tokens.weight[12] *= 1000
    found = everything(loaded(model, char_tokenizer), sae, ROWS[:1], TARGETS[:1])
    acts_SF = sae.encode(states(model, 1, ROWS[0]))
    kept = [3, 5, 6, 7]  # of 3 prompt and 5 completion tokens; the second of the completion is token 12
    torch.testing.assert_close(found.acts_BF[0], acts_SF[kept].mean(0), rtol=1e-4, atol=1e-4)


def test_the_model_is_left_as_it_was(
    tiny_llama: PreTrainedModel, char_tokenizer: PreTrainedTokenizerFast, random_sae: Callable[..., SAE]
) -> None:
    model = deepcopy(tiny_llama).train()
    model.model.layers[0].eval()
    hooks = [list(module._forward_hooks.values()) for module in model.modules()]
    wanted = [i % 2 == 0 for i, _ in enumerate(model.parameters())]
    for parameter, want in zip(model.parameters(), wanted, strict=True):
        parameter.requires_grad_(want)
    modes = [module.training for module in model.modules()]
    for method in ("gradient", "integrated"):
        everything(loaded(model, char_tokenizer), random_sae("relu"), ROWS, TARGETS, method=method, steps=2)
    assert [parameter.requires_grad for parameter in model.parameters()] == wanted
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [module.training for module in model.modules()] == modes
    assert [list(module._forward_hooks.values()) for module in model.modules()] == hooks
    assert torch.is_grad_enabled()
    with torch.no_grad():
        everything(loaded(model, char_tokenizer), random_sae("relu"), ROWS, TARGETS)
        assert not torch.is_grad_enabled()


def test_where_the_answer_stands(char_tokenizer: PreTrainedTokenizerFast) -> None:
    ids = char_tokenizer.encode("12 is 3#12\n", add_special_tokens=False)
    assert answer_target(char_tokenizer, response([0], ids, extracted="12")) == Target(8, 10, "logit")
    assert answer_target(char_tokenizer, response([0], ids, extracted="3")) == Target(6, 7, "logit")
    assert answer_target(char_tokenizer, response([0], ids, extracted="7")) is None
    assert answer_target(char_tokenizer, response([0], ids, extracted=None)) is None


def test_table_equals_scipy_over_question_means(
    tiny_llama: PreTrainedModel, char_tokenizer: PreTrainedTokenizerFast, random_sae: Callable[..., SAE]
) -> None:
    rng = np.random.default_rng(0)
    rows = [
        response([0, 5], rng.integers(4, 60, int(rng.integers(3, 7))).tolist(), f"q{i % 5}") for i in range(12)
    ]  # five questions, answers apart
    targets: list[Target | None] = [Target(1, len(row.completion_ids)) for row in rows]
    targets[3] = None
    policy, sae = loaded(tiny_llama, char_tokenizer), random_sae("topk")
    table = attribution_table(policy, sae, rows, targets, min_support=0.3, top_k=5, halves=6, batch_size=4)
    assert (table.method, table.n_questions, table.n_responses) == ("attribution", 5, 11)
    assert (table.pooling, table.prompts) == ("mean", prompt_hashes([[0, 5]]))
    frame = table.frame.set_index("id").sort_index()
    assert table.frame["effect"].abs().is_monotonic_decreasing

    kept = [i for i in range(12) if i != 3]
    found = everything(policy, sae, [rows[i] for i in kept], [targets[i] for i in kept])
    names = np.array([rows[i].question_id for i in kept])
    every = everything(policy, sae, rows, [Target(1, len(row.completion_ids)) for row in rows])
    asked, acts = np.array([row.question_id for row in rows]), every.acts_BF.double().numpy()
    attr = found.attr_BF.double().numpy()
    mean_QF = np.stack([attr[names == q].mean(0) for q in np.unique(names)])
    np.testing.assert_allclose(frame["effect"], mean_QF.mean(0), rtol=1e-3, atol=1e-4)
    p = np.maximum(stats.ttest_1samp(mean_QF, 0).pvalue, 2.0 ** (1 - (mean_QF != 0).sum(0)))
    live = ~np.isnan(p)
    np.testing.assert_allclose(frame["p_value"][live], p[live], rtol=1e-2, atol=1e-4)
    assert (frame["p_value"][~live] == 1).all()
    np.testing.assert_allclose(
        frame["d"][live], mean_QF[:, live].mean(0) / mean_QF[:, live].std(0, ddof=1), rtol=1e-2, atol=1e-4
    )
    support = found.fires_BF.float().mean(0).numpy()
    np.testing.assert_allclose(frame["support"], support, atol=1e-6)
    tested = (support >= 0.3) & (frame["scale"] > 0).to_numpy()
    assert 0 < tested.sum() < len(tested)
    q = multipletests(frame["p_value"][tested], method="fdr_bh")[1]
    np.testing.assert_allclose(frame["q_value"][tested], q)
    assert (frame["q_value"][~tested] == 1).all() and (frame["stability"][~tested] == 0).all()
    spread = sum(((acts[asked == q] - acts[asked == q].mean(0)) ** 2).sum(0) for q in np.unique(asked))
    np.testing.assert_allclose(frame["scale"], np.sqrt(spread / (12 - 5)), rtol=1e-3, atol=1e-5)
    # The largest features are found in most halves, and 6 halves of top 5 of each sign cannot add up to more than 10.
    assert frame["stability"].sum() <= 10
    assert frame["stability"][table.frame["id"][0]] >= 0.5


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Target(2, 2), "tokens 2 to 2 are no span"),
        (lambda: Target(-1, 2), "tokens -1 to 2 are no span"),
        (lambda: Target(1, 3, token=4), "token is for one place"),
    ],
)
def test_targets_that_are_none(make: Callable[[], Target], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        make()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"sae": "wide"}, "reads residuals of width 16, but tiny has width 32"),
        ({"sae": "deep"}, "layer: 9 is out of range"),
        ({"targets": [Target(1, 9)]}, "tokens 1 to 9 are out of range in response 0, which has 5"),
        ({"targets": [Target(1, 2, token=64)]}, "token 64 is out of range; the model knows 0 to 63"),
        ({"targets": [Target(0, 1)]}, "stands before token 0 of response 0; use places='all'"),
        ({"targets": []}, "targets: 0 for 1 responses"),
        ({"steps": 0}, "steps: 0 is too small"),
        ({"batch_size": 0}, "batch_size: 0 is too small"),
        ({"rows": [response([], [4, 5, 6, 7, 8])]}, "response 0 has no prompt"),
    ],
)
def test_bad_input_is_one_sentence_at_once(
    change: dict[str, object],
    sentence: str,
    tiny_llama: PreTrainedModel,
    char_tokenizer: PreTrainedTokenizerFast,
    random_sae: Callable[..., SAE],
) -> None:
    saes = {"wide": random_sae("relu", d=16), "deep": random_sae("relu", layer=9), "fit": random_sae("relu")}
    options = {"sae": "fit", "rows": ROWS[:1], "targets": TARGETS[:1]} | change
    sae, rows, targets = saes[str(options.pop("sae"))], options.pop("rows"), options.pop("targets")
    with pytest.raises(InputError, match=sentence):
        iter_attributions(loaded(tiny_llama, char_tokenizer), sae, rows, targets, **options)  # type: ignore[arg-type]


def test_a_gradient_that_is_not_finite(
    tiny_llama: PreTrainedModel, char_tokenizer: PreTrainedTokenizerFast, random_sae: Callable[..., SAE]
) -> None:
    model = deepcopy(tiny_llama)
    with torch.no_grad():
        model.lm_head.weight[13] = torch.nan
    with pytest.raises(InputError, match="gradient: it is NaN or infinite after block 1"):
        everything(loaded(model, char_tokenizer), random_sae("relu"), ROWS, TARGETS)


def test_a_table_needs_questions_with_answers(
    tiny_llama: PreTrainedModel, char_tokenizer: PreTrainedTokenizerFast, random_sae: Callable[..., SAE]
) -> None:
    policy, sae = loaded(tiny_llama, char_tokenizer), random_sae("relu")
    with pytest.raises(InputError, match="3 answers to 3 questions have one"):
        attribution_table(policy, sae, ROWS, TARGETS)
    with pytest.raises(InputError, match="0 answers to 0 questions have one"):
        attribution_table(policy, sae, ROWS, [None] * 3)
    with pytest.raises(InputError, match="2 answers to 1 questions have one"):
        attribution_table(policy, sae, [ROWS[0], replace(ROWS[0], sample=1)], TARGETS[:1] * 2)
    with pytest.raises(InputError, match="targets: 1 for 3 responses"):
        attribution_table(policy, sae, ROWS, TARGETS[:1])
