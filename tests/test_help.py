"""The command line as a stranger meets it: `python -m minisobert` names every command, and each has a --help that fits
100 columns and ends in examples that its parser accepts."""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import benchmarks
from minisobert import __main__ as overview
from minisobert import cli
from minisobert.cli import Parser, shown_default
from minisobert.commands import COMMANDS, sentence, typed
from minisobert.config import MODERN, PAPER, RECIPES, TrainConfig

ROOT = Path(__file__).parents[1]
WIDTH = 100


def runnable() -> set[str]:
    """What `python NAME.py` or `python -m NAME` runs: files with a main, but for those of tests and docs."""
    names = set()
    for path in ROOT.glob("**/*.py"):
        folder, *_ = path.relative_to(ROOT).parts
        if folder.startswith((".", "tests", "docs", "runs", "build")):  # of others too, as in .venv
            continue
        if not re.search(r'^if __name__ == "__main__"', path.read_text(), re.M):
            continue
        parts = path.relative_to(ROOT).with_suffix("").parts
        names.add(".".join(parts).removesuffix(".__main__") if len(parts) > 1 else path.name)
    return names


MODULES = runnable()
# including subcommands, which the list names one by one
NAMES = sorted(MODULES | {name for commands in COMMANDS.values() for name in commands})


class Parsed(Exception):
    """Stops a command after its parser; holds what was read."""


def main_of(name: str):
    module = name.split()[0].removesuffix(".py")
    package = importlib.util.find_spec(module).submodule_search_locations is not None
    return importlib.import_module(f"{module}.__main__" if package else module)


@pytest.fixture
def run(monkeypatch):
    """Runs a command with these words."""

    def run(name: str, *words: str) -> None:
        monkeypatch.setattr(sys, "argv", [name, *name.split()[1:], *words])
        main_of(name).main()

    return run


@pytest.fixture
def help_of(run, capsys):
    def help_of(name: str) -> str:
        with pytest.raises(SystemExit, match=r"^0$"):
            run(name, "--help")
        output, errors = capsys.readouterr()
        assert errors == ""
        return output

    return help_of


def parse(run, monkeypatch, name: str, *words: str) -> object:
    """What the parser of a command returns; a config has then passed its checks."""
    parse_args, module = Parser.parse_args, main_of(name)

    def stop(value: object):
        raise Parsed(value)

    with monkeypatch.context() as patch:
        patch.setattr(benchmarks, "open_shards", str)  # so that the corpus need not exist
        if hasattr(module, "parse"):
            patch.setattr(module, "parse", lambda *args, **more: stop(cli.parse(*args, **more)))
        else:
            patch.setattr(Parser, "parse_args", lambda *args: stop(parse_args(*args)))
        with pytest.raises(Parsed) as parsed:
            run(name, *words)
    return parsed.value.args[0]


def parser_of(run, monkeypatch, name: str) -> Parser:
    found = []
    with monkeypatch.context() as patch:
        patch.setattr(Parser, "format_help", lambda self: found.append(self) or "")
        with pytest.raises(SystemExit):
            run(name, "--help")
    return found[0]


def examples(text: str) -> list[list[str]]:
    """The words of each example at the end of a --help."""
    _, part = re.split(r"^examples?:.*\n", text, flags=re.M)
    return [shlex.split(line, comments=True) for line in re.sub(r"\\\n", "", part).splitlines()]


def test_every_command_is_listed(capsys):
    overview.main([])
    text = capsys.readouterr().out
    listed = set(re.findall(r"^  python (?:-m )?(\S+)", text, re.M))
    assert listed == MODULES - {"minisobert"}
    assert {"train.py", "data.prepare", "minisobert.hub", "benchmarks.gpu"} <= listed  # commands of all kinds are found
    for commands in COMMANDS.values():
        for name, says in commands.items():
            assert re.search(rf"^  {re.escape(typed(name))}  +{re.escape(says)}$", text, re.M)
            assert re.fullmatch(r"[A-Z][^.]*\w(\.\w+[^.]*)*\.", says)  # one sentence, which may contain train.py
    assert max(map(len, text.splitlines())) <= WIDTH


def test_the_example_of_the_list_is_of_commands_that_take_it(run, capsys, monkeypatch):
    overview.main([])
    found = examples(capsys.readouterr().out)
    assert len(found) == 3
    for _, *words in found:
        name, *rest = words[1:] if words[0] == "-m" else words
        parse(run, monkeypatch, name, *rest)


@pytest.mark.parametrize("name", NAMES)
def test_help_ends_in_examples_that_parse(name, help_of, run, monkeypatch):
    found = examples(help_of(name))
    if name != "minisobert.hub":  # its examples are those of its subcommands
        assert " ".join(found[0]).startswith(typed(name))
    for words in found:
        own = name.split()
        at = words.index(own[0])
        assert words[at : at + len(own)] == own
        parse(run, monkeypatch, name, *words[at + len(own) :])


