"""Makes the bundled probe of the tiny reasoner: block 3 (its SAE reads block 2), questions no pack was found on.

python experiments/tiny_probe.py --out src/mechreward/catalogs/tiny/correctness_probe_l3
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

from mechreward.gates import within_question_auroc
from mechreward.models import load_model
from mechreward.probes import save_probe, train_probe_on
from mechreward.rollout import sample_responses, verify_responses
from mechreward.tasks import load_questions
from mechreward.tiny import MODEL
from mechreward.verifiers import gsm8k_exact_match

SOURCES = ("tiny:easy", "tiny:long")


@dataclass(frozen=True)
class Options:
    """Where the probe goes, and what it is trained on."""

    out: Path
    """File to write."""
    layer: int = 3
    """Decoder block."""
    questions: int = 120
    """Questions of each setting, four answers each."""
    seed: int = 4242
    """Of the questions and the sampling."""


def main() -> None:
    options = tyro.cli(Options)
    torch.set_num_threads(1)
    loaded, answers = load_model(str(MODEL)), []
    for source in SOURCES:
        asked = load_questions(source, limit=options.questions, seed=options.seed)
        found = sample_responses(loaded, asked, n=4, max_new_tokens=170, seed=options.seed)
        answers += verify_responses(found, asked, gsm8k_exact_match)
    name, kind = f"correctness_probe_l{options.layer}", ", ".join(SOURCES)
    result = train_probe_on(
        replace(loaded, name="tiny"), answers, options.layer, name, pooling="attention", questions=kind,
        questions_seed=options.seed,
    )  # fmt: skip
    within = within_question_auroc(
        result.probabilities_N, [r.correct for r in answers], [r.question_id for r in answers]
    )
    held_out = result.numbers() | {"within_question_auroc": within}
    print(save_probe(replace(result.probe, metadata=result.probe.metadata | {"held_out": held_out}), options.out))
    print(held_out)


if __name__ == "__main__":
    main()
