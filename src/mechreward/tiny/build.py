"""Makes every asset of the tiny reasoner: `python -m mechreward.tiny.build [--small] [--seed N] [--out DIR]`.

Tokenizer, model (`training.py`), a TopK SAE of its residual stream trained on its own responses, measurements
(`measure.py`) and the model card, all from one seed. `--small` makes a model that is far from trained, to show that the
script runs; it takes about a minute on two CPU cores. Needs the extra `[sae]`.
"""

from __future__ import annotations

import json
import logging
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import tyro

from mechreward.files import read_json, write_json
from mechreward.models import LoadedModel, load_model
from mechreward.rollout import sample_responses
from mechreward.sae import TrainedSAE, own_meta, own_shape, save_sae, train_own_sae
from mechreward.tasks import load_questions
from mechreward.tiny.card import model_card
from mechreward.tiny.language import make_tokenizer
from mechreward.tiny.measure import behaviour, readability, sample_setting
from mechreward.tiny.training import SMALL, Progress, Recipe, train_model
from mechreward.tiny.world import SETTINGS

logger = logging.getLogger("mechreward.tiny.build")


@dataclass(frozen=True, kw_only=True)
class SAERecipe:
    """The SAE of the tiny reasoner."""

    layer: int = 2
    expansion: int = 8
    k: int = 24
    n_questions: int = 600
    """Of each setting, with four responses each."""
    n_tokens: int = 800_000
    batch_size: int = 512
    lr: float = 2e-3


SMALL_SAE = SAERecipe(layer=1, expansion=4, k=16, n_questions=30, n_tokens=40_960)


def build(out: Path, *, small: bool = False, seed: int = 0, device: str = "cpu") -> dict[str, Any]:
    """Writes `model/`, `sae/`, `measurements.json` and `README.md` into `out`; returns the measurements.

    A model that a run with the same recipe left in `out` is not trained again.
    """
    recipe = replace(SMALL if small else Recipe(), seed=seed)
    sae_recipe = SMALL_SAE if small else SAERecipe()
    training = build_model(out, recipe, device)
    loaded = load_model(str(out / "model"), device=device)
    started = time.perf_counter()
    sae = build_sae(loaded, sae_recipe, seed)
    save_sae(sae.sae, out / "sae")
    measurements: dict[str, Any] = {
        "recipe": asdict(recipe),
        "sae_recipe": asdict(sae_recipe),
        "parameters": sum(p.numel() for p in loaded.model.parameters()),
        "training": training["history"][-1],
        "sae": {"d_sae": sae.sae.d_sae, "fvu": sae.fvu, "l0": sae.l0, "dead_share": sae.dead_share},
    }
    for setting in SETTINGS:
        sampled = sample_setting(loaded, setting, 10 if small else 200, seed)
        measurements[setting] = behaviour(sampled) | ({} if small else readability(loaded, sampled))
        logger.info("%s: %s", setting, json.dumps(measurements[setting], indent=1))
    measurements["seconds"] = {"model": training["seconds"], "rest": round(time.perf_counter() - started)}
    write_json(out / "measurements.json", measurements)
    measurements = read_json(out / "measurements.json")
    (out / "README.md").write_text(model_card(measurements))
    return measurements


def build_model(out: Path, recipe: Recipe, device: str) -> dict[str, Any]:
    """Trains the model and saves it as fp16: what is measured, and what the SAE is trained on, is what ships."""
    record = out / "training.json"
    recipe_as_json = json.loads(json.dumps(asdict(recipe)))
    if record.exists() and read_json(record)["recipe"] == recipe_as_json:
        stored: dict[str, Any] = read_json(record)
        return stored
    started = time.perf_counter()
    tokenizer = make_tokenizer()
    trained = train_model(recipe, tokenizer, device=device, on_progress=_say)
    trained.model.half().save_pretrained(out / "model")
    tokenizer.save_pretrained(out / "model")
    history = [progress._asdict() for progress in trained.history]
    training = {"recipe": recipe_as_json, "history": history, "seconds": round(time.perf_counter() - started)}
    write_json(record, training)
    return training


def build_sae(loaded: LoadedModel, recipe: SAERecipe, seed: int) -> TrainedSAE:
    """A TopK SAE of one block, trained on prompts and sampled responses of both settings."""
    questions = [
        question
        for setting in SETTINGS
        for question in load_questions(f"tiny:{setting}", limit=recipe.n_questions, seed=seed + 1_000_003)
    ]
    responses = sample_responses(loaded, questions, n=4, max_new_tokens=192, seed=seed)
    rows = [(response.prompt_ids, response.completion_ids) for response in responses]
    return train_own_sae(
        loaded,
        rows,
        own_shape(loaded, expansion=recipe.expansion, k=recipe.k),
        meta=own_meta(loaded, recipe.layer, release="tiny", model_name="tiny"),
        n_tokens=recipe.n_tokens,
        batch_size=recipe.batch_size,
        lr=recipe.lr,
        seed=seed,
    )


def _say(progress: Progress) -> None:
    logger.info("step %d: loss %.4f nats a token, floor %.4f, planted question %.4f", *progress)


def main(out: Path, small: bool = False, seed: int = 0, device: str = "cpu") -> None:
    """Makes the tiny reasoner's assets in the folder `out`."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    build(out, small=small, seed=seed, device=device)
    logger.info("written to %s", out)


if __name__ == "__main__":
    tyro.cli(main)
