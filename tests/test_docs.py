"""The derivations in docs/ end in a few lines of Python, which give the same as autograd."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from minisobert.config import PRESETS
from minisobert.ops import Documents, attention, rotary, rotation

DOCS = Path(__file__).parents[1] / "docs"


def code(page: str) -> dict:
    """The names that the Python code of the page defines."""
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
    logits, targets = random(6, 12, seed=0), torch.tensor([0, 3, 4, 7, 8, 11])  # both ends of three slices
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


def test_turning_back_is_the_gradient_of_turning():
    names, positions = code("rotary.md"), torch.tensor([0, 1, 2, 500, 2_047, 0, 1])
    x, dy = random(7, 8, seed=0), random(7, 8, seed=1)
    turned = names["turn"](x, positions, 10_000.0)
    check((names["turn_back"](dy, positions, 10_000.0),), torch.autograd.grad(turned, x, dy))
    qkv = x[:, None, None].expand(-1, 1, 3, -1)  # the page's formula is that of the library, with angles in fp32
    ours = rotary(qkv, rotation(positions, 8, 10_000.0))[:, 0, 0]
    torch.testing.assert_close(ours, turned, rtol=0, atol=5e-4)


@pytest.mark.parametrize("window", [None, 5])
def test_positions_that_do_not_restart_give_the_same_attention_up_to_rounding(window):
    turn, bounds, v = code("rotary.md")["turn"], [0, 5, 6, 19], random(19, 1, 8, seed=2)

    def attend(positions):
        q, k = (turn(random(19, 8, seed=seed), positions, 10_000.0)[:, None] for seed in range(2))
        return attention(q, k, v, Documents.from_bounds(bounds), window=window)

    restarting = torch.cat([torch.arange(n) for n in (5, 1, 13)])
    check((attend(torch.arange(19)),), (attend(restarting),))
    assert (attend(torch.arange(19) * 2) - attend(restarting)).abs().max() > 0.01  # positions do matter


def test_what_the_page_says_about_rounding():
    """Scores of 512 random tokens, in fp64 except for the fp32 angles, from position 0 and from others."""
    qkv = random(512, 1, 3, 64, seed=0).detach()

    def scores(first):
        q, k, _ = rotary(qkv, rotation(torch.arange(first, first + 512), 64, 10_000.0))[:, 0].unbind(1)
        return q @ k.T / 8

    at_0 = scores(0)
    for first, moved in ((2_048, 1.5e-4), (16_384, 1e-3), (100_000, 8e-3)):
        assert moved / 2 < (scores(first) - at_0).abs().max() < 2 * moved


def test_what_the_page_says_about_windows_and_bases():
    names = code("rotary.md")
    for n, window in ((1, 3), (4, 3), (5, 3), (20, 3), (20, 64)):
        rows = torch.arange(n)
        seen = int(((rows[:, None] - rows).abs() <= window).sum())
        assert names["scores"]([n, n], window) == 2 * seen <= 2 * n * min(n, 2 * window + 1)
    assert names["scores"]([2_048], 64) == 260_032
    for n, percent in ((2_048, 37), (512, 49)):
        assert round(100 * (n * n + 2 * names["scores"]([n], 64)) / (3 * n * n)) == percent
    base = PRESETS["modern-base"]
    assert (base.layers, base.window, base.hidden // base.heads) == (22, 64, 64)
    assert sum(base.window_of(layer) is None for layer in range(22)) == 8
    assert names["reached"](50, [None, 3, 3]).all() and names["reached"](50, [3, 3, None]).all()
    assert names["reached"](50, [3] * 4)[0].sum() == 1 + 4 * 3
    for each, longest, near, far in ((10_000.0, 47_117, 15, 32), (160_000.0, 691_307, 12, 25)):
        speeds = each ** -(torch.arange(0, 64, 2).double() / 64)
        assert round(float(2 * torch.pi / speeds[-1])) == longest
        assert [int((distance * speeds >= 1).sum()) for distance in (64, 8_192)] == [near, far]
