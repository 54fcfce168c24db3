"""A feature pack: the SAE features a reward reads, with their weights, and the hash of what a gate has validated.

A pack is one strict JSON file: unknown keys, duplicate feature ids, ids outside the SAE and numbers that are not finite
are errors. `spec_hash` covers everything that changes the reward's value (SAE weights, layer, ids, weights, scales,
thresholds, pooling) and nothing else, so that a renamed pack keeps its gate and a changed weight loses it.

`validation` is what our Gate 1 said. What a pack's authors say of it without that stands in `reported`, and counts as
no gate. Packs of the first mechreward are read too, by `features.first_packs`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch
from jaxtyping import Float
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor

from mechreward.catalogs import read_bundled
from mechreward.errors import InputError
from mechreward.features.aggregation import build_aggregation, pooling_spec
from mechreward.features.first_packs import from_first, is_first
from mechreward.files import sha256_bytes, write_json
from mechreward.sae.precision import plain_float32

if TYPE_CHECKING:
    from mechreward.sae import SAE

PLACEHOLDER = "{question}"
REPORTED: Literal["reported by its authors, not reproduced"] = "reported by its authors, not reproduced"
Pooling = str
"""The spec of an aggregation, parameters included: `mean`, `max`, `last`, `last_16`, `weighted_mean`, `step_end:` and
the text that ends a step."""
Unit = Annotated[float, Field(ge=0, le=1)]
Scalar = str | int | float | bool | None
Metadata = dict[str, Scalar | list[str]]
"""What a pack's makers want to keep beside it; it decides no reward."""


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, use_attribute_docstrings=True
    )


class PackFeature(_Strict):
    """One feature: its reward on a token is `weight * activation / scale`, 0 if the activation is below a threshold."""

    id: Annotated[int, Field(ge=0)]
    weight: float
    scale: Annotated[float, Field(gt=0)]
    """In the SAE's own units."""
    activation_threshold: Annotated[float, Field(ge=0)] = 0.0
    """Activations below it count as 0; in the SAE's own units."""
    name: str = ""
    description: str = ""
    effect: float | None = None
    """Cohen's d, right minus wrong, on the questions it was found on: within a question if this library found it. None
    where another method found it; what that one ranks by is in `metadata`, under the method's name."""
    q_value: Unit | None = None
    stability: Unit | None = None
    metadata: Metadata = {}


class SAERef(_Strict):
    """Which SAE the ids belong to, and the decoder block whose output it reads."""

    release: str
    sae_id: str
    layer: Annotated[int, Field(ge=0)]
    d_model: Annotated[int, Field(gt=0)]
    d_sae: Annotated[int, Field(gt=0)]
    weights_hash: str | None
    """`SAE.weights_hash`; None if the pack's makers did not record it, and then release and id have to be the same."""


class PackPrompt(_Strict):
    """How the questions were put to the model whose responses the features were found on."""

    format: Annotated[str, Field(pattern=r"\{question\}")] = PLACEHOLDER
    """The prompt, with `{question}` where the question goes."""
    chat: bool = False
    """Whether it went through the tokenizer's chat template as one message of the user."""
    template_hash: str | None = None
    """SHA-256 of that template."""


class PackValidation(_Strict):
    """What Gate 1 said about the reward with this `spec_hash`; the numbers are None where no question was mixed."""

    spec_hash: str
    verdict: Literal["pass", "fail", "inconclusive"]
    within_auroc: Unit | None
    interval: tuple[Unit, Unit] | None
    n_questions: Annotated[int, Field(ge=0)]


class PackRephrasing(_Strict):
    """What `gates.judge_signal` said about the reward with this `spec_hash` on questions put in other words."""

    spec_hash: str
    verdict: Literal["survives", "brittle", "inconclusive", "no signal"]
    kept: float | None
    """Share of the lead over chance that is left; None where there was none to lose."""
    interval: tuple[float, float] | None
    kinds: list[str]
    """How the questions were varied."""
    n_families: Annotated[int, Field(ge=0)]
    """Questions, each with its variations."""


