"""Rules made ready to run: from the residuals after the block to what is added to them.

    h' = h + u(h) * sum_i (f'_i - f_i) * row_i

row_i is what one unit of feature i adds to a reconstruction (`SAE.decoder_rows`: the decoder row, over its norm where
the SAE rescales by it) and u(h) undoes the SAE's input normalisation. So h' = decode(f') + (h - decode(f)): the SAE's
error is kept whole, and nothing but the edited features moves (Marks et al. 2403.19647 keep the error the same way).

f is `SAE.read` of the unedited residual. A TopK feature outside a token's k reads 0 and may still be set. A nudge does
not depend on f, and is not read for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mechreward.errors import InputError
from mechreward.sae import SAE
from mechreward.sae.few import FewReader
from mechreward.steering.conditions import Condition, features_of
from mechreward.steering.edits import Rule

Control = Literal["random", "wrong_sign"]


@dataclass(frozen=True, eq=False)
class Step:
    """One rule over the edited features: f' = factor * f + add where the condition holds."""

    condition: Condition | None
    factor_K: Tensor
    add_K: Tensor
    vector_D: Tensor | None

    @cached_property
    def less_K(self) -> Tensor:
        """Factor - 1, so that f' - f is one operation."""
        return self.factor_K - 1


@dataclass(frozen=True, eq=False)
class Program:
    """Rules compiled for one SAE; `rows_KD` belongs to the edited features, in the order of `edited`."""

    sae: SAE
    edited: tuple[int, ...]
    read: tuple[int, ...]
    rows_KD: Tensor
    steps: tuple[Step, ...]
    watched: tuple[Condition, ...]
    reader: FewReader
    places_K: Tensor | None
    """Where in `read` the edited features are; beyond its end for those that are not read. None: they are `read`."""

    def acts(self, h_ND: Float[Tensor, "n d"]) -> Float[Tensor, "n r"]:
        """Activations of every feature that the rules or the watched conditions look at, in the order of `read`."""
        return self.reader(h_ND)

    def named(self, acts_NR: Float[Tensor, "n r"]) -> dict[int, Tensor]:
        """The activations [N] by feature, as conditions want them."""
        return dict(zip(self.read, acts_NR.unbind(-1), strict=True))

    def change(self, h_ND: Float[Tensor, "n d"], acts_NR: Float[Tensor, "n r"]) -> Float[Tensor, "n d"]:
        """What the rules add to the residuals, float32."""
        before_NK = acts_NR if self.places_K is None else F.pad(acts_NR, (0, 1))[:, self.places_K]
        moved_NK, vector = self._moved(before_NK, acts_NR)
        added_ND = moved_NK @ self.rows_KD
        if self.sae.input_norm != "none":
            added_ND = added_ND * self.sae.residual_unit(h_ND)
        return added_ND if vector is None else added_ND + vector

    def _moved(self, before_NK: Tensor, acts_NR: Tensor) -> tuple[Tensor, Tensor | None]:
        """f' - f of the edited features, and the vectors' sum."""
        if len(self.steps) == 1 and self.steps[0].condition is None:
            step = self.steps[0]
            return torch.addcmul(step.add_K, before_NK, step.less_K), step.vector_D
        after_NK, vector, named = before_NK, None, self.named(acts_NR)
        for step in self.steps:
            holds_N1 = None if step.condition is None else step.condition.holds(named)[:, None]
            moved_NK = after_NK * step.factor_K + step.add_K
            after_NK = moved_NK if holds_N1 is None else torch.where(holds_N1, moved_NK, after_NK)
            if step.vector_D is not None:
                more = step.vector_D if holds_N1 is None else step.vector_D * holds_N1
                vector = more if vector is None else vector + more
        return after_NK - before_NK, vector

    @property
    def constant_D(self) -> Tensor | None:
        """What is added to every residual alike, if nothing depends on it."""
        if self.read or self.sae.input_norm != "none":
            return None
        zero_1D = torch.zeros(1, self.sae.d_model, device=self.sae.device)
        return self.change(zero_1D, zero_1D[:, :0])[0]


