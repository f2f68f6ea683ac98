"""The commands of docs/long-runs.md work: the file for SLURM, and the lines for Weights & Biases."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
from torch.distributed.run import get_args_parser

from minisobert.cli import parse
from minisobert.config import TrainConfig
from minisobert.training import checkpoint
from tests.runs import metrics
from tests.test_docs import code

ROOT = Path(__file__).parents[1]
PAGE, BATCH_FILE = ROOT / "docs/long-runs.md", ROOT / "docs/train.sbatch"


def command(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{script}\n")
    (folder / name).chmod(stat.S_IRWXU)


def submit(tmp_path: Path, *options: str, torchrun: str) -> subprocess.Popen:
    """Starts the batch file as SLURM does on a node with two GPUs. tmp_path/scontrol records the calls of scontrol."""
    command(tmp_path / "bin", "scontrol", f'echo "$@" >> {tmp_path}/scontrol')
    command(tmp_path / "bin", "torchrun", torchrun)
    environment = {**os.environ, "PATH": f"{tmp_path}/bin:{os.environ['PATH']}", "PYTHONPATH": str(ROOT),
                   "SLURM_JOB_ID": "17", "SLURM_GPUS_ON_NODE": "2"}  # fmt: skip
    with open(tmp_path / "out", "ab") as out:
        return subprocess.Popen(["bash", BATCH_FILE, *options], cwd=ROOT, env=environment, stdout=out, stderr=out,
                                start_new_session=True)  # fmt: skip


def told(tmp_path: Path) -> list[str]:
    path = tmp_path / "scontrol"
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.slow
def test_a_job_out_of_time_saves_and_is_put_back_and_a_cancelled_one_saves(corpus, tmp_path):
    out = tmp_path / "run"
    options = ["--preset", "tiny", "--layers", "1", "--data", str(corpus.folder), "--out", str(out), "--train-tokens",
               "1e9", "--tokens-per-batch", "4096", "--micro-batch-rows", "1", "--eval-rows", "1"]  # fmt: skip
    real = f'exec {sys.executable} -P -m torch.distributed.run "$@"'

    def stop(send, after: int) -> int:
        """Starts a job, sends it something some steps after `after`, and returns the step at which it ended."""
        job = submit(tmp_path, *options, torchrun=real)
        try:
            until = time.monotonic() + 240
            while not (out / "metrics.jsonl").exists() or len(metrics(out)) < after + 2:
                assert job.poll() is None and time.monotonic() < until, (tmp_path / "out").read_text()
                time.sleep(0.1)
            send(job.pid)
            assert job.wait(240) != 0
        finally:
            if job.poll() is None:  # killed right away, torchrun would leave its workers behind
                os.killpg(job.pid, signal.SIGTERM)
                job.wait(60)
        (saved,) = checkpoint.steps(out / "checkpoints")[-1:]
        assert checkpoint.step_of(saved) == len(metrics(out)) > after  # nothing is lost
        checkpoint.verify(saved)
        return len(metrics(out))

    first = stop(lambda shell: os.kill(shell, signal.SIGUSR1), 0)
    assert told(tmp_path) == ["requeue 17"]
    stop(lambda shell: os.killpg(shell, signal.SIGTERM), first)
    said = (tmp_path / "out").read_text()
    assert f"continuing after step {first}" in said and said.count("repeat the command to resume") == 2
    assert told(tmp_path) == ["requeue 17"]  # a job that was cancelled is not put back


@pytest.mark.parametrize("status", [0, 3])
def test_a_job_that_ends_by_itself_has_trainings_status_and_is_not_put_back(tmp_path, status):
    job = submit(tmp_path, "--preset", "base", torchrun=f'echo "$@"; exit {status}')
    assert job.wait(60) == status and told(tmp_path) == []
    words = (tmp_path / "out").read_text().split()
    parsed = get_args_parser().parse_args(words)
    assert (parsed.standalone, parsed.nproc_per_node, parsed.training_script) == (True, "2", "train.py")
    assert parse(TrainConfig, parsed.training_script_args).preset == "base"


def test_what_the_page_says_to_type_is_understood(tmp_path):
    bash = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.S)
    for text in (BATCH_FILE.read_text(), *bash):
        checked = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
        assert checked.returncode == 0 and checked.stderr == ""
    assert "torchrun" in bash[0]
    torchrun = re.search(r"torchrun (.*?) train.py", bash[0].replace("\\\n", ""), re.S).group(1)
    numbered = torchrun.replace('"$SLURM_JOB_NUM_NODES"', "2").replace('"$SLURM_GPUS_ON_NODE"', "8")
    parsed = get_args_parser().parse_args([*numbered.replace('"', "").split(), "train.py"])
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.rdzv_backend) == ("2", "8", "c10d")
    for text in (PAGE.read_text(), BATCH_FILE.read_text()):
        (options,) = re.findall(r"sbatch docs/train.sbatch (.*)", text)
        config = parse(TrainConfig, options.split())
        assert (config.preset, config.data, config.out) == ("base", "data/prepared", "runs/base")


def test_weights_and_biases_get_each_step_once(tmp_path, monkeypatch):
    """The metrics grow, are cut back, and are read while a line is being written."""
    told, summary = [], {}
    run = types.SimpleNamespace(summary=summary, finish=lambda: told.append("finished"))

    def log(line, step):
        told.append((step, line["loss"]))
        summary.update(line)

    def init(**options):
        assert options["id"] == "run" and options["resume"] == "allow" and options["config"]["train"]
        return run

    run.log = log
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    follow = code("long-runs.md")["follow"]

    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"train": {"train_tokens": 700}}))
    lines = [json.dumps({"step": n, "positions": 100 * n, "loss": 9.0 - n}) + "\n" for n in range(1, 8)]
    states = ["".join(lines[:3]) + lines[3][:-5], "".join(lines[:2]), "".join(lines[:5]), "".join(lines)]
    monkeypatch.setattr(time, "sleep", lambda seconds: states and (folder / "metrics.jsonl").write_text(states.pop(0)))
    (folder / "metrics.jsonl").write_text("")
    follow(folder)
    assert told == [*((n, 9.0 - n) for n in range(1, 8)), "finished"]
    follow(folder)  # again, continuing from what is there
    assert told[8:] == ["finished"]
