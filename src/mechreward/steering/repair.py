"""Repair of wrong chains: cut before the critical token, write on with the features of right chains, keep right ones.

Three arms write on from the same tokens, with as many tries, the same seed and the same batches:

- `steered`: features of right chains pinned up, those of wrong chains pinned to 0 (a `Variant` with these edits);
- `resampled`: nothing edited. What drawing again alone does, the baseline to beat;
- `random`: the same edits written along random decoder rows of the same norm.

Edits start at the last token that is kept, for that is the one the critical token is drawn from. With span `step` they
end with the step that is written anew and the rest is the model's own; with `rest` they stay. A chain counts as
repaired by an arm if one of its tries is right. No paper; ours.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

import pyarrow as pa
import pyarrow.parquet as pq

from mechreward.chains import Roller, decompose, step_of
from mechreward.chains.rollout_critical import check_wrong
from mechreward.errors import InputError
from mechreward.files import atomic_path
from mechreward.gates import accuracy_interval, paired_test, question_means, wilson
from mechreward.gates.statistics import mcnemar_p
from mechreward.rollout import Response, continue_responses, verify_responses
from mechreward.steering.cuts import Cut
from mechreward.steering.hook import unnested
from mechreward.steering.pairs import Pair
from mechreward.steering.variant import Variant

Span = Literal["step", "rest"]
STEERED, RESAMPLED, RANDOM = "steered", "resampled", "random"


@dataclass(frozen=True)
class Attempt:
    """A wrong chain, where it was cut, and every arm's verified tries."""

    wrong: Response
    cut: Cut
    edits: str
    """JSON of `Variant.json`."""
    arms: dict[str, list[Response]]

    def repaired(self, arm: str) -> bool:
        """Whether one of the arm's tries is right."""
        return any(response.correct for response in self.arms[arm])


@dataclass(frozen=True)
class Repaired:
    """A wrong chain and a verified repair of it by steering."""

    question_id: str
    sample: int
    """Which of the question's responses was wrong."""
    prompt_ids: tuple[int, ...]
    wrong_ids: tuple[int, ...]
    cut: int
    """Tokens of `wrong_ids` that were kept."""
    repaired_ids: tuple[int, ...]
    wrong_text: str
    repaired_text: str
    edits: str
    wrong_scores: tuple[float, ...] = ()

    def pair(self) -> Pair:
        """What is trained on."""
        return Pair(self.question_id, self.prompt_ids, self.repaired_ids, self.wrong_ids, self.wrong_scores)


def repair(
    variant: Variant,
    roller: Roller,
    wrong: Sequence[Response],
    cuts: Sequence[Cut],
    *,
    tries: int = 4,
    span: str = "step",
) -> list[Attempt]:
    """All three arms on each wrong chain.

    Args:
        variant: with the edits; those of a condition act where it holds.
        roller: its model, questions, verifier and the settings of sampling.
        wrong: wrong, verified responses.
        cuts: one each.

    Raises:
        InputError: for a variant without edits, a response that is not wrong, fewer than 1 try, or another span; as
            `continue_responses` and `verify_responses`.
    """
    if not variant.rules:
        raise InputError("variant: it has no edits; set features before a repair")
    check_span(span)
    if len(cuts) != len(wrong):
        raise InputError(f"cuts: {len(cuts)} are given for {len(wrong)} responses; give one each")
    check_wrong(wrong)
    plain = variant.copy()
    plain.reset()
    writers = {STEERED: variant, RESAMPLED: plain, RANDOM: variant.copy("random", roller.seed)}
    drawn = {arm: _write_on(writer, roller, wrong, cuts, tries, span) for arm, writer in writers.items()}
    edits = json.dumps(variant.json())
    return [
        Attempt(response, cut, edits, {arm: drawn[arm][row] for arm in writers})
        for row, (response, cut) in enumerate(zip(wrong, cuts, strict=True))
    ]


def check_span(span: str) -> None:
    """Raises:
    InputError: if there is no such span.
    """
    if span not in get_args(Span):
        raise InputError(f"span: {span!r} is not known; use one of {', '.join(get_args(Span))}")


def _write_on(
    writer: Variant, roller: Roller, wrong: Sequence[Response], cuts: Sequence[Cut], tries: int, span: str
) -> list[list[Response]]:
    kept = [[*r.prompt_ids, *r.completion_ids[: cut.token]] for r, cut in zip(wrong, cuts, strict=True)]
    found: dict[int, list[Response]] = {}
    for group in unnested(kept):
        with writer.steered([kept[row] for row in group]):
            grown = _continue(roller, [wrong[row] for row in group], [cuts[row].token for row in group], tries)
        found.update(zip(group, grown, strict=True))
    flat = [(row, response) for row in range(len(wrong)) for response in found[row]]
    texts = [response for _, response in flat]
    if span == "step" and writer.rules:
        ends = [_step_end(roller, response, cuts[row].token) for row, response in flat]
        again = _continue(roller, texts, ends, 1)
        texts = [replace(new, sample=old.sample) for (new,), old in zip(again, texts, strict=True)]
    judged = verify_responses(texts, roller.questions, roller.verifier)
    return [judged[row * tries : (row + 1) * tries] for row in range(len(wrong))]


