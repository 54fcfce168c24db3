"""A whole sweep: what each arm is, what it is asked, and every number of its points counted here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from mechreward.errors import InputError
from mechreward.gates import paired_test
from mechreward.models import read_residuals
from mechreward.rollout import Response
from mechreward.steering import Protocol, Scales, Variant, repetition, sweep
from mechreward.steering.sweep import mean_change

TEXTS, TOLD = ["12+7=", "a", "sam has 3 +"], "b=2, "
OPTIONS = {"max_new_tokens": 4, "n": 2, "temperature": 0.9, "batch_size": 6, "seed": 4}
WEIGHTS, UNITS = {3: 16.0, 17: -8.0}, {3: 0.5, 17: 1.5}


def score(place: int, response: Response) -> float:
    return (sum(response.completion_ids) + 7 * place) % 11 / 10


@pytest.fixture
def variant(llama, llama_sae) -> Variant:
    """With an edit of its own, which every arm keeps."""
    units_F = np.full(llama_sae.d_sae, np.nan)
    units_F[list(UNITS)] = list(UNITS.values())
    made = Variant(llama, llama_sae, scales=Scales(units_F, units_F, 1e6, 13, llama_sae.weights_hash))
    made.set(5, 2.0, mode="pin", unit="raw")
    return made


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[Variant, list[str], dict[str, Any], list[Response]]]]:
    """Every call of `generate`: the variant, the prompts, the options and what came."""
    calls: list[tuple[Variant, list[str], dict[str, Any], list[Response]]] = []
    inner = Variant.generate

    def generate(self: Variant, prompts: list[str], **options: Any) -> list[list[Response]]:
        drawn = inner(self, prompts, **options)
        calls.append((self, prompts, options, [response for group in drawn for response in group]))
        return drawn

    monkeypatch.setattr(Variant, "generate", generate)
    yield calls


def added(edited: Variant, drawn: list[Response]) -> torch.Tensor:
    """What the hook itself adds to each completion token of some responses, [N, D]."""
    prompts, completions = [list(r.prompt_ids) for r in drawn], [list(r.completion_ids) for r in drawn]
    plain, mask = read_residuals(edited.loaded.model, prompts, completions, edited.sae.meta.layer)
    with edited.steered():
        moved, _ = read_residuals(edited.loaded.model, prompts, completions, edited.sae.meta.layer)
    return (moved - plain)[mask]


def nats(variant: Variant, response: Response) -> float:
    """A response's summed NLL under the model as it is."""
    ids = torch.tensor([[*response.prompt_ids, *response.completion_ids]])
    with torch.no_grad():
        logprobs = variant.loaded.model(ids).logits[0].log_softmax(-1)
    start = len(response.prompt_ids) - 1
    return -sum(float(logprobs[start + t, token]) for t, token in enumerate(response.completion_ids))


def test_every_arm_of_a_sweep_by_hand(variant: Variant, asked: list) -> None:
    protocol = Protocol(prompts=TEXTS, score=score, nll_margin=0.05, repetition_margin=1.0, **OPTIONS)
    controls = ("bias", "prompt", "wrong_sign", "random")
    curve = sweep(variant, WEIGHTS, [1.0, 0.25], protocol, mode="pin", controls=controls, instruction=TOLD)
    names = [(p.arm, p.strength) for p in curve.points]
    assert names[:1] + names[-1:] == [("none", 0.0), ("prompt", 0.0)] and len(names) == 10
    assert {strength: {arm for arm, s in names if s == strength} for strength in (1.0, 0.25)} == {
        s: {"edit", "random", "wrong_sign", "bias"} for s in (1.0, 0.25)
    }
    assert [p.strength for p in curve.arm("edit")] == [0.25, 1.0]
    calls = dict(zip(names, asked, strict=True))
    for (arm, strength), (used, prompts, options, _) in calls.items():
        assert prompts == ([TOLD + text for text in TEXTS] if arm == "prompt" else TEXTS) and options == OPTIONS
        edited = variant.copy()
        if arm in ("edit", "random", "wrong_sign"):
            pins = {f: strength * weight * UNITS[f] for f, weight in WEIGHTS.items()}
            edited.set(pins, mode="pin", unit="raw")
        if arm == "bias":
            pinned, plain = calls["edit", strength][0], calls["none", 0.0][3]
            change = added(pinned, plain)
            edited.add_vector((change - added(variant, plain))[change.abs().amax(-1) > 1e-3].mean(0))
        assert [rule.features() for rule in used.rules] == [rule.features() for rule in edited.rules]
        for mine, wanted in zip(used.rules, edited.rules, strict=True):
            assert [(e.add, e.factor) for e in mine.edits] == [(e.add, e.factor) for e in wanted.edits]
            if wanted.vector_D is not None:
                torch.testing.assert_close(mine.vector_D, wanted.vector_D, rtol=1e-3, atol=1e-3)
        turned = {"random": ("random", 4), "wrong_sign": ("wrong_sign", 4)}
        assert (used.control, used.control_seed) == turned.get(arm, (None, 0))
    check_numbers(curve.points, calls, variant)
    assert {p.fluent for p in curve.points} == {True, False}


