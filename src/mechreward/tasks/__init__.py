"""Questions: what one is, where they come from, and how they part into KNOWN and UNKNOWN.

Importable by every room below; imports only `mechreward.errors`, `mechreward.files` and, lazily, data sources.
"""

from mechreward.tasks.fuzz import KINDS, Variation, fuzz
from mechreward.tasks.load import QUESTION_SETTINGS, Columns, load_questions
from mechreward.tasks.marker import MARKER, after_marker
from mechreward.tasks.question import Question
from mechreward.tasks.split import QuestionSplit, join_sides, load_split, save_questions, split_questions
from mechreward.tasks.texts import load_texts

__all__ = [
    "KINDS",
    "MARKER",
    "QUESTION_SETTINGS",
    "Columns",
    "Question",
    "QuestionSplit",
    "Variation",
    "after_marker",
    "fuzz",
    "join_sides",
    "load_questions",
    "load_split",
    "load_texts",
    "save_questions",
    "split_questions",
]
