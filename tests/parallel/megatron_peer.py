"""Trains Megatron-LM's own BERT (megatron-core) for a few steps on CPUs: the peer in the parity test.

Model, data parallelism, schedule of micro-batches, clipping, optimizer and learning rate are all Megatron's own code:
`BertModel` with its local layers, `DistributedDataParallel`, `get_forward_backward_func` with `finalize_model_grads`,
`get_megatron_optimizer` (torch's AdamW if apex is missing) and `OptimizerParamScheduler`. Only the description of the
model, the names of its weights and `on_cpu` are ours.

    b sequences of a micro-batch   s positions, with padding at the end of each sequence
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from minisobert.config import ModelConfig

# Ours → Megatron's, for the parts of a name. The (heads, 3, d) order of qkv's outputs is the same on both sides.
NAMES = {
    "encoder.embeddings.word.": "embedding.word_embeddings.",
    "encoder.embeddings.position.": "embedding.position_embeddings.",
    "encoder.embeddings.token_type.": "embedding.tokentype_embeddings.",
    "encoder.final_norm.": "encoder.final_layernorm.",
    "encoder.blocks.": "encoder.layers.",
    ".attention_norm.": ".input_layernorm.",
    ".qkv.": ".self_attention.linear_qkv.",
    ".attention_output.": ".self_attention.linear_proj.",
    ".ffn_norm.": ".pre_mlp_layernorm.",
    ".ffn_input.": ".mlp.linear_fc1.",
    ".ffn_output.": ".mlp.linear_fc2.",
    "mlm_head.dense.": "lm_head.dense.",
    "mlm_head.norm.": "lm_head.layer_norm.",
    "mlm_head.decoder.": "output_layer.",
}


class MicroBatch(NamedTuple):
    """One document per sequence."""

    tokens: Tensor  # (b, s) int64
    lengths: Tensor  # (b,): padding follows after them
    labels: Tensor  # (b, s) int64: the targets where masked, any id elsewhere
    masked: Tensor  # (b, s) fp32: 1 where the loss is counted, 0 elsewhere


@dataclass(frozen=True)
class Recipe:
    peak: float
    warmup_steps: float  # from a rate of 0, that of Megatron's first step
    decay_steps: int  # to final_fraction · peak, where the rate stays
    final_fraction: float = 0.1
    clip: float = 1.0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8


class Trained(NamedTuple):
    losses: list[float]  # of each step, before its update
    norms: list[float]  # of each step's gradient, before clipping
    rates: list[float]  # each step's learning rate
    weights: dict[str, Tensor]  # whole, under our names, after the last step


class _NoCuda(TorchFunctionMode):
    """Intercepts all calls of torch functions, in whose arguments Megatron has literals for its GPU."""

    def __torch_function__(self, function, types, arguments=(), keywords=None):
        keywords = dict(keywords or {})
        if keywords.get("device") == "cuda":  # for norms, counters and flags
            keywords["device"] = "cpu"
        result = function(*arguments, **keywords)
        if function is Tensor.type and result == "torch.FloatTensor":  # clipping asserts that gradients are on a GPU
            return "torch.cuda.FloatTensor"
        return result


@contextmanager
def on_cpu() -> Iterator[None]:
    """Lets megatron-core do on a CPU what it does on a GPU. It patches globals, so use it in a process of its own."""
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    # the device on which most tensors are made
    device = mock.patch("torch.cuda.current_device", lambda: torch.device("cpu"))
    # a tensor rank's own generator, for initial weights, which are overwritten, and for dropout, which is 0
    fork = mock.patch.object(CudaRNGStatesTracker, "fork", lambda self, name=None: nullcontext())
    with _NoCuda(), device, fork:
        yield


def bert(config: ModelConfig) -> nn.Module:
    """Megatron's model with this config, sliced for this tensor rank; its initial weights have no meaning."""
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
    from megatron.core.models.bert.bert_model import BertModel
    from megatron.core.parallel_state import get_tensor_model_parallel_world_size
    from megatron.core.transformer.transformer_config import TransformerConfig

    assert config.gelu == "erf"  # the only one in the masked-LM head of BertModel
    # its defaults are pre-LN, biases everywhere and no fused kernels
    transformer = TransformerConfig(
        num_layers=config.layers, hidden_size=config.hidden, num_attention_heads=config.heads,
        ffn_hidden_size=config.ffn, layernorm_epsilon=config.norm_eps, activation_func=F.gelu,
        hidden_dropout=0.0, attention_dropout=0.0, tensor_model_parallel_size=get_tensor_model_parallel_world_size(),
    )  # fmt: skip
    return BertModel(
        transformer, num_tokentypes=2, transformer_layer_spec=bert_layer_local_spec, vocab_size=config.vocabulary,
        max_sequence_length=config.positions, share_embeddings_and_output_weights=True, add_binary_head=False,
    )  # fmt: skip


def pairs(model: nn.Module, weights: dict[str, Tensor]) -> Iterator[tuple[str, Tensor, nn.Parameter]]:
    """(our name, whole tensor, Megatron's parameter) for each parameter, once. Raises RuntimeError if they do not
    match."""
    parameters = dict(model.named_parameters())
    for name, whole in weights.items():
        theirs = name
        for ours, megatron in NAMES.items():
            theirs = theirs.replace(ours, megatron)
        if theirs not in parameters:
            raise RuntimeError(f"Megatron's model has no {theirs}, or two of our names mean it: {name}")
        yield name, whole, parameters.pop(theirs)
    if parameters:
        raise RuntimeError(f"no weights for {', '.join(parameters)}")


