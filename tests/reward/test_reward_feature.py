"""FeatureReward on hand-sized SAEs (exact numbers) and through a tiny model against an independent forward."""

from __future__ import annotations

import copy
import logging
import math
import statistics

import pytest
import torch

from mechreward.errors import InputError
from mechreward.features import (
    FeaturePack,
    PackFeature,
    PackPrompt,
    PackValidation,
    ReportedFigures,
    SAERef,
    sae_ref,
    save_pack,
)
from mechreward.reward import FeatureReward, LastKAggregation, SigmoidSquash
from mechreward.reward.feature_reward import read_tokens
from mechreward.sae import SAE, SAEMeta

LAYER = 1


def identity_sae(width: int = 3, layer: int = LAYER, model_name: str = "") -> SAE:
    """A ReLU SAE whose feature k is the k-th coordinate, where it is positive."""
    return SAE(
        architecture="relu",
        W_enc_DF=torch.eye(width),
        b_enc_F=torch.zeros(width),
        W_dec_FD=torch.eye(width),
        b_dec_D=torch.zeros(width),
        meta=SAEMeta(release="r", sae_id="i", layer=layer, model_name=model_name, hook_name="h"),
    )


def random_sae(width: int, features: int, layer: int = LAYER) -> SAE:
    generator = torch.Generator().manual_seed(5)
    encoder = torch.randn(width, features, generator=generator)
    return SAE(
        architecture="topk",
        W_enc_DF=encoder,
        b_enc_F=torch.zeros(features),
        W_dec_FD=encoder.T.clone(),
        b_dec_D=torch.zeros(width),
        meta=SAEMeta(release="r", sae_id="i", layer=layer, model_name="", hook_name="h"),
        k=32,
    )


def pack_of(sae: SAE, features: list[PackFeature], **options) -> FeaturePack:
    ref = SAERef(
        release="r",
        sae_id="i",
        layer=sae.meta.layer,
        d_model=sae.d_model,
        d_sae=sae.d_sae,
        weights_hash=sae.weights_hash,
    )
    return FeaturePack(name="p", model_name="", sae=ref, features=features, **options)


H = torch.tensor(
    [[[1.0, 2.0, 0.0], [3.0, -1.0, 1.0], [9.0, 9.0, 9.0]], [[0.0, 4.0, 2.0], [5.0, 5.0, 5.0], [0.5, 0.0, 8.0]]]
)
MASK = torch.tensor([[1, 1, 0], [1, 0, 1]]).bool()


def test_per_token_by_hand() -> None:
    sae = identity_sae()
    reward = FeatureReward({0: 2.0, 1: -1.0}, sae)
    assert reward.compute_per_token(H, MASK).tolist() == [[0.0, 6.0, 0.0], [-4.0, 0.0, 1.0]]


def test_scale_divides_in_the_saes_units() -> None:
    sae = identity_sae()
    pack = pack_of(sae, [PackFeature(id=0, weight=2.0, scale=4.0), PackFeature(id=2, weight=1.0, scale=0.5)])
    reward = FeatureReward.from_pack(pack, sae=sae)
    # .5 * a_0 + 2 * a_2
    assert reward.compute_per_token(H, MASK).tolist() == [[0.5, 3.5, 0.0], [4.0, 0.0, 16.25]]


@pytest.mark.parametrize(
    ("aggregation", "expected"),
    [("mean", [3.0, -1.5]), ("per_token", [3.0, -1.5]), ("max", [6.0, 1.0]), ("last", [6.0, 1.0])],
)
def test_pooled_by_hand(aggregation: str, expected: list[float]) -> None:
    reward = FeatureReward({0: 2.0, 1: -1.0}, identity_sae(), aggregation=aggregation)
    assert reward.compute(H, MASK).tolist() == expected


def test_rows_without_tokens_are_nan_and_masked_nan_does_no_harm() -> None:
    reward = FeatureReward({0: 1.0}, identity_sae())
    spoiled = H.masked_fill(~MASK[..., None], torch.nan)
    assert torch.equal(reward.compute_per_token(spoiled, MASK), reward.compute_per_token(H, MASK))
    pooled = reward.compute(H, torch.tensor([[1, 1, 0], [0, 0, 0]]).bool())
    assert pooled[0].item() == 2.0 and pooled[1].isnan()


