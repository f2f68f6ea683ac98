"""Documents from plain text: `.txt` (one per line) or `.jsonl` ({"text": …} per line), as they are or `.gz`, `.xz`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from minisobert.files import COMPRESSED, open_binary


def format_of(path: Path) -> str | None:
    """The suffix .txt or .jsonl of a text file, packed or not; None for any other file."""
    suffix = path.with_suffix("").suffix if path.suffix in COMPRESSED else path.suffix
    return suffix if suffix in (".txt", ".jsonl") else None


def texts(
    path: Path, dropped: Counter, progress: Callable[[int], object] = lambda size: None
) -> Iterator[tuple[int, str]]:
    """(line number, text) of every document, line ends as \\n; "" for an empty line of a .txt.

    A line that is no such JSON object or not UTF-8 is counted in `dropped` and skipped. progress: called with the bytes
    read since it was last called, after unpacking. Raises ValueError where a packed file is truncated or damaged.
    """
    jsonl = format_of(path) == ".jsonl"
    with open_binary(path) as file:
        for number, line in enumerate(file):
            progress(len(line))
            if number == 0:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if jsonl and not line.strip():
                continue
            try:
                text = json.loads(line)["text"] if jsonl else line.decode()
                text.encode()  # JSON can hold half of a surrogate pair
            except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
                dropped["malformed lines"] += 1
                continue
            yield number, text.replace("\r\n", "\n").strip("\n")
