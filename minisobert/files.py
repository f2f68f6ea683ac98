"""Files and folders that appear whole or not at all, checksums, and the safetensors format in a few lines."""

from __future__ import annotations

import bz2
import errno
import fcntl
import gzip
import hashlib
import json
import lzma
import math
import mmap
import os
import shutil
import sys
import zlib
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from minisobert.cli import printable

if TYPE_CHECKING:  # preparing data must start without torch, which takes seconds to import
    from torch import Tensor


def _open_zst(file: Path | BinaryIO, mode: str) -> BinaryIO:
    try:
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
    except ImportError:
        raise ValueError("reading .zst needs a package: pip install 'minisobert[tables]'") from None
    # archives of Reddit and others are packed with `zstd --long=31`, which unpacks into a window of 2 GiB
    return zstd.open(file, mode, options={zstd.DecompressionParameter.window_log_max: 31})


_OPEN = {".gz": gzip.open, ".xz": lzma.open, ".zst": _open_zst, ".bz2": bz2.open}
COMPRESSED = tuple(_OPEN)  # suffixes that `open_binary` unpacks, in lower case

_DTYPES = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16", "I64": "int64"}
_BYTES = {"float64": 8, "float32": 4, "bfloat16": 2, "float16": 2, "int64": 8}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}

_locks: set[int] = set()  # the descriptors of the lock files that this process holds


@contextmanager
def open_binary(path: Path, inside: BinaryIO | None = None) -> Iterator[BinaryIO]:
    """Opens a file as bytes, unpacked if its name ends in one of COMPRESSED. inside: its bytes, if `path` only names
    it. Raises ValueError if a packed file is damaged."""
    unpack = _OPEN.get(path.suffix.lower())
    try:
        if unpack:
            with unpack(inside or path, "rb") as file:
                yield file
        elif inside:
            yield inside
        else:
            with open(path, "rb") as file:
                yield file
    except Exception as error:
        damaged = isinstance(error, (EOFError, lzma.LZMAError, zlib.error)) or type(error).__name__ == "ZstdError"
        if damaged or (isinstance(error, OSError) and error.errno is None):  # bz2's and gzip's errors have no number
            raise ValueError(f"{path} is truncated or damaged ({error})") from None
        raise


@contextmanager
def locked(path: Path, what: str | Path, keep: type[BaseException] | tuple = ()) -> Iterator[str]:
    """Holds a lock while the block runs: a file at `path`, removed at the end. what: the folder that it guards, for
    messages. keep: exceptions after which the file stays, as if the process had been killed.

    Yields "process 123 on host", which the file still names if that process was killed while it held the lock; else "".
    Raises ValueError if a living process holds the lock, OSError if the file cannot be created. On a file system
    without locks the block runs without one and is given "".

    The kernel releases the lock when the process ends, however it ends. Forked children do not keep it.
    """
    descriptor, kept = None, False
    while descriptor is None:
        descriptor, taken, has_locks = os.open(path, os.O_RDWR | os.O_CREAT, 0o666), False, True
        _locks.add(descriptor)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            taken = True
        except OSError:
            has_locks = False
        holder = os.pread(descriptor, 1_000, 0).decode(errors="replace").strip()
        if taken:
            _drop(descriptor)
            by = holder or "another process"
            raise ValueError(f"{what} is in use by {by}; wait until it has ended, or choose another --out")
        if not _is_at(path, descriptor):  # its holder removed the file after it was opened here: open the next
            descriptor = _drop(descriptor)
    try:
        if has_locks:
            with suppress(OSError):  # the disk is full: then the file names no process
                text = f"process {os.getpid()} on {os.uname().nodename}\n".encode()
                os.ftruncate(descriptor, os.pwrite(descriptor, text, 0))
                os.fsync(descriptor)  # else, after a power cut, it would not name the process that is gone
        yield holder if has_locks else ""
    except keep:
        kept = True
        raise
    finally:
        if descriptor in _locks:  # not in a forked child that reaches this point
            if not kept and _is_at(path, descriptor):  # no other process can replace it: the lock is held
                path.unlink()
            _drop(descriptor)


def _is_at(path: Path, descriptor: int) -> bool:
    try:
        return os.path.samestat(os.stat(path), os.fstat(descriptor))
    except FileNotFoundError:
        return False


def _drop(descriptor: int) -> None:
    _locks.remove(descriptor)
    os.close(descriptor)


def _drop_all() -> None:
    while _locks:
        os.close(_locks.pop())