def test_an_unmasked_nan_is_named() -> None:
    spoiled = H.clone()
    spoiled[1, 2, 0] = torch.nan
    with pytest.raises(InputError, match="row 1 is NaN or infinite at completion token 2"):
        FeatureReward({0: 1.0}, identity_sae()).compute_per_token(spoiled, MASK)


def test_massive_tokens_are_left_out_row_by_row() -> None:
    quiet = torch.ones(1, 5, 3)
    massive = quiet.clone()
    massive[0, 0] *= 11
    loud = 1000 * torch.ones(1, 5, 3)
    reward = FeatureReward({0: 1.0}, identity_sae())
    mask = torch.ones(1, 5).bool()
    assert reward.compute_per_token(massive, mask).tolist() == [[0.0, 1.0, 1.0, 1.0, 1.0]]
    assert reward.compute(massive, mask).item() == 1.0  # the mean is over the four that count
    # What else is in the batch changes nothing: neither a row of large norms nor one of small.
    both = reward.compute_per_token(torch.cat([massive, loud, quiet]), mask.expand(3, 5))
    assert torch.equal(both[:1], reward.compute_per_token(massive, mask))
    assert both[1].tolist() == [1000.0] * 5 and both[2].tolist() == [1.0] * 5


def test_no_gradient_reaches_the_residuals() -> None:
    h = H.clone().requires_grad_()
    assert not FeatureReward({0: 1.0}, identity_sae()).compute_per_token(h, MASK).requires_grad


def test_spec_hash_is_the_packs_and_follows_what_is_paid() -> None:
    sae = identity_sae()
    pack = pack_of(sae, [PackFeature(id=0, weight=2.0, scale=1.0), PackFeature(id=1, weight=-1.0, scale=1.0)])
    assert FeatureReward.from_pack(pack, sae=sae).spec_hash == pack.spec_hash
    assert FeatureReward.from_pack(pack, sae=sae, aggregation="per_token").spec_hash == pack.spec_hash
    assert FeatureReward.from_pack(pack, sae=sae, aggregation="max").spec_hash != pack.spec_hash
    assert FeatureReward({0: 2.0, 1: -1.0}, sae).spec_hash == pack.spec_hash
    assert FeatureReward({0: 2.0, 1: -1.5}, sae).spec_hash != pack.spec_hash


def test_gate_counts_only_for_the_reward_it_scored() -> None:
    sae = identity_sae()
    bare = pack_of(sae, [PackFeature(id=0, weight=2.0, scale=1.0)])

    def validated(verdict: str, spec_hash: str) -> FeatureReward:
        validation = PackValidation(
            spec_hash=spec_hash, verdict=verdict, within_auroc=0.7, interval=(0.6, 0.8), n_questions=9
        )
        return FeatureReward.from_pack(bare.model_copy(update={"validation": validation}), sae=sae)

    assert validated("pass", bare.spec_hash).gate_passed
    assert not validated("pass", "0" * 64).gate_passed
    assert not validated("inconclusive", bare.spec_hash).gate_passed
    assert not FeatureReward.from_pack(bare, sae=sae).gate_passed


def test_a_pack_keeps_its_own_pooling_unless_told_otherwise() -> None:
    sae = identity_sae()
    pack = pack_of(sae, [PackFeature(id=1, weight=1.0, scale=1.0)], pooling="max")
    assert FeatureReward(pack, sae).aggregation == "max"
    assert FeatureReward(pack, sae).spec_hash == FeatureReward.from_pack(pack, sae).spec_hash == pack.spec_hash
    assert FeatureReward(pack, sae, aggregation="mean").aggregation == "mean"
    assert FeatureReward({1: 1.0}, sae).aggregation == "mean"


