"""Two processes over gloo, with a group that straddles them, against the same arithmetic in one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import PreTrainedTokenizerFast

from mechreward.files import read_jsonl
from mechreward.reward import dense_advantages

SCRIPT = str(Path(__file__).parent / "two_ranks.py")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, char_tokenizer: PreTrainedTokenizerFast) -> Path:
    """What `two_ranks.py` leaves: of the run in `two_processes.py`, and of the reading in `two_shards.py`."""
    folder = tmp_path_factory.mktemp("ranks")
    char_tokenizer.save_pretrained(folder / "tokenizer")
    launch = "-m torch.distributed.run --nnodes 1 --nproc_per_node 2 --rdzv_backend c10d --rdzv_endpoint localhost:0"
    done = subprocess.run(
        [sys.executable, *launch.split(), SCRIPT, str(folder), str(folder / "tokenizer")],
        env={**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[str, torch.Tensor]]:
    saved = [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]
    trained = [torch.load(folder / f"trained{rank}.pt", weights_only=True) for rank in range(2)]
    return [{**seen, **end} for seen, end in zip(saved, trained, strict=True)]


def wide(parts: list[torch.Tensor]) -> torch.Tensor:
    width = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, width - part.shape[1])) for part in parts])


@pytest.mark.slow
def test_groups_are_centred_and_scaled_over_both_processes(ranks: list[dict[str, torch.Tensor]]) -> None:
    # 6 rows a process in groups of 4: the second group has two rows on each.
    rows, group = 6, 4
    mask_BT = wide([rank["completion_mask"] for rank in ranks]).bool()
    total_BT = wide([rank["advantages"] for rank in ranks])
    outcome_B = ranks[0]["stock"]
    assert torch.equal(outcome_B, ranks[1]["stock"]) and len(outcome_B) == 2 * rows
    assert [len(rank["advantages"]) for rank in ranks] == [rows, rows]
    dense_BT = (total_BT - outcome_B[:, None]).masked_fill(~mask_BT, 0.0)
    # Dense advantages are an affine map of the token rewards within each group: redo it from the result itself.
    again = dense_advantages(outcome_B, dense_BT, mask_BT, mask_BT, group_size=group, weight=0.4)
    torch.testing.assert_close(again.dense_BT, dense_BT, rtol=1e-4, atol=1e-5)
    straddling = dense_BT[group : 2 * group]
    own = [straddling[:2][mask_BT[4:6]].mean(), straddling[2:][mask_BT[6:8]].mean()]
    assert abs(own[0] - own[1]) > 1e-3, "the halves differ, so centring each by itself would show"
    assert total_BT.masked_select(~mask_BT).count_nonzero() == 0


@pytest.mark.slow
def test_both_processes_end_with_the_same_weights(ranks: list[dict[str, torch.Tensor]]) -> None:
    assert torch.equal(ranks[0]["weights"], ranks[1]["weights"])


@pytest.mark.slow
def test_what_a_run_leaves_is_written_once_and_of_both_processes(
    folder: Path, ranks: list[dict[str, torch.Tensor]]
) -> None:
    assert [(row["step"], row["kind"]) for row in read_jsonl(folder / "metrics.jsonl")] == [(1, "train")]
    frame = pd.read_parquet(folder / "rollouts.parquet")
    # All twelve rows, in their order: the first six are those of the first process.
    pairs = [pair for rank in ranks for pair in zip(rank["completion_ids"], rank["completion_mask"], strict=True)]
    rows = [ids[mask.bool()] for ids, mask in pairs]
    assert [len(tokens) for tokens in frame["tokens"]] == [len(ids) for ids in rows]
    assert frame["outcome"].tolist() == pytest.approx([(ids % 2 == 0).float().mean().item() for ids in rows])


@pytest.mark.slow
def test_sharded_weights_are_read_as_whole_ones(folder: Path) -> None:
    for rank in range(2):
        read = torch.load(folder / str(rank), weights_only=True)
        assert read["whole"].count_nonzero() > 0
        for shards_BT in read["shards"]:
            torch.testing.assert_close(shards_BT, read["whole"], rtol=1e-5, atol=1e-5)
