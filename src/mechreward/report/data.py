"""A run directory, read once into one frozen record. Every file is optional: a run may have stopped at any stage."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import yaml

from mechreward.errors import InputError
from mechreward.features import FeaturePack, load_pack
from mechreward.files import read_json

KNOWN_FILES = (
    "config.yaml",
    "manifest.json",
    "questions.parquet",
    "features.parquet",
    "pack.json",
    "gate1.json",
    "metrics.jsonl",
    "rollouts.parquet",
    "results.json",
    "chains.json",
)
ROLLOUT_COLUMNS = (
    "arm", "step", "question_id", "prompt", "completion", "tokens", "token_rewards", "outcome", "feature_reward",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """What a run directory holds; None (or an empty mapping) where the run has not written the file."""

    folder: Path
    config: dict[str, Any] | None
    manifest: dict[str, Any] | None
    questions: pd.DataFrame | None
    responses: dict[str, pd.DataFrame]
    """By stage: `baseline`, `known`, `final-<arm>`."""
    features: pd.DataFrame | None
    pack: dict[str, Any] | None
    sae: dict[str, Any] | None
    """Quality of an SAE that the run trained: fvu, l0, dead_share."""
    gate: dict[str, Any] | None
    train: pd.DataFrame | None
    """The `train` rows of metrics.jsonl."""
    evals: pd.DataFrame | None
    """The `eval` rows of metrics.jsonl."""
    rollouts: pd.DataFrame | None
    results: dict[str, Any] | None
    chains: dict[str, Any] | None
    """Chains of thought to show step by step."""

    given_pack: FeaturePack | None
    """The pack of a run that was given one and neither discovered nor gated it; None for any other run."""

    @property
    def is_given_pack(self) -> bool:
        """Whether the run was given a pack."""
        return "pack" in (self.config or {})

    @property
    def arms(self) -> list[str]:
        """Every arm named by any file, in the order of the config, then of the metrics, then of the results."""
        config = self.config or {}
        named: list[str] = [] if config.get("method") == "repair" else list(config.get("arms") or ())
        for frame in (self.evals, self.train, self.rollouts):
            if frame is not None:
                named += frame["arm"].astype(str).unique().tolist()
        named += (self.results or {}).get("arms") or {}
        return list(dict.fromkeys(named))


def read_run(run_dir: str | Path) -> Run:
    """Reads a run directory.

    Raises:
        InputError: if it is not a run directory, or a file in it cannot be read or lacks a column.
    """
    folder = Path(run_dir)
    if not folder.is_dir():
        raise InputError(f"run_dir: {folder} is not a folder; give the folder that a run wrote")
    if not any((folder / name).is_file() for name in KNOWN_FILES):
        raise InputError(f"run_dir: {folder} holds no run (none of {', '.join(KNOWN_FILES)})")
    metrics = _metrics(folder / "metrics.jsonl")
    config, pack = read_yaml(folder / "config.yaml"), folder / "pack.json"
    return Run(
        folder=folder,
        config=config,
        manifest=read_object(folder / "manifest.json"),
        questions=_table(folder / "questions.parquet", "id", "prompt", "answer", "split"),
        responses=_responses(folder / "responses"),
        features=_table(folder / "features.parquet"),
        pack=read_object(pack),
        given_pack=load_pack(pack) if pack.is_file() and "pack" in (config or {}) else None,
        sae=read_object(folder / "sae.json"),
        gate=read_object(folder / "gate1.json"),
        train=_of_kind(metrics, "train"),
        evals=_of_kind(metrics, "eval"),
        rollouts=_table(folder / "rollouts.parquet", *ROLLOUT_COLUMNS),
        results=read_object(folder / "results.json"),
        chains=read_object(folder / "chains.json"),
    )


def read_object(path: Path) -> dict[str, Any] | None:
    """A file that holds one JSON object; None if there is no file.

    Raises:
        InputError: if it holds anything else.
    """
    if not path.is_file():
        return None
    value = read_json(path)
    if not isinstance(value, dict):
        raise InputError(f"run_dir: {path} holds {type(value).__name__}, where a JSON object is needed")
    return value


def read_yaml(path: Path) -> dict[str, Any] | None:
    """A YAML file that holds one mapping; None if there is no file.

    Raises:
        InputError: if it holds anything else.
    """
    if not path.is_file():
        return None
    try:
        value = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"run_dir: {path} is not valid YAML") from error
    if not isinstance(value, dict):
        raise InputError(f"run_dir: {path} holds {type(value).__name__}, where a mapping of fields is needed")
    return value


def _table(path: Path, *needed: str) -> pd.DataFrame | None:
    if not path.is_file():
        return None
    try:
        # Read as a single file: pandas would take a folder name such as `arm=x` for a partition.
        frame = pq.ParquetFile(path).read().to_pandas()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"run_dir: {path} is not a readable Parquet file (is it cut short?)") from error
    missing = [name for name in needed if name not in frame]
    if missing:
        raise InputError(f"run_dir: {path} has no column {missing[0]!r}; it has {', '.join(map(str, frame))}")
    return frame


def _responses(folder: Path) -> dict[str, pd.DataFrame]:
    found = {}
    for path in sorted(folder.glob("*.parquet")):
        frame = _table(path, "question_id", "completion_ids", "correct")
        if frame is not None:
            found[path.stem] = frame
    return found


def _metrics(path: Path) -> list[dict[str, Any]] | None:
    if not path.is_file():
        return None
    rows = []
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"run_dir: {path} is not text in UTF-8 (byte {error.start})") from error
    for index, line in enumerate(text.splitlines(keepends=True), start=1):
        # A run killed while writing leaves a last line without its newline; the rows before it are whole.
        if not line.endswith("\n") or not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"run_dir: {path} line {index} is not valid JSON ({error.msg})") from error
        if not isinstance(row, dict):
            raise InputError(f"run_dir: {path} line {index} holds {type(row).__name__}, where a JSON object is needed")
        absent = {"arm", "step", "kind"} - set(row)
        if absent:
            raise InputError(f"run_dir: {path} line {index} has no {sorted(absent)[0]!r}")
        rows.append(row)
    return rows


def _of_kind(rows: list[dict[str, Any]] | None, kind: str) -> pd.DataFrame | None:
    chosen = [row for row in rows or [] if row["kind"] == kind]
    if not chosen:
        return None
    frame = pd.DataFrame(chosen)
    # A resumed run may log a step again: the last row stands.
    keys = ["arm", "step"] + ["seed"] * ("seed" in frame)
    return frame.drop_duplicates(keys, keep="last", ignore_index=True)
