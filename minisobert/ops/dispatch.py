"""Where an operation runs: CUDA tensors take the Triton kernel, all others the plain PyTorch beside it.

Each public function asks `takes_kernel` and imports its kernel by name only then, so that Triton, which not every
machine has, is imported where it is used and nowhere else.
"""

from __future__ import annotations

from importlib.util import find_spec

from torch import Tensor

HAVE_TRITON = find_spec("triton") is not None  # it exists for Linux alone; elsewhere GPUs take the reference too


def takes_kernel(x: Tensor) -> bool:
    return x.is_cuda and HAVE_TRITON
