"""The editor and the watcher on their own: closed ids, outputs that are tuples, what is shown, rows that end."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mechreward.errors import InputError
from mechreward.steering import Feature, Variant
from mechreward.steering.edits import Edit, Rule
from mechreward.steering.hook import Editor
from mechreward.steering.program import compile_rules
from mechreward.steering.watches import Moment, Watch, Watching

IDS = torch.tensor([[9, 63, 20]])


@pytest.fixture
def nudged(llama_sae) -> Any:
    return compile_rules(llama_sae, [Rule((Edit(3, 2.0, "nudge"),))])


def moved(llama, editor: Editor) -> list[bool]:
    """Which tokens the editor moves, at the block that it edits."""
    seen: list[torch.Tensor] = []
    block = llama.model.model.layers[editor.program.sae.meta.layer]
    with torch.no_grad():
        plain = llama.model(IDS, output_hidden_states=True).hidden_states[editor.program.sae.meta.layer + 1]
        with editor.on(llama.model):
            handle = block.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
            llama.model(IDS)
            handle.remove()
    return ((seen[0] - plain).abs().amax(-1)[0] > 0).tolist()


def test_the_last_id_of_the_vocabulary_can_be_closed_and_ids_beyond_it_close_nothing(llama, nudged) -> None:
    assert moved(llama, Editor(nudged, frozenset({63}))) == [True, False, True]
    assert moved(llama, Editor(nudged, frozenset({64, 10**6}))) == [True, True, True]


def test_of_an_output_that_is_a_tuple_the_rest_is_kept(llama, nudged) -> None:
    block, seen = llama.model.model.layers[nudged.sae.meta.layer], []
    first = block.register_forward_hook(lambda _module, _inputs, output: (output, torch.tensor(7)))

    def unpack(_module: object, _inputs: object, output: tuple[torch.Tensor, ...]) -> torch.Tensor:
        seen.append(output[1:])
        return output[0]

    with torch.no_grad():
        with Editor(nudged, frozenset()).on(llama.model):
            last = block.register_forward_hook(unpack)
            edited = llama.model(IDS).logits
        first.remove()
        last.remove()
        with Editor(nudged, frozenset()).on(llama.model):
            assert torch.equal(llama.model(IDS).logits, edited)
    assert seen == [(torch.tensor(7),)]


def test_a_watcher_of_no_condition_is_shown_every_forward(llama, nudged) -> None:
    shown: list[tuple[list, list, int]] = []
    editor = Editor(
        nudged,
        frozenset({63}),
        watcher=lambda ids, open_, held: shown.append((ids.tolist(), open_.tolist(), len(held))),
    )
    assert moved(llama, editor) == [True, False, True]
    assert shown == [([[9, 63, 20]], [[True, False, True]], 0)]


def test_a_row_that_has_ended_tells_nothing_and_an_eos_in_a_prompt_ends_none(llama) -> None:
    told: list[Moment] = []
    watching = Watching([Watch(Feature(3) > 0.5, told.append)], llama.tokenizer, frozenset({1}))

    def step(*rows: list[int]) -> None:
        ids = torch.tensor(rows)
        watching(ids, torch.ones_like(ids, dtype=torch.bool), [torch.ones(ids.numel(), dtype=torch.bool)])

    step([9, 1], [7, 8])
    step([1], [30])
    step([20], [31])
    assert [(m.prompt_ids, m.completion_ids) for m in told] == [
        ((9, 1), ()), ((9, 1), ()), ((7, 8), ()), ((7, 8), ()), ((7, 8), (30,)), ((7, 8), (30, 31)),
    ]  # fmt: skip


def test_two_rules_of_a_feature_are_applied_one_after_another(llama_sae) -> None:
    """f -> 2 -> 1 -> 1.5, as one step."""
    rules = [Rule((Edit(3, *edit),)) for edit in ((2.0, "pin"), (0.5, "scale"), (0.5, "nudge"))]
    program = compile_rules(llama_sae, rules)
    h_ND = torch.randn(20, 32, generator=torch.Generator().manual_seed(4)) * llama_sae.W_dec_FD.std() * 2
    wanted_ND = (1.5 - llama_sae.encode(h_ND)[:, 3:4]) * llama_sae.W_dec_FD[3]
    assert len(program.steps) == 1
    torch.testing.assert_close(program.change(h_ND, program.acts(h_ND)), wanted_ND, rtol=1e-4, atol=1e-4)
    scaled = compile_rules(llama_sae, [Rule((Edit(3, 0.5, "scale"),)), Rule((Edit(3, 3.0, "scale"),))])
    torch.testing.assert_close(scaled.steps[0].factor_K, torch.tensor([1.5]))


def test_an_unconditional_pin_may_not_contradict_a_conditional_one_before_it(llama, llama_sae) -> None:
    variant = Variant(llama, llama_sae)
    variant.set_when(Feature(5) > 0.1, 3, 2.0, mode="pin", unit="raw")
    with pytest.raises(InputError, match="^feature: 3 is pinned to 2 already, not to 3 as well"):
        variant.set(3, 3.0, mode="pin", unit="raw")
