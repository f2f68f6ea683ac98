"""The parts of a run by themselves: schedule, optimizer, checkpoint files, figures."""

from __future__ import annotations

import builtins
import dataclasses
import errno
import json
import os
import shutil
import threading
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from minisobert import files
from minisobert.config import ModelConfig, TrainConfig
from minisobert.model import MaskedLM
from minisobert.ops import Documents, Dropout, cross_entropy
from minisobert.parallel.mesh import Mesh
from minisobert.training import checkpoint, meter
from minisobert.training.optimizer import Optimizer
from minisobert.training.run import Progress
from minisobert.training.schedule import learning_rate


def test_the_learning_rate_rises_over_the_warm_up_and_falls_in_a_line_to_a_tenth():
    def rate(tokens):
        return learning_rate(tokens, train_tokens=1_000, peak=2.0, warmup_fraction=0.1, final_fraction=0.1)

    assert rate(50) == pytest.approx(1.0) and rate(100) == pytest.approx(2.0)
    assert rate(550) == pytest.approx((2.0 + 0.2) / 2) and rate(1_000) == pytest.approx(0.2)
    assert rate(1_300) == pytest.approx(0.2)  # the last batch may reach past the end
    assert learning_rate(1, 1_000, 2.0, warmup_fraction=0.0, final_fraction=0.0) == pytest.approx(2.0 * 0.999)


def test_the_learning_rate_of_wsd_rises_stays_and_falls_by_one_minus_a_root():
    def rate(tokens):
        return learning_rate(tokens, 1_000, 2.0, warmup_fraction=0.1, final_fraction=0.1, decay_fraction=0.2)

    assert rate(50) == pytest.approx(1.0)
    assert [rate(tokens) for tokens in (100, 101, 500, 800)] == [2.0] * 4
    # the rate has covered the root of the past part of the decay, as a share of the way from the peak to the end
    assert rate(850) == pytest.approx(2.0 - 1.8 * 0.5) and rate(928) == pytest.approx(2.0 - 1.8 * 0.8)
    assert rate(1_000) == pytest.approx(0.2) and rate(1_300) == pytest.approx(0.2)  # the last batch may reach past it
    # warm-up and decay may take all of training, or one of them nothing
    assert learning_rate(500, 1_000, 2.0, 0.5, 0.0, decay_fraction=0.5) == 2.0
    assert learning_rate(250, 1_000, 2.0, 0.0, 0.0, decay_fraction=1.0) == pytest.approx(1.0)


def test_a_mask_schedule_is_a_line_from_one_rate_to_the_other_and_the_rate_is_one_number_without_it():
    config = TrainConfig(train_tokens=1_000, mask_rate=0.2, mask_schedule="0.3:0.1")
    assert [config.mask_rate_after(n) for n in (0, 250, 500, 1_000)] == pytest.approx([0.3, 0.25, 0.2, 0.1])
    assert config.mask_rate_after(1_500) == pytest.approx(0.1)  # the last batch may begin before the end and reach past
    assert TrainConfig(mask_schedule="0.1:1").mask_rate_after(0) == 0.1
    assert {TrainConfig(mask_rate=0.2).mask_rate_after(n) for n in (0, 10**9, 27 * 10**9)} == {0.2}
    rates = [step.mask_rate for step in dataclasses.replace(config, tokens_per_batch=256, row_tokens=32).steps(1)]
    assert rates == pytest.approx([0.3, 0.2488, 0.1976, 0.1464])  # after 0, 256, 512 and 768


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(4, 3, generator=generator))
        self.bias = nn.Parameter(torch.randn(4, generator=generator))

    def forward(self, x):
        return (x @ self.weight.T + self.bias).square().sum()


def adam_by_hand(w, gradients, rate, decay, betas=(0.9, 0.999), eps=1e-8):
    """AdamW by algorithm 2 of Loshchilov and Hutter 2019, in fp64."""
    w, m, v = w.double(), 0, 0
    for t, g in enumerate(gradients, 1):
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2
        w = w - rate * (m / (1 - betas[0] ** t) / ((v / (1 - betas[1] ** t)).sqrt() + eps) + decay * w)
    return w


