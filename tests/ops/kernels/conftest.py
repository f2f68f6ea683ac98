"""Mends Triton's interpreter, so that kernels run in bf16 too."""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    from bfloat16 import install

    install()
