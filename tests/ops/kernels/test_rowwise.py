"""The kernels that work row by row (all but attention and rotary) against their fp64 references."""

from __future__ import annotations

import math

import pytest
import torch
from against_reference import TOO_SMALL, assert_close, compare, interpreted, mask, random, tolerance

from minisobert.ops import (
    Dropout,
    add_norm_reference,
    bias_gelu_reference,
    cross_entropy_parts_reference,
    cross_entropy_reference,
    drop_reference,
    gated_gelu_reference,
)
from minisobert.ops.kernels import cross_entropy as losses
from minisobert.ops.kernels.add_norm import add_norm
from minisobert.ops.kernels.bias_gelu import bias_gelu
from minisobert.ops.kernels.cross_entropy import cross_entropy
from minisobert.ops.kernels.dropout import drop
from minisobert.ops.kernels.gated_gelu import gated_gelu

pytestmark = [
    interpreted,
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:overflow encountered in exp"),  # sigmoid(-large) is 1 / inf
]
DTYPES = [torch.bfloat16, torch.float32]


def norm_inputs(tokens: int, width: int, dtype: torch.dtype):
    """branch, bias, residual, weight, norm_bias."""
    shapes = (tokens, width), (width,), (tokens, width), (width,), (width,)
    return tuple(random(*shape, dtype=dtype, seed=i) for i, shape in enumerate(shapes))


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("tokens", "width"),
    [(1, 768), (37, 768), (131, 192), (16, 128), (17, 1_536), (5, 4_096), (3, 8_192), (3, 8_191), (7, 1_000)],
)
def test_add_norm(tokens, width, dtype, p):
    dropout = mask(p, "ffn_output", token_offset=2_048)
    compare(
        lambda *x: add_norm(*x, 1e-5, dropout),
        lambda *x: add_norm_reference(*x, 1e-5, dropout),
        norm_inputs(tokens, width, dtype),
    )


def without_biases(operation, biases: str, *rest):
    """The operation as a function of (branch, [bias], residual, weight, [norm_bias]), with None for biases that
    `biases` does not name."""

    def call(branch, *others):
        others = list(others)
        bias = others.pop(0) if "b" in biases else None
        return operation(branch, bias, *others, *(() if "c" in biases else (None,)), *rest)

    return call


@pytest.mark.parametrize("biases", ["", "b", "c"])
@pytest.mark.parametrize(
    ("tokens", "width", "dtype", "p"),
    [(1, 768, torch.float32, 0.0), (5, 1_000, torch.float16, 0.3), (70, 192, torch.float32, 0.3),
     (3, 8_191, torch.float32, 0.3)],
)  # fmt: skip
def test_add_norm_without_its_biases(tokens, width, dtype, p, biases):
    """Also without one of the two, so that no bias's sum is put in place of another's. At a width of 8,191, torch sums
    the gradient of b, since the kernel has too few registers."""
    x, b, r, w, c = norm_inputs(tokens, width, dtype)
    inputs = (x, *([b] if "b" in biases else []), r, w, *([c] if "c" in biases else []))
    dropout = mask(p, "ffn_output", token_offset=2_048)
    compare(
        without_biases(add_norm, biases, 1e-5, dropout),
        without_biases(add_norm_reference, biases, 1e-5, dropout),
        inputs,
    )


def test_add_norm_where_one_of_its_outputs_has_no_user():
    inputs = norm_inputs(19, 256, torch.float32)
    for which in (0, 1):
        compare(
            lambda *x, i=which: add_norm(*x, 1e-5)[i],
            lambda *x, i=which: add_norm_reference(*x, 1e-5)[i] + 0 * sum(y.sum() for y in x),  # all take part
            inputs,
        )


@pytest.mark.parametrize("p", TOO_SMALL)
def test_dropout_that_rounds_to_nothing_drops_nothing(p):
    inputs, none = norm_inputs(19, 256, torch.float32), Dropout(p, mask(0.3, "ffn_output").keys)
    compare(lambda *x: add_norm(*x, 1e-5, none), lambda *x: add_norm_reference(*x, 1e-5), inputs)
    compare(lambda x: drop(x, none), lambda x: x * 1, inputs[:1])


def test_add_norm_of_large_numbers_that_differ_little():
    """The variance is the mean of squared deviations; with a mean of squares, all digits would be lost here."""
    x, b, r, w, c = norm_inputs(8, 512, torch.float32)
    residual, normal = add_norm(x, b, r + 1e4, w, c, 1e-5)
    exact = add_norm_reference(*(y.double() for y in (x, b, r + 1e4, w, c)), 1e-5)
    assert_close(residual, exact[0], "residual", tolerance(torch.float32))
    assert_close(normal, exact[1], "normal", 2e-3)  # rounding 1e4 makes an error of 5e-4


