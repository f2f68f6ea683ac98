"""`make gpu` without a GPU: its dry run, its counts of FLOPs and bytes, its predictions, and the lengths it draws."""

from __future__ import annotations

import json
import math
import os
import re
import select
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from against_reference import interpreted
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks import RESULTS, lengths
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import attention, predict, records, report, rowwise, timing, training
from benchmarks.gpu.records import Records
from benchmarks.gpu.report import DRY, Goal
from benchmarks.gpu.setting import DTYPE, LENGTHS, REAL, TOY
from benchmarks.gpu.timing import Disagreement, check
from benchmarks.instructions import read_loops
from minisobert.ops.kernels import attention_tiles

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def threads():
    """Restores the number of threads after each test, because a dry run sets it to one."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def call(monkeypatch, out: Path, *words: str) -> int:
    monkeypatch.setenv("OUT", str(out))
    monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", *words])
    return gpu.main()


@pytest.mark.parametrize("kernel", attention.TILES)
def test_the_first_tile_that_is_timed_is_the_one_that_ships_and_it_ships_afterwards(kernel, monkeypatch):
    table, seen = getattr(attention_tiles, attention.TABLES[kernel]), []
    monkeypatch.setattr(attention, "measure", lambda *_: seen.append(table[2, 64][1]))
    for tile in attention.TILES[kernel]:
        attention.measure_tile(TOY, kernel, tile)
    assert tuple(seen) == attention.TILES[kernel] and table[2, 64][1] == seen[0]


def test_a_machine_for_measuring_needs_no_library_of_the_data_path():
    needed = "import sys; sys.modules |= dict.fromkeys(['sentencepiece', 'py7zr', 'tokenizers']); import {}"
    for module in ("benchmarks.gpu.__main__", "conftest"):  # the conftest of tests/gpu
        command = [sys.executable, "-c", needed.format(module)]
        path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
        subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": path}, check=True)


@pytest.mark.slow
def test_a_dry_run_walks_every_stage_and_a_second_one_repeats_nothing(tmp_path, monkeypatch, capfd):
    before = sorted(RESULTS.rglob("*"))
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry"]
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, "OUT": str(tmp_path)}, capture_output=True, text=True,
                          timeout=200)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert ", 0 were there already, 0 not reached" in done.stdout
    assert {path.name for path in tmp_path.iterdir()} == {
        "gpu.json", "gpu.md", "tests.log", "rates.png", "step.png", "cost.png",
    }  # fmt: skip
    assert sorted(RESULTS.rglob("*")) == before

    kept = json.loads((tmp_path / "gpu.json").read_text())
    assert kept["dry"] and DRY in (tmp_path / "gpu.md").read_text()
    failed = {name for name, record in kept["measurements"].items() if "failed" in record}
    assert {name.split("/")[-1] for name in failed} == {"varlen", "flex"}, "these two alone need a GPU"
    peer = kept["measurements"]["training/base/posts/0.0/MegatronBert"]["result"]
    assert 0 <= peer["padding_share"] < 1
    steps = kept["measurements"]["train.py/modern-base"]["result"]
    assert steps["steps"] == TOY.steps and steps["tokens_per_second"] > 0

    assert call(monkeypatch, tmp_path, "--dry") == 0
    count = len(kept["measurements"])
    assert f"0 measured, {count} were there already, 0 not reached" in capfd.readouterr().out
    assert json.loads((tmp_path / "gpu.json").read_text())["measurements"] == kept["measurements"]

    assert call(monkeypatch, tmp_path, "--dry", "--fresh", "bias_gelu/256") == 0
    assert f"0 measured, {count} were" not in capfd.readouterr().out


def test_what_there_was_no_time_for_is_listed(tmp_path, monkeypatch, capfd):
    assert call(monkeypatch, tmp_path, "--dry", "--seconds", "0") == 0
    planned = [each.name for each in gpu.plan(TOY, dict)]
    page = (tmp_path / "gpu.md").read_text()
    assert len(planned) == len(set(planned)) and all(f"- `{name}`\n" in page for name in planned)
    assert f"0 measured, 0 were there already, {len(planned)} not reached" in capfd.readouterr().out


@interpreted
def test_a_broken_call_of_a_kernel_fails_the_dry_run_and_is_ours(tmp_path, monkeypatch):
    kept = Records(tmp_path, TOY)
    one = next(each for each in gpu.plan(TOY, dict) if each.name == "attention/64/rows/0.0/minisobert")
    assert gpu.on_kernels(one.name)
    with gpu.in_interpreter():
        gpu.make(one, kept)
        assert not kept.failures(ours=True)
        monkeypatch.setattr(attention_tiles, "FORWARD", {})  # no tile, so the launch raises a KeyError
        gpu.make(one, kept)
    assert "KeyError" in kept.failures(ours=True)[one.name]


def test_every_kernel_is_walked_by_a_dry_run():
    """The measurements that use kernels include every stage of single kernels and a model of each architecture."""
    names = [each.name for each in gpu.plan(TOY, dict) if gpu.on_kernels(each.name)]
    for stage in ("attention", "tables", "surroundings", "tiles", "add_norm", "bias_gelu", "cross_entropy"):
        assert any(name.startswith(stage) for name in names), stage
    assert {name.split("/")[1] for name in names if name.startswith("training")} == {"base", "modern-base"}


def test_every_kernel_of_ours_has_a_part_of_its_own_in_the_profile():
    found = set()
    for path in (ROOT / "minisobert/ops/kernels").glob("*.py"):
        found |= set(re.findall(r"\b(_\w+)\[", path.read_text()))  # the launches: _name[grid](…)
    assert len(found) > 10
    parts = {name: [part for part, names in training.PARTS.items() if re.search(names, name)] for name in found}
    assert {name for name, of in parts.items() if not of} == {"_dropout", "_rotary"}, "these are the rest"
    assert all(len(of) <= 1 for of in parts.values())


def test_the_model_of_the_chip_gives_the_figure_that_it_was_fitted_to():
    """The FlashAttention-3 paper measured 396 TFLOP/s for Triton at d = 64 on whole rows."""
    chip, rows = predict.CHIPS["H100"], np.arange(0, 65_537, 2_048)
    found = predict.attention(chip, rows, 12, 64, 0.0)
    rate = attention.flops(32 * 2_048**2, 12, 64) / found.forward / 1e12
    assert rate == pytest.approx(396, rel=0.03)
    assert predict.attention(chip, rows, 12, 64, 0.1).forward > found.forward
    assert predict.attention(chip, rows, 12, 64, 0.0, window=64, rotary=True).backward < found.backward / 4
    assert predict.attention(chip, rows, 12, 48, 0.0) is None, "nobody counted that"


def test_the_predicted_parts_of_a_micro_batch_are_those_of_the_profile_and_go_with_its_rows():
    chip = predict.CHIPS["H100"]
    one, two = (predict.micro_batch(chip, TOY, "base", "rows", 0.1, rows) for rows in (32, 64))
    assert set(one) == {*training.PARTS, "the rest"}
    for part in one:
        assert one[part] < two[part] <= 2.2 * one[part], part


def test_what_is_far_from_its_prediction_is_listed_and_nothing_else(tmp_path):
    copied = predict.CHIPS["H100"].copied
    for share, listed in ((1.0, []), (0.9, []), (1.2, [1.2]), (0.5, [0.5])):
        kept = Records(tmp_path, TOY)
        kept.machine["chip"] = "NVIDIA H100 80GB HBM3"
        result = {"seconds": 1.0, "bytes_per_second": share * copied}
        kept.measurements["ceilings/copy"] = {"ours": True, "result": result}
        assert [each["ratio"] for _, each in report.surprises(kept)] == pytest.approx(listed)
    assert predict.chip_of("a chip that nobody described", dry=False) is None


def test_a_prediction_needs_no_device():
    """It is made for the page also when the device is out of order; and REAL's is not there at all."""
    for name, result in (("training/base/posts/0.1/minisobert", {}), ("profile/modern-base", {"dropout": 0.0}),
                         ("attention/64/posts/0.0/minisobert", {})):  # fmt: skip
        assert predict.figures(name, replace(REAL, tokens=4_096), "NVIDIA H100 80GB HBM3", result)