@torch.no_grad()
def load(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Loads weights: whole, fp32, under our names. Each parameter gets its tensor rank's slice."""
    from megatron.core.parallel_state import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size

    for name, whole, parameter in pairs(model, weights):
        if getattr(parameter, "tensor_model_parallel", False):
            slices = whole.chunk(get_tensor_model_parallel_world_size(), parameter.partition_dim)
            whole = slices[get_tensor_model_parallel_rank()]
        if whole.shape != parameter.shape:
            raise RuntimeError(f"{name} is {tuple(whole.shape)}, Megatron's {tuple(parameter.shape)}")
        parameter.copy_(whole)


def gathered(model: nn.Module, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The model's present weights, whole and under the names of `weights`, on every rank.

    Raises RuntimeError if a parameter that every tensor rank holds whole differs between them.
    """
    from megatron.core.parallel_state import get_tensor_model_parallel_group

    group, whole = get_tensor_model_parallel_group(), {}
    for name, _, parameter in pairs(model, weights):
        slices = [torch.empty_like(parameter) for _ in range(group.size())]
        dist.all_gather(slices, parameter.detach(), group=group)
        if getattr(parameter, "tensor_model_parallel", False):
            whole[name] = torch.cat(slices, parameter.partition_dim)
        elif all(torch.equal(slices[0], other) for other in slices):
            whole[name] = slices[0]
        else:
            raise RuntimeError(f"{name} is no longer the same on all tensor ranks")
    return whole


def forward_step(batches: Iterator[MicroBatch], model: nn.Module):
    """Called by Megatron's schedule for each micro-batch: returns per-token losses (b, s), and a function that reduces
    them to one loss."""
    batch = next(batches)
    real = torch.arange(batch.tokens.shape[1]) < batch.lengths[:, None]  # (b, s)
    losses, _ = model(batch.tokens, real.long(), tokentype_ids=torch.zeros_like(batch.tokens), lm_labels=batch.labels)

    def mean(losses: Tensor) -> tuple[Tensor, Tensor]:
        loss = (losses * batch.masked).sum() / batch.masked.sum()
        return loss, loss.detach().clone()  # the first will be divided in place by the number of micro-batches

    return losses, mean


def train(
    config: ModelConfig,
    weights: dict[str, Tensor],
    batches: list[list[MicroBatch]],
    recipe: Recipe,
    tensor_parallel: int,
) -> Trained:
    """Makes a step for each list of micro-batches in `batches`; the data-parallel ranks take the micro-batches in turn.

    torch.distributed must be initialised (gloo), and all its ranks must call this with the same arguments.
    """
    from megatron.core import parallel_state
    from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
    from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
    from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
    from megatron.core.pipeline_parallel import get_forward_backward_func

    parallel_state.initialize_model_parallel(tensor_parallel, create_gloo_process_groups=False)
    data_group = parallel_state.get_data_parallel_group()
    model = bert(config)
    load(model, weights)
    model.config.finalize_model_grads_func = finalize_model_grads
    model = DistributedDataParallel(model.config, DistributedDataParallelConfig(grad_reduce_in_fp32=True), model)
    final = recipe.final_fraction * recipe.peak
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=recipe.peak, min_lr=final, weight_decay=recipe.weight_decay, clip_grad=recipe.clip,
            adam_beta1=recipe.betas[0], adam_beta2=recipe.betas[1], adam_eps=recipe.eps,
        ),
        [model],
        use_gloo_process_groups=False,
    )  # fmt: skip
    scheduler = OptimizerParamScheduler(
        optimizer, init_lr=0.0, max_lr=recipe.peak, min_lr=final, lr_warmup_steps=recipe.warmup_steps,
        lr_decay_steps=recipe.decay_steps, lr_decay_style="linear", start_wd=recipe.weight_decay,
        end_wd=recipe.weight_decay, wd_incr_steps=recipe.decay_steps, wd_incr_style="constant",
    )  # fmt: skip
    trained = Trained([], [], [], {})
    for micro_batches in batches:
        model.zero_grad_buffer()
        optimizer.zero_grad()
        assert len(micro_batches) % data_group.size() == 0
        share = micro_batches[data_group.rank() :: data_group.size()]
        losses = get_forward_backward_func()(
            forward_step_func=forward_step, data_iterator=iter(share), model=model, num_microbatches=len(share),
            seq_length=share[0].tokens.shape[1], micro_batch_size=len(share[0].tokens),
        )  # fmt: skip
        loss = torch.stack(losses).mean()
        dist.all_reduce(loss, group=data_group)
        trained.losses.append(loss.item() / data_group.size())
        trained.rates.append(optimizer.param_groups[0]["lr"])
        _, norm, _ = optimizer.step()
        trained.norms.append(norm)
        scheduler.step(1)
    trained.weights.update(gathered(model.module, weights))
    parallel_state.destroy_model_parallel()
    return trained


def spawn(world: int, tensor_parallel: list[int], folder: Path, *arguments) -> list[Trained]:
    """Calls `train(*arguments, n)` for each n of tensor_parallel in turn, in `world` new processes.

    folder: an empty one, through which the processes communicate with each other and with this one.
    """
    torch.multiprocessing.spawn(_work, (world, tensor_parallel, folder, arguments), nprocs=world)
    return torch.load(folder / "trained.pt", weights_only=False)


def _work(rank: int, world: int, tensor_parallel: list[int], folder: Path, arguments: tuple) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")  # there are many, about apex and Transformer Engine
    dist.init_process_group("gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=world)
    with on_cpu():
        trained = [train(*arguments, n) for n in tensor_parallel]
    if rank == 0:
        torch.save(trained, folder / "trained.pt")
    dist.destroy_process_group()
