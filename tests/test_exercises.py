"""The exercises of the course (docs/README.md): each answer is computed here, and is what its page says.

An essay ends in three exercises. The answer of each names its test, and its results stand in bold type; `answer` is the
list of these.
"""

from __future__ import annotations

import math
import random as randomness
import re

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from minisobert.config import PRESETS, TrainConfig
from minisobert.corpus.loader import spans
from minisobert.corpus.packing import Packing, pack_histogram
from minisobert.finetuning.retrieval import contrastive_loss
from minisobert.ops import Documents, Dropout, attention_reference, rotary, rotation
from minisobert.parallel.data import lay_out
from minisobert.parallel.mesh import Mesh
from minisobert.parallel.splits import slice_of
from minisobert.planning.forecast import Layout, collectives, wire_bytes
from minisobert.training import muon
from minisobert.training.meter import attention_pairs
from tests.test_docs import DOCS, code, random

ESSAYS = (
    "packing", "batches", "attention", "rotary", "layer_norm", "kernels", "data-parallel", "tensor-parallel", "muon",
    "long-runs", "embeddings",
)  # fmt: skip
ORDER = ("walk", *ESSAYS)
LINK = re.compile(r"\]\(([\w-]+)\.md\)")
TEST = re.compile(r"\[`(test_\w+)`\]\(\.\./tests/test_exercises\.py\)")


def page(name: str) -> str:
    return (DOCS / f"{name}.md").read_text()


def one_line(text: str) -> str:
    return " ".join(text.split())


def answers(essay: str) -> dict[str, list[str]]:
    """The bold results of each answer of an essay, by the test that it names."""
    text = page(essay).partition("\n## Exercises\n")[2]
    found = {}
    for exercise in re.findall(r"<details>.*?</details>", text, re.S):
        (test,) = TEST.findall(exercise)
        found[test] = [one_line(bold) for bold in re.findall(r"\*\*(.+?)\*\*", exercise, re.S)]
    return found


@pytest.fixture
def answer(request) -> list[str]:
    told = {test: results for essay in ESSAYS for test, results in answers(essay).items()}
    return told[request.node.originalname]


def near(said: str, found: float, within: float = 2.0) -> bool:
    """Whether a result that depends on rounding is within a factor of what the page says."""
    return float(said) / within < found < within * float(said)


# The course


def test_the_course_and_the_pages_agree():
    rows = re.findall(r"^\| (\d+) \| \[.*?\]\((.*?)\.md\) \| .*\? \| (.*) \| (\d+) \|$", page("README"), re.M)
    assert [(int(n), name) for n, name, *_ in rows] == list(enumerate(ORDER, 1))
    for i, (_, name, assumed, minutes) in enumerate(rows):
        title, head, *_ = page(name).split("\n\n")
        assert title.startswith("# ") and re.fullmatch(r"\*Assumes: .*; you will be able to: .*\.\*", one_line(head))
        assert LINK.findall(head) == LINK.findall(assumed) and set(LINK.findall(head)) <= set(ORDER[:i])
        assert all(ORDER[int(number) - 1] == link for number, link in re.findall(r"\[(\d+)\]\((.*?)\.md\)", assumed))
        words = len(page(name).partition("\n## Exercises\n")[0].split())
        assert abs(int(minutes) - words / 100) <= 3 and int(minutes) % 5 == 0
        *_, rule, footer = page(name).strip().split("\n\n")
        before, here, after = ORDER[i - 1 : i], ["README"], ORDER[i + 1 : i + 2]
        assert rule == "---" and LINK.findall(footer) == [*before, *here, *after]
        assert ("Previous: " in footer, "Next: " in footer) == (bool(before), bool(after))


def test_each_essay_has_three_exercises_and_each_exercise_its_test():
    here = {name: value for name, value in globals().items() if re.match(r"test_[a-z_]+_[123]_", name)}
    told = [test for essay in ESSAYS for test in answers(essay)]
    assert sorted(told) == sorted(here)
    for essay in ESSAYS:
        beginnings = [f"test_{essay.replace('-', '_')}_{i}_" for i in (1, 2, 3)]
        assert [test[: len(b)] for test, b in zip(answers(essay), beginnings, strict=True)] == beginnings
    assert all("answer" in test.__code__.co_varnames[: test.__code__.co_argcount] for test in here.values())


# packing.md


