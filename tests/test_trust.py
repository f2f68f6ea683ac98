"""docs/trust.md cannot rot: what it cites exists, its figures stand where their links lead, and its commands run it.

How the page writes what these tests read:

    [losses within **1e-5**](../tests/FILE.py#NAME)    the number 1e-5 is written in the function or constant NAME
    [**800** kills](../benchmarks/results/FILE.md)     the number 800 is written on that page
    | … | `tests/FILE.py -k WORD`, 10 s |              runs every test that the row cites
"""

from __future__ import annotations

import ast
import re
import shlex
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/trust.md"
TEXT = PAGE.read_text()
ROWS = re.findall(r"^(\| (?!What is promised)[^|]+ \|.*\|)$", TEXT, re.M)
LINK = re.compile(r"\[([^][]*)\]\(([^)#\s]+)(?:#(\w+))?\)")  # text, path, name
FIGURE = re.compile(r"\*\*(\d[^*]*)\*\*")
WRITTEN = re.compile(r"(?<![\w.])\d+(?:,\d{3})*(?:\.\d+)*")  # in a text, also 0.16.1


def value(figure: str) -> float | str:
    try:
        return float(figure.replace(",", ""))
    except ValueError:  # a version
        return figure


def definitions(path: Path) -> dict[str, ast.stmt]:
    """The functions, classes and constants of a file."""
    found: dict[str, ast.stmt] = {}
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found[node.name] = node
        elif isinstance(node, ast.Assign):
            names = (name for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name))
            found |= {name.id: node for name in names}
    return found


def numbers(path: Path, name: str) -> Counter:
    """How often each number is written in the definition of a name, or in all of a file."""
    if not name:
        return Counter(map(value, WRITTEN.findall(path.read_text())))
    definition = definitions(path).get(name, ast.Pass())
    constants = (node.value for node in ast.walk(definition) if isinstance(node, ast.Constant))
    return Counter(float(number) for number in constants if type(number) in (int, float))


def cited(text: str) -> list[tuple[str, Path, str]]:
    """(text, file, name) of each link."""
    return [(said, (PAGE.parent / path).resolve(), name) for said, path, name in LINK.findall(text)]


def unfounded(text: str) -> list[str]:
    """The figures in bold that stand in no link, and those that do not stand where their link leads.

    What is less than 1 is a tolerance, and has to be there as often as it is said, or one of two could grow unseen.
    """
    wrong = FIGURE.findall(LINK.sub("", text))
    for said, path, name in cited(text):
        for figure, times in Counter(map(value, FIGURE.findall(said))).items():
            there = numbers(path, name)[figure]
            if times > there or (name and figure < 1 and times < there):
                wrong.append(f"{path.name}#{name} has {figure} {there} times: {said}")
    return wrong


def test_every_name_is_defined_in_the_file_it_links_to():
    links = [(path, name) for _, path, name in cited(TEXT) if name]
    assert len(links) > 50
    assert {f"{path.name}#{name}" for path, name in links if name not in definitions(path)} == set()


def test_every_figure_stands_where_its_link_leads():
    assert len(FIGURE.findall(TEXT)) > 40
    assert unfounded(TEXT) == []


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_the_command_of_a_row_runs_every_test_that_it_cites(row):
    (command,) = re.findall(r"`(tests/[^`]*)`", row)
    words = shlex.split(command)
    paths, word = (words[:-2], words[-1]) if "-k" in words else (words, "")
    assert all((ROOT / path).exists() for path in paths)
    tests = [(path, name) for _, path, name in cited(row) if name.startswith("test_")]
    run = [name for path, name in tests if word in name and any(path.is_relative_to(ROOT / at) for at in paths)]
    assert run == [name for _, name in tests]


def test_nothing_has_run_on_a_gpu_while_the_page_says_so():
    """`python -m benchmarks.gpu --write` leaves its figures there."""
    assert ("Nothing here has run on a GPU" in TEXT) != (ROOT / "benchmarks/results/gpu/gpu.md").exists()


SAMPLE = [5e-4, 0.0005, 7, 7, "8", True]


@pytest.mark.parametrize(
    ("said", "founded"),
    [
        ("[**5e-4** and **0.0005**](../tests/test_trust.py#SAMPLE)", True),
        ("[**5e-4**](../tests/test_trust.py#SAMPLE)", False),  # it is there twice
        ("[**5e-3**](../tests/test_trust.py#SAMPLE)", False),
        ("[**7**](../tests/test_trust.py#SAMPLE)", True),
        ("[**7**, **7** and **7**](../tests/test_trust.py#SAMPLE)", False),  # it is there twice
        ("[**8**](../tests/test_trust.py#SAMPLE)", False),
        ("[**1**](../tests/test_trust.py#SAMPLE)", False),
        ("**7**", False),
        ("[megatron-core **0.16.1**](../setup.cfg)", True),
        ("[megatron-core **0.16**](../setup.cfg)", False),
    ],
)
def test_a_figure_is_founded_where_it_is_written_as_often(said, founded):
    assert (unfounded(said) == []) == founded