def test_a_step_divides_clips_decays_matrices_alone_and_zeroes_the_gradient():
    model = Small()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Optimizer(model, torch.float32, (0.9, 0.999), weight_decay=0.1)
    inputs = [torch.randn(2, 3, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    applied = {"weight": [], "bias": []}
    for x in inputs:
        model(x).backward()
        gradients = {name: p.grad.double().clone() / 7 for name, p in model.named_parameters()}
        expected_norm = torch.cat([g.flatten() for g in gradients.values()]).norm()
        norm, finite = optimizer.step(0.05, count=7, clip=0.5)
        assert finite and norm == pytest.approx(float(expected_norm), rel=1e-5)
        for name, g in gradients.items():
            applied[name].append(g * min(1, 0.5 / float(expected_norm)))
        assert (optimizer.flat.gradients == 0).all()
    for name, decay in (("weight", 0.1), ("bias", 0.0)):
        expected = adam_by_hand(before[name], applied[name], 0.05, decay)
        torch.testing.assert_close(getattr(model, name).detach().double(), expected, rtol=1e-5, atol=1e-6)


def test_gradients_of_several_micro_batches_are_summed_in_fp32_in_bf16_too():
    for dtype in (torch.float32, torch.bfloat16):
        model = Small()
        optimizer = Optimizer(model, dtype, (0.9, 0.999), weight_decay=0.0)
        assert model.weight.dtype == dtype
        x = torch.ones(1, 3, dtype=dtype)
        for _ in range(3):
            model(x).backward()
        once = Small().to(dtype)
        once(x).backward()
        for name, parameter in once.named_parameters():
            torch.testing.assert_close(optimizer.flat.gradient(name), 3 * parameter.grad.float(), rtol=1e-6, atol=0)


def test_bf16_keeps_fp32_masters_so_that_small_steps_are_not_lost():
    model = Small()
    before = model.weight.detach().clone()
    optimizer = Optimizer(model, torch.bfloat16, (0.9, 0.999), weight_decay=0.0)
    master = next(part.master for part in optimizer.parts if part.name == "weight").view(4, 3)
    assert torch.equal(master, before)  # not the rounded weights
    for _ in range(40):
        optimizer.flat.gradients.fill_(1.0)
        optimizer.step(1e-4, count=1, clip=1e9)
    moved = master - before
    torch.testing.assert_close(moved, torch.full_like(moved, -40e-4), rtol=1e-2, atol=0)
    assert torch.equal(model.weight, master.bfloat16())
    assert not torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction  # partial sums are not rounded either


def test_the_norm_of_many_gradients_is_that_of_fp64():
    """On a CPU, torch's fp32 norm of so many elements is too small by 1e-3."""
    model = nn.Linear(4_000, 4_000, bias=False)
    optimizer = Optimizer(model, torch.float32, (0.9, 0.999), weight_decay=0.0)
    optimizer.flat.gradients.normal_(generator=torch.Generator().manual_seed(0))
    exact = float(optimizer.flat.gradients.double().norm())
    assert optimizer.step(0.0, count=1, clip=1.0)[0] == pytest.approx(exact, rel=1e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_changes_nothing(bad):
    model = Small()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = Optimizer(model, torch.float32, (0.9, 0.999), weight_decay=0.1)
    model(torch.ones(2, 3)).backward()
    optimizer.flat.gradient("weight")[2, 1] = bad
    _, applied = optimizer.step(0.1, count=1, clip=1.0)
    assert not applied and (optimizer.flat.gradients == 0).all() and optimizer.not_finite() == ["weight"]
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert all((moment == 0).all() for part in optimizer.parts for moment in optimizer.tensors(part)[1:])


TENSORS = {
    "a.weight": torch.randn(5, 3),
    "half": torch.randn(7).bfloat16(),
    "whole": torch.arange(4),
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 2),
    "not contiguous": torch.randn(4, 6).T,
}


def write(path, tensors) -> None:
    described = {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors.items()}
    begin, places, size = files.safetensors_header(described)
    data = bytearray(begin.ljust(size, b"\0"))
    for name, t in tensors.items():
        data[places[name] : places[name] + t.nbytes] = t.contiguous().flatten().view(torch.uint8).numpy().tobytes()
    path.write_bytes(data)


def test_our_safetensors_are_read_by_the_library_and_the_librarys_by_us(tmp_path):
    library = pytest.importorskip("safetensors.torch")
    write(tmp_path / "ours", TENSORS)
    library.save_file({name: t.contiguous() for name, t in TENSORS.items()}, tmp_path / "theirs", {"format": "pt"})
    for read in (library.load_file(tmp_path / "ours"), files.read_safetensors(tmp_path / "theirs")):
        assert read.keys() == TENSORS.keys()
        assert all(torch.equal(read[name], t) and read[name].dtype == t.dtype for name, t in TENSORS.items())


def save(folder, step, keep=2, loss=None):
    saver = checkpoint.Saver(folder, keep, Mesh())
    begin(saver, step, loss)
    saver.wait()
    return saver.last


def begin(saver, step, loss=None):
    shapes = {"model": {"w": (3,)}, "optimizer": {"m": (2,)}}
    slices = [
        checkpoint.Slice("model", "w", torch.full((3,), float(step)), [(0, 0, 3)]),
        checkpoint.Slice("optimizer", "m", torch.ones(2), [(1, 0, 1), (0, 1, 1)]),
    ]
    saver.start(step, shapes, slices, state_of(step, loss))


def state_of(step, loss=None) -> dict:
    """A state like train.py's, with every kind of number in it."""
    progress = Progress(step, 524_288 * step, 524_288 * step, 510_000 * step, 12.5, 0, 0, 6.015625)
    train = dataclasses.asdict(TrainConfig(learning_rate=1e-5))
    return {"progress": dataclasses.asdict(progress), "run": {"train": train}, "validation_loss": loss}


def test_the_last_checkpoints_are_kept_and_read_back(tmp_path):
    for step in (1, 2, 10):
        save(tmp_path, step)
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step-00000002", "step-00000010"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000010"]
    checkpoint.verify(tmp_path / "step-00000010")
    read = checkpoint.read(tmp_path / "step-00000010")
    assert read["model"]["w"].tolist() == [10, 10, 10] and read["optimizer"]["m"].tolist() == [1, 1]
    assert checkpoint.read_state(tmp_path / "step-00000010")["progress"]["step"] == 10


def test_the_best_checkpoint_is_kept_beside_the_last(tmp_path):
    for step, loss in enumerate([3.0, 2.0, 2.5, None, 2.2, 2.4], 1):
        save(tmp_path, step, loss=loss)
    assert [int(path.name[5:]) for path in checkpoint.steps(tmp_path)] == [2, 5, 6]
    assert checkpoint.best(tmp_path).name == "step-00000002"


def test_what_is_saved_is_what_stood_there_at_the_beginning_of_the_save(tmp_path, monkeypatch):
    """Training continues, and changes the weights while they are written."""
    go_on = threading.Event()
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda *args: (go_on.wait(10), pwrite(*args))[1])
    saver, w = checkpoint.Saver(tmp_path, 1, Mesh()), torch.zeros(3)
    shapes = {"model": {"w": (3,)}, "optimizer": {}}
    saver.start(1, shapes, [checkpoint.Slice("model", "w", w, [(0, 0, 3)])], state_of(1))
    assert saver.flags == (0, 0)
    w += 1
    go_on.set()
    saver.wait()
    assert checkpoint.read(saver.last)["model"]["w"].tolist() == [0, 0, 0]
    saver.start(2, shapes, [checkpoint.Slice("model", "w", w, [(0, 0, 3)])], state_of(2))  # in the same memory
    saver.wait()
    assert checkpoint.read(saver.last)["model"]["w"].tolist() == [1, 1, 1]


