"""What rollouts cost by the way transformers decodes them: the same prompts, the same number of tokens, in turns.

- `dynamic`: a cache that grows by a token a step, not compiled; what TRL does by itself.
- `roomy`: it grows in place, with room to spare; what `MechRewardGRPOTrainer` does except on CUDA.
- `static`: a cache of one size, not compiled.
- `static, compiled`: the same, with the decoding step compiled, as `MechRewardGRPOTrainer` does on CUDA. On a CPU it
  runs if `--compile` is given, without CUDA graphs.
- `continuous batching`: transformers' paged scheduler (`use_transformers_continuous_batching`), which needs no padding.

No row may end early, so that all ways draw as many tokens; rows that do end favour continuous batching. Before timing,
each way draws greedily, and the share of rows that equals `dynamic`'s is in the table: it is 1 up to ties in rounding.
The first call of a way is timed apart: less a median call, it is what compiling and allocating cost. Peak memory is the
allocator's on CUDA, and on a CPU the resident high-water mark of the process while that way ran.

    python benchmarks/rollouts.py --compile
    python benchmarks/rollouts.py --device cuda --model HuggingFaceTB/SmolLM2-135M-Instruct --rows 1024 --bf16
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from grpo_overhead import peak_mib, reset_peak
from read_features import device_name
from rich.console import Console
from rich.table import Table
from transformers import CompileConfig, ContinuousBatchingConfig, GenerationConfig

from mechreward.models import LoadedModel, load_model, static_cache
from mechreward.rollout.sampling import tokenise_prompts
from mechreward.tasks import load_questions
from mechreward.tiny import MODEL
from mechreward.training.generation import Decoding, cache_length

Way = Callable[[GenerationConfig, list[list[int]]], list[list[int]]]


@dataclass(frozen=True)
class Setting:
    """Tokens a second of rollouts, by cache and compilation."""

    model: str = str(MODEL)
    """A model folder, id or GGUF file; the bundled reasoner if not given."""
    questions: str = "tiny:easy"
    """What is asked, as `mechreward improve` takes it."""
    rows: int = 64
    """Rollouts a call."""
    new_tokens: int = 160
    """Tokens a rollout."""
    rounds: int = 5
    """Timed calls of each way, after the first."""
    device: str = "cpu"
    """`cpu` or `cuda`."""
    bf16: bool = False
    """Hold the model in bfloat16."""
    compile: bool = False
    """Compile on a CPU too."""
    seed: int = 0
    """Of the sampling."""
    json: Path | None = None
    """Write the numbers to this file."""


def main() -> None:
    setting = tyro.cli(Setting)
    loaded = load_model(setting.model, device=setting.device)
    loaded.model.generation_config.eos_token_id = None
    if setting.bf16:
        loaded.model.to(torch.bfloat16)
    questions = load_questions(setting.questions, limit=setting.rows)
    known = tokenise_prompts(loaded, questions, max_new_tokens=setting.new_tokens)
    prompts = [known[row % len(known)] for row in range(setting.rows)]
    ways = dict(ways_of(setting, loaded, max(map(len, prompts))))
    with torch.no_grad():
        agreements = agree(setting, loaded, ways, prompts)
        times, peaks = measure(setting, loaded, ways, prompts)
    rows = [summary(setting, name, times[name], peaks[name], agreements[name]) for name in ways]
    Console(width=120).print(table(setting, rows))
    if setting.json is not None:
        head = {"torch": torch.__version__, "device": device_name(setting.device), "setting": vars(setting)}
        setting.json.write_text(json.dumps(head | {"rows": rows}, indent=1, default=str))


def ways_of(setting: Setting, loaded: LoadedModel, width: int) -> Iterator[tuple[str, Way]]:
    def plain(config: GenerationConfig, prompts: list[list[int]]) -> list[list[int]]:
        return generate(loaded, config, prompts)

    def roomy(config: GenerationConfig, prompts: list[list[int]]) -> list[list[int]]:
        with Decoding("roomy").of(loaded.model):
            return generate(loaded, config, prompts)

    def static(config: GenerationConfig, prompts: list[list[int]]) -> list[list[int]]:
        cache = static_cache(loaded.model, cache_length(width, setting.new_tokens))
        return generate(loaded, config, prompts, past_key_values=cache)

    def compiled(config: GenerationConfig, prompts: list[list[int]]) -> list[list[int]]:
        if setting.device == "cpu":
            config.compile_config = CompileConfig(mode="default")
            config.compile_config._compile_all_devices = True
        with Decoding("static").of(loaded.model):
            return generate(loaded, config, prompts)

    def continuous(config: GenerationConfig, prompts: list[list[int]]) -> list[list[int]]:
        model: Any = loaded.model
        batching = ContinuousBatchingConfig()
        if setting.device == "cpu":  # by itself it takes what memory is free, which is the GPU's it is made for
            batching.page_size = 32
            batching.num_blocks = setting.rows * (1 + (width + setting.new_tokens) // batching.page_size)
            batching.max_batch_tokens = setting.rows * width
        outputs = model.generate_batch(
            prompts, generation_config=config, continuous_batching_config=batching, progress_bar=False
        )
        by_number = sorted(outputs.values(), key=lambda output: int(output.request_id.rsplit("_", 1)[-1]))
        return [list(output.generated_tokens) for output in by_number]

    yield "dynamic", plain
    yield "roomy", roomy
    yield "static", static
    if setting.compile or setting.device != "cpu":
        yield "static, compiled", compiled
    yield "continuous batching", continuous


def generate(loaded: LoadedModel, config: GenerationConfig, prompts: list[list[int]], **named: Any) -> list[list[int]]:
    model: Any = loaded.model
    width = max(map(len, prompts))
    ids_BS = torch.tensor([[loaded.tokenizer.pad_token_id] * (width - len(p)) + p for p in prompts])
    seen_BS = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    drawn_BS = model.generate(
        input_ids=ids_BS.to(model.device),
        attention_mask=seen_BS.to(model.device),
        generation_config=config,
        **named,
    )
    return drawn_BS[:, width:].tolist()


def config_of(setting: Setting, loaded: LoadedModel, *, sample: bool) -> GenerationConfig:
    """As TRL makes it, but without an end."""
    return GenerationConfig(
        max_new_tokens=setting.new_tokens,
        do_sample=sample,
        pad_token_id=loaded.tokenizer.pad_token_id,
        temperature=1.0 if sample else None,
        top_k=0 if sample else None,
        disable_compile=True,
    )


def agree(
    setting: Setting, loaded: LoadedModel, ways: dict[str, Way], prompts: list[list[int]]
) -> dict[str, tuple[float, float]]:
    """For each way the share of rows that are greedily drawn as by the first, and the seconds of this first call."""
    result, wanted = {}, None
    for name, way in ways.items():
        started = now(setting)
        drawn = way(config_of(setting, loaded, sample=False), prompts)
        seconds = now(setting) - started
        assert [len(row) for row in drawn] == [setting.new_tokens] * len(prompts), name
        wanted = drawn if wanted is None else wanted
        result[name] = statistics.mean(a == b for a, b in zip(drawn, wanted, strict=True)), seconds
    return result


def measure(
    setting: Setting, loaded: LoadedModel, ways: dict[str, Way], prompts: list[list[int]]
) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    times: dict[str, list[float]] = {name: [] for name in ways}
    peaks: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(setting.rounds):
        for name, way in ways.items():
            torch.manual_seed(setting.seed + round_)
            reset_peak(setting.device)
            started = now(setting)
            way(config_of(setting, loaded, sample=True), prompts)
            times[name].append(now(setting) - started)
            peaks[name].append(peak_mib(setting.device))
    return times, peaks


def now(setting: Setting) -> float:
    if setting.device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter()


def summary(
    setting: Setting, name: str, times: list[float], peaks: list[float], agreement: tuple[float, float]
) -> dict[str, Any]:
    tokens, (same, first) = setting.rows * setting.new_tokens, agreement
    return {
        "what": name,
        "tokens_per_second": tokens / statistics.median(times),
        "low": tokens / max(times),
        "high": tokens / min(times),
        "n": len(times),
        "first_call_extra_seconds": max(0.0, first - statistics.median(times)),
        "peak_mib": statistics.median(peaks),
        "same_greedy_rows": same,
    }


def table(setting: Setting, rows: list[dict[str, Any]]) -> Table:
    where = f"{Path(setting.model).name}, {device_name(setting.device)}, {torch.get_num_threads()} threads"
    title = f"{setting.rows} rollouts of {setting.new_tokens} tokens; {where}"
    names = "what", "tokens/s", "range", "n", "to dynamic", "first call, s more", "peak MiB", "same greedy rows"
    result = Table(*names, title=title)
    for row in rows:
        ratio = row["tokens_per_second"] / rows[0]["tokens_per_second"]
        result.add_row(
            row["what"],
            f"{row['tokens_per_second']:,.0f}",
            f"{row['low']:,.0f}-{row['high']:,.0f}",
            str(row["n"]),
            f"{ratio:.2f}",
            f"{row['first_call_extra_seconds']:.1f}",
            f"{row['peak_mib']:.0f}",
            f"{row['same_greedy_rows']:.2f}",
        )
    return result


if __name__ == "__main__":
    main()
