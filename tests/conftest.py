"""Fixtures: a small corpus, which data.prepare makes once, and memory that shows which elements were never written."""

from __future__ import annotations

import json
import os
import random

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # set before Triton is imported, so that kernels run in its interpreter

from data.prepare import prepare
from minisobert.corpus.shards import Shards, open_shards


def sentences(count: int, seed: int) -> list[str]:
    """Documents of a toy language: 1 to 200 words, each of which makes a certain next word likely; and a long one."""
    draw = random.Random(seed)
    words = [f"{a}{b}{c}" for a in "bdfgk" for b in "aeiou" for c in ("n", "r", "st")]
    texts = []
    for i in range(count):
        at, text = draw.randrange(len(words)), []
        for _ in range(int(draw.lognormvariate(4, 1)) % 200 + 1 if i else 2_500):
            text.append(words[at])
            at = (at * 7 + draw.randrange(3)) % len(words)
        texts.append(" ".join(text) + draw.choice([".", "?", ";\n    return;"]))
    return texts


@pytest.fixture(scope="session")
def corpus(tmp_path_factory) -> Shards:
    """About 40 rows of training text, and a few of validation text."""
    folder = tmp_path_factory.mktemp("corpus")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in sentences(1_300, seed=0))
    (folder / "toy.jsonl").write_text(lines)
    prepare([folder / "toy.jsonl"], folder / "shards", vocab_size=400, workers=1)
    return open_shards(folder / "shards")


@pytest.fixture
def poisoned(monkeypatch):
    """Fills torch.empty and empty_like with values that no result may contain: NaN, or the largest integer."""
    for name in ("empty", "empty_like"):
        make = getattr(torch, name)

        def poison(*args, make=make, **kwargs):
            x = make(*args, **kwargs)
            return x.fill_(torch.nan if x.is_floating_point() else torch.iinfo(x.dtype).max)

        monkeypatch.setattr(torch, name, poison)
