"""What reading 20 features of a TopK SAE exactly costs, beside the roads people use today. In turns, in one process.

- `sae-lens encode`: every feature with sae-lens' own class, then the 20 columns. What a reward built on it pays. Left
  out where sae-lens is not installed; the next road is then what is compared with.
- `matmul + topk`: the same by hand: one product, `torch.topk`, scatter, the 20 columns.
- `dense matmul`: the product of the encoder alone. No top-k, so not an answer; the bar to beat. On CUDA also in
  bfloat16, which is not exact either and several times as fast.
- `read`: ours. Features as they come, and ordered by firing frequency (`SAE.calibrated`).

Activations are sums of sparse features with unequal frequencies plus noise, so that some features fire often and some
rarely, as in real SAEs; 20 features are chosen around a firing frequency ("low" .1 %, "middle" 1 %, "high" 10 %), or
spread evenly on a logarithmic scale from .1 % to 1 % ("typical"). With
`--sae FOLDER --model M` both are real: the SAE's, and the model's residuals on GSM8K-like text. Before anything is
timed, `read` is compared with sae-lens.

Peak memory is what one call, in a process of its own, adds to the resident high-water mark; on CUDA, the allocator's.

    python benchmarks/read_features.py --sizes small --frequencies middle
"""

from __future__ import annotations

import importlib.util
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mechreward.sae import SAE, SAEMeta, load_sae

MIB = 2**20
SIZES = {"small": (576, 9216, 32), "large": (2560, 40960, 128)}
"""Width D, features F, active features k: about SmolLM2-135M and Gemma-3-4B / Qwen3.5-4B."""
FREQUENCIES = {"low": (0.001, 0.001), "typical": (0.001, 0.01), "middle": (0.01, 0.01), "high": (0.1, 0.1)}
"""From, to."""
SELECTED = 20
LENS, HAND = "sae-lens encode", "matmul + topk"


@dataclass(frozen=True)
class Setting:
    """Time and peak memory of reading 20 features of a TopK SAE, four ways."""

    sizes: tuple[Literal["small", "large"], ...] = ("small", "large")
    """(D, F, k): small is (576, 9216, 32), large (2560, 40960, 128)."""
    frequencies: tuple[Literal["low", "typical", "middle", "high"], ...] = ("low", "typical", "middle", "high")
    """Around which firing frequency the 20 features are chosen."""
    tokens: int = 4096
    """N, tokens read in one call."""
    repeats: int = 5
    """Timed rounds, after one that is not counted."""
    device: str = "cpu"
    """`cpu`, `cuda`, `cuda:1`."""
    threads: int = torch.get_num_threads()
    """Threads torch may use on the CPU."""
    sae: Path | None = None
    """A real TopK SAE in place of the made-up ones."""
    residuals: Path | None = None
    """A safetensors file with its residuals under `h` [N, D]; needed with `--sae`."""
    json: Path | None = None
    """Write the numbers to this file."""


@dataclass(frozen=True)
class Case:
    """One table: an SAE, a choice of features, and tokens."""

    size: str
    frequency: str
    setting: Setting


@dataclass(frozen=True)
class Cost:
    """Seconds a call and bytes that a call adds to the peak; `peak` is None where it cannot be measured."""

    median: float
    low: float
    high: float
    peak: int | None


@dataclass
class Result:
    """What one table holds."""

    case: Case
    firing: float
    """Mean firing frequency of the chosen features."""
    shape: tuple[int, int, int]
    costs: dict[str, Cost] = field(default_factory=dict)


def main() -> None:
    setting = tyro.cli(Setting)
    sizes = ("given",) if setting.sae else setting.sizes
    results = []
    for size in sizes:
        for frequency in setting.frequencies:
            result = measure(Case(size, frequency, setting))
            results.append(result)
            Console(width=110).print(make_table(result))
    if setting.json is not None:
        head = {"torch": torch.__version__, "device": device_name(setting.device), "threads": setting.threads}
        setting.json.write_text(json.dumps(head | {"results": [asdict(r) for r in results]}, indent=1, default=str))


