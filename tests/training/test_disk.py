"""A disk that is full from any moment on, or loses with its power what was not flushed: nothing else is lost, and the
same command ends with the same bits."""

from __future__ import annotations

import builtins
import errno
import os
import random
import re
import resource
import shutil
import stat
import subprocess
from collections import Counter, defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

import train
from minisobert.config import PRESETS, ModelConfig
from minisobert.training import checkpoint
from tests.runs import metrics, words

TIMED = {"tokens_per_second", "dollars"}
ROW = 64
STEPS = 4


@pytest.fixture(autouse=True)
def minute_model(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", ModelConfig(layers=1, hidden=8, heads=2, ffn=8))


def command(corpus, out: Path) -> list[str]:
    """Checkpoints after steps 2 and 4, of which one is kept."""
    return words(corpus, out, row_tokens=ROW, tokens_per_batch=2 * ROW, train_tokens=STEPS * 2 * ROW, eval_rows=1,
                 micro_batch_rows=2, checkpoint_every_tokens=4 * ROW, keep_checkpoints=1)  # fmt: skip


class Disk:
    """What of a folder has reached the disk: of each file what it held, and of each folder whose names it had, when it
    was last flushed. A file or folder is known by its inode, which stays the same when it is renamed."""

    def __init__(self, root: Path, monkeypatch):
        self.root, self.files, self.folders, self.moments, self.pins = root, {}, {}, [], []
        for path in (root, *root.rglob("*")):  # on the disk since long ago
            descriptor = os.open(path, os.O_RDONLY)
            self._flush(descriptor)
            os.close(descriptor)
        for name in ("fsync", "replace", "mkdir", "unlink", "rmdir"):
            monkeypatch.setattr(os, name, self._noting(name, getattr(os, name)))

    def _noting(self, name: str, operation):
        def noted(*args, **kwargs):
            done = operation(*args, **kwargs)
            if name == "fsync":
                self._flush(*args)
            self._note()
            return done

        return noted

    def _flush(self, descriptor: int) -> None:
        self.pins.append(os.dup(descriptor))  # so that its inode is nobody else's while this lives
        found = os.fstat(descriptor)
        if stat.S_ISDIR(found.st_mode):
            self.folders[found.st_ino] = {each.name: (each.inode(), each.is_dir()) for each in os.scandir(descriptor)}
        else:
            self.files[found.st_ino] = Path(f"/proc/self/fd/{descriptor}").read_bytes()

    def _note(self) -> None:
        """What is there now, and what of it is on the disk."""
        files, folders = {}, {}
        for path in [self.root, *self.root.rglob("*")]:
            inode = path.stat().st_ino
            if path.is_dir():
                folders[inode] = {each.name: (each.inode(), each.is_dir()) for each in os.scandir(path)}
            else:
                files[inode] = path.read_bytes()
        self.moments.append((files, folders, dict(self.files), dict(self.folders)))

    def close(self) -> None:
        for descriptor in self.pins:
            os.close(descriptor)


def after_a_cut(moment, root: int, lucky_file, lucky_folder) -> dict[str, bytes | None]:
    """The files and folders (None) that are there when the power is back. What of an inode was changed since it was
    flushed is lost, unless it was lucky: of a file 0 says that all of that is lost, 1 a half and 2 nothing."""
    files, folders, flushed_files, flushed_folders = moment
    found = {}

    def visit(path: str, inode: int) -> None:
        names = folders if inode in folders and lucky_folder(inode) else flushed_folders
        for name, (child, is_folder) in names.get(inode, {}).items():
            if is_folder:
                found[path + name] = None
                visit(f"{path}{name}/", child)
            else:
                flushed = flushed_files.get(child, b"")
                now = files.get(child, flushed)
                part = now[: (len(flushed) + len(now)) // 2]
                found[path + name] = flushed if now == flushed else (flushed, part, now)[lucky_file(child)]

    visit("", root)
    return found


def states(moments, root: int) -> Iterator[tuple[dict[str, bytes | None], int]]:
    """Each that the disk may be in after a cut, once, and the last step whose name was flushed, which must be
    found again."""
    seen, draw = set(), random.Random(0)
    for moment in moments:
        certain = after_a_cut(moment, root, lambda _: 0, lambda _: False)
        names = [name for of_folder in moment[3].values() for name in of_folder if re.fullmatch(r"step-\d{8}", name)]
        step = max((int(name[-8:]) for name in names), default=0)
        others = [after_a_cut(moment, root, lambda _: 0, lambda _: True)]
        for _ in range(2):
            of_file, of_folder = defaultdict(partial(draw.randrange, 3)), defaultdict(partial(draw.randrange, 2))
            others.append(after_a_cut(moment, root, of_file.__getitem__, of_folder.__getitem__))
        for state in (certain, *others):
            if (key := (step, *sorted((name, hash(data)) for name, data in state.items()))) not in seen:
                seen.add(key)
                yield state, step


def content(out: Path) -> dict[str, object]:
    """All of a run's folder that does not tell the time."""
    lines = [{name: value for name, value in line.items() if name not in TIMED} for line in metrics(out)]
    found = {path: path.read_bytes() if path.is_file() else b"" for path in out.rglob("*")}
    (last,) = checkpoint.steps(out / "checkpoints")
    checkpoint.verify(last)
    return found | {out / "metrics.jsonl": lines, last / "state.json": b""}


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
    found = list(states(disk.moments, (tmp_path / "disk").stat().st_ino))
    disk.close()
    began = Counter()
    for state, step in found:
        shutil.rmtree(tmp_path / "disk")
        for name, data in {"": None, **state}.items():
            path = tmp_path / "disk" / name
            path.mkdir() if data is None else path.write_bytes(data)
        capsys.readouterr()
        assert train.main(command(corpus, out)) == 0
        said = re.search(r"going on after step (\d)", capsys.readouterr().out)
        began[int(said[1]) if said else 0] += 1
        assert step <= (int(said[1]) if said else 0), state.keys()
        assert content(out) == expected
    assert set(began) == ({2, 4} if resumed else {0, 2, 4}) and sum(began.values()) > 30, began


class FullDisk:
    """From the n-th write on, nothing can be written to any file behind its first bytes, and no name be given. Writes
    are counted."""

    def __init__(self, n: float, room: int, folder: Path, monkeypatch):
        self.n, self.room, self.folder, self.kinds = n, room, folder, []
        self.limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        for module, name in ((builtins, "open"), (os, "pwrite"), (os, "mkdir"), (os, "replace")):
            monkeypatch.setattr(module, name, self._counting(name, getattr(module, name)))

    def _counting(self, name: str, operation):
        def counted(*args, **kwargs):
            here = name == "pwrite" or str(args[0]).startswith(str(self.folder))
            if not here or (name == "open" and args[1:] in ((), ("rb",))):
                return operation(*args, **kwargs)
            self.kinds.append(name)
            if len(self.kinds) == self.n:
                self.saved = checkpoint.steps(self.folder / "checkpoints")
                self.lines = (self.folder / "metrics.jsonl").read_bytes() if self.saved else b""
                resource.setrlimit(resource.RLIMIT_FSIZE, (self.room, self.limits[1]))
            if len(self.kinds) >= self.n and name in ("mkdir", "replace"):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(args[0]))
            return operation(*args, **kwargs)

        return counted

    def make_room(self) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, self.limits)


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
    # of the many tensors in a row the first and a few more
    places = [n for n, kind in enumerate(kinds, 1) if kind != "pwrite" or kinds[n - 2] != kind or n % 29 == 0]
    assert len(places) > 30 and {kinds[n - 1] for n in places} == {"open", "pwrite", "mkdir", "replace"}
    for n in places:
        shutil.rmtree(out)
        capsys.readouterr()
        with monkeypatch.context() as patch:
            disk = FullDisk(n, n % 2 * 100, out, patch)
            number = status(command(corpus, out))
        disk.make_room()
        check_one_line(capsys, number)
        for path in checkpoint.steps(out / "checkpoints"):
            checkpoint.verify(path)
        assert disk.saved[-1:] <= checkpoint.steps(out / "checkpoints")[-1:]
        if disk.saved:
            assert (out / "metrics.jsonl").read_bytes().startswith(disk.lines)
        assert train.main(command(corpus, out)) == 0
        assert content(out) == expected, (n, kinds[n - 1])


def test_a_line_that_cannot_be_written_keeps_the_checkpoint_after_it_from_being_made(
    corpus, tmp_path, monkeypatch, capsys
):
    """It would never be made again."""
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