def _continue(roller: Roller, responses: Sequence[Response], starts: Sequence[int], n: int) -> list[list[Response]]:
    return continue_responses(
        roller.loaded,
        responses,
        starts,
        n=n,
        max_new_tokens=roller.max_new_tokens,
        temperature=roller.temperature,
        batch_size=roller.batch_size,
        seed=roller.seed,
    )


def _step_end(roller: Roller, response: Response, cut: int) -> int:
    """Where the first step that was written anew ends; a response without text has nothing more to write."""
    if not response.text.strip():
        return len(response.completion_ids)
    steps = decompose(roller.loaded.tokenizer, response.completion_ids)
    return steps[step_of(steps, cut)].token_end if cut < len(response.completion_ids) else cut


def kept_repairs(attempts: Sequence[Attempt]) -> list[Repaired]:
    """The first right try by steering of each chain that has one."""
    kept = []
    for attempt in attempts:
        right = next((response for response in attempt.arms[STEERED] if response.correct), None)
        if right is not None:
            wrong = attempt.wrong
            kept.append(
                Repaired(
                    question_id=wrong.question_id,
                    sample=wrong.sample,
                    prompt_ids=wrong.prompt_ids,
                    wrong_ids=wrong.completion_ids,
                    cut=attempt.cut.token,
                    repaired_ids=right.completion_ids,
                    wrong_text=wrong.text,
                    repaired_text=right.text,
                    edits=attempt.edits,
                    wrong_scores=attempt.cut.scores,
                )
            )
    return kept


def summarise(attempts: Sequence[Attempt]) -> dict[str, Any]:
    """Every arm's share of repaired chains (Wilson) and of right tries (clustered by question), and steering against
    each control on the same chains: McNemar's exact p, and the difference in right tries, paired by question; None for
    chains of fewer than two questions.

    McNemar's test and Wilson's interval take chains as independent: give one a question.
    """
    arms, means = {}, {}
    for arm in (STEERED, RESAMPLED, RANDOM):
        tries = [(bool(r.correct), a.wrong.question_id) for a in attempts for r in a.arms[arm]]
        right, questions = [one for one, _ in tries], [question for _, question in tries]
        repaired = sum(attempt.repaired(arm) for attempt in attempts)
        each, means[arm] = accuracy_interval(right, questions), question_means(right, questions)
        arms[arm] = {
            "repaired": repaired,
            "share": repaired / len(attempts),
            "interval": list(wilson(repaired, len(attempts))),
            "tries": {"share": each.value, "interval": [each.low, each.high], "n": len(right)},
        }
    n_questions = len(means[STEERED])
    against = {
        control: {
            "mcnemar_p": mcnemar_p([a.repaired(control) for a in attempts], [a.repaired(STEERED) for a in attempts]),
            "tries": asdict(paired_test(means[control], means[STEERED])),
        }
        if n_questions > 1
        else None
        for control in (RESAMPLED, RANDOM)
    }
    return {"n_chains": len(attempts), "n_questions": n_questions, "arms": arms, "steered_against": against}


_IDS, _NUMBERS = pa.list_(pa.int64()), pa.list_(pa.float64())
SCHEMA = pa.schema(
    {
        "question_id": pa.string(),
        "sample": pa.int64(),
        "prompt_ids": _IDS,
        "wrong_ids": _IDS,
        "cut": pa.int64(),
        "repaired_ids": _IDS,
        "wrong_text": pa.string(),
        "repaired_text": pa.string(),
        "edits": pa.string(),
        "wrong_scores": _NUMBERS,
    }
)
_TUPLES = ("prompt_ids", "wrong_ids", "repaired_ids", "wrong_scores")


def save_repairs(path: str | Path, repairs: Sequence[Repaired]) -> None:
    """One Parquet file, atomically; `load_repairs` gives back equal ones."""
    table = pa.Table.from_pylist([asdict(one) for one in repairs], schema=SCHEMA)
    with atomic_path(path) as temporary:
        pq.write_table(table, temporary)


def load_repairs(path: str | Path) -> list[Repaired]:
    """Reads what `save_repairs` wrote.

    Raises:
        InputError: if the file is missing, is not whole, or has other columns.
    """
    try:
        rows = pq.read_table(path).to_pylist()
    except (pa.ArrowException, OSError) as error:
        raise InputError(f"repairs: {path} is not there or not a whole Parquet file of save_repairs") from error
    names = {field.name for field in fields(Repaired)}
    if rows and set(rows[0]) != names:
        raise InputError(f"repairs: {path} has the columns {sorted(rows[0])}; it must have {sorted(names)}")
    return [Repaired(**{**row, **{name: tuple(row[name]) for name in _TUPLES}}) for row in rows]
