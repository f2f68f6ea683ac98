"""Each reference is compared with fp64 autograd or a naive formula; public functions refuse wrong arguments."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from against_reference import attention_by_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from minisobert.ops import (
    Documents,
    Dropout,
    add_norm,
    attention,
    bias_gelu,
    cross_entropy,
    cross_entropy_gradient,
    cross_entropy_parts,
    drop,
    gated_gelu,
    rotary,
    rotation,
    self_attention,
)


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed), requires_grad=True)


DOCUMENTS = Documents.from_bounds([0, 1, 6, 13])
DROPOUT = Dropout.for_step(0.3, seed=4, step=2, layers=1).at(0, "attention")


@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("window", [None, 1, 5, 64, 100, 1_000])
def test_attention_document_by_document_and_in_windows_equals_one_masked_matrix(window, dropout):
    documents = Documents.from_bounds([0, 1, 6, 13, 76, 140, 205, 334])
    q, k, v = (random(334, 2, 8, seed=seed) for seed in range(3))
    ours = attention(q, k, v, documents, dropout, window)
    expected = attention_by_mask(q, k, v, documents, dropout, window)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    into = random(334, 2, 8, seed=9).detach()
    for ours_grad, expected_grad in zip(
        torch.autograd.grad(ours, (q, k, v), into), torch.autograd.grad(expected, (q, k, v), into)
    ):
        torch.testing.assert_close(ours_grad, expected_grad, rtol=0, atol=1e-12)


def test_self_attention_turns_and_gives_a_bias_that_is_in_qkv_its_gradient():
    """Compared with plain autograd and a bias that is added here; and with the three ops one by one."""
    x, bias, turning = random(13, 2, 3, 8), random(48, seed=1), rotation(torch.arange(13) % 7, 8, 100.0)
    into = random(13, 2, 8, seed=2).detach()
    held = x + bias.detach().view(2, 3, 8)
    ours = self_attention(held, DOCUMENTS, DROPOUT, 3, turning, bias)
    expected = attention(*rotary(x + bias.view(2, 3, 8), turning).unbind(2), DOCUMENTS, DROPOUT, 3)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-12)
    for a, b in zip(torch.autograd.grad(ours, (x, bias), into), torch.autograd.grad(expected, (x, bias), into)):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match=r"bias is \(47,\); it must be \(48,\), one for each feature of qkv"):
        self_attention(held, DOCUMENTS, bias=bias[1:])
    with pytest.raises(ValueError, match=r"qkv is \(13, 2, 3, 8\), rotation \(2, 13, 3\)"):
        self_attention(held, DOCUMENTS, rotation=turning[..., :3])


class Largest(TorchDispatchMode):
    """A context; `elements` becomes the size of the largest tensor that any operation in it makes."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        results = function(*args, **(kwargs or {}))
        made = [x.numel() for x in tree_leaves(results) if isinstance(x, torch.Tensor)]
        self.elements = max(self.elements, *made, 0)
        return results


def test_attention_never_makes_a_matrix_of_all_tokens():
    # 40,000 tokens squared are 6.4 GB per head in fp32; document by document, it is very little
    documents = Documents.from_bounds(range(0, 40_001, 100))
    q = torch.randn(40_000, 1, 32)
    dropout = Dropout.for_step(0.1, seed=0, step=0, layers=1).at(0, "attention")
    assert attention(q, q, q, documents).shape == attention(q, q, q, documents, dropout).shape == (40_000, 1, 32)


@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["no dropout", "dropout"])
def test_attention_in_windows_never_makes_a_matrix_of_one_long_document(dropout):
    q, k, v = torch.randn(3, 40_000, 1, 32, requires_grad=True).unbind()
    with Largest() as largest:
        attention(q, k, v, Documents.from_bounds([0, 40_000]), dropout, 64).sum().backward()
    assert 40_000 * 64 < largest.elements <= 40_000 * 3 * 64  # for each query, the keys in three blocks of 64


