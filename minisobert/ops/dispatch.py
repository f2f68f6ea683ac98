"""Where an operation runs: CUDA tensors take the Triton kernel, all others the plain PyTorch beside it."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec

from torch import Tensor

HAVE_TRITON = find_spec("triton") is not None  # it exists for Linux alone; elsewhere GPUs take the reference too


def takes_kernel(x: Tensor) -> bool:
    return x.is_cuda and HAVE_TRITON


def implementation(reference: Callable, x: Tensor) -> Callable:
    """NAME_reference of ops/FILE.py, or, for a CUDA tensor, NAME of ops/kernels/FILE.py."""
    if not takes_kernel(x):
        return reference
    module = import_module(reference.__module__.replace("minisobert.ops.", "minisobert.ops.kernels."))
    return getattr(module, reference.__name__.removesuffix("_reference"))
