"""Side-by-side measurements: `python -m benchmarks.NAME` prints a result; --write also stores it under results/."""

from __future__ import annotations

import argparse
import os
import platform
from importlib.metadata import version
from pathlib import Path

from minisobert.cli import Parser
from minisobert.commands import typed
from minisobert.corpus.shards import Shards, open_shards

RESULTS = Path(__file__).parent / "results"


def parser(name: str, example: str, description: str = "", writes: str = "") -> Parser:
    """The command line of a benchmark. example: arguments for it. writes: the file that --write stores (default: the
    result)."""
    command = f"benchmarks.{name}"
    made = Parser(command, description, f"{typed(command)} {example}", allow_abbrev=False)
    writes = writes or f"benchmarks/results/{name}.md"
    made.add_argument("--write", action="store_true", help=f"store the result in {writes} as well")
    return made


def shards(folder: str) -> Shards:
    """The shards in a folder, as the `type` of an option of argparse."""
    try:
        return open_shards(folder)
    except ValueError as error:
        raise argparse.ArgumentTypeError(error) from None


def machine(*libraries: str) -> str:
    """One line with the processor and the versions of Python and of these libraries."""
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    versions = ", ".join(f"{name} {version(name)}" for name in libraries)
    return f"{model}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}"


def show(lines: list[str], name: str, write: bool) -> None:
    """Prints a result in Markdown. write: also store it as results/NAME.md."""
    text = "\n".join(lines)
    print(text)
    if write:
        (RESULTS / f"{name}.md").write_text(text + "\n")
