"""Runs train.py as its users do, in processes that start fast because torch is already loaded."""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist

import train
from minisobert import cli
from minisobert.config import PRESETS, ModelConfig
from minisobert.parallel import roll_call
from minisobert.training import checkpoint, run

SMALL = ModelConfig(layers=2, hidden=64, heads=4, ffn=128)
SMALL_MODERN = ModelConfig(layers=2, hidden=64, heads=4, ffn=96, architecture="modernbert")  # one global, one local
ROW = 512
BATCH = 4 * ROW  # tokens


def make_small(setitem: Callable = dict.__setitem__) -> None:
    """Replaces the tiny presets by SMALL and SMALL_MODERN, which are ten times as fast with rows of ROW tokens. To undo
    it, pass monkeypatch.setitem."""
    setitem(PRESETS, "tiny", SMALL)
    setitem(PRESETS, "modern-tiny", SMALL_MODERN)


def words(corpus, out, steps=20, **options) -> list[str]:
    """A command line with 4 rows in a batch and, by default, an evaluation and a checkpoint only at the end."""
    options = {
        "data": corpus.folder, "preset": "tiny", "out": out, "train_tokens": steps * BATCH, "tokens_per_batch": BATCH,
        "row_tokens": ROW, "micro_batch_rows": 4, "learning_rate": 1e-4, "warmup_fraction": 0.1, "eval_rows": 2,
        "eval_every_tokens": "1e9", "checkpoint_every_tokens": "1e9", **options,
    }  # fmt: skip
    flags = [("--" + name.replace("_", "-"), value) for name, value in options.items() if value is not False]
    return [word for flag, value in flags for word in ([flag] if value is True else [flag, str(value)])]


def metrics(out) -> list[dict]:
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def column(out, name="loss") -> torch.Tensor:
    return torch.tensor([line[name] for line in metrics(out)], dtype=torch.float64)


def weights(out) -> dict[str, torch.Tensor]:
    path = checkpoint.steps(Path(out) / "checkpoints")[-1]
    checkpoint.verify(path)
    return checkpoint.read(path)["model"]


PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["train"])
STORES: WeakKeyDictionary = WeakKeyDictionary()  # of each process, as long as there are references to the process
PATIENCE = 300  # seconds, after which a process counts as hanging


def _process(log, environments, functions) -> None:
    torch.set_num_threads(1)  # so that bits can be compared
    make_small()
    roll_call.ROLL_CALL, cli.PATIENCE, train.PATIENCE, run.CLAIM = 1.5, 0.5, 0.5, 0.5
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    for environment, function in zip(environments, functions):
        os.environ.update(environment)
        if status := function():
            sys.exit(status)


def launch(functions: Sequence[Callable[[], int | None]], log, ranks=1) -> list:
    """Processes that call the functions in turn, each time in the environment that torchrun would give them."""
    # like torchrun's agent, this process holds the stores through which they find each other; a port that is only known
    # to be free now may be taken by then
    stores = [dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) for _ in functions]
    processes = []
    for rank in range(ranks):
        environments = [
            {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "WORLD_SIZE": str(ranks), "RANK": str(rank),
             "LOCAL_RANK": str(rank), "TORCHELASTIC_USE_AGENT_STORE": "True"} if ranks > 1 else {}
            for store in stores
        ]  # fmt: skip
        processes.append(PROCESSES.Process(target=_process, args=(log, environments, functions)))
    for process in processes:
        process.start()
        STORES[process] = stores
    return processes


def start(argv: list[str], log, ranks=1, prepare: Callable[[int], None] | None = None) -> list:
    """The processes of one run of train.py. prepare: called with the rank first, to break something."""
    return launch([partial(_train, argv, prepare)], log, ranks)


def _train(argv: list[str], prepare: Callable[[int], None] | None = None) -> int:
    if prepare:
        prepare(int(os.environ.get("RANK", 0)))
    return train.main(argv)


def train_all(argvs: list[list[str]], log, ranks: int) -> list[int]:
    """Trains several runs in turn, in the same processes."""
    return finish(launch([partial(_train, argv) for argv in argvs], log, ranks))


def finish(processes, patience: float = PATIENCE) -> list[int]:
    """The exit statuses. A process that hangs is killed, and so has -9."""
    for process in processes:
        process.join(patience)
        if process.is_alive():
            for each in processes:
                each.kill()
            process.join()
    return [process.exitcode for process in processes]