def measure(case: Case) -> Result:
    seconds, firing, shape = apart(measure_seconds, case)
    result = Result(case, firing, shape)
    # Freed blocks go back to the system at once in the processes that measure peaks, so that nothing idle is counted.
    os.environ["MALLOC_MMAP_THRESHOLD_"] = str(2**16)
    for what, times in seconds.items():
        peak = apart(measure_peak, case, what)
        result.costs[what] = Cost(statistics.median(times), min(times), max(times), peak)
    del os.environ["MALLOC_MMAP_THRESHOLD_"]
    return result


def apart(function: Callable[..., Any], *arguments: object) -> Any:
    """Calls it in a fresh process."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def measure_seconds(case: Case) -> tuple[dict[str, list[float]], float, tuple[int, int, int]]:
    calls, sae, firing = make_calls(case)
    device = case.setting.device
    rounds = [{what: timed(call, device) for what, call in calls.items()} for _ in range(case.setting.repeats + 1)]
    return {what: [row[what] for row in rounds[1:]] for what in calls}, firing, (sae.d_model, sae.d_sae, sae.k or 0)


def measure_peak(case: Case, what: str) -> int | None:
    calls, _, _ = make_calls(case)
    return peak_added(calls[what], case.setting.device)


def make_calls(case: Case) -> tuple[dict[str, Callable[[], Tensor]], SAE, float]:
    torch.set_num_threads(case.setting.threads)
    sae, h_ND = given(case.setting) if case.setting.sae else made_up(case)
    calibrated = sae.calibrated(h_ND[: len(h_ND) // 2])
    ids = choose(calibrated, *FREQUENCIES[case.frequency])
    index, W_DF = torch.tensor(ids, device=sae.device), sae.W_enc_DF.contiguous()
    calls: dict[str, Callable[[], Tensor]] = {}
    if importlib.util.find_spec("sae_lens"):
        lens = lens_object(sae)
        calls[LENS] = lambda: lens.encode(h_ND)[:, index]
    calls |= {
        HAND: lambda: by_hand(sae, W_DF, h_ND)[:, index],
        "dense matmul": lambda: h_ND @ W_DF,
        "read": lambda: sae.read(h_ND, ids),
        "read, calibrated": lambda: calibrated.read(h_ND, ids),
    }
    if h_ND.is_cuda:
        short_ND, short_DF = h_ND.bfloat16(), W_DF.bfloat16()
        calls["dense matmul, bfloat16"] = lambda: short_ND @ short_DF
    with torch.no_grad():
        wanted, got = next(iter(calls.values()))(), calls["read, calibrated"]()
    unlike = ((got > 0) != (wanted > 0)).any(-1).float().mean().item()
    assert unlike < 1e-3, f"{unlike:.2%} of the tokens have another support than {next(iter(calls))} gives"
    assert calibrated.frequency_F is not None
    return calls, sae, calibrated.frequency_F[index].mean().item()


def made_up(case: Case) -> tuple[SAE, Tensor]:
    """Residuals that are sums of decoder rows firing by a power law, with noise, and the SAE of these rows."""
    d, f, k = SIZES[case.size]
    device = case.setting.device
    g = torch.Generator(device).manual_seed(0)
    W_FD = torch.nn.functional.normalize(torch.randn(f, d, generator=g, device=device), dim=-1)
    rank_F = torch.randperm(f, generator=g, device=device)
    frequency_F = (1.0 + rank_F) ** -0.8
    frequency_F = (frequency_F * k / frequency_F.sum()).clamp(max=0.9)
    h_ND = torch.empty(case.setting.tokens, d, device=device)
    for rows_ND in h_ND.split(256):
        fires = torch.rand(len(rows_ND), f, generator=g, device=device) < frequency_F
        rows_ND.copy_((fires * (1 + torch.rand(len(rows_ND), f, generator=g, device=device))) @ W_FD)
        rows_ND.add_(0.3 * torch.randn(len(rows_ND), d, generator=g, device=device) / d**0.5)
    meta = SAEMeta(release="made up", sae_id="", layer=0, model_name="none", hook_name="model.layers.0")
    none_F, none_D = torch.zeros(f, device=device), torch.zeros(d, device=device)
    return SAE("topk", W_FD.T.contiguous(), none_F, W_FD, none_D, meta, k=k), h_ND


def given(setting: Setting) -> tuple[SAE, Tensor]:
    from safetensors.torch import load_file

    assert setting.sae is not None and setting.residuals is not None, "--sae needs --residuals"
    h_ND = load_file(setting.residuals)["h"].float()[: setting.tokens]
    return load_sae(setting.sae).to(setting.device), h_ND.to(setting.device)


def choose(sae: SAE, low: float, high: float) -> list[int]:
    """20 features whose firing frequencies are nearest to 20 from `low` to `high`, evenly on a logarithmic scale."""
    assert sae.frequency_F is not None
    log_F, chosen = (sae.frequency_F + 1e-9).log().cpu(), []
    for wanted in torch.linspace(math.log(low), math.log(high), SELECTED):
        nearest = (log_F - wanted).abs().argsort(stable=True)
        chosen.append(next(i for i in nearest.tolist() if i not in chosen))
    return chosen


def lens_object(sae: SAE) -> Any:
    from sae_lens import SAE as LensSAE

    config = {"architecture": "topk", "d_in": sae.d_model, "d_sae": sae.d_sae, "k": sae.k, "device": str(sae.device)}
    flags = {"apply_b_dec_to_input": sae.apply_b_dec_to_input, "rescale_acts_by_decoder_norm": False}
    assert not sae.rescale_acts_by_decoder_norm and sae.input_norm == "none"
    lens = LensSAE.from_dict(config | flags)
    state = {"W_enc": sae.W_enc_DF, "b_enc": sae.b_enc_F, "W_dec": sae.W_dec_FD, "b_dec": sae.b_dec_D}
    lens.load_state_dict({name: tensor.contiguous() for name, tensor in state.items()})
    return lens.eval().requires_grad_(False)


def by_hand(sae: SAE, W_DF: Tensor, h_ND: Tensor) -> Tensor:
    assert sae.k is not None
    centred_ND = h_ND - sae.b_dec_D if sae.apply_b_dec_to_input else h_ND
    top = torch.topk(centred_ND @ W_DF + sae.b_enc_F, sae.k, dim=-1)
    return torch.zeros(len(h_ND), sae.d_sae, device=h_ND.device).scatter_(-1, top.indices, top.values.relu())


def timed(call: Callable[[], object], device: str) -> float:
    wait(device)
    start = time.perf_counter()
    with torch.no_grad():
        call()
    wait(device)
    return time.perf_counter() - start


def wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def device_name(device: str) -> str:
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu_name()


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "cpu")


def peak_added(call: Callable[[], object], device: str) -> int | None:
    """Bytes that `call` adds to the peak; None where the high-water mark cannot be reset."""
    if device.startswith("cuda"):
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        with torch.no_grad():
            call()
        return torch.cuda.max_memory_allocated(device) - before
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        return None
    reset.write_text("5")
    before = resident("VmRSS")
    with torch.no_grad():
        call()
    return resident("VmHWM") - before


def resident(row: str) -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in status if line.startswith(f"{row}:")).split()[1])


def make_table(result: Result) -> Table:
    d, f, k = result.shape
    setting, (first, base) = result.case.setting, next(iter(result.costs.items()))
    where = f"{device_name(setting.device)}, {setting.threads} threads"
    title = f"N {setting.tokens}, D {d}, F {f}, k {k}; 20 features firing on {result.firing:.2%} of tokens; {where}"
    table = Table(title=title)
    for column in ("what", "median ms", "range ms", "peak MiB", f"time / {first}", f"memory / {first}"):
        table.add_column(column, justify="left" if column == "what" else "right")
    for what, cost in result.costs.items():
        share = "n/a" if cost.peak is None or not base.peak else f"{cost.peak / base.peak:.3f}"
        table.add_row(
            what,
            f"{1e3 * cost.median:.1f}",
            f"{1e3 * cost.low:.1f}-{1e3 * cost.high:.1f}",
            "n/a" if cost.peak is None else f"{cost.peak / MIB:.1f}",
            f"{cost.median / base.median:.3f}",
            share,
        )
    return table


if __name__ == "__main__":
    main()