def test_loops_are_read_as_they_were_written():
    for path in RESULTS.glob("instructions-*.md"):
        loops = read_loops(path.read_text())
        assert len(loops) >= 20 and all(2 < whole < masked for whole, masked in loops.values()), path.name


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a GPU")
def test_without_a_gpu_it_ends_in_one_line(tmp_path, monkeypatch, capfd):
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, tmp_path)
    assert ended.value.code == 2 and capfd.readouterr().err.count("\n") == 1 and not list(tmp_path.iterdir())


def test_committed_results_change_with_write_alone_which_repeats_nothing(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "plan", lambda *_: [gpu.Measurement("one", lambda: {"seconds": 1.0}, ours=True)])
    monkeypatch.setattr(gpu, "REAL", TOY)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(gpu, "BEGAN", time.monotonic())  # or pytest's own time would count
    monkeypatch.delenv("OUT", raising=False)
    seen = []
    for words in ([], ["--write"]):
        monkeypatch.setattr(sys, "argv", ["benchmarks.gpu", *words])
        assert gpu.main() == 0
        seen.append({str(path.relative_to(tmp_path)) for path in tmp_path.rglob("gpu.*")})
    assert seen[0] == {"runs/gpu/gpu.json", "runs/gpu/gpu.md"}
    assert seen[1] == seen[0] | {"results/gpu/gpu.json", "results/gpu/gpu.md"}
    assert "0 measured, 1 were there already" in capfd.readouterr().out


