"""minisobert: BERT encoders pre-trained from scratch for one domain, in plain PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from minisobert.inference import Loaded


def load(path: str | Path) -> Loaded:
    """Loads a trained model: a run of train.py, the result of a finetune.py, or a folder in Hugging Face's format.
    Raises ValueError if `path` holds none that can be loaded."""
    from minisobert import inference  # imported here, because most of the package needs no torch

    return inference.load(path)
