"""A folder appears complete or not at all, is made by one process at a time, and remains of killed ones are removed."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minisobert.files import locked, new_file, new_folder, read_safetensors, write_safetensors

ROOT = Path(__file__).parents[1]


def start(code: str, *arguments, **options) -> subprocess.Popen:
    """A process that runs this code. Its `ready()` tells this process to go on, and waits until it is told to end."""
    head = "import os, sys\nfrom minisobert.files import *\ndef ready(): print(flush=True); sys.stdin.readline()\n"
    command = [sys.executable, "-c", head + code, *map(str, arguments)]
    process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options)
    process.stdout.readline()
    return process


def kill(process: subprocess.Popen) -> None:
    process.kill()
    assert process.wait(timeout=30) == -signal.SIGKILL


def names(folder) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# The lock

HOLD = "with locked(Path(sys.argv[1]), 'it'): ready()"


def test_a_lock_that_a_living_process_holds_is_refused_by_its_name(tmp_path):
    holder = start(HOLD, tmp_path / "lock")
    message = rf"^it is in use by process {holder.pid} on .*; wait until it has ended"
    with pytest.raises(ValueError, match=message), locked(tmp_path / "lock", "it"):
        pass
    holder.communicate("")
    assert names(tmp_path) == []
    with locked(tmp_path / "lock", "it") as killed:
        assert killed == ""


def test_a_lock_ends_with_its_process_and_the_next_learns_whose_it_was(tmp_path):
    holder = start(HOLD, tmp_path / "lock")
    kill(holder)
    with locked(tmp_path / "lock", "it") as killed:
        assert killed.startswith(f"process {holder.pid} on ")
        with pytest.raises(ValueError, match=f"in use by process {os.getpid()} "), locked(tmp_path / "lock", "it"):
            pass
    assert names(tmp_path) == []


def test_a_forked_child_that_outlives_its_parent_does_not_keep_the_lock(tmp_path):
    # the child says when it is ready, since on a busy machine the parent may get there long before it and be killed
    code = "child = os.fork()\n    if not child: print(flush=True); os.read(int(sys.argv[2]), 1)\n"
    code += "    else: sys.stdin.readline()"
    ours, theirs = os.pipe()
    os.set_inheritable(ours, True)
    holder = start(f"with locked(Path(sys.argv[1]), 'it'):\n    {code}", tmp_path / "lock", ours, close_fds=False)
    os.close(ours)
    kill(holder)
    with locked(tmp_path / "lock", "it"):
        pass
    os.write(theirs, b"x")  # only the child reads it, so this would be a broken pipe if the child had ended
    os.close(theirs)


def test_a_lock_file_that_is_removed_while_it_is_waited_for_is_no_lock(tmp_path, monkeypatch):
    flock, inodes = fcntl.flock, []

    def removed_in_between(descriptor, operation):
        inodes.append(os.fstat(descriptor).st_ino)
        if len(inodes) == 1:
            (tmp_path / "lock").rename(tmp_path / "moved")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", removed_in_between)
    with locked(tmp_path / "lock", "it"):
        assert (tmp_path / "lock").stat().st_ino == inodes[1] != inodes[0]
    assert names(tmp_path) == ["moved"]


def test_only_one_of_many_processes_has_the_lock_at_a_time(tmp_path):
    code = """
for i in range(300):
    try:
        with locked(Path(sys.argv[1]) / "lock", "it"):
            os.mkdir(Path(sys.argv[1]) / "mine")  # fails where another has it
            os.rmdir(Path(sys.argv[1]) / "mine")
    except ValueError:
        pass
