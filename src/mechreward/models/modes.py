"""Evaluation mode as a context manager that puts every submodule back as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Turns dropout and gradients off inside the block; afterwards each submodule has the mode it had before.

    `model.train()` would not do for the way back: it also wakes submodules that were frozen in evaluation mode.
    """
    awake = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module in awake:
            module.training = True