def test_packing_1_best_fit_takes_three_rows_where_order_of_arrival_takes_four(answer):
    arriving, row = [5, 7, 4, 6, 3, 5], 10
    histogram = np.bincount(np.array(arriving) - 2)  # without [CLS] and [SEP]
    best = sum(rows for rows, _ in pack_histogram(histogram, row))
    rows = [[]]
    for length in arriving:
        if sum(rows[-1]) + length > row:
            rows.append([])
        rows[-1].append(length)
    assert best == sum(arriving) / row  # no gap
    assert answer == [f"{best}", f"{len(rows)}", f"{len(arriving) * max(arriving)}"]


def test_packing_2_a_document_alone_with_its_length_keeps_its_place_in_the_plan(answer):
    lengths = np.array([1_500, 420] + [122] * 300) - 2
    packing = Packing(np.concatenate([[0], lengths.cumsum()]), range(len(lengths)), seed=1, row_tokens=2_048)
    beside = []
    for number in range(20):
        epoch = packing.epoch(number)
        rows = [packing.chunks(epoch, np.array([row]))[0].tolist() for row in range(len(packing))]
        (of_the_long,) = [row for row in rows if 0 in row]
        assert 1 in of_the_long and len(of_the_long) == 3
        beside += set(of_the_long) - {0, 1}
    assert answer == [f"{len(set(beside))}"]


def test_packing_3_late_positions_are_rare(answer):
    lengths = [298] * 1_000 + [5_000] * 10
    packing = Packing(np.cumsum([0, *lengths]), range(len(lengths)), seed=1, row_tokens=2_048)
    times = [int((packing.chunk_length + 2 > position).sum()) for position in (100, 1_500)]
    assert answer == [f"{n:,}" for n in times]


# batches.md


def test_batches_1_a_mean_of_means_is_another_loss_with_another_gradient(answer):
    losses = [torch.full((10,), 6.0), torch.full((40,), 2.0)]
    right, wrong = torch.cat(losses).mean(), torch.stack([each.mean() for each in losses]).mean()
    assert answer == [f"{right:.1f}", f"{wrong:.1f}", f"{len(losses[1]) / len(losses[0]):.0f}"]

    weight, x = random(8, 5, seed=0), random(50, 8, seed=1).detach()  # 50 masked tokens, of which rank 0 has 10
    of_token = torch.nn.functional.cross_entropy(x @ weight, torch.arange(50) % 5, reduction="none")
    ranks = of_token.split((10, 40))

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, weight, retain_graph=True)[0]

    one_process = gradient(of_token.mean())
    torch.testing.assert_close(sum(gradient(each.sum()) for each in ranks) / 50, one_process, rtol=0, atol=1e-12)
    assert (sum(gradient(each.mean()) for each in ranks) / 2 - one_process).norm() > 0.1 * one_process.norm()


@pytest.mark.parametrize("ranks", [8, 4])
def test_batches_2_row_1000_is_read_in_one_step_by_another_process(answer, ranks):
    config = TrainConfig(micro_batch_rows=ranks)
    steps = list(zip(range(5), config.steps(data_parallel=ranks)))
    found = [
        (step, rank, nth)
        for step, each in steps
        for rank in range(ranks)
        for nth, (first, rows) in enumerate(
            spans(each.first_row, each.first_row + each.rows, config.micro_batch_rows, rank, ranks)
        )
        if first <= 1_000 < first + rows
    ]
    ((step, rank, nth),) = found  # once
    of_eight, of_four = answer[1:3], answer[3:]
    assert [answer[0], *(of_eight if ranks == 8 else of_four)] == [f"{step}", f"{rank}", f"{nth}"]


def test_batches_3_a_mask_by_place_knows_no_micro_batch_and_one_by_order_does(answer):
    rows, features, p = 8, 4_096, 0.1
    dropout = Dropout.for_step(p, seed=1, step=0, layers=1).at(0, "ffn_output")
    columns = dropout.column_hash(0, features)

    def by_place(first: int, stop: int) -> Tensor:
        return dropout.keeps(dropout.row_hash(first, stop)[:, None], columns)

    def by_order(micro_batches: list[int]) -> Tensor:
        """Each micro-batch of so many tokens seeds the generator with the step, as if it were the first."""
        return torch.cat([torch.rand(n, features, generator=torch.Generator().manual_seed(0)) >= p
                          for n in micro_batches])  # fmt: skip

    assert torch.equal(by_place(0, rows), torch.cat([by_place(0, 4), by_place(4, rows)]))
    differ = (by_order([rows])[4:] != by_order([4, 4])[4:]).double().mean()
    assert answer == [f"{100 * 2 * p * (1 - p):.0f} %"]
    assert abs(differ - 2 * p * (1 - p)) < 0.01


