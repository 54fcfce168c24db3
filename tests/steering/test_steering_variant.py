"""The variant's own bookkeeping: units, conflicts, files, watching, looking; and bad input in one sentence."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import TextIteratorStreamer

from mechreward.errors import InputError
from mechreward.models import read_residuals
from mechreward.rollout import Response
from mechreward.sae import SAE
from mechreward.steering import Feature, GenerationAborted, Variant, measure_scales

IDS = [[9, 20, 31, 7, 40, 12], [7, 30, 8, 50, 22, 18, 33]]


@pytest.fixture
def responses() -> list[Response]:
    return [Response(str(i), 0, (0, 5), tuple(ids), "", (0.0,) * len(ids), "length") for i, ids in enumerate(IDS)]


@pytest.fixture
def variant(llama, llama_sae: SAE, responses: list[Response]) -> Variant:
    return Variant(llama, llama_sae, scales=measure_scales(llama, llama_sae, responses), labels={3: "sums", 5: "buys"})


def test_a_unit_is_the_99th_percentile_where_a_feature_fires(llama, llama_sae, variant) -> None:
    h, mask = read_residuals(llama.model, [[0, 5]] * 2, IDS, 1)
    acts = llama_sae.encode(h[mask]).numpy()
    fired = [feature for feature in range(48) if (acts[:, feature] > 0).any()]
    assert 5 < len(fired) < 48
    for feature in fired:
        column = acts[:, feature][acts[:, feature] > 0].astype(np.float64)
        assert variant.scales.unit(feature) == pytest.approx(np.percentile(column, 99))
        assert variant.scales.mean_F[feature] == pytest.approx(acts[:, feature].mean(), rel=1e-5)
    assert variant.scales.norm == pytest.approx(np.median(np.linalg.norm(h[mask].numpy(), axis=-1)))
    assert variant.norm_limit == pytest.approx(10 * variant.scales.norm) and variant.scales.n_tokens == 13
    silent = next(feature for feature in range(48) if feature not in fired)
    with pytest.raises(InputError, match=rf"feature: {silent} fired on none of the 13 tokens"):
        variant.set(silent, 1.0)
    variant.set(fired[0], 0.5)
    assert variant.rules[0].edits[0].add == pytest.approx(0.5 * variant.scales.unit(fired[0]))
    variant.set(fired[1], 0.5, mode="scale")
    assert variant.rules[1].edits[0].factor == 0.5
    variant.set_when(Feature(fired[2]) > 0.5, fired[3], 1.0, unit="raw")
    assert variant.rules[2].condition.left.size == 1.0
    variant.set_when(Feature(fired[2]) > 0.5, fired[3], 1.0)
    assert variant.rules[3].condition.left.size == variant.scales.unit(fired[2])


def test_massive_tokens_are_left_alone(llama, variant) -> None:
    variant.set(3, 2.0, unit="raw")
    plain, _ = read_residuals(llama.model, [[0]], [IDS[0]], 1)
    norms = plain[0].norm(dim=-1)
    variant.norm_limit = float(norms.median())
    with variant.steered():
        edited, _ = read_residuals(llama.model, [[0]], [IDS[0]], 1)
    moved = (edited - plain)[0].abs().max(-1).values > 0
    assert moved.tolist() == (norms <= norms.median()).tolist()


def test_a_norm_limit_opens_nothing(llama, variant) -> None:
    """BOS (id 0) and the pad (id 2) stay closed inside a row whose norms are all within the limit."""
    ids = [9, 0, 31, 2, 40]
    variant.set(3, 2.0, unit="raw")
    variant.norm_limit = float("inf")
    plain, _ = read_residuals(llama.model, [[5]], [ids], 1)
    with variant.steered():
        edited, _ = read_residuals(llama.model, [[5]], [ids], 1)
    moved = (edited - plain)[0].abs().max(-1).values > 0
    assert moved.tolist() == [token not in (0, 2) for token in ids]


def test_contradictions(variant) -> None:
    variant.set(3, 1.0, mode="pin", unit="raw")
    variant.set(3, 1.0, mode="pin", unit="raw")
    assert len(variant.rules) == 1
    for mode, value in (("pin", 2.0), ("nudge", 1.0)):
        with pytest.raises(InputError, match="feature: 3 has pin 1 already; clear it"):
            variant.set(3, value, mode=mode, unit="raw")
    with pytest.raises(InputError, match="feature: 3 is pinned to 1 already, not to 2"):
        variant.set_when(Feature(5) > 0.1, 3, 2.0, mode="pin", unit="raw")
    variant.set_when(Feature(5) > 0.1, 7, 2.0, mode="pin", unit="raw")
    variant.set_when(Feature(5) <= 0.1, 7, 3.0, mode="pin", unit="raw")
    with pytest.raises(InputError, match="feature: 7 is pinned to 2 already"):
        variant.set_when(Feature(5) > 0.1, 7, 3.0, mode="pin", unit="raw")
    variant.clear([3, 7])
    assert variant.rules == []


def test_bad_input(llama, llama_sae, variant, hand) -> None:
    with pytest.raises(InputError, match="feature: 48 is not a feature"):
        variant.set(48, 1.0)
    with pytest.raises(InputError, match="feature: 99 is not a feature"):
        variant.set_when(Feature(99) > 0.5, 3, 1.0, unit="raw")
    with pytest.raises(InputError, match="feature: 99 is not a feature"):
        variant.abort_when(Feature(99) > 0.5)
    with pytest.raises(InputError, match="p99 needs calibrate"):
        Variant(llama, llama_sae).set(3, 1.0)
    narrow = SAE("relu", torch.ones(8, 4), torch.ones(4), torch.ones(4, 8), torch.ones(8), llama_sae.meta)
    with pytest.raises(InputError, match="sae: it reads width 8 but the model's residual stream has width 32"):
        Variant(llama, narrow)
    deep = replace(llama_sae, meta=replace(llama_sae.meta, layer=4))
    with pytest.raises(InputError, match="layer: 4 is out of range"):
        Variant(llama, deep)
    other = hand.make_sae(llama, seed=1)
    with pytest.raises(InputError, match="scales: they were measured with SAE"):
        Variant(llama, other, scales=variant.scales)
    with pytest.raises(InputError, match="sae: the edits were made for SAE"):
        Variant.from_json(llama, other, variant.json())
    with pytest.raises(InputError, match="sae: the edits were made for SAE"):
        Variant.from_json(llama, replace(llama_sae, meta=replace(llama_sae.meta, layer=2)), variant.json())
    with pytest.raises(InputError, match="chat template"):
        variant.chat([{"role": "user", "content": "a"}])
    with pytest.raises(InputError, match="token ids"), torch.no_grad():
        variant.set(3, 1.0, unit="raw")
        with variant.steered():
            llama.model(inputs_embeds=torch.zeros(1, 2, 32))


def test_json_goes_round_and_edits_alike(llama, llama_sae, variant) -> None:
    variant.set({3: 2.0, 5: -1.0}, unit="raw")
    variant.set_when((Feature(8) > 0.1) | ~(Feature(9) < 2.0), 11, 3.0, mode="pin", unit="raw")
    variant.add_vector(torch.arange(32.0) / 32)
    written = json.loads(json.dumps(variant.json()))
    again = Variant.from_json(llama, llama_sae, written)
    assert again.json() == variant.json() and again.norm_limit == variant.norm_limit
    assert again.generate(IDS, max_new_tokens=4) == variant.generate(IDS, max_new_tokens=4)
    edit = {"feature": 3, "value": 1.0, "mode": "pin", "size": 1.0}
    rule = {"edits": [edit], "condition": None, "vector": None}
    for bad in (
        {**written, "where": "nowhere"},
        {**written, "more": 1},
        {**written, "rules": [{**rule, "edits": [{**edit, "feature": 48}]}]},
        {**written, "rules": [{**rule, "edits": [{**edit, "mode": "push"}]}]},
        {**written, "rules": [{**rule, "edits": [edit, edit]}]},
        {**written, "rules": [rule, {**rule, "edits": [{**edit, "value": 2.0}]}]},
        {**written, "rules": [{**rule, "condition": {"left": [99, 1.0], "op": ">", "right": 0.5}}]},
        {**written, "rules": [{**rule, "extra": 1}]},
    ):
        with pytest.raises(InputError):
            Variant.from_json(llama, llama_sae, bad)


def test_watching_stops_at_the_token_that_it_reads(llama, llama_sae) -> None:
    variant = Variant(llama, llama_sae, where="completion")
    rows = [[9, 20], [7, 30, 8, 50]]
    plain = [list(response.completion_ids) for (response,) in variant.generate(rows, max_new_tokens=8)]
    acts = [variant.inspect([*row, *drawn]).matrix() for row, drawn in zip(rows, plain, strict=True)]
    # A feature that fires in both answers, but not at the end of a prompt nor at a first token.
    firsts = {}
    for feature in range(48):
        at = [np.flatnonzero(a[len(row) - 1 : -1, feature] > 0.05) for a, row in zip(acts, rows, strict=True)]
        if len(at[0]) and at[0][0] >= 2:
            firsts[feature] = at
    feature, at = next(iter(firsts.items()))
    moments = []
    variant.handle_when(Feature(feature) > 0.05, moments.append, unit="raw")
    watched = [list(response.completion_ids) for (response,) in variant.generate(rows, max_new_tokens=8)]
    assert watched == plain
    wanted = sorted((tuple(rows[i]), tuple(plain[i][:t])) for i in (0, 1) for t in at[i])
    assert sorted((m.prompt_ids, m.completion_ids) for m in moments) == wanted
    variant.reset()
    variant.abort_when(Feature(feature) > 0.05, unit="raw")
    with pytest.raises(GenerationAborted, match="aborted after") as stop:
        variant.generate(rows[:1], max_new_tokens=8)
    assert list(stop.value.moment.completion_ids) == plain[0][: at[0][0]]
    assert stop.value.moment.response_so_far == llama.tokenizer.decode(plain[0][: at[0][0]])


def test_a_streamer_gets_each_token_as_it_is_drawn(llama, llama_sae) -> None:
    variant = Variant(llama, llama_sae)
    variant.set(3, 3.0, mode="pin", unit="raw")
    (plain,) = variant.generate(IDS[:1], max_new_tokens=6)[0]
    streamer = TextIteratorStreamer(llama.tokenizer, skip_prompt=True, skip_special_tokens=True)
    seen: list[int] = []
    streamer.put = lambda value: seen.extend(value.flatten().tolist())  # what it is handed, before any decoding
    (streamed,) = variant.generate(IDS[:1], max_new_tokens=6, streamer=streamer)[0]
    assert streamed == plain
    assert seen == [*IDS[0], *plain.completion_ids]
    streamer = TextIteratorStreamer(llama.tokenizer, skip_prompt=True, skip_special_tokens=True)
    variant.abort_when(Feature(3) > 1e9, unit="raw")  # watched, and it never holds
    variant.generate(IDS[:1], max_new_tokens=6, streamer=streamer)
    assert "".join(streamer) == plain.text
    for rows, n in ((IDS, 1), (IDS[:1], 2)):
        with pytest.raises(InputError, match="streamer: it writes one text, and 2 are to be drawn"):
            variant.generate(rows, n=n, temperature=1.0, max_new_tokens=6, streamer=streamer)


def test_samples_are_those_of_one_call(llama, llama_sae) -> None:
    variant = Variant(llama, llama_sae)
    drawn = variant.generate(IDS, n=3, max_new_tokens=5, temperature=1.0, seed=4)
    assert [[response.sample for response in group] for group in drawn] == [[0, 1, 2]] * 2
    assert len({response.completion_ids for response in drawn[0]}) > 1
    assert drawn == variant.generate(IDS, n=3, max_new_tokens=5, temperature=1.0, seed=4)


def test_nested_prompts_are_edited_each_from_its_own_end(llama, llama_sae) -> None:
    variant = Variant(llama, llama_sae, where="completion")
    variant.set(3, 3.0, mode="pin", unit="raw")
    rows = [[9, 20, 31], [9, 20], [9, 20, 31, 7]]
    together = variant.generate(rows, max_new_tokens=6)
    assert [g[0].completion_ids for g in together] == [
        variant.generate([row], max_new_tokens=6)[0][0].completion_ids for row in rows
    ]


def test_logits(llama, llama_sae) -> None:
    variant = Variant(llama, llama_sae)
    variant.set(3, 3.0, unit="raw")
    with torch.no_grad(), variant.steered():
        wanted = llama.model(torch.tensor([IDS[0]])).logits[0, -1]
    best = variant.logits(IDS[0], top_k=3)
    assert list(best) == [llama.tokenizer.decode([i]) for i in wanted.topk(3).indices.tolist()]
    assert list(best.values()) == pytest.approx(wanted.topk(3).values.tolist(), rel=1e-4)
    token = llama.tokenizer("q", add_special_tokens=False)["input_ids"][0]
    assert variant.logits(IDS[0], among=["q"])["q"] == pytest.approx(float(wanted[token]), rel=1e-4)


def test_inspection_by_a_naive_count(llama, llama_sae, variant) -> None:
    seen = variant.inspect([0, *IDS[1]])
    h, _ = read_residuals(llama.model, [[]], [[0, *IDS[1]]], 1)
    acts = llama_sae.encode(h[0]).numpy()
    np.testing.assert_allclose(seen.matrix(), acts, rtol=1e-6)
    numbers = {
        "frequency": (acts[1:] > 0).mean(0), "mean": acts[1:].mean(0), "max": acts[1:].max(0), "sum": acts[1:].sum(0),
    }  # fmt: skip
    for by, values in numbers.items():
        found = seen.top(5, by)
        assert [value for _, value in found] == pytest.approx(sorted(values, reverse=True)[:5], rel=1e-5)
        assert all(values[feature.id] == pytest.approx(value, rel=1e-5) for feature, value in found)
    high = float(np.median(acts[acts > 0]))
    assert seen.top(1, threshold=high)[0].value == pytest.approx((acts[1:] > high).mean(0).max())
    assert [f.id for f, _ in seen.at(2, 3)] == np.argsort(-acts[2], kind="stable")[:3].tolist()
    with pytest.raises(InputError, match="by: 'most'"):
        seen.top(1, "most")


def test_a_token_of_massive_norm_is_read_and_not_counted(llama, llama_sae) -> None:
    model = copy.deepcopy(llama.model)
    with torch.no_grad():
        model.get_input_embeddings().weight[45] *= 1e4
    seen = Variant(replace(llama, model=model), llama_sae).inspect([45, *IDS[1]])
    assert seen.counted_T.tolist() == [False] + [True] * len(IDS[1])
    acts = seen.matrix()
    assert acts[0].max() > 10 * acts[1:].max()
    assert seen.top(1, "max")[0].value == pytest.approx(acts[1:].max())


def test_search_and_neighbours(llama_sae, variant) -> None:
    assert variant.search("buys").ids == [5] and variant.rerank([3, 7], "sums").ids == [3]
    assert variant.search("nothing alike").ids == []
    rows = torch.nn.functional.normalize(llama_sae.W_dec_FD, dim=-1)
    cosine = rows @ rows[7]
    cosine[7] = -2
    assert variant.neighbors(7, 4).ids == cosine.topk(4).indices.tolist()
    seen = variant.inspect(IDS[1])
    acts = seen.matrix()
    feature = int(acts.sum(0).argmax())
    unit = acts / np.maximum(np.linalg.norm(acts, axis=0), 1e-9)
    together = unit.T @ unit[:, feature]
    together[feature] = -1
    assert together[variant.neighbors(feature, 1, on=seen).ids[0]] == pytest.approx(together.max())
    with pytest.raises(InputError, match="query: is empty"):
        variant.search(" ")
    with pytest.raises(InputError, match="none to search"):
        variant.rerank([9], "sums")


@pytest.mark.parametrize("where", ["all", "completion"])
def test_moments_do_not_depend_on_the_batch(where, llama, llama_sae) -> None:
    variant = Variant(llama, llama_sae, where=where)
    rows = [[9, 20], [7, 30, 8, 50], [12, 5], [40, 7, 31], [22, 18]]
    told: dict[int, list] = {}
    for size in (256, 1, 2, 3):
        variant.reset()
        moments = told.setdefault(size, [])
        variant.handle_when(Feature(3) > 0.05, moments.append, unit="raw")
        variant.generate(rows, max_new_tokens=6, n=2, temperature=0.0, batch_size=size)
    wanted, *others = [sorted((m.prompt_ids, m.completion_ids) for m in moments) for moments in told.values()]
    assert len({prompt for prompt, _ in wanted}) > 2 and all(other == wanted for other in others)


def test_a_prompt_of_closed_tokens_is_counted(llama, llama_sae) -> None:
    variant, bos = Variant(llama, llama_sae), llama.tokenizer.bos_token_id
    (plain,) = variant.generate([[bos]], max_new_tokens=6)[0]
    feature = int((variant.inspect([bos, *plain.completion_ids]).matrix()[1:-1] > 0.05).sum(0).argmax())
    moments = []
    variant.handle_when(Feature(feature) > 0.05, moments.append, unit="raw")
    variant.generate([[bos]], max_new_tokens=6)
    assert len(moments) >= 2 and {moment.prompt_ids for moment in moments} == {(bos,)}
    assert all(m.completion_ids == plain.completion_ids[: len(m.completion_ids)] for m in moments)


def test_no_samples_are_refused_watched_or_not(llama, llama_sae) -> None:
    variant = Variant(llama, llama_sae)
    for _ in range(2):
        with pytest.raises(InputError, match="n: 0 is too small; it must be at least 1"):
            variant.generate([[9, 20]], n=0)
        variant.abort_when(Feature(3) > 1.0, unit="raw")


def test_each_token_of_a_prompt_is_told(llama, llama_sae) -> None:
    variant, row = Variant(llama, llama_sae), [9, 20, 31, 7, 40, 12, 33]
    fires = (variant.inspect(row).matrix() > 0.05).sum(0)
    feature = int(fires.argmax())
    assert fires[feature] >= 3
    moments = []
    variant.handle_when(Feature(feature) > 0.05, moments.append, unit="raw")
    variant.generate([row], max_new_tokens=1)
    assert [m.prompt_ids for m in moments if not m.completion_ids] == [tuple(row)] * fires[feature]


def test_bad_edits_in_json(llama, llama_sae, variant) -> None:
    variant.set(3, 2.0, unit="raw")
    variant.add_vector(torch.ones(32), Feature(8) > 0.1, unit="raw")
    written = json.loads(json.dumps(variant.json()))
    (first, second), edit = written["rules"], written["rules"][0]["edits"][0]

    def rules(*changed: dict) -> dict:
        return {**written, "rules": list(changed)}

    for bad, sentence in (
        ({**written, "norm_limit": "10"}, "variant: "),
        ({**written, "norm_limit": -1.0}, "variant: "),
        ({**written, "norm_limit": float("nan")}, "variant: "),
        (rules({**first, "vector": [1.0] * 31}), "vector: .* is none; it needs 32 finite numbers"),
        (rules({**first, "vector": ["1"] * 32}), "vector: .* is none; it needs 32 finite numbers"),
        (rules({**first, "vector": [float("nan")] * 32}), "vector: .* is none; it needs 32 finite numbers"),
        (rules({**first, "edits": [{**edit, "value": float("nan")}]}), "edits: .* is no edit"),
        (rules({**first, "edits": [{**edit, "size": 0.0}]}), "edits: .* is no edit"),
        (rules({**first, "edits": [{**edit, "feature": True}]}), "edits: .* is no edit"),
        (rules({**second, "condition": {"left": [8, 1.0], "op": ">", "right": float("nan")}}), "condition: nan"),
        (rules({**second, "condition": {"left": [8, float("inf")], "op": ">", "right": 1.0}}), "condition: "),
        (rules(first, {**first, "edits": [{**edit, "value": 3.0}]}), "feature: 3 has nudge 2 already; clear it"),
    ):
        with pytest.raises(InputError, match=f"^{sentence}"):
            Variant.from_json(llama, llama_sae, bad)
    assert Variant.from_json(llama, llama_sae, rules(first, first)).json()["rules"] == [first]


def test_ids_of_numpy_name_features(variant) -> None:
    variant.set([np.int64(3), np.int32(5)], 1.0, unit="raw")
    variant.set(np.int64(7), 1.0, unit="raw")
    assert [sorted(rule.features()) for rule in variant.rules] == [[3, 5], [7]]
    for bad in (True, np.int64(48), [np.int64(-1)]):
        with pytest.raises(InputError, match="is not a feature of this SAE"):
            variant.set(bad, 1.0, unit="raw")


def test_what_cannot_be_looked_at_is_one_sentence(variant) -> None:
    seen = variant.inspect(IDS[0])
    for token in (-1, 6, 10_000):
        with pytest.raises(InputError, match=rf"^token: {token} is out of range; the text has tokens 0 to 5$"):
            seen.at(token)
    for look in (seen.top, lambda k: seen.at(0, k)):
        with pytest.raises(InputError, match="^k: -3 is too small; it must be at least 1$"):
            look(-3)
    for feature in (10**6, -1):
        with pytest.raises(
            InputError, match=rf"^feature: {feature} is not a feature of this SAE; ids go from 0 to 47$"
        ):
            seen.matrix([feature])
    with pytest.raises(InputError, match="^among: '' holds no token"):
        variant.logits(IDS[0], among=["q", ""])
    with pytest.raises(InputError, match="^prompt: it has no tokens"):
        variant.logits([])
    with pytest.raises(InputError, match="^top_k: 0 is too small; it must be at least 1$"):
        variant.logits(IDS[0], top_k=0)


def test_fewer_than_one_feature_is_refused_wherever_features_are_looked_for(llama, llama_sae) -> None:
    variant = Variant(llama, llama_sae, labels={3: "sums", 4: " "})
    (response,) = variant.generate([IDS[0]], max_new_tokens=3)[0]
    for look in (
        lambda k: variant.search("sums", k),
        lambda k: variant.rerank([3], "sums", k),
        lambda k: variant.neighbors(3, k),
        lambda k: variant.contrast(IDS, IDS[::-1], k),
        lambda k: variant.attribute(response, 1, k=k),
    ):
        for k in (0, -1):
            with pytest.raises(InputError, match=f"^k: {k} is too small; it must be at least 1$"):
                look(k)
        look(1)
    with pytest.raises(InputError, match="^labels: there are none to search"):
        variant.rerank([4], "sums")


def test_texts_without_tokens_are_not_looked_at(variant) -> None:
    with pytest.raises(InputError, match="^text: it has no tokens"):
        variant.inspect([])
    for by in ("frequency", "max"):
        with pytest.raises(InputError, match="^text: '<s>' has no token but BOS, pads and ones of massive norm$"):
            variant.inspect([0]).top(3, by)


def test_what_json_says_of_where_edits_apply_is_taken_over(llama, llama_sae, variant) -> None:
    variant.where = "completion"
    assert Variant.from_json(llama, llama_sae, variant.json()).where == "completion"
    with pytest.raises(InputError, match="^variant: "):
        Variant.from_json(llama, llama_sae, {**variant.json(), "norm_limit": 0.0})


def test_an_edit_under_a_condition_leaves_room_for_one_that_holds_everywhere(variant) -> None:
    variant.set_when(Feature(5) > 0.1, 3, 1.0, unit="raw")
    variant.set(3, 2.0, unit="raw")
    assert [(rule.condition is None, rule.edits[0].add) for rule in variant.rules] == [(False, 1.0), (True, 2.0)]


def test_a_vector_is_the_rule_s_own_and_its_condition_in_units(variant) -> None:
    vector, feature = torch.ones(32), int(np.nanargmax(variant.scales.p99_F))
    variant.add_vector(vector, Feature(feature) > 0.5)
    vector[0] = 9.0
    (rule,) = variant.rules
    assert rule.vector_D.tolist() == [1.0] * 32
    assert rule.condition.left.size == variant.scales.unit(feature) != 1.0


def test_scales_leave_massive_tokens_out_and_give_silent_features_a_mean_of_0(llama, llama_sae, responses) -> None:
    model = copy.deepcopy(llama.model)
    with torch.no_grad():
        model.get_input_embeddings().weight[45] *= 1e4
    loud = [replace(responses[0], completion_ids=(*IDS[0], 45), logprobs=(0.0,) * 7), responses[1]]
    found = measure_scales(replace(llama, model=model), llama_sae, loud)
    plain = measure_scales(llama, llama_sae, responses)
    assert found.n_tokens == plain.n_tokens == 13
    np.testing.assert_allclose(found.p99_F, plain.p99_F, rtol=1e-4)
    silent = np.isnan(plain.p99_F)
    assert silent.any() and not plain.mean_F[silent].any() and plain.mean_F[~silent].all()


def test_rules_that_are_refused_halfway_leave_the_variant_as_it_was(llama, llama_sae, variant) -> None:
    variant.set({7: 1.0}, unit="raw")
    variant.set(3, 2.0, mode="pin", unit="raw")
    written, other = variant.json(), Variant(llama, llama_sae)
    other.set(3, 1.0, mode="pin", unit="raw")
    before = other.json()
    with pytest.raises(InputError, match="^feature: 3 has pin 1 already; clear it before setting pin 2"):
        other.load(written)
    assert other.json() == before
