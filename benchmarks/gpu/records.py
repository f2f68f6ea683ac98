"""What was measured: one JSON file, written anew as soon as a figure is there, so that a run may be killed at any time.

A measurement that is on record with the same fingerprint (sources, chip, versions) is not repeated, whether it
succeeded or failed.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import os
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from benchmarks.gpu.setting import Setting

ROOT = Path(__file__).parents[2]
PRESENTATION = {"goals.py", "report.py", "words.py", "plots.py"}  # a reworded table is no reason to measure again


def sources(*patterns: str) -> str:
    """A hash of the files."""
    paths = sorted({path for pattern in patterns for path in ROOT.glob(pattern) if path.name not in PRESENTATION})
    lines = [f"{path.relative_to(ROOT)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n" for path in paths]
    return hashlib.sha256("".join(lines).encode()).hexdigest()[:16]


MODEL = "minisobert/**/*.py"
BENCHMARKS = (MODEL, "benchmarks/*.py", "benchmarks/*.json", "benchmarks/gpu/*.py")
TESTS = (MODEL, "tests/gpu/**/*.py", "tests/*.py")  # the last: conftest and tolerances


def output_of(*command: str) -> str | None:
    """The first line of what a command prints; None where it cannot be run."""
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split("\n")[0].strip() or None if done.returncode == 0 else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine(setting: Setting) -> dict:
    on_gpu = setting.device.type == "cuda"
    commit = output_of("git", "rev-parse", "--short", "HEAD")
    changed = " and uncommitted changes" if commit and output_of("git", "status", "--porcelain") else ""
    return {
        "chip": torch.cuda.get_device_name() if on_gpu else platform.processor() or platform.machine(),
        "driver": output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "transformers": _version("transformers"),
        "python": platform.python_version(),
        "commit": f"{commit}{changed}" if commit else None,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
    }


class Records:
    """measurements: by name, {"fingerprint", "seconds" that it took, "ours", "result" or "failed"}."""

    def __init__(self, folder: Path, setting: Setting, price: float):
        self.path, self.dry, self.price = folder / "gpu.json", setting.dry, price
        self.machine = machine(setting)
        self.measurements: dict[str, dict] = {}
        self.not_reached: list[str] = []
        self._common = [self.machine[name] for name in ("chip", "torch", "triton", "transformers")] + [setting.dry]
        self._hashes = {patterns: sources(*patterns) for patterns in (BENCHMARKS, TESTS)}

    def fingerprint(self, patterns: tuple[str, ...]) -> str:
        return hashlib.sha256(json.dumps([self._hashes[patterns], *self._common]).encode()).hexdigest()[:16]

    def load(self, path: Path) -> None:
        """Takes over what an earlier run measured, if with one of the fingerprints of this one."""
        if path.is_file():
            valid = {self.fingerprint(patterns) for patterns in self._hashes}
            for name, record in json.loads(path.read_text())["measurements"].items():
                if record["fingerprint"] in valid:
                    self.measurements.setdefault(name, record)

    def save(self) -> None:
        names = ("dry", "price", "machine", "not_reached", "measurements")
        text = json.dumps({name: getattr(self, name) for name in names}, indent=1)
        beside = self.path.with_suffix(".tmp")
        beside.write_text(text + "\n")
        os.replace(beside, self.path)

    def get(self, *name) -> dict:
        """The result of the measurement of this name; empty where there is none."""
        return self.measurements.get("/".join(map(str, name)), {}).get("result", {})

    def under(self, *name) -> dict[tuple[str, ...], dict]:
        """Of all measurements whose names begin so, the rest of their names and their records."""
        prefix = [str(part) for part in name]
        split = {tuple(key.split("/")): record for key, record in self.measurements.items()}
        return {key[len(prefix) :]: r for key, r in split.items() if list(key[: len(prefix)]) == prefix}

    def failures(self, ours: bool) -> dict[str, str]:
        """Name and reason. ours: those that are to be mended here, an unexpected result among them."""
        records = self.measurements.items()
        return {name: r["failed"] for name, r in records if "failed" in r and r["ours"] == ours}
