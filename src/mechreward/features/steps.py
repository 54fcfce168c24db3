"""Where the steps of a completion end, as a mask over its tokens.

A step ends at a token whose own text contains a mark (a line break), or if that is masked at the last unmasked one
before it; the last token of a row ends its last step.
Credit `step`, the aggregation `step_end`, discovery and Gate 1 all ask here.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Bool
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from mechreward.errors import InputError


def last_token(mask_BT: Bool[Tensor, "b t"]) -> Tensor:
    """Position of each row's last unmasked token, -1 for an empty row. [B] int64."""
    if mask_BT.shape[1] == 0:
        return torch.full((len(mask_BT),), -1, device=mask_BT.device)
    positions_T = torch.arange(1, mask_BT.shape[1] + 1, device=mask_BT.device)
    return (mask_BT * positions_T).amax(dim=1) - 1


def last_of_steps(mask_BT: Bool[Tensor, "b t"], step_end_BT: Bool[Tensor, "b t"]) -> Bool[Tensor, "b t"]:
    """The unmasked tokens that end a step: its last unmasked one, wherever its mark is, and the last one of every row.

    A mark may be masked itself (a line break of massive norm, the first token of a tool's output).
    """
    beyond = mask_BT.shape[1]
    step_BT = step_end_BT.cumsum(1) - step_end_BT.long()
    # The step of the nearest unmasked token after t: a running minimum from the right, since steps are counted up.
    open_BT = F.pad(step_BT.masked_fill(~mask_BT, beyond), (0, 1), value=beyond)[:, 1:]
    return mask_BT & (open_BT.flip(1).cummin(dim=1).values.flip(1) > step_BT)


def step_ends(
    tokenizer: PreTrainedTokenizerBase,
    completion_ids: Sequence[Sequence[int]],
    mark: str,
    known: dict[int, bool] | None = None,
) -> Bool[Tensor, "b t"]:
    """The tokens whose own text contains `mark`; rows padded on the right with False to the longest.

    A mark that the tokenizer splits over two tokens is found in neither.

    Args:
        known: verdicts by token id, read and added to: a caller that keeps it decodes each id once.

    Raises:
        InputError: if `mark` is empty.
    """
    if not mark:
        raise InputError("step_end: is empty; give the text that ends a step")
    ends = {} if known is None else known
    for token in {token for ids in completion_ids for token in ids} - ends.keys():
        ends[token] = mark in str(tokenizer.decode([token]))
    end_BT = torch.zeros(len(completion_ids), max(map(len, completion_ids), default=0), dtype=torch.bool)
    for row, ids in enumerate(completion_ids):
        end_BT[row, : len(ids)] = torch.tensor([ends[token] for token in ids], dtype=torch.bool)
    return end_BT
