"""How strong is strong enough: behaviour and fluency over strengths, the knee, and the controls beside it.

For every strength the prompts are answered with the edit, and scored. A strength is *fluent* if the text costs the
unsteered model at most `nll_margin` nats a token more than its own text does, and repeats at most `repetition_margin`
more. **The knee is the smallest fluent strength that has 90 % of the largest gain among the fluent ones** (of factors,
the one nearest to 1, which edits nothing); there is none if no fluent strength gains anything.

Controls say how much of a gain belongs to the features: a random decoder row of the same norm, the wrong sign, the mean
of the edit added everywhere (`bias`), and the unsteered model told in words (`prompt`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isfinite
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mechreward.errors import InputError
from mechreward.gates import PairedResult, accuracy_interval, paired_test, question_means
from mechreward.models import iter_residuals
from mechreward.rollout import Response
from mechreward.steering.edits import Mode
from mechreward.steering.features import Strength
from mechreward.steering.features import strengths as strengths_of
from mechreward.steering.fluency import fluency
from mechreward.steering.hook import closed_ids
from mechreward.steering.program import Control, compile_rules
from mechreward.steering.variant import Variant

Score = Callable[[int, Response], float]
"""Behaviour of a response to prompt i, from 0 to 1."""
ControlArm = Literal["random", "wrong_sign", "bias", "prompt"]
KNEE_SHARE = 0.9


@dataclass(frozen=True)
class Point:
    """One strength of one arm."""

    arm: str
    """"edit", "none", or a control."""
    strength: float
    behaviour: float
    low: float
    high: float
    """95 % interval of the behaviour, by prompt."""
    nll: float
    repetition: float
    n_prompts: int
    fluent: bool
    against_none: PairedResult | None = None
    """Difference to the unsteered model on the same prompts."""


@dataclass(frozen=True)
class Curve:
    """What a sweep found."""

    points: list[Point]
    knee: float | None
    """A strength, or None."""

    def arm(self, name: str) -> list[Point]:
        """Points of one arm, by strength."""
        return sorted((point for point in self.points if point.arm == name), key=lambda point: point.strength)

    def rows(self) -> list[dict[str, Any]]:
        """One flat record a point, for a table or a chart."""
        rows = []
        for point in self.points:
            row = asdict(point)
            paired = row.pop("against_none") or {}
            rows.append(row | {name: paired.get(name) for name in ("difference", "p_value")})
        return rows


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What every arm of a sweep is asked in the same way."""

    prompts: Sequence[str] | Sequence[Sequence[int]]
    score: Score
    max_new_tokens: int = 256
    n: int = 1
    temperature: float = 0.0
    batch_size: int = 256
    seed: int = 0
    nll_margin: float = 0.5
    """Nats a token that fluent text may cost more than the unsteered model's own."""
    repetition_margin: float = 0.1


def sweep(
    variant: Variant,
    features: Strength,
    strengths: Sequence[float],
    protocol: Protocol,
    *,
    mode: Mode = "nudge",
    controls: Sequence[ControlArm] = ("random", "wrong_sign", "bias"),
    instruction: str | None = None,
) -> Curve:
    """Measures an edit of some features over strengths, and its controls at the same ones.

    Args:
        variant: what it comes on top of; not changed.
        features: one or several; a mapping gives each a weight that the strengths are multiplied by.
        strengths: in units of each feature's 99th percentile; factors for scale.
        instruction: text put in front of each prompt for the control "prompt", which needs text prompts.

    Raises:
        InputError: for no strengths or prompts, an unknown control, a "prompt" control without an instruction, or a
            score that is not from 0 to 1.
    """
    check_strengths(strengths, len(protocol.prompts))
    _check_controls(protocol, controls, instruction)
    weights = strengths_of(features, None if isinstance(features, Mapping) else 1.0, variant.sae.d_sae)
    none = _answer(variant, protocol)
    points = [_point("none", 0.0, none, none, protocol)]
    for strength in strengths:
        edited = variant.copy()
        edited.set({feature: strength * weight for feature, weight in weights.items()}, mode=mode)
        arms: dict[str, Variant] = {"edit": edited}
        for turned in get_args(Control):
            if turned in controls:
                arms[turned] = edited.copy(turned, protocol.seed)
        if "bias" in controls:
            arms["bias"] = variant.copy()
            arms["bias"].add_vector(mean_change(edited, none.responses) - mean_change(variant, none.responses))
        points += [_point(name, strength, _answer(arm, protocol), none, protocol) for name, arm in arms.items()]
    if "prompt" in controls:
        told = [f"{instruction}{prompt}" for prompt in protocol.prompts]
        points.append(_point("prompt", 0.0, _answer(variant, protocol, told), none, protocol))
    return Curve(points, find_knee(points, mode))


