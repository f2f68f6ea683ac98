"""docs/recipes.md is true: its plans are what the commands print now, the table shows their figures, commands parse.

What the laptop's commands printed depends on the machine, so no test repeats it.
"""

from __future__ import annotations

import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest

from minisobert import cli
from minisobert.config import PRESETS, TrainConfig, padded_vocabulary
from minisobert.planning.forecast import parameters
from minisobert.planning.report import report
from tests.test_help import main_of, parse

PAGE = Path(__file__).parents[2] / "docs/recipes.md"
BLOCK = re.compile(r"^```console\n(.*?)^```$", re.S | re.M)
DECIMAL = re.compile(r"(?<![\d.])\d+\.\d+(?![\d.e])")


class Command(NamedTuple):
    words: list[str]
    output: list[str]

    @property
    def options(self) -> TrainConfig | None:
        """Those of a training, however it is started."""
        for script in ("train.py", "docs/train.sbatch"):
            if script in self.words:
                return cli.parse(TrainConfig, self.words[self.words.index(script) + 1 :])
        return None


def commands(text: str) -> list[Command]:
    """Those of the console blocks, with what stands below each."""
    found = []
    for block in BLOCK.findall(text):
        for part in re.split(r"^\$ ", re.sub(r"\\\n", "", block), flags=re.M)[1:]:
            line, *output = part.splitlines()
            found.append(Command(shlex.split(line), output))
    return found


def anchor(heading: str) -> str:
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


SECTIONS = {anchor(text.split("\n", 1)[0]): text for text in re.split(r"^## ", PAGE.read_text(), flags=re.M)}
PLANNED = [name for name, text in SECTIONS.items() if "--plan -" in text]


def plans(section: str) -> list[Command]:
    return [command for command in commands(SECTIONS[section]) if command.options and command.options.plan]


def sizes(options: TrainConfig) -> tuple:
    return options.preset, options.train_tokens, options.tokens_per_batch


@pytest.mark.parametrize("section", PLANNED)
def test_a_plan_prints_what_the_page_shows(section, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where there is no data whose vocabulary the plan would take
    for command in plans(section):
        printed = iter(report(command.options).splitlines())
        assert command.output and all(line in printed for line in command.output), command  # in order


@pytest.mark.parametrize("section", PLANNED)
def test_a_recipe_trains_what_it_plans(section):
    planned = {sizes(command.options) for command in plans(section)}
    trained = {sizes(command.options) for command in commands(SECTIONS[section]) if command.options} - planned
    assert planned and not trained


@pytest.mark.parametrize("section", PLANNED)
def test_decimals_in_the_text_of_a_plan_are_its_own_or_those_of_a_page_it_links_to(section):
    text = SECTIONS[section]
    pages = [(PAGE.parent / link).read_text() for link in re.findall(r"\]\(([^)#]+\.md)", text)]
    shown = {number for part in (*BLOCK.findall(text), *pages) for number in DECIMAL.findall(part)}
    assert set(DECIMAL.findall(BLOCK.sub("", text))) - shown == set()


def test_the_table_has_the_figures_of_the_plans():
    found = set()
    for row in re.findall(r"^\| \[.*$", PAGE.read_text(), re.M):
        section, options, takes = re.search(r"\(#(.*?)\).*`(.*)`[^|]*\| (.*?) \|$", row).groups()
        if not (hours := re.search(r"([\d.]+) hours", takes)):
            assert section not in PLANNED
            continue
        found.add(section)
        tokens = cli.parse(TrainConfig, ["--train-tokens", options.split()[-1]]).train_tokens
        preset = re.search(r"--preset (\S+)", options)
        dollars = re.search(r"\$([\d,]+)", takes)
        (cells,) = (
            command.output[-1].split()
            for command in plans(section)
            if command.options.train_tokens == tokens and (not preset or preset[1] == command.options.preset)
        )
        assert (hours[1], dollars[1] if dollars else "0") == tuple(cells[13:15])
    assert found == set(PLANNED)


def test_links_within_the_page_lead_to_its_headings():
    assert set(re.findall(r"\]\(#(.*?)\)", PAGE.read_text())) <= SECTIONS.keys()


def test_parameters_with_few_and_with_many_pieces():
    said = re.search(r"has ([\d.]+)\s+million parameters.*?has ([\d.]+)\s+million", PAGE.read_text(), re.S)
    for number, pieces in zip(said.groups(), (4_000, 50_000)):
        model = replace(PRESETS["modern-tiny"], vocabulary=padded_vocabulary(pieces))
        assert number == f"{parameters(model) / 1e6:.1f}"


def test_the_presets_have_the_sizes_that_the_page_says():
    names, millions, sizes = (
        [cell.strip() for cell in line.split("|")[2:-1]]
        for line in re.findall(r"^(?:\| \| tiny|\| million|\| layers of width).*$", PAGE.read_text(), re.M)
    )
    assert names == list(PRESETS)
    assert millions == [f"{parameters(model) / 1e6:.1f}" for model in PRESETS.values()]
    assert sizes == [f"{model.layers} of {model.hidden:,}" for model in PRESETS.values()]


@pytest.mark.parametrize("command", commands(PAGE.read_text()), ids=lambda command: " ".join(command.words))
def test_commands_parse(command, monkeypatch):
    def run(name: str, *words: str) -> None:
        monkeypatch.setattr(sys, "argv", [name, *words])
        main_of(name).main()

    if not command.options:
        assert command.words[:2] == ["python", "-m"]
        parse(run, monkeypatch, command.words[2], *command.words[3:])
