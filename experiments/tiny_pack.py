"""Makes the bundled model's pack, `tiny/reasoning_pack`: found on half of fresh questions, judged on the other half.

    python experiments/tiny_pack.py
    python experiments/tiny_pack.py --questions 24 --samples 4 --out runs/tiny-pack

Writes NAME.json, the pack with Gate 1's verdict in it, and NAME.gate1.json, every number behind the verdict. The exit
code is 1 unless the gate passed. The questions come from the generator (`tiny:easy`), which holds no two alike, at a
seed that the model was not trained on; the split is by question.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from mechreward.features import FeaturePack, build_pack, discover, pack_prompt, save_pack
from mechreward.files import write_json
from mechreward.gates import gate1
from mechreward.models import load_model
from mechreward.reward import FeatureReward
from mechreward.rollout import sample_responses, verify_responses
from mechreward.sae import load_sae
from mechreward.tasks import load_questions, split_questions
from mechreward.tiny import MODEL, SAE_FOLDER
from mechreward.verifiers import gsm8k_exact_match

NAME = "reasoning_pack"


@dataclass(frozen=True)
class Settings:
    """What is sampled and where it goes."""

    questions: int = 300
    """Half of them find the features, half judge them."""
    samples: int = 8
    """Responses a question."""
    seed: int = 20261124
    """Of questions, split, sampling, discovery and gate."""
    features: int = 20
    """Most features the pack may hold."""
    out: Path = Path("src/mechreward/catalogs/tiny")
    """Where the two files are written."""


def main(settings: Settings) -> int:
    loaded, sae = load_model(str(MODEL)), load_sae(SAE_FOLDER)
    questions = load_questions("tiny:easy", limit=settings.questions, seed=settings.seed)
    halves = split_questions(questions, 0.5, settings.seed)
    responses = sample_responses(loaded, questions, n=settings.samples, max_new_tokens=96, seed=settings.seed)
    responses = verify_responses(responses, questions, gsm8k_exact_match)
    found_on, judged_on = (
        [response for response in responses if response.question_id in {question.id for question in half}]
        for half in (halves.known, halves.unknown)
    )
    table = discover(loaded, sae, found_on, seed=settings.seed)
    pack = build_pack(
        table,
        sae,
        name=f"tiny/{NAME}",
        model_name="tiny",
        n_features=settings.features,
        prompt=pack_prompt("{question}", False, loaded.tokenizer),
        provenance={
            "questions": "tiny:easy",
            "questions_license": "Apache-2.0",
            "command": f"python experiments/tiny_pack.py --questions {settings.questions} --samples "
            f"{settings.samples} --seed {settings.seed} --features {settings.features}",
            "seed": settings.seed,
            "samples": settings.samples,
            "verifier": "gsm8k_exact_match",
            "sae_training": "mechreward.tiny.build, on the model's own responses",
        },
    )
    pack = named(pack)
    result = gate1(FeatureReward(pack, sae), judged_on, loaded, table=table, seed=settings.seed)
    save_pack(pack.model_copy(update={"validation": result.validation()}), settings.out / f"{NAME}.json")
    write_json(settings.out / f"{NAME}.gate1.json", result.to_dict())
    print(f"{settings.out / NAME}.json: gate 1 {result.verdict}, {result.reason}")
    return 0 if result.passed else 1


def named(pack: FeaturePack) -> FeaturePack:
    """With the SAE by name: its hash identifies it, and a path of this machine means nothing on another."""
    described = "Features that go with right answers of the bundled reasoner to questions of its own generator."
    ref = pack.sae.model_copy(update={"release": "tiny", "sae_id": "sae"})
    return pack.model_copy(update={"sae": ref, "description": described})


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings)))
