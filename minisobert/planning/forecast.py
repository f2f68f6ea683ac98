"""Estimates for one layout: memory, collectives and the bytes they send, FLOPs. Arithmetic alone: no GPU, no data.

The estimate follows the kernels (`ops/kernels`): each storage that an operation saves for its backward pass is counted
once, where it is saved. Tests compare it with what autograd keeps, and the collectives with those that are called.

    T tokens of a micro-batch   h hidden   H heads   f FFN width   V vocabulary   M masked tokens   n tensor_parallel
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from functools import cache
from typing import NamedTuple

import numpy as np
import torch

from minisobert.config import ModelConfig
from minisobert.corpus.masking import EVALUATION_RATE
from minisobert.model import MaskedLM
from minisobert.parallel import splits
from minisobert.parallel.data import lay_out
from minisobert.training.loop import Tally
from minisobert.training.meter import attention_pairs, training_flops
from minisobert.training.muon import is_matrix

FP32, FP64, INT64 = 4, 8, 8  # bytes


@dataclass(frozen=True)
class Layout:
    """How a run is divided over its GPUs, and what it trades for memory."""

    data_parallel: int = 1
    tensor_parallel: int = 1
    micro_batch_rows: int = 1
    sequence_parallel: bool = False
    shard_optimizer: bool = False
    recompute: bool = False
    precision: str = "bf16"  # or "fp32"
    row_tokens: int = 2_048
    mask_rate: float = EVALUATION_RATE  # the highest of the run

    @property
    def gpus(self) -> int:
        return self.data_parallel * self.tensor_parallel

    @property
    def tokens(self) -> int:
        """Tokens of a micro-batch."""
        return self.micro_batch_rows * self.row_tokens

    @property
    def masked(self) -> int:
        """Masked tokens of a micro-batch, as expected without special tokens and padding, which are never masked."""
        return round(self.mask_rate * self.tokens)

    @property
    def element(self) -> int:
        """Bytes of a weight or an activation."""
        return 2 if self.precision == "bf16" else 4


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    temporary: int

    @property
    def total(self) -> int:
        return sum(astuple(self))


class Collective(NamedTuple):
    """Calls of one size that one rank takes part in, in one optimizer step."""

    name: str
    group: str  # "tensor", "data", "all", or "hosts" if it goes over gloo
    operation: str  # "all-reduce", "all-gather" or "reduce-scatter"
    bytes: int  # of the whole tensor, in one call
    calls: int


@cache
def _shapes(model: ModelConfig) -> dict[str, torch.Size]:
    """The shape of each parameter, by name."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in MaskedLM(model).named_parameters()}


def parameters(model: ModelConfig, tensor_parallel: int = 1) -> int:
    """Parameters on one rank: its slices of those that `splits.SPLITS` splits, and the others whole."""
    return sum(_own_sizes(model, tensor_parallel).values())


def _own_sizes(model: ModelConfig, tensor_parallel: int) -> dict[str, int]:
    """Elements that one rank has of each parameter."""
    return {
        name: shape.numel() // (1 if splits.split_dimension(name) is None else tensor_parallel)
        for name, shape in _shapes(model).items()
    }


def _moments(model: ModelConfig, tensor_parallel: int, muon: bool) -> int:
    """Elements of the optimizer's moments for one rank's parameters: two for each element, one if Muon updates it."""
    own = _own_sizes(model, tensor_parallel)
    return sum(n * (1 if muon and is_matrix(name) else 2) for name, n in own.items())


def _outside(layout: Layout) -> int:
    """Tokens on a rank between a row layer and the next column layer."""
    return layout.tokens // layout.tensor_parallel if layout.sequence_parallel else layout.tokens


def block_activations(model: ModelConfig, layout: Layout, dropout: bool = True) -> int:
    """Bytes that one block saves for its backward pass, except the parameters and its residual input.

    qkv saves its normed input. Attention saves q, k, v (views of one tensor, which rotary positions rotate in place),
    its output, the softmax's statistic for each head and token, and with dropout a hash for each head and token and one
    for each token. Both add_norms save the residual that they compute and two statistics per token. ffn_input saves its
    input, GELU its input (both halves if it is gated), and ffn_output the GELU's output.
    """
    tokens, share, outside = layout.tokens, layout.tokens // layout.tensor_parallel, _outside(layout)
    features = 4 * model.hidden + (3 if model.is_modern else 2) * model.ffn  # between column and row layers
    per_head = model.heads * share * FP32
    return (
        layout.element * (features * share + 4 * model.hidden * outside)
        + 2 * 2 * FP32 * outside
        + per_head
        + dropout * (per_head + FP32 * tokens)
    )


