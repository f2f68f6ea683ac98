"""The measurements, in one JSON file that is rewritten after each of them, so that a run may be killed at any time.

A measurement that is on record with the same fingerprint (sources, chip, versions) is not repeated, whether it
succeeded or failed.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import platform
import subprocess
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks.gpu import predict
from benchmarks.gpu.setting import Setting
from minisobert.files import write_json

ROOT = Path(__file__).parents[2]
PRESENTATION = {"report.py", "plots.py", "predict.py"}  # a change to a table does not require a new measurement
SOURCES = ("minisobert/**/*.py", "benchmarks/*.py", "benchmarks/*.json", "benchmarks/gpu/*.py",
           "tests/gpu/*.py", "tests/conftest.py", "tests/against_reference.py")  # fmt: skip


def fingerprint(*about) -> str:
    """A hash of the sources and of `about`, the other facts that determine a result."""
    digest = hashlib.sha256(json.dumps(about).encode())
    for path in sorted(path for pattern in SOURCES for path in ROOT.glob(pattern) if path.name not in PRESENTATION):
        digest.update(f"{path.relative_to(ROOT)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return digest.hexdigest()[:16]


def _output_of(command: str) -> str:
    """The first line that a command prints, or an empty string if it fails."""
    try:
        done = subprocess.run(command.split(), cwd=ROOT, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.split("\n")[0].strip()


def machine(device: torch.device) -> dict[str, str]:
    on_gpu = device.type == "cuda"
    versions = {
        "driver": _output_of("nvidia-smi --query-gpu=driver_version --format=csv,noheader") if on_gpu else "",
        "CUDA": torch.version.cuda,
        **{name: version(name) for name in ("torch", "triton", "transformers") if find_spec(name)},
        "Python": platform.python_version(),
    }
    changed = " and uncommitted changes" if _output_of("git status --porcelain") else ""
    return {
        "chip": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        "versions": ", ".join(f"{name} {number}" for name, number in versions.items() if number),
        "commit": (_output_of("git rev-parse --short HEAD") or "unknown") + changed,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


class Records:
    """measurements: by name, whose parts are separated by slashes: {"fingerprint", "seconds" (how long it took), "ours"
    (whether a failure is a mistake in this project), "result" or "failed"}."""

    def __init__(self, folder: Path, setting: Setting):
        self.path, self.dry, self.setting = folder / "gpu.json", setting.dry, setting
        self.machine = machine(setting.device)
        self.measurements: dict[str, dict] = {}
        self.not_reached: list[str] = []
        self._predicted: dict[str, dict] = {}
        self.fingerprint = fingerprint(self.dry, self.machine["chip"], self.machine["versions"])

    def load(self, path: Path) -> None:
        """Takes over the measurements of an earlier run that have the same fingerprint."""
        if path.is_file():
            for name, record in json.loads(path.read_text())["measurements"].items():
                if record["fingerprint"] == self.fingerprint:
                    self.measurements.setdefault(name, record)

    def save(self) -> None:
        names = ("dry", "machine", "not_reached", "measurements")
        write_json(self.path, {name: getattr(self, name) for name in names})

    def results(self, stage: str) -> dict[tuple[str, ...], dict]:
        """The results of a stage, by the rest of the name, each with its predictions as "predicted". They are sorted by
        size and dropout, with "rows" before "posts", and then as in the plan."""

        def order(name: tuple[str, ...]) -> list:
            return [(part == "posts", float(part) if part[0].isdigit() else 0, part) for part in name[:-1]]

        done = [
            (name.split("/"), r["result"] | {"predicted": self.predicted(name, r["result"])})
            for name, r in self.measurements.items()
            if "result" in r
        ]
        found = {tuple(rest): result for (first, *rest), result in done if first == stage}
        return {name: found[name] for name in sorted(found, key=order)}

    def predicted(self, name: str, result: dict) -> dict[str, float | None]:
        if name not in self._predicted:
            self._predicted[name] = predict.figures(name, self.setting, self.machine["chip"], result)
        return self._predicted[name]

    def get(self, *name) -> dict:
        """The result of the measurement of this name, or an empty dict if there is none."""
        return self.measurements.get("/".join(map(str, name)), {}).get("result", {})

    def failures(self, ours: bool) -> dict[str, str]:
        """The reason of each failure, by name. ours: those to be fixed here, including unexpected results."""
        records = self.measurements.items()
        return {name: r["failed"] for name, r in records if "failed" in r and r["ours"] == ours}
