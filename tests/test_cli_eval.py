"""`mechreward eval` and `mechreward steer repair`: exit codes, what they write, one sentence on bad input."""

from __future__ import annotations

import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import import_module
from pathlib import Path
from threading import Thread

import pytest

from mechreward.chains import Patience
from mechreward.cli import main
from mechreward.features import catalog_names, load_pack, save_pack
from mechreward.models import load_model
from mechreward.rollout import load_responses, prompt_hashes, tokenise_prompts
from mechreward.steering import load_repairs
from mechreward.tasks import load_questions, load_split
from mechreward.tiny import MODEL

TINY = next(name for name in catalog_names() if name.startswith("tiny"))


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def test_fuzz_with_a_pack(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    ask = ("--questions", "tiny:easy", "--limit", "6", "--samples", "3", "--max-new-tokens", "70", "--seed", "4")
    code, said, _ = run(
        capsys, "eval", *ask, "--fuzz", "--kinds", "names", "numbers", "--pack", TINY, "--out", str(tmp_path / "a")
    )
    found = json.loads((tmp_path / "a" / "eval.json").read_text())
    assert code == int(found["signal"]["verdict"] == "brittle") and "eval.json" in said
    mark = load_pack(tmp_path / "a" / "pack.json").rephrasing
    assert mark.verdict == found["signal"]["verdict"] and mark.spec_hash == found["spec_hash"]
    assert (mark.kinds, mark.n_families) == (["names", "numbers"], 6)
    assert f"in other words: {mark.verdict}" in load_pack(tmp_path / "a" / "pack.json").status
    code, shown, _ = run(capsys, "pack", "show", str(tmp_path / "a" / "pack.json"))
    assert code == 0 and f"in other words: {mark.verdict}" in shown
    assert ("kept in other words" in shown) == (mark.interval is not None)
    responses = load_responses(tmp_path / "a" / "responses.parquet")
    assert len(responses) == 6 * 3 * 3
    for kind in ("original", "names", "numbers"):
        mine = [
            r for r in responses if (f"~{kind}-" in r.question_id) or (kind == "original" and "~" not in r.question_id)
        ]
        row = found["accuracy"][kind]
        assert row["n"] == len(mine) == 18 and row["value"] == pytest.approx(sum(map(lambda r: r.correct, mine)) / 18)
    assert found["agreement"]["across"]["n_families"] == 6
    code, said, _ = run(capsys, "eval", *ask, "--out", str(tmp_path / "b"))
    plain = json.loads((tmp_path / "b" / "eval.json").read_text())
    assert code == 0 and set(plain) == {"n_questions", "accuracy"} and set(plain["accuracy"]) == {"original"}


def test_a_pack_is_not_put_to_the_test_on_its_own_questions(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    found_on = load_pack(TINY)
    questions = load_questions("tiny:easy", limit=2, seed=4)
    loaded = load_model(MODEL)
    hashes = prompt_hashes(tokenise_prompts(loaded, questions[:1], max_new_tokens=4))
    mine = found_on.model_copy(update={"provenance": {**found_on.provenance, "prompts": sorted(hashes)}})
    save_pack(mine, tmp_path / "pack.json")
    ask = ("--questions", "tiny:easy", "--limit", "2", "--seed", "4", "--max-new-tokens", "4", "--samples", "2")
    pack = ("--fuzz", "--pack", str(tmp_path / "pack.json"), "--out", str(tmp_path / "out"))
    code, _, said = run(capsys, "eval", *ask, *pack)
    assert code == 2 and "was found on 1 of these 2" in said and not (tmp_path / "out" / "responses.parquet").exists()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("eval",), "questions: is needed"),
        (("eval", "--questions", "tiny:easy", "--kinds", "names"), "kinds: names are asked for without --fuzz"),
        (("eval", "--questions", "tiny:easy", "--examiner", "m"), "examiner: m has nothing to put in other words"),
        (
            ("eval", "--questions", "tiny:easy", "--fuzz", "--examiner", "http://h/v1"),
            "examiner_model: is needed; name",
        ),
        (
            ("eval", "--questions", "tiny:easy", "--fuzz", "--examiner", "m", "--examiner-model", "n"),
            "examiner_model: n is asked at an address",
        ),
        (("eval", "--questions", "tiny:easy", "--pack", TINY), "pack: its signal is compared on variations"),
        (("eval", "--questions", "tiny:easy", "--fuzz", "--pack", TINY, "--samples", "1"), "samples: 1 answer"),
        (("eval", "--questions", "tiny:easy", "--fuzz", "--pack", "none.json"), "pack: none.json is neither"),
        (("eval", "--questions", "tiny:easy", "--fuzz", "--pack", "[/bold][sae].json"), "pack: [/bold][sae].json is"),
        (("steer", "repair"), "questions: is needed"),
        (("steer", "repair", "--questions", "tiny:easy", "--pooling", "zzz"), "pooling: 'zzz' is not one of"),
        (("steer", "repair", "--questions", "tiny:easy", "--model", "x"), "sae: is needed to steer x"),
        (("steer", "repair", "--questions", "tiny:easy", "--tries", "0"), "tries: 0 is not allowed"),
        (("steer", "repair", "--questions", "tiny:easy", "--out", "/dev/null/x"), "out: cannot write to the folder"),
    ],
)
def test_bad_flags(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], sentence: str) -> None:
    code, said, error = run(capsys, *arguments)
    assert code == 2 and sentence in error and len(error.strip().splitlines()) == 1
    assert "sample" not in said


