"""TensorBoard's event files (extra [tensorboard]), in a folder that is made again from the figures kept elsewhere.

A run that is resumed makes some steps a second time. Its event file is therefore written anew from metrics.jsonl, which
is cut back to the checkpoint, so that each step is in the folder once, whatever reads it. Nothing is believed of the
folder: it may be deleted, and asked for when a run is half done.
"""

from __future__ import annotations

import math
import os
import sys
import time
from contextlib import suppress
from pathlib import Path


def check() -> None:
    """Raises ValueError where the extra is not installed."""
    try:
        import tensorboard.compat.proto.event_pb2
        import tensorboard.summary.writer.record_writer  # noqa: F401
    except ImportError:
        raise ValueError("--tensorboard needs tensorboard: pip install 'minisobert[tensorboard]'") from None


class Events:
    def __init__(self, folder: Path):
        """Makes the folder, with one new event file in it and no other. Raises OSError where that is not possible."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self.path = folder / f"events.out.tfevents.{int(time.time())}.{os.getpid()}.{os.uname().nodename}"
        self._file = open(self.path, "wb")  # noqa: SIM115
        self._records = RecordWriter(self._file)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        # a TensorBoard that is looking on drops what it knows from step 0 on, which is about to come again
        self._write(Event(wall_time=time.time(), step=0, session_log=SessionLog(status=SessionLog.START)))

    def add(self, figures: dict[str, float | None], step: int, ago: float = 0.0) -> None:
        """Writes a scalar for each figure; None is NaN. ago: seconds since then.

        Where that fails, a line on standard error says so, and nothing more is written: after half a record none could
        be read.
        """
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        if self._file.closed:
            return
        numbers = {name: math.nan if value is None else value for name, value in figures.items()}
        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        try:
            self._write(Event(wall_time=time.time() - ago, step=step, summary=Summary(value=values)))
        except OSError as error:
            print(
                f"{self.path}: {error.strerror}; training continues without it, and the next start writes it again",
                file=sys.stderr,
            )
            self.close()

    def _write(self, event) -> None:
        self._records.write(event.SerializeToString())
        self._file.flush()

    def close(self) -> None:
        with suppress(OSError):  # what could not be written before cannot be now
            self._file.close()