def head_activations(model: ModelConfig, layout: Layout, masked: int | None = None) -> int:
    """Bytes that head and loss save: inputs of dense, GELU, layer norm and decoder; logits; statistics.

    masked: M, if it is known.
    """
    masked = layout.masked if masked is None else masked
    features = 4 * model.hidden + model.vocabulary // layout.tensor_parallel
    return masked * (layout.element * features + 3 * FP32)


def saved_activations(
    model: ModelConfig, layout: Layout, dropout: bool = True, masked: int | None = None, index: int = 4
) -> int:
    """Bytes that autograd keeps at the end of the forward pass of one micro-batch, except parameters and inputs.

    With recomputation a block keeps its two inputs, residual and normed, which are one tensor in modernbert's first
    block. index: bytes of a token's id.
    """
    tokens, outside, hidden = layout.tokens, _outside(layout), layout.element * model.hidden
    block = 2 * hidden * outside if layout.recompute else block_activations(model, layout, dropout)
    # the first layer norm saves two statistics a token, and its input. With recomputation its input in megatron-bert is
    # the residual input of the first block, counted there; in modernbert it is the word embeddings, and the first block
    # has one input, not two
    first_norm = ((0 if layout.recompute else hidden) + 2 * FP32) * outside
    bases = {model.rope_base_of(layer) for layer in range(model.layers)} if model.is_modern else ()
    rotations = len(bases) * FP32 * model.head_width * tokens  # cos and sin of half the features, shared by all layers
    # each rank looks up the ids of its own words and masks the other tokens
    lookup = tokens * (index + layout.element) if layout.tensor_parallel > 1 else 0
    return lookup + first_norm + rotations + model.layers * block + head_activations(model, layout, masked)


def memory(model: ModelConfig, layout: Layout, dropout: bool = True, muon: bool = False) -> Memory:
    """Bytes on one GPU at the peak of a step.

    Not included: the inputs (some 20 bytes a token), the CUDA context (about 0.5 GB), buffers of NCCL and cuBLAS, and
    what the allocator loses to fragmentation.

    weights: in the layout's precision. gradients: a flat fp32 buffer of all parameters of this rank, whether or not the
    optimizer is sharded. optimizer: Adam's two moments, or with `muon` one for the matrices that it updates, and fp32
    masters if the weights are bf16.
    activations: what autograd keeps. temporary: what exists in addition at the peak, which is at one of five moments.
    Through all of them there is the gradient of the word embeddings, in the weights' precision: the decoder computes
    its part first, the embedding last. The moments:
    - the backward pass of the loss, when all activations are kept. In addition there are two gradients of (M, h).
    - that of ffn_output in the last block, which has just been recomputed if the layout recomputes. Head and last
      residual are freed. In addition there are the gradients of the residual, of the branch (another tensor with
      dropout; gathered from all ranks with sequence parallelism), and of ffn_output's input and weight.
    - that of a gated GELU before it: the gradients of the residual, of ffn_output's input, which is itself freed, and
      of the two halves.
    - that of ffn_input: GELU's input is freed, too. There are the gradients of the residual and of ffn_input's output,
      weight and input, and with sequence parallelism its whole input and this rank's share of its gradient.
    - the end, when no activations are kept, and the two gradients of the word embeddings are added into a third.
    """
    n, element, h, f = layout.tensor_parallel, layout.element, model.hidden, model.ffn
    count = parameters(model, n)
    masters = 0 if layout.precision == "fp32" else FP32
    optimizer = FP32 * _moments(model, n, muon) + masters * count
    optimizer //= layout.data_parallel if layout.shard_optimizer else 1

    tokens, outside = layout.tokens, _outside(layout)
    all_kept = saved_activations(model, layout, dropout)
    last_kept = all_kept - head_activations(model, layout) - (element * h + 2 * FP32) * outside
    if layout.recompute:  # all except the block's input
        last_kept += block_activations(model, layout, dropout) - element * h * outside
    branch = tokens if dropout or layout.sequence_parallel else 0
    halves = 2 if model.is_modern else 1
    at_output = h * branch + f * (tokens + h) // n
    at_gelu = halves * f * tokens // n
    gathered = tokens + outside if layout.sequence_parallel else 0
    at_input = h * (tokens + gathered) + f * (halves * h - tokens) // n
    last_gradients = h * outside + max(at_output, at_gelu, at_input)
    words_waiting = h * model.vocabulary // n
    activations, temporary = max(
        (all_kept, element * (words_waiting + 2 * h * layout.masked)),
        (last_kept, element * (words_waiting + last_gradients)),
        key=sum,
    )
    temporary = max(temporary, 3 * element * words_waiting - activations)
    return Memory(element * count, FP32 * count, optimizer, activations, temporary)


