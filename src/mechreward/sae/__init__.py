"""Sparse autoencoders: one frozen reader for every format, files, and training on a model's own residuals.

May be imported by every room below it (probes, features, reward, ...); imports models.
Importing it never imports sae-lens: that happens only to load a release or to train.
"""

from mechreward.sae.activations import activation_batches, text_rows
from mechreward.sae.cache import cache_dir
from mechreward.sae.io import from_sae_lens, save_sae
from mechreward.sae.loading import load_sae, load_topk_sae
from mechreward.sae.own import train_own_sae
from mechreward.sae.sae import SAE, SAEMeta
from mechreward.sae.training import TrainedSAE, train_sae

SAEHandle = SAE
"""The name of `SAE` in the library that this one grew from."""

__all__ = [
    "SAE",
    "SAEHandle",
    "SAEMeta",
    "TrainedSAE",
    "activation_batches",
    "cache_dir",
    "from_sae_lens",
    "load_sae",
    "load_topk_sae",
    "save_sae",
    "text_rows",
    "train_own_sae",
    "train_sae",
]
