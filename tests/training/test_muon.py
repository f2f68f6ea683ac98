"""Muon by itself and as part of the optimizer; tests/parallel/test_trajectory.py tests it on every layout."""

from __future__ import annotations

import pytest
import torch

from minisobert.config import ModelConfig
from minisobert.model import MaskedLM
from minisobert.parallel.mesh import Mesh
from minisobert.training import muon
from minisobert.training.optimizer import Optimizer

MODELS = {
    "megatron-bert": ModelConfig(layers=2, hidden=64, heads=4, ffn=160, vocabulary=128, positions=32),
    "modernbert": ModelConfig(layers=2, hidden=64, heads=4, ffn=96, vocabulary=128, architecture="modernbert"),
}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("rows", [16, 64, 200])
def test_directions_are_those_of_the_svd_and_about_as_large_as_each_other(rows):
    x = random(3, rows, 64) @ torch.logspace(0, -1, 64).diag()  # singular values over more than a decade
    o = muon.orthogonalise(x, Mesh()).double()
    a, sigma, b = torch.linalg.svd(x.double(), full_matrices=False)
    along = a.mT @ o @ b.mT
    sizes = along.diagonal(dim1=1, dim2=2)
    assert (along - sizes.diag_embed()).abs().max() < 1e-4
    large = sigma > 0.01 * x.norm(dim=(1, 2))[:, None]
    assert large.sum() > 0.7 * large.numel()
    assert sizes[large].min() > 0.3
    assert sizes.max() < 1.25


def test_a_matrix_without_gradient_stays_zero():
    assert (muon.orthogonalise(torch.zeros(2, 8, 8), Mesh()) == 0).all()


@pytest.mark.parametrize("architecture", MODELS)
def test_every_element_of_a_matrix_is_in_one_view_and_embeddings_norms_and_biases_are_in_none(architecture):
    config = MODELS[architecture]
    for name, p in MaskedLM(config).named_parameters():
        assert muon.is_matrix(name) == (p.dim() == 2 and "embeddings" not in name), name
        if muon.is_matrix(name):
            numbered = torch.arange(p.numel()).view(p.shape)
            found = muon.matrices(name, numbered, config.head_width)
            assert sorted(found.flatten().tolist()) == numbered.flatten().tolist()
            assert found.shape[-1] == (config.head_width if ".qkv." in name else config.hidden)


def test_rows_of_qkv_are_told_apart_by_head_and_by_what_they_make():
    config = MODELS["modernbert"]
    x = random(5, 64)
    weight = random(3 * 64, 64, seed=1)
    q, k, v = torch.nn.functional.linear(x, weight).unflatten(1, (-1, 3, config.head_width)).unbind(2)
    made = torch.stack([q, k, v], 2).flatten(1, 2).unbind(1)  # query, key and value of the first head, then of the next
    for each, matrix in zip(made, muon.matrices("encoder.blocks.0.qkv.weight", weight, config.head_width), strict=True):
        torch.testing.assert_close(each, x @ matrix)


def test_steps_are_those_of_torchs_muon_up_to_the_rounding_of_its_bf16():
    """torch.optim.Muon iterates in bf16, so its direction is only close to ours."""
    config, rate, decay = MODELS["megatron-bert"], 0.02, 0.1
    model = MaskedLM(config).initialise(0)
    name = "encoder.blocks.0.attention_output.weight"
    theirs = torch.nn.Parameter(model.get_parameter(name).detach().clone())
    peer = torch.optim.Muon([theirs], rate, decay, momentum=0.9, nesterov=True, adjust_lr_fn="match_rms_adamw")
    optimizer = Optimizer(model, torch.float32, (0.9, 0.999), decay, momentum=0.9)
    before = theirs.detach().clone()
    for step in range(3):
        theirs.grad = random(*theirs.shape, seed=step)
        optimizer.flat.gradient(name).copy_(theirs.grad)
        optimizer.step(0.0, 1, clip=1e9, muon_learning_rate=rate)
        peer.step()
    ours = model.get_parameter(name)
    assert (ours - theirs).norm() < 0.02 * (theirs - before).norm()


def test_only_its_matrices_take_muons_rate_and_lose_their_second_moment():
    model = MaskedLM(MODELS["modernbert"]).initialise(0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Optimizer(model, torch.float32, (0.9, 0.999), 0.0, momentum=0.95)
    optimizer.flat.gradients.normal_(generator=torch.Generator().manual_seed(0))
    optimizer.step(0.0, 1, clip=1.0, muon_learning_rate=0.1)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != muon.is_matrix(name), name
        moments = {file_and_name[1].split(".")[0] for file_and_name in optimizer.checkpoint_names(name)[1:]}
        assert moments == ({"exp_avg"} if muon.is_matrix(name) else {"exp_avg", "exp_avg_sq"})
    steps = [(p - before[name]).square().mean().sqrt() for name, p in model.named_parameters() if muon.is_matrix(name)]
    # as large as AdamW's: 0.2 learning rates per element, if all singular values were 1
    assert all(0.014 < step < 0.024 for step in steps)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    model = MaskedLM(MODELS["modernbert"]).initialise(0)
    optimizer = Optimizer(model, torch.float32, (0.9, 0.999), 0.1, momentum=0.95)
    optimizer.flat.gradients.fill_(1.0)
    optimizer.step(0.01, 1, clip=1.0, muon_learning_rate=0.01)
    kept = [t.clone() for part in optimizer.parts for t in optimizer.tensors(part)]
    optimizer.flat.gradient("encoder.blocks.1.qkv.weight")[3, 5] = bad
    _, applied = optimizer.step(0.01, 1, clip=1.0, muon_learning_rate=0.01)
    assert not applied
    assert all(map(torch.equal, kept, (t for part in optimizer.parts for t in optimizer.tensors(part))))
