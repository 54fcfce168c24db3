"""Variations of tiny problems: what each kind changes, what it keeps, and that the answer stays the right one."""

from __future__ import annotations

import random
import re

import pytest

from mechreward.errors import InputError
from mechreward.tasks import Question, load_questions
from mechreward.tasks.fuzz import KINDS, allowed_kinds, fuzz, is_sound, read_story
from mechreward.tiny.world import Problem, Step, label_chain, make_problem

QUESTIONS = [*load_questions("tiny:easy", limit=12, seed=5), *load_questions("tiny:long", limit=8, seed=5)]


def test_every_problem_is_read_back_exactly() -> None:
    rng = random.Random("read back")
    for setting in ("easy", "long"):
        for _ in range(60):
            problem = make_problem(setting, rng)
            story = read_story(problem.prompt)
            assert story is not None and story.problem == problem and story.tell() == problem.prompt
            assert is_sound(problem)
    assert read_story("Ada has 12 apples . how many apples does Ada have") is None
    assert read_story("What is 3 + 4 ?") is None


def words(prompt: str) -> list[str]:
    return sorted(word for word in re.sub(r"[,.?]", "", prompt).split())


def count_by_hand(prompt: str) -> int:
    """The answer read off the text of the story's own person, without the module's own reading."""
    from mechreward.tiny.world import THEMES

    theme = next(t for t in THEMES if prompt.endswith(t.ask.split("{")[0]) or t.ask.split("{name}")[0] in prompt)
    opening = re.match(
        re.sub(r"\{\w+\}", r"(\\w+)", re.escape(theme.opening).replace(r"\{", "{").replace(r"\}", "}")), prompt
    )
    assert opening is not None
    total = int(next(group for group in opening.groups() if group.isdigit()))
    for day in re.findall(r"on \w+day \w+ ([^.]*) \.", prompt):
        for verb, amount in re.findall(r"([a-z-]+) (\d+)", day):
            total += int(amount) if verb in theme.gains else -int(amount)
    return total


@pytest.mark.parametrize("kind", list(KINDS))
def test_answers_are_right_and_ids_are_new(kind) -> None:
    n = 1 if kind == "paraphrase" else 2
    made = fuzz(QUESTIONS, [kind], n, seed=1)
    whole = [q.id for q in QUESTIONS for _ in range(n)]
    assert [v.of for v in made] == whole or (kind == "order" and set(v.of for v in made) <= set(whole))
    assert len(made) > 0.8 * len(whole)
    ids, prompts = {v.question.id for v in made}, {v.question.prompt for v in made}
    assert len(ids) == len(prompts) == len(made)
    assert not ids & {q.id for q in QUESTIONS} and not prompts & {q.prompt for q in QUESTIONS}
    assert made == fuzz(QUESTIONS, [kind], n, seed=1)
    for variation in made:
        question = variation.question
        assert question.answer == str(count_by_hand(question.prompt)) == question.solution.split()[-1]
        original = next(q for q in QUESTIONS if q.id == variation.of)
        assert (question.answer == original.answer) or kind == "numbers"


def test_what_each_kind_changes() -> None:
    question = QUESTIONS[-1]
    made = {v.kind: v.question.prompt for v in fuzz([question], list(KINDS), seed=2)}
    before, story = question.prompt, read_story(question.prompt)
    assert story is not None
    assert words(made["order"]) == words(before) and made["order"] != before
    assert re.sub(r"\d+", "0", made["numbers"]) == re.sub(r"\d+", "0", before)
    new = set(words(made["names"])) - set(words(before))
    assert len(new) == 1 and made["names"].replace(new.pop(), story.name) == before
    days = len(story.problem.days)
    assert made["paraphrase"].count("on ") == story.problem.n_steps > days == before.count("on ")
    opening = before.index(" .") + 2
    assert made["irrelevant"].startswith(before[:opening]) and made["irrelevant"].endswith(before[opening:])
    aside = made["irrelevant"][opening : -len(before[opening:])]
    assert story.name not in aside and re.fullmatch(r" .*\d\d.* \.", aside)


def test_solutions_label_as_careful_chains() -> None:
    for variation in fuzz(QUESTIONS[:6], ["order", "numbers"], seed=3):
        story = read_story(variation.question.prompt)
        assert story is not None and label_chain(story.problem, variation.question.solution).strategy == "careful"


