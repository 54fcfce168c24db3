"""KNOWN and UNKNOWN: disjoint, complete, seeded, blind to order."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechreward.errors import InputError
from mechreward.tasks import Question, QuestionSplit, join_sides, load_split, save_questions, split_questions


def numbered(n: int) -> list[Question]:
    return [Question(f"q{i}", f"What is {i}?", str(i)) for i in range(n)]


@settings(deadline=None, derandomize=True)
@given(st.integers(2, 40), st.floats(0.1, 0.9), st.integers(0, 9), st.randoms(use_true_random=False))
def test_disjoint_complete_of_the_wanted_size_and_blind_to_order(n: int, known: float, seed: int, rng: object) -> None:
    questions = numbered(n)
    wanted = round(known * n)
    if wanted in (0, n):
        return
    split = split_questions(questions, known, seed)
    assert len(split.known) == wanted
    assert sorted(q.id for side in split for q in side) == sorted(q.id for q in questions)
    shuffled = list(questions)
    rng.shuffle(shuffled)  # type: ignore[attr-defined]
    assert split_questions(shuffled, known, seed) == split


def test_order_is_by_hash_of_seed_and_prompt() -> None:
    split = split_questions(numbered(6), 0.34, seed=4)
    ordered = sorted(numbered(6), key=lambda q: hashlib.sha256(f"4\n{q.prompt}".encode()).hexdigest())
    assert (split.known, split.unknown) == (ordered[:2], ordered[2:])


def test_seeds_differ() -> None:
    splits = {tuple(q.id for q in split_questions(numbered(20), seed=seed).known) for seed in range(10)}
    assert len(splits) == 10


def test_a_larger_share_only_adds() -> None:
    small, large = (split_questions(numbered(20), share) for share in (0.3, 0.6))
    assert large.known[: len(small.known)] == small.known


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 20))
def test_one_prompt_is_never_on_both_sides(seed: int) -> None:
    questions = [Question(f"{copy}-{i}", f"What is {i}?", str(i)) for i in range(4) for copy in "ab"]
    known, unknown = split_questions(questions, 0.4, seed)
    assert {q.prompt for q in known}.isdisjoint(q.prompt for q in unknown)
    assert (len(known), len(unknown)) == (4, 4)
    assert split_questions(questions[::-1], 0.4, seed) == (known, unknown)


@pytest.mark.parametrize("known", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_bad_share(known: float) -> None:
    with pytest.raises(InputError, match=r"^known: \S+ is not a share of the questions; allowed is a number above 0"):
        split_questions(numbered(4), known)


@pytest.mark.parametrize(
    ("questions", "known", "side"),
    [
        ([], 0.5, "known"),
        (numbered(1), 0.9, "unknown"),
        (numbered(4), 0.1, "known"),
        (numbered(4), 0.9, "unknown"),
        ([Question("a", "same", "1"), Question("b", "same", "1")], 0.5, "unknown"),
    ],
)
def test_an_empty_side_is_refused(questions: list[Question], known: float, side: str) -> None:
    with pytest.raises(InputError, match=f"^known: a share of {known} of .* leaves the {side} side empty; both"):
        split_questions(questions, known)


def test_duplicate_ids_are_refused() -> None:
    with pytest.raises(InputError, match="^id: 'q1' is used by 2 questions"):
        split_questions([*numbered(3), Question("q1", "another", "1")])


def test_two_sources_keep_their_order_and_share_neither_ids_nor_questions() -> None:
    known, unknown = ([Question(f"q{i}", f"{side} {i} ?", "1") for i in range(3)] for side in ("train", "test"))
    sides = join_sides(known, unknown)
    assert sides.known == known
    assert [(q.id, q.prompt, q.answer) for q in sides.unknown] == [(f"eval-q{i}", f"test {i} ?", "1") for i in range(3)]
    copied = [*unknown, Question("c", " Train 1?", "2"), Question("d", "TRAIN 0 ?", "2")]
    with pytest.raises(InputError, match=r"^unknown: 2 of these 5 questions are KNOWN ones too \(the first is c\)"):
        join_sides(known, copied)
    with pytest.raises(InputError, match="eval-q1"):
        join_sides([*known, Question("eval-q1", "another ?", "1")], unknown)


def test_saved_and_loaded_split_is_the_same(tmp_path: Path) -> None:
    questions = [*numbered(5), Question("ü", "Größe?\n", "1,000", "worked\n#### 1,000")]
    split = split_questions(questions)
    save_questions(tmp_path / "run" / "questions.parquet", split)
    assert load_split(tmp_path / "run" / "questions.parquet") == split
    table = pyarrow.parquet.read_table(tmp_path / "run" / "questions.parquet")
    assert table.column_names == ["id", "prompt", "answer", "solution", "split"]
    assert table["split"].to_pylist() == ["known"] * 3 + ["unknown"] * 3
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["questions.parquet"]


def test_without_any_solution_the_column_is_still_text(tmp_path: Path) -> None:
    save_questions(tmp_path / "q.parquet", QuestionSplit(numbered(1), []))
    assert pyarrow.parquet.read_schema(tmp_path / "q.parquet").field("solution").type == pyarrow.string()
    assert load_split(tmp_path / "q.parquet") == QuestionSplit(numbered(1), [])


def test_files_that_hold_no_split_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "q.parquet"
    with pytest.raises(InputError, match="^questions: there is no file .*q.parquet; it is written by save_questions$"):
        load_split(path)
    path.write_text("not parquet")
    with pytest.raises(InputError, match="^questions: .*q.parquet is not a readable Parquet file"):
        load_split(path)
    pyarrow.parquet.write_table(pyarrow.table({"id": ["a"]}), path)
    with pytest.raises(InputError, match=r"^questions: .* has the columns \['id'\]; it must have \['id', 'prompt',"):
        load_split(path)
    row = {"id": ["a"], "prompt": ["p"], "answer": ["1"], "solution": [None], "split": ["train"]}
    pyarrow.parquet.write_table(pyarrow.table(row), path)
    with pytest.raises(InputError, match=r"^split: question 'a' of .* is 'train'; allowed are known and unknown$"):
        load_split(path)


def test_prompts_that_differ_in_capitals_and_spaces_stay_together() -> None:
    ways = ("What is {} + 1 ?", "what is {} + 1?", "What  is {}\n+ 1 ?")
    questions = [Question(f"{n}-{k}", way.format(n), "1") for n in range(20) for k, way in enumerate(ways)]
    known, unknown = split_questions(questions)
    sides = [{question.id.split("-")[0] for question in side} for side in (known, unknown)]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 20