os.register_at_fork(after_in_child=_drop_all)  # else a child that outlives this process would keep its locks


@contextmanager
def new_folder(out: str | Path, journal: str = "") -> Iterator[Path]:
    """A hidden work folder beside `out`, which takes that name when the block ends, and is removed if the block fails.

    A work folder left by a killed process is removed first, with a line on standard error. journal: the name of a file
    in the folder, if the block can resume from such a folder. Then the folder is kept, also after Ctrl-C and SIGTERM,
    and the file is removed at the end. Raises ValueError if `out` exists already (an empty folder is fine), cannot be
    created, or is being created by another process, or if the disk gets full.
    """
    out, place = Path(out), Path(os.path.realpath(out))  # beside the target, if `out` is a symlink
    keep = KeyboardInterrupt if journal else ()
    with ExitStack() as stack:
        try:
            _check_is_free(out, place)
            work = place.with_name(f".{place.name}.unfinished")
            for parent in reversed([parent for parent in place.parents if not parent.exists()]):
                parent.mkdir(exist_ok=True)
                stack.callback(_remove_if_empty, parent)
                flush(parent.parent)
            killed = stack.enter_context(locked(work.with_name(f"{work.name}.lock"), out, keep))
            _check_is_free(out, place)  # again: the previous holder of the lock may have created it
            if killed and journal and work.is_dir() and not work.is_symlink():
                pass
            elif killed and work.is_dir():
                print(f"removing {work}, which {killed} left unfinished", file=sys.stderr)
                shutil.rmtree(work)
            elif os.path.lexists(work):  # on a file system without locks it may well be in use
                raise ValueError(f"{work} is in the way; remove it if no other process is writing there")
            work.mkdir(exist_ok=bool(journal))
            flush(work.parent)
        except OSError as error:
            reason = f"{error.strerror}: {error.filename}" if error.filename else error
            raise ValueError(f"{out} cannot be made ({reason}); choose another --out") from None
        try:
            yield work
            for path in (work, *work.rglob("*")):
                flush(path)
            if journal:
                (work / journal).unlink(missing_ok=True)
            work.replace(place)
            flush(place)
            flush(place.parent)
        except keep:
            raise
        except BaseException as error:
            shutil.rmtree(work, ignore_errors=True)
            if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                advice = "make room there or choose an --out elsewhere"
                raise ValueError(f"{out} cannot be written: {error.strerror} in {place.parent}; {advice}") from None
            raise


@contextmanager
def new_file(out: str | Path, kinds: Sequence[str]) -> Iterator[Path]:
    """Yields a hidden path beside `out`. The file written there takes the name `out` when the block ends, and is
    removed if the block fails.

    Raises ValueError if `out` exists, has no folder, or ends in none of `kinds`.
    """
    out = Path(out)
    if out.suffix not in kinds or os.path.lexists(out):
        raise ValueError(f"--out is {out}; choose a new file whose name ends in {' or '.join(kinds)}")
    if not out.absolute().parent.is_dir():
        raise ValueError(f"--out: {out.absolute().parent} is not a folder; make it first")
    beside = out.with_name(f".{out.name}.unfinished")
    try:
        yield beside
        flush(beside)
        beside.replace(out)
        flush(out.absolute().parent)
    finally:
        beside.unlink(missing_ok=True)


def _check_is_free(out: Path, place: Path) -> None:
    """Raises ValueError if no folder can take the name `out`. place: `out` with symlinks followed."""
    if link := next((path for path in (out, *out.parents) if path.is_symlink() and not path.exists()), None):
        target = os.readlink(link)
        raise ValueError(f"{link} is a symlink to {target}, which does not exist; make it or choose another --out")
    if not place.is_dir():
        if os.path.lexists(place):
            raise ValueError(f"{out} exists already and is not a folder; choose another --out")
    elif place == Path.cwd() or place.is_mount():  # no other folder can take the name of either
        raise ValueError(f"{out} is the current folder, or where a disk is mounted; choose a folder inside it")
    elif any(place.iterdir()):
        raise ValueError(f"{out} exists already and is not empty; choose another --out")


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def write_json(path: Path, value: object) -> None:
    write_whole(path, json.dumps(value, indent=2).encode() + b"\n")