class ReportedFigures(_Strict):
    """What a pack's authors say it scored. Nobody here has reproduced it, so it stands for no gate."""

    status: Literal["reported by its authors, not reproduced"] = REPORTED
    source: str
    """Where they say it."""
    n_questions: Annotated[int, Field(ge=0)] | None = None
    n_correct: Annotated[int, Field(ge=0)] | None = None
    discovery_n: Annotated[int, Field(ge=0)] | None = None
    spearman_rho: Annotated[float, Field(ge=-1, le=1)] | None = None
    spearman_p: Unit | None = None
    pearson_r: Annotated[float, Field(ge=-1, le=1)] | None = None
    pearson_p: Unit | None = None
    pass_threshold: float | None = None
    claims: Metadata = {}
    """The rest, their own verdict included, in their words."""
    reading: list[str] = []
    """What we make of the figures, a sentence each; `gates.read_reported` writes them."""

    @model_validator(mode="after")
    def _counts_fit(self) -> ReportedFigures:
        if self.n_correct is not None and (self.n_questions is None or self.n_correct > self.n_questions):
            raise ValueError(f"n_correct {self.n_correct} must not be more than n_questions = {self.n_questions}")
        return self


class FeaturePack(_Strict):
    """Features of one SAE, weighted; `validation` is None until our Gate 1 has scored it."""

    name: Annotated[str, Field(min_length=1)]
    version: str = "1"
    description: str = ""
    model_name: str
    sae: SAERef
    features: Annotated[list[PackFeature], Field(min_length=1)]
    pooling: Annotated[Pooling, AfterValidator(lambda name: pooling_spec(build_aggregation(name)))] = "mean"
    readout: Literal["encode"] = "encode"
    """How an activation is read: as the SAE's own encoder gives it, TopK included, and in no other way."""
    prompt: PackPrompt | None = None
    provenance: Metadata = {}
    """Which questions, which command, which seed: what somebody needs to make the pack again. `prompts` holds the
    questions' hashes (`rollout.prompt_hashes`)."""
    validation: PackValidation | None = None
    rephrasing: PackRephrasing | None = None
    reported: ReportedFigures | None = None
    metadata: Metadata = {}

    @model_validator(mode="after")
    def _ids_fit(self) -> FeaturePack:
        ids = self.feature_ids()
        twice = sorted(i for i, count in Counter(ids).items() if count > 1)
        if twice:
            raise ValueError(f"feature ids must differ, {twice[0]} comes more than once")
        if max(ids) >= self.sae.d_sae:
            raise ValueError(f"feature id {max(ids)} must be less than sae.d_sae = {self.sae.d_sae}")
        return self

    def feature_ids(self) -> list[int]:
        """Ids in the pack's order."""
        return [feature.id for feature in self.features]

    def with_features(self, name: str, features: list[PackFeature]) -> FeaturePack:
        """A pack with other features, of which nothing has been measured yet."""
        nothing = {"validation": None, "rephrasing": None, "reported": None}
        return self.model_copy(update={"name": name, "features": features, **nothing})

    @property
    def spec_hash(self) -> str:
        """SHA-256 of what decides the reward's value; see `spec_hash`."""
        return spec_hash(
            self.sae.weights_hash,
            self.sae.layer,
            self.feature_ids(),
            [feature.weight for feature in self.features],
            [feature.scale for feature in self.features],
            self.pooling,
            [feature.activation_threshold for feature in self.features],
        )

    @property
    def found_on(self) -> list[str]:
        """`prompt_hashes` of the questions its features were found on; empty if its makers did not record them."""
        found = self.provenance.get("prompts")
        return found if isinstance(found, list) else []

    @property
    def gate_passed(self) -> bool:
        """Whether our Gate 1 passed exactly this reward."""
        found = self.validation
        return found is not None and found.verdict == "pass" and found.spec_hash == self.spec_hash

    @property
    def rephrased(self) -> str | None:
        """Whether exactly this reward's signal survives another wording; None if that was not measured."""
        found = self.rephrasing
        return found.verdict if found is not None and found.spec_hash == self.spec_hash else None

    @property
    def status(self) -> str:
        """What is known of the pack, in a few words: our verdict, else its authors' claim, else that there is none; and
        whether it survives another wording, where that was measured."""
        if self.validation is not None:
            of_another = "" if self.validation.spec_hash == self.spec_hash else " of another reward (spec_hash differs)"
            gate = f"gate 1: {self.validation.verdict}{of_another}"
        else:
            gate = "gate 1: not run" if self.reported is None else self.reported.status
        return gate if self.rephrased is None else f"{gate}; in other words: {self.rephrased}"


