"""Training throughput in bf16 with batches of 524,288 tokens: forward, backward and optimizer.

A step takes accumulation × micro-batch + optimizer; micro-batch and optimizer are timed separately. Only real tokens
count. The peers are transformers' classes with the same weights, compiled, in plain bf16, on the same documents. These
are shuffled and batched, and a batch is padded to its longest document, rounded up to a multiple of 128. Only the batch
with the median share of padding is timed, so that one shape is compiled. The peers compute logits for all tokens, as
their classes do, and run no optimizer, so compare them with our micro-batches only. The paper's models are compared
with MegatronBert, the modern one with ModernBert on SDPA and, if it is installed, on FlashAttention. "Times as fast" is
our speed divided by the peer's. MFU is relative to the datasheet's bf16 rate and does not count recomputation.
"""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks.gpu.setting import DTYPE, Setting, recipe
from benchmarks.gpu.timing import Disagreement, seconds
from benchmarks.peers import peer
from minisobert.config import ModelConfig
from minisobert.corpus.loader import MicroBatch
from minisobert.corpus.tokenizer import PAD
from minisobert.model import MaskedLM
from minisobert.ops import Dropout, cross_entropy, cross_entropy_reference
from minisobert.training import meter
from minisobert.training.optimizer import Optimizer

# classes of transformers, by architecture: name → attention; flash_attention_2 only if it is installed
PEERS = {
    "megatron-bert": {"MegatronBert": "eager"},
    "modernbert": {"ModernBert": "sdpa", "ModernBert-flash": "flash_attention_2"},
}
PAD_TO = 128
KERNELS = 15  # how many kernels the profile lists
PARTS = {  # the parts of a micro-batch, by patterns for the names of their kernels
    "attention, forward": r"^_attention_forward|^_attention_hashes",
    "attention, backward": r"^_attention_(key|query)_gradient|^_attention_delta",
    "layer norms": r"^_add_norm",
    "GELU": r"gelu",
    "loss": r"^_cross_entropy",
    "matrix products": r"gemm|cutlass|nvjet|xmma|addmm|::mm$",
}
SAME_WEIGHTS = 0.01  # nats between mean losses with the same weights: a bf16 logit near 1 is off by up to 0.004
AT_START = 0.5  # nats between the loss of new random weights and ln V, the loss of guessing


def new_model(config: ModelConfig, device: torch.device) -> MaskedLM:
    """A model with weights N(0, 0.02), drawn on the device: `initialise` draws on the CPU and takes many seconds."""
    with torch.device(device):
        model = MaskedLM(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, 0, 0.02)
    return model


def our_losses(model: MaskedLM, batch: MicroBatch, dropout: Dropout | None) -> Tensor:
    """(M,): the losses of the masked tokens."""
    return cross_entropy(model(batch.tokens, batch.positions, batch.documents, batch.masked, dropout), batch.targets)


class Ours:
    """A model, its optimizer and some micro-batches."""

    def __init__(self, setting: Setting, preset: str, lengths: str, dropout: float):
        (self.config, rows, _), device = setting.models[preset], setting.device
        self.model = new_model(self.config, device)
        momentum = recipe(preset).muon_momentum if self.config.is_modern else None
        self.optimizer = Optimizer(self.model, DTYPE, (0.9, 0.999), 0.01, momentum=momentum)
        self.tokens = rows * setting.row_tokens
        self.dropout = Dropout.for_step(dropout, 0, 0, self.config.layers, device)
        self.batches = [setting.micro_batch(lengths, self.tokens, seed, preset) for seed in range(setting.distinct)]

    def micro_batches(self) -> Tensor:
        """Runs forward and backward of each micro-batch. Returns the mean loss of the last one, in nats."""
        for i, each in enumerate(self.batches):
            dropout = self.dropout and dataclasses.replace(self.dropout, token_offset=i * self.tokens)
            losses = our_losses(self.model, each, dropout)
            losses.sum().backward()
        return losses.detach().mean()


def measure(setting: Setting, preset: str, lengths: str, dropout: float, name: str) -> dict:
    """name: "minisobert", or one of the PEERS of its architecture."""
    if name != "minisobert":
        return measure_peer(setting, preset, lengths, dropout, name)
    ours = Ours(setting, preset, lengths, dropout)
    loss, guessing = float(ours.micro_batches()), math.log(setting.vocabulary)
    if not abs(loss - guessing) < AT_START:
        raise Disagreement(f"the first loss is {loss:.3f}; guessing, which random weights do, gives {guessing:.3f}")
    real, pairs, masked = (
        sum(counts) / setting.distinct
        for counts in zip(
            *((b.real_tokens, meter.attention_pairs(ours.config, b.lengths), len(b.masked)) for b in ours.batches)
        )
    )
    optimizer = seconds(lambda: ours.optimizer.step(1e-4, masked * setting.distinct, 1.0), setting.device, flush=False)
    micro_batch = seconds(ours.micro_batches, setting.device, flush=False) / setting.distinct
    accumulation, chip = setting.tokens_per_batch // ours.tokens, meter.peak_flops(setting.device)
    per_second = accumulation / (accumulation * micro_batch + optimizer)  # micro-batches
    return {
        "tokens_per_second": per_second * real,
        "mfu": per_second * meter.training_flops(ours.config, real, pairs, masked) / chip if chip else None,
        "peak_bytes": torch.cuda.max_memory_allocated() or None,
        "micro_batch_seconds": micro_batch,
        "micro_batch_tokens_per_second": real / micro_batch,
        "optimizer_seconds": optimizer,
        "micro_batch_tokens": ours.tokens,
    }


