"""The disk gets full at any moment, or loses what was not flushed when its power is cut: nothing else is lost, and the
same command ends with the same bits."""

from __future__ import annotations

import builtins
import errno
import os
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

import train
from minisobert.config import PRESETS, ModelConfig
from minisobert.training import checkpoint
from tests.disks import Disk, FullDisk, restore, states
from tests.runs import metrics, words

TIMED = {"tokens_per_second", "dollars"}
ROW = 64
STEPS = 4


@pytest.fixture(autouse=True)
def minute_model(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", ModelConfig(layers=1, hidden=8, heads=2, ffn=8))


def command(corpus, out: Path) -> list[str]:
    """A command that makes checkpoints after steps 2 and 4, and keeps one."""
    return words(corpus, out, row_tokens=ROW, tokens_per_batch=2 * ROW, train_tokens=STEPS * 2 * ROW, eval_rows=1,
                 micro_batch_rows=2, checkpoint_every_tokens=4 * ROW, keep_checkpoints=1)  # fmt: skip


def content(out: Path) -> dict[str, object]:
    """The contents of a run's folder, without times."""
    lines = [{name: value for name, value in line.items() if name not in TIMED} for line in metrics(out)]
    found = {path: path.read_bytes() if path.is_file() else b"" for path in out.rglob("*")}
    (last,) = checkpoint.steps(out / "checkpoints")
    checkpoint.verify(last)
    return found | {out / "metrics.jsonl": lines, last / "state.json": b""}


def last_step(names: set[str]) -> int:
    """The step of the last checkpoint whose name was flushed; this checkpoint must be found again."""
    return max((int(name[-8:]) for name in names if re.fullmatch(r"step-\d{8}", name)), default=0)


@pytest.mark.slow
@pytest.mark.parametrize("resumed", [False, True])
def test_whatever_was_not_flushed_is_lost_and_the_run_goes_on_from_its_last_checkpoint(
    corpus, tmp_path, monkeypatch, capsys, resumed
):
    out = tmp_path / "disk" / "runs" / "run"
    if resumed:
        assert train.main([*command(corpus, out), "--keep-checkpoints", "2"]) == 0
        shutil.rmtree(out / "checkpoints" / "step-00000004")
    (tmp_path / "disk").mkdir(exist_ok=True)
    with monkeypatch.context() as patch:
        disk = Disk(tmp_path / "disk", patch)
        assert train.main(command(corpus, out)) == 0
    expected = content(out)
    found = list(states(disk, last_step))
    disk.close()
    began = Counter()
    for state, step in found:
        restore(tmp_path / "disk", state)
        capsys.readouterr()
        assert train.main(command(corpus, out)) == 0
        said = re.search(r"continuing after step (\d)", capsys.readouterr().out)
        began[int(said[1]) if said else 0] += 1
        assert step <= (int(said[1]) if said else 0), state.keys()
        assert content(out) == expected
    assert set(began) == ({2, 4} if resumed else {0, 2, 4}) and sum(began.values()) > 20, began


def status(argv: list[str]) -> int:
    try:
        return train.main(argv)
    except SystemExit as left:
        return left.code


def check_one_line(capsys, number: int) -> None:
    error = capsys.readouterr().err
    assert number in (1, 2) and "Traceback" not in error
    (line,) = [line for line in error.splitlines() if line.startswith("train.py: ")]
    assert "No space left on device" in line or "File too large" in line


@pytest.mark.slow
def test_a_disk_that_is_full_from_any_write_on_ends_the_run_and_with_room_it_goes_on(
    corpus, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        disk = FullDisk(float("inf"), 0, out, patch)
        assert train.main(command(corpus, out)) == 0
    expected, kinds = content(out), disk.kinds
    # of the many tensors in a row, the first and a few others
    places = [n for n, kind in enumerate(kinds, 1) if kind != "pwrite" or kinds[n - 2] != kind or n % 29 == 0]
    assert len(places) > 30 and {kinds[n - 1] for n in places} == {"open", "pwrite", "mkdir", "replace"}
    for n in places:
        shutil.rmtree(out)
        capsys.readouterr()
        saved, lines = [], []

        def look(saved=saved, lines=lines):
            saved += checkpoint.steps(out / "checkpoints")
            lines += [(out / "metrics.jsonl").read_bytes()] if saved else []

        with monkeypatch.context() as patch:
            disk = FullDisk(n, n % 2 * 100, out, patch, look)
            number = status(command(corpus, out))
        disk.make_room()
        check_one_line(capsys, number)
        for path in checkpoint.steps(out / "checkpoints"):
            checkpoint.verify(path)
        assert saved[-1:] <= checkpoint.steps(out / "checkpoints")[-1:]
        if saved:
            assert (out / "metrics.jsonl").read_bytes().startswith(*lines)
        assert train.main(command(corpus, out)) == 0
        assert content(out) == expected, (n, kinds[n - 1])


def test_a_line_that_cannot_be_written_keeps_the_checkpoint_after_it_from_being_made(
    corpus, tmp_path, monkeypatch, capsys
):
    """Otherwise the line would never be written."""
    out = tmp_path / "run"
    assert train.main(command(corpus, out)) == 0
    expected = content(out)
    shutil.rmtree(out)
    write = open

    def full(path, *mode, **more):
        if mode == ("ab",) and (out / "checkpoints").exists():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, *mode, **more)

    with monkeypatch.context() as patch:
        patch.setattr(builtins, "open", full)
        assert train.main(command(corpus, out)) == 1
    said = capsys.readouterr().err
    assert said.count("the lines from step 3 on will be written when that is possible") == 1
    assert "step-00000004 could not be written: [Errno 28] No space left on device; repeat the command" in said
    assert train.main(command(corpus, out)) == 0
    assert content(out) == expected


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a small disk")
def test_a_small_disk_that_is_full_and_made_larger(corpus, tmp_path, capsys):
    disk = tmp_path / "disk"
    disk.mkdir()
    out = disk / "run"
    assert train.main(command(corpus, out)) == 0
    expected = content(out)
    statuses = {}
    for size in (8, 28, 60, 200, 300, 400, 500, 1_000):  # KB; a checkpoint has 250, and there are two for a moment
        shutil.rmtree(out)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={size}k", "tmpfs", disk]
        if subprocess.run(mount, capture_output=True).returncode:
            pytest.skip("no small disk can be mounted here")
        try:
            capsys.readouterr()
            statuses[size] = status(command(corpus, out))
            if statuses[size]:
                check_one_line(capsys, statuses[size])
            subprocess.run(["mount", "-o", "remount,size=8m", disk], check=True)
            assert train.main(command(corpus, out)) == 0
            assert content(out) == expected, size
        finally:
            subprocess.run(["umount", disk], check=True)
        out.mkdir()
    assert statuses[8] == 2 and {statuses[size] for size in (60, 200, 300, 400, 500)} == {1} and statuses[1_000] == 0
