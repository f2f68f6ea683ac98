"""Kernels run in bf16 too, in an interpreter that is mended for it."""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from bfloat16 import install

    install()
