"""What a reward server and its clients say to each other: `POST /v1/score`, JSON both ways, and `GET /v1/spec`.

Token ids travel, not text: the reward of a token is read where the trainer's own tokens are. A row may come as text
instead (`prompt`, a string or a chat, and `completion`); the server then tokenises it, which for text that was decoded
from ids need not give the same ids back.

Only pydantic is imported: a trainer's process should not load what the server needs.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt, model_validator

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCORE, SPEC, HEALTH, METRICS = "/v1/score", "/v1/spec", "/health", "/metrics"
TOKEN_VARIABLE = "MECHREWARD_TOKEN"
"""Environment variable of the secret that server and clients share."""


class Body(BaseModel):
    """A strict, frozen record: unknown fields are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Row(Body):
    """One completion to score: its ids, or its text."""

    prompt_ids: list[NonNegativeInt] | None = None
    """The prompt's token ids as the policy read them, BOS included, pads left out."""
    completion_ids: list[NonNegativeInt] | None = None
    """The sampled token ids, EOS included, pads left out."""
    prompt: str | list[dict[str, Any]] | None = None
    """The prompt as text or chat; beside ids, what a verifier is shown."""
    completion: str | None = None
    """The completion as text; beside ids it is left to the server to decode them."""
    answer: str | int | float | None = None
    """The gold answer, where the server verifies answers."""

    @model_validator(mode="after")
    def _ids_or_text(self) -> Row:
        ids = (self.prompt_ids is None, self.completion_ids is None)
        if ids[0] != ids[1]:
            raise ValueError("prompt_ids and completion_ids: one is missing; ids come for both or for neither")
        if ids[0] and (self.prompt is None or self.completion is None):
            raise ValueError("prompt_ids: give the ids of prompt and completion, or the text of both")
        if not ids[0] and self.completion is not None:
            raise ValueError("completion: is not read beside completion_ids; leave it out")
        return self


class ScoreRequest(Body):
    """Rows to score, and what they are meant for: where the server serves something else it refuses."""

    rows: list[Row] = Field(min_length=1)
    spec_hash: str | None = None
    """The reward that is meant (`FeaturePack.spec_hash`)."""
    tokenizer_hash: str | None = None
    """Of the tokenizer that made the ids (`tokenizer_hash`)."""


class Score(Body):
    """What one completion is worth. None where it cannot be read or judged, never 0 for it."""

    score: float | None
    """What a trainer is paid: outcome and features, combined as the server was told."""
    outcome: float | None
    """1 for right, 0 for wrong; None without a verifier, and for an answer that cannot be judged."""
    features: float | None
    """The feature reward, pooled over the completion as its pack says."""
    token_rewards: list[float | None]
    """The feature reward of each completion token, before any weight; None for a token of massive norm."""


class ScoreReply(Body):
    """The scores in the rows' order."""

    scores: list[Score]
    spec_hash: str


class Spec(Body):
    """What a server scores with."""

    name: str
    model: str
    layer: int
    feature_ids: list[int]
    aggregation: str
    spec_hash: str
    tokenizer_hash: str
    gate_passed: bool
    verifier: str | None
    mode: str
    weight: float
    max_rows: int
    """Most rows a request may have."""


class Refusal(Body):
    """Why a request was not answered, in one sentence."""

    error: str


def tokenizer_hash(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of which token each id stands for, added tokens included: SHA-256, 64 hex digits."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: (item[1], item[0]))
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()