@pytest.mark.parametrize("columns", [None, 60, 80, 100, 250])
@pytest.mark.parametrize("name", NAMES)
def test_help_fits_the_screen(name, columns, help_of, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", str(columns))
    text = help_of(name)
    assert max(map(len, text.splitlines())) <= WIDTH
    above, _ = re.split(r"^examples?:.*\n", text, flags=re.M)  # examples are not broken, so that they can be pasted
    assert max(map(len, above.splitlines())) <= (columns or WIDTH)


def test_help_is_as_wide_in_a_pipe():
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    command = [sys.executable, "-m", "data.prepare", "--help"]
    result = subprocess.run(command, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, capture_output=True)
    assert 80 < max(map(len, result.stdout.decode().splitlines())) <= WIDTH


@pytest.mark.parametrize("name", NAMES)
def test_usage_shows_what_must_be_given_and_no_more(name, help_of, run, monkeypatch):
    usage, description = help_of(name).split("\n\n")[:2]
    assert re.match(rf"usage: {re.escape(typed(name))}\b", usage) and len(usage.splitlines()) <= 2
    assert " ".join(description.split()).startswith(sentence(name) or "Exchange" if name != "minisobert" else "List")
    parser = parser_of(run, monkeypatch, name)
    required = {action.option_strings[0] for action in parser._actions if action.option_strings and action.required}
    shown = set(re.findall(r"--[a-z-]+", usage))
    assert required <= shown <= required | {"--page", "--predict", "--task", "--model", "--data", "--out"}


@pytest.mark.parametrize("name", NAMES)
def test_every_option_is_explained_with_its_default(name, run, monkeypatch):
    parser = parser_of(run, monkeypatch, name)
    formatter = parser._get_formatter()
    for action in parser._actions:
        if action.dest in ("help", "command"):
            continue
        text = formatter._expand_help(action)
        assert re.match(r"[a-z.]|\w*[A-Z]\w*[A-Z]", text) and not text.endswith("."), (
            action.dest
        )  # a phrase, not a sentence
        assert text.count("(") == text.count(")"), action.dest
        if action.default is not None and not isinstance(action.default, bool) and action.default not in ("", (), []):
            assert "(default: " in text, action.dest
        choices = action.choices or ()
        shown = formatter._format_action_invocation(action)
        assert not choices or all(choice in f"{shown} {text}" for choice in choices), action.dest


@pytest.mark.parametrize("name", PAPER)
def test_defaults_that_a_preset_decides_are_those_of_the_preset(name, run, monkeypatch):
    parser = parser_of(run, monkeypatch, "train.py")
    (action,) = (action for action in parser._actions if action.dest == name)
    said = re.search(r"\(default: (.*)\)$", parser._get_formatter()._expand_help(action))[1]
    first, *others = said.split("; ")
    others = dict(other.split(": ") for other in others)
    modern = others.get("modern presets", first)
    for preset, recipe in RECIPES.items():
        shown = others.get(preset, modern if preset.startswith("modern") else first)
        assert shown == shown_default(getattr(TrainConfig(preset=preset), name)) == shown_default(recipe[name])
    assert bool(others) == (MODERN[name] != PAPER[name] or RECIPES["modern-tiny"][name] != MODERN[name])


def test_choices_that_are_long_are_in_the_text_and_short_ones_in_the_option(help_of):
    text = help_of("train.py")
    assert "--preset NAME " in text and "--optimizer {adamw,muon} " in text
    assert "one of quality, closed, ner, " in " ".join(help_of("finetune.py").split())


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_help_as_a_process(name):
    module, *command = name.split()
    words = [module] if module.endswith(".py") else ["-m", module]
    result = subprocess.run([sys.executable, *words, *command, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "") and result.stdout.startswith("usage: ")


def commands_of(page: Path) -> list[list[str]]:
    """The commands of ours in the shell blocks of a page: [name, words …]."""
    found = []
    for block in re.findall(r"^```sh\n(.*?)^```", page.read_text(), re.M | re.S):
        for line in re.sub(r"\\\n\s*", " ", block).splitlines():
            words = shlex.split(line, comments=True)
            at = next((i for i, word in enumerate(words) if word.removeprefix("./") in MODULES), None)
            if at is not None and re.match(r"\S*python3?$|torchrun$", words[0]) and "…" not in line:
                found.append(words[at:])
    return found


PAGES = [
    page for page in (ROOT / "README.md", ROOT / "data/README.md", *sorted(ROOT.glob("docs/*.md"))) if commands_of(page)
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_the_commands_on_a_page_are_ones_that_their_parsers_take(page, run, monkeypatch):
    for name, *words in commands_of(page):
        parse(run, monkeypatch, name, *words)


def test_the_readme_is_a_screen_or_two_and_its_commands_are_found():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 110
    assert {"train.py", "data.prepare", "minisobert.hub"} <= {name for name, *_ in commands_of(ROOT / "README.md")}
