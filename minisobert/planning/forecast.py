"""What a layout takes: memory, collectives and the bytes they send, FLOPs. Arithmetic alone: no GPU, no data, no group.

The account follows the kernels (`ops/kernels`): what an operation saves for its backward pass is counted where it is
saved, each storage once. Tests compare it with what autograd keeps, and the collectives with those that run.

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
    """How a run lies on its GPUs."""

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
        """Of a micro-batch."""
        return self.micro_batch_rows * self.row_tokens

    @property
    def masked(self) -> int:
        """Of these, expected, were there no special tokens and no padding, which are never masked."""
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
    group: str  # "tensor", "data", "all", or "hosts" where it goes over gloo
    operation: str  # "all-reduce", "all-gather" or "reduce-scatter"
    bytes: int  # of the whole tensor, in one call
    calls: int


@cache
def _shapes(model: ModelConfig) -> dict[str, torch.Size]:
    """The shape of each parameter, by name."""
    with torch.device("meta"):
        return {name: parameter.shape for name, parameter in MaskedLM(model).named_parameters()}


def parameters(model: ModelConfig, tensor_parallel: int = 1) -> int:
    """Of one rank: its slices of what `splits.SPLITS` splits, and the whole of the rest."""
    return sum(_own_sizes(model, tensor_parallel).values())


def _own_sizes(model: ModelConfig, tensor_parallel: int) -> dict[str, int]:
    """Elements of each parameter that one rank has."""
    return {
        name: shape.numel() // (1 if splits.split_dimension(name) is None else tensor_parallel)
        for name, shape in _shapes(model).items()
    }


def _moments(model: ModelConfig, tensor_parallel: int, muon: bool) -> int:
    """Elements of the optimizer's running means of one rank: two of each parameter, of Muon's one."""
    own = _own_sizes(model, tensor_parallel)
    return sum(n * (1 if muon and is_matrix(name) else 2) for name, n in own.items())


def _outside(layout: Layout) -> int:
    """Tokens of a rank between a row and the next column layer."""
    return layout.tokens // layout.tensor_parallel if layout.sequence_parallel else layout.tokens


def block_activations(model: ModelConfig, layout: Layout, dropout: bool = True) -> int:
    """Bytes that one block keeps for its backward pass, all but the parameters and its residual input.

    Its qkv keeps its normal input; attention q, k, v (views of one tensor, which rotary positions turn in place), its
    output, and for each head and token the softmax's statistic and, with dropout, a hash, and one hash a token; both
    add_norms the residual that they make and two statistics a token; ffn_input its input; GELU its input (where it is
    gated both halves) and ffn_output the GELU's output.
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
    """Bytes that head and loss keep: inputs of dense, GELU, layer norm and decoder; logits; statistics.

    masked: M, where it is known.
    """
    masked = layout.masked if masked is None else masked
    features = 4 * model.hidden + model.vocabulary // layout.tensor_parallel
    return masked * (layout.element * features + 3 * FP32)


def saved_activations(
    model: ModelConfig, layout: Layout, dropout: bool = True, masked: int | None = None, index: int = 4
) -> int:
    """Bytes that autograd keeps at the end of the forward pass of one micro-batch, all but parameters and inputs.

    With recomputation a block keeps its two inputs, residual and normal, which are one tensor in modernbert's first
    block. index: bytes of a token's id.
    """
    tokens, outside, hidden = layout.tokens, _outside(layout), layout.element * model.hidden
    block = 2 * hidden * outside if layout.recompute else block_activations(model, layout, dropout)
    # the first layer norm: two statistics a token, and its input. Where blocks are made again that is the residual of
    # megatron-bert's first block, counted there; modernbert's are the words, and its first block has one input, not two
    first_norm = ((0 if layout.recompute else hidden) + 2 * FP32) * outside
    bases = {model.rope_base_of(layer) for layer in range(model.layers)} if model.is_modern else ()
    rotations = len(bases) * FP32 * model.head_width * tokens  # cos and sin of half the features, for all layers
    # each rank looks up the ids of its own words and masks the other tokens
    lookup = tokens * (index + layout.element) if layout.tensor_parallel > 1 else 0
    return lookup + first_norm + rotations + model.layers * block + head_activations(model, layout, masked)


def memory(model: ModelConfig, layout: Layout, dropout: bool = True, muon: bool = False) -> Memory:
    """Bytes of one GPU at the fullest moment of a step.

    Not in it: the inputs (some 20 bytes a token), the CUDA context (about 0.5 GB), buffers of NCCL and cuBLAS, and what
    the allocator cannot use because it lies in pieces.

    weights: in the layout's precision. gradients: a flat fp32 buffer of all parameters of this rank, whether or not the
    optimizer is sharded. optimizer: Adam's two moments, or with `muon` one of the matrices that it steps; fp32 masters
    beside bf16 weights.
    activations: what autograd keeps. temporary: what is there beside that at the fullest of five moments. Through all
    of them the gradient of the word embeddings waits, which the decoder makes first and the embedding last, in the
    weights' precision. The moments:
    - the loss's backward pass, when all is kept. Beside that are two gradients of (M, h).
    - the backward pass of ffn_output in the last block, which with recomputation has been made again. Head and last
      residual are gone. Beside the block are the gradients of the residual, of the branch (with dropout another one;
      with sequence parallelism gathered from all ranks), and of ffn_output's input and weight.
    - that of a gated GELU before it: the gradients of the residual, of ffn_output's input, which itself is gone, and of
      the two halves.
    - that of ffn_input: GELU's input is gone too. There are the gradients of the residual and of ffn_input's output,
      weight and input, and with sequence parallelism the whole input and the own share of its gradient.
    - the end, when nothing is kept, and the two gradients of the word embeddings become a third, their sum.
    """
    n, element, h, f = layout.tensor_parallel, layout.element, model.hidden, model.ffn
    count = parameters(model, n)
    masters = 0 if layout.precision == "fp32" else FP32
    optimizer = FP32 * _moments(model, n, muon) + masters * count
    optimizer //= layout.data_parallel if layout.shard_optimizer else 1

    tokens, outside = layout.tokens, _outside(layout)
    all_kept = saved_activations(model, layout, dropout)
    last_kept = all_kept - head_activations(model, layout) - (element * h + 2 * FP32) * outside
    if layout.recompute:  # all but the block's input
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
    """What one rank takes part in, in one step. `parallel/collectives.py` says which layer asks for what.

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
    """What one rank sends in a group, by ring algorithms: 2(n-1)/n of a tensor to all-reduce it, else (n-1)/n."""
    n = {"tensor": layout.tensor_parallel, "data": layout.data_parallel}.get(group, layout.gpus)
    sent = [row.calls * row.bytes * (2 if row.operation == "all-reduce" else 1) for row in rows if row.group == group]
    return sum(sent) * (n - 1) // n


def flops_per_token(model: ModelConfig, length: int, masked: float = EVALUATION_RATE) -> float:
    """Of training on documents of `length` tokens. masked: the share that goes through the head."""
    return training_flops(model, 1, attention_pairs(model, np.array([length])) / length, masked)
