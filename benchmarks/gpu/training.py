"""Training throughput: a batch of 524,288 tokens by its micro-batches, bf16, forward, backward and AdamW.

A step takes accumulation × micro-batch + optimizer, which are timed apart. Tokens are real ones. The peers are
transformers' classes of the same layers, width and heads, compiled, in plain bf16, on the same documents: shuffled, in
batches padded to their longest, rounded up to a multiple of 128. Of their batches the one with the median share of
padding is timed, so that one shape is compiled. They compute logits for all tokens, as their classes do, and their
optimizer is left out, so that they are to be compared with our micro-batches alone.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks import megatron_bert
from benchmarks.gpu.setting import DTYPE, Setting, pairs
from benchmarks.gpu.timing import Disagreement, seconds
from minisobert.config import ModelConfig
from minisobert.corpus.tokenizer import FIRST_ORDINARY_ID, MASK, PAD
from minisobert.model import MaskedLM
from minisobert.ops import Documents, Dropout, cross_entropy, cross_entropy_reference
from minisobert.training import meter
from minisobert.training.optimizer import Optimizer

MASKED = 0.15
DISTINCT = 4  # micro-batches that are timed one after the other, so that packed rows differ as they do in a run
PAD_TO = 128
KERNELS = 15  # rows of the profile
SAME_WEIGHTS = 0.01  # nats between mean losses with the same weights: a bf16 logit near 1 is off by up to 0.004
AT_START = 0.5  # nats between the loss of new random weights and ln V, which guessing gives


@dataclass(frozen=True)
class Batch:
    """A micro-batch of random pieces. targets: what the masked tokens were."""

    tokens: Tensor
    positions: Tensor
    documents: Documents
    masked: Tensor
    targets: Tensor
    real_tokens: int
    pairs: int


def batch(model: ModelConfig, bounds: np.ndarray, real: np.ndarray, device: torch.device, seed: int) -> Batch:
    """The documents of bounds; those that are not real are padding, and nothing in them is masked."""
    generator = np.random.default_rng(seed)
    lengths = np.diff(bounds)
    is_real = np.repeat(real, lengths)
    tokens = np.where(is_real, generator.integers(FIRST_ORDINARY_ID, model.vocabulary, bounds[-1]), PAD)
    positions = np.arange(bounds[-1]) - np.repeat(bounds[:-1], lengths)
    masked = np.nonzero(is_real & (generator.random(bounds[-1]) < MASKED))[0]
    targets = tokens[masked]
    tokens[masked] = MASK
    on_device = (torch.from_numpy(x).to(device) for x in (tokens, positions, masked, targets))
    tokens, positions, masked, targets = on_device
    documents = Documents.from_bounds(bounds, device)
    return Batch(tokens, positions, documents, masked, targets, int(is_real.sum()), pairs(bounds, real))


def new_model(config: ModelConfig, device: torch.device) -> MaskedLM:
    """With weights N(0, 0.02), made on the device: the initialisation of a real run takes a CPU many seconds."""
    with torch.device(device):
        torch.manual_seed(0)
        model = MaskedLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.zero_()
            elif "norm" not in name:
                parameter.normal_(0, 0.02)
    return model


def our_loss(model: MaskedLM, batch: Batch, dropout: Dropout | None) -> Tensor:
    """The sum over the masked tokens."""
    logits = model(batch.tokens, batch.positions, batch.documents, batch.masked, dropout)
    return cross_entropy(logits, batch.targets).sum()


class Ours:
    """What `measure` and `profile` share: a model, its optimizer and some micro-batches."""

    def __init__(self, setting: Setting, preset: str, lengths: str, dropout: float):
        self.setting, size = setting, setting.training[preset]
        self.config, device = size.model, setting.device
        self.model = new_model(self.config, device)
        self.optimizer = Optimizer(self.model, DTYPE, betas=(0.9, 0.999), weight_decay=0.01)
        self.tokens = size.micro_batch_rows * setting.row_tokens
        self.dropout = Dropout.for_step(dropout, 0, 0, self.config.layers, device)
        bounds = [setting.bounds(lengths, self.tokens, seed) for seed in range(DISTINCT)]
        self.batches = [batch(self.config, *where, device, seed) for seed, where in enumerate(bounds)]

    def micro_batches(self) -> Tensor:
        """Forward and backward of each. Returns the mean loss of the last, in nats."""
        for i, each in enumerate(self.batches):
            dropout = self.dropout and dataclasses.replace(self.dropout, token_offset=i * self.tokens)
            loss = our_loss(self.model, each, dropout)
            loss.backward()
        return loss.detach() / len(each.targets)


def measure(setting: Setting, preset: str, lengths: str, dropout: float) -> dict:
    ours = Ours(setting, preset, lengths, dropout)
    device, config, batches = setting.device, ours.config, ours.batches
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    loss = float(ours.micro_batches())
    guessing = math.log(config.vocabulary)
    if not abs(loss - guessing) < AT_START:
        raise Disagreement(f"the first loss is {loss:.3f}; guessing, which random weights do, gives {guessing:.3f}")
    masked = sum(len(each.targets) for each in batches)
    optimizer = seconds(lambda: ours.optimizer.step(1e-4, masked, 1.0), device, flush=False)
    micro_batch = seconds(ours.micro_batches, device, flush=False) / DISTINCT
    real = sum(each.real_tokens for each in batches) / DISTINCT
    flops = meter.training_flops(config, real, sum(each.pairs for each in batches) / DISTINCT, masked / DISTINCT)
    accumulation = setting.tokens_per_batch // ours.tokens
    step = accumulation * micro_batch + optimizer
    peak = meter.peak_flops(device)
    return {
        "tokens_per_second": accumulation * real / step,
        "mfu": accumulation * flops / step / peak if peak else None,
        "tflops": accumulation * flops / step / 1e12,
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "micro_batch_seconds": micro_batch,
        "micro_batch_tokens_per_second": real / micro_batch,
        "optimizer_seconds": optimizer,
        "accumulation": accumulation,
        "micro_batch_tokens": ours.tokens,
        "real_tokens": real,
        "first_loss": loss,
    }


def profile(setting: Setting, preset: str, lengths: str, dropout: float) -> dict:
    """Where a micro-batch's time goes: the kernels that take most of it (on a CPU: torch's operations)."""
    from torch.profiler import ProfilerActivity

    ours = Ours(setting, preset, lengths, dropout)
    ours.micro_batches()
    on_gpu = setting.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * on_gpu]
    with torch.profiler.profile(activities=activities) as profiler:
        ours.micro_batches()
        if on_gpu:
            torch.cuda.synchronize()
    # operations on the host carry the time of the kernels they start, which would count it twice
    kind = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    time = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = [event for event in profiler.key_averages() if event.device_type == kind]
    events.sort(key=lambda event: -getattr(event, time))
    total = sum(getattr(event, time) for event in events)
    return {
        "milliseconds": total / DISTINCT / 1e3,
        "kernels": [
            {
                "name": event.key,
                "calls": event.count / DISTINCT,
                "milliseconds": getattr(event, time) / DISTINCT / 1e3,
                "share": getattr(event, time) / total,
            }
            for event in events[:KERNELS]
        ],
    }


def their_model(name: str, config: ModelConfig, dropout: float, device: torch.device, ours: MaskedLM):
    """(the model, how it attends). MegatronBert has our weights."""
    import transformers

    transformers.logging.set_verbosity_error()
    with torch.device(device):
        torch.manual_seed(0)
        if name == "MegatronBert":
            model = megatron_bert.peer(ours, dropout)
        else:
            sizes = {
                "vocab_size": config.vocabulary,
                "hidden_size": config.hidden,
                "num_hidden_layers": config.layers,
                "num_attention_heads": config.heads,
                # its MLP has three matrices where ours has two: as many weights, as many FLOPs
                "intermediate_size": config.ffn * 2 // 3,
                "max_position_embeddings": config.positions,
                "attention_dropout": dropout,
                "embedding_dropout": dropout,
                "mlp_dropout": dropout,
                "pad_token_id": PAD,
                **dict.fromkeys(("bos_token_id", "cls_token_id", "eos_token_id", "sep_token_id"), FIRST_ORDINARY_ID),
            }
            model = transformers.ModernBertForMaskedLM(
                transformers.ModernBertConfig(**sizes, attn_implementation="sdpa")
            )
    attends = getattr(model.config, "_attn_implementation", None) or "eager"
    return model.to(device, DTYPE).train(), attends


PEERS = ("ModernBert", "MegatronBert")


def median_batch(lengths: np.ndarray, documents: int, seed: int) -> np.ndarray:
    """Of the documents, shuffled and batched, the lengths in the batch whose share of padding is the median."""
    shuffled = np.random.default_rng(seed).permutation(lengths)
    batches = [shuffled[i : i + documents] for i in range(0, len(shuffled) - documents + 1, documents)]
    return sorted(batches, key=lambda lengths: lengths.mean() / padded(lengths))[len(batches) // 2]


def padded(lengths: np.ndarray) -> int:
    """The width of a batch of documents."""
    return -(-int(lengths.max()) // PAD_TO) * PAD_TO


def measure_peer(setting: Setting, preset: str, lengths: str, dropout: float, name: str) -> dict:
    size, device = setting.training[preset], setting.device
    bounds, real = setting.bounds(lengths, size.micro_batch_rows * setting.row_tokens, seed=0)
    documents = median_batch(np.diff(bounds)[real], size.peer_documents, seed=0)
    width = padded(documents)
    packed = batch(
        size.model, np.concatenate([[0], np.cumsum(documents)]), np.ones(len(documents), bool), device, seed=0
    )
    ours = new_model(size.model, device)
    model, attends = their_model(name, size.model, dropout, device, ours)

    labels = torch.full_like(packed.tokens, -100)
    labels[packed.masked] = packed.targets
    padding = [(0, width - n) for n in documents.tolist()]
    parts = [x.split(documents.tolist()) for x in (packed.tokens, labels)]
    tokens = torch.stack([F.pad(part, pad, value=PAD) for part, pad in zip(parts[0], padding)])
    labels = torch.stack([F.pad(part, pad, value=-100) for part, pad in zip(parts[1], padding)])
    real_tokens = None
    if width > documents.min():
        real_tokens = (torch.arange(width, device=device) < torch.tensor(documents, device=device)[:, None]).long()
    compiled = setting.compile(model, repeat_backward=False)

    def micro_batch() -> Tensor:
        loss = compiled(input_ids=tokens, attention_mask=real_tokens, labels=labels).loss
        loss.backward()
        return loss.detach()

    result = {}
    if not dropout:  # with dropout each draws a mask of its own
        with torch.no_grad():
            expected = float(our_loss(ours.to(DTYPE), packed, None)) / len(packed.targets)
            logits = model(input_ids=tokens, attention_mask=real_tokens).logits[labels >= 0]
            theirs = float(cross_entropy_reference(logits, packed.targets).mean())  # the class rounds its own to bf16
            del logits
        tolerance = SAME_WEIGHTS if name == "MegatronBert" else AT_START
        result["difference"] = abs(theirs - expected)
        if not result["difference"] <= tolerance:
            raise Disagreement(f"first loss {theirs:.4f}, minisobert's {expected:.4f}: more than {tolerance} apart")
    del ours
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    time = seconds(micro_batch, device, flush=False)
    return result | {
        "micro_batch_seconds": time,
        "micro_batch_tokens_per_second": int(documents.sum()) / time,
        "real_tokens": int(documents.sum()),
        "padded_tokens": len(documents) * width,
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else None,
        "attends": attends,
        "compiled": not setting.dry,
    }