"""
    processes = [start(f"print(flush=True){code}", tmp_path) for _ in range(4)]
    assert [process.wait(timeout=60) for process in processes] == [0] * 4
    assert names(tmp_path) == []


def without_locks(descriptor, operation):
    raise OSError(errno.ENOLCK, "No locks available")


def test_a_file_system_without_locks_is_used_without_and_nobody_is_taken_for_dead(tmp_path, monkeypatch):
    monkeypatch.setattr(fcntl, "flock", without_locks)
    (tmp_path / "lock").write_text("process 1 on another machine")
    with locked(tmp_path / "lock", "it") as killed:
        assert killed == ""
    assert names(tmp_path) == []


def test_a_lock_file_of_another_that_took_its_place_stays(tmp_path):
    with locked(tmp_path / "lock", "it"):
        (tmp_path / "lock").unlink()
    with locked(tmp_path / "lock", "it"):
        (tmp_path / "lock").rename(tmp_path / "moved")
        (tmp_path / "lock").write_text("of another")
    assert names(tmp_path) == ["lock", "moved"]


# A new folder


def test_a_folder_appears_only_when_it_is_complete(tmp_path):
    out = tmp_path / "a" / "b"
    with new_folder(out) as work:
        (work / "file").write_text("x")
        assert not out.exists()
    assert (out / "file").read_text() == "x"
    assert names(out.parent) == ["b"]


def test_contents_are_on_the_disk_before_they_have_their_name_and_the_name_at_the_end(tmp_path, monkeypatch):
    """After a power cut, whatever was not flushed may be lost, and a name may be there without its content."""
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda to: (done.append(os.readlink(f"/proc/self/fd/{to}")), fsync(to))[1])
    monkeypatch.setattr(os, "replace", lambda old, new: (done.append("named"), replace(old, new))[1])
    with new_folder(tmp_path / "out") as work:
        (work / "a").mkdir()
        (work / "a" / "file").write_text("x")
    assert done[:2] == [f"{work}.lock", f"{tmp_path}"]
    within = {f"{work}", f"{work}/a", f"{work}/a/file"}
    assert {*done[2:-3]} == within and done[-3:] == ["named", f"{tmp_path}/out", f"{tmp_path}"]
    done.clear()
    with new_file(tmp_path / "out.png", [".png"]) as beside:
        beside.write_text("x")
    assert done == [f"{beside}", "named", f"{tmp_path}"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_a_failure_nothing_is_left(tmp_path, error):
    with pytest.raises(error), new_folder(tmp_path / "a" / "b") as work:
        (work / "file").write_text("x")
        raise error
    assert names(tmp_path) == []


def test_what_a_killed_process_left_is_removed_and_said(tmp_path, capsys):
    code = "with new_folder(sys.argv[1]) as work:\n    (work / 'spool').write_text('half of it')\n    ready()"
    killed = start(code, tmp_path / "out")
    kill(killed)
    assert len(names(tmp_path)) == 2
    with new_folder(tmp_path / "out") as work:
        assert names(work) == []
        (work / "file").write_text("x")
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"removing {work}, which process {killed.pid} on ")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["file"]


def test_what_a_living_process_makes_is_not_touched_and_the_second_is_refused_at_its_start(tmp_path):
    code = "with new_folder(sys.argv[1]) as work:\n    (work / 'spool').write_text('half of it')\n    ready()"
    first = start(code, tmp_path / "out")
    refused(tmp_path / "out", rf"out is in use by process {first.pid} on .*; .* choose another --out$")
    first.communicate("\n")
    assert names(tmp_path) == ["out"]
    assert names(tmp_path / "out") == ["spool"]


def test_a_process_that_gets_the_lock_late_replaces_nothing_that_was_made_meanwhile(tmp_path, monkeypatch):
    flock = fcntl.flock

    def made_meanwhile(descriptor, operation):
        (tmp_path / "out").mkdir(exist_ok=True)
        (tmp_path / "out" / "file").write_text("of another")
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", made_meanwhile)
    with pytest.raises(ValueError, match="exists already"), new_folder(tmp_path / "out"):
        pass
    assert names(tmp_path) == ["out"]


@pytest.mark.parametrize("flock", [fcntl.flock, without_locks])
def test_a_folder_that_nobody_is_known_to_have_left_is_not_removed(tmp_path, monkeypatch, flock):
    monkeypatch.setattr(fcntl, "flock", flock)
    (tmp_path / ".out.unfinished").mkdir()
    (tmp_path / ".out.unfinished" / "mine").write_text("x")
    with pytest.raises(ValueError, match=r"unfinished is in the way; remove it if"), new_folder(tmp_path / "out"):
        pass
    assert names(tmp_path / ".out.unfinished") == ["mine"]
    assert names(tmp_path) == [".out.unfinished"]


# What cannot become a folder is refused before the block runs


def refused(out, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refusal, new_folder(out):
        pytest.fail("the work begins")
    assert "\n" not in str(refusal.value)


def test_a_folder_that_holds_something_is_never_touched(tmp_path):
    (tmp_path / "out").mkdir()
    with new_folder(tmp_path / "out"):
        pass  # an empty one is fine
    (tmp_path / "out" / "mine").write_text("x")
    refused(tmp_path / "out", "exists already and is not empty; choose another --out")
    assert (tmp_path / "out" / "mine").read_text() == "x"


def test_a_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("x")
    refused(tmp_path / "out", "out exists already and is not a folder")
    refused(tmp_path / "out" / "b", "cannot be made .Not a directory")
    assert (tmp_path / "out").read_text() == "x"
    assert names(tmp_path) == ["out"]


def test_a_symlink_to_nothing_is_refused(tmp_path):
    (tmp_path / "out").symlink_to("nowhere")
    refused(tmp_path / "out", "out is a symlink to nowhere, which does not exist")
    refused(tmp_path / "out" / "b", "out is a symlink to nowhere, which does not exist")
    (tmp_path / "loop").symlink_to("loop")
    refused(tmp_path / "loop", "loop is a symlink to loop, which does not exist")
    assert names(tmp_path) == ["loop", "out"]


def test_a_symlink_to_an_empty_folder_stays_one_and_the_folder_is_filled(tmp_path):
    (tmp_path / "disk" / "place").mkdir(parents=True)
    (tmp_path / "out").symlink_to("disk/place")
    with new_folder(tmp_path / "out") as work:
        assert work.parent == tmp_path / "disk"  # where there may be more room than beside the symlink
        (work / "file").write_text("x")
    assert (tmp_path / "out").is_symlink()
    assert names(tmp_path / "disk" / "place") == ["file"]
    assert names(tmp_path / "disk") == ["place"]
    refused(tmp_path / "out", "out exists already and is not empty")


@pytest.mark.parametrize("out", ["", ".", "../here"])
def test_the_current_folder_is_refused(tmp_path, monkeypatch, out):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    refused(out, "is the current folder, .* choose a folder inside it")
    assert names(tmp_path) == ["here"]
    (tmp_path / "here" / "mine").write_text("x")
    refused(out, "is the current folder, .* choose a folder inside it")  # not advice to remove it


def test_the_root_of_a_disk_is_refused(tmp_path, monkeypatch):
    refused("/", "where a disk is mounted; choose a folder inside it")
    monkeypatch.setattr(Path, "is_mount", lambda path: path == tmp_path)
    refused(tmp_path, "where a disk is mounted; choose a folder inside it")
    with new_folder(tmp_path / "out"):
        pass


@pytest.mark.parametrize("error", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_folder_that_nothing_can_be_written_to_is_refused(tmp_path, monkeypatch, error):
    def no(path, *arguments):
        raise OSError(error, os.strerror(error), str(path))

    monkeypatch.setattr(os, "open", no)
    refused(tmp_path / "a" / "out", rf"out cannot be made \({os.strerror(error)}: .*\); choose another --out")
    monkeypatch.undo()
    assert names(tmp_path) == []


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_disk_that_gets_full_is_named(tmp_path, error):
    message = rf"^{tmp_path}/out cannot be written: {os.strerror(error)} in {tmp_path}; make room"
    with pytest.raises(ValueError, match=message), new_folder(tmp_path / "out") as work:
        (work / "file").write_text("x")
        raise OSError(error, os.strerror(error))
    assert names(tmp_path) == []


# Safetensors


def safetensors(path: Path, header: dict | bytes, data: bytes) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def tensor(start: int, stop: int, shape: list, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


UNSOUND = {
    "a negative offset": {"a": tensor(-4, 4, [2])},
    "one before the other's end": {"a": tensor(0, 8, [2]), "b": tensor(4, 12, [2])},
    "the same bytes": {"a": tensor(0, 16, [4]), "b": tensor(0, 16, [4])},
    "a gap": {"a": tensor(0, 8, [2]), "b": tensor(12, 16, [1])},
    "not at the beginning": {"a": tensor(8, 16, [2])},
    "bytes left over": {"a": tensor(0, 8, [2])},
    "behind the end": {"a": tensor(0, 20, [5])},
    "far behind the end": {"a": tensor(0, 2**66, [2**64])},
    "backwards": {"a": tensor(16, 0, [4])},
    "a shape of another size": {"a": tensor(0, 16, [5])},
    "a negative shape": {"a": tensor(0, 16, [-2, -2])},
    "an absurd shape": {"a": tensor(0, 0, [2**63, 0]), "b": tensor(0, 16, [4])},
    "a shape of fractions": {"a": tensor(0, 16, [4.0])},
    "a shape of truths": {"a": tensor(0, 16, [4, True])},
    "a shape that is none": {"a": tensor(0, 16, "4")},
    "an unknown type": {"a": tensor(0, 16, [4], "F4")},
    "a type that is none": {"a": tensor(0, 16, [4], [])},
    "no type": {"a": {"shape": [4], "data_offsets": [0, 16]}},
    "three offsets": {"a": tensor(0, 16, [4]) | {"data_offsets": [0, 8, 16]}},
    "no entry": {"a": None},
    "nothing": {},
    "a list": b"[]",
    "no JSON": b"{",
    "no text": b"\xff\xfe",
    "too deep": b"[" * 100_000,
    "another's": b'{"__metadata__": {}, "a": 7}',
}


@pytest.mark.parametrize("header", UNSOUND.values(), ids=UNSOUND)
def test_tensors_that_are_not_where_the_format_has_them_are_refused(tmp_path, header):
    path = safetensors(tmp_path / "a", header, bytes(16))
    with pytest.raises(ValueError, match=f"^{path} is not a valid safetensors file") as error:
        read_safetensors(path)
    assert "\n" not in str(error.value)
    assert read_safetensors(safetensors(path, {"a": tensor(0, 16, [2, 2])}, bytes(16)))["a"].shape == (2, 2)


@pytest.mark.parametrize("content", [b"", b"x", bytes(8), b"\xff" * 8, (2).to_bytes(8, "little") + b"{", bytes(1_000)])
def test_what_is_no_safetensors_file_is_refused(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match="is not a valid safetensors file"):
        read_safetensors(tmp_path / "a")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 10**6), st.binary(max_size=3), st.integers(0, 3)), min_size=1, max_size=4))
def test_a_damaged_safetensors_file_is_refused_or_read_within_its_bounds(tmp_path_factory, edits):
    path = tmp_path_factory.mktemp("safetensors") / "a"
    write_safetensors(path, {"a": torch.arange(6.0).view(2, 3), "empty": torch.empty(0, 4), "b": torch.zeros(())})
    content = path.read_bytes()
    for place, inserted, deleted in edits:
        place %= len(content)
        content = content[:place] + inserted + content[place + deleted :]
    path.write_bytes(content)
    try:
        found = read_safetensors(path)
    except ValueError:
        return
    size = int.from_bytes(content[:8], "little")
    assert sum(tensor.nbytes for tensor in found.values()) == len(content) - 8 - size
