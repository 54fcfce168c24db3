"""Catching what blocks put out during a forward, which may be ended there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from mechreward.errors import InputError
from mechreward.models.blocks import check_layer, find_blocks


class _ForwardStopped(Exception):
    """Ends a forward that has given what was wanted; never leaves `capture_blocks`."""


@contextmanager
def capture_blocks(model: nn.Module, layers: Sequence[int], stop: bool = True) -> Iterator[dict[int, Tensor]]:
    """Catches the outputs of blocks `layers` of a forward run inside the `with`: one tensor a layer, of the latest one.

    With `stop` the forward ends right after the last of them, and with it the body of the `with`: put nothing behind
    it there.

    Example:
        >>> with capture_blocks(model, [2, 5]) as states:  # doctest: +SKIP
        ...     model(ids_BT)
        >>> states[5].shape  # doctest: +SKIP
    """
    check_layers(model, layers)
    states: dict[int, Tensor] = {}
    signal, blocks = _ForwardStopped(), find_blocks(model)

    def keep(layer: int, output: Tensor | tuple[Tensor, ...]) -> None:
        states[layer] = output[0] if isinstance(output, tuple) else output
        if stop and layer == max(layers):
            raise signal

    with ExitStack() as hooks:
        for layer in set(layers):
            handle = blocks[layer].register_forward_hook(lambda _m, _i, output, layer=layer: keep(layer, output))
            hooks.callback(handle.remove)
        try:
            yield states
        except _ForwardStopped as stopped:
            if stopped is not signal:  # of a capture further out
                raise


def check_layers(model: nn.Module, layers: Sequence[int]) -> None:
    """Raises:
    InputError: if no block is named, or one that the model has not.
    """
    if not layers:
        raise InputError("layers: none is named; give at least one block")
    for layer in layers:
        check_layer(model, layer)