def compile_rules(
    sae: SAE, rules: Sequence[Rule], watched: Sequence[Condition] = (), control: Control | None = None, seed: int = 0
) -> Program:
    """The rules as a program.

    Args:
        watched: conditions that are only looked at.
        control: "random" writes each change along another, random feature's decoder row of the same norm (distinct
            rows, none of an edited feature); "wrong_sign" writes it backwards.
        seed: of the random rows.
    """
    edited = tuple(sorted({feature for rule in rules for feature in rule.features()}))
    depends = {e.feature for rule in rules for e in rule.edits if e.factor != 1.0}
    read = tuple(sorted(depends | features_of([rule.condition for rule in rules]) | features_of(watched)))
    rows_KD = sae.decoder_rows(edited)
    steps = _merged([_step(sae, rule, edited) for rule in rules])
    if control == "random":
        rows_KD = random_rows(sae, edited, seed)
        steps = tuple(_redirected(step, sae, edited, seed) for step in steps)
    elif control == "wrong_sign":
        rows_KD = -rows_KD
        steps = tuple(replace(s, vector_D=None if s.vector_D is None else -s.vector_D) for s in steps)
    place = {feature: column for column, feature in enumerate(read)}
    places = [place.get(feature, len(read)) for feature in edited]
    places_K = None if edited == read else torch.tensor(places, dtype=torch.long, device=sae.device)
    return Program(sae, edited, read, rows_KD, steps, tuple(watched), sae.reader(read), places_K)


def random_rows(sae: SAE, edited: Sequence[int], seed: int) -> Float[Tensor, "k d"]:
    """Decoder rows of random other features, scaled to the norms of the edited ones' rows.

    Raises:
        InputError: if the SAE has too few other features with a decoder row.
    """
    return _other_rows(sae, edited, len(edited), seed) * sae.decoder_rows(edited).norm(dim=-1, keepdim=True)


def _other_rows(sae: SAE, edited: Sequence[int], count: int, seed: int) -> Float[Tensor, "k d"]:
    """Decoder rows of `count` random features, none of them edited, at length 1."""
    norm_F = sae.W_dec_FD.norm(dim=-1).cpu()
    others = [feature for feature in range(sae.d_sae) if norm_F[feature] > 0 and feature not in set(edited)]
    if len(others) < count:
        raise InputError(f"control: {count} random rows are needed, the SAE has only {len(others)} other features")
    order = torch.randperm(len(others), generator=torch.Generator().manual_seed(seed))
    drawn_KD = sae.decoder_rows([others[place] for place in order[:count].tolist()])
    return drawn_KD / drawn_KD.norm(dim=-1, keepdim=True)


def _redirected(step: Step, sae: SAE, edited: Sequence[int], seed: int) -> Step:
    """The step with its vector turned to a random decoder row, its length kept."""
    if step.vector_D is None:
        return step
    return replace(step, vector_D=_other_rows(sae, edited, 1, seed)[0] * step.vector_D.norm())


def _step(sae: SAE, rule: Rule, edited: Sequence[int]) -> Step:
    factor, add = dict.fromkeys(edited, 1.0), dict.fromkeys(edited, 0.0)
    for edit in rule.edits:
        factor[edit.feature], add[edit.feature] = edit.factor, edit.add
    vector_D = None if rule.vector_D is None else rule.vector_D.to(sae.device, torch.float32)
    factor_K, add_K = (torch.tensor(list(side.values()), device=sae.device) for side in (factor, add))
    return Step(rule.condition, factor_K, add_K, vector_D)


def _merged(steps: Sequence[Step]) -> tuple[Step, ...]:
    """The same rules with those that hold everywhere and follow each other put into one."""
    found: list[Step] = []
    for step in steps:
        if not found or step.condition is not None or found[-1].condition is not None:
            found.append(step)
            continue
        last = found.pop()
        vectors = [one.vector_D for one in (last, step) if one.vector_D is not None]
        add_K = last.add_K * step.factor_K + step.add_K
        found.append(
            Step(None, last.factor_K * step.factor_K, add_K, sum(vectors[1:], vectors[0]) if vectors else None)
        )
    return tuple(found)
