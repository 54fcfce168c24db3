"""Sparse autoencoders: one frozen reader for every format, files, and training on a model's own residuals.

May be imported by every room below it (probes, features, reward, ...); imports models.
Importing it never imports sae-lens: that happens only to load a release or to train.
"""

from mechreward.sae.activations import ActivationStream, activation_batches
from mechreward.sae.architectures import SAEShape
from mechreward.sae.cache import cache_dir
from mechreward.sae.check import SAECheck, check_sae
from mechreward.sae.checkpoint import Checkpoint
from mechreward.sae.io import from_sae_lens, save_sae
from mechreward.sae.loading import load_sae, load_topk_sae
from mechreward.sae.on_model import check_on_model
from mechreward.sae.own import own_meta, own_shape, train_own_sae
from mechreward.sae.rows import text_documents
from mechreward.sae.sae import SAE, SAEMeta
from mechreward.sae.training import TrainedSAE, TrainingPoint, Watch, train_sae

SAEHandle = SAE
"""The name of `SAE` in the library that this one grew from."""

__all__ = [
    "SAE",
    "ActivationStream",
    "Checkpoint",
    "SAECheck",
    "SAEHandle",
    "SAEMeta",
    "SAEShape",
    "TrainedSAE",
    "TrainingPoint",
    "Watch",
    "activation_batches",
    "cache_dir",
    "check_on_model",
    "check_sae",
    "from_sae_lens",
    "load_sae",
    "load_topk_sae",
    "own_meta",
    "own_shape",
    "save_sae",
    "text_documents",
    "train_own_sae",
    "train_sae",
]