def check_numbers(points: list, calls: dict, variant: Variant) -> None:
    cost, again, each = {}, {}, {}
    for key, (*_, drawn) in calls.items():
        cost[key] = sum(nats(variant, r) for r in drawn) / sum(len(r.completion_ids) for r in drawn)
        again[key] = float(np.mean([repetition(r.completion_ids) for r in drawn]))
        scores = np.array([score(i // 2, r) for i, r in enumerate(drawn)]).reshape(3, 2)
        each[key] = {str(i): float(scores[i].mean()) for i in range(3)}
    for point in points:
        key = point.arm, point.strength
        assert point.behaviour == pytest.approx(np.mean(list(each[key].values())))
        assert point.low <= point.behaviour <= point.high and point.n_prompts == 3
        assert (point.nll, point.repetition) == (pytest.approx(cost[key], abs=1e-4), pytest.approx(again[key]))
        assert point.fluent == (cost[key] <= cost["none", 0.0] + 0.05)
        assert point.against_none == (None if point.arm == "none" else paired_test(each["none", 0.0], each[key]))


def test_text_that_repeats_more_is_not_fluent(variant: Variant, monkeypatch: pytest.MonkeyPatch) -> None:
    """The unsteered text repeats 0; the edited ones have 9 and 8 of 13 four-grams twice, against a margin of 8 / 13."""
    rows = iter([range(16), [4] * 10 + [*range(10, 16)], [4] * 11 + [*range(10, 15)]])

    def generate(_: Variant, prompts: list[str], **__: Any) -> list[list[Response]]:
        ids = tuple(4 + i % 50 for i in next(rows))
        return [[Response(str(i), 0, (9,), ids, "", (-1.0,) * 16, "length")] for i in range(len(prompts))]

    monkeypatch.setattr(Variant, "generate", generate)
    protocol = Protocol(prompts=TEXTS, score=score, nll_margin=1e9, repetition_margin=6 / 13)
    curve = sweep(variant, 3, [1.0, 2.0], protocol, controls=())
    assert [p.repetition for p in curve.points] == pytest.approx([0.0, 6 / 13, 7 / 13])
    assert [p.fluent for p in curve.points] == [True, True, False]


def test_rows_are_flat(variant: Variant) -> None:
    curve = sweep(variant, 3, [1.0], Protocol(prompts=TEXTS, score=score, max_new_tokens=2), controls=("wrong_sign",))
    rows = curve.rows()
    assert [row["arm"] for row in rows] == ["none", "edit", "wrong_sign"]
    assert (rows[0]["difference"], rows[0]["p_value"]) == (None, None)
    for row, point in zip(rows[1:], curve.points[1:], strict=True):
        assert row["difference"] == pytest.approx(point.behaviour - curve.points[0].behaviour)
        assert row["p_value"] == point.against_none.p_value and "against_none" not in row


def test_what_cannot_be_swept(variant: Variant) -> None:
    texts = Protocol(prompts=TEXTS, score=score)
    for protocol, instruction in ((texts, None), (replace(texts, prompts=[[9, 20], [7]]), TOLD)):
        with pytest.raises(InputError, match="^instruction: the control prompt needs one, and prompts that are texts$"):
            sweep(variant, 3, [1.0], protocol, controls=("prompt",), instruction=instruction)
    with pytest.raises(InputError, match="^prompts: 1 are given; intervals over prompts need at least 2$"):
        sweep(variant, 3, [1.0], replace(texts, prompts=["a"]), controls=())
    for value in (float("nan"), 5.0, -0.5):
        with pytest.raises(InputError, match=f"^score: it gave {value} for prompt 0; a behaviour goes from 0 to 1$"):
            sweep(variant, 3, [1.0], replace(texts, score=lambda *_, value=value: value, max_new_tokens=2), controls=())


def test_the_mean_change_is_one_of_the_tokens_that_the_edit_touches(variant: Variant) -> None:
    """BOS (0), the pad (2) and the token of largest norm stay as they are, and have no share in the mean."""
    drawn = [
        Response("0", 0, (0, 5), (9, 0, 31, 2, 40), "", (0.0,) * 5, "length"),
        Response("1", 0, (0, 5), (7, 30, 8, 50), "", (0.0,) * 4, "length"),
    ]
    variant.set(range(6, 48), 3.0, mode="scale")  # a change that is another one at each token
    prompts, completions = [list(r.prompt_ids) for r in drawn], [list(r.completion_ids) for r in drawn]
    h, mask = read_residuals(variant.loaded.model, prompts, completions, variant.sae.meta.layer)
    norms = h[mask].norm(dim=-1)
    norms[[1, 3]] = 0.0
    variant.norm_limit = float(norms.sort().values[-2:].mean())
    change = added(variant, drawn)
    touched = change.abs().amax(-1) > 1e-3
    assert [i for i, moved in enumerate(touched.tolist()) if not moved] == sorted({1, 3, int(norms.argmax())})
    assert len({tuple(row.tolist()) for row in change[touched]}) == int(touched.sum())
    torch.testing.assert_close(mean_change(variant, drawn), change[touched].mean(0), rtol=1e-4, atol=1e-4)
    closed = [replace(drawn[0], completion_ids=(0, 2), logprobs=(0.0,) * 2)]
    assert not mean_change(variant, closed).any()
