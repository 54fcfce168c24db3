"""`Variant`: a model with a list of edits, the local counterpart of the hosted SDK's object of that name.

    variant = mr.Variant(loaded, sae)
    variant.calibrate(responses)              # strengths then count in the features' own 99th percentiles
    variant.set(17, 1.0, mode="pin")
    variant.set_when((variant.feature(3) > 0.5) & (variant.feature(9) < 0.1), {17: 0.0}, mode="pin")
    variant.generate(["Ada has 12 apples ."], max_new_tokens=40)

The model is never changed: edits live in a hook that is there only while `steered()` is open (see `hook`, also for
which tokens are edited; an edit acts on the token whose features it reads). Without edits no hook is set, so everything
is the base model's, bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation.streamers import BaseStreamer

from mechreward.errors import InputError, named
from mechreward.models import LoadedModel, check_layer, d_model, eval_mode, unwrap
from mechreward.rollout import Response, check_streamer, continue_responses, eos_ids
from mechreward.sae import SAE
from mechreward.steering.conditions import Condition
from mechreward.steering.edits import check_known
from mechreward.steering.features import Feature, FeatureGroup, Named, check_k, feature_ids
from mechreward.steering.hook import Editor, Prefixes, closed_ids, unnested
from mechreward.steering.inspection import Fired, Inspection, inspect_ids
from mechreward.steering.labels import Labels, neighbours
from mechreward.steering.program import Control, compile_rules
from mechreward.steering.rulebook import Rulebook, Unit, Where
from mechreward.steering.scales import Scales, measure_scales
from mechreward.steering.watches import Handler, Watch, Watching

if TYPE_CHECKING:
    from mechreward.steering.auto import AutoSteer
    from mechreward.steering.examples import Contrast
    from mechreward.steering.sweep import Protocol

Text = str | Sequence[int] | Response
"""A text, a row of token ids, or a response with its prompt."""
WATCHED_ROWS = 15
"""Rows generated at a time while conditions are watched: `rollout` runs so few to their end in one go."""


class Variant(Rulebook):
    """A model with edits; see the module's docstring.

    Args:
        loaded: the model and its tokenizer; may carry a PEFT adapter.
        sae: reads the block that is edited.
        scales: what `calibrate` would measure.
        labels: a text by feature id, for `search`.
        where: "all" edits prompt and completion; "completion" starts at the last token of the prompt.

    Raises:
        InputError: if the SAE does not fit the model, or the scales belong to another SAE.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        sae: SAE,
        *,
        scales: Scales | None = None,
        labels: Mapping[int, str] | None = None,
        where: Where = "all",
    ) -> None:
        check_layer(loaded.model, sae.meta.layer)
        width = d_model(loaded.model)
        if sae.d_model != width:
            raise InputError(f"sae: it reads width {sae.d_model} but the model's residual stream has width {width}")
        super().__init__(sae, scales, where)
        check_known(set(labels or {}), sae.d_sae)
        self.loaded = loaded
        self.labels = Labels(dict(labels or {}))
        self.watches: list[Watch] = []
        self.control: Control | None = None
        self.control_seed = 0

    def calibrate(self, responses: Sequence[Response]) -> Scales:
        """Measures the unit of every feature (its 99th percentile where it fires) on the model's own responses."""
        self.scales = measure_scales(self.loaded, self.sae, responses)
        self.norm_limit = self.scales.norm_limit
        return self.scales

    def feature(self, feature: int) -> Feature:
        """A handle of a feature, with its label."""
        (known,) = feature_ids(feature, self.sae.d_sae)
        return Feature(known, self.labels.texts.get(known, ""))

    def group(self, features: Sequence[int]) -> FeatureGroup:
        """Handles of several features."""
        return FeatureGroup(tuple(self.feature(feature) for feature in features))

    # --- watching, and copies ---

    def abort_when(self, condition: Condition, unit: Unit = "p99") -> None:
        """`generate` and `chat` raise `GenerationAborted`, with the text so far, on the token where it holds."""
        self.watches.append(Watch(self._checked(condition, unit)))

    def handle_when(self, condition: Condition, handler: Handler, unit: Unit = "p99") -> None:
        """`generate` and `chat` call `handler` with a `Moment` on each token where it holds, before the next."""
        self.watches.append(Watch(self._checked(condition, unit), handler))

    def reset(self) -> None:
        """Takes all edits, conditions and controls away."""
        self.rules, self.watches, self.control = [], [], None

    def copy(self, control: Control | None = None, seed: int = 0) -> Variant:
        """A variant with the same rules; with `control`, one that writes them along other directions.

        Args:
            control: "random" writes each change along another, random feature's decoder row of the same norm;
                "wrong_sign" writes it backwards. What is read, and how large changes are, stays the same.
            seed: of the random rows.
        """
        labels = self.labels.texts
        twin = Variant(self.loaded, self.sae, scales=self.scales, labels=labels, where=self.where)
        twin.norm_limit = self.norm_limit
        twin.rules, twin.watches = list(self.rules), list(self.watches)
        twin.control, twin.control_seed = control, seed
        return twin

    # --- running ---

    @contextmanager
    def steered(self, after: Sequence[Sequence[int]] | None = None, watching: Watching | None = None) -> Iterator[None]:
        """Steers every forward of the model inside the `with`, whoever runs it.

        Args:
            after: token ids after which edits start, at their last token: the prompts, or prompts with the part of
                a chain that is to be kept. Every row has to begin with one. None edits whole rows.
            watching: see `watches`.
        """
        if not self.rules and watching is None:
            yield
            return
        watched = [watch.condition for watch in watching.watches] if watching is not None else []
        program = compile_rules(self.sae, self.rules, watched, self.control, self.control_seed)
        pad = self.loaded.tokenizer.pad_token_id
        editor = Editor(
            program,
            closed_ids(self.loaded.tokenizer),
            self.norm_limit,
            None if after is None else Prefixes(after, -1 if pad is None else pad),
            watching,
        )
        with editor.on(self.loaded.model):
            yield

    def generate(
        self,
        prompts: Sequence[str] | Sequence[Sequence[int]],
        *,
        max_new_tokens: int = 256,
        n: int = 1,
        temperature: float = 0.0,
        top_p: float = 1.0,
        batch_size: int = 256,
        seed: int = 0,
        streamer: BaseStreamer | None = None,
    ) -> list[list[Response]]:
        """`n` responses to each prompt (texts, or token ids), greedy unless told a temperature.

        Args:
            streamer: transformers' `TextStreamer`, `TextIteratorStreamer`, ...; for one prompt and n = 1.

        Raises:
            InputError: as `rollout.continue_responses`.
            GenerationAborted: if a condition of `abort_when` holds.
        """
        rows = [self.ids(prompt) for prompt in prompts]
        check_streamer(streamer, n * len(rows))
        starts = [Response(str(i), 0, tuple(row), (), "", (), "length") for i, row in enumerate(rows)]
        drawn: list[list[Response]] = [[] for _ in rows]
        for part, samples in self._parts(rows, n, batch_size):
            with self.steered([rows[i] for i in part] if self.where == "completion" else None, self._watching()):
                grown = continue_responses(
                    self.loaded,
                    [starts[i] for i in part],
                    [0] * len(part),
                    n=len(samples),
                    max_new_tokens=max_new_tokens,
                    temperature=temperature,
                    top_p=top_p,
                    batch_size=batch_size,
                    seed=seed + (samples[0] if self.watches and samples else 0),
                    streamer=streamer,
                )
            for i, responses in zip(part, grown, strict=True):
                drawn[i] += [replace(response, sample=k) for response, k in zip(responses, samples, strict=True)]
        return drawn

    def chat(self, messages: Sequence[Mapping[str, str]], **options: Any) -> Response:
        """One reply to a conversation, through the tokenizer's chat template; `options` are those of `generate`.

        Raises:
            InputError: if the tokenizer has no chat template; as `generate`.
        """
        tokenizer = self.loaded.tokenizer
        if tokenizer.chat_template is None:
            raise InputError(f"messages: the tokenizer of {self.loaded.name} has no chat template; use generate")
        ids = tokenizer.apply_chat_template(list(map(dict, messages)), add_generation_prompt=True, return_dict=False)
        return self.generate([list(ids)], **options)[0][0]

    @torch.no_grad()
    def logits(
        self, prompt: str | Sequence[int], top_k: int = 10, among: Sequence[str] | None = None
    ) -> dict[str, float]:
        """Logits of the next token: the `top_k` largest by token text, or those of the tokens that texts in `among`
        begin with.

        Raises:
            InputError: if a text in `among` or the prompt holds no token, or `top_k` is below 1.
        """
        tokenizer, row = self.loaded.tokenizer, self.ids(prompt)
        if not row:
            raise InputError("prompt: it has no tokens; give at least one")
        with named(k="top_k"):
            check_k(top_k)
        first = {text: self._first_token(text) for text in among or ()}
        ids = torch.tensor([row], device=unwrap(self.loaded.model).device)
        with (
            eval_mode(unwrap(self.loaded.model)),
            self.steered([row] if self.where == "completion" else None),
        ):
            logits_V = unwrap(self.loaded.model)(input_ids=ids, use_cache=False).logits[0, -1].float()
        if among is not None:
            return {text: float(logits_V[token]) for text, token in first.items()}
        best = logits_V.topk(min(top_k, len(logits_V)))
        return {str(tokenizer.decode([i])): v for v, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)}

    def _first_token(self, text: str) -> int:
        ids = self.loaded.tokenizer(text, add_special_tokens=False)["input_ids"]
        if not ids:
            raise InputError(f"among: {text!r} holds no token; give texts of at least one")
        return int(ids[0])

    # --- looking ---

    def inspect(self, text: Text) -> Inspection:
        """Which features fire where."""
        ids = [*text.prompt_ids, *text.completion_ids] if isinstance(text, Response) else self.ids(text)
        return inspect_ids(self.loaded, self.sae, ids, self.labels.texts)

    def search(self, query: str, k: int = 10) -> FeatureGroup:
        """The features whose labels are nearest to the query; see `labels.Labels.search`."""
        return self.labels.search(query, k)

    def rerank(self, features: Named, query: str, k: int = 10) -> FeatureGroup:
        """Some features, those first whose labels are nearest to the query."""
        return self.labels.search(query, k, among=feature_ids(features, self.sae.d_sae))

    def neighbors(self, features: Named, k: int = 10, on: Inspection | None = None) -> FeatureGroup:
        """The features nearest to the mean of some: by decoder rows' cosine, or by firing together on a text."""
        found = neighbours(self.sae, feature_ids(features, self.sae.d_sae), k, None if on is None else on.acts_TF)
        return self.group(found)

    def contrast(self, first: Sequence[Text], second: Sequence[Text], k: int = 5) -> Contrast:
        """Features that fire more in one set of texts than in the other; see `examples.contrast`."""
        from mechreward.steering.examples import contrast

        return contrast(self, first, second, k)

    def attribute(self, response: Response, start: int, end: int | None = None, k: int = 10) -> list[Fired]:
        """The features that did most for completion tokens `start` to `end` (one token if None), largest |share| first:
        gradient x activation for their log-probability, in nats, on the unsteered model (`features.attribution`).

        Raises:
            InputError: as `features.iter_attributions`, or if k is below 1.
        """
        check_k(k)
        from mechreward.features.attribution import iter_attributions
        from mechreward.features.targets import Target

        target = Target(start, start + 1 if end is None else end)
        (batch,) = iter_attributions(self.loaded, self.sae, [response], [target], places="all")
        share_F = batch.attr_BF[0].cpu()
        order = share_F.abs().argsort(descending=True, stable=True)[:k].tolist()
        return [Fired(self.feature(feature), float(share_F[feature])) for feature in order if share_F[feature]]

    def autosteer(self, wanted: str | Sequence[tuple[Text, Text]], protocol: Protocol, k: int = 5) -> AutoSteer:
        """Features and a strength for a behaviour, from a description or pairs of texts; see `auto.autosteer`."""
        from mechreward.steering.auto import autosteer

        return autosteer(self, wanted, protocol, k=k)

    def ids(self, prompt: str | Sequence[int]) -> list[int]:
        """Token ids of a prompt, with the tokenizer's special tokens; ids as they are."""
        return list(self.loaded.tokenizer(prompt)["input_ids"]) if isinstance(prompt, str) else list(prompt)

    @classmethod
    def from_json(cls, loaded: LoadedModel, sae: SAE, value: Mapping[str, Any], **options: Any) -> Variant:
        """A variant with the edits that `json` gave; `options` are those of `Variant`.

        Raises:
            InputError: if they were made for another SAE, or are not what `json` gives.
        """
        variant = cls(loaded, sae, **options)
        variant.load(value)
        return variant

    def _parts(self, rows: Sequence[Sequence[int]], n: int, batch_size: int) -> Iterator[tuple[list[int], list[int]]]:
        """Which prompts, and which samples of each, are drawn in one go."""
        groups = unnested(rows) if self.where == "completion" else [list(range(len(rows)))]
        if not self.watches or n < 1:
            yield from ((group, list(range(n))) for group in groups)
            return
        size = max(1, min(WATCHED_ROWS, batch_size))  # more rows than a batch holds would be prefilled more than once
        chunks = (group[i : i + size] for group in groups for i in range(0, len(group), size))
        yield from ((chunk, [sample]) for chunk in chunks for sample in range(n))

    def _watching(self) -> Watching | None:
        if not self.watches:
            return None
        return Watching(self.watches, self.loaded.tokenizer, frozenset(eos_ids(self.loaded)))
