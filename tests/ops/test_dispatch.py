"""CUDA tensors take the kernels, all others the references; the model does not notice."""

from __future__ import annotations

import sys
from dataclasses import replace

import pytest
import torch
from against_reference import interpreted

from minisobert import ops
from minisobert.config import ModelConfig
from minisobert.model import MaskedLM
from minisobert.ops import Documents, Dropout, dispatch
from minisobert.training.optimizer import Optimizer

X, VECTOR, PER_TOKEN, TARGETS = torch.zeros(3, 8), torch.zeros(8), torch.zeros(3), torch.zeros(3, dtype=torch.int64)
ARGUMENTS = {
    "add_norm": (X, VECTOR, X, VECTOR, VECTOR, 1e-5),
    "attention": (X[:, None], X[:, None], X[:, None], Documents.from_bounds([0, 3])),
    "bias_gelu": (X, VECTOR),
    "cross_entropy": (X, TARGETS),
    "cross_entropy_parts": (X, TARGETS),
    "cross_entropy_gradient": (X, TARGETS, PER_TOKEN, PER_TOKEN),
    "drop": (X, None),
    "gated_gelu": (X,),
    "self_attention": (torch.zeros(3, 1, 3, 8), Documents.from_bounds([0, 3])),
    "rotary": (torch.zeros(3, 1, 3, 8), torch.zeros(2, 3, 4)),
}


class OnGPU(torch.Tensor):
    is_cuda = True


@pytest.mark.parametrize("name", [name.removesuffix("_reference") for name in ops.__all__ if "_reference" in name])
def test_every_operation_has_a_kernel_that_cuda_tensors_take(name, monkeypatch):
    operation, (on_cpu, *others) = getattr(ops, name), ARGUMENTS[name]
    file = operation.__module__.split(".")[-1]
    monkeypatch.setattr(f"minisobert.ops.kernels.{file}.{name}", lambda *_: "kernel")
    monkeypatch.setattr(sys.modules[operation.__module__], f"{name}_reference", lambda *_: "reference")
    on_gpu = on_cpu.as_subclass(OnGPU)
    assert operation(on_gpu, *others) == "kernel"
    assert operation(on_cpu, *others) == "reference"
    monkeypatch.setattr(dispatch, "HAVE_TRITON", False)  # as on Windows
    assert operation(on_gpu, *others) == "reference"


@interpreted
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_the_model_learns_the_same_with_kernels_as_with_references(p, monkeypatch):
    """Two steps of a whole model in fp32: loss, gradients and weights."""
    config = ModelConfig(layers=2, hidden=128, heads=2, ffn=256, vocabulary=384, positions=128)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, 384, (150,), generator=generator)
    documents = Documents.from_bounds([0, 50, 51, 150])
    positions = torch.cat([torch.arange(n) for n in documents.bounds.diff().tolist()])
    masked = torch.arange(0, 150, 7)

    def train() -> list[torch.Tensor]:
        model = MaskedLM(config).initialise(0)
        optimizer = Optimizer(model, torch.float32, (0.9, 0.999), 0.01)
        seen = []
        for step in range(2):
            dropout = Dropout.for_step(p, 1, step, config.layers)
            dropout = dropout and replace(dropout, token_offset=4_096)
            loss = ops.cross_entropy(model(tokens, positions, documents, masked, dropout), tokens[masked]).sum()
            loss.backward()
            seen += [loss.detach(), optimizer.flat.gradients.clone()]
            optimizer.step(1e-4, len(masked), 1.0)
        return seen

    with_references = train()
    asked = []
    monkeypatch.setattr(dispatch, "takes_kernel", lambda x: asked.append(x) or True)
    with_kernels = train()
    assert len(asked) >= 2 * (1 + 2 * 4 + 2)  # per step: drop, four operations per block, GELU and loss of the head
    for ours, expected in zip(with_kernels, with_references):
        assert (ours - expected).abs().max() <= 1e-5 * expected.abs().max()
