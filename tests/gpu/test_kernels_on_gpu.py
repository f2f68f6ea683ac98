"""Every kernel on a GPU against the fp64 reference: bf16, fp16 and fp32, real sizes, repeats, and no waits.

`make gpu` runs these tests first. `make gpu-sanitize` runs them under compute-sanitizer, without those marked slow.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from against_reference import DOCUMENTS, assert_close, compare, mask, qkv, random, tolerance

from minisobert import ops
from minisobert.config import ModelConfig, TrainConfig
from minisobert.corpus.loader import Rows
from minisobert.corpus.shards import Shards
from minisobert.corpus.tokenizer import FIRST_ORDINARY_ID
from minisobert.model import MaskedLM
from minisobert.ops import (
    Documents,
    Dropout,
    add_norm,
    attention,
    bias_gelu,
    cross_entropy,
    drop,
    gated_gelu,
    rotary,
    rotation,
    self_attention,
)
from minisobert.parallel.mesh import Mesh
from minisobert.training import checkpoint
from minisobert.training.loop import Tally, train_step
from minisobert.training.optimizer import Optimizer
from minisobert.training.run import Progress

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("poisoned"),
]
DEVICE = "cuda"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
P = [0.0, 0.1]
POSTS = [0, 1, 130, 700, 2_048, 2_049, 3_000, 4_096]


def check_attention(bounds: list[int], heads: int, d: int, dtype: torch.dtype, p: float, window=None) -> None:
    parts, documents = qkv(bounds, heads, d, dtype, "cuda")
    dropout = mask(p, "attention", "cuda", token_offset=2_048, head_offset=3)
    compare(
        lambda *x: attention(*x, documents, dropout, window),
        lambda *x: ops.attention_reference(*x, documents, dropout, window),
        parts,
        # in documents of one token dS is the difference of two equal sums of d products, dO·v and delta. At d = 128
        # two common orders of addition differ by 14 eps of the largest gradient, as much as the whole tolerance
        allowed=2 * tolerance(dtype) if dtype == torch.float32 and d == 128 else None,
        # if all documents are such, dS is the rounding error of dO·v, about 11 at d = 64, times keys of 3, over sqrt(d)
        least=4.0 if documents.bounds.diff().max() == 1 else 0.01,
    )


@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [32, 64, 96, 128])
def test_attention(d, dtype, p):
    check_attention(POSTS, 3, d, dtype, p)


@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize("bounds", DOCUMENTS.values(), ids=DOCUMENTS)
def test_attention_at_awkward_shapes(bounds, p):
    check_attention(bounds, 2, 64, torch.bfloat16, p)


@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [32, 64, 96, 128])
def test_attention_in_windows(d, dtype, p):
    check_attention(POSTS, 3, d, dtype, p, window=64)


@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize("window", [1, 5, 64, 1_000])
def test_attention_in_windows_at_awkward_shapes(window, p):
    check_attention([0, 1, 64, 128, 193, 322, 622], 2, 64, torch.bfloat16, p, window)


@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize(("heads", "d", "window"), [(12, 64, None), (16, 96, None), (12, 64, 64), (16, 64, 64)])
def test_attention_at_the_shapes_of_training(heads, d, window, p):
    """A micro-batch of base, large, modern-base and modern-large: 8 rows of 2,048, with documents as long as posts."""
    lengths = np.random.default_rng(0).lognormal(5.5, 1, 200).astype(int).clip(3, 2_048)
    ends = lengths.cumsum()
    bounds = [0, *ends[ends < 16_384].tolist(), 16_384]
    check_attention(bounds, heads, d, torch.bfloat16, p, window)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("d", "p", "window", "has_rotation"),
    [(64, 0.1, None, False), (96, 0.1, None, False), (64, 0.0, None, True), (64, 0.0, 64, True), (96, 0.0, None, True)],
)
def test_what_surrounds_attention_in_a_block(d, p, window, has_rotation, dtype):
    """With a bias that is already in qkv, or with rotary positions, which round queries and keys once more."""
    parts, documents = qkv(POSTS, 3, d, dtype, "cuda")
    dropout, turn = mask(p, "attention", "cuda"), rotation(torch.arange(4_096, device="cuda") % 700, d, 10_000.0)
    if has_rotation:
        compare(
            lambda x: self_attention(x * 1, documents, dropout, window, turn),
            lambda x: ops.self_attention_reference(x, documents, dropout, window, turn),
            (torch.stack(parts, 2),),
            allowed=3 * tolerance(dtype),
        )
    else:
        compare(
            lambda x, b: self_attention(x * 1, documents, dropout, window, bias=b),
            lambda x, b: ops.self_attention_reference(x, documents, dropout, window, bias=b),
            (torch.stack(parts, 2), random(9 * d, dtype=dtype, device="cuda")),
        )


def test_tiles_beyond_the_window_are_not_visited():
    """NaN times a probability of 0 is NaN, so no such tile may be loaded, forward or backward."""
    (parts, documents), window, most = qkv([0, 1_000], 2, 64, torch.bfloat16, "cuda"), 64, 128
    for x in parts:
        x[:300] = x[700:] = torch.nan
    leaves = [x.detach().requires_grad_() for x in parts]
    out = attention(*leaves, documents, None, window)
    for x in (out, *torch.autograd.grad(out, leaves, torch.ones_like(out))):
        assert x[300 + window + most - 1 : 700 - window - most + 1].isfinite().all()


def test_attention_over_a_million_tokens():
    """Views of a qkv of 2.4 billion elements, so offsets exceed 31 bits. Compares only the last documents."""
    tokens, heads, d = 1_048_581, 12, 64
    lengths = [1_000] * 1_048 + [1, 580]
    documents = Documents.from_bounds([0, *torch.tensor(lengths).cumsum(0).tolist()], "cuda")
    qkv = torch.randn(tokens, heads, 3, d, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    dropout = mask(0.1, "attention", "cuda")
    out = attention(*qkv.unbind(2), documents, dropout)
    upstream = torch.randn_like(out)
    out.backward(upstream)

    first = tokens - 2_581  # the last three documents begin here
    exact = qkv.detach()[first:].double().requires_grad_()
    last = Documents.from_bounds([0, 1_000, 2_000, 2_001, 2_581])
    expected = ops.attention_reference(*exact.unbind(2), last, replace(dropout, token_offset=first))
    expected.backward(upstream[first:].double())
    assert_close(out[first:], expected, "output", tolerance(torch.bfloat16))
    for i, name in enumerate(("q", "k", "v")):
        assert_close(qkv.grad[first:, :, i], exact.grad[:, :, i], f"gradient of {name}", tolerance(torch.bfloat16))


def norm_inputs(tokens: int, width: int, dtype: torch.dtype):
    shapes = (tokens, width), (width,), (tokens, width), (width,), (width,)
    return tuple(random(*shape, dtype=dtype, seed=i, device="cuda") for i, shape in enumerate(shapes))


@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [128, 192, 512, 768, 1_536, 3_000, 8_191, 8_192])
def test_add_norm(width, dtype, p):
    dropout = mask(p, "ffn_output", "cuda", token_offset=2_048)
    compare(
        lambda *x: add_norm(*x, 1e-5, dropout),
        lambda *x: ops.add_norm_reference(*x, 1e-5, dropout),
        norm_inputs(4_099, width, dtype),
    )


@pytest.mark.parametrize("p", P)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [768, 1_024, 8_191])
def test_add_norm_without_biases(width, dtype, p):
    dropout, (x, _, r, w, _) = mask(p, "ffn_output", "cuda", token_offset=2_048), norm_inputs(4_099, width, dtype)
    compare(
        lambda x, r, w: add_norm(x, None, r, w, None, 1e-5, dropout),
        lambda x, r, w: ops.add_norm_reference(x, None, r, w, None, 1e-5, dropout),
        (x, r, w),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("heads", "d"), [(12, 64), (3, 32), (5, 96), (2, 128), (1, 6)])
def test_rotary(heads, d, dtype):
    turn = rotation(torch.arange(4_099, device="cuda"), d, 160_000.0)
    qkv = random(4_099, heads, 3, d, dtype=dtype, device="cuda")
    compare(lambda x: rotary(x * 1, turn), lambda x: ops.rotary_reference(x, turn), (qkv,))


def test_rotary_of_more_than_two_billion_elements_turns_a_linears_output_in_place():
    """Compares the last tokens, whose offsets exceed 31 bits."""
    tokens, heads, d = 1_000_003, 12, 64
    turn = rotation(torch.arange(tokens, device="cuda") % 2_048, d, 10_000.0)
    qkv = torch.randn(tokens, 3 * heads * d, dtype=torch.bfloat16, device="cuda").unflatten(1, (heads, 3, d))
    last = qkv[-50:].clone()
    turned = rotary(qkv, turn)
    assert turned.data_ptr() == qkv.data_ptr()
    expected = ops.rotary_reference(last.double(), turn[:, -50:])
    assert_close(turned[-50:], expected, "last tokens", tolerance(torch.bfloat16))


@pytest.mark.parametrize("form", ["erf", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1_152, 2_624, 131])
def test_gated_gelu(width, dtype, form):
    x = random(4_099, 2 * width, dtype=dtype, scale=3.0, device="cuda")
    compare(
        lambda x: gated_gelu(x, form),
        lambda x: ops.gated_gelu_reference(x, form),
        (x,),
        allowed=max(tolerance(dtype), 5e-6),  # as in test_bias_gelu
    )


@pytest.mark.parametrize("form", ["erf", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_gelu_without_a_bias(dtype, form):
    x = random(4_099, 768, dtype=dtype, scale=3.0, device="cuda")
    compare(
        lambda x: bias_gelu(x, None, form),
        lambda x: ops.bias_gelu_reference(x, None, form),
        (x,),
        allowed=max(tolerance(dtype), 5e-6),  # as in test_bias_gelu
    )


@pytest.mark.parametrize("form", ["erf", "tanh"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bias_gelu(dtype, form):
    inputs = random(4_099, 3_072, dtype=dtype, scale=3.0, device="cuda"), random(3_072, dtype=dtype, device="cuda")
    compare(
        lambda x, b: bias_gelu(x, b, form),
        lambda x, b: ops.bias_gelu_reference(x, b, form),
        inputs,
        # exponents are up to 100 and rounded, and exp2 and division are the chip's fast versions
        allowed=max(tolerance(dtype), 5e-6),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "vocabulary"), [(1, 128), (1_001, 50_048), (77, 5_003)])
def test_cross_entropy(rows, vocabulary, dtype):
    targets = (torch.arange(rows, device="cuda") * 7_919) % vocabulary
    logits = random(rows, vocabulary, dtype=dtype, scale=3.0, device="cuda")
    compare(lambda x: cross_entropy(x * 1, targets), lambda x: ops.cross_entropy_reference(x, targets), (logits,))


@pytest.mark.slow
def test_cross_entropy_of_more_than_two_billion_logits():
    rows, vocabulary = 43_000, 50_048
    logits = torch.randn(rows, vocabulary, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    targets = torch.randint(vocabulary, (rows,), device="cuda")
    loss = cross_entropy(logits * 1, targets)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    exact = logits.detach()[-50:].double().requires_grad_()
    expected = ops.cross_entropy_reference(exact, targets[-50:])
    assert_close(loss[-50:], expected, "loss", tolerance(torch.float32))
    assert_close(gradient[-50:], torch.autograd.grad(expected.sum(), exact)[0], "gradient", tolerance(torch.bfloat16))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_drop(dtype):
    x, dropout = random(4_099, 768, dtype=dtype, device="cuda"), mask(0.3, "embedding", "cuda", token_offset=99)
    compare(lambda x: drop(x, dropout), lambda x: ops.drop_reference(x, dropout), (x,))


def test_masks_are_those_of_a_cpu_bit_for_bit():
    on_cpu = mask(0.1, "attention", token_offset=4_096, head_offset=7)
    on_gpu = replace(on_cpu, keys=on_cpu.keys.cuda())
    n, heads = 100, 2
    rows, keys = on_cpu.row_hash(0, n), on_cpu.key_hash(heads, 0, n)
    expected = on_cpu.keeps(rows[:, None], keys[:, None])
    q = torch.zeros(n, heads, 128, dtype=torch.bfloat16, device="cuda")
    one = torch.eye(n, 128, dtype=q.dtype, device="cuda")[:, None].expand(-1, heads, -1).clone().requires_grad_()
    out = attention(q, q, one, Documents.from_bounds([0, n], "cuda"), on_gpu)
    out.backward(one.detach())
    assert torch.equal((out[..., :n].transpose(0, 1) != 0).cpu(), expected)
    assert torch.equal((one.grad[..., :n].permute(1, 2, 0) != 0).cpu(), expected)

    on_cpu = mask(0.1, "ffn_output", token_offset=4_096)
    on_gpu = replace(on_cpu, keys=on_cpu.keys.cuda())
    expected = on_cpu.keeps(on_cpu.row_hash(0, n)[:, None], on_cpu.column_hash(0, 768))
    ones, zeros = torch.ones(n, 768, device="cuda"), torch.zeros(768, device="cuda")
    assert torch.equal((drop(ones, on_gpu) != 0).cpu(), expected)
    residual, _ = add_norm(ones, zeros, torch.zeros_like(ones), zeros, zeros, 1e-5, on_gpu)
    assert torch.equal((residual != 0).cpu(), expected)


def all_operations(dtype: torch.dtype):
    """A function that runs each operation forward and backward, on 4,096 tokens of 768, and returns all results."""
    (q, k, v), documents = qkv(POSTS, 12, 64, dtype, "cuda")
    inputs = [
        q,
        k,
        v,
        random(3 * 768, dtype=dtype, device="cuda"),
        *norm_inputs(4_096, 768, dtype),
        random(600, 5_003, dtype=dtype, device="cuda"),
    ]
    targets, turn = torch.arange(600, device="cuda"), rotation(torch.arange(4_096, device="cuda"), 64, 10_000.0)
    dropouts = [mask(0.1, site, "cuda") for site in ("attention", "ffn_output", "embedding")]

    def run():
        q, k, v, bias, x, b, r, w, c, logits = leaves = [x.detach().requires_grad_() for x in inputs]
        context = attention(q, k, v, documents, dropouts[0])
        near = attention(q, k, v, documents, dropouts[0], 64)
        residual, normal = add_norm(x, b, r, w, c, 1e-5, dropouts[1])
        results = [context, near, residual, bias_gelu(normal, b), drop(x, dropouts[2])]
        results += [cross_entropy(logits * 1, targets), gated_gelu(x)]
        results += [rotary(torch.stack([q, k, v], 2), turn), *add_norm(x, None, r, w, None, 1e-5)]
        results += [self_attention(torch.stack([q, k, v], 2), documents, dropouts[0], 64, turn, bias)]
        return [*results, *torch.autograd.grad([y.float().square().sum() for y in results], leaves)]

    return run


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ten_repeats_are_bitwise_equal(dtype):
    run = all_operations(dtype)
    first = run()
    for _ in range(10):
        assert all(torch.equal(x, y) for x, y in zip(run(), first))


def test_no_operation_waits_for_the_device():
    run = all_operations(torch.bfloat16)
    run()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def training(architecture: str, optimizer: str):
    """(step, model). `step` makes the next optimizer step of a small model in bf16, on documents of up to 600 tokens,
    and returns what `train_step` does."""
    sizes = {"ffn": 384, "architecture": "modernbert"} if architecture == "modernbert" else {"ffn": 1_024}
    model_config = ModelConfig(layers=4, hidden=256, heads=4, vocabulary=8_064, positions=2_048, **sizes)
    config = TrainConfig(
        data="", out="", train_tokens=100 * 4_096, tokens_per_batch=4_096, micro_batch_rows=1, learning_rate=1e-3,
        dropout=0.0 if architecture == "modernbert" else 0.1,
    )  # fmt: skip
    offsets = np.concatenate([[0], np.random.default_rng(0).integers(1, 600, 2_000).cumsum()])
    tokens = np.random.default_rng(1).integers(FIRST_ORDINARY_ID, 8_064, offsets[-1], dtype=np.int32)
    rows = Rows(Shards(Path(), {"vocab_size": 8_064}, tokens, offsets), range(2_000), 0, config.row_tokens)
    mesh, progress = Mesh(device=torch.device(DEVICE)), Progress()
    model = MaskedLM(model_config).initialise(0).to(DEVICE)
    of_step = Optimizer(model, torch.bfloat16, (0.9, 0.95), 0.01, mesh, momentum=0.95 if optimizer == "muon" else None)
    steps = iter(config.steps(1, 0))

    def step():
        following = next(steps)
        last = following.first_row + following.rows
        batches = [
            rows.micro_batch(row, 1, following.mask_rate).to(mesh.device) for row in range(following.first_row, last)
        ]
        return train_step(model, of_step, batches, following, config, mesh, progress, Tally)

    return step, model


ARCHITECTURES = [("bert", "adamw"), ("bert", "muon"), ("modernbert", "adamw"), ("modernbert", "muon")]


@pytest.mark.parametrize(("architecture", "optimizer"), ARCHITECTURES)
def test_an_optimizer_step_waits_for_the_device_twice(architecture, optimizer, monkeypatch):
    """It waits for the gradient's norm and for the loss. Any other read would stop the host in the middle."""
    step, _ = training(architecture, optimizer)
    step()  # compiles
    read, item = [], torch.Tensor.item

    def allowed(x):
        torch.cuda.set_sync_debug_mode("default")
        read.append(item(x))
        torch.cuda.set_sync_debug_mode("error")
        return read[-1]

    monkeypatch.setattr(torch.Tensor, "item", allowed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(read) == 2


@pytest.mark.parametrize(("architecture", "optimizer"), ARCHITECTURES)
def test_twenty_steps_repeat_bit_for_bit(architecture, optimizer):
    def run():
        step, model = training(architecture, optimizer)
        figures = [step() for _ in range(20)]
        return figures, {name: x.cpu() for name, x in model.state_dict().items()}

    (figures, weights), (again, weights_again) = run(), run()
    assert figures == again
    assert all(torch.equal(x, weights_again[name]) for name, x in weights.items())


def test_a_checkpoint_comes_through_pinned_memory_and_is_what_the_device_held(tmp_path):
    weight = torch.randn(1_000_003, device=DEVICE)
    saver, expected = checkpoint.Saver(tmp_path, 2, Mesh(device=torch.device(DEVICE))), []
    state = {"progress": {"step": 1}, "run": {}}
    for step in (1, 2):
        state["progress"]["step"] = step
        slices = [checkpoint.Slice("model", "w", weight, [(0, 0, len(weight))])]
        expected.append(weight.cpu())
        saver.start(step, {"model": {"w": tuple(weight.shape)}, "optimizer": {}}, slices, state)
        weight += 1  # at once, because the snapshot must be complete
        saver.wait()
        assert torch.equal(checkpoint.read(saver.last)["model"]["w"], expected[-1])
    assert all(memory.is_pinned() for memory in saver._memory)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_model_learns_on_a_gpu_what_it_learns_on_a_cpu(dtype):
    """Loss and gradient of a step with dropout, compared with the same model in fp32 on a CPU."""
    config = ModelConfig(layers=4, hidden=256, heads=4, ffn=1_024, vocabulary=8_064, positions=2_048)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(4, 8_064, (4_096,), generator=generator)
    positions = torch.cat([torch.arange(n) for n in torch.tensor(POSTS).diff().tolist()])
    masked = torch.arange(0, 4_096, 7)

    def step(device: str, dtype: torch.dtype):
        model = MaskedLM(config).initialise(0).to(device, dtype)
        documents = Documents.from_bounds(POSTS, device)
        dropout = Dropout.for_step(0.1, seed=1, step=0, layers=config.layers, device=device)
        logits = model(tokens.to(device), positions.to(device), documents, masked.to(device), dropout)
        loss = cross_entropy(logits, tokens[masked].to(device)).sum()  # a mean's gradients would vanish in fp16
        loss.backward()
        return loss.item(), torch.cat([p.grad.flatten().float().cpu() for p in model.parameters()])

    loss, gradient = step("cuda", dtype)
    expected_loss, expected = step("cpu", torch.float32)
    # rounding the weights to bf16 changes every activation by about its eps; the errors add up like random numbers.
    # fp32 only adds sums of thousands in another order
    allowed = {torch.float32: 5e-5, torch.float16: 1e-2, torch.bfloat16: 5e-2}[dtype]
    assert loss == pytest.approx(expected_loss, rel=allowed / 10)
    assert (gradient - expected).norm() <= allowed * expected.norm()
