"""Checkpoints: folders that appear complete or not at all.

    step-00001000/
        model.safetensors       the unsplit fp32 weights, under the model's own names
        optimizer.safetensors   Adam's moments, under the same names
        state.json              config, counters, and the sha256 of the two files and of itself

All ranks write their parts into the same two files, so a checkpoint does not depend on the layout that wrote it. It is
written in the background, in a folder beside its final name, flushed to disk and renamed. Then older checkpoints are
removed. Nothing is pickled. With several machines the folder must be on storage that all of them share.
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
CHECKSUM = b',\n  "checksum": "'  # the last entry of a state.json: the sha256 of all bytes before it
UNCHECKED = {"progress", "run", "validation_loss", "sha256"}  # the entries of version 0.1.0, which had no checksum


@dataclass(frozen=True)
class Slice:
    """One rank's part of a tensor. runs: (first element in the flattened whole, first element in `tensor`, count)."""

    file: str  # one of FILES
    name: str
    tensor: Tensor  # (n,)
    runs: list[tuple[int, int, int]]


class SaveFailed(KnownToAll):
    """A checkpoint could not be written. The message is empty on ranks on which nothing failed."""


class Saver:
    """Writes the checkpoints of a run, one at a time, on all ranks together, while training continues.

        start     every rank copies its part and begins to write it
        flags     this rank's two flags; each step the caller sums them over all ranks and passes the sums to `advance`
        advance   when all ranks have written, the first rank gives the checkpoint its name

    All ranks must call `start`, `advance` and `wait` alike. If one rank fails, these raise SaveFailed on all ranks.
    """

    def __init__(self, folder: Path, keep: int, mesh: Mesh):
        """keep: how many of the last checkpoints to keep, besides the one with the lowest validation loss."""
        self.folder, self.keep, self.mesh = folder, keep, mesh
        self.last: Path | None = None  # the last checkpoint that was started
        self._memory: list[Tensor] = []  # the copies of the last snapshot, by slice
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._writing: Future | None = None  # writes this rank's part
        self._publishing: Future | None = None  # the first rank's work after all have written

    def start(
        self, step: int, shapes: dict[str, dict[str, tuple[int, ...]]], slices: Iterable[Slice], state: dict,
        before: Callable[[], None] = lambda: None,
    ) -> None:  # fmt: skip
        """shapes: those of the whole tensors, by file and name, all fp32; slices: this rank's parts of them; before:
        called on the first rank, to write what must be on disk before there is a checkpoint of this step.

        Waits for the previous checkpoint, and returns when the slices may change again.
        """
        self.wait()
        self.last = path_of(self.folder, step)
        # a folder of that name is complete, and a step has only one state
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
        """Copies on the host, to be written while training continues.

        A GPU copies them into pinned memory, which is several times as fast as other memory, without waiting after each
        copy. The memory is kept for the next checkpoint, because pinning it takes longer than filling it.
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
        """(whether this rank's part is written, whether something failed), as 0 or 1."""
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
        """Waits until the last checkpoint that was started has its name."""
        if self._writing:
            self._agree(self._writing)
            self.advance(self.mesh.world, 0)
        if self.last:
            self._agree(self._publishing)
            self._publishing = None

    def _agree(self, future: Future | None) -> None:
        """Waits for `future` on this rank and for the other ranks to do the same, however long a rank writes."""
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
    """Makes a folder with files of their full size, to which the ranks will write."""
    before()
    make_folder(work.parent)  # also flushes its parents, so that the new names are on disk
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
    while data:  # one call writes at most 2 GB
        written = os.pwrite(descriptor, data, at)
        data, at = data[written:], at + written


def _publish(final: Path, state: dict, keep: int) -> None:
    """Computes the checksums of the files, gives the folder its name, and removes older checkpoints."""
    folder, work = final.parent, final.with_name(final.name.replace("step-", UNFINISHED))
    checksums = {f"{file}.safetensors": sha256(work / f"{file}.safetensors") for file in FILES}
    write_state(work, {**state, "sha256": checksums})
    flush(work)
    os.replace(work, final)
    flush(folder)
    tidy(folder, keep)


def tidy(folder: Path, keep: int) -> None:
    """Removes all checkpoints but the last ones and the best, and unfinished ones. Nobody may be writing there."""
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
    """The complete checkpoints in a folder, the oldest first."""
    named = (path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name))
    return sorted((path for path in named if path.is_dir()), key=step_of)


def best(folder: Path) -> Path | None:
    """The checkpoint in a folder with the lowest validation loss, or None if none was evaluated."""
    losses = {}
    for path in steps(folder):
        try:
            loss = read_state(path).get("validation_loss")
        except ValueError:  # damaged, which should not end this run
            continue
        if loss is not None:
            losses[path] = loss
    return min(losses, key=losses.get, default=None)


def write_state(path: Path, state: dict) -> None:
    """Writes the state.json of a checkpoint that does not have its final name yet."""
    content = json.dumps(state, indent=2).encode().removesuffix(b"\n}")
    with open(path / "state.json", "wb") as file:
        file.write(content + CHECKSUM + _end(content))
        file.flush()
        os.fsync(file.fileno())


def _end(content: bytes) -> bytes:
    return hashlib.sha256(content).hexdigest().encode() + b'"\n}\n'


def read_state(path: Path) -> dict:
    """The state.json of a checkpoint. Raises ValueError if it cannot be read or is not as it was written.

    One of version 0.1.0 has no "checksum", so damage or edits to it go unnoticed.
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
    """The error for a damaged file of a checkpoint. It says what to do."""
    return ValueError(f"{file} is damaged ({why}); remove {file.parent} to go on from the one before")


def verify(path: Path) -> None:
    """Raises ValueError if a file of a checkpoint does not have its checksum from state.json."""
    for name, expected in read_state(path)["sha256"].items():
        try:
            found = sha256(path / name)
        except OSError as error:
            found = error.strerror
        if found != expected:
            raise damaged(path / name, f"sha256 {found[:12]}…, expected {expected[:12]}…")


def read(path: Path) -> dict[str, dict[str, Tensor]]:
    """The whole tensors of a checkpoint, by file and name. Each is read only when it is used."""
    return {file: read_safetensors(path / f"{file}.safetensors") for file in FILES}
