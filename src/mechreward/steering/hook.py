"""The hook that edits a block's output, as a context manager: the model's weights and code are never touched.

Whether and how a token is edited depends on nothing but that token's id and residual (and, with `after`, on the ids
before it): not on padding, batch, cache or how often a token is read. So `generate` with and without a KV cache, on the
left or right padded, and one teacher-forced forward give the same edits; and whatever calls the model inside the `with`
is steered: `sample_responses`, `continue_responses`, `read_residuals`, a trainer.

**An edit acts on the token whose features it reads.** The features are read where the edit is written, at the output of
one block, so there is no delay: the condition on token t changes the state of token t, and with it the choice of t + 1.
Later blocks see the edited state; the keys and values that the block's own attention has cached do not.

Left alone, by token id: BOS and pads; by norm, where a limit is given: tokens of massive norm, which hold no content
and on which attention rests (Sun et al. 2402.17762).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from mechreward.errors import InputError
from mechreward.models import find_blocks, unwrap, vocabulary_size
from mechreward.steering.program import Program

Watcher = Callable[[Tensor, Tensor, Sequence[Tensor]], None]
"""Is shown every forward: its ids [B, S], which tokens are open to edits [B, S], and where each watched condition holds
[N], over those."""


@dataclass(eq=False)
class Editor:
    """A program at one block of one model."""

    program: Program
    closed_ids: frozenset[int]
    """Token ids that are left alone."""
    norm_limit: float | None = None
    after: Prefixes | None = None
    watcher: Watcher | None = None
    _ids_BS: Tensor | None = field(default=None, init=False)
    _open_V: Tensor = field(default_factory=lambda: torch.ones(0, dtype=torch.bool), init=False)
    _constant_D: Tensor | None = field(default=None, init=False)

    @contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """Edits every forward of the model inside the `with`; no hook is left behind."""
        inner = unwrap(model)
        constant = self.program.constant_D
        self._constant_D = None if constant is None else constant.to(inner.device, inner.dtype)
        self._open_V = torch.ones(vocabulary_size(model), dtype=torch.bool, device=inner.device)
        self._open_V[[i for i in self.closed_ids if i < len(self._open_V)]] = False
        block = find_blocks(model)[self.program.sae.meta.layer]
        begun = inner.register_forward_pre_hook(self._forget)
        seen = inner.get_input_embeddings().register_forward_pre_hook(self._see)
        edit = block.register_forward_hook(self._edit)
        try:
            yield
        finally:
            for hook in (begun, seen, edit):
                hook.remove()
            self._ids_BS = None

    def _forget(self, _module: nn.Module, _inputs: object) -> None:
        """Before each forward: one of `inputs_embeds` brings no ids, and must not be edited by those of another."""
        self._ids_BS = None

    def _see(self, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self._ids_BS = inputs[0]

    def _edit(
        self, _module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]
    ) -> Tensor | tuple[Tensor, ...]:
        if isinstance(output, tuple):
            return (self._edited(output[0]), *output[1:])
        return self._edited(output)

    def _edited(self, h_BSD: Float[Tensor, "b s d"]) -> Float[Tensor, "b s d"]:
        open_BS = self._open(h_BSD)
        if self._constant_D is not None and self.watcher is None:
            return h_BSD + (self._constant_D if open_BS is None else self._constant_D * open_BS[..., None])
        h_ND = h_BSD.flatten(0, 1) if open_BS is None else h_BSD[open_BS]
        if not len(h_ND):
            self._tell(open_BS, [torch.zeros(0, dtype=torch.bool, device=h_ND.device) for _ in self.program.watched])
            return h_BSD
        acts_NR = self.program.acts(h_ND)
        change_ND = self.program.change(h_ND, acts_NR).to(h_BSD)
        if self.watcher is not None:
            named = self.program.named(acts_NR)
            self._tell(open_BS, [condition.holds(named) for condition in self.program.watched])
        if open_BS is None:
            return h_BSD + change_ND.view_as(h_BSD)
        return h_BSD.index_put((open_BS,), h_ND + change_ND)

    def _tell(self, open_BS: Bool[Tensor, "b s"] | None, held: Sequence[Tensor]) -> None:
        """Shows the watcher, if there is one, a forward: also one of which no token is open, or it would lose count."""
        if self.watcher is not None:
            assert self._ids_BS is not None
            shown_BS = torch.ones_like(self._ids_BS, dtype=torch.bool) if open_BS is None else open_BS
            self.watcher(self._ids_BS, shown_BS, held)

    def _open(self, h_BSD: Float[Tensor, "b s d"]) -> Bool[Tensor, "b s"] | None:
        """Tokens that are edited; None: all."""
        ids_BS = self._ids_BS
        if ids_BS is None or ids_BS.shape != h_BSD.shape[:2]:
            raise InputError(
                "inputs_embeds: a steered model needs token ids, to tell text from padding; pass input_ids"
            )
        open_BS = None
        # A step with a cache: looking the few ids up one by one is faster than a mask of them.
        if ids_BS.shape[1] > 1 or not self.closed_ids.isdisjoint(ids_BS[:, 0].tolist()):
            open_BS = self._open_V[ids_BS]
            if self.after is not None and ids_BS.shape[1] > 1:
                open_BS = open_BS & self.after.passed(ids_BS)
        if self.norm_limit is not None:
            within_BS = h_BSD.norm(dim=-1) <= self.norm_limit
            open_BS = within_BS if open_BS is None else open_BS & within_BS
        return None if open_BS is None or bool(open_BS.all()) else open_BS


class Prefixes:
    """Where edits start: at the last token of whichever prefix a row begins with, so that the first token after it is
    already drawn from an edited state (CAA, 2312.06681, adds its vector to all tokens after the prompt).

    A forward over one token a row is taken as a step with a KV cache, whose rows are past their prefixes.

    Args:
        prefixes: token ids, not empty.
        pad_id: pads in front of a row, or of a prefix, are not looked at.

    Raises:
        InputError: if there is none, one is empty, or one begins with another, which would leave open which is meant.
    """

    def __init__(self, prefixes: Sequence[Sequence[int]], pad_id: int) -> None:
        self.pad_id = pad_id
        known = sorted({self._bare(list(prefix))[1] for prefix in prefixes})
        if not known or not known[0]:
            raise InputError("after: a prefix has no tokens, or none is given; give at least one token each")
        for first, second in zip(known, known[1:], strict=False):
            if second[: len(first)] == first:
                raise InputError(
                    f"after: a prefix of {len(second)} tokens begins with another of {len(first)}; run them apart"
                )
        self.known, self.lengths = set(known), sorted({len(prefix) for prefix in known})

    def passed(self, ids_BS: Int[Tensor, "b s"]) -> Bool[Tensor, "b s"]:
        """True from the last token of each row's prefix on.

        Raises:
            InputError: if a row begins with none of the prefixes.
        """
        start_B = torch.tensor([self._start(row) for row in ids_BS.tolist()], device=ids_BS.device)
        return torch.arange(ids_BS.shape[1], device=ids_BS.device) >= start_B[:, None]

    def _start(self, row: list[int]) -> int:
        pads, bare = self._bare(row)
        for length in self.lengths:
            if bare[:length] in self.known:
                return pads + length - 1
        raise InputError(f"after: a row of {len(bare)} tokens begins with none of the {len(self.known)} prefixes given")

    def _bare(self, row: list[int]) -> tuple[int, tuple[int, ...]]:
        pads = next((place for place, token in enumerate(row) if token != self.pad_id), len(row))
        return pads, tuple(row[pads:])


def unnested(prefixes: Sequence[Sequence[int]]) -> list[list[int]]:
    """Places of the prefixes, in groups within which none begins with a shorter one: grouped by how many it begins with
    of all, since that number grows from a prefix to one that begins with it."""
    rows = [tuple(prefix) for prefix in prefixes]
    known, lengths = set(rows), {len(row) for row in rows}
    groups: dict[int, list[int]] = {}
    for place, row in enumerate(rows):
        depth = sum(row[:length] in known for length in lengths if length < len(row))
        groups.setdefault(depth, []).append(place)
    return [groups[depth] for depth in sorted(groups)]


def closed_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that no edit touches: BOS and the pad."""
    return frozenset(i for i in (tokenizer.bos_token_id, tokenizer.pad_token_id) if i is not None)
