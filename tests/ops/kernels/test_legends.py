"""Each argument of a kernel is documented: shape and meaning of a pointer, unit of a stride or number."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

FILES = sorted((Path(__file__).parents[3] / "minisobert/ops/kernels").glob("[a-z]*.py"))
LEGEND = re.compile(r"^# {3}(\w+(?:, \w+)*) {2,}\S", re.MULTILINE)  # "#   name, name    what they are"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_argument_of_a_kernel_is_in_the_legend_of_its_file_or_in_its_docstring(path):
    source = path.read_text()
    legend = {name for names in LEGEND.findall(source) for name in names.split(", ")}
    kernels = [f for f in ast.walk(ast.parse(source)) if isinstance(f, ast.FunctionDef)
               and any("triton.jit" in ast.unparse(decorator) for decorator in f.decorator_list)]  # fmt: skip
    assert kernels or path.stem.endswith("_tiles")
    for kernel in kernels:
        told = legend | set(re.findall(r"\w+", ast.get_docstring(kernel) or ""))
        names = {argument.arg for argument in kernel.args.args}
        assert len(names) < 5 or names - told == set(), kernel.name  # helpers with up to four arguments need no legend
    every = {argument.arg for kernel in kernels for argument in kernel.args.args}
    assert legend <= every, "a legend names nothing that no kernel takes"
