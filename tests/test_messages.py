"""Raised messages: one sentence with the constraint, the value and a remedy, in plain English."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import scoresde

ROOT = Path(scoresde.__file__).parent
HABITS = {
    "verdict": r"(?<!there )\b(is|are) no(ne)?\b(?! (longer|more|less|better))",
    "give": r"[;:,] give\b",
    "leave out": r"\bleave [^.;]{0,20}out\b",
    "no rule": r"\bcannot be used\b|\bdo(es)? not fit\b",
    "person": r"\b(knows?|wants?|refuses?|(is|are|was) told)\b",
}


FILES = sorted(ROOT.rglob("*.py"))
each_file = pytest.mark.parametrize(
    "path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix()
)


def texts(path: Path) -> Iterator[str]:
    """The messages of a file, with {} for values."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        raised = node.exc if isinstance(node, ast.Raise) else None
        if isinstance(raised, ast.Call) and ast.unparse(raised.func) in {
            "InputError",
            "SolverError",
        }:
            yield flat(raised.args[0])


def flat(node: ast.expr) -> str:
    if isinstance(node, ast.JoinedStr):
        return "".join(map(flat, node.values))
    return str(node.value) if isinstance(node, ast.Constant) else "{}"


def habits_of(text: str) -> list[str]:
    return [habit for habit, pattern in HABITS.items() if re.search(pattern, text)]


def test_there_are_messages() -> None:
    assert sum(1 for path in FILES for _ in texts(path)) > 500


@each_file
def test_messages_state_constraints_in_plain_english(path: Path) -> None:
    assert not [(text, found) for text in texts(path) if (found := habits_of(text))]


@each_file
def test_messages_are_sentences(path: Path) -> None:
    assert not [text for text in texts(path) if not text.endswith((".", "{}"))]


@pytest.mark.parametrize(
    "text",
    ["x=3 is no count.", "x is 3; give 1.", "leave x out.", "x cannot be used.", "x wants y."],
)
def test_a_habit_is_found(text: str) -> None:
    assert habits_of(text)
