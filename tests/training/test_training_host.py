"""Trainers and settings that would train something else than they say are refused by name."""

from __future__ import annotations

import pytest
import trl
from trl import GRPOConfig, GRPOTrainer, SFTConfig

from mechreward.errors import InputError
from mechreward.training import host


def test_hosts_that_would_train_something_else_are_refused(tmp_path, monkeypatch) -> None:
    def args(**options) -> GRPOConfig:
        return GRPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none", **options)

    host.check_host(args())
    with pytest.raises(InputError, match="importance_sampling_level: 'sequence'"):
        host.check_host(args(importance_sampling_level="sequence"))
    one = args()
    one.num_generations = 1
    with pytest.raises(InputError, match="num_generations: 1; a group needs at least 2"):
        host.check_host(one)
    alone = args(num_generations_eval=1)
    host.check_host(alone, credit="per_token")
    with pytest.raises(InputError, match="num_generations_eval: 1; credit 'stage3' needs groups of at least 2"):
        host.check_host(alone, credit="stage3")
    with pytest.raises(InputError, match="args: SFTConfig is not a GRPOConfig; other trainers of TRL"):
        host.check_host(SFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to="none"))
    liger = args()
    liger.use_liger_kernel = True
    host.check_host(liger)
    monkeypatch.setattr(GRPOTrainer, "compute_liger_loss", lambda: None, raising=False)
    with pytest.raises(InputError, match="use_liger_kernel: True; this TRL's Liger loss"):
        host.check_host(liger)
    monkeypatch.undo()
    for version, fine in [
        ("1.9.0", True),
        ("1.16.3", True),
        ("1.8.9", False),
        ("1.17.0", False),
        ("1.17.0.dev0", False),
    ]:
        monkeypatch.setattr(host, "version", lambda _name, version=version: version)
        if fine:
            host.check_host(None)
        else:
            with pytest.raises(InputError, match=f"trl: version {version} is installed"):
                host.check_host(None)
    monkeypatch.setattr(host, "version", lambda _name: "1.16.0")
    monkeypatch.setattr(trl, "GRPOTrainer", type("UnslothGRPOTrainer", (), {"__module__": "unsloth_compiled_cache"}))
    with pytest.raises(InputError, match="replaced by unsloth_compiled_cache"):
        host.check_host(None)
