"""Experiment 7: does training with the hybrid reward cost what the model could do before?

After each seed of experiment 3 the panel is put to the starting model and to the policy; `results.json` of the run gets
both, each with its standard error. The panel is reasoning-gym's tasks (extra `tasks`), or the smoke's.

    python experiments/07_capability.py --config my.yaml --out runs/07
    python experiments/07_capability.py --smoke --out runs/07-smoke
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from common import Trained, options, run

from mechreward.files import write_json
from mechreward.studies.capability import panel_of, panel_scores

PANEL = ("reasoning-gym:chain_sum", "reasoning-gym:spell_backward", "reasoning-gym:number_sorting")
SMOKE_PANEL = ("tiny:easy",)


def main(arguments: list[str] | None = None) -> list[Trained]:
    given = options(__doc__, arguments)
    trained = run(__doc__, "dense", import_module("03_hybrid").rewards, arguments)
    for one in trained:
        tasks: dict[str, Any] = {"n_questions": 6 if given.smoke else 100, "seed": one.inputs.config.seed}
        tasks["max_new_tokens"] = one.inputs.config.max_new_tokens
        sources = SMOKE_PANEL if given.smoke else PANEL
        before, after = (
            panel_scores(model, sources, one.inputs.verifier, **tasks) for model in (one.inputs.loaded, one.policy)
        )
        panel = panel_of(before, after)
        write_json(
            one.folder / "results.json",
            one.results | {"panel": {task: values.model_dump() for task, values in panel.items()}},
        )
        for task, values in panel.items():
            print(
                f"{task}: {values.before:.3f} (se {values.before_error:.3f}) to {values.after:.3f} "
                f"(se {values.after_error:.3f})"
            )
    return trained


if __name__ == "__main__":
    main()
