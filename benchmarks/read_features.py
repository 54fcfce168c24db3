"""What reading a few features of an SAE costs, in time and peak memory, against encoding all of them.

Times are taken in turns in one process, so that a busy machine slows both alike: the median and the range of the
`--repeats` rounds after a warm-up. Peak memory is what one call, in a process of its own, adds to the resident
high-water mark, which Linux lets a process reset; on a GPU it is the allocator's own peak. Before anything is measured,
the read is compared with the same columns of the full encode.

    python benchmarks/read_cost.py --architecture topk --tokens 2048 --d-model 256 --d-sae 2048
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from mechreward.sae import SAE, SAEMeta

MIB = 2**20


@dataclass(frozen=True)
class Setting:
    """Time and peak memory of reading a few features of an SAE against encoding all of them."""

    architecture: Literal["topk", "relu", "jumprelu"] = "topk"
    """Which kind of SAE; its weights are random."""
    tokens: int = 4096
    """N, tokens read in one call."""
    d_model: int = 512
    """D, width of the residual stream."""
    d_sae: int = 8192
    """F, features of the SAE."""
    k: int = 32
    """Active features a token (TopK only)."""
    selected: int = 20
    """K, features read."""
    repeats: int = 7
    """Timed calls."""
    device: str = "cpu"
    """`cpu`, `cuda`, `cuda:1`."""
    threads: int = torch.get_num_threads()
    """Threads torch may use on the CPU."""
    json: bool = False
    """Print the numbers as JSON."""


@dataclass(frozen=True)
class Cost:
    """Seconds a call and bytes that a call adds to the peak; `peak` is None where it cannot be measured."""

    median: float
    low: float
    high: float
    peak: int | None


def main() -> None:
    setting = tyro.cli(Setting)
    seconds = apart(measure_seconds, setting)
    costs = {what: make_cost(seconds[what], apart(measure_peak, setting, what)) for what in ("encode", "read")}
    if setting.json:
        numbers = {"torch": torch.__version__, "setting": asdict(setting)}
        Console().print_json(json.dumps(numbers | {what: asdict(cost) for what, cost in costs.items()}))
    else:
        Console(width=110).print(make_table(setting, costs))


def apart(function: Callable[..., Any], *arguments: object) -> Any:
    """Calls it in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure_seconds(setting: Setting) -> dict[str, list[float]]:
    calls = make_calls(setting)
    rounds = [{what: timed(call, setting.device) for what, call in calls.items()} for _ in range(setting.repeats + 1)]
    return {what: [seconds[what] for seconds in rounds[1:]] for what in calls}


def measure_peak(setting: Setting, what: str) -> int | None:
    return peak_added(make_calls(setting)[what], setting.device)


def make_calls(setting: Setting) -> dict[str, Callable[[], torch.Tensor]]:
    torch.set_num_threads(setting.threads)
    sae, h_ND = make_sae(setting), make_states(setting)
    feature_ids = torch.randperm(setting.d_sae)[: setting.selected].tolist()
    check_same(sae, h_ND[:64], feature_ids)
    return {"encode": lambda: sae.encode(h_ND), "read": lambda: sae.read(h_ND, feature_ids)}


def make_cost(seconds: list[float], peak: int | None) -> Cost:
    return Cost(statistics.median(seconds), min(seconds), max(seconds), peak)


def make_sae(setting: Setting) -> SAE:
    torch.manual_seed(0)
    W_dec_FD = torch.nn.functional.normalize(torch.randn(setting.d_sae, setting.d_model), dim=-1)
    return SAE(
        architecture=setting.architecture,
        W_enc_DF=W_dec_FD.T.contiguous(),
        b_enc_F=torch.zeros(setting.d_sae),
        W_dec_FD=W_dec_FD,
        b_dec_D=torch.zeros(setting.d_model),
        threshold_F=torch.ones(setting.d_sae) if setting.architecture == "jumprelu" else None,
        k=setting.k if setting.architecture == "topk" else None,
        apply_b_dec_to_input=True,
        meta=SAEMeta(release="benchmark", sae_id="random", layer=0, model_name="none", hook_name="none"),
    ).to(setting.device)


def make_states(setting: Setting) -> torch.Tensor:
    return torch.randn(setting.tokens, setting.d_model, generator=torch.Generator().manual_seed(1)).to(setting.device)


def check_same(sae: SAE, h_ND: torch.Tensor, feature_ids: list[int]) -> None:
    torch.testing.assert_close(sae.read(h_ND, feature_ids), sae.encode(h_ND)[:, feature_ids], atol=1e-4, rtol=1e-4)


def timed(call: Callable[[], object], device: str) -> float:
    wait(device)
    start = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - start


def wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def peak_added(call: Callable[[], object], device: str) -> int | None:
    """Bytes that `call` adds to the peak; None where the high-water mark cannot be reset."""
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    reset.write_text("5")
    before = resident_peak()
    call()
    return resident_peak() - before


def resident_peak() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in status if line.startswith("VmHWM:")).split()[1])


def make_table(setting: Setting, costs: dict[str, Cost]) -> Table:
    sizes = f"N {setting.tokens}, D {setting.d_model}, F {setting.d_sae}, k {setting.k}, K {setting.selected}"
    table = Table(title=f"{setting.architecture} SAE on {setting.device}, {setting.threads} threads: {sizes}")
    for column in ("what", "median ms", "range ms", "peak MiB", "time / encode", "memory / encode"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for what, cost in costs.items():
        table.add_row(
            what if what == "encode" else f"read {setting.selected}",
            f"{1e3 * cost.median:.1f}",
            f"{1e3 * cost.low:.1f}-{1e3 * cost.high:.1f}",
            "n/a" if cost.peak is None else f"{cost.peak / MIB:.1f}",
            f"{cost.median / costs['encode'].median:.2f}",
            memory_share(cost, costs["encode"]),
        )
    return table


def memory_share(cost: Cost, full: Cost) -> str:
    if cost.peak is None or not full.peak:
        return "n/a"
    return f"{cost.peak / full.peak:.2f}"


if __name__ == "__main__":
    main()
