"""Twenty steps of train.py itself, for a preset, in one process, on shards that are made for the purpose.

The documents have the lengths of posts and random tokens, so the loss means nothing. The tokenizer is a tokenizer.json
of made-up words, which needs no library that transformers does not bring. Everything else is as in a user's run: the
options' defaults, metrics.jsonl, and a checkpoint at the end. Only the second half of the steps counts, because kernels
compile during the first.
"""

from __future__ import annotations

import io
import json
import statistics
from contextlib import redirect_stdout
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

import train
from benchmarks.gpu.setting import Setting, random_documents, recipe
from benchmarks.lengths import draw
from minisobert.config import PRESETS
from minisobert.corpus import shards
from minisobert.corpus.tokenizer import token_dtype
from minisobert.training.run import read_metrics

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def measure(setting: Setting, preset: str) -> dict:
    """Medians over the second half of the steps. peak_bytes: the most memory that tensors took in any step."""
    config, tokens = recipe(preset), setting.steps * setting.tokens_per_batch
    with TemporaryDirectory() as folder:
        data, out = Path(folder) / "data", Path(folder) / "run"
        make_shards(data, setting, tokens)
        words = [
            *("--preset", preset, "--data", str(data), "--out", str(out), *_toy_sizes(setting, preset)),
            *("--train-tokens", str(tokens), "--tokens-per-batch", str(setting.tokens_per_batch)),
            *("--row-tokens", str(setting.row_tokens), "--precision", "bf16"),
        ]
        with redirect_stdout(io.StringIO()):
            status = train.main(words)
        if status:
            raise RuntimeError(f"train.py ended with {status}")
        lines = read_metrics(out)
    second = lines[len(lines) // 2 :]

    def median(name: str) -> float | None:
        return statistics.median(line[name] for line in second) if name in second[0] else None

    return {
        "tokens_per_second": median("tokens_per_second"),
        "mfu": median("mfu"),
        "peak_bytes": torch.cuda.max_memory_allocated() or None,
        "steps": len(lines),
        "rows": config.micro_batch_rows,
        "dropout": config.dropout,
    }


def make_shards(folder: Path, setting: Setting, tokens: int) -> None:
    """Writes a corpus of `tokens` tokens and a few held-out documents, in data.prepare's format."""
    lengths = draw(1_000, seed=0)
    lengths = np.resize(lengths, int(tokens / lengths.mean()) + 100)
    made = random_documents(lengths, setting.vocabulary, 0, folder)
    folder.mkdir()
    made.tokens.astype(token_dtype(setting.vocabulary)).tofile(folder / "tokens.bin")
    np.save(folder / "documents.npy", made.offsets)
    words = {word: i for i, word in enumerate([*SPECIAL, *(f"w{i}" for i in range(len(SPECIAL), setting.vocabulary))])}
    tokenizer = {
        "version": "1.0",
        "added_tokens": [
            {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True}
            for i, name in enumerate(SPECIAL)
        ],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": words, "unk_token": "[UNK]"},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    shards.write_meta(
        folder, documents=len(lengths), tokens=len(made.tokens), vocab_size=setting.vocabulary,
        validation_documents=[len(lengths) - 50, len(lengths)], seed=0, sources=[],
        vocabulary=shards.open_tokenizer(folder / "tokenizer.json").vocabulary._asdict(),
    )  # fmt: skip


def _toy_sizes(setting: Setting, preset: str) -> list[str]:
    """Options for the sizes in which a setting's model differs from the preset, which it does only in a dry run."""
    ours, usual = asdict(setting.models[preset][0]), asdict(PRESETS[preset])
    names = (
        "layers",
        "hidden",
        "heads",
        "ffn",
        *(("global_every", "window") if usual["architecture"] == "modernbert" else ()),
    )
    return [
        word for name in names if ours[name] != usual[name] for word in (f"--{name}".replace("_", "-"), str(ours[name]))
    ]
