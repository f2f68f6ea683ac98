"""minisobert: BERT encoders pre-trained from scratch for one domain, in plain PyTorch."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from minisobert.inference import Loaded


def load(path: str | Path) -> Loaded:
    """A trained model, ready for use: of a run of train.py, of the result of a finetune.py, or of a folder in Hugging
    Face's format. Raises ValueError where there is none that can be loaded."""
    from minisobert import inference  # not with the package, most parts of which need no torch

    return inference.load(path)