class Killed(BaseException):
    """Stands for the end of the process, so nothing may catch it."""


OPERATIONS = [
    (builtins, "open"), (os, "open"), (os, "pwrite"), (os, "fsync"), (os, "replace"), (shutil, "rmtree")
]  # fmt: skip


@pytest.mark.parametrize("place", range(22))
def test_a_process_that_ends_between_any_two_file_operations_loses_no_checkpoint(tmp_path, monkeypatch, place):
    save(tmp_path, 1, keep=1)
    calls = 0

    def dying(function):
        def wrapped(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > place:
                raise Killed
            return function(*args, **kwargs)

        return wrapped

    with monkeypatch.context() as patch:
        for module, name in OPERATIONS:
            patch.setattr(module, name, dying(getattr(module, name)))
        try:
            save(tmp_path, 2, keep=1)
            finished = True
        except Killed:
            finished = False
    kept = checkpoint.steps(tmp_path)
    for path in kept:
        checkpoint.verify(path)
    assert kept and all(checkpoint.read(path)["model"]["w"][0] == int(path.name[-1]) for path in kept)
    assert kept[-1].name == "step-00000002" or not finished
    save(tmp_path, 3, keep=1)  # the next save removes what was left over
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000003"]


def test_the_places_above_reach_to_the_end_of_a_save(tmp_path, monkeypatch):
    """Shows that the test above ends a save before, between and after all its file operations."""
    save(tmp_path, 1, keep=1)
    calls = []
    for module, name in OPERATIONS:
        function = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, f=function, n=name, **k: (calls.append(n), f(*a, **k))[1])
    save(tmp_path, 2, keep=1)
    monkeypatch.undo()
    assert len(calls) == 21, calls


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_a_damaged_checkpoint_is_refused_by_name(tmp_path, name):
    path = save(tmp_path, 1)
    data = bytearray((path / name).read_bytes())
    data[-2 if name != "state.json" else 0] ^= 0xFF
    (path / name).write_bytes(data)
    with pytest.raises(ValueError, match=rf"{name}.*remove .*step-00000001"):
        checkpoint.verify(path)
    (path / name).unlink()
    with pytest.raises(ValueError, match=rf"{name}.*remove .*step-00000001"):
        checkpoint.verify(path)