def find_knee(points: Sequence[Point], mode: Mode = "nudge") -> float | None:
    """The smallest fluent strength of the arm "edit" with 90 % of the largest gain over the arm "none"."""
    idle = 1.0 if mode == "scale" else 0.0
    (none,) = (point.behaviour for point in points if point.arm == "none")
    gains = {p.strength: p.behaviour - none for p in points if p.arm == "edit" and p.fluent}
    best = max(gains.values(), default=0.0)
    # The last bits of 90 % of a gain are rounding.
    good = [strength for strength, gain in gains.items() if gain >= KNEE_SHARE * best - 1e-12]
    return min(good, key=lambda strength: abs(strength - idle)) if best > 0 else None


def mean_change(variant: Variant, responses: Sequence[Response]) -> Tensor:
    """[D]: mean of what the variant's edits add to the residuals of the responses' completion tokens, unsteered; over
    those that they touch: no BOS, no pad, none of massive norm. 0 if they touch none."""
    program = compile_rules(variant.sae, variant.rules, (), variant.control, variant.control_seed)
    total_D, count, closed = torch.zeros(variant.sae.d_model), 0, closed_ids(variant.loaded.tokenizer)
    prompts, completions = [list(r.prompt_ids) for r in responses], [list(r.completion_ids) for r in responses]
    for batch in iter_residuals(variant.loaded.model, prompts, completions, variant.sae.meta.layer):
        h_ND = batch.h_BTD[batch.mask_BT]
        open_N = torch.tensor([token not in closed for row in batch.rows for token in completions[row]]).to(h_ND.device)
        if variant.norm_limit is not None:
            open_N &= h_ND.norm(dim=-1) <= variant.norm_limit
        h_ND = h_ND[open_N]
        total_D += program.change(h_ND, program.acts(h_ND)).sum(0).cpu()
        count += len(h_ND)
    return total_D / max(count, 1)


@dataclass(frozen=True)
class Answered:
    """Responses of one arm, with the behaviour of each and their fluency."""

    responses: list[Response]
    behaviour: list[float]
    nll: float
    repetition: float

    @property
    def prompts(self) -> list[str]:
        return [response.question_id for response in self.responses]

    @property
    def by_prompt(self) -> dict[str, float]:
        return question_means(self.behaviour, self.prompts)


def _answer(variant: Variant, protocol: Protocol, prompts: Sequence[str] | None = None) -> Answered:
    drawn = variant.generate(
        protocol.prompts if prompts is None else prompts,
        max_new_tokens=protocol.max_new_tokens,
        n=protocol.n,
        temperature=protocol.temperature,
        batch_size=protocol.batch_size,
        seed=protocol.seed,
    )
    responses = [response for group in drawn for response in group]
    read = fluency(variant.loaded, responses)
    behaviour = [_behaviour(protocol, response) for response in responses]
    return Answered(responses, behaviour, read.nll, read.repetition)


def _behaviour(protocol: Protocol, response: Response) -> float:
    value = float(protocol.score(int(response.question_id), response))
    if not 0 <= value <= 1:
        raise InputError(f"score: it gave {value} for prompt {response.question_id}; a behaviour goes from 0 to 1")
    return value


def _point(arm: str, strength: float, found: Answered, none: Answered, protocol: Protocol) -> Point:
    interval = accuracy_interval(found.behaviour, found.prompts)
    fluent = (
        found.nll <= none.nll + protocol.nll_margin and found.repetition <= none.repetition + protocol.repetition_margin
    )
    return Point(
        arm=arm,
        strength=strength,
        behaviour=interval.value,
        low=interval.low,
        high=interval.high,
        nll=found.nll,
        repetition=found.repetition,
        n_prompts=len(none.by_prompt),
        fluent=fluent,
        against_none=None if arm == "none" else paired_test(none.by_prompt, found.by_prompt),
    )


def check_strengths(strengths: Sequence[float], n_prompts: int) -> None:
    """Raises:
    InputError: for no strengths, one that comes twice or is not finite, or fewer prompts than intervals need.
    """
    if not strengths or len(set(strengths)) < len(strengths) or not all(map(isfinite, strengths)):
        raise InputError(f"strengths: {list(strengths)} must be at least one finite number, none of them twice")
    if n_prompts < 2:
        raise InputError(f"prompts: {n_prompts} are given; intervals over prompts need at least 2")


def _check_controls(protocol: Protocol, controls: Sequence[ControlArm], instruction: str | None) -> None:
    for control in controls:
        if control not in get_args(ControlArm):
            raise InputError(f"controls: {control!r} is not known; allowed are {', '.join(get_args(ControlArm))}")
    told = instruction is not None and all(isinstance(prompt, str) for prompt in protocol.prompts)
    if "prompt" in controls and not told:
        raise InputError("instruction: the control prompt needs one, and prompts that are texts")
