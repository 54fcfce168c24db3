"""What a study is told: the main job's settings, and which arms, seeds and candidates of tuning."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, get_args

from pydantic import Field, field_validator, model_validator

from mechreward.config import ImproveConfig
from mechreward.reward import Credit
from mechreward.settings import Count, NotNegative, Positive, make_settings

Kind = Literal[
    "outcome", "sae", "probe", "random", "shuffled", "direction", "length", "certainty", "noise", "failed"
]  # fmt: skip
KINDS: tuple[Kind, ...] = get_args(Kind)
CREDITS: tuple[str, ...] = get_args(Credit)


class Candidate(NamedTuple):
    """One setting that tuning may choose."""

    learning_rate: float
    dense_weight: float


class StudyConfig(ImproveConfig):
    """Trains arms that differ in the reward alone, each with the same seeds, and judges them by Gate 2."""

    stage: Literal[2] = 2
    """Which gate."""
    method: Literal["grpo"] = "grpo"
    """A study's arms differ in the reward alone."""
    arms: tuple[str, ...] = (
        "outcome",
        "sae",
        "probe",
        "random",
        "shuffled",
        "direction",
        "length",
        "certainty",
        "noise",
    )  # type: ignore[assignment]
    """What is added to the outcome: nothing (`outcome`), the discovered pack (`sae`), an L2 probe of the same block
    (`probe`), features that fire as often (`random`), the pack with half of its signs turned (`shuffled`), the pack's
    decoder rows as one direction (`direction`), the completion's length (`length`), the model's certainty
    (`certainty`), noise (`noise`), the largest effects under shuffled labels (`failed`). `sae/return_to_go` takes
    another credit than `credit`."""
    judged: str = "sae"
    """The arm on trial. To pass it has to beat the random features of its own credit, `sae/potential` those of
    `random/potential`."""
    seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (0, 1, 2, 3, 4)
    """Of training: question order and sampling, the same in every arm."""
    learning_rates: tuple[Positive, ...] = ()
    """Candidates of tuning; `learning_rate` alone if empty."""
    dense_weights: tuple[NotNegative, ...] = ()
    """Candidates of tuning; `dense_weight` alone if empty. Outcome-only has no use for them, and so fewer tries: give
    it more learning rates instead."""
    tune_seeds: Annotated[tuple[int, ...], Field(min_length=1)] = (1000,)
    """Seeds that every candidate of every arm is tried with."""
    tune_steps: Count | None = None
    """Steps of a trial; `steps` if left out."""
    guards: bool = False
    """Guards against reward hacking in training; off, so that arms are compared by what their reward does."""
    survival: bool = False
    """Measure what Gate 3 asks of the judged arm's policies, after each of its runs."""
    probe: str | None = None
    """A probe for Gate 3 that no reward has: of another block, trained on other data. The tiny model has its own."""
    panel: tuple[str, ...] = ()
    """Sources of questions for Gate 3's capability panel, e.g. `reasoning-gym:chain_sum`."""
    panel_questions: Count = 50
    """Questions a source."""
    workers: Count = 1
    """Runs at a time, each a process of one thread."""
    out: Path = Path("runs/study")
    """Folder of the study."""

    @field_validator("arms")
    @classmethod
    def _known(cls, arms: tuple[str, ...]) -> tuple[str, ...]:
        for arm in arms:
            kind, _, credit = arm.partition("/")
            if kind not in KINDS or (credit or "per_token") not in CREDITS:
                raise ValueError(f"{arm!r} is none of {', '.join(KINDS)}, with / and one of {', '.join(CREDITS)}")
            if kind == "outcome" and credit:
                raise ValueError(f"{arm!r}: the outcome alone has no dense reward that a credit could be given to")
        if len(set(arms)) < len(arms) or "outcome" not in arms:
            raise ValueError("outcome has to be among them, and none may come twice")
        return arms

    @model_validator(mode="after")
    def _judged_runs(self) -> StudyConfig:
        if self.judged not in self.arms or kind_of(self.judged) in ("outcome", "random"):
            raise ValueError(f"judged: {self.judged!r} must be one of the arms, and neither outcome nor random")
        if set(self.seeds) & set(self.tune_seeds) or len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds: must differ from each other and from tune_seeds")
        if self.survival and self.chat:
            raise ValueError("survival: canaries and the panel are plain texts, which a chat model is not asked in")
        return self

    def candidates(self, arm: str) -> list[Candidate]:
        """What tuning of this arm chooses from, each once."""
        rates = self.learning_rates or (self.learning_rate,)
        weights = (0.0,) if arm == "outcome" else self.dense_weights or (self.dense_weight,)
        return [Candidate(rate, weight) for rate in rates for weight in weights]


def kind_of(arm: str) -> Kind:
    """The reward of an arm."""
    return next(kind for kind in KINDS if kind == arm.partition("/")[0])


def credit_of(arm: str, default: Credit) -> Credit:
    """The credit of an arm."""
    wanted = arm.partition("/")[2]
    return next((credit for credit in get_args(Credit) if credit == wanted), default)


def make_study(**values: Any) -> StudyConfig:
    """Builds a configuration.

    Raises:
        InputError: naming the first bad field, its value and what is allowed.
    """
    return make_settings(StudyConfig, values)
