"""The folder of a run: config.json, metrics.jsonl, the tokenizer and checkpoints/, and where the run in it resumes."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from minisobert.cli import flag, reason, words
from minisobert.config import ModelConfig, TrainConfig
from minisobert.corpus.shards import Shards
from minisobert.corpus.tokenizer import Tokenizer, open_tokenizer, tokenizer_files
from minisobert.corpus.tokenizer_json import JsonTokenizer
from minisobert.files import (
    locked,
    make_folder,
    read_json_lines,
    read_safetensors,
    sha256,
    write_json,
    write_whole,
)
from minisobert.model import MaskedLM
from minisobert.ops.dropout import MASKS
from minisobert.parallel.mesh import Mesh, from_torchrun
from minisobert.training import checkpoint, events, meter
from minisobert.training.optimizer import Optimizer

METRICS = {"step", "positions", "loss"}  # keys that each line of metrics.jsonl has at least
CLAIM = 10.0  # seconds to wait for another job to leave the folder
T = TypeVar("T")


@dataclass
class Progress:
    """The counters of a run, all saved."""

    step: int = 0
    consumed_tokens: int = 0  # row positions read: the place in the data
    schedule_tokens: int = 0  # row positions trained on: the place in the schedule; a skipped step adds nothing
    real_tokens: int = 0  # consumed tokens that are not padding
    seconds: float = 0.0  # spent in training steps
    skipped: int = 0  # steps whose gradient was not finite
    skipped_in_a_row: int = 0
    loss: float | None = None  # of the last step


class Run:
    """A run and its folder. Until `claimed`, the folder is only read."""

    def __init__(self, config: TrainConfig, model_config: ModelConfig, shards: Shards, init: Trained | None = None):
        """init: the model that the run begins with, if not a random one. Raises ValueError if nothing can be written to
        the folder, or if it holds a run with another config or on other data."""
        self.config, self.model_config, self.shards, self.init = config, model_config, shards, init
        self.folder = Path(config.out)
        settings = dataclasses.asdict(config)
        layout = {name: settings.pop(name) for name in config.resumable_fields()}
        self.identity = {"train": settings, "model": dataclasses.asdict(model_config), "data": shards.fingerprint}
        if config.dropout:
            self.identity["masks"] = MASKS
        if init:
            self.identity["init"] = init.identity()
        tokenizer = shards.meta["files"][shards.tokenizer_file.name]["sha256"]
        corpus = {name: value for name, value in shards.meta.items() if name != "files"}
        self.described = {**self.identity, "layout": layout, "tokenizer": tokenizer, "corpus": corpus}
        self.fresh = config.fresh
        self._unwritten = b""  # lines of metrics.jsonl that are not written yet
        self._events: events.Events | None = None
        if config.tensorboard:
            events.check()
        for folder in (self.folder, self.folder / "checkpoints"):
            _check_writable(folder)
        if self.folder.exists() and self.folder.samefile(shards.folder):
            raise ValueError(f"--out: {self.folder} is the folder of --data; choose another, which may be inside it")
        self._look()

    def _look(self) -> None:
        saved = checkpoint.steps(self.folder / "checkpoints")
        self.resumes_from = saved[-1] if saved else None
        if self.resumes_from and not self.fresh:
            self._refuse_another(self._identity_of(self.resumes_from))

    def _identity_of(self, path: Path) -> dict:
        """The identity of the run that made a checkpoint. A field that is newer than it gets its default."""
        run = checkpoint.read_state(path)["run"]
        if not run:
            raise ValueError(
                f"{self.folder} holds an imported model; give it as --init and choose another folder as --out"
            )
        defaults = dataclasses.asdict(TrainConfig(preset=run["train"]["preset"]))
        run["train"] = {**{name: defaults[name] for name in self.identity["train"]}, **run["train"]}
        if run["train"]["dropout"]:
            run.setdefault("masks", 1)
        run["model"] = {**{f.name: f.default for f in dataclasses.fields(ModelConfig)}, **run.get("model", {})}
        return run

    def _is_ours(self) -> bool:
        """Whether the last checkpoint is of this very run."""
        try:
            return self.resumes_from is not None and self._identity_of(self.resumes_from) == self.identity
        except ValueError:  # damaged
            return False

    def _refuse_another(self, before: dict) -> None:
        here = f"{self.folder} holds a run"
        otherwise = "choose another --out, or --fresh to discard that run"
        for name, value in self.identity["train"].items():
            if (old := before["train"][name]) != value:
                raise ValueError(f"{here} with {flag(name)} {old}, not {value}; give the same, {otherwise}")
        if before.get("init") != self.identity.get("init"):
            raise ValueError(f"{here} that began with other weights than those of --init; give the same, {otherwise}")
        if before.get("masks") != self.identity.get("masks"):
            raise ValueError(
                f"{here} that began with the dropout masks of version 0.1.0 and cannot be resumed; to continue it, "
                f"give it to a new run as --init, or {otherwise}"
            )
        if before.get("data") != self.identity["data"]:
            raise ValueError(f"{here} on other data than {self.config.data}; give the same --data, {otherwise}")
        if before != self.identity:
            raise ValueError(f"{here} by another version of minisobert; {otherwise}")

    @contextmanager
    def claimed(self, mesh: Mesh) -> Iterator[None]:
        """Creates the folder and keeps other jobs out. Called by all ranks; raises ValueError if another job is in it.

        Rank 0 holds the lock. It waits for a job that is ending, as the previous one is when torchrun restarts a job.
        """
        with ExitStack() as lock:
            self._on_first(mesh, partial(self._claim, lock))
            try:
                yield
            finally:
                if self._events:
                    self._events.close()

    def _claim(self, lock: ExitStack) -> None:
        make_folder(self.folder)
        until = time.monotonic() + CLAIM
        while True:
            try:
                lock.enter_context(locked(self.folder / ".lock", self.folder))
                break
            except ValueError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.2)
        self._look()  # again: the previous holder of the lock may have saved

    def _on_first(self, mesh: Mesh, function: Callable[[], T]) -> T | None:
        """Calls function on rank 0 and returns its result there. If it fails, all ranks raise ValueError, but only that
        of rank 0 has a message."""
        result = error = None
        if mesh.is_first:
            try:
                result = function()
            except OSError as its:
                its.filename = its.filename or str(self.folder)  # the error of a full disk names no file
                error = ValueError(reason(its))
            except ValueError as its:
                error = its
        if mesh.sum_on_hosts([int(error is not None)])[0]:
            raise error or ValueError
        return result

    def restore(self, optimizer: Optimizer, mesh: Mesh) -> Progress:
        """Restores weights and moments from the last checkpoint, if there is one, and returns the counters. Raises
        ValueError if it is damaged.

        Rank 0 decides which it is: other ranks may see a folder on a network later.
        """
        # after a restart by torchrun, the folder holds this job's own work, which --fresh must not discard (not every
        # machine's agent counts restarts)
        restarted = mesh.sum_on_hosts([from_torchrun("TORCHELASTIC_RESTART_COUNT", 0)])[0] > 0
        self.fresh &= not (restarted and self._is_ours())
        (step,) = mesh.sum_on_hosts([self._on_first(mesh, self._checked_step) or 0])
        if not step:
            return Progress()
        path = checkpoint.path_of(self.folder / "checkpoints", step)
        progress = _progress(path)
        optimizer.restore(checkpoint.read(path), progress.step - progress.skipped)
        return progress

    def _checked_step(self) -> int:
        """The step of the checkpoint to resume from, or 0. Raises ValueError if the checkpoint is damaged."""
        if not self.resumes_from or self.fresh:
            return 0
        checkpoint.verify(self.resumes_from)
        _progress(self.resumes_from)
        if "checksum" not in checkpoint.read_state(self.resumes_from):
            state = self.resumes_from / "state.json"
            print(f"{state} has no checksum of its own (version 0.1.0); its counters are not checked", file=sys.stderr)
        return checkpoint.step_of(self.resumes_from)

    def begin(self, step: int, mesh: Mesh) -> None:
        """Prepares the folder for the steps after `step`. Called by all ranks; if it fails, it fails on all."""
        self._on_first(mesh, partial(self._begin, step))

    def _begin(self, step: int) -> None:
        if self.fresh:
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        # if a process was killed after its last checkpoint got its name and before older ones were removed, no save
        # will remove them
        checkpoint.tidy(self.folder / "checkpoints", self.config.keep_checkpoints)
        metrics, lines = self.folder / "metrics.jsonl", []
        if metrics.exists():  # the steps after the checkpoint are about to be repeated
            lines = [_finite(line) for line in read_json_lines(metrics, METRICS) if line["step"] <= step]
            write_whole(metrics, b"".join(map(_line, lines)))
        if self.config.tensorboard:
            self._events = events.Events(self.folder / "tensorboard")
            seconds = meter.elapsed(lines)
            for line, since in zip(lines, seconds):  # as if the run had not been interrupted
                self._show(line, seconds[-1] - since)
        write_json(self.folder / "config.json", self.described)
        tokenizer = self.shards.tokenizer_file
        write_whole(self.folder / tokenizer.name, tokenizer.read_bytes())

    def _show(self, line: dict, ago: float = 0.0) -> None:
        """Sends a line of metrics.jsonl to TensorBoard. ago: seconds since then; 0 is used if that is not finite."""
        figures = {name: value for name, value in line.items() if name not in ("step", "positions")}
        self._events.add(figures, line["positions"], ago if math.isfinite(ago) else 0.0)

    def log(self, line: dict) -> None:
        """Appends one step's figures to metrics.jsonl. If that fails, training continues; the next call tries again."""
        if self._events:
            self._show(_finite(line))
        failed_before, self._unwritten = bool(self._unwritten), self._unwritten + _line(line)
        try:
            self._append()
        except OSError as error:
            if not failed_before:
                print(
                    f"{self.folder / 'metrics.jsonl'}: {error.strerror}; training continues, and the lines from step "
                    f"{line['step']:,} on will be written when that is possible",
                    file=sys.stderr,
                )

    def _append(self, flush: bool = False) -> None:
        """Appends to metrics.jsonl all lines that are not there yet, or none of them. Raises OSError."""
        with open(self.folder / "metrics.jsonl", "ab", buffering=0) as file:
            end, left = file.tell(), self._unwritten
            try:
                while left:
                    left = left[file.write(left) :]
            except OSError:
                file.truncate(end)  # no half lines
                raise
            self._unwritten = b""
            if flush:
                os.fsync(file.fileno())

    def save(
        self, saver: checkpoint.Saver, optimizer: Optimizer, progress: Progress, validation_loss: float | None
    ) -> None:
        """Begins to write a checkpoint. Called by all ranks."""
        state = {
            "progress": _finite(dataclasses.asdict(progress)),
            "run": self.identity,
            **_finite({"validation_loss": validation_loss}),
        }
        # a run that resumes from a checkpoint does not repeat the lines before it: they must be on the disk first
        lines = partial(self._append, flush=True)
        saver.start(progress.step, optimizer.whole_shapes(), optimizer.slices(), state, before=lines)