def spec_hash(
    weights_hash: str | None,
    layer: int,
    ids: Sequence[int],
    weights: Sequence[float],
    scales: Sequence[float],
    pooling: str,
    thresholds: Sequence[float] = (),
) -> str:
    """SHA-256 (hex) of a reward's definition; the order of the features does not matter, every bit of a number does."""
    features = sorted(zip(map(int, ids), map(float, weights), map(float, scales), strict=True))
    body: dict[str, Any] = {"sae": weights_hash, "layer": int(layer), "features": features, "pooling": pooling}
    if any(thresholds):  # packs without thresholds keep the hash that they had before there were any
        body["thresholds"] = sorted(zip(map(int, ids), map(float, thresholds), strict=True))
    return sha256_bytes(json.dumps(body, sort_keys=True, allow_nan=False).encode())


def weighted_sum(pack: FeaturePack, acts_NK: Float[Tensor, "n k"]) -> Float[Tensor, " n"]:
    """The pack's reward on tokens whose activations of `feature_ids()` these are: the one place where it is defined.

    Computed in float32 also under `torch.autocast`, where a trainer's scoring pass is tapped.
    """
    features = pack.features
    at_least_K = torch.tensor([feature.activation_threshold for feature in features], device=acts_NK.device)
    weight_K = torch.tensor([feature.weight / feature.scale for feature in features], device=acts_NK.device)
    with plain_float32(acts_NK.device):
        return acts_NK.where(acts_NK >= at_least_K, 0.0) @ weight_K


def save_pack(pack: FeaturePack, path: str | Path) -> None:
    """Writes the pack as JSON, atomically."""
    write_json(path, pack.model_dump(mode="json"))


def load_pack(path_or_name: str | Path, sae: SAE | None = None) -> FeaturePack:
    """Reads a pack from a file, or from the packs that come with the library by "model/pack".

    Args:
        path_or_name: a file of ours or of the first mechreward, or a bundled pack's name.
        sae: its SAE; wanted where a file of the first mechreward does not say the SAE's layer and size.

    Raises:
        InputError: if there is neither such a file nor such a pack, or the first thing in it that is not allowed.
    """
    path = Path(path_or_name).expanduser()
    text = path.read_bytes() if path.is_file() else read_bundled(str(path_or_name))
    try:
        record = json.loads(text)
    except ValueError as error:  # of JSON, or of UTF-8
        raise InputError(f"pack: invalid JSON in {path_or_name} ({error})") from error
    if isinstance(record, dict) and is_first(record):
        text = json.dumps(from_first(record, sae, str(path_or_name))).encode()
    return _parse(text, str(path_or_name))


def check_pack(pack: FeaturePack, sae: SAE) -> None:
    """Checks that the pack was made for this SAE at this layer.

    The weights' hash tells; a pack that records none goes by the SAE's release and id.

    Raises:
        InputError: naming the first field that differs and both values.
    """
    wanted_by = pack.sae.model_dump()
    found: dict[str, Any] = {"d_model": sae.d_model, "d_sae": sae.d_sae, "layer": sae.meta.layer}
    if pack.sae.weights_hash is not None:
        found["weights_hash"] = sae.weights_hash
    else:
        found |= {"release": sae.meta.release, "sae_id": sae.meta.sae_id}
    for field, value in found.items():
        wanted = wanted_by[field]
        if value != wanted:
            raise InputError(f"sae: pack {pack.name} was made for an SAE with {field} {wanted}, this one has {value}")


def _parse(text: bytes, source: str) -> FeaturePack:
    try:
        return FeaturePack.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "pack"
        message = first["msg"].removeprefix("Value error, ")
        got = f", got {first['input']!r}" if isinstance(first["input"], str | int | float) and first["loc"] else ""
        raise InputError(f"{where}: {message[0].lower()}{message[1:]}{got} (in {source})") from error