@pytest.mark.parametrize("form", ["erf", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "width"), [(1, 64), (37, 700), (131, 512), (8, 3_072)])
def test_bias_gelu(tokens, width, dtype, form):
    inputs = random(tokens, width, dtype=dtype, scale=3.0), random(width, dtype=dtype, seed=1)
    compare(lambda x, b: bias_gelu(x, b, form), lambda x, b: bias_gelu_reference(x, b, form), inputs)


@pytest.mark.parametrize(("tokens", "width", "dtype"), [(1, 7, torch.float32), (131, 700, torch.float16)])
def test_bias_gelu_without_a_bias(tokens, width, dtype):
    x = random(tokens, width, dtype=dtype, scale=3.0)
    compare(lambda x: bias_gelu(x, None), lambda x: bias_gelu_reference(x, None), (x,))


@pytest.mark.parametrize("form", ["erf", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("tokens", "width"), [(1, 1), (37, 131), (131, 64), (2, 1_152)])
def test_gated_gelu(tokens, width, dtype, form):
    x = random(tokens, 2 * width, dtype=dtype, scale=3.0)
    compare(lambda x: gated_gelu(x, form), lambda x: gated_gelu_reference(x, form), (x,))


@pytest.mark.parametrize("form", ["erf", "tanh"])
def test_bias_gelu_far_out_is_the_identity_or_zero_and_never_nan(form):
    x = torch.tensor([[-1e4, -40.0, -8.0, 0.0, 8.0, 40.0, 1e4]], requires_grad=True)
    y = bias_gelu(x, torch.zeros(7), form)
    y.sum().backward()
    assert torch.allclose(y.detach(), x.detach().clamp(min=0), atol=1e-4)
    assert torch.allclose(x.grad, torch.tensor([[0.0, 0, 0, 0.5, 1, 1, 1]]), atol=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 128), (11, 5_003), (5, 4_096), (2, 50_048)])
def test_cross_entropy(rows, vocabulary, dtype):
    targets = torch.arange(rows) * 7_919 % vocabulary
    logits = random(rows, vocabulary, dtype=dtype, scale=3.0)
    compare(lambda x: cross_entropy(x * 1, targets), lambda x: cross_entropy_reference(x, targets), (logits,))


def test_the_gradient_takes_the_place_of_the_logits():
    leaf = random(6, 300, dtype=torch.float32).requires_grad_()
    logits = leaf * 1
    cross_entropy(logits, torch.arange(6)).sum().backward()
    assert torch.equal(logits, leaf.grad)


def test_whoever_still_needs_the_logits_is_told_by_autograd():
    logits = random(6, 300, dtype=torch.float32).requires_grad_() * 1
    squares = logits.square().sum()  # its backward needs the logits
    loss = cross_entropy(logits, torch.arange(6)).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_parts_of_two_slices_of_the_vocabulary_make_the_whole_loss():
    """As in a vocabulary-parallel loss: three reductions, then each rank computes the gradient of its slice."""
    targets = torch.tensor([0, 349, 350, 999, 5])
    whole = random(5, 1_000, dtype=torch.float32, scale=4.0)
    slices = [(0, whole[:, :350].contiguous()), (350, whole[:, 350:].contiguous())]
    parts = [losses.cross_entropy_parts(logits, targets, first) for first, logits in slices]
    maximum = torch.stack([m for m, _, _ in parts]).amax(0)
    target_logit = sum(t for _, t, _ in parts)
    total = sum(s * (m - maximum).exp() for m, _, s in parts)
    lse = maximum + total.log()
    exact = whole.double().requires_grad_()
    expected = cross_entropy_reference(exact, targets)
    assert_close(lse - target_logit, expected, "loss", tolerance(torch.float32))
    upstream = random(5, dtype=torch.float32, seed=1)
    expected.backward(upstream.double())
    ours = torch.cat([losses.cross_entropy_gradient(z, targets, lse, upstream, first) for first, z in slices], 1)
    assert_close(ours, exact.grad, "gradient", tolerance(torch.float32))


@pytest.mark.parametrize("first", [4_096, 4_999])
def test_cross_entropy_where_whole_tiles_of_the_vocabulary_are_ruled_out(first):
    """All logits before `first` are -inf, as if a part of the vocabulary were masked."""
    logits = random(3, 5_000, dtype=torch.float32)
    logits[:, :first] = -torch.inf
    targets = torch.tensor([first, 4_999, 4_999])
    compare(lambda x: cross_entropy(x * 1, targets), lambda x: cross_entropy_reference(x, targets), (logits,))
    slices = [(0, logits[:, :4_096].contiguous()), (4_096, logits[:, 4_096:].contiguous())]
    for parts in (losses.cross_entropy_parts, cross_entropy_parts_reference):  # as on a rank that has only these logits
        (m, t, s), (n, u, r) = (parts(z, targets, begin) for begin, z in slices)
        largest = torch.maximum(m, n)
        loss = largest + (s * (m - largest).exp() + r * (n - largest).exp()).log() - t - u
        assert_close(loss, cross_entropy_reference(logits.double(), targets), "loss", tolerance(torch.float32))


