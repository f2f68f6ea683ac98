"""The folder of a run: config.json, metrics.jsonl, tokenizer.model and checkpoints/, and where a run in it goes on."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from minisobert.cli import flag
from minisobert.config import ModelConfig, TrainConfig
from minisobert.corpus.shards import Shards
from minisobert.corpus.tokenizer import Tokenizer
from minisobert.files import sha256, write_json
from minisobert.model import MaskedLM
from minisobert.parallel.mesh import Mesh, from_torchrun
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
    skipped_in_a_row: int = 0
    loss: float | None = None  # of the last step


class Run:
    """Looks at the folder and writes nothing until `begin`."""

    def __init__(self, config: TrainConfig, model_config: ModelConfig, shards: Shards):
        """Raises ValueError where the folder's last checkpoint was made by another config or from other data."""
        self.config, self.model_config, self.shards = config, model_config, shards
        self.folder = Path(config.out)
        settings = dataclasses.asdict(config)
        layout = {name: settings.pop(name) for name in config.resumable_fields()}
        self.identity = {"train": settings, "model": dataclasses.asdict(model_config), "data": shards.fingerprint}
        tokenizer = shards.meta["files"]["tokenizer.model"]["sha256"]
        self.described = {**self.identity, "layout": layout, "tokenizer": tokenizer}
        saved = checkpoint.steps(self.folder / "checkpoints")
        self.fresh = config.fresh
        self.resumes_from = saved[-1] if saved else None
        if self.resumes_from and not self.fresh:
            self._refuse_another(checkpoint.read_state(self.resumes_from)["run"])

    def _is_ours(self) -> bool:
        """Whether the last checkpoint is of this very run."""
        try:
            return self.resumes_from is not None and checkpoint.read_state(self.resumes_from)["run"] == self.identity
        except ValueError:  # damaged
            return False

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

    def restore(self, optimizer: Optimizer, mesh: Mesh) -> Progress:
        """Weights, moments and counters of the last checkpoint, or the beginning. Raises ValueError if damaged.

        The first process decides which it is: others may see a folder on a network later than it.
        """
        # when torchrun starts the job again, what is there is its own work (not every machine's agent counts that)
        restarted = mesh.sum_on_hosts([from_torchrun("TORCHELASTIC_RESTART_COUNT", 0)])[0] > 0
        self.fresh &= not (restarted and self._is_ours())
        step, damage = 0, None
        if mesh.is_first and self.resumes_from and not self.fresh:
            step = int(self.resumes_from.name.removeprefix("step-"))
            try:
                checkpoint.verify(self.resumes_from)
            except ValueError as error:
                damage = error
        step, damaged = mesh.sum_on_hosts([step, int(damage is not None)])
        if damaged:
            raise damage or ValueError(f"{self.resumes_from} is damaged")
        if not step:
            return Progress()
        path = checkpoint.path_of(self.folder / "checkpoints", step)
        progress = Progress(**checkpoint.read_state(path)["progress"])
        optimizer.restore(checkpoint.read(path), progress.step - progress.skipped)
        return progress

    def begin(self, step: int) -> None:
        """Makes the folder ready for the steps after `step`. From here on things are written."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if self.fresh:
            shutil.rmtree(self.folder / "checkpoints", ignore_errors=True)
        metrics = self.folder / "metrics.jsonl"
        if metrics.exists():  # what came after the checkpoint is about to be made again
            lines = [line for line in metrics.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            beside = metrics.with_name(".metrics.jsonl.new")
            beside.write_text("".join(line + "\n" for line in kept))
            os.replace(beside, metrics)
        write_json(self.folder / "config.json", self.described)
        shutil.copyfile(self.shards.folder / "tokenizer.model", self.folder / "tokenizer.model")

    def log(self, line: dict) -> None:
        """Appends one step's figures to metrics.jsonl."""
        with open(self.folder / "metrics.jsonl", "a") as file:
            print(json.dumps(line), file=file)

    def save(
        self, saver: checkpoint.Saver, optimizer: Optimizer, progress: Progress, validation_loss: float | None
    ) -> None:
        """Begins to write a checkpoint. Called by all ranks."""
        state = {
            "progress": dataclasses.asdict(progress), "run": self.identity, "validation_loss": validation_loss
        }  # fmt: skip
        saver.start(progress.step, optimizer.whole_shapes(), optimizer.slices(), state)


@dataclass(frozen=True)
class Trained:
    model: MaskedLM
    tokenizer: Tokenizer


def open_run(run: str | Path) -> Trained:
    """The model of a run's last checkpoint, in fp32 on the CPU. Raises ValueError where there is none, or where the
    tokenizer beside it is another model's."""
    run = Path(run)
    saved = checkpoint.steps(run / "checkpoints")
    if not saved:
        raise ValueError(f"{run} holds no checkpoint; give the --out of a train.py that has saved one")
    described = json.loads((run / "config.json").read_text())
    tokenizer = run / "tokenizer.model"
    if sha256(tokenizer) != described["tokenizer"]:
        raise ValueError(f"{tokenizer} is another model's; put the one of the run's --data there")
    model = MaskedLM(ModelConfig(**described["model"]))
    checkpoint.verify(saved[-1])
    model.load_state_dict(checkpoint.read(saved[-1])["model"])
    return Trained(model.eval(), Tokenizer(tokenizer))