# attention.md


def tiled(q: Tensor, k: Tensor, v: Tensor, documents: Documents, tile: int = 64) -> Tensor:
    """(T, d), T a multiple of the tile: each tile of queries visits the tiles of keys that the page says."""
    out = []
    for first in range(0, len(q), tile):
        start, stop = (x[first : first + tile, None] for x in (documents.start, documents.stop))
        keys = torch.arange(int(start[0]), int(stop[-1]))
        scores = (q[first : first + tile] @ k[keys].T).masked_fill((keys < start) | (keys >= stop), -torch.inf)
        out.append(scores.softmax(-1) @ v[keys])
    return torch.cat(out)


def test_attention_1_nan_reaches_a_neighbour_only_through_a_tile_that_holds_both(answer):
    q, k, v = (random(128, 16, seed=seed).detach() for seed in range(3))
    reached = []
    for border in (64, 60):
        documents = Documents.from_bounds([0, border, 128])
        for poison in (torch.nan, 1e30):
            bad = v.clone()
            bad[border:] = poison
            out = tiled(q, k, bad, documents)[:border]
            if poison == 1e30:
                assert torch.equal(out, tiled(q, k, v, documents)[:border])
            else:
                reached.append(f"{int(out.isnan().any(1).sum())}")
            # document by document, nothing of a neighbour is ever read
            assert attention_reference(q[:, None], k[:, None], bad[:, None], documents)[:border].isfinite().all()
    assert answer == reached


def test_attention_2_a_running_softmax_does_not_overflow(answer):
    scores = torch.tensor([1_000.0, 1_001.0, 1_002.0])
    assert (scores.exp() / scores.exp().sum()).isnan().all()
    m, total, sums = torch.tensor(-torch.inf), torch.tensor(0.0), []
    for score in scores:
        higher = torch.maximum(m, score)
        total = total * (m - higher).exp() + (score - higher).exp()
        m = higher
        sums.append(total)
    log_sum = m + total.log()
    assert answer == [f"{sums[1]:.3f}", f"{sums[2]:.3f}", f"{log_sum:.3f}"]
    torch.testing.assert_close((scores - log_sum).exp(), scores.softmax(0), rtol=1e-3, atol=0)


def test_attention_3_rows_of_ds_sum_to_nothing_unless_d_is_left_out(answer):
    q, k, v, do = (random(11, 8, seed=seed) for seed in range(4))
    p = (q @ k.T / 8**0.5).softmax(-1)
    right = torch.autograd.grad(p @ v, (q, k, v), do)
    p, dp = p.detach(), do.detach() @ v.detach().T
    d = (p * dp).sum(1, keepdim=True)

    def gradients(d):
        ds = p * (dp - d)
        return ds, (ds @ k / 8**0.5, ds.T @ q / 8**0.5, p.T @ do)

    ds, with_d = gradients(d)
    assert ds.sum(1).abs().max() < 1e-12 and all(map(torch.allclose, with_d, right))
    ds, without_d = gradients(0)
    torch.testing.assert_close(ds.sum(1, keepdim=True), d)
    still_right = [name for name, x, y in zip(("dQ", "dK", "dV"), without_d, right) if torch.allclose(x, y)]
    assert answer == ["0", *still_right]


# rotary.md


def test_rotary_1_positions_a_thousand_later_change_rounding_alone(answer):
    turn, positions = code("rotary.md")["turn"], torch.arange(256)
    q, k = (random(256, 64, seed=seed).detach() for seed in range(2))

    def scores(of_q: int, of_k: int) -> Tensor:
        return turn(q, positions + of_q, 10_000.0) @ turn(k, positions + of_k, 10_000.0).T / 8

    def in_fp32(first: int) -> Tensor:
        qkv = torch.stack([q, k, k], 1)[:, None]
        turned = rotary(qkv, rotation(positions + first, 64, 10_000.0))[:, 0]
        return turned[:, 0] @ turned[:, 1].T / 8

    assert (scores(1_000, 1_000) - scores(0, 0)).abs().max() < 1e-10
    assert near(answer[0], (in_fp32(1_000) - in_fp32(0)).abs().max())
    changed = (scores(1_000, 0) - scores(0, 0)).std() / scores(0, 0).std()
    assert near(answer[1], changed, within=1.1)
    assert len(answer) == 2


