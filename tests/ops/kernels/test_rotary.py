"""The rotary kernel against its reference in fp64, the properties of a rotation, and autograd with an in-place op."""

from __future__ import annotations

import pytest
import torch
from against_reference import assert_close, compare, interpreted, random, tolerance
from torch import nn

from minisobert.ops import rotary_reference, rotation
from minisobert.ops.kernels.rotary import rotary

pytestmark = [interpreted, pytest.mark.usefixtures("poisoned")]


def turning(tokens: int, d: int, first: int = 0, base: float = 10_000.0) -> torch.Tensor:
    return rotation(torch.arange(first, first + tokens), d, base)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("tokens", "heads", "d"), [(1, 1, 64), (37, 3, 64), (131, 1, 96), (17, 2, 128), (33, 2, 32), (5, 2, 6), (3, 1, 2)]
)
def test_rotary(tokens, heads, d, dtype):
    turn = turning(tokens, d, first=100)
    qkv = random(tokens, heads, 3, d, dtype=dtype)
    compare(lambda x: rotary(x * 1, turn), lambda x: rotary_reference(x, turn), (qkv,))


def test_position_0_is_the_identity_and_values_pass_at_every_position():
    for dtype in (torch.float16, torch.float32):
        qkv = random(20, 2, 3, 64, dtype=dtype)
        assert torch.equal(rotary(qkv.clone(), turning(20, 64)[:, :1].expand(2, 20, 32).contiguous()), qkv)
        leaf = qkv.clone().requires_grad_()
        turned = rotary(leaf * 1, turning(20, 64))
        assert torch.equal(turned[:, :, 2], qkv[:, :, 2])
        assert torch.equal(torch.autograd.grad(turned, leaf, qkv)[0][:, :, 2], qkv[:, :, 2])


@pytest.mark.parametrize("base", [10_000.0, 160_000.0])
def test_the_product_of_a_query_and_a_key_depends_on_their_distance_alone(base):
    """All products of the queries and keys of 40 tokens, at position 0 and at 1,000."""
    qkv = random(40, 2, 3, 64, dtype=torch.float32)

    def products(first: int) -> torch.Tensor:
        q, k, _ = rotary(qkv.clone(), turning(40, 64, first, base)).unbind(2)
        return torch.einsum("ihd,jhd->hij", q.double(), k.double())

    # rounding angles up to 1,040 makes errors of up to 6e-5, and the product before it as much again
    assert_close(products(1_000), products(0), "products", 1e-4)
    unturned = torch.einsum("ihd,jhd->hij", *qkv[:, :, :2].double().unbind(2))
    assert_close(products(0).diagonal(0, 1, 2), unturned.diagonal(0, 1, 2), "products with itself", 1e-6)
    assert (products(0) - unturned).abs().max() > 1  # it is not the identity


def test_turning_back_what_was_turned_gives_it_back():
    leaf = random(40, 2, 3, 64, dtype=torch.float32).requires_grad_()
    turned = rotary(leaf * 1, turning(40, 64))
    (back,) = torch.autograd.grad(turned, leaf, turned.detach())
    assert_close(back, leaf, "what came back", tolerance(torch.float32))


def linear_and_input() -> tuple[nn.Linear, torch.Tensor]:
    torch.manual_seed(0)
    return nn.Linear(24, 2 * 3 * 32), random(19, 24, dtype=torch.float32)


def test_behind_a_linear_it_works_in_place_and_gradients_are_right():
    """As in the model, it gets a view of what the linear returned."""
    linear, x = linear_and_input()
    turn, upstream = turning(19, 32), random(19, 2, 3, 32, dtype=torch.float32)

    def gradients(rotary):
        qkv = linear(x).unflatten(1, (-1, 3, 32))
        turned = rotary(qkv, turn)
        return turned, qkv, torch.autograd.grad((turned * upstream).sum(), linear.parameters())

    turned, qkv, ours = gradients(rotary)
    assert turned.data_ptr() == qkv.data_ptr()
    assert "_Rotary" in turned.grad_fn.next_functions[0][0].name()  # not CopySlices, which copies gradients
    expected_turned, _, expected = gradients(rotary_reference)
    assert_close(turned, expected_turned, "output", tolerance(torch.float32))
    for name, g, e in zip(("weight", "bias"), ours, expected):
        assert_close(g, e, name, tolerance(torch.float32))


def test_whoever_uses_qkv_afterwards_gets_what_is_there_and_its_gradient():
    linear, x = linear_and_input()
    qkv = linear(x).unflatten(1, (-1, 3, 32))
    turned = rotary(qkv, turning(19, 32))
    ours, theirs = (torch.autograd.grad(y.square().sum(), linear.weight, retain_graph=True)[0] for y in (qkv, turned))
    assert torch.equal(qkv, turned) and torch.equal(ours, theirs)


def test_whoever_kept_qkv_for_a_backward_is_told_by_autograd():
    linear, x = linear_and_input()
    qkv = linear(x).unflatten(1, (-1, 3, 32))
    squares = qkv.square().sum()
    rotary(qkv, turning(19, 32))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        squares.backward()


def test_the_gradient_that_comes_in_is_left_as_it_is():
    """Both summands of a sum get the same memory as gradient, so it must not be rotated in place."""
    a, b = (random(19, 2, 3, 32, dtype=torch.float32, seed=i).requires_grad_() for i in range(2))
    upstream = random(19, 2, 3, 32, dtype=torch.float32, seed=2)
    _, other = torch.autograd.grad(rotary(a * 1, turning(19, 32)) + b, (a, b), upstream.clone())
    assert torch.equal(other, upstream)


def test_a_slice_of_a_larger_tensor_is_turned_and_the_rest_stays():
    whole = random(30, 2, 3, 32, dtype=torch.float32)
    turned = whole.clone()
    rotary(turned[10:20], turning(10, 32))
    assert torch.equal(turned[:10], whole[:10]) and torch.equal(turned[20:], whole[20:])
    assert_close(turned[10:20], rotary_reference(whole[10:20], turning(10, 32)), "slice", tolerance(torch.float32))


def test_results_repeat_without_autograd_and_no_tokens_are_no_error():
    qkv, turn = random(19, 2, 3, 32, dtype=torch.float16), turning(19, 32)
    with_autograd = rotary(qkv.clone().requires_grad_() * 1, turn).detach()
    with torch.no_grad():
        assert torch.equal(rotary(qkv.clone(), turn), with_autograd)
    with torch.inference_mode():
        assert torch.equal(rotary(qkv.flatten(1).clone().unflatten(1, (2, 3, 32)), turn), with_autograd)
    none = torch.zeros(0, 2, 3, 32, requires_grad=True)
    rotary(none * 1, turning(0, 32)).sum().backward()
    assert none.grad.shape == none.shape


QKV, TURN = torch.zeros(4, 2, 3, 32), turning(4, 32)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: rotary(QKV.double(), TURN), "qkv is torch.float64; the kernels take"),
        (lambda: rotary(QKV.half(), TURN.half()), "rotation is torch.float16; it must be torch.float32"),
        (lambda: rotary(QKV, TURN.to("meta")), "rotation is on meta, qkv on cpu"),
        (lambda: rotary(QKV.transpose(0, 1).contiguous().transpose(0, 1), TURN), "qkv has the strides .* contiguous"),
        (lambda: rotary(QKV, TURN.expand(2, 4, 16).transpose(0, 1).contiguous().transpose(0, 1)), "rotation has the"),
    ],
)
def test_wrong_arguments_are_refused_before_any_launch(call, message):
    with pytest.raises(ValueError, match=message):
        call()