def test_tests_that_hang_are_ended_with_all_that_they_started(tmp_path, monkeypatch):
    hanging, alive, log = (tmp_path / name for name in ("python", "alive", "tests.log"))
    os.mkfifo(alive)  # reading it ends when no process holds it open
    reader = os.open(alive, os.O_RDONLY | os.O_NONBLOCK)
    hanging.write_text(f"#!/bin/sh\necho GPU: $CUDA_VISIBLE_DEVICES.\nexec 3> '{alive}'\nsleep 60 &\nsleep 60\n")
    hanging.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(hanging))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    for dry, gpus in ((True, "GPU: ."), (False, "GPU: 3.")):
        with pytest.raises(RuntimeError, match=r"tests/gpu did not end within 1 s; see tests.log"):
            gpu.run_tests(log, lambda: 2.0, dry)
        assert log.read_text().strip() == gpus, "a dry run runs nothing on a GPU"
        assert select.select([reader], [], [], 10)[0] and os.read(reader, 1) == b""
    os.close(reader)


def test_plots_are_drawn_before_a_whole_model_is_compiled(tmp_path, monkeypatch):
    """torch's compiler may take any time, so a run that is killed during it must already have its plots."""

    class Killed(BaseException):
        pass

    def measure_peer(*_):
        raise Killed

    monkeypatch.setattr(training, "measure_peer", measure_peer)
    monkeypatch.setattr(gpu, "on_kernels", lambda name: False)
    monkeypatch.setattr(gpu, "run_tests", lambda *_: {"summary": "none"})
    monkeypatch.setattr(gpu, "BEGAN", time.monotonic())  # or pytest's own time would count
    with pytest.raises(Killed):
        call(monkeypatch, tmp_path, "--dry")
    assert {path.name for path in tmp_path.glob("*.png")} == {"rates.png", "step.png", "cost.png"}


def test_what_the_tests_take_to_be_equal_is_part_of_their_fingerprint(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "ROOT", tmp_path)
    path = tmp_path / "tests/against_reference.py"
    path.parent.mkdir()
    seen = set()
    for text in ("2 * eps", "3 * eps"):
        path.write_text(text)
        seen.add(records.fingerprint())
    assert len(seen) == 2


def test_failures_are_told_apart(tmp_path):
    def broken():
        raise RuntimeError("no kernel\nat all")

    def wrong():
        check([torch.ones(4)], [torch.tensor([1.0, 1, 1, math.nan])])

    kept = Records(tmp_path, TOY)
    for name, measure, ours in (("a", broken, True), ("b", broken, False), ("c", wrong, False)):
        gpu.make(gpu.Measurement(name, measure, ours), kept)
    assert kept.failures(ours=False) == {"b": "no kernel at all"}
    assert list(kept.failures(ours=True)) == ["a", "c"], "that two disagree is for us to look into"
    with pytest.raises(Disagreement):
        wrong()


