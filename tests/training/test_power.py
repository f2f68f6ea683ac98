"""Power cuts: what was not flushed is lost, at every moment of a run, and the same command goes on from the rest."""

from __future__ import annotations

import os
import random
import re
import shutil
import stat
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
