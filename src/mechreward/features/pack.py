"""A feature pack: the SAE features a reward reads, with their weights, and the hash of what a gate has validated.

A pack is one strict JSON file: unknown keys, duplicate feature ids, ids outside the SAE and numbers that are not finite
are errors. `spec_hash` covers everything that changes the reward's value (SAE weights, layer, ids, weights, scales,
pooling) and nothing else, so that a renamed pack keeps its gate and a changed weight loses it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from importlib.resources import files as package_files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from mechreward.errors import InputError
from mechreward.features.aggregation import build_aggregation, pooling_spec
from mechreward.files import sha256_bytes, write_json

if TYPE_CHECKING:
    from mechreward.sae import SAE

Pooling = str
"""The spec of an aggregation, parameters included: `mean`, `max`, `last`, `last_16`, `weighted_mean`, `step_end:` and
the text that ends a step."""
Unit = Annotated[float, Field(ge=0, le=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class PackFeature(_Strict):
    """One feature: its reward on a token is `weight * activation / scale`."""

    id: Annotated[int, Field(ge=0)]
    weight: float
    scale: Annotated[float, Field(gt=0)]
    """In the SAE's own units."""
    name: str = ""
    effect: float | None = None
    """Cohen's d within a question, right minus wrong, on the questions it was found on."""
    q_value: Unit | None = None
    stability: Unit | None = None


class SAERef(_Strict):
    """Which SAE the ids belong to; `weights_hash` is `SAE.weights_hash`."""

    release: str
    sae_id: str
    layer: Annotated[int, Field(ge=0)]
    d_model: Annotated[int, Field(gt=0)]
    d_sae: Annotated[int, Field(gt=0)]
    weights_hash: str


class PackValidation(_Strict):
    """What Gate 1 said about the reward with this `spec_hash`; the numbers are None where no question was mixed."""

    spec_hash: str
    verdict: Literal["pass", "fail", "inconclusive"]
    within_auroc: Unit | None
    interval: tuple[Unit, Unit] | None
    n_questions: Annotated[int, Field(ge=0)]


class FeaturePack(_Strict):
    """Features of one SAE, weighted; `validation` is None until a gate has scored it."""

    name: Annotated[str, Field(min_length=1)]
    version: str = "1"
    description: str = ""
    model_name: str
    sae: SAERef
    features: Annotated[list[PackFeature], Field(min_length=1)]
    pooling: Annotated[Pooling, AfterValidator(lambda name: pooling_spec(build_aggregation(name)))] = "mean"
    provenance: dict[str, str | int | float | bool | None] = {}
    validation: PackValidation | None = None

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
        )


def spec_hash(
    weights_hash: str, layer: int, ids: Sequence[int], weights: Sequence[float], scales: Sequence[float], pooling: str
) -> str:
    """SHA-256 (hex) of a reward's definition; the order of the features does not matter, every bit of a number does."""
    features = sorted(zip(map(int, ids), map(float, weights), map(float, scales), strict=True))
    body = {"sae": weights_hash, "layer": int(layer), "features": features, "pooling": pooling}
    return sha256_bytes(json.dumps(body, sort_keys=True, allow_nan=False).encode())


def save_pack(pack: FeaturePack, path: str | Path) -> None:
    """Writes the pack as JSON, atomically."""
    write_json(path, pack.model_dump(mode="json"))


def load_pack(path_or_name: str | Path) -> FeaturePack:
    """Reads a pack from a file, or from the packs that come with the library by "model/pack".

    Raises:
        InputError: if there is neither such a file nor such a pack, or the first thing in it that is not allowed.
    """
    path = Path(path_or_name)
    if path.is_file():
        return _parse(path.read_bytes(), str(path))
    catalog = _catalog()
    if str(path_or_name) in catalog:
        return _parse(catalog[str(path_or_name)].read_bytes(), str(path_or_name))
    bundled = ", ".join(sorted(catalog)) or "none"
    raise InputError(f"pack: {path_or_name} is neither a file nor a bundled pack (bundled: {bundled})")


def catalog_names() -> list[str]:
    """Names of the bundled packs, "model/pack", sorted."""
    return sorted(_catalog())


def check_pack(pack: FeaturePack, sae: SAE) -> None:
    """Checks that the pack was made for this SAE at this layer.

    Raises:
        InputError: naming the first field that differs and both values.
    """
    wanted_by = pack.sae.model_dump()
    found = {"d_model": sae.d_model, "d_sae": sae.d_sae, "layer": sae.meta.layer, "weights_hash": sae.weights_hash}
    for field, value in found.items():
        wanted = wanted_by[field]
        if value != wanted:
            raise InputError(f"sae: pack {pack.name} was made for an SAE with {field} {wanted}, this one has {value}")


def _catalog() -> dict[str, Traversable]:
    root = package_files("mechreward").joinpath("catalogs")
    if not root.is_dir():
        return {}
    return {
        f"{folder.name}/{entry.name.removesuffix('.json')}": entry
        for folder in root.iterdir()
        if folder.is_dir()
        for entry in folder.iterdir()
        if entry.name.endswith(".json")
    }


def _parse(text: bytes, source: str) -> FeaturePack:
    try:
        return FeaturePack.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"])) or "pack"
        message = first["msg"].removeprefix("Value error, ")
        got = f", got {first['input']!r}" if isinstance(first["input"], str | int | float) and first["loc"] else ""
        raise InputError(f"{where}: {message[0].lower()}{message[1:]}{got} (in {source})") from error