def test_results_are_compared_before_anything_is_timed(monkeypatch):
    monkeypatch.setattr(timing, "TOLERANCE", -1.0)  # nothing agrees
    monkeypatch.setattr(training, "SAME_WEIGHTS", -1.0)
    for module in (timing, rowwise, training):
        monkeypatch.setattr(module, "seconds", lambda *_, **__: pytest.fail("it was timed"))
    for measure, *arguments in (
        (attention.measure, 64, "posts", 0.0, "sdpa-efficient"),
        (rowwise.measure_norm, 64, 0.0, "eager"),
        (rowwise.measure_gelu, 64, "eager"),
        (rowwise.measure_cross_entropy, "eager-fp32"),
        (training.measure, "base", "posts", 0.0, "MegatronBert"),
    ):
        with pytest.raises(Disagreement):
            measure(TOY, *arguments)


def test_attention_counts_its_flops_as_torch_does():
    rows, heads, n, d = shape = (2, 3, 128, 64)
    work = attention.flops(rows * n * n, heads, d)
    assert work == sdpa_flop_count(shape, shape, shape)
    assert work * attention.BACKWARD == sdpa_backward_flop_count(shape, shape, shape, shape)


def test_the_products_are_those_of_a_model():
    config, *_ = TOY.models["base"]
    batch = TOY.micro_batch("posts", 1_024, seed=0)
    assert 0.1 < len(batch.masked) / batch.real_tokens < 0.2
    with FlopCounterMode(display=False) as counter:
        training.our_losses(training.new_model(config, TOY.device), batch, None)
    flops = {name: 2 * m * n * k for name, (m, n, k) in rowwise.products(config, 1_024, len(batch.masked)).items()}
    counted = counter.get_flop_counts()["Global"].items()
    products = sum(n for operation, n in counted if "attention" not in str(operation))
    head = flops.pop("decoder") + 2 * len(batch.masked) * config.hidden**2
    assert products == config.layers * sum(flops.values()) + head


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_bytes_are_those_of_the_tensors(dropout):
    width = 64
    result = rowwise.measure_norm(TOY, width, dropout, "minisobert")
    matrix = torch.empty(TOY.tokens, width, dtype=DTYPE).nbytes
    branch, residual, new_residual, normal = [matrix] * 4
    read, written = new_residual + normal + residual, residual + branch * (dropout > 0)  # all gradients except residual
    moved = {d: result[f"{d}_bytes_per_second"] * result[f"{d}_seconds"] for d in ("forward", "backward")}
    assert moved == pytest.approx({"forward": branch + residual + new_residual + normal, "backward": read + written})


def test_goals_are_met_from_their_own_side():
    assert [Goal("", 350, 420, x).met() for x in (None, 349, 350, 421)] == ["", "no", "goal", "reach"]
    assert [Goal("", 47, 37, x, at_most=True).met() for x in (48, 40, 37)] == ["no", "goal", "reach"]


def test_lengths_are_drawn_as_they_were_counted():
    about = json.loads(lengths.HISTOGRAM.read_text())
    first, last, counts = np.array(about["buckets"]).T
    assert (first <= last).all() and (last[:-1] < first[1:]).all() and (first[0], last[-1]) >= (3, 2_048)
    assert counts.sum() == about["pieces"] >= about["documents"]
    drawn = lengths.draw(200_000, seed=0)
    assert drawn.mean() == pytest.approx(about["mean"], rel=0.02)
    assert (drawn.astype(float) ** 2).mean() == pytest.approx(about["mean_square"], rel=0.03)
    assert np.percentile(drawn, 50) == pytest.approx(about["p50"], rel=0.05)
    assert lengths.histogram(np.repeat(first, counts)) == about["buckets"]


def test_posts_fill_their_rows_and_rows_are_a_document_each():
    posts, rows = (TOY.micro_batch(lengths, 64 * TOY.row_tokens, seed=0) for lengths in LENGTHS[::-1])
    assert len(posts.tokens) == len(rows.tokens) == 64 * TOY.row_tokens
    assert 0.98 < posts.real_tokens / len(posts.tokens) <= 1, "the rest is padding"
    assert rows.documents.bounds.diff().tolist() == [TOY.row_tokens] * 64 and rows.real_tokens == len(rows.tokens)
    assert rows.lengths.tolist() == [TOY.row_tokens] * 64