def _check_writable(folder: Path) -> None:
    """Raises ValueError if the folder cannot be created, or cannot be written to."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.exists():
        raise ValueError(f"--out: {there} is a link to {there.readlink()}, which does not exist; choose another")
    if not there.is_dir():
        raise ValueError(f"--out: {there} is a file; choose a folder")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"--out: nothing can be written in {there}; choose another folder or change its permissions")


def _progress(path: Path) -> Progress:
    try:
        progress = Progress(**checkpoint.read_state(path)["progress"])
    except TypeError as error:  # for a state without a checksum
        raise checkpoint.damaged(path / "state.json", str(error)) from None
    progress.loss = math.nan if progress.loss is None else progress.loss
    return progress


def _finite(line: dict) -> dict:
    """The line with None in place of NaN and infinity, which JSON does not have."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}


def _line(line: dict) -> bytes:
    return json.dumps(_finite(line), allow_nan=False).encode() + b"\n"


def read_metrics(run: str | Path) -> list[dict]:
    """The lines of a run's metrics.jsonl; figures that were not finite are None. Raises ValueError if it has none."""
    path = Path(run) / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(f"{run} holds no run (no metrics.jsonl); give the --out of train.py")
    lines = read_json_lines(path, METRICS)
    if not lines:
        raise ValueError(f"{path} is empty: the run has made no step yet")
    return [_finite(line) for line in lines]