def test_rotary_2_what_a_window_of_64_saves_of_300_tokens(answer):
    n, w = 300, 64
    seen = (torch.arange(n)[:, None] - torch.arange(n)).abs() <= w
    saved = n * n - int(seen.sum())
    scores = code("rotary.md")["scores"]
    least = next(n for n in range(1, 1_000) if scores([n], w) < n * n)
    assert answer == [f"{saved:,}", f"{100 * saved / n**2:.0f} %", f"{least}"]
    config = PRESETS["modern-base"]
    both = [attention_pairs(config, np.array([n])), config.layers * n * n]
    local = sum(config.window_of(layer) is not None for layer in range(config.layers))
    assert both[1] - both[0] == local * saved  # the library counts the same


def test_rotary_3_one_pair_takes_44_tokens_for_none(answer):
    distance = torch.arange(101)
    one, many = torch.ones(101, 2, dtype=torch.float64), torch.ones(101, 64, dtype=torch.float64)
    turn = code("rotary.md")["turn"]
    of_one, of_many = (turn(x, distance, 10_000.0) @ turn(x, distance[:1], 10_000.0)[0] / x.shape[1]
                       for x in (one, many))  # fmt: skip
    nearest = int(of_one[1:].argmax()) + 1
    assert answer == [f"{nearest}", f"{of_one[nearest]:.4f}", f"{of_many[nearest]:.2f}"]


# layer_norm.md


def normalised_gradient(r_new: Tensor, dn: Tensor) -> Tensor:
    """By the page's function, with weight 1, without dropout, and nothing that comes back along the stream."""
    one, keep = torch.ones(r_new.shape[1], dtype=torch.float64), torch.ones_like(r_new)
    return code("layer_norm.md")["add_norm_backward"](r_new, one, keep, 0.0, 0.0, torch.zeros_like(dn), dn)[2]


def test_layer_norm_1_what_cannot_change_gets_no_gradient(answer):
    r_new = random(7, 12, seed=0).detach()
    u = torch.nn.functional.layer_norm(r_new, (12,), eps=0.0)
    for dn in (torch.ones_like(u), u):
        assert normalised_gradient(r_new, dn).abs().max() < 1e-12
    other = random(7, 12, seed=1).detach()
    torch.testing.assert_close(normalised_gradient(r_new, other + 3 * u - 5), normalised_gradient(r_new, other))
    assert answer == ["0"]


def test_layer_norm_2_a_stream_ten_times_as_large_gets_a_tenth_of_the_gradient(answer):
    r_new, dn = (random(7, 12, seed=seed).detach() for seed in range(2))
    normed = [torch.nn.functional.layer_norm(each, (12,), eps=0.0) for each in (r_new, 10 * r_new)]
    torch.testing.assert_close(*normed)
    smaller = normalised_gradient(r_new, dn) / normalised_gradient(10 * r_new, dn)
    assert answer == [f"{smaller.mean():.0f}"]
    torch.testing.assert_close(smaller, torch.full_like(smaller, 10.0))


def test_layer_norm_3_the_order_of_additions_decides_the_last_bits(answer):
    numbers = np.random.default_rng(0).standard_normal(1_000).astype(np.float32)

    def add(order) -> np.float32:
        total = np.float32(0)
        for i in order:
            total += numbers[i]
        return total

    shuffled = randomness.Random(0)
    sums = {float(add(shuffled.sample(range(1_000), 1_000))) for _ in range(20)}
    fixed = {float(sum(np.float32(add(range(g, 1_000, 8))) for g in range(8))) for _ in range(20)}
    assert answer == [f"{len(sums)}", f"{len(fixed)}"]
    assert max(sums) - min(sums) < 1e-4  # nothing but rounding


# kernels.md


