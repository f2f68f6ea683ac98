"""The folder of a run: config.json, metrics.jsonl, tokenizer.model and checkpoints/, and where a run in it goes on."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from minisobert.config import ModelConfig, TrainConfig, flag
from minisobert.corpus.shards import Shards
from minisobert.training import checkpoint
from minisobert.training.optimizer import Optimizer


@dataclass
class Progress:
    """The counters of a run, all saved."""

    step: int = 0
    consumed_tokens: int = 0  # row positions read: the place in the data
    schedule_tokens: int = 0  # row positions trained on: the place in the schedule; a skipped step adds nothing
    real_tokens: int = 0  # of those consumed, all but padding
    seconds: float = 0.0  # spent in training steps
    skipped: int = 0  # steps whose gradient was not finite
    loss: float | None = None  # of the last step


class Run:
    """Looks at the folder and writes nothing until `begin`."""

    def __init__(self, config: TrainConfig, model: ModelConfig, shards: Shards):
        """Raises ValueError where the folder's last checkpoint was made by another config or from other data."""
        self.config, self.shards = config, shards
        self.folder = Path(config.out)
        settings = dataclasses.asdict(config)
        layout = {name: settings.pop(name) for name in config.free_fields()}
        self.identity = {"train": settings, "model": dataclasses.asdict(model), "data": shards.fingerprint}
        self.described = {**self.identity, "layout": layout}
        saved = checkpoint.steps(self.folder / "checkpoints")
        self.resumes_from = saved[-1] if saved and not config.fresh else None
        if self.resumes_from:
            self._refuse_another(checkpoint.read_state(self.resumes_from)["run"])

    def _refuse_another(self, before: dict) -> None:
        here = f"{self.folder} holds a run"
        otherwise = "choose another --out, or --fresh to discard that run"
        for name, value in self.identity["train"].items():
            if name in before["train"] and before["train"][name] != value:
                old = before["train"][name]
                raise ValueError(f"{here} with {flag(name)} {old}, given is {value}; give the same, {otherwise}")
        if before["data"] != self.identity["data"]:
            raise ValueError(f"{here} on other data than {self.config.data}; give the same --data, {otherwise}")
        if before != self.identity:
            raise ValueError(f"{here} by another version of minisobert; {otherwise}")

    def load(self, optimizer: Optimizer) -> Progress:
        """Weights, moments and counters of the last checkpoint, or the beginning. Raises ValueError if damaged."""
        if not self.resumes_from:
            return Progress()
        optimizer.load(*checkpoint.load(self.resumes_from))
        return Progress(**checkpoint.read_state(self.resumes_from)["progress"])

    def begin(self, step: int) -> None:
        """Makes the folder ready for the steps after `step`. From here on things are written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.config.fresh:
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        metrics = self.folder / "metrics.jsonl"
        if metrics.exists():  # what came after the checkpoint is about to be made again
            lines = [line for line in metrics.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            beside = metrics.with_name(".metrics.jsonl.new")
            beside.write_text("".join(line + "\n" for line in kept))
            os.replace(beside, metrics)
        checkpoint.write_json(self.folder / "config.json", self.described)
        shutil.copyfile(self.shards.folder / "tokenizer.model", self.folder / "tokenizer.model")

    def log(self, line: dict) -> None:
        """Appends one step's figures to metrics.jsonl."""
        with open(self.folder / "metrics.jsonl", "a") as file:
            print(json.dumps(line), file=file)

    def save(self, optimizer: Optimizer, progress: Progress) -> Path:
        state = {"progress": dataclasses.asdict(progress), "run": self.identity}
        return checkpoint.save(
            self.folder / "checkpoints",
            progress.step,
            optimizer.masters,
            optimizer.state(),
            state,
            self.config.keep_checkpoints,
        )
