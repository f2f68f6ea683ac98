"""The folder of a run: what is accepted from an earlier run, and what a damaged line or a full disk costs."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import resource
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest

from minisobert.config import TrainConfig
from minisobert.parallel.mesh import Mesh
from minisobert.training import checkpoint
from minisobert.training.run import Progress, Run, read_metrics


@pytest.fixture
def make_run(corpus, tmp_path):
    def make(**options) -> Run:
        config = TrainConfig(**{"data": str(corpus.folder), "preset": "tiny", "out": str(tmp_path / "run"), **options})
        return Run(config, config.model_config(corpus.vocab_size), corpus)

    return make


def save(folder: Path, identity: dict, step: int = 2) -> None:
    """Writes the state of a checkpoint, which is all that is read before it is loaded."""
    path = checkpoint.path_of(folder / "checkpoints", step)
    path.mkdir(parents=True)
    state = {"progress": dataclasses.asdict(Progress(step)), "run": identity, "validation_loss": None, "sha256": {}}
    checkpoint.write_state(path, state)


def test_what_a_kill_left_beside_the_last_checkpoint_is_removed_at_the_next_start(make_run):
    """A run that has ended makes no further checkpoint, which would remove it."""
    run = make_run()
    for step in (1, 2, 3):
        save(run.folder, run.identity, step)
    folder = run.folder / "checkpoints"
    (folder / ".unfinished-step-00000001").mkdir()
    (folder / ".unfinished-step-00000001" / "state.json").write_text("")
    (folder / "mine").mkdir()
    begin(make_run(), 3)
    assert sorted(path.name for path in folder.iterdir()) == ["mine", "step-00000002", "step-00000003"]


def begin(run: Run, step: int = 0) -> None:
    with run.claimed(Mesh()):
        run.begin(step, Mesh())


def line(step: int, **figures) -> dict:
    return {"step": step, "positions": 100 * step, "loss": 5.0, **figures}


def test_a_run_from_before_an_option_existed_goes_on_as_with_its_default(make_run):
    run = make_run()
    before = {name: value for name, value in run.identity["train"].items() if name != "row_tokens"}
    model = {name: value for name, value in run.identity["model"].items() if name != "norm_eps"}
    save(run.folder, {**run.identity, "train": before, "model": model})
    assert make_run().resumes_from.name == "step-00000002"
    with pytest.raises(ValueError, match="holds a run with --row-tokens 2048, not 1024; give the same"):
        make_run(row_tokens=1024)


def test_a_run_with_an_option_that_this_version_does_not_know_is_refused(make_run):
    run = make_run()
    save(run.folder, {**run.identity, "train": {**run.identity["train"], "mixup": 0.5}})
    with pytest.raises(ValueError, match="holds a run by another version of minisobert"):
        make_run()


def test_a_run_whose_masks_were_made_in_another_way_is_refused_and_one_without_dropout_goes_on(make_run):
    run = make_run(dropout=0.1)
    before = {name: value for name, value in run.identity.items() if name != "masks"}  # as version 0.1.0 wrote it
    save(run.folder, before)
    with pytest.raises(
        ValueError, match=r"dropout masks of version 0.1.0 .* give it to a new run as --init, or choose another --out"
    ):
        make_run(dropout=0.1)
    shutil.rmtree(run.folder / "checkpoints")
    save(run.folder, {**before, "train": {**before["train"], "dropout": 0.0}})
    assert make_run(dropout=0.0).resumes_from


def test_metrics_hold_null_where_a_figure_is_not_finite(make_run):
    run = make_run()
    begin(run)
    run.log(line(1, grad_norm=math.inf) | {"loss": math.nan})
    text = (run.folder / "metrics.jsonl").read_text()
    assert json.loads(text, parse_constant=pytest.fail) == line(1, grad_norm=None) | {"loss": None}
    assert read_metrics(run.folder) == [json.loads(text)]


DAMAGED = b'{"step": 2, "positions": 200, "loss": 5.0, "lr": }\n{"step": 3, "posi}\n\xff\xfe\n[1, 2]\n{"step": 4}\n'


def test_a_damaged_line_of_metrics_costs_that_line_and_is_said(make_run, capsys):
    run = make_run()
    begin(run)
    path = run.folder / "metrics.jsonl"
    whole = [json.dumps(line(step)).encode() + b"\n" for step in range(9)]
    path.write_bytes(whole[1] + DAMAGED + whole[5] + whole[6] + whole[7][:-10])
    for read in (lambda: read_metrics(run.folder), lambda: begin(run, 5)):
        steps = [each["step"] for each in read() or []]
        assert steps in ([1, 5, 6], [])
        assert capsys.readouterr().err == f"{path}: line 2 and 5 more are damaged and left out\n"
    assert path.read_bytes() == whole[1] + whole[5]


def test_infinity_in_metrics_of_the_version_before_is_read(make_run):
    run = make_run()
    begin(run)
    (run.folder / "metrics.jsonl").write_text('{"step": 1, "positions": 9, "loss": NaN, "grad_norm": Infinity}\n')
    assert read_metrics(run.folder) == [{"step": 1, "positions": 9, "loss": None, "grad_norm": None}]
    begin(run, 1)
    assert json.loads((run.folder / "metrics.jsonl").read_text(), parse_constant=pytest.fail)["loss"] is None


@contextmanager
def files_up_to(size: int):
    """Limits files to so many bytes. Writing more is an OSError in the middle of a write, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_at_the_start_is_named_by_the_folder(make_run):
    run = make_run()
    with pytest.raises(ValueError, match=f"^{re.escape(str(run.folder))}: File too large$"), files_up_to(100):
        begin(run)


def test_lines_that_a_full_disk_does_not_take_are_written_when_there_is_room(make_run, capsys):
    run = make_run()
    begin(run)
    path = run.folder / "metrics.jsonl"
    run.log(line(1))
    with files_up_to(path.stat().st_size + 10):  # ten bytes of the next line
        run.log(line(2))
        run.log(line(3))
    assert read_metrics(run.folder) == [line(1)]
    said = capsys.readouterr().err
    assert said.startswith(f"{path}: File too large; training continues, and the lines from step 2 on will be written")
    assert said.count("\n") == 1
    run.log(line(4))
    assert read_metrics(run.folder) == [line(step) for step in (1, 2, 3, 4)] and capsys.readouterr().err == ""


def test_a_folder_that_cannot_be_written_to_is_refused_before_work_begins(make_run, tmp_path, monkeypatch, corpus):
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "gone")
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "checkpoints").write_text("")
    (tmp_path / "shards").symlink_to(corpus.folder)
    before = sorted(tmp_path.rglob("*"))
    for out, message in (
        ("file", "file is a file; choose a folder"),
        ("file/run", "file is a file; choose a folder"),
        ("dangling", "dangling is a link to .*gone, which does not exist"),
        ("dangling/run", "dangling is a link to .*gone, which does not exist"),
        ("half", "checkpoints is a file; choose a folder"),
        ("shards", "shards is the folder of --data; choose another, which may be inside it"),
    ):
        with pytest.raises(ValueError, match=f"^--out: .*{message}"):
            make_run(out=str(tmp_path / out))
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path)  # since root may write anywhere
    with pytest.raises(ValueError, match=f"^--out: nothing can be written in {tmp_path}; choose"):
        make_run(out=str(tmp_path / "new" / "run"))
    monkeypatch.undo()
    assert sorted(tmp_path.rglob("*")) == before
    for out in (corpus.folder / "run", tmp_path / "new" / "run", tmp_path / "half" / "run"):
        make_run(out=str(out))
