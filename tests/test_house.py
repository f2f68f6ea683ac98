"""Readers can rely on this: links lead somewhere, the map is complete, and imports point down."""

from __future__ import annotations

import ast
import configparser
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("*.py", "data/*.py", "docs/pictures/*.py", "minisobert/**/*.py")
SOURCES = sorted(path for folder in FOLDERS for path in ROOT.glob(folder))


def links(page: Path) -> set[Path]:
    found = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    return {page.parent / link for link in found if not link.startswith("http")}


@pytest.mark.parametrize("page", [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), ROOT / "data/README.md"], ids=str)
def test_every_path_that_a_page_links_to_exists(page):
    assert {str(path) for path in links(page) if not path.exists()} == set()


def test_the_map_leaves_no_file_out():
    listed = {path.resolve() for path in links(ROOT / "docs/map.md")}
    assert {str(path) for path in SOURCES if path.name != "__init__.py" and path not in listed} == set()


WORDS_IN_A_ROW = 10  # that two places may not share; shorter runs are idioms and names


def runs_of_words(text: str) -> set[str]:
    """Of the prose: no code, no formulas and no addresses of links."""
    text = re.sub(r"^```.*?^```|^    .*?$|`[^`]*`|\]\([^)]*\)", " ", text, flags=re.S | re.M)
    words = re.findall(r"[\w'-]+", text.lower())
    return {" ".join(words[i : i + WORDS_IN_A_ROW]) for i in range(len(words) - WORDS_IN_A_ROW + 1)}


def test_no_sentence_is_in_two_places():
    """A page has the reasons, the head of a file the formula and the shapes. (The map's glosses are the heads' own.)"""
    pages = [path for path in (*ROOT.glob("docs/*.md"), ROOT / "CONTRIBUTING.md", ROOT / "data/README.md")
             if path.name != "map.md"]  # fmt: skip
    places = {path: path.read_text() for path in pages}
    places |= {path: ast.get_docstring(ast.parse(path.read_text())) or "" for path in SOURCES}
    first: dict[str, Path] = {}
    twice = []
    for path, text in places.items():
        for run in runs_of_words(text):
            other = first.setdefault(run, path)
            if other != path and other in pages:
                twice.append((str(other.relative_to(ROOT)), str(path.relative_to(ROOT)), run))
    assert twice == []


def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


LAYERS = [  # each may import itself and those below it
    r"train$|finetune$|demo$|data\b|benchmarks\b",
    r"minisobert\.(hub|finetuning|inference|embed|page|playground)\b",
    r"minisobert\.(plot|tasks|planning)\b",
    r"minisobert\.(training|corpus\.loader)\b",
    r"minisobert\.parallel\b",
    r"minisobert\.model\b",
    r"minisobert\.ops\b",
    r"minisobert\.corpus\b",
    r"minisobert\.config\b",
    r"minisobert\.(cli|commands|files|hashing)\b",
]


def layer(module: str) -> int | None:
    return next((i for i, pattern in enumerate(LAYERS) if re.match(pattern, module)), None)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path):
    module = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    here = layer(module)
    above = {name for name in imports(path) if here is not None and (at := layer(name)) is not None and at < here}
    assert above == set()
    if re.match(r"minisobert\.(model|ops)\b", module):
        assert not {name for name in imports(path) if name.startswith("torch.distributed")}


def test_preparing_data_needs_no_torch():
    names = ", ".join(f"minisobert.corpus.{path.stem}" for path in (ROOT / "minisobert/corpus").glob("*.py")
                      if path.stem not in ("loader", "__init__"))  # fmt: skip
    code = f"import sys, data.prepare, {names}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_nothing_large_is_in_the_repository():
    """Such as results that were added by accident, or data from outside."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True)
    if listed.returncode:
        pytest.skip("no git repository")
    sizes = {
        name: (ROOT / name).stat().st_size for name in listed.stdout.decode().split("\0") if (ROOT / name).is_file()
    }
    assert {name: size for name, size in sizes.items() if size > 1_000_000} == {}


def test_the_changelog_begins_with_the_version_that_is_installed():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    first, *others = re.findall(r"^## (\S+)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert first == setup["metadata"]["version"] and first not in others


def test_no_library_file_passes_400_lines():
    assert {path.name: n for path in SOURCES if (n := len(path.read_text().splitlines())) > 400} == {}
