"""docs/walk.md is true: each block prints what is below it, and the names it links to are in the files it says.

After an intended change, this command runs the blocks and writes their output into the page:

    python -m tests.test_walk
"""

from __future__ import annotations

import ast
import difflib
import io
import re
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from minisobert.config import PRESETS, RECIPES, TrainConfig
from minisobert.corpus.masking import TO_MASK, TO_RANDOM

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/walk.md"
BLOCK = re.compile(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```\n)?", re.S | re.M)
NUMBER = re.compile(r"(?<![\w.,])\d+(?:,\d{3})*(?:\.\d+)?")


def with_outputs(page: str) -> str:
    """The page with the output that its blocks print when they run in order, in one namespace."""
    names: dict = {"__name__": "walk"}

    def with_output(block: re.Match) -> str:
        printed = io.StringIO()
        with redirect_stdout(printed):
            exec(block[1], names)
        return f"```python\n{block[1]}```\n\n```text\n{printed.getvalue().rstrip()}\n```\n"

    return BLOCK.sub(with_output, page)


def test_each_block_prints_what_is_below_it(monkeypatch):
    monkeypatch.chdir(ROOT)
    page = PAGE.read_text()
    printed = with_outputs(page).splitlines()
    difference = difflib.unified_diff(page.splitlines(), printed, "docs/walk.md", "what it prints", lineterm="", n=0)
    assert "\n".join(difference) == "", "python -m tests.test_walk writes what the blocks print into the page"


def test_the_text_names_no_number_that_no_block_shows():
    """So that no sentence is forgotten when the numbers change."""
    shown = {number for block in BLOCK.finditer(PAGE.read_text()) for number in NUMBER.findall(block[0])}
    of_the_library = {
        f"{TrainConfig.row_tokens:,}", str(PRESETS["modern-base"].window), str(TO_MASK), str(TO_MASK + TO_RANDOM),
        str(RECIPES["modern-tiny"]["learning_rate"]),
    }  # fmt: skip
    text = re.sub(r"\]\([^)]*\)", "]", BLOCK.sub("", PAGE.read_text()))
    assert set(NUMBER.findall(text)) - shown - of_the_library == set()


def defined(path: Path) -> set[str]:
    """The names that a file defines, including those like `Class.method`."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            own = [each.target if isinstance(each, ast.AnnAssign) else each for each in node.body]
            names |= {f"{node.name}.{getattr(each, 'name', getattr(each, 'id', ''))}" for each in own}
        if isinstance(node, ast.Assign):
            names |= {name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)}
    return names


@pytest.mark.parametrize("page", ["walk.md", "glossary.md"])
def test_names_are_defined_in_the_files_they_link_to(page):
    links = re.findall(r"\[`([\w.]+)`\]\(([\w./]+\.py)\)", (ROOT / "docs" / page).read_text())
    assert len(links) > 10
    assert {(name, file) for name, file in links if name not in defined(ROOT / "docs" / file)} == set()


if __name__ == "__main__":
    PAGE.write_text(with_outputs(PAGE.read_text()))