@dataclass(frozen=True)
class Trained:
    model: MaskedLM  # in fp32 on the CPU
    tokenizer: Tokenizer | JsonTokenizer
    history: list[dict]  # where the weights come from: an entry for each run, and for an import

    def identity(self) -> dict:
        """Identifies the weights that a run begins with."""
        digest = hashlib.sha256()
        for name, parameter in self.model.named_parameters():
            digest.update(name.encode() + parameter.detach().numpy().tobytes())
        return {"weights": digest.hexdigest(), "history": self.history}


def checkpoint_of(run: str | Path, which: str = "last") -> Path:
    """A checkpoint of a run. which: "last", "best" (the lowest validation loss) or "step-N". Raises ValueError if the
    run has no such checkpoint."""
    folder = Path(run) / "checkpoints"
    saved = checkpoint.steps(folder)
    if not saved:
        raise ValueError(f"{run} holds no checkpoint; give the --out of a run of train.py that has saved one")
    named = {f"step-{checkpoint.step_of(path)}": path for path in saved} | {"last": saved[-1]}
    if best := checkpoint.best(folder):
        named["best"] = best
    if which not in named:
        why = " (none was evaluated)" if which == "best" else ""
        raise ValueError(f"{run} has no checkpoint {which!r}{why}; choose {words(named)}")
    return named[which]


def open_run(run: str | Path, path: Path | None = None) -> Trained:
    """The model of a run's checkpoint, by default the last, in fp32 on the CPU. Raises ValueError if there is none, or
    if the tokenizer in the run's folder is another model's."""
    run = Path(run)
    path = path or checkpoint_of(run)
    try:
        described = json.loads((run / "config.json").read_text())
        model_config, checksum = ModelConfig(**described["model"]), described["tokenizer"]
        history = described.get("init", {}).get("history", [])
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{run / 'config.json'} is damaged ({reason(error)}); train.py writes it again") from None
    tokenizer = tokenizer_files(run)[0]
    if sha256(tokenizer) != checksum:
        raise ValueError(f"{tokenizer} is the tokenizer of another model; put that of the run's --data there")
    model = MaskedLM(model_config)
    checkpoint.verify(path)
    model.load_state_dict(read_safetensors(path / "model.safetensors"))
    if (progress := checkpoint.read_state(path)["progress"])["step"]:
        history = [*history, {"run": run.resolve().name, "row positions": progress["consumed_tokens"]}]
    return Trained(model.eval(), open_tokenizer(tokenizer), history)
