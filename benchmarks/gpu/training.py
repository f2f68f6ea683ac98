"""Training throughput: a batch of 524,288 tokens by its micro-batches, bf16, forward, backward and AdamW.

A step takes accumulation × micro-batch + optimizer, which are timed apart. Tokens are real ones. The peers are
transformers' classes of the same layers, width and heads, compiled, in plain bf16, on the same documents: shuffled, in
batches padded to their longest, rounded up to a multiple of 128. Of their batches the one with the median share of
padding is timed, so that one shape is compiled. They compute logits for all tokens, as their classes do, and their
optimizer is left out, so that they are to be compared with our micro-batches alone. MegatronBert computes what
minisobert does, with the same weights; ModernBert, with random ones, is a cheaper model: two of three layers see 128
tokens. "Times as fast" is minisobert. MFU is of the datasheet's bf16 rate, recomputation not counted.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from benchmarks import megatron_bert
from benchmarks.gpu.setting import DTYPE, Setting, pairs
from benchmarks.gpu.timing import Disagreement, seconds
from minisobert.config import ModelConfig
from minisobert.corpus.loader import MicroBatch
from minisobert.corpus.masking import mask_rows
from minisobert.corpus.tokenizer import FIRST_ORDINARY_ID, PAD
from minisobert.model import MaskedLM
from minisobert.ops import Documents, Dropout, cross_entropy, cross_entropy_reference
from minisobert.training import meter
from minisobert.training.optimizer import Optimizer

PEERS = ("ModernBert", "MegatronBert")
DISTINCT = 4  # micro-batches that are timed one after the other, so that packed rows differ as they do in a run
PAD_TO = 128
KERNELS = 15  # rows of the profile
SAME_WEIGHTS = 0.01  # nats between mean losses with the same weights: a bf16 logit near 1 is off by up to 0.004
AT_START = 0.5  # nats between the loss of new random weights and ln V, which guessing gives


def micro_batch(model: ModelConfig, bounds: np.ndarray, real: np.ndarray, device: torch.device, seed: int):
    """A MicroBatch of random pieces: the documents of bounds, of which those that are not real are padding."""
    lengths = np.diff(bounds)
    tokens = np.random.default_rng(seed).integers(FIRST_ORDINARY_ID, model.vocabulary, (1, bounds[-1]))
    tokens[0, ~np.repeat(real, lengths)] = PAD
    masked, targets = mask_rows(tokens, np.array([seed], np.uint32), model.vocabulary)
    return MicroBatch(
        tokens=torch.from_numpy(tokens[0]),
        positions=torch.from_numpy(np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths)),
        documents=Documents.from_bounds(bounds),
        masked=torch.from_numpy(masked),
        targets=torch.from_numpy(targets),
        real_tokens=int(lengths[real].sum()),
        attention_pairs=pairs(bounds, real),
        first_row=0,
    ).to(device)


def new_model(config: ModelConfig, device: torch.device) -> MaskedLM:
    """With weights N(0, 0.02), drawn on the device: `initialise` draws on a CPU, which takes it many seconds."""
    torch.manual_seed(0)
    with torch.device(device):
        model = MaskedLM(config)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, 0, 0.02)
    return model


def our_loss(model: MaskedLM, batch: MicroBatch, dropout: Dropout | None) -> Tensor:
    """The sum over the masked tokens."""
    logits = model(batch.tokens, batch.positions, batch.documents, batch.masked, dropout)
    return cross_entropy(logits, batch.targets).sum()


class Ours:
    """A model, its optimizer and some micro-batches."""

    def __init__(self, setting: Setting, preset: str, lengths: str, dropout: float):
        (self.config, rows, _), device = setting.models[preset], setting.device
        self.model = new_model(self.config, device)
        self.optimizer = Optimizer(self.model, DTYPE, betas=(0.9, 0.999), weight_decay=0.01)
        self.tokens = rows * setting.row_tokens
        self.dropout = Dropout.for_step(dropout, 0, 0, self.config.layers, device)
        bounds = [setting.bounds(lengths, self.tokens, seed) for seed in range(DISTINCT)]
        self.batches = [micro_batch(self.config, *where, device, seed) for seed, where in enumerate(bounds)]

    def micro_batches(self) -> Tensor:
        """Forward and backward of each. Returns the mean loss of the last, in nats."""
        for i, each in enumerate(self.batches):
            dropout = self.dropout and dataclasses.replace(self.dropout, token_offset=i * self.tokens)
            loss = our_loss(self.model, each, dropout)
            loss.backward()
        return loss.detach() / len(each.targets)


def measure(setting: Setting, preset: str, lengths: str, dropout: float, name: str) -> dict:
    """name: "minisobert", or one of PEERS."""
    if name != "minisobert":
        return measure_peer(setting, preset, lengths, dropout, name)
    ours = Ours(setting, preset, lengths, dropout)
    config, device = ours.config, setting.device
    _forget_peak(device)
    loss, guessing = float(ours.micro_batches()), math.log(config.vocabulary)
    if not abs(loss - guessing) < AT_START:
        raise Disagreement(f"the first loss is {loss:.3f}; guessing, which random weights do, gives {guessing:.3f}")
    masked = sum(len(each.targets) for each in ours.batches)
    real = sum(each.real_tokens for each in ours.batches) / DISTINCT
    visible = sum(each.attention_pairs for each in ours.batches) / DISTINCT
    optimizer = seconds(lambda: ours.optimizer.step(1e-4, masked, 1.0), device, flush=False)
    micro_batch = seconds(ours.micro_batches, device, flush=False) / DISTINCT
    flops = meter.training_flops(config, real, visible, masked / DISTINCT)
    accumulation = setting.tokens_per_batch // ours.tokens
    step = accumulation * micro_batch + optimizer
    chip = meter.peak_flops(device)
    return {
        "tokens_per_second": accumulation * real / step,
        "mfu": accumulation * flops / step / chip if chip else None,
        "tflops": accumulation * flops / step / 1e12,
        "peak_bytes": _peak(device),
        "micro_batch_seconds": micro_batch,
        "micro_batch_tokens_per_second": real / micro_batch,
        "optimizer_seconds": optimizer,
        "accumulation": accumulation,
        "micro_batch_tokens": ours.tokens,
        "real_tokens": real,
        "first_loss": loss,
    }


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def _peak(device: torch.device) -> int | None:
    """The most bytes that tensors held since `_forget_peak`."""
    return torch.cuda.max_memory_allocated() if device.type == "cuda" else None


def profile(setting: Setting) -> dict:
    """Where a micro-batch's time goes: the kernels that take most of it (on a CPU: torch's operations)."""
    from torch.profiler import ProfilerActivity

    ours = Ours(setting, "base", "posts", 0.0)
    ours.micro_batches()
    on_gpu = setting.device.type == "cuda"
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]) as profiler:
        ours.micro_batches()
        if on_gpu:
            torch.cuda.synchronize()
    # operations on the host carry the time of the kernels they start, which would count it twice
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    time = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    found = [(getattr(each, time), each) for each in profiler.key_averages() if each.device_type == kind]
    total = sum(microseconds for microseconds, _ in found)
    kernels = [
        {"name": each.key, "calls": each.count / DISTINCT, "seconds": spent / DISTINCT / 1e6, "share": spent / total}
        for spent, each in sorted(found, key=lambda pair: -pair[0])[:KERNELS]
    ]
    return {"seconds": total / DISTINCT / 1e6, "kernels": kernels}


def their_model(name: str, config: ModelConfig, dropout: float, device: torch.device, ours: MaskedLM):
    """MegatronBert with our weights, or ModernBert with random ones of its own."""
    import transformers

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    with torch.device(device):
        if name == "MegatronBert":
            model = megatron_bert.peer(ours, dropout)
        else:
            ids = dict.fromkeys(("bos_token_id", "cls_token_id", "eos_token_id", "sep_token_id"), FIRST_ORDINARY_ID)
            drop = dict.fromkeys(("attention_dropout", "embedding_dropout", "mlp_dropout"), dropout)
            # its MLP has three matrices where ours has two: two thirds as wide has as many weights, as many FLOPs
            sizes = megatron_bert.sizes(config, dropout) | {"intermediate_size": config.ffn * 2 // 3}
            model = transformers.ModernBertForMaskedLM(
                transformers.ModernBertConfig(**sizes, **ids, **drop, pad_token_id=PAD, attn_implementation="sdpa")
            )
    return model.to(device, DTYPE).train()


def padded(lengths: np.ndarray) -> int:
    """The width of a batch of documents."""
    return -(-int(lengths.max()) // PAD_TO) * PAD_TO


def median_batch(lengths: np.ndarray, documents: int, seed: int) -> np.ndarray:
    """Of the documents, shuffled and batched, the lengths in the batch whose share of padding is the median."""
    shuffled = np.random.default_rng(seed).permutation(lengths)
    batches = [shuffled[i : i + documents] for i in range(0, len(shuffled) - documents + 1, documents)]
    return sorted(batches, key=lambda lengths: lengths.mean() / padded(lengths))[len(batches) // 2]


def measure_peer(setting: Setting, preset: str, lengths: str, dropout: float, name: str) -> dict:
    (config, rows, documents), device = setting.models[preset], setting.device
    bounds, real = setting.bounds(lengths, rows * setting.row_tokens, seed=0)
    lengths = median_batch(np.diff(bounds)[real], documents, seed=0)
    width, total = padded(lengths), int(lengths.sum())
    packed = micro_batch(config, np.cumsum([0, *lengths]), np.ones(len(lengths), bool), device, seed=0)
    ours = new_model(config, device)
    model = their_model(name, config, dropout, device, ours)

    def as_batch(x: Tensor, padding: int) -> Tensor:
        """(T,) of packed documents as (documents, width)."""
        x = pad_sequence(x.split(lengths.tolist()), batch_first=True, padding_value=padding)
        return F.pad(x, (0, width - x.shape[1]), value=padding)

    targets = torch.full_like(packed.tokens, -100).index_copy(0, packed.masked, packed.targets)
    inputs = {"input_ids": as_batch(packed.tokens, PAD)}
    labels = as_batch(targets, -100)
    if width > lengths.min():
        inputs["attention_mask"] = as_batch(torch.ones_like(packed.tokens), 0)
    compiled = setting.compile(model, repeat_backward=False)

    def forward_and_backward() -> None:
        compiled(**inputs, labels=labels).loss.backward()

    result = {}
    if not dropout:  # with dropout each draws a mask of its own
        with torch.no_grad():
            expected = float(our_loss(ours.to(DTYPE), packed, None)) / len(packed.targets)
            logits = model(**inputs).logits[labels >= 0]
            theirs = float(cross_entropy_reference(logits, packed.targets).mean())  # the class rounds its own to bf16
            del logits
        tolerance = SAME_WEIGHTS if name == "MegatronBert" else AT_START
        result["difference"] = abs(theirs - expected)
        if not result["difference"] <= tolerance:
            raise Disagreement(f"first loss {theirs:.4f}, minisobert's {expected:.4f}: more than {tolerance} apart")
    del ours
    _forget_peak(device)
    time = seconds(forward_and_backward, device, flush=False)
    return result | {
        "micro_batch_seconds": time,
        "micro_batch_tokens_per_second": total / time,
        "real_tokens": total,
        "padded_tokens": len(lengths) * width,
        "peak_bytes": _peak(device),
        "attends": getattr(model.config, "_attn_implementation", None) or "eager",
        "compiled": not setting.dry,
    }
