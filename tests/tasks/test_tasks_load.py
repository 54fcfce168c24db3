"""Questions from every kind of source, and every way to refuse one."""

from __future__ import annotations

import json
import random
import re
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest

from mechreward.errors import InputError
from mechreward.tasks import Columns, Question, load_questions
from mechreward.tiny import world

ROWS = [{"question": f"{n} + {n}?", "answer": str(2 * n)} for n in (1, 2, 3)]
LOADED = [Question("q0", "1 + 1?", "2"), Question("q1", "2 + 2?", "4"), Question("q2", "3 + 3?", "6")]


def jsonl(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def csv(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def refusal(source: str | Path, **options: Any) -> str:
    """The one sentence a source is refused with."""
    with pytest.raises(InputError) as caught:
        load_questions(source, **options)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


@pytest.fixture(params=["jsonl", "csv", "parquet"])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"questions.{request.param}"
    if request.param == "jsonl":
        return jsonl(path, ROWS)
    if request.param == "parquet":
        return parquet(path, ROWS)
    return csv(path, "question,answer\n1 + 1?,2\n2 + 2?,4\n3 + 3?,6\n")


def test_every_file_kind_gives_the_same_questions(stored: Path) -> None:
    assert load_questions(stored) == LOADED
    assert load_questions(str(stored)) == LOADED


@pytest.mark.parametrize("limit", [1, 2, 3, 99])
def test_limit_takes_the_first(stored: Path, limit: int) -> None:
    assert load_questions(stored, limit=limit) == LOADED[:limit]


def test_every_file_kind_names_the_columns_there_are(stored: Path) -> None:
    sentence = refusal(stored, columns=Columns(answer="gold"))
    place = {".jsonl": "line 1", ".csv": "line 2", ".parquet": "row 1"}[stored.suffix]
    assert sentence == (
        f"answer: there is no column 'gold' in {place} of {stored}; the columns there are: answer, question"
    )


def test_columns_are_mapped(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"key": 7, "ask": " 1 + 1? ", "gold": 2, "work": "one and one"}])
    columns = Columns(id="key", question="ask", answer="gold", solution="work")
    assert load_questions(path, columns=columns) == [Question("7", "1 + 1?", "2", "one and one")]


def test_prompt_format_replaces_the_question_only(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"question": "Is {answer} a set?", "answer": "yes"}])
    loaded = load_questions(path, prompt_format="Q: {question}\nUse \\boxed{}.\nA:")
    assert loaded[0].prompt == "Q: Is {answer} a set?\nUse \\boxed{}.\nA:"


def test_gsm8k_rows_part_into_answer_and_solution(tmp_path: Path) -> None:
    worked = "9 * 2 = <<9*2=18>>18\n#### 1,018"
    path = jsonl(tmp_path / "a.jsonl", [{"question": "9 * 2?", "answer": worked, "work": "other"}])
    assert load_questions(path) == [Question("q0", "9 * 2?", "1,018", worked)]
    assert load_questions(path, columns=Columns(solution="work"))[0].solution == "other"


def test_an_empty_solution_is_none(tmp_path: Path) -> None:
    rows = [{"question": "a", "answer": "1", "work": None}, {"question": "b", "answer": "2", "work": ""}]
    loaded = load_questions(jsonl(tmp_path / "a.jsonl", rows), columns=Columns(solution="work"))
    assert [question.solution for question in loaded] == [None, None]


def test_csv_with_quotes_newlines_and_byte_order_mark(tmp_path: Path) -> None:
    path = csv(tmp_path / "a.csv", '\ufeffquestion,answer\n"one,\n""two""?",3\n')
    assert load_questions(path) == [Question("q0", 'one,\n"two"?', "3")]


def test_a_csv_column_without_a_name_is_a_column(tmp_path: Path) -> None:
    # As pandas writes its index.
    path = csv(tmp_path / "a.csv", ",question,answer\n0,1 + 1?,2\n1,2 + 2?,4\n")
    assert load_questions(path) == LOADED[:2]