def test_from_pack_reads_a_file(tmp_path) -> None:
    sae = identity_sae()
    save_pack(pack_of(sae, [PackFeature(id=1, weight=1.0, scale=1.0)], pooling="max"), tmp_path / "pack.json")
    reward = FeatureReward.from_pack(str(tmp_path / "pack.json"), sae=sae)
    assert reward.aggregation == "max" and reward.feature_ids() == [1] and reward.layer == LAYER


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: FeatureReward({3: 1.0}, identity_sae()), "features: id 3 is not one of the SAE's; ids go from 0 to 2"),
        (lambda: FeatureReward({}, identity_sae()), "features: the dictionary is empty"),
        (lambda: FeatureReward({0: 1.0}, identity_sae(), aggregation="sum"), "aggregation: 'sum'"),
        (lambda: FeatureReward({0: 1.0}, identity_sae(), normalization="z"), "normalization: 'z' is not one of"),
        (
            lambda: FeatureReward(pack_of(identity_sae(), [PackFeature(id=0, weight=1.0, scale=1.0)]), identity_sae(4)),
            "was made for an SAE with d_model 3, this one has 4",
        ),
        (
            lambda: FeatureReward({0: 1.0}, identity_sae()).compute_per_token(
                torch.zeros(1, 1, 4), torch.ones(1, 1).bool()
            ),
            "residuals: width 4, but the SAE reads 3",
        ),
        (lambda: FeatureReward({0: 1.0}, identity_sae())(["p"], ["c"]), "the pack names no model; call reward.bind"),
        (lambda: FeatureReward({0: 1.0}, identity_sae())(["p"], []), "completions: 0 for 1 prompts"),
    ],
)
def test_bad_input_is_named(build, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build()


def test_bind_checks_layer_and_width(tiny_llama, char_tokenizer) -> None:
    with pytest.raises(InputError, match="its residual width is 32, but the SAE reads 3"):
        FeatureReward({0: 1.0}, identity_sae()).bind(tiny_llama, char_tokenizer)
    with pytest.raises(InputError, match="layer: 9 is out of range"):
        FeatureReward({0: 1.0}, random_sae(32, 64, layer=9)).bind(tiny_llama, char_tokenizer)
    with pytest.raises(InputError, match="layer: 2 is not the layer of the SAE, which reads 1"):
        FeatureReward({0: 1.0}, random_sae(32, 64)).bind(tiny_llama, char_tokenizer, layer=2)


WEIGHTS = {3: 1.0, 7: -0.5, 11: 2.0, 40: 1.0, 60: -1.5}


def token_by_token(model, sae: SAE, prompt: list[int], completion: list[int]) -> list[float]:
    """Reads each token's state from a forward of its own that ends with it; encodes with all features."""
    rewards = []
    for t in range(len(completion)):
        ids = torch.tensor([prompt + completion[: t + 1]])
        with torch.no_grad():
            hidden = model(ids, output_hidden_states=True).hidden_states[LAYER + 1][0, -1]
        acts = sae.encode(hidden)
        rewards.append(sum(weight * acts[i].item() for i, weight in WEIGHTS.items()))
    return rewards


PROMPTS = ["12+3=", "a", "what is 7?"]
COMPLETION_IDS = [[10, 11, 12, 1], [20, 21, 22, 23, 24, 25, 26], [30, 1]]


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_qwen2", "tiny_gpt2"])
def test_call_equals_an_independent_forward_token_by_token(name: str, request, char_tokenizer) -> None:
    model, sae = request.getfixturevalue(name), random_sae(32, 64)
    reward = FeatureReward(WEIGHTS, sae).bind(model, char_tokenizer)
    prompt_ids = [char_tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    expected = [token_by_token(model, sae, p, c) for p, c in zip(prompt_ids, COMPLETION_IDS, strict=True)]
    [(reward_BT, readable_BT)] = read_tokens([reward], model, prompt_ids, COMPLETION_IDS, batch_size=2)
    assert [mask.sum().item() for mask in readable_BT] == [4, 7, 2]
    for row, values in enumerate(expected):
        assert reward_BT[row, : len(values)].tolist() == pytest.approx(values, rel=1e-3, abs=1e-3)
    pooled = reward(PROMPTS, ["ignored"] * 3, completion_ids=COMPLETION_IDS)
    assert pooled == pytest.approx([sum(v) / len(v) for v in expected], rel=1e-3, abs=1e-3)
    assert len({round(value, 3) for values in expected for value in values}) > 8


def test_a_completion_without_tokens_is_none(tiny_llama, char_tokenizer) -> None:
    reward = FeatureReward(WEIGHTS, random_sae(32, 64)).bind(tiny_llama, char_tokenizer)
    values = reward(["a", "b"], ["", "x"], completion_ids=[[], [5]])
    assert values[0] is None and isinstance(values[1], float)
    assert reward(["a"], [""]) == [None]


def test_two_layers_are_read_apart(tiny_llama) -> None:
    rewards = [FeatureReward(WEIGHTS, random_sae(32, 64, layer)) for layer in (1, 2)]
    both = read_tokens(rewards, tiny_llama, [[5, 6]], [[7, 8, 9]])
    alone = [read_tokens([reward], tiny_llama, [[5, 6]], [[7, 8, 9]])[0] for reward in rewards]
    assert [torch.equal(a[0], b[0]) for a, b in zip(both, alone, strict=True)] == [True, True]
    assert not torch.allclose(both[0][0], both[1][0])


def test_without_ids_the_text_is_tokenised(tiny_llama, char_tokenizer) -> None:
    reward = FeatureReward(WEIGHTS, random_sae(32, 64)).bind(tiny_llama, char_tokenizer)
    ids = char_tokenizer("abc", add_special_tokens=False)["input_ids"]
    assert reward(["x="], ["abc"]) == reward(["x="], ["anything"], completion_ids=[ids])


def test_per_token_in_a_plain_trainer_warns_once(tiny_llama, char_tokenizer, caplog) -> None:
    reward = FeatureReward(WEIGHTS, random_sae(32, 64), aggregation="per_token").bind(tiny_llama, char_tokenizer)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            reward(["x"], ["y"], trainer_state=object())
    assert [record.message.count("MechRewardGRPOTrainer") for record in caplog.records] == [0, 1]
    assert "gate 1: not run) carries no passed gate" in caplog.messages[0]


def test_only_a_passed_gate_of_our_own_is_no_warning(tiny_llama, char_tokenizer, caplog) -> None:
    sae = random_sae(32, 64)
    bare = FeaturePack(
        name="p", model_name="", sae=sae_ref(sae), features=[PackFeature(id=3, weight=1.0, scale=1.0)],
        reported=ReportedFigures(source="them", claims={"verdict": "PASS"}),
    )  # fmt: skip
    passed = PackValidation(
        spec_hash=bare.spec_hash, verdict="pass", within_auroc=0.7, interval=(0.6, 0.8), n_questions=9
    )
    with caplog.at_level(logging.WARNING):
        for pack in (bare, bare.model_copy(update={"validation": passed})):
            reward = FeatureReward(pack, sae).bind(tiny_llama, char_tokenizer)
            reward(["x"], ["y"], completion_ids=[[5]])  # not in training: nothing to say
            reward(["x"], ["y"], trainer_state=object())
    assert [message.count("reported by its authors, not reproduced") for message in caplog.messages] == [1]


def test_a_pack_without_a_weights_hash_takes_on_the_saes() -> None:
    """So that what is gated and trained with is tied to these weights."""
    sae = random_sae(32, 64)
    ref, features = sae_ref(sae), [PackFeature(id=3, weight=1.0, scale=1.0)]
    known = FeaturePack(name="p", model_name="", sae=ref, features=features)
    unknown = known.model_copy(update={"sae": ref.model_copy(update={"weights_hash": None})})
    assert unknown.spec_hash != known.spec_hash
    assert FeatureReward(unknown, sae).spec_hash == FeatureReward(known, sae).spec_hash == known.spec_hash


def test_prompts_of_another_form_are_named_when_called(tiny_llama, char_tokenizer, caplog) -> None:
    sae = random_sae(32, 64)
    features, prompt = [PackFeature(id=3, weight=1.0, scale=1.0)], PackPrompt(format="Q: {question}")
    pack = FeaturePack(name="p", model_name="", sae=sae_ref(sae), features=features, prompt=prompt)
    reward = FeatureReward(pack, sae).bind(tiny_llama, char_tokenizer)
    with caplog.at_level(logging.WARNING):
        reward(["Q: x"], ["y"], completion_ids=[[5]])
        assert not caplog.messages
        for _ in range(2):
            reward(["x"], ["y"], completion_ids=[[5]])
    assert [message.count("'Q: {question}', but is read on a plain prompt 'x'") for message in caplog.messages] == [1]


def test_the_sae_goes_where_the_model_is(tiny_llama, char_tokenizer, monkeypatch) -> None:
    moves, move = [], SAE.to
    monkeypatch.setattr(SAE, "to", lambda sae, device: moves.append(device) or move(sae, "cpu"))
    monkeypatch.setattr(type(tiny_llama), "device", torch.device("cuda:3"))
    FeatureReward(WEIGHTS, random_sae(32, 64)).bind(tiny_llama, char_tokenizer)
    assert moves == [torch.device("cuda:3")]


def test_bound_on_first_use_from_the_packs_model(tiny_llama, char_tokenizer, tmp_path) -> None:
    tiny_llama.save_pretrained(tmp_path)
    char_tokenizer.save_pretrained(tmp_path)
    sae = random_sae(32, 64)
    features = [PackFeature(id=id_, weight=weight, scale=1.0) for id_, weight in WEIGHTS.items()]
    pack = pack_of(sae, features).model_copy(update={"model_name": str(tmp_path)})
    unbound = FeatureReward.from_pack(pack, sae=sae)
    bound = FeatureReward(WEIGHTS, sae).bind(tiny_llama, char_tokenizer)
    assert unbound(["x"], ["y"], completion_ids=[[5, 6]]) == pytest.approx(bound(["x"], ["y"], completion_ids=[[5, 6]]))


def test_ids_of_another_tokenizer_are_named(tiny_llama, char_tokenizer) -> None:
    reward = FeatureReward(WEIGHTS, random_sae(32, 64)).bind(tiny_llama, char_tokenizer)
    right = char_tokenizer("abc", add_special_tokens=False)["input_ids"]
    with pytest.raises(InputError, match=r"completion_ids: in this tokenizer they do not say .* \('abc'\); bind"):
        reward(["x"], ["abc"], completion_ids=[[*right, 9]], trainer_state=object())
    chat = [[{"role": "assistant", "content": "what a trainer makes of it"}]]
    fine = FeatureReward(WEIGHTS, random_sae(32, 64)).bind(tiny_llama, char_tokenizer)
    assert fine(["x"], chat, completion_ids=[right], trainer_state=object()) == fine(["x"], ["abc"])
    assert fine(["x"], ["abc"], completion_ids=[[*right, 1]]) is not None


def test_a_chat_prompt_is_read_as_the_trainer_writes_it(tiny_llama, char_tokenizer) -> None:
    tokenizer = copy.deepcopy(char_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{{ '' if thinking else 'zz' }}"
    reward, chat = FeatureReward(WEIGHTS, random_sae(32, 64)), [[{"role": "user", "content": "ab"}]]
    for options, text in ((None, "abzz"), ({"thinking": True}, "ab")):
        reward.bind(tiny_llama, tokenizer, chat_template_kwargs=options)
        bare = FeatureReward(WEIGHTS, random_sae(32, 64)).bind(tiny_llama, tokenizer)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        [(tokens, mask)] = read_tokens([bare], tiny_llama, [ids], [[7, 8]])
        assert reward(chat, ["  "], completion_ids=[[7, 8]]) == pytest.approx([float(tokens[mask].mean())])


def test_a_chat_prompt_without_a_template_is_one_sentence(tiny_llama, char_tokenizer) -> None:
    reward, chat = FeatureReward(WEIGHTS, random_sae(32, 64)), [[{"role": "user", "content": "ab"}]]
    with pytest.raises(InputError, match="prompts: one is a chat, and the tokenizer .* has no chat template"):
        reward.bind(tiny_llama, char_tokenizer)(chat, ["a"])
    given = {"chat_template": "{% for m in messages %}{{ m.content }}{% endfor %}"}
    assert reward.bind(tiny_llama, char_tokenizer, chat_template_kwargs=given)(chat, ["a"]) != [None]


def test_images_in_a_plain_trainer_are_refused(tiny_llama, char_tokenizer) -> None:
    reward = FeatureReward(WEIGHTS, random_sae(32, 64)).bind(tiny_llama, char_tokenizer)
    parts = [{"type": "text", "text": "what is this?"}, {"type": "image", "image": object()}]
    with pytest.raises(InputError, match="prompts: a feature reward reads text only; .* of type 'image'"):
        reward([[{"role": "user", "content": parts}]], ["a"], completion_ids=[[5]])


def test_tool_output_in_a_plain_trainer_is_told_once(tiny_llama, char_tokenizer, caplog) -> None:
    reward = FeatureReward(WEIGHTS, random_sae(32, 64)).bind(tiny_llama, char_tokenizer)
    chat = [{"role": "assistant", "content": "call"}, {"role": "tool", "name": "total", "content": "7"}]
    reward(["x"], [chat[:1]], completion_ids=[[5]])
    assert not caplog.messages
    for _ in range(2):
        reward(["x", "x"], ["y", chat], completion_ids=[[5], [5, 6]])
    assert [message.count("what a tool says is paid") for message in caplog.messages] == [1]


NEWLINE = 63
"""Its id in the character tokenizer."""


@pytest.mark.parametrize("name", ["mean", "max", "last", "last_2", "weighted_mean", "step_end"])
def test_every_aggregation_in_call_equals_the_pooled_tokens(name: str, tiny_llama, char_tokenizer) -> None:
    completions = [[10, NEWLINE, 12, 1], [20, 21, 22, NEWLINE, NEWLINE, 25, 26], [30]]
    reward = FeatureReward(WEIGHTS, random_sae(32, 64), aggregation=name).bind(tiny_llama, char_tokenizer)
    prompt_ids = [char_tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    tokens = [token_by_token(tiny_llama, reward.sae, p, c) for p, c in zip(prompt_ids, completions, strict=True)]
    expected = []
    for values, ids in zip(tokens, completions, strict=True):
        n = len(values)
        ramp = [0.1 + 0.9 * i / (n - 1) if n > 1 else 1.0 for i in range(n)]
        ends = [value for i, value in enumerate(values) if ids[i] == NEWLINE or i == n - 1]
        expected.append(
            {
                "mean": sum(values) / n,
                "max": max(values),
                "last": values[-1],
                "last_2": sum(values[-2:]) / len(values[-2:]),
                "weighted_mean": sum(w * v for w, v in zip(ramp, values, strict=True)) / sum(ramp),
                "step_end": sum(ends) / len(ends),
            }[name]
        )
    paid = reward(PROMPTS, ["ignored"] * 3, completion_ids=completions)
    assert paid == pytest.approx(expected, rel=1e-3, abs=1e-3)
    assert len({round(value, 3) for value in paid}) == 3


def test_aggregations_by_hand_and_their_hash() -> None:
    sae = identity_sae()
    pack = pack_of(sae, [PackFeature(id=0, weight=1.0, scale=1.0)], pooling="last_2")
    reward = FeatureReward.from_pack(pack, sae=sae)
    assert reward.aggregation == "last_2" and reward.compute(H, MASK).tolist() == [2.0, 0.25]
    assert reward.spec_hash == pack.spec_hash
    assert FeatureReward({0: 1.0}, sae, aggregation=LastKAggregation(2)).spec_hash == pack.spec_hash
    assert FeatureReward.from_pack(pack, sae=sae, aggregation="last_3").spec_hash != pack.spec_hash
    assert FeatureReward({0: 1.0}, sae, aggregation="last_k").aggregation == "last_16"


def test_step_end_needs_to_know_where_steps_end(char_tokenizer) -> None:
    reward = FeatureReward({0: 1.0}, identity_sae(), aggregation="step_end:.")
    assert reward.step_mark == "." and reward.pack.pooling == "step_end:."
    ends = torch.tensor([[1, 0, 0], [0, 0, 0]]).bool()
    assert reward.compute(H, MASK, ends).tolist() == [2.0, 0.5]
    with pytest.raises(InputError, match="step_end: this aggregation needs a mask"):
        reward.compute(H, MASK)
    found = reward.step_ends(char_tokenizer, [[59, 5], [5]])
    assert found is not None and found.tolist() == [[True, False], [False, False]]
    other = FeatureReward({0: 1.0}, identity_sae())
    assert other.step_mark is None and other.step_ends(char_tokenizer, [[59]]) is None


def test_normalization_acts_on_the_rewards_of_one_call(tiny_llama, char_tokenizer) -> None:
    def made(**options) -> FeatureReward:
        return FeatureReward(WEIGHTS, random_sae(32, 64), **options).bind(tiny_llama, char_tokenizer)

    prompts, completion_ids = [*PROMPTS, "b"], [*COMPLETION_IDS, []]
    raw = made()(prompts, [""] * 4, completion_ids=completion_ids)
    assert raw[3] is None
    mean, std = statistics.mean(raw[:3]), statistics.pstdev(raw[:3])
    scaled = made(normalization="zscore")(prompts, [""] * 4, completion_ids=completion_ids)
    assert scaled[:3] == pytest.approx([(value - mean) / std for value in raw[:3]], rel=1e-4, abs=1e-5)
    assert scaled[3] is None
    by_object = made(normalization=SigmoidSquash(2.0))(prompts, [""] * 4, completion_ids=completion_ids)
    assert by_object[:3] == pytest.approx([1 / (1 + math.exp(-value / 2)) for value in raw[:3]], rel=1e-4)
    # Neither the hash nor what Gate 1 reads knows of it.
    plain, ranked = FeatureReward({0: 1.0}, identity_sae()), FeatureReward({0: 1.0}, identity_sae(), "mean", "rank")
    assert ranked.spec_hash == plain.spec_hash and torch.equal(ranked.compute(H, MASK), plain.compute(H, MASK))
