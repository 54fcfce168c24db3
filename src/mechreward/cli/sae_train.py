"""`mechreward sae train`: a sparse autoencoder of a model's own residual stream."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mechreward.cli.options import parse_settings, quiet
from mechreward.cli.terminal import bars, console, print_heading, print_path
from mechreward.recipe import SAERecipe

if TYPE_CHECKING:
    from mechreward.sae.training import TrainedSAE, TrainingPoint


def train(arguments: list[str], prog: str) -> int:
    """Trains a sparse autoencoder of a model's block on text, questions and the model's own answers."""
    recipe = parse_settings(SAERecipe, arguments, prog)
    quiet()
    print_heading(f"SAE of {recipe.model}, block {recipe.layer}", recipe.out)
    _tell(recipe, _run(recipe))
    return 0


def _run(recipe: SAERecipe) -> TrainedSAE:
    from mechreward.sae.run import Teller, run_recipe

    with bars() as draw:
        teller = Teller(
            on_answers=lambda done, total: draw("sample answers", done, total, ""),
            on_step=lambda tokens, loss: draw("train", tokens, recipe.tokens, f"loss {loss:.4g}"),
            on_point=_show,
        )
        return run_recipe(recipe, teller)


def _show(point: TrainingPoint) -> None:
    numbers = f"FVU {point.fvu:.4f}  L0 {point.l0:.1f}  dead {point.dead_share:.1%}  loss {point.loss:.4g}"
    console.print(f"  step {point.step:>6}  {point.tokens:>11,} tokens  {numbers}", soft_wrap=True)


def _tell(recipe: SAERecipe, trained: TrainedSAE) -> None:
    sae = trained.sae
    console.print(
        f"{sae.d_model} -> {sae.d_sae} features, {sae.architecture}: FVU {trained.fvu:.4f}, L0 {trained.l0:.1f}, "
        f"{trained.dead_share:.1%} dead, on {trained.n_held_out:,} held-out tokens",
        soft_wrap=True,
    )
    print_path("SAE (cfg.json, sae_weights.safetensors, sparsity.safetensors):", recipe.out)
    print_path("metrics:", recipe.out / "metrics.jsonl")
