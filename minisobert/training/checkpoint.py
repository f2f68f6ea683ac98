"""Checkpoints: folders that appear whole or not at all, and the safetensors format in a few lines.

    step-00001000/
        model.safetensors       the fp32 weights, under the model's own names
        optimizer.safetensors   Adam's moments, under the same names
        state.json              config, counters, sha256 of the two files

A checkpoint is written beside its final name, flushed to disk, and renamed; older ones are removed after that. Nothing
is pickled.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import shutil
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I64": torch.int64}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
TENSORS = ("model", "optimizer")
UNFINISHED = ".unfinished-"


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> str:
    """Writes the tensors and flushes them to disk. Returns the file's sha256.

    Format: 8 bytes, the header's length (little endian); the header, JSON of dtype, shape and place of each tensor,
    padded with spaces to a multiple of 8; the tensors' bytes, row-major, little endian.
    """
    header, at = {}, 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        place = {"dtype": NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [at, at + size]}
        header[name], at = place, at + size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    digest = hashlib.sha256()
    with open(path, "wb") as file:
        for part in (len(text).to_bytes(8, "little"), text, *map(_bytes, tensors.values())):
            digest.update(part)
            file.write(part)
        _flush(file)
    return digest.hexdigest()


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a file, in memory of the process's own: changing them does not change the file."""
    with open(path, "rb") as file:
        data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
    size = int.from_bytes(data[:8], "little")
    tensors = {}
    for name, place in json.loads(data[8 : 8 + size]).items():
        if name == "__metadata__":
            continue
        dtype, (start, stop) = DTYPES[place["dtype"]], place["data_offsets"]
        count = (stop - start) // dtype.itemsize
        flat = torch.frombuffer(data, dtype=dtype, count=count, offset=8 + size + start) if count else torch.empty(0)
        tensors[name] = flat.to(dtype).view(place["shape"])
    return tensors


def save(folder: Path, step: int, model: dict[str, Tensor], optimizer: dict[str, Tensor], state: dict, keep: int):
    """Writes the checkpoint of one step into folder and then removes all but the `keep` last. Returns its path."""
    final, unfinished = folder / f"step-{step:08d}", folder / f"{UNFINISHED}{step:08d}"
    if final.exists():  # only ever renamed to when complete, and a step has one state
        return final
    folder.mkdir(parents=True, exist_ok=True)
    for left_over in folder.glob(f"{UNFINISHED}*"):
        shutil.rmtree(left_over)
    unfinished.mkdir()
    checksums = {
        f"{name}.safetensors": write_safetensors(unfinished / f"{name}.safetensors", tensors)
        for name, tensors in zip(TENSORS, (model, optimizer))
    }
    write_json(unfinished / "state.json", {**state, "sha256": checksums})
    _flush_folder(unfinished)
    os.replace(unfinished, final)
    _flush_folder(folder)
    for old in steps(folder)[:-keep]:
        # renamed first: a folder with a checkpoint's name is always whole
        os.replace(old, folder / f"{UNFINISHED}{old.name}")
        shutil.rmtree(folder / f"{UNFINISHED}{old.name}")
    return final


def steps(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    return sorted(path for path in folder.glob("step-*") if path.is_dir())


def read_state(path: Path) -> dict:
    """The state.json of a checkpoint. Raises ValueError where it cannot be read."""
    try:
        return json.loads((path / "state.json").read_text())
    except (OSError, ValueError) as error:
        damaged = f"{path / 'state.json'} is damaged ({error})"
        raise ValueError(f"{damaged}; remove {path} to go on from the one before") from None


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Model and optimizer tensors of a checkpoint. Raises ValueError where a checksum is not the one in state.json."""
    for name, expected in read_state(path)["sha256"].items():
        try:
            with open(path / name, "rb") as file:
                found = _sha256(file)
        except OSError as error:
            found = error.strerror
        if found != expected:
            raise ValueError(
                f"{path / name} is damaged (sha256 {found[:12]}…, expected {expected[:12]}…); "
                f"remove {path} to go on from the one before"
            )
    model, optimizer = (read_safetensors(path / f"{name}.safetensors") for name in TENSORS)
    return model, optimizer


def write_json(path: Path, value: object) -> None:
    """Writes beside, flushes, renames: the file is the old one or the new one, never half of one."""
    beside = path.with_name(f".{path.name}.new")
    with open(beside, "w") as file:
        json.dump(value, file, indent=2)
        file.write("\n")
        _flush(file)
    os.replace(beside, path)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())


def _sha256(file) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 24):
        digest.update(chunk)
    return digest.hexdigest()


def _flush(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