def test_a_decimal_column_holds_numbers(tmp_path: Path) -> None:
    # As databases write prices.
    path = parquet(tmp_path / "a.parquet", [{"question": "How much?", "answer": Decimal("18.50")}])
    assert load_questions(path) == [Question("q0", "How much?", "18.50")]


def test_a_file_in_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    jsonl(tmp_path / "a.jsonl", ROWS)
    assert load_questions("~/a.jsonl") == LOADED


def test_blank_lines_are_skipped_and_lines_still_counted_as_an_editor_does(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", ["", ROWS[0], " ", {"question": "x", "answer": ""}])
    assert load_questions(path, limit=1) == LOADED[:1]
    assert refusal(path) == f"answer: column 'answer' is empty in line 4 of {path}; every question needs one"


@pytest.mark.parametrize("setting", ["easy", "long"])
def test_tiny_questions(setting: str) -> None:
    loaded = load_questions(f"tiny:{setting}", limit=30, seed=3)
    assert [question.id for question in loaded] == [f"tiny-{setting}-3-{i}" for i in range(30)]
    assert len({question.prompt for question in loaded}) == 30
    for question in loaded:
        assert question.solution is not None
        assert question.solution.endswith(f"#### {question.answer}")
        start = int(re.findall(r"\d+", question.prompt)[0])
        changes = [int(a + b) for a, b in re.findall(r": \d+ ([+-]) (\d+) =", question.solution)]
        assert int(question.answer) == start + sum(changes)


def test_generated_questions_follow_the_seed_and_not_the_limit() -> None:
    ten = load_questions("tiny:easy", limit=10, seed=1)
    assert load_questions("tiny:easy", limit=4, seed=1) == ten[:4]
    assert {q.prompt for q in load_questions("tiny:easy", limit=10, seed=2)}.isdisjoint(q.prompt for q in ten)
    assert len(load_questions("tiny:easy")) == 200


def test_a_tiny_problem_drawn_twice_is_taken_once(monkeypatch: pytest.MonkeyPatch) -> None:
    distinct = [world.make_problem("easy", random.Random(i)) for i in range(3)]
    draws = iter([distinct[0], distinct[1], distinct[0], distinct[1], distinct[2]])
    monkeypatch.setattr(world, "make_problem", lambda _setting, _rng: next(draws))
    loaded = load_questions("tiny:easy", limit=3)
    assert [(q.id, q.prompt) for q in loaded] == [(f"tiny-easy-0-{i}", p.prompt) for i, p in enumerate(distinct)]


def test_reasoning_gym() -> None:
    options = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}
    loaded = load_questions("reasoning-gym:chain_sum", limit=5, seed=5, options=options)
    assert [question.id for question in loaded] == [f"chain_sum-5-{i}" for i in range(5)]
    for question in loaded:
        one, sign, other = re.search(r"(\d+) ([+-]) (\d+) =", question.prompt).groups()  # type: ignore[union-attr]
        assert int(question.answer) == int(one) + int(sign + other)
    assert load_questions("reasoning-gym:chain_sum", limit=2, seed=5, options=options) == loaded[:2]
    assert load_questions("reasoning-gym:chain_sum", limit=2, seed=6, options=options) != loaded[:2]
    assert len(load_questions("reasoning-gym:chain_sum", options={"size": 7})) == 7


def test_reasoning_gym_refusals() -> None:
    unknown = refusal("reasoning-gym:chain_sun")
    assert unknown.startswith("source: reasoning-gym has no generator 'chain_sun'; allowed are its ")
    assert "chain_sum" in unknown
    options = refusal("reasoning-gym:chain_sum", options={"bogus": 1})
    assert options.startswith("options: {'bogus': 1} do not configure reasoning-gym's chain_sum (")
    assert "min_terms must be positive" in refusal("reasoning-gym:chain_sum", options={"min_terms": 0})
    assert refusal("reasoning-gym:chain_sum", options={"seed": 4}) == (
        "options: seed 4 is not allowed here; give it in the field seed"
    )