def write_whole(path: Path, content: bytes) -> None:
    """Writes beside, flushes, renames: afterwards the file is the old or the new one, even after a power cut."""
    beside = path.with_name(f".{path.name}.new")
    with open(beside, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    flush(path.parent)


def make_folder(folder: Path) -> None:
    """Creates a folder and its missing parents, and makes their names survive a power cut."""
    for missing in reversed([each for each in (folder, *folder.parents) if not each.exists()]):
        missing.mkdir(exist_ok=True)
        flush(missing.parent)


def read_json_lines(path: Path, names: set[str]) -> list[dict]:
    """The objects of a file with one JSON object per line. Lines that are damaged or lack one of `names` are left out,
    and reported on standard error."""
    found, damaged = [], []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):
        try:
            value = json.loads(line) if line.strip() else None
        except ValueError:  # also for bytes that are not text
            value = {}
        if isinstance(value, dict) and names <= value.keys():
            found.append(value)
        elif line.strip():
            damaged.append(number)
    if damaged:
        others = f" and {len(damaged) - 1:,} more are" if len(damaged) > 1 else " is"
        print(printable(f"{path}: line {damaged[0]:,}{others} damaged and left out"), file=sys.stderr)
    return found


def sha256(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()


def flush(path: Path) -> None:
    """Makes a file's content, or the names that were just added to or removed from a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def safetensors_header(
    tensors: dict[str, tuple[str, tuple[int, ...]]], metadata: dict[str, str] | None = None
) -> tuple[bytes, dict[str, int], int]:
    """For a file with tensors of these dtypes ("float32") and shapes: its first bytes, each tensor's place, its size.

    Format: 8 bytes, the header's length (little endian); the header, JSON of dtype, shape and place of each tensor,
    padded with spaces to a multiple of 8; the tensors' bytes, row-major, little endian.
    """
    header, at = {}, 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * _BYTES[dtype]
        header[name], at = {"dtype": _NAMES[dtype], "shape": list(shape), "data_offsets": [at, at + size]}, at + size
    text = json.dumps({"__metadata__": metadata, **header} if metadata else header).encode()
    text += b" " * (-len(text) % 8)
    begin = 8 + len(text)
    places = {name: begin + entry["data_offsets"][0] for name, entry in header.items()}
    return len(text).to_bytes(8, "little") + text, places, begin + at


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, mapped into memory copy-on-write: changing them does not change the file.

    Raises ValueError if it is no safetensors file, has a dtype outside `_DTYPES`, or its tensors do not follow one
    another without gaps from the header to the end of the file, each as long as its shape says.
    """
    import torch

    try:
        with open(path, "rb") as file:
            data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        begin = 8 + int.from_bytes(data[:8], "little")
        if begin > len(data):
            raise ValueError(f"its header has {begin - 8:,} bytes, the file {len(data):,}")
        header = json.loads(data[8:begin])
        header.pop("__metadata__", None)
        tensors, at = {name: torch.empty(0) for name in header}, 0  # in the header's order
        for name, place in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            (start, stop), shape = place["data_offsets"], place["shape"]
            if place["dtype"] not in _DTYPES:
                raise ValueError(f"{name} is of type {place['dtype']}, not {', '.join(_DTYPES)}")
            dtype = getattr(torch, _DTYPES[place["dtype"]])
            if not all(type(n) is int and n >= 0 for n in (start, stop, *shape)):
                raise ValueError(f"{name} has the shape {shape} and the place {start} to {stop}")
            if start != at or stop - start != math.prod(shape) * dtype.itemsize:
                raise ValueError(
                    f"{name}, {place['dtype']} {shape}, has the bytes from {start} to {stop}, not from {at}"
                )
            at, count = stop, (stop - start) // dtype.itemsize
            if begin + at > len(data):
                raise ValueError(f"{name} ends {begin + at - len(data):,} bytes after the end of the file")
            flat = torch.frombuffer(data, dtype=dtype, count=count, offset=begin + start) if count else tensors[name]
            tensors[name] = flat.to(dtype).view(shape)
        if begin + at != len(data):
            raise ValueError(f"{len(data) - begin - at:,} bytes at its end belong to no tensor")
    except (ValueError, LookupError, TypeError, AttributeError, RuntimeError, OverflowError, RecursionError) as error:
        why = " ".join(str(error).split())[:300]
        raise ValueError(f"{path} is not a valid safetensors file ({why or type(error).__name__})") from None
    return tensors


def write_safetensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Writes tensors to a file, one at a time. Their dtype is one of `_DTYPES`, but not bfloat16, which numpy lacks."""
    header, _, _ = safetensors_header(
        {name: (str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors.items()}, metadata
    )
    with open(path, "wb") as file:
        file.write(header)
        for tensor in tensors.values():
            file.write(tensor.detach().cpu().contiguous().numpy().tobytes())
