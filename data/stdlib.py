"""Real text that every machine has: the Python standard library, each class and function presented as a post.

    python -m data.stdlib posts.jsonl

A post has what a reader of documentation would look up: the qualified name and signature, the docstring as prose, and
the code with its comments.
"""

from __future__ import annotations

import ast
import json
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from minisobert.cli import Parser, command

LEAVE_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "lib2to3", "__pycache__"}


def posts(library: Path | None = None) -> Iterator[str]:
    """Yields the text of each post, in the order of the file names. library: a folder of Python sources (default: the
    standard library)."""
    library = library or Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        inside = path.relative_to(library)
        if LEAVE_OUT & set(inside.parts):
            continue
        try:
            source = path.read_text(encoding="utf-8")
            tree = ast.parse(source)
        except (OSError, SyntaxError, ValueError):  # another encoding, or a template named .py
            continue
        module = ".".join(inside.with_suffix("").parts).removesuffix(".__init__")
        if documentation := ast.get_docstring(tree):
            yield f"{module}\n\n{documentation}"
        yield from _definitions(tree, module, source.splitlines())


def _definitions(tree: ast.AST, name: str, lines: list[str]) -> Iterator[str]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            if documentation := ast.get_docstring(node):
                yield f"class {name}.{node.name}\n\n{documentation}"
            yield from _definitions(node, f"{name}.{node.name}", lines)
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            title = f"{name}.{node.name}({ast.unparse(node.args)})"
            documentation, body = ast.get_docstring(node), node.body
            first = body[0].end_lineno if documentation else body[0].lineno - 1  # keeps comments after a docstring
            code = "\n".join(lines[first : node.end_lineno]).strip("\n")
            yield "\n\n".join(part for part in (title, documentation, code) if part)


def write(path: Path, library: Path | None = None) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for text in posts(library):
            print(json.dumps({"text": text}), file=file)


@command("data.stdlib")
def main(argv: list[str] | None = None) -> None:
    about = "Each class and function is a text: its name, its documentation and its code."
    parser = Parser("data.stdlib", about, "python -m data.stdlib stdlib.jsonl")
    parser.add_argument("out", type=Path, metavar="FILE", help=".jsonl file to write")
    write(parser.parse_args(argv).out)


if __name__ == "__main__":
    main()
