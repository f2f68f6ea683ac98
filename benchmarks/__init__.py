"""Side-by-side measurements, one command each: `python -m benchmarks.NAME`. What they printed is under results/."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).parent / "results"
JAVA_DUMP = Path(__file__).parents[1] / "../shared/data/dumps/java-questions-2025.stackoverflow.com.7z"


def machine(*libraries: str) -> str:
    """The processor, Python, and the versions of these libraries, in a line."""
    model = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), model)
    versions = ", ".join(f"{name} {version(name)}" for name in libraries)
    return f"{model}, {os.cpu_count()} cores; Python {platform.python_version()}, {versions}"


def write_result(lines: list[str], name: str) -> None:
    """Prints a Markdown result and keeps it as results/NAME.md."""
    text = "\n".join(lines)
    print(text)
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.md").write_text(text + "\n")


def table(columns: list[str], rows: Iterable[list]) -> list[str]:
    """The lines of a Markdown table."""
    cells = [[str(cell).replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (columns, ["---"] * len(columns), *cells)]