@pytest.mark.parametrize("dropout", [None, DROPOUT], ids=["no dropout", "dropout"])
def test_gradients_of_the_references_are_those_of_finite_differences(dropout):
    q, k, v = (random(13, 1, 4, seed=seed) for seed in range(3))
    assert torch.autograd.gradcheck(lambda *x: attention(*x, DOCUMENTS, dropout), (q, k, v))
    x, r = random(5, 6, seed=3), random(5, 6, seed=4)
    b, w, c = (random(6, seed=seed) for seed in (5, 6, 7))
    assert torch.autograd.gradcheck(lambda x, b, r, w, c: add_norm(x, b, r, w, c, 1e-5, dropout), (x, b, r, w, c))
    assert torch.autograd.gradcheck(lambda x: drop(x, dropout), (x,))
    for form in ("erf", "tanh"):
        assert torch.autograd.gradcheck(lambda x, b, form=form: bias_gelu(x, b, form), (x, b))
    targets = torch.tensor([0, 5, 2, 2, 1])
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, targets), (x,))


def test_add_norm_adds_the_branch_once_and_normalises_the_sum():
    x, r, b = random(4, 16), random(4, 16, seed=1), random(16, seed=2)
    residual, normal = add_norm(x, b, r, torch.full((16,), 2.0).double(), torch.full((16,), 3.0).double(), 0.0)
    torch.testing.assert_close(residual, x + b + r)
    unit = (normal - 3) / 2
    torch.testing.assert_close(unit.mean(1), torch.zeros(4).double(), atol=1e-12, rtol=0)
    torch.testing.assert_close(unit.var(1, unbiased=False), torch.ones(4).double())


def test_cross_entropy_is_in_fp32_for_half_precision_logits():
    logits = (torch.randn(6, 50) * 4).bfloat16()
    targets = torch.arange(6)
    loss = cross_entropy(logits, targets)
    assert loss.dtype == torch.float32
    expected = F.cross_entropy(logits.double(), targets, reduction="none")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([1, 4], "must begin with 0"),
        ([0], "at least one document"),
        ([0, 3, 3], r"bounds\[2\] is 3 after 3"),
        ([0, 5, 2], r"bounds\[2\] is 2 after 5"),
        ([0.0, 2.0], "of integers"),
        ([[0, 2]], "one-dimensional"),
    ],
)
def test_bounds_that_are_no_documents_are_refused(bounds, message):
    with pytest.raises(ValueError, match=message):
        Documents.from_bounds(bounds)


def test_wrong_arguments_are_refused_by_name():
    q = torch.zeros(13, 2, 8)
    with pytest.raises(ValueError, match=r"q, k, v have the shapes .*\(13, 1, 8\)"):
        attention(q, q[:, :1], q, DOCUMENTS)
    with pytest.raises(ValueError, match=r"torch.float32, torch.float64"):
        attention(q, q.double(), q, DOCUMENTS)
    with pytest.raises(ValueError, match="q has 12 tokens, documents 13"):
        attention(q[:12], q[:12], q[:12], DOCUMENTS)
    x, b = torch.zeros(4, 8), torch.zeros(8)
    with pytest.raises(ValueError, match=r"weight is \(7,\); it must be \(8,\)"):
        add_norm(x, b, x, b[:7], b, 1e-5)
    with pytest.raises(ValueError, match=r"branch is \(4, 8\), residual \(3, 8\)"):
        add_norm(x, b, x[:3], b, b, 1e-5)
    with pytest.raises(ValueError, match="form is 'relu'; it must be one of erf, tanh"):
        bias_gelu(x, b, "relu")
    with pytest.raises(ValueError, match=r"\(4, 8\) and \(3,\)|targets \(3,\)"):
        cross_entropy(x, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"targets is torch.float32; it must be torch.int64"):
        cross_entropy(x, torch.zeros(4))
    with pytest.raises(ValueError, match=r"x is \(8,\); it must be \(tokens, hidden\)"):
        drop(b, None)
    with pytest.raises(ValueError, match=r"dropout is 1\.0; it must be at least 0 and less than 1"):
        Dropout.for_step(1.0, seed=0, step=0, layers=1)
    assert drop(x, None) is x


