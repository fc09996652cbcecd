"""The pages of theory: each of their formulas names the tests that check it, and these exist."""

import ast
import re
from pathlib import Path

import pytest

from tests.test_run import ROOT

PAGES = sorted((ROOT / "docs/theory").glob("*.md"))
TEST = re.compile(r"`(tests/\w+\.py)::(\w+)`")


def functions_of(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_formula_has_a_test_by_name(page: Path) -> None:
    _, *others = page.read_text(encoding="utf-8").split("$$\n")
    assert len(others) >= 12  # six formulas, and the text after each
    assert len(others) % 2 == 0
    for formula, text in zip(others[::2], others[1::2], strict=True):
        assert TEST.search(text), formula


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_the_tests_that_a_page_names_exist(page: Path) -> None:
    found = TEST.findall(page.read_text(encoding="utf-8"))
    for file, name in found:
        assert name in functions_of(ROOT / file), f"{file}::{name}"


def test_every_page_is_on_the_site() -> None:
    site = (ROOT / "docs/navigation/site.txt").read_text(encoding="utf-8")
    pages = [*PAGES, *(ROOT / "docs").glob("*.md"), *(ROOT / "docs/guide").glob("*.md")]
    for page in [*pages, *(ROOT / "docs/notebooks").glob("*.md")]:
        assert f"{page.relative_to(ROOT).with_suffix('')}\n" in site
