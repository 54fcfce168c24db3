"""Where steps begin: texts with the places marked by hand, and what holds for any text."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mechreward.chains import split_steps, step_starts

MARKED = [
    # Sentences, and what is no end of one.
    "Mr. Smith has 3.14 apples.| He eats 1,234.5, e.g. red ones.| See https://a.b/c.d?e=f!| And on.",
    "Is it?| Yes!| \"So it is.\"| (It is.)| **No.**| x.",
    "Wait...| let me see…| ok",
    "on Monday buys 5 : 20 + 5 = 25 .| eats 2 : 25 - 2 = 23 .| #### 23",
    "so x is 3.| y is 4.| z",
    "At 5 p.m. we go.| At 6 p.m.| We stay, i.e. here.| The U.S. army left.| In the U.S.| All is well.",
    "As Fig. 3 and Eq. (2) show, No. 5 wins.| Is it so?| No.| It is not.",
    "By J. Smith.| The answer is B.| Then comes I.| So be it.",
    "Apples, pears, etc. are fruit.| And so on, etc.| Then more, by Lee et al. (2019).| End",
    "好。|行！|「是。」|对。\n|x",
    # Lines.
    "a b\n|c d\n\n|e",
    "a. \n| b\n \n| c",
    "a\r\n\r\n|b\r\n|c",
    "x.",
    "  \n x. y",
    # Counted steps.
    "1. Compute 2 + 3.| It is 5.\n|2. Then 6.\n|(b). Yes.| No.",
    "Step 1. We add.| Step 2. We stop.| part 3. c",
    "Say 1.| a",
    # Formulas and code.
    "So $x = 1. 5$ and $$a. B\n. c$$ ok.| \\(a. B\\) or \\[ a. B\n c \\] hold.| Yes",
    "It costs $5 here.| And $7 there.| ok",
    "A \\$5.| x$ b.| c$ d",
    "Open $a.| B\n|and \\[ c.| d",
    "\\begin{align} x &= 1. \\\\\n y &= 2. \\end{align} So.| \\begin{proof} a.| b \\end{proof}",
    "We have\n|\\item one.| Two\n|\\item two |\\item three",
    "Run `a. B` now.| Then `c.| d",
    "Text:\n|```python\na = 1.\n\nprint(a). B\n```\n|Done.| ok",
    "Text:\n|```python\na = 1.\n\nb. c",
    "Text:\n|```\na\n```\n\n|b",
]  # fmt: skip


@pytest.mark.parametrize("marked", MARKED)
def test_steps_are_those_marked(marked: str) -> None:
    assert split_steps(marked.replace("|", "")) == marked.split("|")


PIECES = [
    "a",
    "B",
    "1",
    "3.14",
    ".",
    "!",
    " ",
    "\n",
    "$",
    "```",
    "\\[",
    "\\]",
    "e.g.",
    "Mr.",
    "。",
    "Step",
    "2.",
    "(",
    ")",
]


@given(st.lists(st.sampled_from(PIECES), max_size=40).map("".join))
def test_steps_cover_any_text_and_none_is_empty(text: str) -> None:
    steps = split_steps(text)
    assert "".join(steps) == text
    assert step_starts(text) == [sum(map(len, steps[:i])) for i in range(len(steps))]
    if text.strip():
        assert all(step.strip() for step in steps)


@given(st.lists(st.sampled_from(PIECES), max_size=25).map("".join))
def test_numbers_and_abbreviations_are_never_cut(text: str) -> None:
    starts = set(step_starts(text))
    for word in ("3.14", "e.g", "Mr"):
        place = text.find(word)
        while place >= 0:
            assert not starts & set(range(place + 1, place + len(word)))
            place = text.find(word, place + 1)


def test_a_long_text_takes_no_long_time() -> None:
    hostile = "\\[ $ \\( `" * 3000
    assert len(split_steps(hostile)) >= 1
    started = time.process_time()
    assert split_steps("." * 60_000 + "! So it is") == ["." * 60_000 + "!", " So it is"]
    assert time.process_time() - started < 5  # a minute where every mark begins a search of its own


@pytest.mark.parametrize(("opened", "closed"), [("\\[", "\\]"), ("\\(", "\\)"), ("$$", "$$"), ("$", "$")])
def test_a_formula_is_one_up_to_four_thousand_characters(opened: str, closed: str) -> None:
    inside = "a. B" + "x" * 3992 + "c. D"
    assert split_steps(f"{opened}{inside}{closed} holds. End") == [f"{opened}{inside}{closed} holds.", " End"]
    longer = split_steps(f"{opened}{inside}y{closed} holds. End")
    assert longer[0] == f"{opened}a." and longer[-1] == " End" and len(longer) == 4
