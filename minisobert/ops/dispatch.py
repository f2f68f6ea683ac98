"""Chooses how an operation runs: CUDA tensors take the Triton kernel, all others the plain-PyTorch reference.

Each public function calls `takes_kernel` and only then imports its kernel, by name. So Triton, which not every machine
has, is imported only if it is used.
"""

from __future__ import annotations

from importlib.util import find_spec

from torch import Tensor

HAVE_TRITON = find_spec("triton") is not None  # Triton exists only for Linux; elsewhere GPUs take the reference too


def takes_kernel(x: Tensor) -> bool:
    return x.is_cuda and HAVE_TRITON
