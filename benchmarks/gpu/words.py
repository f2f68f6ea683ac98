"""How names, numbers and tables are written, in pages and plots."""

from __future__ import annotations

NAMES = {  # as tables and plots call them
    "sdpa-cudnn": "SDPA, cuDNN",
    "sdpa-flash": "SDPA, flash",
    "sdpa-efficient": "SDPA, efficient",
    "varlen": "varlen_attn",
    "flex": "FlexAttention",
    "eager": "torch, eager",
    "eager-bf16": "F.cross_entropy, bf16",
    "eager-fp32": "F.cross_entropy, fp32",
    "compiled": "torch, compiled",
    "compiled-fp32": "F.cross_entropy, fp32, compiled",
    "layer_norm": "F.layer_norm alone",
    "rows": "whole rows",
    "posts": "posts",
}


def called(name: str) -> str:
    return NAMES.get(name, name)


def number(value: float | None, digits: int = 3) -> str:
    """With so many significant digits; an empty cell for None."""
    if value is None:
        return ""
    if abs(value) >= 10 ** (digits - 1):
        return f"{value:,.0f}"
    return f"{value:.{digits}g}"


def table(*header: str) -> list[str]:
    """The first two lines of one; the first column holds words, the others numbers."""
    return [line(*header), "|---|" + "--:|" * (len(header) - 1)]


def line(*cells: str) -> str:
    return f"| {' | '.join(cells)} |"
