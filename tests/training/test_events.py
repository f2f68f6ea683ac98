"""TensorBoard's files hold what metrics.jsonl holds, with each step once, however often a run was interrupted."""

from __future__ import annotations

import json
import math
import shutil
import sys
import time
from pathlib import Path

import pytest

import finetune
import train
from minisobert.config import PRESETS
from minisobert.training import checkpoint, events
from tests.finetuning import test_finetune as tuning
from tests.runs import BATCH, finish, make_small, metrics, start, words
from tests.training.test_run import files_up_to

pytest.importorskip("tensorboard")
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader


def read(folder: Path) -> list[tuple[int, dict]]:
    """(step, {tag: value}) of all records in the folder's files, in order. Asserts that TensorBoard reads the same."""
    found = []
    for path in folder.iterdir():
        for event in LegacyEventFileLoader(str(path)).Load():
            if event.summary.value:
                found.append((event.step, {value.tag: value.simple_value for value in event.summary.value}))
    board = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    board.Reload()
    for tag in board.Tags()["scalars"]:
        theirs = {each.step: each.value for each in board.Scalars(tag)}
        ours = {step: values[tag] for step, values in found if tag in values}
        assert theirs == pytest.approx(ours, nan_ok=True)
    return found


def check(out: Path) -> None:
    """Asserts that steps are row positions, and that the figures are those of metrics.jsonl."""
    lines = metrics(out)
    for (step, values), line in zip(read(out / "tensorboard"), lines, strict=True):
        assert step == line["positions"]
        expected = {name: value for name, value in line.items() if name not in ("step", "positions")}
        assert values == pytest.approx(expected, rel=1e-6)
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))


@pytest.fixture
def small(monkeypatch):
    make_small(monkeypatch.setitem)


@pytest.mark.slow
def test_a_run_that_was_killed_and_goes_on_with_two_processes_has_each_step_once(corpus, tmp_path, small):
    out, log = tmp_path / "run", tmp_path / "log"
    argv = words(corpus, out, 40, checkpoint_every_tokens=4 * BATCH, tensorboard=True, micro_batch_rows=2)
    (process,) = start(argv, log)
    until = time.monotonic() + 120
    while not (checkpoint.steps(out / "checkpoints") and len(metrics(out)) % 4 == 3):  # some steps will be lost
        assert process.is_alive() and time.monotonic() < until, log.read_text()
        time.sleep(0.001)
    process.kill()
    process.join()
    last = checkpoint.step_of(checkpoint.steps(out / "checkpoints")[-1])
    assert last < len(read(out / "tensorboard")) < 40
    assert finish(start(argv, log, ranks=2)) == [0, 0], log.read_text()
    assert f"continuing after step {last}" in log.read_text()
    check(out)
    assert len(list((out / "tensorboard").iterdir())) == 1


def test_it_may_be_asked_for_when_a_run_is_half_done(corpus, tmp_path, small):
    out, options = tmp_path / "run", {"steps": 6, "checkpoint_every_tokens": 2 * BATCH, "eval_every_tokens": 2 * BATCH}
    assert train.main(words(corpus, out, **options)) == 0
    assert not (out / "tensorboard").exists()
    shutil.rmtree(out / "checkpoints" / "step-00000006")
    assert train.main(words(corpus, out, tensorboard=True, **options)) == 0
    check(out)
    assert sum("validation_loss" in values for _, values in read(out / "tensorboard")) == 3
    (path,) = (out / "tensorboard").iterdir()
    times = [event.wall_time for event in LegacyEventFileLoader(str(path)).Load() if event.summary.value]
    assert times == sorted(times) and 0 < time.time() - times[0] < 60


def test_what_is_not_finite_is_nan_and_a_full_disk_ends_the_file_and_not_the_run(tmp_path, capsys):
    board = events.Events(tmp_path / "board")
    board.add({"loss": None, "lr": 0.5}, 10)
    with files_up_to(board.path.stat().st_size + 10):
        board.add({"loss": 1.0}, 20)
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "File too large; training continues without it, and the next start" in said
    board.add({"loss": 2.0}, 30)
    board.close()
    ((step, values),) = read(tmp_path / "board")
    assert step == 10 and math.isnan(values["loss"]) and values["lr"] == 0.5 and capsys.readouterr().err == ""
    again = events.Events(tmp_path / "board")
    again.close()
    assert read(tmp_path / "board") == []


def test_fine_tuning_has_a_curve_for_each_seed(corpus, tmp_path, monkeypatch):
    tuning.read_toys(monkeypatch)
    monkeypatch.setitem(PRESETS, "tiny", tuning.SMALL)
    options = {"tokenizer": corpus.tokenizer_file, "seeds": 2, "epochs": 2, "tensorboard": True}
    found = tuning.run("quality", tmp_path / "out", **options)
    for seed in found["seeds"]:
        written = read(tmp_path / "out" / "tensorboard" / f"seed-{seed['seed']}")
        expected = [(line.pop("epoch"), line) for line in map(dict, seed["epochs"])]
        assert [step for step, _ in written] == [step for step, _ in expected] == [1, 2]
        for (_, values), (_, line) in zip(written, expected):
            assert values == pytest.approx(line, rel=1e-6)
    assert "tensorboard" not in (tmp_path / "out" / "report.md").read_text()
    assert json.loads((tmp_path / "out" / "metrics.json").read_text()) == found


def test_without_the_extra_both_scripts_say_so_before_anything_is_written(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for main, argv in (
        (train.main, words(corpus, tmp_path / "run", tensorboard=True)),
        (
            finetune.main,
            ["--task", "quality", "--model", "tfidf", "--data", "toy", "--out", str(tmp_path / "out"), "--tensorboard"],
        ),
    ):
        with pytest.raises(SystemExit) as left:
            main(argv)
        error = capsys.readouterr().err
        assert left.value.code == 2 and error.count("\n") == 1
        assert error.endswith("--tensorboard needs tensorboard: pip install 'minisobert[tensorboard]'\n")
    assert list(tmp_path.iterdir()) == []
