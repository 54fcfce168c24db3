"""`chains.json`: a few chains of thought of a run as the report shows them, step by step, with the features that fire.

- Repaired chains: the wrong one with the token marked before which it was cut, and the repair with what was written
  anew. Their features are those that steered them: pinned up (they go with right chains), or held at 0 (with wrong).
- Responses to UNKNOWN questions before GRPO and after, of the same sampling seed. Their features are the pack's.

All are read by the untrained model, unsteered, so that a difference is one of the text. Which responses are shown is no
choice of ours: by turns wrong made right, right made wrong, wrong both times, right both times, in the file's order.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby, zip_longest
from os.path import commonprefix
from pathlib import Path
from typing import Any

from mechreward.chains.spans import token_ends
from mechreward.config import RunConfig
from mechreward.features import FeaturePack, load_pack
from mechreward.features.fired import fired_steps
from mechreward.files import write_json
from mechreward.inputs import Inputs
from mechreward.rollout import Response, load_responses
from mechreward.sae import SAE
from mechreward.steering import Repaired, load_repairs

REPAIRS, RESPONSES = 6, 4
"""Repaired chains shown, and responses of each GRPO arm."""
TURNS = ((False, True), (True, False), (False, False), (True, True))
"""Whether a response was right before and after training."""

Marks = Callable[[int], str]
"""What a token is: `kept`, `critical` or `new`."""


def write_views(inputs: Inputs[RunConfig], folder: Path, sae: SAE) -> None:
    """Writes chains.json from the files of a run that has trained, unless it is there."""
    path = folder / "chains.json"
    if path.exists():
        return
    pack = load_pack(folder / "pack.json")
    views: list[dict[str, Any]] = []
    if inputs.config.repair_arms:
        repairs = load_repairs(folder / "repairs.parquet")
        repairs = [one for one in repairs if one.wrong_text.strip() and one.repaired_text.strip()]
        every = max(1, len(repairs) // REPAIRS)
        views += [_repair_view(inputs, sae, pack, one) for one in repairs[::every][:REPAIRS]]
    before = load_responses(folder / "responses" / "baseline.parquet")
    for arm in inputs.config.grpo_arms:
        after = load_responses(folder / "responses" / f"final-{arm}.parquet")
        views += [_response_view(inputs, sae, pack, arm, *pair) for pair in by_turns(before, after, RESPONSES)]
    write_json(path, {"views": views})


def by_turns(before: Sequence[Response], after: Sequence[Response], limit: int) -> list[tuple[Response, Response]]:
    """Responses to the same question of the same sample, one after another of each kind of `TURNS`."""
    trained = {(response.question_id, response.sample): response for response in after}
    pairs = [(old, trained[old.question_id, old.sample]) for old in before]
    pairs = [(old, new) for old, new in pairs if old.text.strip() and new.text.strip()]
    kinds = [[(old, new) for old, new in pairs if (old.correct, new.correct) == turn] for turn in TURNS]
    return [pair for turn in zip_longest(*kinds) for pair in turn if pair is not None][:limit]


def _repair_view(inputs: Inputs[RunConfig], sae: SAE, pack: FeaturePack, one: Repaired) -> dict[str, Any]:
    edits = [edit for rule in json.loads(one.edits)["rules"] for edit in rule["edits"]]
    sides = {edit["feature"]: "right" if edit["value"] > 0 else "wrong" for edit in edits}
    steps = fired_steps(
        inputs.loaded,
        sae,
        [one.prompt_ids] * 2,
        [one.wrong_ids, one.repaired_ids],
        {edit["feature"]: edit["size"] for edit in edits},
    )
    chains = [
        _chain(inputs, one.wrong_ids, steps[0], lambda t: "critical" if t == one.cut else "kept", sides, pack),
        _chain(inputs, one.repaired_ids, steps[1], lambda t: "new" if t >= one.cut else "kept", sides, pack),
    ]
    return _view(inputs, "repair", one.question_id, chains, (False, True))


def _response_view(
    inputs: Inputs[RunConfig], sae: SAE, pack: FeaturePack, arm: str, old: Response, new: Response
) -> dict[str, Any]:
    sides = {feature.id: "right" if feature.weight > 0 else "wrong" for feature in pack.features}
    ids = [old.completion_ids, new.completion_ids]
    sizes = {feature.id: feature.scale for feature in pack.features}
    steps = fired_steps(inputs.loaded, sae, [old.prompt_ids, new.prompt_ids], ids, sizes)
    same = len(commonprefix([list(row) for row in ids]))
    chains = [
        _chain(inputs, ids[0], steps[0], lambda _: "kept", sides, pack),
        _chain(inputs, ids[1], steps[1], lambda t: "new" if t >= same else "kept", sides, pack),
    ]
    return _view(inputs, arm, old.question_id, chains, (bool(old.correct), bool(new.correct)))


def _view(
    inputs: Inputs[RunConfig], kind: str, question_id: str, chains: Sequence[Any], correct: tuple[bool, bool]
) -> dict[str, Any]:
    question = next(q for side in inputs.split for q in side if q.id == question_id)
    found = {"kind": kind, "question_id": question_id, "prompt": question.prompt, "answer": question.answer}
    before, after = ({"correct": right, "steps": steps} for right, steps in zip(correct, chains, strict=True))
    return found | {"before": before, "after": after}


def _chain(
    inputs: Inputs[RunConfig],
    ids: Sequence[int],
    steps: Sequence[Any],
    marks: Marks,
    sides: Mapping[int, str],
    pack: FeaturePack,
) -> list[dict[str, Any]]:
    """Each step as parts of one mark, put together its text, and the features that fire in it."""
    text, ends = token_ends(inputs.loaded.tokenizer, ids)
    begins, names = [0, *ends], {feature.id: feature.name for feature in pack.features}
    rows = []
    for one in steps:
        tokens = range(one.step.token_start, one.step.token_end)
        parts = [
            [mark, "".join(text[begins[t] : begins[t + 1]] for t in group)] for mark, group in groupby(tokens, marks)
        ]
        fired = [
            {"feature": feature, "name": names.get(feature, ""), "value": round(value, 4), "side": sides[feature]}
            for feature, value in one.fired
        ]
        rows.append({"parts": [part for part in parts if part[1]], "fired": fired})
    return rows
