"""What can be chosen: frozen dataclasses, presets, and the command line made from the fields."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import sys
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field

MOST_TOKENS = 1 << 24  # of a batch: above it, columns of neighbouring heads would share their dropout hashes


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of an encoder. Raises ValueError where they do not fit together."""

    layers: int
    hidden: int
    heads: int
    ffn: int
    vocabulary: int = 50_048  # a multiple of 128, whatever the layout: 50,000 pieces and rows that no id uses
    positions: int = 2_048
    norm_eps: float = 1e-5  # Megatron-LM's; the released SOBert configs say 1e-12
    gelu: str = "erf"  # or "tanh", the form that Megatron-LM fuses

    def __post_init__(self):
        for name in ("layers", "hidden", "heads", "ffn", "vocabulary", "positions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        if self.hidden % self.heads:
            divisors = [n for n in range(1, self.hidden + 1) if self.hidden % n == 0]
            choices = words(nearest(divisors, self.heads))
            raise ValueError(f"hidden {self.hidden} cannot be split over {self.heads} heads; choose {choices}")

    @property
    def head_width(self) -> int:
        return self.hidden // self.heads


PRESETS = {
    "tiny": ModelConfig(layers=2, hidden=128, heads=2, ffn=512),
    "base": ModelConfig(layers=12, hidden=768, heads=12, ffn=3_072),
    "large": ModelConfig(layers=24, hidden=1_536, heads=16, ffn=6_144),
}


def padded_vocabulary(vocab_size: int) -> int:
    """The next multiple of 128: a matrix width that every layout can split and that matrix units like."""
    return -(-vocab_size // 128) * 128


def option(default, help: str, choices=None, free: bool = False, metavar: str = "PATH"):
    """A field of a config: its default, one line for --help, what it may be. free: a resumed run may change it.
    metavar: what --help calls the value of a text."""
    return field(default=default, metadata={"help": help, "choices": choices, "free": free, "metavar": metavar})


@dataclass(frozen=True)
class TrainConfig:
    """A pre-training run: the recipe (SOBert's where the paper states it, Megatron-LM's BERT elsewhere) and its layout.

    Everything that is counted in tokens counts row positions, as Megatron-LM does. The trajectory depends on every
    field but the free ones.
    """

    data: str = option("data/prepared", "folder that data.prepare wrote", free=True)
    preset: str = option("base", "size of the model", choices=tuple(PRESETS))
    out: str = option("runs/base", "folder of the run; resumed where it holds a checkpoint", free=True)
    seed: int = option(1, "of initial weights, shuffling, masking and dropout")
    train_tokens: int = option(27_000_000_000, "length of training, in row positions")
    tokens_per_batch: int = option(524_288, "row positions per optimizer step, whatever the layout")
    batch_schedule: str = option(
        "", "in its place, batches that grow: 0:131072,1e9:524288 is 131,072 until 1e9 are read", metavar="AT:N,…"
    )
    micro_batch_rows: int = option(8, "rows of 2,048 tokens in one forward pass of one process", free=True)
    dropout: float = option(0.1, "of embeddings, attention probabilities and both branches of a block")
    gelu: str = option("erf", "form of the GELU", choices=("erf", "tanh"))
    learning_rate: float = option(1e-4, "its peak")
    warmup_fraction: float = option(0.01, "part of train_tokens in which the learning rate rises from 0")
    final_learning_rate_fraction: float = option(0.1, "of the peak, at the end of the linear decay")
    weight_decay: float = option(0.01, "of all but biases and layer norms")
    beta1: float = option(0.9, "Adam's, for the mean of the gradients")
    beta2: float = option(0.999, "Adam's, for the mean of their squares")
    clip: float = option(1.0, "largest norm of the gradient of one step")
    loss_average: str = option(
        "token", "over a batch's masked tokens, or Megatron-LM's mean of micro-batch means", ("token", "micro-batch")
    )
    max_skipped: int = option(10, "how many steps in a row may have a gradient that is not finite", free=True)
    tensor_parallel: int = option(1, "processes that share one model, neighbours in rank", free=True)
    sequence_parallel: bool = option(
        False, "split layer norms and dropout over those processes too, by tokens", free=True
    )
    shard_optimizer: bool = option(False, "split masters and Adam's moments over data-parallel processes", free=True)
    recompute: bool = option(False, "keep the inputs of a block alone and compute it again in the backward", free=True)
    precision: str = option(
        "auto", "of weights and activations; masters are fp32. auto: bf16 on GPUs", choices=("auto", "fp32", "bf16")
    )
    eval_every_tokens: int = option(262_144_000, "how often to measure the loss on held-out documents", free=True)
    eval_rows: int = option(512, "at most so many held-out rows in one evaluation", free=True)
    checkpoint_every_tokens: int = option(524_288_000, "how often to save", free=True)
    keep_checkpoints: int = option(2, "how many of the last checkpoints to keep", free=True)
    price_per_gpu_hour: float = option(0.0, "dollars, to report what the run has cost", free=True)
    verify: bool = option(False, "check the checksums of the data before training", free=True)
    fresh: bool = option(False, "discard the checkpoints in out and start over", free=True)
    timeout: float = option(600.0, "seconds to wait for another process before the job gives up", free=True)
    plan: bool = option(False, "say what the run will take and which layouts fit, and start nothing", free=True)
    gpu: str = option("H100", "for --plan, its name", metavar="NAME", free=True)
    gpus: int = option(8, "for --plan, how many", free=True)
    mfu: float = option(0.4, "for --plan, the part of a GPU's FLOP/s that training uses", free=True)

    def __post_init__(self):
        at_least = {
            "train_tokens": 1, "tokens_per_batch": 1, "micro_batch_rows": 1, "eval_every_tokens": 1, "eval_rows": 1,
            "checkpoint_every_tokens": 1, "keep_checkpoints": 1, "tensor_parallel": 1,
            "max_skipped": 0, "gpus": 1, "price_per_gpu_hour": 0, "weight_decay": 0, "seed": 0,
        }  # fmt: skip
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise ValueError(f"{flag(name)} is {getattr(self, name)}; it must be at least {least}")
        for name in ("learning_rate", "clip", "timeout"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{flag(name)} is {getattr(self, name)}; it must be more than 0")
        for name in ("dropout", "warmup_fraction", "beta1", "beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{flag(name)} is {getattr(self, name)}; it must be at least 0 and less than 1")
        if not 0 <= (fraction := self.final_learning_rate_fraction) <= 1:
            raise ValueError(f"--final-learning-rate-fraction is {fraction}; it must be from 0 to 1")
        for f in dataclasses.fields(self):
            if f.metadata["choices"] and getattr(self, f.name) not in f.metadata["choices"]:
                raise ValueError(f"{flag(f.name)} is {getattr(self, f.name)!r}; choose {words(f.metadata['choices'])}")
        if (largest := max(size for _, size in self.batches)) > MOST_TOKENS:
            raise ValueError(f"a batch of {largest:,} row positions is more than dropout can count, {MOST_TOKENS:,}")

    @property
    def batches(self) -> list[tuple[int, int]]:
        """(from how many consumed row positions on, row positions per optimizer step), in order."""
        if not self.batch_schedule:
            return [(0, self.tokens_per_batch)]
        try:
            batches = [tuple(_whole(part) for part in pair.split(":")) for pair in self.batch_schedule.split(",")]
            starts, sizes = zip(*batches, strict=True)
        except (ValueError, OverflowError):
            starts, sizes = (), ()
        if not starts or starts[0] != 0 or list(starts) != sorted(set(starts)) or min(sizes) < 1:
            raise ValueError(
                f"--batch-schedule is {self.batch_schedule!r}; it must be pairs of row positions read and row "
                "positions a step, beginning with 0 and increasing: 0:131072,1e9:524288"
            )
        return batches

    def batch_at(self, consumed: int) -> int:
        """Row positions of the step that begins after `consumed`."""
        return next(size for start, size in reversed(self.batches) if start <= consumed)

    def steps(self, consumed: int = 0) -> Iterator[tuple[int, int]]:
        """(row positions consumed before, row positions) of each step that is left after `consumed`."""
        batches = self.batches
        while consumed < self.train_tokens:
            size = next(size for start, size in reversed(batches) if start <= consumed)
            yield consumed, size
            consumed += size

    def model(self, vocab_size: int) -> ModelConfig:
        """The preset's model for a tokenizer of vocab_size pieces."""
        return dataclasses.replace(PRESETS[self.preset], vocabulary=padded_vocabulary(vocab_size), gelu=self.gelu)

    def accumulation(self, tokens_per_batch: int, row_tokens: int, data_parallel: int) -> int:
        """Micro-batches of each process in one step. Raises ValueError where tokens_per_batch is not a multiple."""
        per_pass = self.micro_batch_rows * row_tokens * data_parallel
        if tokens_per_batch % per_pass:
            option = "--batch-schedule" if self.batch_schedule else "--tokens-per-batch"
            below = tokens_per_batch // per_pass * per_pass
            choices = f"{option} {words([f'{n:,}' for n in (below, below + per_pass) if n])}"
            rows, rest = divmod(tokens_per_batch, row_tokens * data_parallel)
            if rows and not rest:
                divisors = [n for n in range(1, rows + 1) if rows % n == 0]
                choices += f", or --micro-batch-rows {words(nearest(divisors, self.micro_batch_rows))}"
            raise ValueError(
                f"tokens_per_batch = micro_batch_rows × row × data_parallel × accumulation does not come out even: "
                f"{tokens_per_batch:,} = {self.micro_batch_rows} × {row_tokens:,} × {data_parallel} × "
                f"{tokens_per_batch / per_pass:.4g}; choose {choices}"
            )
        return tokens_per_batch // per_pass

    def check(self, rows: int, row_tokens: int, data_parallel: int) -> None:
        """Raises ValueError where the layout or the data (rows in an epoch) does not go with a batch."""
        for _, tokens_per_batch in self.batches:
            self.accumulation(tokens_per_batch, row_tokens, data_parallel)
            if rows * row_tokens < tokens_per_batch:
                raise ValueError(
                    f"{self.data} packs into {rows:,} rows, fewer than the {tokens_per_batch // row_tokens:,} of one "
                    f"batch; choose --tokens-per-batch {rows * row_tokens:,} or less, or prepare more text"
                )

    def free_fields(self) -> set[str]:
        return {f.name for f in dataclasses.fields(self) if f.metadata["free"]}


TASK_OPTIONS = {"quality": "keep_leak", "closed": "binary"}  # what a task can be read otherwise by


@dataclass(frozen=True)
class FineTuneConfig:
    """A fine-tuning run, or with `predict` the use of what one has made."""

    task: str = option("", "what to learn", choices=("quality", "closed", "ner", "obsoletion"))
    model: str = option(
        "",
        "folder of a train.py run, random:PRESET, hf:NAME_OR_PATH or tfidf; with --predict, an --out",
        metavar="MODEL",
    )
    data: tuple[str, ...] = option((), "files or folders of the task, as they are published")
    out: str = option("", "folder of the results, a new one")
    tokenizer: str = option("", "for random:PRESET, the run or tokenizer.model to share the tokenizer of")
    seeds: int = option(1, "how many times to train, from the seeds 1 to N; the split is always the same")
    epochs: int = option(10, "at most; training ends when dev gets no better, and the best epoch is kept")
    learning_rate: float = option(5e-5, "its peak, after a tenth of the steps; 5e-4 suits the preset tiny")
    tokens_per_batch: int = option(4_096, "at most, of whole documents; a longer document is a batch by itself")
    dropout: float = option(0.1, "as in pre-training, and before the classifier")
    class_weights: bool = option(False, "weigh each class by the inverse of its frequency")
    keep_leak: bool = option(False, "for quality, leave the line ends and markup that give the label away")
    binary: bool = option(False, "for closed, open or closed in place of the five reasons")
    predict: str = option(
        "", "classify the posts of a file, .jsonl or one a line, or of - (standard input)", metavar="FILE"
    )

    def __post_init__(self):
        needed = ("model",) if self.predict else ("task", "model", "data", "out")
        if self.predict and (self.task or self.data or self.out):
            raise ValueError("--predict applies what is trained; give it --model, and no --task, --data or --out")
        for f in dataclasses.fields(self):
            value, choices = getattr(self, f.name), f.metadata["choices"]
            if f.name in needed and not value:
                advice = f"choose {words(choices)}" if choices else f"give the {f.metadata['help'].split(';')[0]}"
                raise ValueError(f"{flag(f.name)} is missing; {advice}")
        for name in ("seeds", "epochs", "tokens_per_batch"):
            if getattr(self, name) < 1:
                raise ValueError(f"{flag(name)} is {getattr(self, name)}; it must be at least 1")
        if self.tokens_per_batch > MOST_TOKENS:
            raise ValueError(f"--tokens-per-batch is {self.tokens_per_batch:,}; dropout can count {MOST_TOKENS:,}")
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"--learning-rate is {self.learning_rate}; it must be more than 0")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"--dropout is {self.dropout}; it must be at least 0 and less than 1")
        for task, name in TASK_OPTIONS.items():
            if getattr(self, name) and self.task != task:
                raise ValueError(f"{flag(name)} is for --task {task}, given is {self.task or 'none'}")


def nearest(values: list[int], wanted: int) -> list[int]:
    """The up to three values nearest to the one wanted, in order."""
    return sorted(sorted(values, key=lambda n: abs(n - wanted))[:3])


def words(values, joint: str = "or") -> str:
    """`1, 2 or 4`."""
    values = [str(value) for value in values]
    return values[0] if len(values) == 1 else f"{', '.join(values[:-1])} {joint} {values[-1]}"


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, with the nearest flag where one is misspelt. Exit status 2."""

    def error(self, message: str):
        if message.startswith("unrecognized arguments: "):
            unknown = message.split(": ", 1)[1].split()[0]
            near = difflib.get_close_matches(unknown.split("=")[0], self._option_string_actions, n=1)
            message = f"unknown option {unknown}" + (f"; did you mean {near[0]}?" if near else "; see --help")
        fail(f"{self.prog}: {message}")


def fail(message: object) -> typing.NoReturn:
    """What a user's mistake ends in: one line on standard error, exit status 2."""
    print(" ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


def parse(cls, argv: list[str] | None = None, prog: str | None = None, description: str | None = None):
    """A config from command-line words, one flag per field in kebab case. Mistakes leave by `fail`."""
    parser = Parser(prog=prog, description=description, allow_abbrev=False)
    types = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):
        kind = types[f.name]
        if kind is bool:
            parser.add_argument(flag(f.name), action="store_true", help=f.metadata["help"])
            continue
        several = kind == tuple[str, ...]
        default = f"{f.default:,}" if kind is int and f.default >= 10_000 else f.default
        shown = "" if default in ("", ()) else f" (default {default})"
        parser.add_argument(
            flag(f.name),
            type=_integer if kind is int else str if several else kind,
            nargs="+" if several else None,
            default=f.default,
            metavar=None if f.metadata["choices"] else {int: "N", float: "X"}.get(kind, f.metadata["metavar"]),
            choices=f.metadata["choices"],
            help=f"{f.metadata['help']}{shown}".replace("%", "%%"),
        )
    values = vars(parser.parse_args(argv))
    try:
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    except ValueError as error:
        parser.error(str(error))


def _whole(text: str) -> int:
    """`524288`, `524_288` or `27e9`. Raises ValueError on anything else."""
    value = float(text) if any(c in text for c in ".eE") else int(text)
    if value != int(value):
        raise ValueError(text)
    return int(value)


def _integer(text: str) -> int:
    try:
        return _whole(text)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number (27e9 and 524288 are)") from None
