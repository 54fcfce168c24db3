"""Storing responses: equal ones come back, and nothing half-written passes for a file."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from mechreward.errors import InputError
from mechreward.rollout import Response, load_responses, prompt_hashes, save_responses

RESPONSES = [
    Response("q1", 0, (0, 5, 6), (7, 1), "a\n#### 7", (-0.1, -1.0 / 3.0), "eos", True, False, "7", "match"),
    Response("q1", 1, (0, 5, 6), (9,), "é 日", (-2.5e-17,), "length"),
    Response("q2", 0, (), (3, 3, 3), "", (0.0, -1e9, -4.0), "length", False, True, None, "no answer marker"),
]


def test_what_is_saved_comes_back_equal_and_in_order(tmp_path: Path) -> None:
    save_responses(tmp_path / "deep" / "r.parquet", RESPONSES)
    assert load_responses(tmp_path / "deep" / "r.parquet") == RESPONSES
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["r.parquet"]


def test_no_responses_are_saved_too(tmp_path: Path) -> None:
    save_responses(tmp_path / "r.parquet", [])
    assert load_responses(tmp_path / "r.parquet") == []


def test_a_failed_save_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    save_responses(path, RESPONSES)
    too_large = Response("q", 2**70, (), (1,), "", (0.0,), "eos")
    with pytest.raises((OverflowError, ValueError)):
        save_responses(path, [too_large])
    assert load_responses(path) == RESPONSES


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_refused(tmp_path: Path, share: float) -> None:
    path = tmp_path / "r.parquet"
    save_responses(path, RESPONSES)
    content = path.read_bytes()
    path.write_bytes(content[: int(share * len(content))])
    with pytest.raises(InputError, match="r.parquet is not a whole Parquet file"):
        load_responses(path)


def test_a_missing_file_and_a_foreign_one_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="^responses: there is no file .*none.parquet"):
        load_responses(tmp_path / "none.parquet")
    pd.DataFrame({"question_id": ["q"], "sample": [0]}).to_parquet(tmp_path / "other.parquet")
    with pytest.raises(InputError, match="other.parquet has no column prompt_ids; it needs question_id, sample,"):
        load_responses(tmp_path / "other.parquet")


def test_a_file_that_pandas_wrote_again_is_the_same_and_columns_of_another_kind_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.parquet"
    save_responses(path, RESPONSES)
    frame = pd.read_parquet(path)
    frame.astype({"sample": "int32"}).to_parquet(path)
    assert load_responses(path) == RESPONSES
    for name, values, sentence in (
        ("correct", ["yes", "no", "no"], "holds (large_)?string, not bool"),
        ("sample", [0.0, 1.5, 2.0], "holds double, not int64"),
        ("prompt_ids", ["0 5", "6", "7"], "holds (large_)?string, not list<item: int64>"),
        ("completion_ids", [[1], None, [2]], "has 1 of 3 rows without a value; each needs one"),
    ):
        frame.assign(**{name: values}).to_parquet(path)
        with pytest.raises(InputError, match=f"^responses: column {name} of .*r.parquet {sentence}$"):
            load_responses(path)


def test_prompts_are_told_apart_by_their_tokens() -> None:
    one, other = prompt_hashes([(1, 23)]), prompt_hashes([(12, 3)])
    assert one != other and prompt_hashes([[12, 3], (1, 23), (1, 23)]) == tuple(sorted({*one, *other}))
    assert len(one[0]) == 12 and prompt_hashes([]) == ()
