"""What discovery costs, beside the bare forward over the same tokens. In turns, in one process.

- `bare forward`: the whole model, logits and all, over prompts and completions; the bar is 1.15 times this.
- `truncated forward`: reading the residual stream alone, up to the SAE's block, as discovery does.
- `discover, mean`, `discover, step ends`: that, all features encoded and pooled, and every statistic of the contrast,
  with 200 label shuffles and 50 half-samples.
- `explore, mean`: with the cross-fitted scores of features and dense readings besides (sparse rows kept).

Responses are the bundled model's own, or, with `--model` and `--texts`, pieces of a text file in groups of eight with
made-up verdicts: what they say does not matter to time and memory. Every row is fed in batches of the same size. The
first round is not counted. Seconds are CPU seconds of the process, so that other work on the machine does not count;
with one thread an idle machine's clock says the same. Peak memory is what a call adds to the resident high-water mark,
the largest of the rounds.

    python benchmarks/discovery.py --responses 400
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from mechreward.features import Search, discover, explore
from mechreward.models import LoadedModel, iter_residuals, load_model
from mechreward.rollout import Response, load_responses, sample_responses, save_responses, verify_responses
from mechreward.sae import SAE, load_sae
from mechreward.tasks import load_questions, load_texts
from mechreward.tiny import SAE_FOLDER, model_path
from mechreward.verifiers import gsm8k_exact_match

MIB = 2**20
GROUP = 8
BARE = "bare forward"


@dataclass(frozen=True)
class Setting:
    """Time and peak memory of discovery against the forward."""

    responses: int = 2000
    model: str = "tiny"
    sae: Path = SAE_FOLDER
    texts: str | None = None
    """Text for made-up responses: a .jsonl, .csv or .parquet file, or a dataset id; needed for another model."""
    text_column: str = "text"
    tokens: int = 128
    """Longest made-up response."""
    step_end: str = "."
    batch_size: int = 32
    repeats: int = 3
    """Timed rounds, after one that is not counted; 0 counts that one."""
    only: tuple[str, ...] = ()
    """Names of rows to measure; all if empty."""
    threads: int = 1
    cache: Path = Path("runs/bench/discovery.parquet")
    """Where the responses are kept."""
    json: Path | None = None


def main() -> None:
    setting = tyro.cli(Setting)
    # Freed blocks go back to the system at once, so that nothing idle is counted.
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | {"MALLOC_MMAP_THRESHOLD_": str(2**16)})
    rows = measure(setting)
    Console(width=110).print(make_table(setting, rows))
    if setting.json is not None:
        head = {"torch": torch.__version__, "setting": vars(setting)}
        setting.json.write_text(json.dumps(head | {"rows": rows}, indent=1, default=str))


def measure(setting: Setting) -> dict[str, dict[str, Any]]:
    calls = {what: call for what, call in make_calls(setting).items() if not setting.only or what in setting.only}
    rounds = [{what: cost(call) for what, call in calls.items()} for _ in range(setting.repeats + 1)]
    counted = rounds[1:] or rounds
    return {
        what: {"seconds": [row[what][0] for row in counted], "peak": max(row[what][1] for row in counted)}
        for what in calls
    }


def cost(call: Callable[[], object]) -> tuple[float, int]:
    """CPU seconds of a call, and bytes that it adds to the peak."""
    Path("/proc/self/clear_refs").write_text("5")
    before, start = resident("VmRSS"), time.process_time()
    call()
    return time.process_time() - start, resident("VmHWM") - before


def make_calls(setting: Setting) -> dict[str, Callable[[], object]]:
    torch.set_num_threads(setting.threads)
    loaded, sae = load_model(model_path(setting.model)), load_sae(setting.sae)
    responses, size = get_responses(setting, loaded), setting.batch_size
    ends = f"step_end:{setting.step_end}"
    return {
        BARE: lambda: bare_forward(loaded, responses, size),
        "truncated forward": lambda: truncated_forward(loaded, sae, responses, size),
        "discover, mean": lambda: discover(loaded, sae, responses, batch_size=size),
        "discover, step ends": lambda: discover(loaded, sae, responses, pooling=ends, batch_size=size),
        "explore, mean": lambda: explore(loaded, sae, responses, Search(), batch_size=size),
    }


@torch.no_grad()
def bare_forward(loaded: LoadedModel, responses: list[Response], size: int) -> None:
    """In the order and the batches that discovery has: `size` answers at a time, shorter ones first among them."""
    for start in range(0, len(responses), size):
        rows = sorted(([*r.prompt_ids, *r.completion_ids] for r in responses[start : start + size]), key=len)
        width = len(rows[-1])
        ids_BS = torch.tensor([row + [0] * (width - len(row)) for row in rows])
        seen_BS = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
        loaded.model(input_ids=ids_BS, attention_mask=seen_BS, use_cache=False)


@torch.no_grad()
def truncated_forward(loaded: LoadedModel, sae: SAE, responses: list[Response], size: int) -> None:
    for start in range(0, len(responses), size):
        part = responses[start : start + size]
        prompts, completions = [list(r.prompt_ids) for r in part], [list(r.completion_ids) for r in part]
        for _ in iter_residuals(loaded.model, prompts, completions, sae.layer, size):
            pass


def get_responses(setting: Setting, loaded: LoadedModel) -> list[Response]:
    """Sampled or made up once, then read from the cache; cut to mixed questions."""
    if not setting.cache.exists():
        setting.cache.parent.mkdir(parents=True, exist_ok=True)
        save_responses(setting.cache, sampled(setting, loaded) if setting.texts is None else made_up(setting, loaded))
    responses = load_responses(setting.cache)
    verdicts: dict[str, set[bool | None]] = {}
    for response in responses:
        verdicts.setdefault(response.question_id, set()).add(response.correct)
    return [response for response in responses if len(verdicts[response.question_id]) == 2]


def sampled(setting: Setting, loaded: LoadedModel) -> list[Response]:
    questions = load_questions("tiny:easy", limit=setting.responses // GROUP, seed=5)
    responses = sample_responses(loaded, questions, n=GROUP, max_new_tokens=96, seed=5)
    return verify_responses(responses, questions, gsm8k_exact_match)


def made_up(setting: Setting, loaded: LoadedModel) -> list[Response]:
    """Each text halved: the first part is the prompt, the second a response; every other one "right"."""
    responses = []
    assert setting.texts is not None
    for at, text in enumerate(load_texts(setting.texts, column=setting.text_column, limit=setting.responses)):
        ids = loaded.tokenizer(text)["input_ids"]
        cut = max(1, len(ids) // 2)
        prompt, completion = tuple(ids[:cut][-setting.tokens :]), tuple(ids[cut : cut + setting.tokens])
        group, sample = divmod(at, GROUP)
        logprobs = (-1.0,) * len(completion)
        responses.append(Response(f"q{group}", sample, prompt, completion, "", logprobs, "length", correct=at % 2 == 0))
    return responses


def resident(row: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in status if line.startswith(f"{row}:")).split()[1])


def make_table(setting: Setting, rows: dict[str, dict[str, Any]]) -> Table:
    responses = load_responses(setting.cache)
    n_tokens = sum(len(r.prompt_ids) + len(r.completion_ids) for r in responses)
    title = f"{setting.model}: {len(responses)} responses, {n_tokens} tokens with prompts; {setting.threads} thread"
    table = Table("what", "median CPU s", "range", "ratio to the bare forward", "range", "peak MiB", title=title)
    for what, row in rows.items():
        ratios = [own / bare for own, bare in zip(row["seconds"], rows[BARE]["seconds"], strict=True)]
        table.add_row(
            what,
            f"{statistics.median(row['seconds']):.2f}",
            f"{min(row['seconds']):.2f}-{max(row['seconds']):.2f}",
            f"{statistics.median(ratios):.3f}",
            f"{min(ratios):.3f}-{max(ratios):.3f}",
            f"{row['peak'] / MIB:.0f}",
        )
    return table


if __name__ == "__main__":
    main()
