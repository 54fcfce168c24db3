"""Does an SAE fit the residuals it is given, and if not, which mistake is likely?

An SAE that is read at the wrong layer, on another model, in other units or through a transposed matrix still gives
numbers. What shows it is the fraction of variance unexplained (FVU) on a few hundred real tokens. The diagnosis is
comparative: the same SAE is read in other ways (the residuals of other blocks, other input scales and normalisations,
the other use of b_dec, matrices turned round), and a mistake is named if undoing it makes the SAE fit far better.

The rules (bars below): at an FVU of at most HEALTHY nothing is looked for. Above it, the reading with the lowest
FVU is named, of those with at most BROKEN and at most the share BETTER of the plain FVU (for another block: BLOCK, as
the FVU is lowest at the trained block and rises at once to both sides). If there is none and the plain FVU is above
BROKEN, what is left is named: nothing fires, unrelated matrices, other text than the SAE was trained on (its block is
still the best), another model. Between the two bars an SAE that no other reading improves is taken for a coarse one.
So two mistakes at once, or a wrong layer where no other block's residuals are given, can go unnoticed or be misnamed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from mechreward.errors import InputError
from mechreward.models import norm_outliers
from mechreward.sae.kinds import InputNorm
from mechreward.sae.sae import SAE

HEALTHY, BROKEN, BETTER, BLOCK = 0.05, 0.5, 0.5, 0.8
SCALES = [2.0**power for power in range(-10, 11) if power]
"""Input scales tried; the best is refined to within a fifth."""
TRIAL_TOKENS = 256
"""Tokens that the other readings are tried on."""
UNRELATED = 0.05
"""Mean cosine of encoder columns and decoder rows below which the two are taken for strangers. Trained SAEs have .2 to
.9, since the decoder starts as the encoder's transpose; chance is about 0."""
LITTLE = 0.01
"""Share of the mean residual's norm below which b_dec counts as missing."""
SILENT = 0.5
"""Active features a token below which the SAE counts as silent."""
CHANCES, MOSTLY_DEAD = 20, 0.9
"""Dead features are reported if so large a share never fired though each had so many chances on average."""
MISSING_NORM = "a missing normalisation"


@dataclass(frozen=True)
class SAECheck:
    """How an SAE reads some residuals. Tokens of massive norm (10 times the median) are left out."""

    layer: int
    """Block that the SAE says it reads."""
    n_tokens: int
    """Tokens the numbers rest on."""
    l0: float
    """Mean number of active features a token."""
    fvu: float
    """Squared error of the reconstruction over squared distance of the residuals from their mean."""
    dead_share: float
    """Share of features that fire on none of these tokens. Of few tokens it is large also in a good SAE."""
    norm_ratio: float
    """Root mean square distance from the mean residual: that of the reconstructions over that of the residuals. About
    1 where the SAE fits; far above 1 is a sign of wrong units, near 0 of an SAE that is silent."""
    encoder_decoder_cosine: float
    """Mean over features of the cosine between encoder column and decoder row."""
    fvu_by_layer: dict[int, float]
    """FVU of the same SAE on each block's residuals that were given."""
    findings: tuple[str, ...]
    """One sentence a likely mistake; none if all is well."""

    def to_dict(self) -> dict[str, Any]:
        """Everything as JSON."""
        return asdict(self) | {"fvu_by_layer": {str(layer): fvu for layer, fvu in self.fvu_by_layer.items()}}


def check_sae(sae: SAE, h: Tensor | Mapping[int, Tensor]) -> SAECheck:
    """Measures an SAE on residuals of the model it is to read, and says which mistake is likely if it does not fit.

    Args:
        h: residuals [..., D] after the SAE's block, of a few hundred tokens or more; or such residuals by block, which
            tells a wrong layer from a wrong model.

    Raises:
        InputError: if the SAE's own block is not among those given, or residuals have another width, hold NaN or
            infinity, or do not differ from each other.
    """
    own = sae.meta.layer
    given = h if isinstance(h, Mapping) else {own: h}
    if own not in given:
        blocks = ", ".join(map(str, given)) or "none"
        raise InputError(f"h: the SAE reads block {own}, whose residuals are not among those given ({blocks})")
    states = {layer: _usable(sae, states) for layer, states in sorted(given.items())}
    by_layer = {layer: sae.fvu(states_ND) for layer, states_ND in states.items()}
    l0, dead_share, norm_ratio = _activity(sae, states[own])
    check = SAECheck(
        layer=own,
        n_tokens=len(states[own]),
        l0=l0,
        fvu=by_layer[own],
        dead_share=dead_share,
        norm_ratio=norm_ratio,
        encoder_decoder_cosine=torch.cosine_similarity(sae.W_enc_DF.T, sae.W_dec_FD, dim=1).mean().item(),
        fvu_by_layer=by_layer,
        findings=(),
    )
    findings = [*_misfit(sae, check, states[own]), *_dead_features(sae, check)]
    return replace(check, findings=tuple(findings))


