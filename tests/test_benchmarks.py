"""Benchmarks change a committed result only with --write, and need nothing from outside the repository."""

from __future__ import annotations

import importlib
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

import benchmarks
from benchmarks import faults, lengths

FOLDER = Path(benchmarks.__file__).parent
COMMANDS = sorted(path.stem for path in FOLDER.glob("*.py") if "def main(" in path.read_text())


@pytest.fixture
def results(tmp_path, monkeypatch) -> Path:
    """The folder for results, which is empty."""
    monkeypatch.setattr(benchmarks, "RESULTS", tmp_path)
    monkeypatch.setattr(lengths, "HISTOGRAM", tmp_path / "post_lengths.json")
    monkeypatch.setattr(os, "sched_setaffinity", lambda *cores: None)
    torch.set_num_threads(1)
    return tmp_path


def run(monkeypatch, capsys, name: str, *words: object) -> str:
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    importlib.import_module(f"benchmarks.{name}").main()
    return capsys.readouterr().out


@pytest.mark.parametrize(("name", "words", "file"), [
    ("packing", ("--documents", 2_000), "packing.md"),
    ("loader", ("--data", "CORPUS", "--tokens", 50_000), "loader.md"),
    ("lengths", ("--data", "CORPUS"), "post_lengths.json"),
])  # fmt: skip
def test_a_result_is_printed_and_kept_only_when_asked_for(name, words, file, results, corpus, monkeypatch, capsys):
    words = [corpus.folder if word == "CORPUS" else word for word in words]
    assert run(monkeypatch, capsys, name, *words)
    assert list(results.iterdir()) == []
    shown = run(monkeypatch, capsys, name, *words, "--write")
    assert [path.name for path in results.iterdir()] == [file]
    kept = (results / file).read_text()
    assert kept == shown if file.endswith(".md") else json.loads(kept)["pieces"] > 1_000


@pytest.mark.parametrize("name", COMMANDS)
def test_every_benchmark_has_that_option(name, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        run(monkeypatch, capsys, name, "--help")
    assert "--write" in capsys.readouterr().out


def test_no_benchmark_has_an_input_that_a_reader_lacks():
    assert [path.name for path in FOLDER.glob("*.py") if "shared/data" in path.read_text()] == []


@pytest.mark.parametrize("name", ["cpu", "faults", "loader", "lengths", "packing"])
def test_a_folder_that_is_not_a_corpus_is_one_line(name, tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):
        run(monkeypatch, capsys, name, "--data", tmp_path)
    error = capsys.readouterr().err
    assert error.startswith(f"benchmarks.{name}: argument --data: {tmp_path} ") and error.count("\n") == 1


def test_runs_that_are_killed_are_compared_with_one_that_was_not(corpus, tmp_path, capsys):
    trial = faults.Trial(corpus.folder, tmp_path, ranks=1, kills=3, steps=4, seed=0)()
    assert trial.phases.total() == 3 and not any(trial.found[name] for name in faults.COUNTED), trial.found
    run = tmp_path / "undisturbed" / "run"
    weights, lines = run / "checkpoints" / "step-00000004" / "model.safetensors", run / "metrics.jsonl"
    last = json.loads(lines.read_text().splitlines()[-1])

    def spoilt(spoil) -> dict[str, int]:
        shutil.copytree(tmp_path / "undisturbed", tmp_path / "spoilt")
        before = trial.found.copy()
        spoil(tmp_path / "spoilt" / "run")
        trial._compare(tmp_path / "spoilt")
        return {name: trial.found[name] - before[name] for name in ("results that differ", "files left over")}

    def write(path: Path, data: bytes):
        return lambda folder: (folder / path.relative_to(run)).write_bytes(data)

    same, other = {"results that differ": 0, "files left over": 0}, {"results that differ": 1, "files left over": 0}
    assert spoilt(lambda folder: None) == same
    assert spoilt(write(lines, lines.read_bytes().replace(b'"dollars": 0.0', b'"dollars": 1.0'))) == same
    assert spoilt(write(weights, weights.read_bytes()[:-1] + b"?")) == other
    assert spoilt(write(lines, lines.read_bytes() + json.dumps(last).encode() + b"\n")) == other
    assert spoilt(lambda folder: (folder / "config.json").unlink()) == other
    assert spoilt(write(run / ".lock", b"")) == {"results that differ": 0, "files left over": 1}