def test_parts_of_slices_of_the_vocabulary_are_those_of_the_formula():
    logits, targets = random(5, 30, seed=3).detach().float() * 4, torch.tensor([0, 9, 10, 29, 12])
    lse, upstream = logits.logsumexp(1), torch.arange(5.0)
    exact = logits.double().requires_grad_()
    cross_entropy(exact, targets).backward(upstream.double())
    for first, n in ((0, 10), (10, 20)):
        part = logits[:, first : first + n]
        maximum, target, total = cross_entropy_parts(part, targets, first)
        here = (targets >= first) & (targets < first + n)
        assert torch.equal(maximum, part.amax(1))
        assert torch.equal(target[here], logits.gather(1, targets[:, None])[here, 0])
        assert (target[~here] == 0).all()
        torch.testing.assert_close(maximum + total.log(), part.logsumexp(1))
        gradient = cross_entropy_gradient(part, targets, lse, upstream, first)
        torch.testing.assert_close(gradient.double(), exact.grad[:, first : first + n], rtol=0, atol=1e-5)


def test_gradients_of_rotary_and_gated_gelu_are_those_of_finite_differences():
    turning = rotation(torch.tensor([0, 1, 2, 0, 7]), 6, 100.0)
    assert torch.autograd.gradcheck(lambda x: rotary(x, turning), (random(5, 2, 3, 6),))
    for form in ("erf", "tanh"):
        assert torch.autograd.gradcheck(lambda x, form=form: gated_gelu(x, form), (random(5, 6),))


def test_rotary_multiplies_each_pair_as_a_complex_number():
    """The halves of a head are real and imaginary parts: position t multiplies pair n by exp(i t base^(-2n/d))."""
    qkv = random(9, 2, 3, 8).detach()
    positions = torch.tensor([0, 1, 2, 3, 0, 1, 500, 501, 2_047])
    turned = rotary(qkv, rotation(positions, 8, 10_000.0))
    angles = positions.double()[:, None] * 10_000.0 ** -(torch.arange(4).double() / 4)
    pairs = torch.complex(*qkv[:, :, :2].chunk(2, -1)) * torch.polar(torch.ones(9, 4).double(), angles)[:, None, None]
    # cos, sin and the angles are fp32, and half an eps of 2,047 is 6e-5
    torch.testing.assert_close(turned[:, :, :2], torch.cat([pairs.real, pairs.imag], -1), rtol=0, atol=5e-4)
    assert torch.equal(turned[:, :, 2], qkv[:, :, 2])


def test_gated_gelu_scales_its_second_half_by_the_gelu_of_the_first():
    x = random(5, 14)
    expected = x[:, :7] * torch.special.ndtr(x[:, :7]) * x[:, 7:]
    torch.testing.assert_close(gated_gelu(x), expected)


def test_wrong_arguments_of_rotary_and_gated_gelu_are_refused():
    qkv, turning = torch.zeros(5, 2, 3, 8), torch.zeros(2, 5, 4)
    for x, r in ((qkv[:, :, :2], turning), (qkv[:4], turning), (qkv[0], turning), (qkv, turning[:, :, :3]),
                 (qkv, turning[0]), (qkv[..., :7], turning[..., :3])):  # fmt: skip
        with pytest.raises(ValueError, match=r"qkv is \(.*, rotation \(.*must be \(tokens, heads, 3, an even head"):
            rotary(x, r)
    with pytest.raises(ValueError, match=r"x is \(4, 7\); it must be \(tokens, an even number of features\)"):
        gated_gelu(torch.zeros(4, 7))
    with pytest.raises(ValueError, match="form is 'relu'; it must be one of erf, tanh"):
        gated_gelu(torch.zeros(4, 8), "relu")
    with pytest.raises(ValueError, match=r"x is \(4, 8\), bias \(7,\)"):
        bias_gelu(torch.zeros(4, 8), torch.zeros(7))
