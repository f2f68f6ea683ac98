"""Checkpoints: folders that appear whole or not at all.

    step-00001000/
        model.safetensors       the fp32 weights, whole, under the model's own names
        optimizer.safetensors   Adam's moments, under the same names
        state.json              config, counters, sha256 of the two files, and of itself

Every rank writes what it owns into the one file of each kind, so that a checkpoint does not show which layout made it.
It is written in the background, beside its final name, flushed to disk, and renamed; older ones are removed after that.
Nothing is pickled. With several machines the folder must be on storage that all of them see.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from minisobert.cli import reason
from minisobert.files import flush, make_folder, read_safetensors, safetensors_header, sha256
from minisobert.parallel.mesh import KnownToAll, Mesh

FILES = ("model", "optimizer")
UNFINISHED = ".unfinished-"
CHECKSUM = b',\n  "checksum": "'  # the last entry of a state.json: sha256 of all bytes before these
UNCHECKED = {"progress", "run", "validation_loss", "sha256"}  # the entries of version 0.1.0, which wrote no checksum


@dataclass(frozen=True)
class Slice:
    """What one rank writes of a tensor. runs: (first element in the whole, first in `tensor`, how many), flattened."""

    file: str  # one of FILES
    name: str
    tensor: Tensor  # (n,)
    runs: list[tuple[int, int, int]]


class SaveFailed(KnownToAll):
    """A checkpoint could not be written. The message is empty on ranks that have nothing to say about it."""


class Saver:
    """Writes the checkpoints of a run, one at a time, all ranks together, while training goes on.

        start     every rank copies what it owns, and begins to write it
        flags     this rank's two flags; each step the caller sums them over all ranks and passes the sums to `advance`
        advance   when all ranks have written, the first one gives the checkpoint its name

    `start`, `advance` and `wait` are called by all ranks alike, and raise SaveFailed on all where one failed.
    """

    def __init__(self, folder: Path, keep: int, mesh: Mesh):
        """keep: of the last ones; that with the lowest validation loss is kept too."""
        self.folder, self.keep, self.mesh = folder, keep, mesh
        self.last: Path | None = None  # that was asked for
        self._memory: list[Tensor] = []  # of the last snapshot, by slice
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future | None = None  # this rank's part
        self._publishing: Future | None = None  # the first rank's work when all have written

    def start(
        self, step: int, shapes: dict[str, dict[str, tuple[int, ...]]], slices: Iterable[Slice], state: dict,
        before: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """shapes: of the whole tensors, by file and name, all fp32; slices: what this rank has of them; before: what
        the first rank has to bring to the disk before there may be a checkpoint of this step.

        Returns when slices may change again. Waits for the checkpoint before it.
        """
        self.wait()
        self.last = path_of(self.folder, step)
        # only ever renamed to when complete, and a step has one state
        if self.mesh.sum_on_hosts([int(self.mesh.is_first and self.last.exists())])[0]:
            return
        work = self.folder / f"{UNFINISHED}{step:08d}"
        headers = {
            file: safetensors_header({name: ("float32", shape) for name, shape in of_file.items()})
            for file, of_file in shapes.items()
        }
        created = self._pool.submit(_create, work, headers, before) if self.mesh.is_first else None
        self._agree(created)
        copies = self._snapshot(slices)
        places = {file: places for file, (_, places, _) in headers.items()}
        self._writing = self._pool.submit(_write, work, places, copies)
        self._state = state

    def _snapshot(self, slices: Iterable[Slice]) -> list[tuple[Slice, Tensor]]:
        """Copies on the host, which may be written while training goes on.

        From a GPU they go into pinned memory, several times as fast as into other memory, all at once. The memory is
        kept for the next checkpoint, since to pin it takes longer than to fill it.
        """
        copies = []
        for i, s in enumerate(slices):
            source = s.tensor.detach()
            if i == len(self._memory):
                self._memory.append(torch.empty(source.shape, dtype=source.dtype, pin_memory=source.is_cuda))
            copies.append((s, self._memory[i].copy_(source, non_blocking=True)))
        if copies and copies[0][0].tensor.is_cuda:
            torch.cuda.current_stream(copies[0][0].tensor.device).synchronize()
        return copies

    @property
    def flags(self) -> tuple[int, int]:
        """(whether this rank's part is written, whether something failed)"""
        futures = [future for future in (self._writing, self._publishing) if future]
        failed = any(future.done() and future.exception() for future in futures)
        return int(self._writing is None or self._writing.done()), int(failed)

    def advance(self, written: int, failed: int) -> None:
        if failed:
            self._agree(self._writing or self._publishing)
        if self._writing and written == self.mesh.world:
            self._writing = None
            if self.mesh.is_first:
                self._publishing = self._pool.submit(_publish, self.last, self._state, self.keep)

    def wait(self) -> None:
        """Until the last checkpoint asked for has its name."""
        if self._writing:
            self._agree(self._writing)
            self.advance(self.mesh.world, 0)
        if self.last:
            self._agree(self._publishing)
            self._publishing = None

    def _agree(self, future: Future | None) -> None:
        """Waits for it on this rank, and for the other ranks to have done the same, however long somebody writes."""
        self.mesh.wait_for_all(future)
        error = future.exception() if future else None
        if error and not isinstance(error, OSError):
            raise error
        if self.mesh.sum_on_hosts([int(error is not None)])[0]:
            self._pool.shutdown()
            raise SaveFailed(f"{self.last} could not be written: {error}" if error else "")


def _create(
    work: Path, headers: dict[str, tuple[bytes, dict[str, int], int]], before: Callable[[], None] = lambda: None
) -> None:
    """A folder with files of their full size that nobody has written to yet."""
    before()
    make_folder(work.parent)  # flushes the names beside it too
    for left_over in work.parent.glob(f"{UNFINISHED}*"):
        shutil.rmtree(left_over)
    work.mkdir()
    for file, (begin, _, size) in headers.items():
        with open(work / f"{file}.safetensors", "wb") as f:
            f.write(begin)
            f.truncate(size)


def _write(work: Path, places: dict[str, dict[str, int]], slices: list[tuple[Slice, Tensor]]) -> None:
    for file in FILES:
        try:
            descriptor = os.open(work / f"{file}.safetensors", os.O_WRONLY)
        except FileNotFoundError as error:
            raise OSError(f"{error}; --out must be on storage that all machines share") from None
        try:
            for s, copy in slices:
                if s.file == file:
                    data = memoryview(copy.view(torch.uint8).numpy())
                    for whole, own, count in s.runs:
                        _write_at(descriptor, data[4 * own : 4 * (own + count)], places[file][s.name] + 4 * whole)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _write_at(descriptor: int, data: memoryview, at: int) -> None:
    while data:  # a call writes 2 GB at most
        written = os.pwrite(descriptor, data, at)
        data, at = data[written:], at + written


def _publish(final: Path, state: dict, keep: int) -> None:
    """Checksums of what the files hold, the name, and the end of older checkpoints."""
    folder, work = final.parent, final.with_name(final.name.replace("step-", UNFINISHED))
    checksums = {f"{file}.safetensors": sha256(work / f"{file}.safetensors") for file in FILES}
    write_state(work, {**state, "sha256": checksums})
    flush(work)
    os.replace(work, final)
    flush(folder)
    tidy(folder, keep)


def tidy(folder: Path, keep: int) -> None:
    """Removes all but the last checkpoints and the best, and what a killed process left. While nobody writes there."""
    for left_over in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(left_over)
    for old in set(steps(folder)) - set(steps(folder)[-keep:]) - {best(folder)}:
        # renamed first: a folder with a checkpoint's name is always whole
        os.replace(old, folder / f"{UNFINISHED}{old.name}")
        shutil.rmtree(folder / f"{UNFINISHED}{old.name}")


def path_of(folder: Path, step: int) -> Path:
    return folder / f"step-{step:08d}"


def step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def steps(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    named = (path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))
    return sorted((path for path in named if path.is_dir()), key=step_of)


def best(folder: Path) -> Path | None:
    """Of the checkpoints in a folder that were evaluated, the one with the lowest validation loss."""
    losses = {}
    for path in steps(folder):
        try:
            loss = read_state(path).get("validation_loss")
        except ValueError:  # damaged: no reason for it to be lost, or for this run to end
            continue
        if loss is not None:
            losses[path] = loss
    return min(losses, key=losses.get, default=None)


def write_state(path: Path, state: dict) -> None:
    """The state.json of a checkpoint that has no name yet."""
    content = json.dumps(state, indent=2).encode().removesuffix(b"\n}")
    with open(path / "state.json", "wb") as file:
        file.write(content + CHECKSUM + _end(content))
        file.flush()
        os.fsync(file.fileno())


def _end(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode() + b'"\n}\n'


def read_state(path: Path) -> dict:
    """The state.json of a checkpoint. Raises ValueError where it cannot be read or is not what was written.

    Has no "checksum" where it is one of version 0.1.0: that one may be edited or damaged without being noticed.
    """
    try:
        text = (path / "state.json").read_bytes()
        state = json.loads(text)
        content, checksum, end = text.rpartition(CHECKSUM)
        if end != _end(content) if checksum else state.keys() != UNCHECKED:
            raise ValueError("its checksum is another")
        if (step := state["progress"]["step"]) != step_of(path):
            raise ValueError(f"it is the state of step {step:,}")
        return state
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise damaged(path / "state.json", reason(error)) from None


def damaged(file: Path, why: str) -> ValueError:
    """For a file of a checkpoint, with what can be done."""
    return ValueError(f"{file} is damaged ({why}); remove {file.parent} to go on from the one before")


def verify(path: Path) -> None:
    """Raises ValueError where a file of a checkpoint has not the checksum that is in state.json."""
    for name, expected in read_state(path)["sha256"].items():
        try:
            found = sha256(path / name)
        except OSError as error:
            found = error.strerror
        if found != expected:
            raise damaged(path / name, f"sha256 {found[:12]}…, expected {expected[:12]}…")


def read(path: Path) -> dict[str, dict[str, Tensor]]:
    """The whole tensors of a checkpoint, by file and name. Nothing is read before somebody looks at it."""
    return {file: read_safetensors(path / f"{file}.safetensors") for file in FILES}
