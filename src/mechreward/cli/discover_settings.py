"""What `mechreward discover` is told."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from mechreward.cli.shared_settings import JudgeSettings, SAESettings
from mechreward.settings import Count, Whole, check_signs

Unit = Annotated[float, Field(ge=0, le=1)]
UNUSED = {
    "contrast": ("words",),
    "probe": ("words",),
    "attribution": ("pooling", "min_each", "permutations", "words"),
    "reasonscore": ("pooling", "min_each", "permutations"),
}
"""Options that a method has no use for. Attribution and ReasonScore rank by tokens; their scales are of means."""


class DiscoverSettings(JudgeSettings, SAESettings):
    """Finds the SAE features that go with right answers to the same question, and makes a pack of them."""

    responses: Path | None = None
    """Verified responses to read instead of sampling: a run's `responses/known.parquet`."""
    method: Literal["contrast", "probe", "attribution", "reasonscore"] = "contrast"
    """`contrast` looks at one feature at a time, `probe` fits all together with an L1 penalty; `attribution` ranks by
    what a feature does for the logit of right answers, `reasonscore` by where it fires at reasoning words."""
    words: tuple[str, ...] = ()
    """Reasoning words of `reasonscore`; by default the paper's ten."""
    pooling: str = "mean"
    """How a feature's tokens become one number, for `contrast` and `probe`: `mean`, `max`, `last`, `last_16`,
    `weighted_mean`, or `step_end:` and the text that ends a step."""
    limit: Count = 200
    """Use the first so many questions."""
    samples: Annotated[int, Field(ge=2)] = 8
    """Responses sampled for each question."""
    n_features: Count = 20
    """Features in the pack, at most."""
    q_max: Unit = 0.05
    """Largest q value (Benjamini-Hochberg) of a feature in the pack."""
    min_stability: Unit = 0.8
    """Least share of half-samples of questions that find a feature of the pack."""
    signs: Literal["any", "balanced"] = "any"
    """`balanced` takes half of the features of each sign: where most answers are wrong, the largest effects are all
    penalties, and a pack of penalties alone pays an empty answer most."""
    min_support: Unit = 0.05
    """Least share of answers in which a feature must fire to be tested."""
    min_each: Whole = 0
    """Least number of right and also of wrong answers in which it must fire, for `contrast` and `probe`."""
    permutations: Whole = 200
    """Label shuffles for the family-wise p of `contrast` and `probe`; 0 leaves them out."""
    halves: Annotated[int, Field(ge=2, multiple_of=2)] = 50
    """Half-samples of questions."""
    read_batch_size: Count = 32
    """Responses read at a time."""
    out: Path = Path("runs/discover")
    """Folder for features.parquet, pack.json and discovery.json, and for responses.parquet, the answers if sampled."""

    @model_validator(mode="after")
    def _used(self) -> DiscoverSettings:
        for name in UNUSED[self.method]:
            value = getattr(self, name)
            if value != type(self).model_fields[name].default:
                raise ValueError(f"{name}: {value!r} is not allowed, method {self.method} has no use for it")
        if len(self.words) == 1:
            raise ValueError(f"words: {self.words!r} is not allowed, one word has no entropy; give at least 2")
        check_signs(self.signs, self.n_features)
        return self
