"""A linear probe: log-odds w . h + b of each token's state, pooled over an answer or a step, as a probability.

Poolings of the token log-odds z_t over the tokens that count:

- `max`: the token that speaks most for the class;
- `min`: the token that speaks most against it, i.e. max pooling of the other class. A policy that wants to look right
  has to look right at every token;
- `attention`: sum_t softmax_t(q . h_t) z_t with a learnt query q;
- `mean`: the fragile one. Filler dilutes it: policies trained against a mean-pooled probe evade it at .59 to .82,
  against a max-pooled one at about .05 (RL-Obfuscation, 2506.14261).

A pooled log-odds is more extreme than a token's, so `slope` and `intercept` (Platt 1999) bring it to the scale on which
a probability of .8 is right in 8 of 10 answers. A token's own probability is not calibrated.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from math import isfinite
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechreward.errors import InputError

Pooling = str
POOLINGS = ("max", "min", "attention", "mean")


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """A frozen probe of states of width D; the class it speaks for is "the answer is right" unless it says otherwise.

    Raises:
        InputError: if widths do not fit, a number is not finite, or there is no such pooling.
    """

    weight: Tensor = field(repr=False)
    """[D], float32."""
    bias: float
    d_model: int
    name: str = "probe"
    metadata: dict[str, Any] = field(default_factory=dict)
    """What its makers want to keep: JSON values. `questions`, `questions_seed` and `prompts` (the questions' hashes,
    `rollout.prompt_hashes`) say what it was trained on."""
    layer: int | None = None
    """Decoder block whose output it reads; None if that is not known."""
    pooling: Pooling = "max"
    query: Tensor | None = field(default=None, repr=False)
    """[D], of attention pooling alone."""
    slope: float = 1.0
    intercept: float = 0.0
    """Platt's two numbers for pooled log-odds."""

    def __post_init__(self) -> None:
        # Copies: a head that trains on would move the probe with it.
        object.__setattr__(self, "weight", self.weight.detach().to(torch.float32, copy=True).flatten())
        if self.query is not None:
            object.__setattr__(self, "query", self.query.detach().to(torch.float32, copy=True).flatten())
        self._check()

    @classmethod
    def from_sklearn(cls, estimator: Any, name: str = "probe", **options: Any) -> LinearProbe:
        """From a fitted two-class linear estimator of scikit-learn (`coef_` [1, D] and `intercept_`).

        Raises:
            InputError: if it tells more than two classes apart.
        """
        if len(estimator.coef_) != 1:
            raise InputError(f"estimator: has {len(estimator.coef_)} rows of coefficients; a probe needs two classes")
        weight_D = torch.from_numpy(estimator.coef_[0])
        return cls(weight_D, float(estimator.intercept_[0]), len(weight_D), name, **options)

    def to(self, device: str | torch.device) -> LinearProbe:
        """The same probe with its tensors on another device."""
        query = None if self.query is None else self.query.to(device)
        return replace(self, weight=self.weight.to(device), query=query)

    def logits(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """Log-odds of each state, float32.

        Raises:
            InputError: if the states have another width, or are NaN or infinite.
        """
        if h.shape[-1] != self.d_model:
            raise InputError(f"probe: {self.name} reads width {self.d_model}, but the states have {h.shape[-1]}")
        logits = h.float() @ self.weight.to(h.device) + self.bias
        if not logits.isfinite().all():
            raise InputError(f"states: some are NaN or infinite where {self.name} reads them; all must be finite")
        return logits

    def predict_proba(self, h: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch"]:
        """Probability of the class at each state by itself."""
        return self.logits(h).sigmoid()

    def predict(self, h: Float[Tensor, "*batch d"]) -> Bool[Tensor, "*batch"]:
        """Whether the class is the likelier one at each state."""
        return self.logits(h) >= 0

    def token_scores(
        self, h_BTD: Float[Tensor, "b t d"], mask_BT: Bool[Tensor, "b t"]
    ) -> tuple[Float[Tensor, "b t"], Float[Tensor, "b t"] | None]:
        """Log-odds of each token, and the scores attention goes by, if there is a query; masked states are not read."""
        states_BTD = h_BTD.float().masked_fill(~mask_BT[..., None], 0.0)
        attention_BT = None if self.query is None else states_BTD @ self.query.to(h_BTD.device)
        return self.logits(states_BTD), attention_BT

    def pooled_logits(self, h_BTD: Float[Tensor, "b t d"], mask_BT: Bool[Tensor, "b t"]) -> Float[Tensor, " b"]:
        """Log-odds of each row, pooled over its masked-in tokens, before calibration; NaN for a row without any."""
        z_BT, attention_BT = self.token_scores(h_BTD, mask_BT)
        return pool_logits(z_BT, mask_BT, self.pooling, attention_BT)

    def calibrated(self, pooled: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
        """Probability of the class from pooled log-odds."""
        return (self.slope * pooled + self.intercept).sigmoid()

    def row_proba(self, h_BTD: Float[Tensor, "b t d"], mask_BT: Bool[Tensor, "b t"]) -> Float[Tensor, " b"]:
        """Calibrated probability of the class for each row; NaN for a row without tokens."""
        return self.calibrated(self.pooled_logits(h_BTD, mask_BT))

    def _check(self) -> None:
        if len(self.weight) != self.d_model:
            raise InputError(f"weight: has {len(self.weight)} entries, but d_model is {self.d_model}")
        if self.pooling not in POOLINGS:
            raise InputError(f"pooling: {self.pooling!r} is not one of {', '.join(POOLINGS)}")
        if (self.query is None) == (self.pooling == "attention"):
            needs = "needs a query" if self.query is None else "takes no query"
            raise InputError(f"query: pooling {self.pooling!r} {needs}; attention alone has one")
        if self.query is not None and len(self.query) != self.d_model:
            raise InputError(f"query: has {len(self.query)} entries, but d_model is {self.d_model}")
        query = 0.0 if self.query is None else float(self.query.sum())
        numbers = [self.bias, self.slope, self.intercept, float(self.weight.sum()), query]
        if not all(map(isfinite, numbers)):
            raise InputError(f"probe: {self.name} holds NaN or infinity; all its numbers must be finite")


def pool_logits(
    z_BT: Float[Tensor, "b t"],
    mask_BT: Bool[Tensor, "b t"],
    pooling: Pooling,
    attention_BT: Float[Tensor, "b t"] | None = None,
) -> Float[Tensor, " b"]:
    """Token log-odds pooled a row, see the module; `attention_BT` are the scores q . h_t. NaN for an empty row."""
    if z_BT.shape[1] == 0:
        return z_BT.new_full((len(z_BT),), torch.nan)
    if pooling == "max":
        pooled_B = z_BT.masked_fill(~mask_BT, -torch.inf).amax(1)
    elif pooling == "min":
        pooled_B = z_BT.masked_fill(~mask_BT, torch.inf).amin(1)
    else:
        scores_BT = torch.zeros_like(z_BT) if attention_BT is None else attention_BT
        weight_BT = scores_BT.masked_fill(~mask_BT, -torch.inf).softmax(1)
        pooled_B = (weight_BT.nan_to_num() * z_BT).sum(1)
    return pooled_B.masked_fill(~mask_BT.any(1), torch.nan)
