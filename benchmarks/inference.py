"""Texts per second, beside transformers with the same weights: `python -m benchmarks.inference --data SHARDS`.

A model with random weights is exported, and both minisobert and transformers load the folder. Both turn the texts into
vectors (the mean of final states) or classes. transformers gets the texts as is usual: sorted by length, in padded
batches, with SDPA. Tokenizing counts on both sides.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import minisobert
from benchmarks import machine, parser, shards, show
from minisobert.cli import table
from minisobert.config import ModelConfig, padded_vocabulary
from minisobert.hub import export
from minisobert.model import Classifier, MaskedLM

BATCH = 16  # texts in a batch of transformers; the fastest of 8, 16 and 32 here
CLASSES = ("HQ", "LQ_EDIT", "LQ_CLOSE")
SIZES = {"layers": 4, "hidden": 256, "heads": 4}
MODELS = {
    "modernbert": ModelConfig(**SIZES, ffn=384, architecture="modernbert"),
    "xlm-roberta-xl": ModelConfig(**SIZES, ffn=1_024),
}


def theirs(folder: Path, classify: bool) -> Callable[[list[str]], np.ndarray]:
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    auto = transformers.AutoModelForSequenceClassification if classify else transformers.AutoModel
    model = auto.from_pretrained(folder, attn_implementation="sdpa").eval()

    @torch.inference_mode()
    def run(texts: list[str]) -> np.ndarray:
        order = np.argsort([len(text) for text in texts])
        results = []
        for start in range(0, len(texts), BATCH):
            part = [texts[i] for i in order[start : start + BATCH]]
            batch = tokenizer(part, padding=True, truncation=True, max_length=2_048, return_tensors="pt")
            found = model(**batch)
            if classify:
                results.append(found.logits.softmax(1))
            else:
                mask = batch["attention_mask"][:, :, None]
                results.append((found.last_hidden_state * mask).sum(1) / mask.sum(1))
        return torch.cat(results).numpy()[np.argsort(order)]

    return run


def measure(format: str, texts: list[str], tokenizer, repeats: int) -> list[list[str]]:
    rows = []
    config = replace(MODELS[format], vocabulary=padded_vocabulary(tokenizer.vocab_size))
    for classify in (False, True):
        model = (Classifier(config, len(CLASSES), "cls") if classify else MaskedLM(config)).initialise(0)
        kind = "SequenceClassification" if classify else "MaskedLM"
        with tempfile.TemporaryDirectory() as folder:
            source = export.Source(model, tokenizer, kind, 0.0, CLASSES if classify else ())
            export.write(Path(folder), source, format)
            loaded = minisobert.load(folder)
            competing = {"minisobert": loaded.classify if classify else loaded.embed,
                         "transformers, SDPA": theirs(Path(folder), classify)}  # fmt: skip
        results, seconds = {}, dict.fromkeys(competing, float("inf"))
        for _ in range(repeats):
            for name, run in competing.items():
                began = time.perf_counter()
                results[name] = run(texts)
                seconds[name] = min(seconds[name], time.perf_counter() - began)
        ours, other = results.values()
        if not np.allclose(ours, other, rtol=1e-3, atol=1e-4 * np.abs(other).max()):
            raise SystemExit(f"{format}: the results differ by {np.abs(ours - other).max():.2g}")
        fast, slow = seconds.values()
        for name, taken in seconds.items():
            ratio = f"{slow / fast:.2f} ×" if name != "minisobert" else ""
            rows.append([format, "classes" if classify else "vectors", name, f"{len(texts) / taken:,.1f}", ratio])
            print(*rows[-1], file=sys.stderr)
    return rows


def main() -> None:
    command = parser("inference", "--data data/prepared", "It needs the extra [hf].")
    command.add_argument("--data", type=shards, required=True, metavar="SHARDS", help="folder that data.prepare wrote")
    command.add_argument("--texts", type=int, default=512, metavar="N", help="number of its texts to take")
    command.add_argument("--repeats", type=int, default=3, metavar="N", help="number of runs; the fastest counts")
    options = command.parse_args()
    data, tokenizer = options.data, options.data.tokenizer()
    count = min(options.texts, data.meta["documents"])
    chosen = np.random.default_rng(0).choice(data.meta["documents"], count, replace=False)
    texts = [tokenizer.decode(data.tokens[data.offsets[i] : data.offsets[i + 1]]) for i in chosen]
    lengths = np.diff(data.offsets)[chosen]
    rows = [row for format in MODELS for row in measure(format, texts, tokenizer, options.repeats)]
    show(
        [
            "# Vectors and classes of texts on a CPU, beside transformers", "",
            f"`python -m benchmarks.inference`: {count} posts of {np.median(lengths):,.0f} tokens in the median and "
            f"{lengths.max():,} at most (cut at 2,048); {SIZES['layers']} layers, {SIZES['hidden']} wide, fp32; "
            f"best of {options.repeats} alternating runs.",
            f"{machine('torch', 'transformers')}; {torch.get_num_threads()} threads.", "",
            *table(["model", "what", "implementation", "texts a second", "minisobert is faster by"], rows),
        ],
        "inference",
        options.write,
    )  # fmt: skip


if __name__ == "__main__":
    main()