def test_soundness() -> None:
    def problem(start: int, *scenes: tuple[int, ...]) -> Problem:
        steps = tuple(tuple(Step("x", abs(a), 1 if a > 0 else -1) for a in scene) for scene in scenes)
        return Problem("", start, ("Monday", "Tuesday")[: len(scenes)], steps)

    assert is_sound(problem(50, (4, -2)))
    assert not is_sound(problem(50, (4, -4)))  # Backwards gives the same answer.
    assert not is_sound(problem(50, (4,), (-4,)))  # As do both days backwards.
    assert is_sound(problem(19, (9,))) and not is_sound(problem(18, (9,)))  # Backwards 9 has one digit.
    assert is_sound(problem(90, (9,))) and not is_sound(problem(91, (9,)))


def test_other_texts_take_an_irrelevant_sentence() -> None:
    plain = Question("g", "Tom has 3 pens. How many?", "3", "3")
    (made,) = fuzz([plain], ["irrelevant"])
    assert made.question == Question(
        "g~irrelevant-0", "The weather was fine all day. Tom has 3 pens. How many?", "3", "3"
    )


def cornered() -> Question:
    """Any other order of its changes passes through a count of three digits, or of one, read one way or the other."""
    text = "Ada has 92 apples . on Monday Ada buys 7 , eats 9 . how many apples does Ada have ?"
    assert read_story(text) is not None
    return Question("c", text, "90")


def test_a_question_may_have_fewer_variations() -> None:
    assert len(fuzz(QUESTIONS[:1], ["paraphrase"], 2)) == 1
    assert len(fuzz(QUESTIONS[:1], ["names"], 40)) == 15


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ((QUESTIONS, []), "at least one kind"),
        ((QUESTIONS, ["names"], 0), "0 of each"),
        ((QUESTIONS, ["mood"]), "kinds: 'mood' is not known; allowed are names, numbers"),
        (([Question("g", "Why?", "1")], ["names"]), "names 0 of g needs a problem of the tiny world"),
        (([Question("g", "Why?", "1")], ["irrelevant"], 2), "irrelevant 1 of g needs"),
        (([cornered()], ["names", "order"]), "none of 1 questions has a variation of the kind order"),
    ],
)
def test_bad_input(arguments, sentence) -> None:
    with pytest.raises(InputError, match=sentence):
        fuzz(*arguments)


def test_an_aside_is_about_somebody_and_something_else() -> None:
    for seed in range(6):
        for variation in fuzz(QUESTIONS, ["irrelevant"], seed=seed):
            story = read_story(next(q.prompt for q in QUESTIONS if q.id == variation.of))
            assert story is not None
            opening = story.theme.opening.format(name=story.name, n=story.problem.start)
            aside = variation.question.prompt.removeprefix(opening + " ").split(" . ")[0]
            own = (
                re.escape(story.theme.opening.removesuffix(" .")).replace(r"\{name\}", r"\w+").replace(r"\{n\}", r"\d+")
            )
            assert story.name not in aside.split() and not re.fullmatch(own, aside)


def test_another_seed_tells_other_stories() -> None:
    first, second = (fuzz(QUESTIONS, ["names", "numbers", "irrelevant"], seed=seed) for seed in (1, 2))
    differ = [a.question.prompt != b.question.prompt for a, b in zip(first, second, strict=True)]
    assert sum(differ) > 0.8 * len(differ)


def test_a_text_that_would_be_told_otherwise_is_no_story() -> None:
    told = "Ada has 20 apples . on Monday Ada buys 4 . how many apples does Ada have ?"
    assert read_story(told) is not None
    assert read_story(told.replace("Monday Ada", "Monday Bob")) is None
    assert read_story(told.replace("does Ada", "does Bob")) is None
    assert read_story(told.replace(" 4 . how", " 4 . Bob eats 3 . how")) is None


def test_other_numbers_give_another_answer() -> None:
    """The problem has one change: by chance every seventh draw would come to the answer there was."""
    text = "Ada has 20 apples . on Monday Ada buys 4 . how many apples does Ada have ?"
    question = Question("one", text, "24")
    made = [v for seed in range(6) for v in fuzz([question], ["numbers"], 40, seed)]
    assert len(made) == 240 and "24" not in {v.question.answer for v in made}


def test_kinds_that_a_text_allows() -> None:
    assert allowed_kinds(QUESTIONS) == tuple(KINDS)
    assert allowed_kinds([*QUESTIONS, Question("g", "Why?", "1")]) == ("irrelevant",)
