"""Linear probes of the residual stream: small readers beside the SAEs, trained on verified answers and kept frozen.

May be imported by features and every room below it; imports models and rollout.
"""

from mechreward.probes.io import load_probe, probe_names, save_probe
from mechreward.probes.on_model import read_states, train_probe_on
from mechreward.probes.probe import POOLINGS, LinearProbe
from mechreward.probes.train import ProbeTrainingResult, train_linear_probe

__all__ = [
    "LinearProbe",
    "POOLINGS",
    "ProbeTrainingResult",
    "load_probe",
    "probe_names",
    "read_states",
    "save_probe",
    "train_linear_probe",
    "train_probe_on",
]
