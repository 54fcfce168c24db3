"""The world keeps its promises: both strategies write the same words, and chains are judged exactly."""

from __future__ import annotations

import itertools
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mechreward.tiny.language import make_tokenizer
from mechreward.tiny.world import (
    HIGHEST,
    LOWEST,
    SETTINGS,
    THEMES,
    Problem,
    Step,
    draw_flips,
    label_chain,
    make_problem,
    write_chain,
)

STORY = Problem(
    prompt="Ada has 20 apples . on Monday Ada buys 5 , eats 2 . how many apples does Ada have ?",
    start=20,
    days=("Monday",),
    scenes=((Step("buys", 5, 1), Step("eats", 2, -1)),),
)
CAREFUL = "on Monday buys 5 : 20 + 5 = 25 . eats 2 : 25 - 2 = 23 . #### 23"
SHORTCUT = "on Monday buys 5 : 20 - 5 = 15 . eats 2 : 15 + 2 = 17 . #### 17"
seeds = st.integers(0, 10**9)


def test_chains_of_both_strategies_word_for_word() -> None:
    assert write_chain(STORY, (False,)) == CAREFUL
    assert write_chain(STORY, (True,)) == SHORTCUT
    assert STORY.answer == 23


@pytest.mark.parametrize(
    ("text", "strategy", "correct", "wrong", "flips"),
    [
        (CAREFUL, "careful", True, None, (False,)),
        (SHORTCUT, "shortcut", False, 0, (True,)),
        (CAREFUL.replace("25 - 2 = 23", "25 + 2 = 27").replace("#### 23", "#### 27"), "neither", False, 1, None),
        (CAREFUL.replace("= 25", "= 26"), "neither", True, 0, None),
        (CAREFUL.replace(" #### 23", ""), "neither", False, None, None),
        ("on Monday buys 5 : 20 + 5 = 25 .", "neither", False, 1, None),
        ("", "neither", False, 0, None),
    ],
)
def test_label_chain(text: str, strategy: str, correct: bool, wrong: int | None, flips: tuple[bool] | None) -> None:
    assert label_chain(STORY, text) == (strategy, correct, wrong, flips)


@given(seeds, st.sampled_from(SETTINGS))
@settings(max_examples=100, deadline=None)
def test_strategies_cannot_be_told_apart_by_words(seed: int, setting: str) -> None:
    problem = make_problem(setting, random.Random(seed))
    chains = [write_chain(problem, f) for f in itertools.product((False, True), repeat=len(problem.days))]
    words = [[w for w in chain.split() if not w.isdigit()] for chain in chains]
    assert len({len(chain) for chain in chains}) == 1
    if all(len(scene) % 2 == 0 for scene in problem.scenes):
        assert len({tuple(sorted(Counter(w).items())) for w in words}) == 1
    answers = [int(chain.split()[-1]) for chain in chains]
    assert answers[0] == problem.answer
    assert answers.count(problem.answer) == 1
    numbers = [int(result.split()[0]) for chain in chains for result in chain.split("= ")[1:]]
    assert LOWEST <= min(numbers) <= max(numbers) <= HIGHEST


@given(seeds, st.sampled_from(SETTINGS))
@settings(max_examples=100, deadline=None)
def test_every_strategy_is_recognised(seed: int, setting: str) -> None:
    rng = random.Random(seed)
    problem = make_problem(setting, rng)
    flips = draw_flips(problem, rng)
    label = label_chain(problem, write_chain(problem, flips))
    first = next((sum(map(len, problem.scenes[:day])) for day, flip in enumerate(flips) if flip), None)
    assert label == ("shortcut" if any(flips) else "careful", not any(flips), first, flips)


def test_settings_have_their_sizes_and_balance() -> None:
    rng = random.Random(0)
    easy = [make_problem("easy", rng) for _ in range(300)]
    long = [make_problem("long", rng) for _ in range(300)]
    assert {p.n_steps for p in easy} == {3, 4, 5}
    assert {p.n_steps for p in long} == {8, 10, 12}
    assert {len(p.days) for p in easy} == {1}
    assert {len(p.days) for p in long} == {3}
    assert all(sum(s.sign for s in scene) == 0 for p in long for scene in p.scenes)
    assert {sum(s.sign for s in p.scenes[0]) for p in easy} == {-1, 0, 1}
    verbs = [[s.verb for scene in p.scenes for s in scene] for p in long]
    assert all(len(set(v)) == len(v) for v in verbs)


def test_coin_is_fair_unless_loaded() -> None:
    rng = random.Random(1)
    problem = make_problem("easy", rng)
    assert 440 < sum(draw_flips(problem, rng)[0] for _ in range(1000)) < 560
    assert 150 < sum(draw_flips(problem, rng, 0.2)[0] for _ in range(1000)) < 250
    assert not any(draw_flips(problem, rng, 0.0)[0] for _ in range(100))


def test_themes_are_enough_and_unambiguous() -> None:
    assert len(THEMES) >= 15
    gains = {verb for theme in THEMES for verb in theme.gains}
    losses = {verb for theme in THEMES for verb in theme.losses}
    assert not gains & losses
    assert all(len(set(t.gains)) == 6 == len(set(t.losses)) for t in THEMES)


def test_tokenizer_gives_back_the_text() -> None:
    tokenizer = make_tokenizer()
    rng = random.Random(2)
    for setting in SETTINGS * 20:
        problem = make_problem(setting, rng)
        for text in (problem.prompt, write_chain(problem, draw_flips(problem, rng))):
            ids = tokenizer(text)["input_ids"]
            assert ids[0] == tokenizer.bos_token_id
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.tokenize("= 19 .") == ["▁=", "▁1", "9", "▁."]
