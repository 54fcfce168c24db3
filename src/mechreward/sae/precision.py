"""Products computed as the gate measured them, whatever a trainer has set.

How torch multiplies float32 is said in two ways: since 2.9 by a setting a backend (`fp32_precision`, which decides),
and by the older `torch.set_float32_matmul_precision`, which writes those settings and keeps a note of its own beside
them. While the two contradict each other, asking for the older one is an error, here and wherever else it is asked for.
So both are set, and both are put back. A backend that has no setting of its own follows `torch.backends.fp32_precision`
(transformers' `tf32=True` writes only that), and does so again afterwards.

The settings are the whole process's. So while several threads read at once, the first that comes writes them and the
last that goes puts them back: one that finished earlier would let the others compute in TF32, and one that came later
would take ours for the trainer's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from threading import Lock
from typing import Any

import torch

# The two that compute our products; torch gives no type for what holds their settings.
BACKENDS: tuple[Any, ...] = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
PRECISE = ("ieee", "none")
"""Settings under which float32 is not shortened; "none" is said where nothing is set."""


def is_plain(device: torch.device) -> bool:
    """Whether float32 is computed as it should be, and without gradient, already."""
    precise = all(backend.fp32_precision in PRECISE for backend in BACKENDS)
    return precise and not torch.is_grad_enabled() and not torch.is_autocast_enabled(device.type)


def stays_plain(device: torch.device) -> bool:
    """Whether it `is_plain`, and not only for as long as somebody is inside `plain_float32`."""
    with _held.lock:
        return not _held.readers and is_plain(device)


@contextmanager
def plain_float32(device: torch.device) -> Iterator[None]:
    """No gradient, no autocast, no TF32: a trainer's settings must not change what the gate measured.

    Products in float16, which `screening` counts with, are summed in float32: its bounds rest on that.
    """
    with _everywhere(), torch.no_grad(), torch.autocast(device.type, enabled=False):
        yield


@dataclass
class _Held:
    """The process's settings while they are ours."""

    lock: Lock = field(default_factory=Lock)
    readers: int = 0
    """Contexts that are open, in all threads."""
    put_back: ExitStack = field(default_factory=ExitStack)


_held = _Held()


@contextmanager
def _everywhere() -> Iterator[None]:
    with _held.lock:
        if not _held.readers:
            _held.put_back.enter_context(_whole_products())
            _held.put_back.enter_context(_whole_sums())
        _held.readers += 1
    try:
        yield
    finally:
        with _held.lock:
            _held.readers -= 1
            if not _held.readers:
                _held.put_back.close()


@contextmanager
def _whole_products() -> Iterator[None]:
    own = [backend.fp32_precision for backend in BACKENDS]
    for backend in BACKENDS:
        backend.fp32_precision = "ieee"
    # Only now can the older setting be asked for: what it says contradicts nothing.
    older = torch.get_float32_matmul_precision()
    if older != "highest":
        torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        if older != "highest":
            torch.set_float32_matmul_precision(older)
        for backend, precision in zip(BACKENDS, own, strict=True):
            backend.fp32_precision = "none"
            if backend.fp32_precision != precision:
                backend.fp32_precision = precision


@contextmanager
def _whole_sums() -> Iterator[None]:
    cuda = torch.backends.cuda.matmul
    accumulation, reduction = cuda.allow_fp16_accumulation, cuda.allow_fp16_reduced_precision_reduction
    cuda.allow_fp16_accumulation = False
    # Where it is off already it may carry a note on split sums, which setting it would lose.
    if reduction:
        cuda.allow_fp16_reduced_precision_reduction = False
    try:
        yield
    finally:
        cuda.allow_fp16_accumulation = accumulation
        if reduction:
            cuda.allow_fp16_reduced_precision_reduction = True