def test_cross_entropy_of_large_logits_and_of_none():
    targets = torch.tensor([0, 2])
    logits = torch.tensor([[3e4, 0.0, -3e4], [-3e4, 3e4, 0.0]])
    assert torch.equal(cross_entropy(logits, targets), torch.tensor([0.0, 3e4]))
    assert cross_entropy(torch.zeros(0, 128), torch.zeros(0, dtype=torch.int64)).shape == (0,)


@pytest.mark.parametrize("p", [0.1, 0.5])
def test_the_masks_are_the_references_bit_for_bit_and_have_their_rate(p):
    """The masks of drop and add_norm, forward and backward: in a result for ones, a 0 was dropped."""
    tokens, width = 60, 768
    dropout = mask(p, "ffn_output", token_offset=6_144)
    expected = dropout.keeps(dropout.row_hash(0, tokens)[:, None], dropout.column_hash(0, width))
    x, zero = torch.ones(tokens, width, requires_grad=True), torch.zeros(width)
    dropped = drop(x, dropout)
    dropped.backward(torch.ones_like(x))
    branch = torch.ones(tokens, width, requires_grad=True)
    residual, _ = add_norm(branch, zero, torch.zeros(tokens, width), zero, zero, 1e-5, dropout)
    residual.backward(torch.ones_like(branch))
    for y in (dropped, x.grad, residual, branch.grad):
        assert torch.equal(y != 0, expected)
        assert torch.equal(y[y != 0], torch.full((int(expected.sum()),), dropout.scale))
    bound = 4.5 * math.sqrt(p * (1 - p) / expected.numel()) + 1 / 65_536  # 4.5 standard errors: one run in 150,000
    assert abs(float((dropped == 0).double().mean()) - p) < bound


def test_drop_equals_its_reference_and_none_is_free():
    x = random(37, 300, dtype=torch.float16)
    dropout = mask(0.3, "embedding")
    compare(lambda x: drop(x, dropout), lambda x: drop_reference(x, dropout), (x,))
    assert drop(x, None) is x


def test_results_repeat_bit_for_bit():
    """Above all the sums over tokens: there are more tokens than programs, so that each program sums several tiles."""
    inputs = norm_inputs(150, 384, torch.float16)

    def run():
        x = [y.clone().requires_grad_() for y in inputs]
        residual, normal = add_norm(*x, 1e-5, mask(0.1, "ffn_output"))
        gelu = bias_gelu(normal, x[1])
        return torch.autograd.grad((gelu.float() * residual).sum(), x)

    assert all(torch.equal(a, b) for a, b in zip(run(), run()))


def test_no_tokens_are_no_error():
    x, b, r, w, c = (y.requires_grad_() for y in norm_inputs(0, 256, torch.float32))
    residual, normal = add_norm(x, b, r, w, c, 1e-5)
    (bias_gelu(normal, b).sum() + residual.sum() + gated_gelu(normal).sum()).backward()
    assert x.grad.shape == (0, 256) and not b.grad.any() and not w.grad.any()


X, B, N = torch.zeros(4, 256), torch.zeros(256), torch.zeros(4, 64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: add_norm(X.double(), B, X, B, B, 1e-5), "branch is torch.float64; the kernels take torch.bfloat16"),
        (lambda: add_norm(X, B, X.half(), B, B, 1e-5), "residual is torch.float16, branch torch.float32; they must"),
        (lambda: add_norm(X, B, X, B.to("meta"), B, 1e-5), "weight is on meta, branch on cpu; they must be on the"),
        (lambda: add_norm(X[:, ::2], B[:128], X[:, ::2], B[:128], B[:128], 1e-5), r"branch has the strides \(256, 2\)"),
        (lambda: add_norm(X[:, :128], B[:128], X[:, :128], B[:128], B[:128], 1e-5), "branch .* must be contiguous"),
        (lambda: add_norm(N, N[0], N, N[0], N[0], 1e-5), r"branch is \(4, 64\); it must be 128 to 8,192 wide"),
        (lambda: bias_gelu(X, B.half()), "bias is torch.float16, x torch.float32"),
        (lambda: bias_gelu(X.t(), torch.zeros(4)), "x has the strides"),
        (lambda: gated_gelu(X.t()), "x has the strides"),
        (lambda: gated_gelu(X.long()), "x is torch.int64; the kernels take"),
        (lambda: cross_entropy(X.t(), torch.zeros(256, dtype=torch.int64)), "logits has the strides"),
        (lambda: cross_entropy(X, torch.zeros(4, dtype=torch.int64, device="meta")), "targets is on meta"),
        (lambda: drop(X.long(), mask(0.1, "embedding")), "x is torch.int64; the kernels take"),
        (lambda: drop(X.t(), mask(0.1, "embedding")), "x has the strides"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_refused_before_any_launch(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_second_derivatives_are_refused_rather_than_wrong():
    x = random(3, 64, dtype=torch.float32).requires_grad_()
    (slope,) = torch.autograd.grad(bias_gelu(x, torch.zeros(64)).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        slope.sum().backward()
