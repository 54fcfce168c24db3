"""A model cut at the SAE's block: what the features write is a node of its own, and so is the error they leave.

At block L, h = sum_i f_i W_dec[i] + b + err (Marks et al. 2403.19647). The error is kept, so that a pass with every
feature at its own value is the model itself, number for number. What feature i writes at a token is
f_i * `sae.decoder_rows`[i] * `sae.residual_unit`(h): the decoder's own row, undone for `input_norm` and rescaling. The
statistics that takes stay those of the clean residual.

Nodes are the completion's tokens, or the prompt's too, without those of massive norm: those no reward reads either.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mechreward.errors import InputError
from mechreward.features.targets import Target, measure
from mechreward.models import (
    LoadedModel,
    capture_blocks,
    check_layer,
    completion_logits,
    d_model,
    eval_mode,
    find_blocks,
    norm_outliers,
    unwrap,
)
from mechreward.models.residuals import pad_right
from mechreward.rollout import Response
from mechreward.sae import SAE

Places = Literal["completion", "all"]
"""Tokens at which features are nodes."""


@dataclass(frozen=True)
class Nodes:
    """One batch of rows after block L; made by `read_nodes`."""

    model: nn.Module
    sae: SAE
    prompts: list[list[int]]
    completions: list[list[int]]
    targets: list[Target]
    h_BSD: Float[Tensor, "b s d"]
    """Clean states of prompt and completion, in the model's own dtype; rows padded on the right."""
    mask_BS: Bool[Tensor, "b s"]
    """Tokens that are nodes."""

    @cached_property
    def h_ND(self) -> Float[Tensor, "n d"]:
        """States at the nodes, float32, row by row."""
        return self.h_BSD[self.mask_BS].float()

    @cached_property
    def row_N(self) -> Int[Tensor, " n"]:
        """Row of each node."""
        return self.mask_BS.nonzero()[:, 0]

    def scattered(self, values_ND: Float[Tensor, "n d"]) -> Float[Tensor, "b s d"]:
        """Values at the nodes, 0 elsewhere, in the model's dtype."""
        out_BSD = torch.zeros_like(self.h_BSD)
        out_BSD[self.mask_BS] = values_ND.to(self.h_BSD)
        return out_BSD

    def value(self, h_BSD: Float[Tensor, "b s d"]) -> Float[Tensor, " b"]:
        """Each row's m when block L puts out these states."""
        with eval_mode(unwrap(self.model)), replaced(self.model, self.sae.layer, h_BSD):
            return measure(completion_logits(self.model, self.prompts, self.completions), self.targets)

    def gradient(self, h_BSD: Float[Tensor, "b s d"]) -> tuple[Float[Tensor, " b"], Float[Tensor, "n d"]]:
        """Each row's m, and its gradient at the nodes, float32. Weights get no gradient.

        Raises:
            InputError: if the gradient is NaN or infinite.
        """
        leaf_BSD = h_BSD.detach().clone().requires_grad_()
        with eval_mode(unwrap(self.model)), replaced(self.model, self.sae.layer, leaf_BSD):
            m_B = measure(completion_logits(self.model, self.prompts, self.completions), self.targets)
            (g_BSD,) = torch.autograd.grad(m_B.sum(), leaf_BSD)
        g_ND = g_BSD[self.mask_BS].float()
        if not g_ND.isfinite().all():
            raise InputError(
                f"gradient: it is NaN or infinite after block {self.sae.layer}; check the model's weights and dtype"
            )
        return m_B.detach(), g_ND


def read_nodes(
    loaded: LoadedModel, sae: SAE, responses: Sequence[Response], targets: Sequence[Target], places: Places
) -> Nodes:
    """Reads the states of a batch by one forward that stops after block L."""
    inner = unwrap(loaded.model)
    prompts, completions = [list(r.prompt_ids) for r in responses], [list(r.completion_ids) for r in responses]
    ids_BS, seen_BS = pad_right([[*p, *c] for p, c in zip(prompts, completions, strict=True)], inner.device)
    with eval_mode(inner), capture_blocks(inner, [sae.layer]) as states:
        inner(input_ids=ids_BS, attention_mask=seen_BS.long(), use_cache=False)
    h_BSD = states[sae.layer]
    mask_BS = seen_BS.to(h_BSD.device)
    if places == "completion":
        start_B1 = torch.tensor([len(prompt) for prompt in prompts], device=h_BSD.device)[:, None]
        mask_BS = mask_BS & (torch.arange(h_BSD.shape[1], device=h_BSD.device) >= start_B1)
    mask_BS = norm_outliers(h_BSD, mask_BS)
    return Nodes(loaded.model, sae, prompts, completions, list(targets), h_BSD, mask_BS)


@contextmanager
def replaced(model: nn.Module, layer: int, h_BSD: Float[Tensor, "b s d"]) -> Iterator[None]:
    """Block `layer` puts out these states inside the `with`, whatever it computed itself.

    States that want a gradient turn gradients on from there: nothing before the block is kept for them. Use it inside
    `eval_mode`, which puts them back.
    """

    def swap(_module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> Tensor | tuple[Tensor, ...]:
        if h_BSD.requires_grad:
            torch.set_grad_enabled(True)
        return (h_BSD, *output[1:]) if isinstance(output, tuple) else h_BSD

    handle = find_blocks(model)[layer].register_forward_hook(swap)
    try:
        yield
    finally:
        handle.remove()


def check_fit(loaded: LoadedModel, sae: SAE) -> None:
    """Raises:
    InputError: if the SAE reads a block the model lacks, or another width.
    """
    check_layer(loaded.model, sae.layer)
    if sae.d_model != d_model(loaded.model):
        raise InputError(
            f"sae: it reads residuals of width {sae.d_model}, but {loaded.name} has width {d_model(loaded.model)}"
        )
