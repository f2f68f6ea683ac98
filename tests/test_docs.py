"""The derivations in docs/ end in a few lines of Python: they give what autograd gives."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

DOCS = Path(__file__).parents[1] / "docs"


def code(page: str) -> dict:
    """The names that the page's Python defines."""
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(), re.S):
        exec(block, names)
    return names


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), requires_grad=True)


def check(ours, theirs) -> None:
    for x, y in zip(ours, theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-12)


def test_attention():
    q, k, v, do = (random(11, 8, seed=seed) for seed in range(4))
    keep = (random(11, 11, seed=5) > -0.5).double()
    p = 0.3
    out = (torch.softmax(q @ k.T / 8**0.5, -1) * keep / (1 - p)) @ v
    expected = torch.autograd.grad(out, (q, k, v), do)
    o, dq, dk, dv = code("attention.md")["attention_backward"](q, k, v, keep, p, do)
    check((o, dq, dk, dv), (out, *expected))


@pytest.mark.parametrize("w", [1, 5, 12, 13, 100])
@pytest.mark.parametrize("held", [1, 7, 8, 30])
def test_stretches_of_a_window(held, w):
    lo, hi, step = 3, 60, 4
    for first in range(lo, hi - held + 1):
        queries = range(first, first + held)
        views = [{j for j in range(lo, hi) if abs(i - j) <= w} for i in queries]
        begin, full, rest, end = code("attention.md")["stretches"](first, queries[-1], lo, hi, w, step)
        assert begin <= full <= rest <= end and (full - begin) % step == (rest - full) % step == 0
        assert set(range(begin, end)) == set.union(*views)
        steps = [set(range(n, n + step)) for n in range(begin, end, step)]
        assert set(range(full, rest)) == set().union(*(x for x in steps if x <= set.intersection(*views)))


def test_layer_norm():
    branch, r, dr_new, dn = (random(7, 12, seed=seed) for seed in range(4))
    bias, weight, norm_bias = (random(12, seed=seed) for seed in range(4, 7))
    keep, p, eps = (random(7, 12, seed=8) > -0.5).double(), 0.3, 1e-5
    r_new = r + (branch + bias) * keep / (1 - p)
    normal = torch.nn.functional.layer_norm(r_new, (12,), weight, norm_bias, eps)
    expected = torch.autograd.grad((r_new, normal), (branch, bias, r, weight, norm_bias), (dr_new, dn))
    check(code("layer_norm.md")["add_norm_backward"](r_new, weight, keep, p, eps, dr_new, dn), expected)


def test_split_cross_entropy():
    logits, targets = random(6, 12, seed=0), torch.tensor([0, 3, 4, 7, 8, 11])  # both ends of each of three slices
    losses = torch.nn.functional.cross_entropy(20 * logits, targets, reduction="none")
    (expected,) = torch.autograd.grad(losses.sum(), logits)
    slices = (20 * logits.detach()).chunk(3, 1)
    ours, gradients = code("tensor-parallel.md")["split_cross_entropy"](slices, targets)
    check((ours, 20 * torch.cat(gradients, 1)), (losses, expected))


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_ring_all_reduce(n):
    buffers = [random(n * 5, seed=rank) for rank in range(n)]
    ended, sent = code("data-parallel.md")["ring_all_reduce"](buffers)
    check([torch.cat(parts) for parts in ended], [sum(buffers)] * n)
    assert sent == 2 * (n - 1) * 5


@pytest.mark.parametrize("rows", [[40], [10, 30], [8, 8, 8, 8, 8]])
def test_orthogonalising_slices_is_orthogonalising_the_whole(rows):
    whole = random(sum(rows), 16, seed=0).detach()
    together = torch.cat(code("muon.md")["orthogonalise_slices"](whole.split(rows)))
    a, sigma, b = torch.linalg.svd(whole, full_matrices=False)
    sigma = sigma / whole.norm()
    for _ in range(5):
        sigma = 3.4445 * sigma - 4.7750 * sigma**3 + 2.0315 * sigma**5
    check([together], [a @ sigma.diag() @ b])
    assert 0.6 < sigma.min() < sigma.max() < 1.25