def collectives(model: ModelConfig, layout: Layout, masked: Sequence[int]) -> list[Collective]:
    """The collectives that one rank takes part in, in one step. `parallel/collectives.py` says which layer calls which.

    masked: M of each of the rank's micro-batches.
    """
    element, batches, sequence = layout.element, len(masked), layout.sequence_parallel
    rows = []
    if layout.tensor_parallel > 1:
        backward = 2 * model.layers * batches  # two column and two row layers a block
        forward = backward * (2 if layout.recompute else 1)
        into, out_of = ("all-gather", "reduce-scatter") if sequence else (None, "all-reduce")
        hidden = [
            ("embedding", out_of, batches),
            ("column layers", into, forward),
            ("row layers", out_of, forward),
            ("end of the encoder", into, batches),
            ("embedding, backward", into, batches),
            ("row layers, backward", into, backward),
            ("column layers' input, again", into, backward),
            ("column layers, backward", out_of, backward),
        ]
        size = element * model.hidden * layout.tokens
        rows = [Collective(name, "tensor", operation, size, n) for name, operation, n in hidden if operation]
        for m, n in Counter(masked).items():
            rows.append(Collective("decoder, backward", "tensor", "all-reduce", element * model.hidden * m, n))
            rows.append(Collective("loss, max", "tensor", "all-reduce", FP32 * m, n))
            rows.append(Collective("loss, sums", "tensor", "all-reduce", 2 * FP32 * m, n))
    _, buckets = lay_out(_own_sizes(model, layout.tensor_parallel), layout.data_parallel, sequence)
    for bucket in buckets:
        size = bucket.stop - bucket.start
        if bucket.by_tokens:
            rows.append(Collective("gradients by tokens", "tensor", "all-reduce", FP32 * size, 1))
        if layout.data_parallel > 1:
            operation = "reduce-scatter" if layout.shard_optimizer else "all-reduce"
            rows.append(Collective("gradients", "data", operation, FP32 * size, 1))
            if layout.shard_optimizer:
                rows.append(Collective("parameters", "data", "all-gather", element * size, 1))
    if layout.gpus > 1:
        rows.append(Collective("gradient norm", "all", "all-reduce", FP64, 1))
        rows.append(Collective("counts and notes", "hosts", "all-reduce", INT64 * len(Tally._fields), 1))
    if layout.data_parallel > 1:
        rows.append(Collective("loss", "data", "all-reduce", FP64, 1))
    return rows


def wire_bytes(rows: Sequence[Collective], layout: Layout, group: str) -> int:
    """Bytes that one rank sends in a group by ring algorithms: 2(n-1)/n of a tensor to all-reduce it, else (n-1)/n."""
    n = {"tensor": layout.tensor_parallel, "data": layout.data_parallel}.get(group, layout.gpus)
    sent = [row.calls * row.bytes * (2 if row.operation == "all-reduce" else 1) for row in rows if row.group == group]
    return sum(sent) * (n - 1) // n


def flops_per_token(model: ModelConfig, length: int, masked: float = EVALUATION_RATE) -> float:
    """FLOPs of training, per token of documents with `length` tokens. masked: the share that goes through the head."""
    return training_flops(model, 1, attention_pairs(model, np.array([length])) / length, masked)
