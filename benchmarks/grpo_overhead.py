"""What dense rewards add to the time and memory of a GRPO step: the same steps, the same seeds, in turns.

Each variant is compared with training on the outcome alone under the same TRL settings:

- `forward`: TRL runs no scoring pass, so the reader runs one truncated forward over the finished rollouts.
- `forward, two rewards`: two FeatureRewards on different layers; still one forward.
- `tapped`: TRL scores the rollouts anyway (here num_iterations=2) and the reader taps that pass.
- `tapped, two rewards`

The learning rate is 0, so that with one seed every variant samples the very same rollouts. A round runs every variant
once for `--steps` steps (the first is a warm-up); a ratio is a variant's step over the same step of its base in the
same round. On a CPU the same ratio in processor seconds of all threads stands beside it, which what else runs on the
machine hardly touches (OMP_NUM_THREADS=1, or threads that wait count as working). Peak memory is the allocator's on
CUDA, and the resident high-water mark of the round on a CPU.

    python benchmarks/grpo_overhead.py                       # the bundled model on a CPU
    python benchmarks/grpo_overhead.py --device cuda --model SmolLM2-135M-Instruct.Q4_1.gguf --layer 15
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from datasets import Dataset
from read_features import device_name, resident
from rich.console import Console
from rich.table import Table
from transformers import PrinterCallback, TrainerCallback
from trl import GRPOConfig

from mechreward.models import LoadedModel, d_model, load_model
from mechreward.reward import FeatureReward, OutcomeReward
from mechreward.sae import SAE, SAEMeta, load_sae
from mechreward.tasks import load_questions
from mechreward.tiny import MODEL, SAE_FOLDER
from mechreward.training import DenseConfig, MechRewardGRPOTrainer
from mechreward.verifiers import get_verifier

MIB = 2**20
Seconds = tuple[float, float]
"""Of the clock, and of the processor."""


@dataclass(frozen=True)
class Setting:
    """Time and memory of a GRPO step with dense rewards against one without."""

    model: str = str(MODEL)
    """A model folder, id or GGUF file; the bundled reasoner if not given."""
    layer: int = 2
    """Block to read; the second reward reads the block before it."""
    sae_features: int = 9216
    """F of the made-up TopK SAE (k 32) of a model other than the bundled one."""
    questions: str = "tiny:easy"
    """What is asked, as `mechreward improve` takes it."""
    questions_per_step: int = 16
    """Questions a step."""
    generations: int = 8
    """Completions a question."""
    max_new_tokens: int = 80
    """Longest completion."""
    micro_batch: int = 64
    """Completions a forward and backward pass."""
    steps: int = 4
    """Steps a variant in a round; the first is not counted."""
    rounds: int = 3
    """Rounds over all variants."""
    device: str = "cpu"
    """`cpu` or `cuda`."""
    bf16: bool = False
    """Train under bfloat16 autocast."""
    json: Path | None = None
    """Write the numbers to this file."""


class StepTimes(TrainerCallback):
    """Seconds of each optimiser step, generation included: of the clock, and of the processor."""

    def __init__(self, device: str) -> None:
        self.device, self.steps, self.started = device, [], (0.0, 0.0)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.started = now(self.device)

    def on_step_end(self, *_: Any, **__: Any) -> None:
        clock, processor = now(self.device)
        self.steps.append((clock - self.started[0], processor - self.started[1]))


def now(device: str) -> Seconds:
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return time.perf_counter(), time.process_time()


@dataclass(frozen=True)
class Variant:
    """One arm: how many feature rewards, and whether TRL scores its rollouts."""

    name: str
    rewards: int
    scored: bool


VARIANTS = [
    Variant("outcome only", 0, scored=False),
    Variant("forward", 1, scored=False),
    Variant("forward, two rewards", 2, scored=False),
    Variant("outcome only, scored by TRL", 0, scored=True),
    Variant("tapped", 1, scored=True),
    Variant("tapped, two rewards", 2, scored=True),
]


def main() -> None:
    setting = tyro.cli(Setting)
    seconds: dict[str, list[Seconds]] = {variant.name: [] for variant in VARIANTS}
    peaks: dict[str, list[float]] = {variant.name: [] for variant in VARIANTS}
    for _ in range(setting.rounds):
        for variant in VARIANTS:
            times, peak = run(setting, variant)
            seconds[variant.name] += times[1:]
            peaks[variant.name].append(peak)
    rows = list(summaries(seconds, peaks))
    Console(width=120).print(table(setting, rows))
    if setting.json is not None:
        head = {"torch": torch.__version__, "device": device_name(setting.device), "setting": vars(setting)}
        setting.json.write_text(json.dumps(head | {"rows": rows}, indent=1, default=str))


def run(setting: Setting, variant: Variant) -> tuple[list[Seconds], float]:
    loaded = load_model(setting.model, device=setting.device)
    questions = load_questions(setting.questions, limit=setting.questions_per_step * setting.steps)
    columns = {"prompt": [q.prompt for q in questions], "answer": [q.answer for q in questions]}
    dense = [FeatureReward({i: 1.0 for i in range(0, 400, 20)}, sae) for sae in saes(setting, loaded)][
        : variant.rewards
    ]
    times = StepTimes(setting.device)
    with tempfile.TemporaryDirectory() as folder:
        trainer = MechRewardGRPOTrainer(
            model=loaded.model,
            reward_funcs=[*dense, OutcomeReward(get_verifier("gsm8k_exact_match"))],
            args=arguments(setting, variant, folder),
            train_dataset=Dataset.from_dict(columns),
            processing_class=loaded.tokenizer,
            callbacks=[times],
            dense=DenseConfig(gap_every=0),
        )
        trainer.remove_callback(PrinterCallback)
        reset_peak(setting.device)
        trainer.train()
    peak = peak_mib(setting.device)
    return times.steps[:: 2 if variant.scored else 1], peak


def arguments(setting: Setting, variant: Variant, folder: str) -> GRPOConfig:
    rows = setting.questions_per_step * setting.generations
    return GRPOConfig(
        output_dir=folder,
        # With two iterations a generation serves two steps; only steps that generate are timed.
        max_steps=setting.steps * (2 if variant.scored else 1),
        num_iterations=2 if variant.scored else 1,
        per_device_train_batch_size=setting.micro_batch,
        gradient_accumulation_steps=rows // setting.micro_batch,
        num_generations=setting.generations,
        max_completion_length=setting.max_new_tokens,
        learning_rate=0.0,
        shuffle_dataset=False,
        disable_dropout=True,
        bf16=setting.bf16,
        use_cpu=setting.device == "cpu",
        gradient_checkpointing=False,
        save_strategy="no",
        logging_steps=100,
        report_to="none",
        disable_tqdm=True,
    )


def saes(setting: Setting, loaded: LoadedModel) -> Iterator[SAE]:
    """Of the layer and of the one before it."""
    for layer in (setting.layer, setting.layer - 1):
        meta = SAEMeta(release="benchmark", sae_id="", layer=layer, model_name="", hook_name=f"model.layers.{layer}")
        if setting.model == str(MODEL):
            sae = load_sae(SAE_FOLDER)
            yield SAE("topk", sae.W_enc_DF, sae.b_enc_F, sae.W_dec_FD, sae.b_dec_D, meta, k=sae.k).to(setting.device)
        else:
            d, f = d_model(loaded.model), setting.sae_features
            W_FD = torch.nn.functional.normalize(
                torch.randn(f, d, generator=torch.Generator().manual_seed(layer)), dim=1
            )
            yield SAE("topk", W_FD.T, torch.zeros(f), W_FD, torch.zeros(d), meta, k=32).to(setting.device)


def reset_peak(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    elif Path("/proc/self/clear_refs").exists():
        Path("/proc/self/clear_refs").write_text("5")


def peak_mib(device: str) -> float:
    return (torch.cuda.max_memory_allocated() if device.startswith("cuda") else resident("VmHWM")) / MIB


def summaries(seconds: dict[str, list[Seconds]], peaks: dict[str, list[float]]) -> Iterator[dict[str, Any]]:
    for variant in VARIANTS:
        base = VARIANTS[3 if variant.scored else 0].name
        pairs = list(zip(seconds[variant.name], seconds[base], strict=True))
        clock, processor = ([mine[at] / theirs[at] for mine, theirs in pairs] for at in (0, 1))
        yield {
            "what": variant.name,
            "seconds": statistics.median(mine[0] for mine, _ in pairs),
            "ratio": statistics.median(clock),
            "low": min(clock),
            "high": max(clock),
            "processor_ratio": statistics.median(processor),
            "processor_low": min(processor),
            "processor_high": max(processor),
            "n": len(pairs),
            "peak_mib": statistics.median(peaks[variant.name]),
        }


def table(setting: Setting, rows: list[dict[str, Any]]) -> Table:
    rollouts = setting.questions_per_step * setting.generations
    where = f"{Path(setting.model).name}, {device_name(setting.device)}, {torch.get_num_threads()} threads"
    title = f"A GRPO step of {rollouts} rollouts of up to {setting.max_new_tokens} tokens; {where}"
    columns = "median s", "ratio to its base", "range", "of the processor", "range", "n", "peak MiB"
    result = Table("what", *columns, title=title)
    for row in rows:
        spread = f"{row['low']:.3f}-{row['high']:.3f}"
        own = f"{row['processor_ratio']:.3f}", f"{row['processor_low']:.3f}-{row['processor_high']:.3f}"
        numbers = f"{row['seconds']:.2f}", f"{row['ratio']:.3f}", spread, *own, str(row["n"]), f"{row['peak_mib']:.0f}"
        result.add_row(row["what"], *numbers)
    return result


if __name__ == "__main__":
    main()