def test_repair_keeps_unknown_out(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, said, _ = run(
        capsys, "steer", "repair", "--questions", "tiny:easy", "--limit", "64", "--samples", "6", "--tries", "2",
        "--max-new-tokens", "70", "--critical", "solution", "--chains", "8", "--pooling", "step_end:.",
        "--out", str(tmp_path),
    )  # fmt: skip
    repairs, split = load_repairs(tmp_path / "repairs.parquet"), load_split(tmp_path / "questions.parquet")
    record = json.loads((tmp_path / "repair.json").read_text())
    assert code == (0 if repairs else 1) and repairs and "repairs.parquet" in said
    assert record["n_kept"] == len(repairs) == record["arms"]["steered"]["repaired"]
    known, unknown = {q.id for q in split.known}, {q.id for q in split.unknown}
    sampled = {r.question_id for r in load_responses(tmp_path / "responses" / "known.parquet")}
    assert sampled == known and {one.question_id for one in repairs} <= known and not sampled & unknown
    for one in repairs:
        assert one.repaired_ids[: one.cut] == one.wrong_ids[: one.cut] and one.repaired_ids != one.wrong_ids
        assert one.repaired_text.split()[-1] == next(q.answer for q in split.known if q.id == one.question_id)


class Stopped(Exception):
    """Ends a command where a test has seen enough."""


def stop(*_: object, **__: object) -> None:
    raise Stopped


def plain_questions(tmp_path: Path) -> str:
    path = tmp_path / "plain.jsonl"
    rows = [{"question": f"Tom has {n} pens . how many ?", "answer": str(n)} for n in range(3, 9)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_what_is_varied_is_the_bare_question(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The aside stands beside the question, not before the prompt's worked examples; other kinds are not tried."""
    asked: list[str] = []

    def answered(_settings, _loaded, questions, *_: object) -> None:
        asked.extend(question.prompt for question in questions)
        raise Stopped

    monkeypatch.setattr("mechreward.cli.eval.answered", answered)
    for source, kinds, n in ((plain_questions(tmp_path), "irrelevant", 4), ("tiny:easy", "names, numbers, order,", 12)):
        asked.clear()
        with pytest.raises(Stopped):
            main(
                ["eval", "--fuzz", "--questions", source, "--limit", "2", "--out", str(tmp_path / "out"),
                 "--prompt-format", "Q: 1 + 1 A: 2 Q: {question} A:"]
            )  # fmt: skip
        assert f"kinds: {kinds}" in capsys.readouterr().out and len(asked) == n
        assert all(prompt.startswith("Q: 1 + 1 A: 2 Q: ") and prompt.endswith(" A:") for prompt in asked)
        if kinds == "irrelevant":
            assert asked[2] == "Q: 1 + 1 A: 2 Q: The weather was fine all day. Tom has 3 pens . how many ? A:"


class Judge(BaseHTTPRequestHandler):
    """An endpoint that says every problem backwards, and of every third one nothing usable."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((asked["model"], self.headers.get("Authorization")))
        problem = asked["messages"][0]["content"].split("Problem:\n")[1].split("\n")[0]
        said = "no idea" if "13" in problem else "PROBLEM: " + " ".join(reversed(problem.split()))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [{"message": {"content": said}}]}).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Iterator[ThreadingHTTPServer]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(Patience, "sleep", lambda *_: None)
    made = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    made.seen = []
    Thread(target=made.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()


def test_an_examiner_puts_questions_in_its_own_words(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, judge: ThreadingHTTPServer
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    path = tmp_path / "plain.jsonl"
    rows = [{"id": f"q{n}", "question": f"Tom has {n} pens . how many ?", "answer": str(n)} for n in (12, 13, 14)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    address = f"http://127.0.0.1:{judge.server_port}/v1"
    arguments = (
        "eval", "--fuzz", "--questions", str(path), "--id-column", "id", "--max-new-tokens", "4", "--samples", "2",
        "--examiner", address, "--examiner-model", "big", "--out", str(tmp_path / "out"),
    )  # fmt: skip
    code, said, _ = run(capsys, *arguments)
    found = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert code == 0 and "1 of 3 paraphrases are left out" in said
    assert set(judge.seen) == {("big", "Bearer secret")} and len(judge.seen) == 2 + 3
    assert found["examiner"]["name"] == "big" and list(found["examiner"]["left_out"]) == ["q13"]
    assert found["accuracy"]["examiner"]["n"] == 2 * 2 and found["accuracy"]["irrelevant"]["n"] == 3 * 2
    assert found["n_variations"] == 5
    # Asked again, only what was not said is.
    run(capsys, *arguments)
    assert len(judge.seen) == 5 + 3


def test_an_examiner_that_is_down(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, judge: ThreadingHTTPServer
) -> None:
    address = f"http://127.0.0.1:{judge.server_port}/v1"
    judge.shutdown()
    judge.server_close()
    code, _, error = run(
        capsys, "eval", "--fuzz", "--questions", "tiny:easy", "--limit", "2", "--kinds", "names", "--examiner",
        address, "--examiner-model", "big", "--out", str(tmp_path / "out"),
    )  # fmt: skip
    assert code == 2 and "examiner: big gave no usable paraphrase of 2 questions: " in error
    assert len(error.strip().splitlines()) == 1 and not (tmp_path / "out" / "eval.json").exists()


def test_answers_are_kept_whatever_comes_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mechreward.gates.rephrasing.accuracies", stop)
    with pytest.raises(Stopped):
        main(["eval", "--questions", "tiny:easy", "--limit", "2", "--max-new-tokens", "4", "--out", str(tmp_path)])
    assert len(load_responses(tmp_path / "responses.parquet")) == 2 * 4


def test_paths_are_printed_as_they_are(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "run[bold]"
    code, said, _ = run(
        capsys, "eval", "--questions", "tiny:easy", "--limit", "2", "--max-new-tokens", "4", "--out", str(out)
    )
    assert code == 0 and f"wrote {out / 'eval.json'}" in said


def test_repairs_are_kept_whatever_comes_after(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # By module: the package's functions of these names hide the modules.
    monkeypatch.setattr(import_module("mechreward.steering.repair_known"), "repair_known", lambda *_: [])
    monkeypatch.setattr(import_module("mechreward.steering.repair"), "summarise", stop)
    with pytest.raises(Stopped):
        main(
            ["steer", "repair", "--questions", "tiny:easy", "--limit", "8", "--samples", "2", "--max-new-tokens", "4",
             "--out", str(tmp_path)]
        )  # fmt: skip
    assert load_repairs(tmp_path / "repairs.parquet") == []


def test_solutions_are_missed_before_any_work(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, said, error = run(
        capsys, "steer", "repair", "--questions", plain_questions(tmp_path), "--critical", "solution", "--out",
        str(tmp_path / "out"),
    )  # fmt: skip
    assert code == 2 and "critical: solution needs worked solutions, and question " in error and not said
    assert not (tmp_path / "out").exists()
