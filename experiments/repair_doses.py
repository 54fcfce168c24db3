"""How does steering wrong chains right depend on its strength, against drawing again and against random directions?

The bundled reasoner answers tiny problems; one wrong chain a question is cut before the first wrong step of the worked
solution and written on, steered by features found on the other half of the questions. Features of right chains are
pinned to so many of their 99th percentiles, those of wrong chains to 0, over the step written anew or all that follows.
The same chains and sampling seed at every dose, and in every arm.

    python experiments/repair_doses.py --out runs/repair-doses
    python experiments/repair_doses.py --out runs/repair-doses-smoke --questions 60 --tries 1 --doses 1
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import altair as alt
import pandas as pd
import tyro
import vl_convert

from mechreward.chains import Roller
from mechreward.files import read_json, write_json
from mechreward.models import load_model
from mechreward.rollout import load_responses, sample_responses, save_responses, verify_responses
from mechreward.sae import load_sae
from mechreward.steering import RepairConfig, repair_known
from mechreward.steering.repair import summarise
from mechreward.tasks import load_questions
from mechreward.tiny import MODEL, SAE_FOLDER
from mechreward.verifiers import gsm8k_exact_match

TOKENS = 192


@dataclass(frozen=True)
class Study:
    """Doses x spans on the bundled reasoner."""

    out: Path
    """Folder; doses that are there are not run again."""
    questions: int = 320
    samples: int = 8
    tries: int = 2
    """Tries a chain, in every arm."""
    doses: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    """In 99th percentiles."""
    spans: tuple[Literal["step", "rest"], ...] = ("step", "rest")
    seed: int = 0


def main(study: Study) -> None:
    loaded, sae = load_model(str(MODEL)), load_sae(str(SAE_FOLDER))
    questions = load_questions("tiny:easy", limit=study.questions, seed=study.seed)
    path = study.out / "responses.parquet"
    if not path.exists():
        drawn = sample_responses(loaded, questions, n=study.samples, max_new_tokens=TOKENS, seed=study.seed)
        save_responses(path, verify_responses(drawn, questions, gsm8k_exact_match))
    responses = load_responses(path)
    rows: list[dict[str, Any]] = []
    for span in study.spans:
        for dose in study.doses:
            one = study.out / f"{span}-{dose:g}.json"
            if not one.exists():
                config = RepairConfig(
                    critical="solution", tries=study.tries, strength=dose, span=span, pooling="step_end:."
                )
                roller = Roller(loaded, questions, gsm8k_exact_match, TOKENS, seed=study.seed)
                write_json(one, {"config": asdict(config), **summarise(repair_known(roller, sae, responses, config))})
            rows.append({"span": span, "dose": dose, **read_json(one)})
    write_json(study.out / "doses.json", rows)
    (study.out / "doses.svg").write_text(vl_convert.vegalite_to_svg(curve(rows).to_dict()))
    print(table(rows))


def curve(rows: list[dict[str, Any]]) -> alt.LayerChart | alt.FacetChart:
    """Share of chains made right by dose, an arm a colour, with Wilson's intervals; a panel a span."""
    frame = pd.DataFrame(
        [
            {"span": row["span"], "dose": row["dose"], "arm": name, "right": arm["share"], "low": low, "high": high}
            for row in rows
            for name, arm in row["arms"].items()
            for low, high in (arm["interval"],)
        ]
    )
    base = alt.Chart(frame).encode(
        x=alt.X("dose:Q", scale=alt.Scale(type="log", base=2), title="dose, in 99th percentiles"),
        color="arm:N",
    )
    line = base.mark_line(point=True).encode(y=alt.Y("right:Q", title="chains made right"))
    bars = base.mark_rule(opacity=0.5).encode(y="low:Q", y2="high:Q")
    return (line + bars).properties(width=300, height=200).facet(column="span:N")


def table(rows: list[dict[str, Any]]) -> str:
    """Chains made right in each arm, and the exact p of McNemar's test of steering against each control."""
    lines = ["| span | dose | chains | steered | drawn again | random | p, drawn again | p, random |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for row in rows:
        shares = [row["arms"][arm] for arm in ("steered", "resampled", "random")]
        cells = [row["span"], f"{row['dose']:g}", str(row["n_chains"])]
        cells += ["{:.3f} [{:.3f}, {:.3f}]".format(one["share"], *one["interval"]) for one in shares]
        cells += [f"{row['steered_against'][control]['mcnemar_p']:.2g}" for control in ("resampled", "random")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main(tyro.cli(Study))
