"""Claims: how they are asked for, read, kept and checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import pytest

from mechreward.chains import (
    Claim,
    ExaminerError,
    Patience,
    Request,
    Roller,
    Step,
    Tally,
    ask_clarifying,
    ask_feature,
    ask_paraphrases,
    ask_verdicts,
    check_expansions,
    check_feature,
    check_paraphrases,
    check_verdicts,
    decompose,
    examine,
    expand,
    fill_prompt,
    load_claims,
    reword,
    with_expansion,
)
from mechreward.chains.claims import READERS
from mechreward.errors import InputError
from mechreward.tasks import Question, Variation
from mechreward.verifiers import gsm8k_exact_match

QUESTION = Question("q", "Ada has 20 apples and buys 5. How many?", "25")
STEPS = [Step("20 + 5 = 25.", 0, 12, 0, 4), Step(" So 25.", 12, 19, 4, 7)]
ONCE = Patience(tries=1)


@dataclass
class Scripted:
    """Answers in order; None is an answer that does not come."""

    answers: list[str | None]
    name: str = "judge"
    asked: list[str] = field(default_factory=list)

    def ask(self, prompt: str) -> str:
        self.asked.append(prompt)
        answer = self.answers.pop(0)
        if answer is None:
            raise ExaminerError("down")
        return answer


def test_each_step_is_asked_about_with_what_was_before_it() -> None:
    first, second = ask_verdicts("r", QUESTION, STEPS)
    assert [(first.kind, first.subject), (second.kind, second.subject)] == [("verdict", "r/0"), ("verdict", "r/1")]
    assert QUESTION.prompt in first.prompt and "Steps so far:\n\n\nThe step to judge:\n20 + 5 = 25.\n" in first.prompt
    assert "Steps so far:\n20 + 5 = 25.\n\nThe step to judge:\n So 25.\n" in second.prompt
    clarify = ask_clarifying("r", QUESTION, STEPS, count=2)[1]
    assert "Ask the 2 questions" in clarify.prompt and "The step:\n So 25." in clarify.prompt
    assert QUESTION.prompt in ask_paraphrases([QUESTION])[0].prompt
    feature = ask_feature("f7", ["a «b»"], ["c"])
    assert feature.subject == "f7" and "- a «b»\n" in feature.prompt and "- c\n" in feature.prompt


@pytest.mark.parametrize(
    ("kind", "answer", "text"),
    [
        ("verdict", "Hm.\nVERDICT: right", "right"),
        ("verdict", "VERDICT: right, no:\n**Verdict: WRONG**", "wrong"),
        ("verdict", "it is right", None),
        ("verdict", "VERDICT: perhaps", None),
        ("verdict", "VERDICT: wrong, as 3 + 4 is 7", "wrong"),
        ("verdict", "VERDICT: right or wrong", None),
        ("verdict", "VERDICT: Wrong/RIGHT", None),
        ("verdict", "VERDICT: right triangles differ, so it is wrong.", None),
        ("verdict", "VERDICT: right or wrong?\nVERDICT: right", "right"),
        ("verdict", "End with exactly one of\nVERDICT: right\n**VERDICT: wrong**\n", None),
        ("verdict", "VERDICT: wrong\n\nVERDICT: wrong", "wrong"),
        ("clarify", "Sure!\nQ: Why 20?\n - Q2. And 5?", "Why 20?\nAnd 5?"),
        ("clarify", "Why?", None),
        ("paraphrase", "Well:\nPROBLEM: Ada owns 20.", "Ada owns 20."),
        ("paraphrase", "PROBLEM:", None),
        ("paraphrase", "**PROBLEM:** -3 + 5 equals what?", "-3 + 5 equals what?"),
        ("paraphrase", "PROBLEM: (2+3)*4 is?", "(2+3)*4 is?"),
        ("paraphrase", 'PROBLEM: ".5 of $8', ".5 of $8"),
        ("feature", "FEATURE: gains", "gains"),
        ("expansion", " because \n", "because"),
    ],
)
def test_answers_are_read_or_are_rubbish(kind: str, answer: str, text: str | None) -> None:
    if text is None:
        with pytest.raises(ExaminerError):
            READERS[kind](answer)
    else:
        assert READERS[kind](answer) == text


def test_skipped_requests_are_counted_and_nothing_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "claims.jsonl"
    requests = [Request("verdict", f"r/{i}", f"ask {i}") for i in range(4)]
    examiner = Scripted(["VERDICT: right", None, "rubbish", "VERDICT: wrong"])
    found = examine(examiner, requests, patience=ONCE, path=path)
    right, wrong = Claim("verdict", "r/0", "right", "judge"), Claim("verdict", "r/3", "wrong", "judge")
    assert found.claims == [right, None, None, wrong]
    assert found.skipped == {"r/1": "down", "r/2": "no verdict in 'rubbish'"}
    assert load_claims(path) == [right, wrong]
    # A second call asks only what is open; another model's claims are not its own.
    again = Scripted(["VERDICT: wrong", "VERDICT: right"])
    assert [c.text for c in examine(again, requests, patience=ONCE, path=path).claims] == [
        "right",
        "wrong",
        "right",
        "wrong",
    ]
    assert again.asked == ["ask 1", "ask 2"]
    other = Scripted(["VERDICT: wrong"] * 4, name="other")
    assert len(examine(other, requests, patience=ONCE, path=path).claims) == len(other.asked) == 4


def test_an_examiner_that_is_down_is_not_waited_for_at_every_request() -> None:
    waits: list[float] = []
    requests = [Request("verdict", f"r/{i}", f"ask {i}") for i in range(10)]
    told = "VERDICT: right"
    # Five requests of two tries; two of one; an answer, after which there is patience again.
    examiner = Scripted([*[None] * 10, None, None, told, None, told, None, None])
    found = examine(examiner, requests, patience=Patience(tries=2, wait=3.0, sleep=waits.append))
    assert [claim is not None for claim in found.claims] == [*[False] * 7, True, True, False]
    assert waits == [3.0] * 7 and len(examiner.asked) == 17 and len(found.skipped) == 8


def test_what_came_before_a_refusal_is_kept(tmp_path: Path) -> None:
    class Refusing(Scripted):
        def ask(self, prompt: str) -> str:
            if len(self.answers) == 1:
                raise InputError("examiner: no")
            return super().ask(prompt)

    path = tmp_path / "claims.jsonl"
    requests = [Request("verdict", f"r/{i}", "x") for i in range(2)]
    with pytest.raises(InputError):
        examine(Refusing(["VERDICT: right", "VERDICT: right"]), requests, patience=ONCE, path=path)
    assert [claim.subject for claim in load_claims(path)] == ["r/0"]


def test_verdicts_against_rollouts() -> None:
    claims = [Claim("verdict", f"r/{i}", text, "m") for i, text in enumerate(["right", "right", "wrong", "wrong"])]
    tallies = {"r/0": Tally(1, 8), "r/1": Tally(0, 8), "r/2": Tally(0, 8), "r/3": Tally(8, 8)}
    checks = check_verdicts(
        [*claims, None, Claim("verdict", "x", "right", "m"), Claim("clarify", "r/0", "", "m")], tallies
    )
    assert [c and c.checked for c in checks] == [True, False, True, False, None, None, None]
    assert all(claim.checked is None for claim in claims)


def test_paraphrases_keep_their_numbers_and_their_answer() -> None:
    texts = ["Ada owns 20 apples, 5 come in; how many?", "Ada owns 20 apples.", QUESTION.prompt, "5 5 20"]
    claims = [Claim("paraphrase", "q", text, "m") for text in texts]
    assert [c.checked for c in check_paraphrases(claims, [QUESTION])] == [True, False, False, False]
    reached, lost = {"q": Tally(2, 8)}, {"q": Tally(0, 8)}
    good = claims[:1]
    assert [
        check_paraphrases(good, [QUESTION], before, after)[0].checked
        for before, after in [(reached, reached), (reached, lost), (lost, lost)]
    ] == [True, False, True]
    assert check_paraphrases([None, Claim("paraphrase", "y", "5", "m")], [QUESTION])[1].checked is None


def test_questions_in_the_examiners_words(tmp_path: Path) -> None:
    others = [Question(name, f"Bo has {name} pens. How many?", name, solution="as it was") for name in ("3", "4", "5")]
    answers = ["PROBLEM: How many pens are Bo's, who has 3?", "PROBLEM: Bo has 7 pens. How many?", None]
    judge = Scripted([*answers, None, None])
    made, left_out = reword(judge, others, patience=ONCE, path=tmp_path / "claims.jsonl")
    reworded = Question("3~examiner-0", "How many pens are Bo's, who has 3?", "3", solution="as it was")
    assert made == [Variation("3", "examiner", reworded)]
    assert left_out == {"4": "other numbers, or the same words", "5": "down"}
    # What was said is not asked again; what was not said is.
    again, left_out = reword(judge, others, patience=ONCE, path=tmp_path / "claims.jsonl")
    assert again == made and set(left_out) == {"4", "5"} and len(judge.asked) == 4


def test_chains_of_thought_squared() -> None:
    clarifying = [Claim("clarify", "r/0", "Why 20?\nWhy 5?", "judge"), None]
    target = Scripted(["She has them.", None], name="target")
    found = expand(target, QUESTION, STEPS, clarifying, patience=ONCE)
    assert found.claims == [Claim("expansion", "r/0/0", "Q: Why 20?\nA: She has them.", "target"), None]
    assert found.skipped == {"r/0/1": "down"}
    assert "About the last step: Why 20?" in target.asked[0] and "20 + 5 = 25.\n" in target.asked[0]
    reached, lost = Tally(1, 4), Tally(0, 4)
    claims = [Claim("expansion", str(i), "", "m") for i in range(4)]
    before = {"0": reached, "1": reached, "2": lost}
    after = {"0": reached, "1": lost, "2": lost, "3": lost}
    assert [c.checked for c in check_expansions(claims, before, after)] == [True, False, True, None]


def test_an_expansion_stands_behind_its_step_and_can_be_rolled_out(easy) -> None:
    response, tokenizer = easy.responses[0], easy.loaded.tokenizer
    step = decompose(tokenizer, response.completion_ids)[0]
    expanded, start = with_expansion(tokenizer, response, step, "buys 5")
    assert expanded.completion_ids[: step.token_end] == response.completion_ids[: step.token_end]
    assert start == len(expanded.completion_ids) == len(expanded.logprobs) > step.token_end
    assert expanded.text.endswith(" 5") and expanded.text.startswith(step.text)
    roller = Roller(easy.loaded, easy.questions, gsm8k_exact_match, max_new_tokens=start + 4)
    assert roller.tally([expanded], [start], 2) == [Tally(0, 2)]


def test_descriptions_have_to_tell_where_the_feature_fires() -> None:
    claim, yes, no = Claim("feature", "f7", "gains", "m"), "VERDICT: right", "VERDICT: wrong"
    texts = [("she buys", True), ("he eats", False), ("it is", False)]
    assert check_feature(Scripted([yes, no, no]), claim, texts, patience=ONCE).checked is True
    assert check_feature(Scripted([yes, yes, yes]), claim, texts, patience=ONCE).checked is False  # says yes to all
    assert check_feature(Scripted([no, no, no]), claim, texts, patience=ONCE).checked is False
    assert check_feature(Scripted([yes, yes, no]), claim, texts, patience=ONCE).checked is True
    examiner = Scripted([yes, no, no])
    check_feature(examiner, claim, texts, patience=ONCE)
    assert "gains" in examiner.asked[0] and "she buys" in examiner.asked[0]


def test_bad_input_is_one_sentence() -> None:
    for ask in (ask_verdicts, ask_clarifying):
        with pytest.raises(InputError, match="^steps: the chain has none; decompose the response first$"):
            ask("r", QUESTION, [])
    with pytest.raises(InputError, match="^count: 0 is too small"):
        ask_clarifying("r", QUESTION, STEPS, count=0)
    with pytest.raises(InputError, match="^prompt: 'x' is not known; allowed are answer, clarify, detect, feature, "):
        fill_prompt("x")
    with pytest.raises(InputError, match="^prompt: 'paraphrase' needs a value for question; it has other$"):
        fill_prompt("paraphrase", other="1")
    with pytest.raises(InputError, match="^requests: verdict of 'r' is asked twice"):
        examine(Scripted([]), [Request("verdict", "r", "a")] * 2)
    with pytest.raises(InputError, match="^clarifying: 1 claims are given for 2 steps"):
        expand(Scripted([]), QUESTION, STEPS, [None])
    with pytest.raises(InputError, match="^firing: feature f7 has no text"):
        ask_feature("f7", [], ["a"])
    with pytest.raises(InputError, match="^texts: all 1 are of one kind"):
        check_feature(Scripted([]), Claim("feature", "f", "x", "m"), [("a", True)])


def test_half_a_line_is_cut_off_before_the_next_claim(tmp_path: Path) -> None:
    path = tmp_path / "claims.jsonl"
    requests = [Request("verdict", f"r/{i}", f"ask {i}") for i in range(2)]
    examine(Scripted(["VERDICT: right", "VERDICT: right"]), requests, patience=ONCE, path=path)
    path.write_bytes(path.read_bytes()[:-9])
    again = Scripted(["VERDICT: wrong"])
    found = examine(again, requests, patience=ONCE, path=path)
    assert again.asked == ["ask 1"] and [claim.text for claim in found.claims] == ["right", "wrong"]
    assert load_claims(path) == found.claims


def test_another_chain_of_the_same_name_is_asked_anew(tmp_path: Path) -> None:
    path = tmp_path / "claims.jsonl"
    (first,), (second,) = (ask_verdicts("r", QUESTION, [step]) for step in STEPS)
    assert first.subject == second.subject
    examine(Scripted(["VERDICT: right"]), [first], patience=ONCE, path=path)
    examine(Scripted(["VERDICT: wrong"]), [second], patience=ONCE, path=path)
    examine(Scripted(["VERDICT: wrong"], name="other"), [first], patience=ONCE, path=path)
    silent = Scripted([])
    assert [examine(silent, [one], path=path).claims[0].text for one in (first, second)] == ["right", "wrong"]


@pytest.mark.parametrize(
    "line", ['{"kind": "verdict"}', '{"kind": "mood", "subject": "r", "text": "", "model": "m"}', "[]", "no json", ""]
)
def test_a_line_that_is_no_claim_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "claims.jsonl"
    examine(Scripted(["VERDICT: right"]), [Request("verdict", "r", "?")], patience=ONCE, path=path)
    with path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(
        InputError, match=r"^claims: line 2 of .*claims.jsonl is no claim; it needs subject, text, model"
    ):
        load_claims(path)


@pytest.mark.parametrize(
    ("prompt", "told", "kept"),
    [
        ("Calculate -3 + 5.", "What do -3 and 5 come to?", True),
        ("Calculate -3 + 5.", "What do 3 and 5 come to?", False),
        ("Calculate \u22123 + 5.", "What do -3 and 5 come to?", True),
        ("Calculate 8-3.", "Take 3 from 8.", True),
        ("Calculate (8)-3.", "Take 3 from 8.", True),
        ("Half of 8 is .5 of it.", "Of 8, .5 is half.", True),
        ("Half of 8 is .5 of it.", "Of 8, 5 is half.", False),
        ("1,000.50 or 7?", "7 or 1,000.50?", True),
        ("1,000.50 or 7?", "7 or 1,000?", False),
    ],
)
def test_numbers_keep_their_signs(prompt: str, told: str, kept: bool) -> None:
    claim = Claim("paraphrase", "q", told, "m")
    assert check_paraphrases([claim], [Question("q", prompt, "2")])[0].checked is kept