def test_reasoning_gym_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "reasoning_gym.factory", None)
    assert refusal("reasoning-gym:chain_sum") == (
        "source: 'reasoning-gym:chain_sum' needs the package reasoning-gym; install mechreward[tasks]"
    )


def test_hugging_face_dataset_folder(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    jsonl(folder / "train.jsonl", ROWS)
    jsonl(folder / "test.jsonl", ROWS[1:])
    options = {"cache_dir": str(tmp_path / "cache")}
    assert load_questions(folder, split="train", options=options) == LOADED
    assert [q.prompt for q in load_questions(folder, options=options)] == ["2 + 2?", "3 + 3?"]
    sentence = refusal(folder, split="dev", options=options)
    assert sentence.startswith(f"source: '{folder}' (split 'dev') cannot be loaded as a Hugging Face dataset (")


def test_a_saved_dataset_is_taken_whole(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    Dataset.from_list(ROWS).save_to_disk(tmp_path / "one")
    assert load_questions(tmp_path / "one") == LOADED
    parts = {"train": Dataset.from_list(ROWS), "test": Dataset.from_list(ROWS[1:])}
    DatasetDict(parts).save_to_disk(tmp_path / "two")
    options = {"cache_dir": str(tmp_path / "cache")}
    assert [q.prompt for q in load_questions(tmp_path / "two", options=options)] == ["2 + 2?", "3 + 3?"]


def test_hugging_face_dataset_that_is_not_there(tmp_path: Path) -> None:
    sentence = refusal("nobody/nothing-of-the-kind", options={"cache_dir": str(tmp_path)})
    assert sentence.startswith(
        "source: 'nobody/nothing-of-the-kind' (split 'test') cannot be loaded as a Hugging Face dataset ("
    )
    assert sentence.endswith(".jsonl, .csv or .parquet file, tiny:easy, tiny:long or reasoning-gym:NAME")


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_missing_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"none{suffix}"
    assert refusal(path) == f"source: there is no file {path}; name a file ending in .jsonl, .csv, .parquet"


@pytest.mark.parametrize("name", ["a.json", "b.txt", "c.xlsx"])
def test_another_suffix(name: str) -> None:
    suffix = Path(name).suffix
    assert refusal(name) == f"source: {name} ends in '{suffix}'; allowed are .jsonl, .csv, .parquet"


def test_a_file_without_suffix(tmp_path: Path) -> None:
    (tmp_path / "questions").write_text("{}")
    assert refusal(tmp_path / "questions").endswith("ends in 'no suffix'; allowed are .jsonl, .csv, .parquet")


@pytest.mark.parametrize("source", ["", "a/b/c", "gym:chain_sum", "./nothing", "two words"])
def test_unknown_source(source: str) -> None:
    assert refusal(source).startswith(f"source: '{source}' is none of the kinds there are; allowed are a .jsonl")


def test_unknown_tiny_setting() -> None:
    assert refusal("tiny:hard") == (
        "source: 'tiny:hard' is no setting of the tiny world; allowed are tiny:easy, tiny:long"
    )


@pytest.mark.parametrize("source", ["tiny:easy", "a.jsonl"])
def test_options_where_there_are_none(source: str) -> None:
    sentence = refusal(source, options={"size": 3})
    assert sentence.startswith(f"options: ['size'] mean nothing to {source}; allowed are options of reasoning-gym")


@pytest.mark.parametrize("limit", [0, -1])
def test_bad_limit(limit: int) -> None:
    # Before the source is even looked at.
    assert refusal("none.jsonl", limit=limit) == (
        f"limit: {limit} is not a number of questions; allowed are whole numbers from 1"
    )


def test_prompt_format_without_a_place() -> None:
    assert refusal("none.jsonl", prompt_format="Q: {}") == (
        "prompt_format: 'Q: {}' does not say where the question goes; put {question} in"
    )


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("{oops", r"source: line 2 of \S+ is not valid JSON \(.+\)"),
        ("[1, 2]", r"source: line 2 of \S+ is a JSON array; allowed is an object"),
        ("3", r"source: line 2 of \S+ is a JSON number; allowed is an object"),
        ("null", r"source: line 2 of \S+ is a JSON null; allowed is an object"),
        ({"question": "x"}, r"answer: there is no column 'answer' in line 2 of \S+; the columns there are: question"),
        ({}, r"question: there is no column 'question' in line 2 of \S+; the columns there are: none"),
        ({"question": " ", "answer": "1"}, r"question: column 'question' is empty in line 2 of \S+; .*"),
        ({"question": "x", "answer": ""}, r"answer: column 'answer' is empty in line 2 of \S+; .*"),
        ({"question": "x", "answer": None}, r"answer: column 'answer' is empty in line 2 of \S+; .*"),
        ('{"question": "x", "answer": NaN}', r"answer: column 'answer' is empty in line 2 of \S+; .*"),
        ({"question": "x", "answer": "so\n#### "}, r"answer: line 2 of \S+ has nothing after ####; .*"),
        ({"question": "x", "answer": ["1"]}, r"answer: column 'answer' of line 2 of \S+ holds a list; allowed are .*"),
        ('{"question": "a \\ud83d", "answer": "1"}', r"question: column .* of line 2 of \S+ holds \\ud83d, half a .*"),
        ({"question": "x", "answer": True}, r"answer: column 'answer' of line 2 of \S+ holds a bool; allowed are .*"),
    ],
)
def test_bad_rows(tmp_path: Path, row: Any, message: str) -> None:
    path = jsonl(tmp_path / "a.jsonl", [ROWS[0], row])
    assert re.fullmatch(message, refusal(path))
    assert load_questions(path, limit=1) == LOADED[:1]