def test_kernels_1_a_sum_of_ones_stops_in_half_precision(answer):
    def stops(dtype: torch.dtype) -> int:
        total = torch.zeros((), dtype=dtype)
        for n in range(5_000):
            if total + 1 == total:
                return n
            total += 1
        return -1

    assert stops(torch.float32) == -1
    assert answer == [f"{stops(dtype):,}" for dtype in (torch.bfloat16, torch.float16)]


def test_kernels_2_only_poison_always_shows_what_was_not_written(answer):
    def kernel(x: Tensor, out: Tensor) -> Tensor:
        """Doubles x, a tile of 64 rows at a time, and forgets the tile that is not full."""
        for tile in range(len(x) // 64):
            out[64 * tile : 64 * tile + 64] = 2 * x[64 * tile : 64 * tile + 64]
        return out

    def right(x: Tensor, out: Tensor) -> bool:
        return torch.equal(kernel(x, out), 2 * x)

    whole, odd = random(128, 4, seed=0).detach(), random(130, 4, seed=0).detach()
    assert right(whole, torch.full_like(whole, torch.nan))
    assert right(odd, 2 * odd)  # what an earlier call had left there
    poisoned = kernel(odd, torch.full_like(odd, torch.nan))
    assert answer == [f"{int(poisoned.isnan().all(1).sum())}"]


def test_kernels_3_a_row_whose_hash_is_2_to_the_31_is_dropped_whole(answer):
    dropout = Dropout.for_step(0.1, seed=1, step=0, layers=1).at(0, "ffn_output")
    columns = dropout.column_hash(0, 10_000)
    assert (columns % 2 == 1).all()
    found = [1 - float(dropout.keeps(torch.tensor(h, dtype=torch.int32), columns).double().mean())
             for h in (-(2**31), 0, int(dropout.row_hash(5, 6)))]  # fmt: skip
    assert answer == [f"{100 * found[0]:.0f} %", f"{100 * found[1]:.0f} %"]
    assert abs(found[2] - 0.1) < 0.01


# data-parallel.md


def test_data_parallel_1_eight_times_the_ranks_send_an_eighth_more(answer):
    def sent(n: int) -> float:
        """In buffers."""
        buffers = [torch.zeros(64 * 5) for _ in range(n)]
        return code("data-parallel.md")["ring_all_reduce"](buffers)[1] / (64 * 5)

    assert answer == [f"{sent(8):.2f}", f"{sent(64):.2f}", f"{100 * (sent(64) / sent(8) - 1):.1f} %"]
    assert sent(64) < 2


def test_data_parallel_2_clipping_each_ranks_gradient_turns_the_step(answer):
    ranks = [torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])]

    def clipped(gradient: Tensor) -> Tensor:
        return gradient * min(1.0, 1 / float(gradient.norm()))

    together, apart = clipped(sum(ranks) / 2), sum(map(clipped, ranks)) / 2
    norms = [f"{x.norm():.2f}" for x in (together, apart)]
    degrees = [f"{math.degrees(math.atan2(x[1], x[0])):.0f}°" for x in (together, apart)]
    assert answer == [norms[0], degrees[0], norms[1], degrees[1]]