def measure_rows(setting: Setting, rows: int, dropout: float) -> dict:
    """Measures base on posts with `rows` rows in a micro-batch."""
    config, _, documents = setting.models["base"]
    models = {**setting.models, "base": (config, rows, documents)}
    return measure(dataclasses.replace(setting, models=models), "base", "posts", dropout, "minisobert")


def profile(setting: Setting, preset: str) -> dict:
    """The time of a micro-batch of the recipe, by parts, and the kernels that take the most time (on a CPU: torch's
    operations)."""
    dropout = recipe(preset).dropout
    ours = Ours(setting, preset, "posts", dropout)
    ours.micro_batches()
    with torch.profiler.profile() as seen:
        float(ours.micro_batches())  # waits for the device
    # operations on the host also carry the time of the kernels that they start, which would be counted twice
    kind, time = ("CPU", "self_cpu_time_total") if setting.dry else ("CUDA", "self_device_time_total")
    found = [each for each in seen.key_averages() if each.device_type == getattr(torch.autograd.DeviceType, kind)]
    spent = {each: getattr(each, time) / setting.distinct / 1e6 for each in found}
    total = sum(spent.values())
    kernels = [
        {"name": each.key, "calls": each.count / setting.distinct, "seconds": spent[each], "share": spent[each] / total}
        for each in sorted(found, key=spent.get, reverse=True)[:KERNELS]
    ]
    parts = dict.fromkeys([*PARTS, "the rest"], 0.0)
    for each, seconds_ in spent.items():
        parts[next((part for part, names in PARTS.items() if re.search(names, each.key)), "the rest")] += seconds_
    return {"seconds": total, "dropout": dropout, "parts": parts, "kernels": kernels}


def measure_peer(setting: Setting, preset: str, lengths: str, dropout: float, name: str) -> dict:
    import transformers

    (config, rows, documents), device = setting.models[preset], setting.device
    packed = setting.micro_batch(lengths, rows * setting.row_tokens, 0, preset)
    bounds = packed.documents.bounds.numpy()
    length, is_padding = np.diff(bounds), packed.tokens.cpu().numpy()[bounds[:-1]] == PAD
    # Shuffle and batch as a run of the peer would, and take the batch with the median share of padding
    shuffled = np.random.default_rng(0).permutation(np.flatnonzero(~is_padding))
    batches = shuffled[: len(shuffled) // documents * documents].reshape(-1, documents)
    totals, widths = length[batches].sum(1), -(-length[batches].max(1) // PAD_TO) * PAD_TO
    median = np.argsort(totals / widths)[len(batches) // 2]
    chosen, total, width = batches[median], int(totals[median]), int(widths[median])

    def as_batch(x: Tensor, padding: int) -> Tensor:
        """(T,) of the packed documents → (documents, width) of the chosen ones."""
        parts = x.split(length.tolist())
        x = pad_sequence([parts[i] for i in chosen], batch_first=True, padding_value=padding)
        return F.pad(x, (0, width - x.shape[1]), value=padding)

    def at_masked(values: Tensor, elsewhere: int) -> Tensor:
        """(M,) of the masked tokens → (documents, width) of the chosen documents."""
        everywhere = values.new_full((len(packed.tokens),), elsewhere)
        return as_batch(everywhere.index_copy(0, packed.masked, values), elsewhere)

    inputs, labels = {"input_ids": as_batch(packed.tokens.long(), PAD)}, at_masked(packed.targets, -100)
    if width > length[chosen].min():
        inputs["attention_mask"] = as_batch(torch.ones_like(packed.tokens, dtype=torch.int64), 0)
    ours = new_model(config, device)
    transformers.logging.set_verbosity_error()
    with torch.device(device):
        model = peer(ours, config.architecture, dropout, PEERS[config.architecture][name]).to(device, DTYPE).train()
    result = {}
    if not dropout:  # with dropout each draws its own mask
        with torch.no_grad():
            masked = labels >= 0
            expected = float(at_masked(our_losses(ours.to(DTYPE), packed, None), 0)[masked].mean())
            # with our loss function, because the class rounds its loss to bf16
            theirs = float(cross_entropy_reference(model(**inputs).logits[masked], labels[masked]).mean())
        result["difference"] = abs(theirs - expected)
        if not result["difference"] <= SAME_WEIGHTS:
            raise Disagreement(f"first loss {theirs:.4f}, minisobert's {expected:.4f}: over {SAME_WEIGHTS} apart")
    del ours
    compiled = setting.compile(model, repeat_backward=False)
    time = seconds(lambda: compiled(**inputs, labels=labels).loss.backward(), device, flush=False)
    return result | {
        "micro_batch_seconds": time,
        "micro_batch_tokens_per_second": total / time,
        "padding_share": 1 - total / (documents * width),
        "peak_bytes": torch.cuda.max_memory_allocated() or None,
        "attends": getattr(model.config, "_attn_implementation", None) or "eager",
    }