def test_every_bit_of_a_state_is_guarded(tmp_path, monkeypatch):
    path = save(tmp_path, 123, loss=5.75)
    written = (path / "state.json").read_bytes()
    accepted = []
    for place in range(len(written)):
        for bit in range(8):
            flipped = written[:place] + bytes([written[place] ^ 1 << bit]) + written[place + 1 :]
            monkeypatch.setattr(Path, "read_bytes", lambda _, flipped=flipped: flipped)
            try:
                checkpoint.read_state(path)
                accepted.append((place, bit))
            except ValueError as error:
                assert f"remove {path} to go on from the one before" in str(error)
    assert len(written) > 500 and accepted == []
    monkeypatch.undo()
    assert checkpoint.read_state(path)["progress"]["step"] == 123


@pytest.mark.parametrize(
    "edit",
    [
        lambda text: text.replace('"step": 2', '"step": 3'),
        lambda text: text.replace("1e-05", "1E-05"),  # the same number
        lambda text: text.replace("\n", "\r\n"),
        lambda text: text + "\n",
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: json.dumps({**json.loads(text), "validation_loss": 0.1}, indent=2) + "\n",
        lambda text: json.dumps({k: v for k, v in json.loads(text).items() if k not in ("checksum", "run")}),
    ],
)
def test_a_state_that_somebody_edited_is_refused(tmp_path, edit):
    path = save(tmp_path, 2)
    text = (path / "state.json").read_text()
    (path / "state.json").write_bytes(edit(text).encode())
    with pytest.raises(ValueError, match=r"state.json is damaged \(.*remove .*step-00000002 to go on"):
        checkpoint.read_state(path)


def test_a_checkpoint_under_another_steps_name_is_refused(tmp_path):
    save(tmp_path, 2).rename(tmp_path / "step-00000003")
    with pytest.raises(ValueError, match=r"step-00000003/state.json is damaged \(it is the state of step 2\)"):
        checkpoint.verify(tmp_path / "step-00000003")


def without_checksum(path) -> None:
    """Makes the state as an older version wrote it."""
    state = checkpoint.read_state(path)
    del state["checksum"]
    (path / "state.json").write_text(json.dumps(state, indent=2) + "\n")


def test_a_state_of_the_version_before_which_has_no_checksum_of_its_own_is_read(tmp_path):
    path = save(tmp_path, 2)
    before = checkpoint.read_state(path)
    without_checksum(path)
    checkpoint.verify(path)
    assert checkpoint.read_state(path) == {name: value for name, value in before.items() if name != "checksum"}


def test_only_a_folder_named_after_a_step_is_a_checkpoint(tmp_path):
    for name in ("step-00000002", "step-100000000", "step-00000002.bak", "step-old", "mine"):
        (tmp_path / name).mkdir()
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step-00000002", "step-100000000"]


