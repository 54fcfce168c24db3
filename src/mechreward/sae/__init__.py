"""Sparse autoencoders: one frozen reader for every format, files, and training on a model's own residuals.

May be imported by every room below it (probes, features, reward, ...); imports models.
Importing it never imports sae-lens: that happens only to load a release or to train.
"""

from mechreward.sae.activations import activation_batches, text_rows
from mechreward.sae.io import from_sae_lens, load_sae, save_sae
from mechreward.sae.own import train_own_sae
from mechreward.sae.sae import SAE, SAEMeta
from mechreward.sae.training import TrainedSAE, train_sae

__all__ = [
    "SAE",
    "SAEMeta",
    "TrainedSAE",
    "activation_batches",
    "from_sae_lens",
    "load_sae",
    "save_sae",
    "text_rows",
    "train_own_sae",
    "train_sae",
]
