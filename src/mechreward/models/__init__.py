"""Models: loading any policy, finding its decoder blocks, reading its residual stream.

The first room of the house: it imports only `mechreward.errors` and `mechreward.files`; every other room may import it.
"""

from mechreward.models.blocks import (
    block_name,
    check_layer,
    context_length,
    d_model,
    find_blocks,
    find_decoder,
    find_final_norm,
    n_blocks,
    text_config,
    unwrap,
    vocabulary_size,
)
from mechreward.models.cache import roomy_cache, static_cache
from mechreward.models.capture import capture_blocks
from mechreward.models.device import find_device
from mechreward.models.fingerprint import fingerprint
from mechreward.models.loading import LoadedModel, load_model
from mechreward.models.logits import LogitsBatch, check_prompted_rows, completion_logits, iter_logits
from mechreward.models.modes import eval_mode
from mechreward.models.residuals import (
    BlocksBatch,
    Limits,
    ResidualBatch,
    iter_blocks,
    iter_residuals,
    norm_outliers,
    read_residuals,
)

__all__ = [
    "block_name",
    "BlocksBatch",
    "Limits",
    "LoadedModel",
    "LogitsBatch",
    "ResidualBatch",
    "capture_blocks",
    "check_layer",
    "check_prompted_rows",
    "completion_logits",
    "context_length",
    "d_model",
    "eval_mode",
    "find_blocks",
    "find_decoder",
    "find_device",
    "find_final_norm",
    "fingerprint",
    "iter_blocks",
    "iter_logits",
    "iter_residuals",
    "load_model",
    "n_blocks",
    "norm_outliers",
    "read_residuals",
    "roomy_cache",
    "static_cache",
    "text_config",
    "unwrap",
    "vocabulary_size",
]