def test_data_parallel_3_shares_end_inside_parameters(answer):
    places, (bucket,) = lay_out({"first": 200, "last": 700}, data_parallel=4)
    shares = [bucket.share(rank, 4) for rank in range(4)]
    of_last = [s for s in shares if s.start < places["last"].stop and s.stop > places["last"].start]
    assert places["last"].start == 0  # the last layer's gradients come first
    size = bucket.stop - bucket.start
    assert answer == [f"{len(of_last)}", f"{size - 900}"]
    assert [s.stop - s.start for s in shares] == [size // 4] * 4


# tensor-parallel.md


def test_tensor_parallel_1_gelu_of_a_sum_is_no_sum_of_gelus(answer):
    x = torch.ones(())
    gelu = torch.nn.functional.gelu
    assert answer == [f"{gelu(x + x):.2f}", f"{gelu(x) + gelu(x):.2f}"]


def test_tensor_parallel_2_in_another_order_a_rank_has_queries_without_values(answer):
    heads, d = 12, 64
    in_order = [(part, head) for head in range(heads) for part in "qkv" for _ in range(d)]
    by_part = [(part, head) for part in "qkv" for head in range(heads) for _ in range(d)]

    def has(rows: list) -> list[int]:
        """How many heads' queries, keys and values rank 0 of 2 has."""
        mine = slice_of("encoder.blocks.0.qkv.weight", torch.arange(len(rows))[:, None], 0, 2).flatten().tolist()
        return [len({head for part, head in (rows[i] for i in mine) if part == which}) for which in "qkv"]

    assert has(in_order) == [heads // 2] * 3
    assert answer == [f"{n}" for n in has(by_part)]


def test_tensor_parallel_3_four_ranks_send_half_as_much_again_as_two(answer):
    base = PRESETS["base"]

    def sent(n: int, sequence: bool) -> float:
        """Megabytes of one rank for one block, forward and backward, at T = 16,384 in bf16."""
        layout = Layout(tensor_parallel=n, micro_batch_rows=8, sequence_parallel=sequence)
        of_blocks = [row for row in collectives(base, layout, [layout.masked])
                     if row.name.startswith(("column layers", "row layers"))]  # fmt: skip
        return wire_bytes(of_blocks, layout, "tensor") / base.layers / 1e6

    assert [f"{sent(2, sequence):.1f}" for sequence in (False, True)] == [
        "100.7",
        "125.8",
    ]  # as the page's table has it
    assert answer == [f"{sent(4, sequence):.1f} MB" for sequence in (False, True)]


# muon.md


def test_muon_1_a_direction_of_a_thousandth_takes_six_iterations(answer):
    step, n = code("muon.md")["orthogonalise_slices"], 8
    values = torch.full((n,), 1e-3, dtype=torch.float64)
    values[0] = (1 - (n - 1) * 1e-6) ** 0.5  # so that the norm is 1

    def smallest(iterations: int) -> float:
        return float(torch.linalg.svdvals(step([values.diag()], iterations)[0])[-1])

    enough = next(n for n in range(1, 20) if smallest(n) > 0.7)
    assert answer == [f"{smallest(5):.2f}", f"{enough}"]


def test_muon_2_the_short_side_of_an_mlp_matrix_is_a_tenth_of_the_work(answer):
    base = PRESETS["base"]

    def work(rows: int, columns: int) -> int:
        with FlopCounterMode(display=False) as count:
            muon.orthogonalise(torch.empty(1, rows, columns, device="meta"), Mesh())
        return count.get_total_flops()

    short, long = work(base.ffn, base.hidden), work(base.hidden, base.ffn)
    assert answer == [f"{long / short:.1f}"]


def test_muon_3_slices_each_by_itself_make_a_step_that_is_too_long(answer):
    slices = random(128, 16, seed=0).detach().split(64)

    def nearest(x: Tensor) -> Tensor:
        a, _, b = torch.linalg.svd(x, full_matrices=False)
        return a @ b

    apart, together = torch.cat([nearest(x) for x in slices]), nearest(torch.cat(slices))
    torch.testing.assert_close(torch.linalg.svdvals(together), torch.ones(16, dtype=torch.float64))
    values = torch.linalg.svdvals(apart)
    torch.testing.assert_close(values, torch.full_like(values, 2**0.5))
    assert answer == [f"{values.mean():.2f}"]
    assert (apart / 2**0.5 - together).norm() > 0.05 * together.norm()  # nor does it go the same way


# long-runs.md


def test_long_runs_1_bytes_are_no_place_in_a_file_that_is_cut_back(answer):
    def lines(first: int, last: int, speed: int) -> list[str]:
        return [f'{{"step": {n}, "loss": {9 - n / 1000:.3f}, "tokens_per_second": {speed}}}\n'
                for n in range(first, last + 1)]  # fmt: skip

    killed = lines(1, 1_730, 98_000)
    resumed = killed[:1_500] + lines(1_501, 2_000, 101_000)
    by_lines = resumed[len(killed) :]
    by_step = [line for line in resumed if int(re.search(r"\d+", line)[0]) > 1_730]
    by_bytes = "".join(resumed)[len("".join(killed)) :].splitlines(keepends=True)
    good = [name for name, read in (("lines", by_lines), ("step", by_step), ("bytes", by_bytes))
            if read == resumed[1_730:]]  # fmt: skip
    assert good == ["lines", "step"] and not by_bytes[0].startswith("{")
    assert answer == [f"{len(good)}"]


def test_long_runs_2_a_step_and_a_checkpoint_fit_into_nine_minutes(answer):
    job = (DOCS / "train.sbatch").read_text()
    before_the_end = int(re.search(r"--signal=B:USR1@(\d+)", job)[1])
    patience = int(re.search(r"TORCH_ELASTIC_SHUTDOWN_TIMEOUT=(\d+)", job)[1])
    checkpoint = 120
    assert answer == [f"{(patience - checkpoint) // 60}", f"{before_the_end - patience}"]


def test_long_runs_3_how_often_to_save_for_one_failure_a_day(answer):
    wait, day = 3.0, 86_400.0
    minutes = np.arange(1, 121)
    lost = wait / (60 * minutes) + 60 * minutes / 2 / day  # share of the time
    best = int(minutes[lost.argmin()])
    others = [f"{100 * lost[minutes == n].item():.1f} %" for n in (best // 3, 3 * best)]
    assert answer == [f"{best}", f"{100 * lost.min():.1f} %", others[0]] and others[0] == others[1]

    def simulated(minutes: int) -> float:
        """Share of the time that is lost with failures at random moments, a day apart on average."""
        moments = np.random.default_rng(0).exponential(day, 100_000)
        period = 60 * minutes + wait
        kept = moments // period * 60 * minutes
        return 1 - kept.sum() / moments.sum()

    assert simulated(best) < min(simulated(best // 3), simulated(3 * best))
    assert abs(simulated(best) - lost.min()) < 1e-3


# embeddings.md


def unit(n: int, width: int, seed: int) -> Tensor:
    return torch.nn.functional.normalize(random(n, width, seed=seed).detach())


def no_others(n: int) -> Tensor:
    return torch.zeros(n, n, dtype=torch.bool)


def test_embeddings_1_a_model_that_knows_nothing_has_the_logarithm_of_the_batch(answer):
    def loss(n: int) -> Tensor:
        same = unit(1, 8, seed=0).expand(n, 8)
        return contrastive_loss(same, same, no_others(n)) / n

    assert answer == [f"{loss(n):.2f}" for n in (8, 1_024)]
    assert abs(loss(8) - math.log(8)) < 1e-6


def test_embeddings_2_gradients_of_parts_go_through_stored_vectors(answer):
    weight, x = random(6, 4, seed=0), random(16, 6, seed=1).detach()  # 8 queries, then 8 texts

    def vectors(x: Tensor) -> Tensor:
        return torch.nn.functional.normalize((x @ weight).tanh())

    def gradient(loss: Tensor) -> Tensor:
        return torch.autograd.grad(loss, weight)[0]

    made = vectors(x)
    whole = gradient(contrastive_loss(made[:8], made[8:], no_others(8)))
    stored = vectors(x).detach().requires_grad_()
    (of_vectors,) = torch.autograd.grad(contrastive_loss(stored[:8], stored[8:], no_others(8)), stored)
    parts = sum(gradient((vectors(part) * g).sum()) for part, g in zip(x.split(4), of_vectors.split(4)))
    torch.testing.assert_close(parts, whole)
    halves = sum(gradient(contrastive_loss(vectors(x[at]), vectors(x[at + 8]), no_others(4)))
                 for at in torch.arange(8).split(4))  # fmt: skip
    assert (halves - whole).norm() > 0.1 * whole.norm()

    def work(passes) -> int:
        layers, x = torch.nn.Sequential(*(torch.nn.Linear(16, 16) for _ in range(4))), torch.ones(8, 16)
        with FlopCounterMode(display=False) as count:
            passes(layers, x.requires_grad_())
        return count.get_total_flops()

    def once(layers, x):
        layers(x).sum().backward()

    def twice(layers, x):
        with torch.no_grad():
            layers(x)
        once(layers, x)

    assert answer == [f"{100 * (work(twice) / work(once) - 1):.0f} %"]


def test_embeddings_3_two_answers_to_one_question_cannot_both_win(answer):
    query = unit(1, 8, seed=0).expand(2, 8)

    def loss(texts: Tensor, left_out: Tensor) -> float:
        return float(contrastive_loss(query, texts, left_out)) / 2

    tries = [loss(unit(2, 8, seed), no_others(2)) for seed in range(1, 100)]
    least = loss(query, no_others(2))  # both answers where the question is
    assert least <= min(tries)
    left_out = ~torch.eye(2, dtype=torch.bool)
    assert answer == [f"{least:.2f}", f"{abs(loss(unit(2, 8, 1), left_out)):.0f}"]
