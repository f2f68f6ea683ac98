"""TensorBoard's event files (extra [tensorboard]), written anew from metrics.jsonl whenever a run starts or resumes.

A resumed run repeats some steps. metrics.jsonl is cut back to the checkpoint and the event file is written from it, so
that each step is in the folder once, whatever reads it. The folder itself is never read: it may be deleted, and
--tensorboard may be added when a run is half done.
"""

from __future__ import annotations

import math
import os
import sys
import time
from contextlib import suppress
from pathlib import Path


def check() -> None:
    """Raises ValueError if the extra is not installed."""
    try:
        import tensorboard.compat.proto.event_pb2
        import tensorboard.summary.writer.record_writer  # noqa: F401
    except ImportError:
        raise ValueError("--tensorboard needs tensorboard: pip install 'minisobert[tensorboard]'") from None


class Events:
    def __init__(self, folder: Path):
        """Creates the folder with a new event file, and deletes older ones in it. Raises OSError if it cannot."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        self.path = folder / f"events.out.tfevents.{int(time.time())}.{os.getpid()}.{os.uname().nodename}"
        self._file = open(self.path, "wb")  # noqa: SIM115
        self._records = RecordWriter(self._file)
        self._write(Event(wall_time=time.time(), file_version="brain.Event:2"))
        # tells a running TensorBoard to drop the steps from 0 on, which are about to be written again
        self._write(Event(wall_time=time.time(), step=0, session_log=SessionLog(status=SessionLog.START)))

    def add(self, figures: dict[str, float | None], step: int, ago: float = 0.0) -> None:
        """Writes a scalar for each figure; None becomes NaN. ago: seconds since the step was made.

        If writing fails, a line on standard error says so and nothing more is written: no record after half of one
        could be read.
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
