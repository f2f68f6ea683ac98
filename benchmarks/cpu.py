"""Training on a CPU, here and in transformers: `python -m benchmarks.cpu --data SHARDS` (extra [hf]).

Both architectures (4 layers, 256 wide, 4 heads, 8,000 pieces) train on the same real posts in batches of 8, with the
same masks: packed here, padded to the longest post of the batch there. A step is forward, backward and AdamW. All
implementations take turns batch by batch, so that a machine that slows down slows all of them. The unit is real tokens
per second; padding does not count.

The modern architecture is compared without dropout, with which it is trained; transformers has dropout at another place
in its MLP.
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F

from benchmarks import machine, parser, shards, show
from benchmarks.peers import peer
from minisobert.cli import table
from minisobert.config import ModelConfig
from minisobert.corpus.masking import mask_rows
from minisobert.corpus.shards import Shards
from minisobert.corpus.tokenizer import CLS, SEP
from minisobert.hub.configuration import configuration
from minisobert.model import MaskedLM
from minisobert.ops import Documents, Dropout, cross_entropy

BATCH = 8
LONGEST = 2_046
MODEL = ModelConfig(layers=4, hidden=256, heads=4, ffn=1_024, vocabulary=8_000)
# Two thirds of the features, since its MLP has three matrices instead of two. Two of its layers attend to a window.
MODERN = replace(MODEL, ffn=704, architecture="modernbert")
# Names of the implementations. In results, each of ours comes before those with which it is compared
OURS, OUR_MODERN = "minisobert", "minisobert, modernbert"
BERT, MEGATRON, THEIR_MODERN = (f"transformers {name}" for name in ("BERT, SDPA", "MegatronBert", "ModernBert, SDPA"))


def batches(shards: Shards, count: int) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """Batches of (masked documents with their special tokens, for each token its target or -100)."""
    draw = np.random.default_rng(0)
    result = []
    for _ in range(count):
        documents, labels = [], []
        for i in draw.choice(len(shards.training_documents), BATCH, replace=False):
            ids = shards.tokens[shards.offsets[i] : shards.offsets[i + 1]][:LONGEST].astype(np.int64)
            ids = np.concatenate([[CLS], ids, [SEP]])
            target = np.full(len(ids), -100)
            where, what = mask_rows(ids[None], draw.integers(0, 2**32, 1, dtype=np.uint32), shards.vocabulary)
            target[where] = what
            documents.append(torch.from_numpy(ids))
            labels.append(torch.from_numpy(target))
        result.append((documents, labels))
    return result


def our_step(config: ModelConfig, dropout: float):
    model = MaskedLM(config).initialise(0)

    def loss(documents, labels, step):
        tokens, label = torch.cat(documents), torch.cat(labels)
        lengths = [len(document) for document in documents]
        positions = torch.cat([torch.arange(n) for n in lengths])
        masked = (label >= 0).nonzero()[:, 0]
        drop = Dropout.for_step(dropout, 0, step, config.layers)
        logits = model(tokens, positions, Documents.from_bounds(np.cumsum([0, *lengths])), masked, drop)
        return cross_entropy(logits, label[masked]).mean()

    return model, loss


def their_step(model):
    def loss(documents, labels, step):
        pad = torch.nn.utils.rnn.pad_sequence
        ids, label = pad(documents, batch_first=True), pad(labels, batch_first=True, padding_value=-100)
        real = pad([torch.ones_like(document) for document in documents], batch_first=True)
        logits = model(input_ids=ids, attention_mask=real).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), label.flatten())

    return model.train(), loss


def contestants(dropout: float) -> dict:
    """Name → (model, loss function) of each implementation."""
    import transformers

    sizes = {**configuration(MODEL, "megatron-bert", dropout), "model_type": "bert"}
    bert = transformers.AutoConfig.for_model(**sizes, attn_implementation="sdpa")
    result = {
        OURS: our_step(MODEL, dropout),
        BERT: their_step(transformers.BertForMaskedLM(bert)),
        MEGATRON: their_step(peer(MaskedLM(MODEL).initialise(0), "megatron-bert", dropout)),
    }
    if not dropout:
        result[OUR_MODERN] = our_step(MODERN, dropout)
        result[THEIR_MODERN] = their_step(peer(MaskedLM(MODERN).initialise(0), "modernbert", attention="sdpa"))
    return result


def measure(data, dropout: float, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """Name → (real tokens per second, loss of the first batch) of each implementation."""
    competing = contestants(dropout)
    steps, seconds, first = {}, dict.fromkeys(competing, 0.0), {}
    for name, (model, loss) in competing.items():
        model.to(dtype)
        steps[name] = (loss, torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True))
    for i, (documents, labels) in enumerate(data):
        for name, (loss, optimizer) in steps.items():
            began = time.perf_counter()
            value = loss(documents, labels, i)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()
            if i:  # the first batch warms up
                seconds[name] += time.perf_counter() - began
            first.setdefault(name, value.item())
    real = sum(len(document) for documents, _ in data[1:] for document in documents)
    return {name: (real / seconds[name], first[name]) for name in competing}


def check(result: dict[str, tuple[float, float]], dropout: float, dtype: torch.dtype) -> None:
    """Raises SystemExit unless the first losses agree: to rounding where the weights are equal, else roughly with ln V,
    the loss of any untrained model."""
    losses = {name: loss for name, (_, loss) in result.items()}
    tolerance = 1e-4 if dtype == torch.float32 and not dropout else 0.05
    pairs = [(OURS, MEGATRON)] + [(OUR_MODERN, THEIR_MODERN)] * (OUR_MODERN in losses)
    apart = any(abs(losses[ours] - losses[theirs]) > tolerance for ours, theirs in pairs)
    if apart or abs(losses[BERT] - math.log(MODEL.vocabulary)) > 0.5:
        each = ", ".join(f"{loss:.4f} {name}" for name, loss in losses.items())
        raise SystemExit(f"the first losses disagree: {each}")


def main() -> None:
    command = parser("cpu", "--data data/prepared", "It needs the extra [hf].")
    command.add_argument(
        "--data", type=shards, required=True, metavar="SHARDS", help="what data.prepare --vocab-size 8000 wrote"
    )
    command.add_argument("--batches", type=int, default=3, metavar="N", help="number of timed batches of 8 posts")
    options = command.parse_args()
    if (pieces := options.data.vocab_size) != MODEL.vocabulary:
        command.error(f"{options.data.folder} has {pieces:,} pieces; make it with data.prepare --vocab-size 8000")
    data = batches(options.data, options.batches + 1)
    lengths = [[len(document) for document in documents] for documents, _ in data[1:]]
    padded = sum(BATCH * max(row) for row in lengths)
    columns = ["precision", "dropout", "implementation", "real tokens/s", "minisobert is faster by", "first loss"]
    rows = []
    precisions = [torch.float32] + [torch.bfloat16] * torch.cpu._is_avx512_bf16_supported()
    for dtype in precisions:
        for dropout in (0.0, 0.1):
            result = measure(data, dropout, dtype)
            check(result, dropout, dtype)
            for name, (speed, first) in result.items():
                if name in (OURS, OUR_MODERN):
                    ours, ratio = speed, ""
                else:
                    ratio = f"{ours / speed:.1f} ×"
                rows.append([str(dtype)[6:], dropout, name, f"{speed:,.0f}", ratio, f"{first:.4f}"])
                print(*rows[-1], file=sys.stderr)
    show(
        [
            "# Training on a CPU, beside transformers",
            "",
            f"`python -m benchmarks.cpu`: {options.batches} × {BATCH} posts, {sum(map(sum, lengths)):,} real "
            f"tokens, {padded:,} when padded; 4 layers, 256 wide, 4 heads, 8,000 pieces; forward, backward, AdamW. "
            "modernbert: two layers attend to whole posts and two to windows of 64 tokens to either side.",
            f"{machine('torch', 'transformers')}; {torch.get_num_threads()} threads.",
            "",
            *table(columns, rows),
        ],
        "cpu",
        options.write,
    )


if __name__ == "__main__":
    main()
