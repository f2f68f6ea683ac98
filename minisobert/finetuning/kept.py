"""The folder `model` of a result: the files of a network, and a task.json with their description and their sha256."""

from __future__ import annotations

import json
from pathlib import Path

from minisobert.files import sha256, write_json


def write_task(folder: Path, task: dict) -> None:
    """Writes task.json beside the files of a network, which must be in place."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    write_json(folder / "task.json", task | {"sha256": {str(path.relative_to(folder)): sha256(path) for path in files}})


def read_task(folder: Path) -> dict:
    """The content of task.json, after a check that the files beside it are those for which it was written. A folder of
    an older version has no checksums and is not checked.

    Raises ValueError if a file is missing or was changed, or if task.json is damaged; OSError if task.json is missing.
    """
    path = folder / "task.json"
    try:
        task = json.loads(path.read_bytes())
        checksums = dict(task.get("sha256", {}))
    except (ValueError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path} is damaged; copy {folder.parent} again, or fine-tune again") from None
    for name, expected in checksums.items():
        try:
            found = sha256(folder / name)
        except OSError as error:
            found = error.strerror
        if found != expected:
            what = f"is not the file that was saved (sha256 {found[:12]}…, expected {str(expected)[:12]}…)"
            raise ValueError(f"{folder / name} {what}; copy {folder.parent} again, or fine-tune again")
    return task
