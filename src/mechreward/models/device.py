"""Where tensors live: one reading of a device's name for models and SAEs."""

from __future__ import annotations

import torch

from mechreward.errors import InputError


def find_device(name: str) -> torch.device:
    """The device of a name: `auto` is the current CUDA device where there is one, and the CPU where there is none.

    Raises:
        InputError: if it is no device's name, or this machine has no such CUDA device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(
            f'device: {name!r} is not a torch device; use "auto", "cpu" or one such as "cuda:0"'
        ) from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"device: {name} is not there; this machine has {torch.cuda.device_count()} CUDA devices")
    return device