def _usable(sae: SAE, h: Tensor) -> Float[Tensor, "n d"]:
    if h.shape[-1] != sae.d_model:
        raise InputError(f"sae: the SAE reads width {sae.d_model} but the residuals have width {h.shape[-1]}")
    rows_ND = h.detach().to(sae.device, torch.float32).reshape(-1, sae.d_model)
    if not rows_ND.isfinite().all():
        raise InputError("h: residuals hold NaN or infinity; all must be finite")
    return rows_ND[norm_outliers(rows_ND[None], torch.ones_like(rows_ND[None, :, 0], dtype=torch.bool))[0]]


def _activity(sae: SAE, h_ND: Float[Tensor, "n d"]) -> tuple[float, float, float]:
    """L0, dead share and norm ratio."""
    mean_D = h_ND.mean(0)
    fired_F = torch.zeros(sae.d_sae, dtype=torch.long, device=sae.device)
    size = 0.0
    for block_ND in h_ND.split(TRIAL_TOKENS):
        acts_NF = sae.encode(block_ND)
        fired_F += (acts_NF > 0).sum(0)
        size += _square_sum(sae.decode(acts_NF, block_ND) - mean_D)
    ratio = (size / _square_sum(h_ND - mean_D)) ** 0.5
    return fired_F.sum().item() / len(h_ND), (fired_F == 0).float().mean().item(), ratio