def test_duplicate_and_empty_ids(tmp_path: Path) -> None:
    path = jsonl(tmp_path / "a.jsonl", [{"n": i, **row} for i, row in zip((5, 6, 5), ROWS, strict=True)])
    assert refusal(path, columns=Columns(id="n")) == "id: '5' is used by 2 questions; each needs one of its own"
    assert len(load_questions(path, columns=Columns(id="n"), limit=2)) == 2
    path = jsonl(tmp_path / "b.jsonl", [{"n": None, **ROWS[0]}])
    assert refusal(path, columns=Columns(id="n")).startswith("id: column 'n' is empty in line 1 of")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv"])
def test_an_empty_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("")
    assert refusal(tmp_path / name) == f"source: {tmp_path / name} holds no questions; at least one is needed"


def test_damaged_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 and no more")
    assert refusal(path).startswith(f"source: {path} is not a readable Parquet file (")


def test_text_of_another_encoding(tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    path.write_bytes(b"\xff\xfe")
    assert refusal(path) == f"source: {path} is not UTF-8 text (byte 0); save it as UTF-8"


def test_damaged_csv(tmp_path: Path) -> None:
    wide = csv(tmp_path / "c.csv", "question,answer\na,1\nb,2,3\n")
    assert refusal(wide) == f"source: line 3 of {wide} has more cells than its header"
    narrow = csv(tmp_path / "d.csv", "question,answer\na\n")
    assert refusal(narrow) == f"answer: column 'answer' is empty in line 2 of {narrow}; every question needs one"
    twice = csv(tmp_path / "f.csv", "question,answer,answer\na,1,2\n")
    assert refusal(twice) == f"source: the header of {twice} names column 'answer' twice; give each its own name"
    torn = csv(tmp_path / "e.csv", 'question,answer\n"a,1\n')
    assert refusal(torn).startswith(f"source: line 2 of {torn} is not valid CSV (")