@pytest.mark.parametrize("operation", ["pwrite", "fsync", "replace"])
def test_a_full_disk_is_said_and_the_checkpoint_before_stays(tmp_path, monkeypatch, operation):
    save(tmp_path, 1)

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, operation, full)
        with pytest.raises(checkpoint.SaveFailed, match=r"step-00000002 could not be written: .*No space left"):
            save(tmp_path, 2)
    assert [path.name for path in checkpoint.steps(tmp_path)] == ["step-00000001"]
    checkpoint.verify(tmp_path / "step-00000001")
    save(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]


def test_flops_are_those_that_the_profiler_of_torch_counts():
    config = ModelConfig(layers=2, hidden=64, heads=2, ffn=192, vocabulary=256, positions=64)
    model = MaskedLM(config).initialise(0)
    lengths = [10, 30]
    documents = Documents.from_bounds([0, 10, 40])
    masked = torch.arange(0, 40, 4)
    dropout = Dropout.for_step(0.1, 0, 0, layers=2)  # with it, attention is matrix products, which the counter knows
    with FlopCounterMode(display=False) as counter:
        logits = model(torch.ones(40, dtype=torch.int64), torch.arange(40), documents, masked, dropout)
        cross_entropy(logits, masked).sum().backward()
    ours = meter.training_flops(config, 40, meter.attention_pairs(config, np.array(lengths)), len(masked))
    assert ours == counter.get_total_flops()


def test_dollars_are_gpu_hours_times_their_price():
    assert meter.dollars(seconds=1_800, gpus=8, price_per_gpu_hour=3.0) == 12.0


def test_tokens_per_batch_that_does_not_divide_names_all_numbers_and_the_nearest_choices():
    config = TrainConfig(tokens_per_batch=524_288, micro_batch_rows=12)
    with pytest.raises(ValueError) as error:
        config.accumulation(524_288, data_parallel=8)
    assert "524,288 = 12 × 2,048 × 8 × 2.667" in str(error.value)
    assert "choose --tokens-per-batch 393,216 or 589,824, or --micro-batch-rows 4, 8 or 16" in str(error.value)
    assert TrainConfig(tokens_per_batch=524_288, micro_batch_rows=16).accumulation(524_288, 8) == 2


def test_the_config_is_written_as_json():
    assert TrainConfig(**json.loads(json.dumps(dataclasses.asdict(TrainConfig())))) == TrainConfig()


def test_a_batch_schedule_sets_the_size_of_each_step():
    config = TrainConfig(batch_schedule="0:8192,20_000:16384,1e5:32768", train_tokens=150_000, micro_batch_rows=1)
    assert [*config.batch_sizes()][:4] == [(0, 8_192), (8_192, 8_192), (16_384, 8_192), (24_576, 16_384)]
    steps = [*config.batch_sizes()]
    assert all(before + size == after for (before, size), (after, _) in pairwise(steps))
    assert steps[-1][0] < 150_000 <= sum(steps[-1])
    assert {size for before, size in steps if before >= 1e5} == {32_768}
    assert [*config.batch_sizes(24_576)] == steps[3:]
    assert [*TrainConfig(train_tokens=1_000_000).batch_sizes()] == [(0, 524_288), (524_288, 524_288)]


@pytest.mark.parametrize("schedule", ["8192", "1:8192", "0:8192,0:16384", "0:8192,9:1,5:2", "0:0", "0:8192,", "0:x"])
def test_a_wrong_batch_schedule_is_refused(schedule):
    with pytest.raises(ValueError, match=r"--batch-schedule is .* it must be pairs .* 0:131072,1e9:524288"):
        TrainConfig(batch_schedule=schedule)


def test_every_size_of_a_batch_schedule_must_come_out_even():
    config = TrainConfig(batch_schedule="0:8192,1e5:20480", micro_batch_rows=1)
    with pytest.raises(ValueError, match=r"20,480 = 1 × 2,048 × 4 × 2.5; choose --batch-schedule 0:8192,100000:"):
        config.check(rows=1_000, data_parallel=4)
    with pytest.raises(ValueError, match="a batch has 33,554,432 row positions; dropout can count"):
        TrainConfig(tokens_per_batch=1 << 25)


def test_what_a_resumed_run_may_change_leaves_the_trajectory_alone():
    """Precision looks like a layout option, but it changes the rounding."""
    fixed = {"precision", "seed", "tokens_per_batch", "row_tokens", "dropout", "loss_average", "train_tokens", "preset"}
    assert not fixed & TrainConfig().resumable_fields()