def _misfit(sae: SAE, check: SAECheck, h_ND: Float[Tensor, "n d"]) -> list[str]:
    """The one sentence that explains a bad FVU best; none if it is not bad."""
    if check.fvu <= HEALTHY:
        return []
    trial_ND = h_ND[:: -(-len(h_ND) // TRIAL_TOKENS)]
    # The trials rest on fewer tokens: what counts is how they compare with the plain reading of the same ones.
    correction = check.fvu / sae.fvu(trial_ND)
    trials = [replace(other, fvu=other.fvu * correction) for other in _other_readings(sae, trial_ND)]
    named = [other for other in trials if other.fvu <= min(BROKEN, BETTER * check.fvu)]
    named += [other for other in _other_blocks(check) if other.fvu <= min(BROKEN, BLOCK * check.fvu)]
    if named:
        best = min(named, key=lambda other: other.fvu)
        fits = f"the SAE fits better (FVU {best.fvu:.3g} against {check.fvu:.3g})"
        return [f"likely {best.mistake}: {fits} {best.remedy}"]
    return [_what_is_left(sae, check, trial_ND)] if check.fvu > BROKEN else []


@dataclass(frozen=True)
class _Reading:
    """Another way to read the SAE: what its FVU is, what mistake it undoes, and how."""

    fvu: float
    mistake: str
    remedy: str


def _other_blocks(check: SAECheck) -> Iterator[_Reading]:
    for layer, fvu in check.fvu_by_layer.items():
        if layer != check.layer:
            remedy = f"on block {layer} than on block {check.layer}, which it says it reads"
            yield _Reading(fvu, "a wrong layer", remedy)


def _other_readings(sae: SAE, h_ND: Float[Tensor, "n d"]) -> Iterator[_Reading]:
    yield _scaled(sae, h_ND)
    for norm in get_args(InputNorm):
        if norm != sae.input_norm:
            mistake = MISSING_NORM if sae.input_norm == "none" else "a wrong normalisation"
            fvu = replace(sae, input_norm=norm).fvu(h_ND)
            yield _Reading(fvu, mistake, f"with input_norm {norm!r} than with {sae.input_norm!r}")
    yield from _bias_readings(sae, h_ND)
    yield from _matrix_readings(sae, h_ND)


def _scaled(sae: SAE, h_ND: Float[Tensor, "n d"]) -> _Reading:
    """With the factor on the residuals under which the SAE fits them best."""
    fvu = {scale: sae.fvu(h_ND * scale) for scale in SCALES}
    for step in (2**0.5, 2**0.25):
        best = min(fvu, key=fvu.__getitem__)
        fvu |= {scale: sae.fvu(h_ND * scale) for scale in (best / step, best * step)}
    best = min(fvu, key=fvu.__getitem__)
    norm = best * h_ND.norm(dim=-1).mean().item()
    usual = 0.8 < norm / h_ND.shape[1] ** 0.5 < 1.25
    source = ", as sae-lens' expected_average_only_in makes it" if usual else ""
    return _Reading(fvu[best], MISSING_NORM, f"with residuals times {best:.2g}, of mean norm {norm:.3g}{source}")


def _bias_readings(sae: SAE, h_ND: Float[Tensor, "n d"]) -> Iterator[_Reading]:
    flipped = replace(sae, apply_b_dec_to_input=not sae.apply_b_dec_to_input)
    use = "subtracted from the input" if flipped.apply_b_dec_to_input else "not subtracted from the input"
    yield _Reading(flipped.fvu(h_ND), "a wrong use of b_dec", f"with b_dec {use}: see apply_b_dec_to_input")
    if sae.input_norm == "none" and sae.b_dec_D.norm() < LITTLE * h_ND.mean(0).norm():
        fvu = _fvu_with_fitted_bias(sae, h_ND)
        yield _Reading(fvu, "a missing b_dec", "with a b_dec fitted to these residuals than with its own, about zero")


def _fvu_with_fitted_bias(sae: SAE, h_ND: Float[Tensor, "n d"]) -> float:
    """Starts b_dec at the mean residual, as training does, and moves it by the mean error until that is gone."""
    bias_D = h_ND.mean(0)
    for _ in range(5):
        sae = replace(sae, b_dec_D=bias_D)
        bias_D = bias_D + (h_ND - sae.decode(sae.encode(h_ND))).mean(0)
    return sae.fvu(h_ND)


def _matrix_readings(sae: SAE, h_ND: Float[Tensor, "n d"]) -> Iterator[_Reading]:
    """The same numbers in the same order, laid out as the transpose: undoes a reshape where a transpose was needed."""
    W_enc_DF = sae.W_enc_DF.reshape(sae.d_sae, sae.d_model).T
    W_dec_FD = sae.W_dec_FD.reshape(sae.d_model, sae.d_sae).T
    turned: dict[str, dict[str, Tensor]] = {
        "W_enc": {"W_enc_DF": W_enc_DF},
        "W_dec": {"W_dec_FD": W_dec_FD},
        "W_enc and W_dec": {"W_enc_DF": W_enc_DF, "W_dec_FD": W_dec_FD},
    }
    for names, changes in turned.items():
        # Each is made here, not before: a turned matrix is a copy.
        fvu = replace(sae, **changes).fvu(h_ND)  # type: ignore[arg-type]
        yield _Reading(fvu, "a transposed matrix", f"with {names} taken for stored the other way round")


def _what_is_left(sae: SAE, check: SAECheck, h_ND: Float[Tensor, "n d"]) -> str:
    """A bad FVU that no other reading mends."""
    bad = f"the SAE fits badly (FVU {check.fvu:.3g}) however it is read"
    if check.l0 < SILENT and _l0(sae, h_ND * SCALES[-1]) < SILENT:
        return (
            f"likely a dead SAE: {check.l0:.2g} features fire a token, and no more at {SCALES[-1]:.0f} times the scale"
        )
    if abs(check.encoder_decoder_cosine) < UNRELATED:
        return (
            f"likely a transposed matrix: {bad}, and encoder and decoder are unrelated (mean cosine "
            f"{check.encoder_decoder_cosine:.2g}), as if one were reshaped, reordered or another SAE's"
        )
    return _by_profile(sae, check, bad)


def _by_profile(sae: SAE, check: SAECheck, bad: str) -> str:
    made_for = f"; it says it was made for {sae.meta.model_name!r}" if sae.meta.model_name else ""
    if len(check.fvu_by_layer) == 1:
        at = f"at block {check.layer}, the only one whose residuals are given"
        return f"likely a wrong layer or a wrong base model: {bad}, {at}{made_for}"
    best = min(check.fvu_by_layer, key=check.fvu_by_layer.__getitem__)
    fvu = check.fvu_by_layer[best]
    if best == check.layer and fvu < 1:
        return f"likely other text than it was trained on: {bad}, though better at block {best} than at any other"
    at = f"at every block given (block {best} is the best with FVU {fvu:.3g})"
    return f"likely a wrong base model: {bad}, {at}{made_for}"


def _dead_features(sae: SAE, check: SAECheck) -> list[str]:
    chances = check.n_tokens * check.l0 / sae.d_sae
    if check.dead_share < MOSTLY_DEAD or chances < CHANCES:
        return []
    share = f"{check.dead_share:.1%} of the features never fire on {check.n_tokens} tokens"
    return [f"likely a dead SAE: {share}, though each had {chances:.0f} chances on average"]


def _l0(sae: SAE, h_ND: Float[Tensor, "n d"]) -> float:
    return (sae.encode(h_ND) > 0).sum().item() / len(h_ND)


def _square_sum(x: Tensor) -> float:
    return x.double().pow(2).sum().item()
