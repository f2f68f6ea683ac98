"""The configuration: a model's sizes, presets, and frozen dataclasses whose fields are the options."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from minisobert.cli import check_options, flag, nearest, number, option, shown_default, whole_number, words

MOST_TOKENS = 1 << 24  # in a batch; with more, neighbouring heads would share dropout hashes


@dataclass(frozen=True)
class ModelConfig:
    """Sizes and constants of an encoder. Raises ValueError if they do not fit together."""

    layers: int
    hidden: int
    heads: int
    ffn: int  # features between the two matrices of the MLP
    vocabulary: int = 50_048  # 50,000 pieces, padded to a multiple of 128 on every layout
    positions: int = 2_048  # the longest document; megatron-bert has an embedding for each position
    norm_eps: float = 1e-5  # Megatron-LM's; the released SOBert configs say 1e-12
    gelu: str = "erf"  # or "tanh", the form that Megatron-LM fuses
    architecture: str = "megatron-bert"  # or "modernbert"
    # modernbert only: every global_every-th layer sees whole documents, the others at most `window` tokens away
    global_every: int = 3
    window: int = 64
    rope_base: float = 160_000.0  # of the global layers
    local_rope_base: float = 10_000.0

    def __post_init__(self):
        for name in ("layers", "hidden", "heads", "ffn", "vocabulary", "positions", "global_every", "window"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; it must be at least 1")
        divisors = [n for n in range(1, self.hidden + 1) if self.hidden % n == 0]
        if self.is_modern:  # rotary positions rotate pairs of features
            divisors = [n for n in divisors if self.hidden // n % 2 == 0]
        if self.heads not in divisors:
            even = " of even width, which rotary positions need" if self.is_modern else ""
            choices = words(nearest(divisors, self.heads)) if divisors else f"a multiple of {2 * self.heads} for hidden"
            raise ValueError(f"hidden {self.hidden} cannot be split over {self.heads} heads{even}; choose {choices}")

    @property
    def is_modern(self) -> bool:
        return self.architecture == "modernbert"

    @property
    def head_width(self) -> int:
        return self.hidden // self.heads

    def window_of(self, layer: int) -> int | None:
        """How far away, in tokens, a query sees keys in this layer; None: in its whole document."""
        return self.window if self.is_modern and layer % self.global_every else None

    def rope_base_of(self, layer: int) -> float:
        return self.rope_base if self.window_of(layer) is None else self.local_rope_base


_modern_model = partial(ModelConfig, positions=8_192, architecture="modernbert")

PRESETS = {
    "tiny": ModelConfig(layers=2, hidden=128, heads=2, ffn=512),
    "base": ModelConfig(layers=12, hidden=768, heads=12, ffn=3_072),
    "large": ModelConfig(layers=24, hidden=1_536, heads=16, ffn=6_144),
    "modern-tiny": _modern_model(layers=2, hidden=128, heads=2, ffn=352, window=16),
    "modern-small": _modern_model(layers=10, hidden=384, heads=6, ffn=576),
    "modern-base": _modern_model(layers=22, hidden=768, heads=12, ffn=1_152),
    "modern-large": _modern_model(layers=28, hidden=1_024, heads=16, ffn=2_624),
}

# The options that a recipe sets: the paper's, with Megatron-LM's BERT where the paper says nothing
PAPER = {
    "dropout": 0.1, "optimizer": "adamw", "learning_rate": 1e-4, "muon_learning_rate": 1e-3, "beta2": 0.999,
    "mask_rate": 0.15, "schedule": "linear", "warmup_fraction": 0.01, "decay_fraction": 0.2,
    "final_learning_rate_fraction": 0.1,
}  # fmt: skip
MODERN = {
    **PAPER, "dropout": 0.0, "optimizer": "muon", "learning_rate": 1e-3, "muon_learning_rate": 2e-3, "beta2": 0.98,
    "mask_rate": 0.3, "schedule": "wsd", "final_learning_rate_fraction": 0.0,
}  # fmt: skip
RECIPES = {
    **dict.fromkeys(PRESETS, PAPER), **dict.fromkeys(("modern-small", "modern-base", "modern-large"), MODERN),
    "modern-tiny": {**MODERN, "learning_rate": 8e-3, "muon_learning_rate": 8e-3, "warmup_fraction": 0.1},
}  # fmt: skip
BATCHES, OPTIMIZER = "batches, masks and precision", "optimizer and learning rate"  # headings of --help
SIZES = ("layers", "hidden", "heads", "ffn")
MODERN_SIZES = ("global_every", "window", "rope_base", "local_rope_base")


def padded_vocabulary(vocab_size: int) -> int:
    """The next multiple of 128: a matrix width that every layout can split and that is fast on matrix units."""
    return -(-vocab_size // 128) * 128


class Step(NamedTuple):
    """The rows that one optimizer step reads, the same on every layout, in `accumulation` micro-batches per process."""

    first_row: int  # in the global order
    rows: int
    tokens: int  # row positions: rows × row_tokens
    accumulation: int
    mask_rate: float  # share of the tokens to guess


def _two_numbers(text: str) -> tuple[str, str]:
    """Splits `131,072,1e9` into `131,072` and `1e9`. Raises ValueError unless there is exactly one way to do so."""
    commas = [at for at, letter in enumerate(text) if letter == ","]
    ((one, other),) = [p for at in commas if all(map(_is_number, p := (text[:at], text[at + 1 :])))]
    return one, other


def _is_number(text: str) -> bool:
    with suppress(ValueError, OverflowError):
        return whole_number(text) >= 0 and not re.match("0[0-9]", text)  # `000` of 1,000 is no number
    return False


def _of_preset(name: str, help: str, group: str = OPTIMIZER, **more):
    """An option whose default the preset decides."""
    shown = {"": PAPER[name], "modern presets: ": MODERN[name], "modern-tiny: ": RECIPES["modern-tiny"][name]}
    values = list(shown.values())  # each is shown only if it differs from the one before
    said = [f"{whose}{shown_default(v)}" for i, (whose, v) in enumerate(shown.items()) if i == 0 or v != values[i - 1]]
    return option(None, help, shown="; ".join(said), group=group, **more)


_data = partial(option, group="data")
_model = partial(option, group="model")
_size = partial(option, None, shown="the preset's", group="model")
_modern = partial(option, None, shown="the preset's", group="model, modern presets only")
_batch = partial(option, group=BATCHES)
_optimizer = partial(option, group=OPTIMIZER)
_layout = partial(option, group="layout and memory (these do not change the result)", resumable=True)
_run = partial(option, group="output, checkpoints and limits", resumable=True)
_plan = partial(option, group="estimates", resumable=True)


@dataclass(frozen=True)
class TrainConfig:
    """The options of a pre-training run. The defaults are SOBert's recipe, with Megatron-LM's BERT where it is silent.

    Whatever is counted in tokens counts row positions, as Megatron-LM does. The trajectory depends on every field
    except the resumable ones, and on what `data` and `init` hold.
    """

    data: str = _data("data/prepared", "folder with the training data, which data.prepare made", resumable=True)
    verify: bool = _data(False, "check the checksums of the data before training starts", resumable=True)
    row_tokens: int = _data(2_048, "tokens in a row; a longer document is cut into several parts", least=3)

    init: str = _model(
        "", "continue from the model of this run or Hugging Face folder; --preset then sets the recipe", resumable=True
    )
    preset: str = _model(
        "base", f"model and recipe: {words(PRESETS)}; other options change single numbers", choices=tuple(PRESETS)
    )
    layers: int = _size(help="number of transformer blocks", least=1)
    hidden: int = _size(help="width of the hidden states", least=1)
    heads: int = _size(help="number of attention heads in a block", least=1)
    ffn: int = _size(help="width inside the MLP of a block; of each of its two halves, if the MLP is gated", least=1)
    global_every: int = _modern(help="every N-th block sees whole documents, the others a window of tokens", least=1)
    window: int = _modern(help="how many tokens a window reaches to either side", least=1)
    rope_base: float = _modern(help="base of the rotary positions in blocks that see whole documents", above=1)
    local_rope_base: float = _modern(help="base of the rotary positions in blocks that see a window", above=1)
    gelu: str = _model("erf", "GELU: exact (erf), or as Megatron-LM approximates it (tanh)", choices=("erf", "tanh"))
    dropout: float = _of_preset(
        "dropout", "dropout rate of embeddings, attention and the two branches of a block", "model", least=0, below=1
    )

    seed: int = _batch(1, "random seed of the initial weights, shuffling, masking and dropout", least=0)
    train_tokens: int = _batch(27_000_000_000, "tokens to train on in total", least=1)
    tokens_per_batch: int = _batch(524_288, "tokens in one optimizer step, on all processes together", least=1)
    batch_schedule: str = _batch(
        "", "a growing batch instead of --tokens-per-batch: 0:131072,1e9:524288 uses 131,072 tokens until 1e9 have "
        "been read, then 524,288", metavar="AT:N,…",
    )  # fmt: skip
    optimizer: str = _of_preset(
        "optimizer", "AdamW, or Muon for the matrices of blocks and head, AdamW elsewhere", choices=("adamw", "muon")
    )
    learning_rate: float = _of_preset("learning_rate", "peak learning rate of AdamW", above=0, below=math.inf)
    muon_learning_rate: float = _of_preset(
        "muon_learning_rate", "peak learning rate of Muon; at the same rate its steps are as large as AdamW's",
        above=0, below=math.inf,
    )  # fmt: skip
    schedule: str = _of_preset(
        "schedule", "learning rate after the warm-up: it falls linearly to the end (linear), or stays at its peak "
        "until a final decay (wsd)", choices=("linear", "wsd"),
    )  # fmt: skip
    warmup_fraction: float = _of_preset(
        "warmup_fraction", "fraction of --train-tokens in which the learning rate rises to its peak", least=0, below=1
    )
    decay_fraction: float = _of_preset(
        "decay_fraction", "fraction of --train-tokens that the final decay of --schedule wsd takes", above=0, most=1
    )
    final_learning_rate_fraction: float = _of_preset(
        "final_learning_rate_fraction", "learning rate at the end, as a fraction of its peak", least=0, most=1
    )
    mask_rate: float = _of_preset("mask_rate", "fraction of the tokens that are masked", BATCHES, above=0, most=1)
    mask_schedule: str = _batch(
        "", "a mask rate that changes linearly, instead of --mask-rate: 0.3:0.15 falls to 0.15", metavar="FROM:TO"
    )
    weight_decay: float = _optimizer(0.01, "weight decay of all parameters except biases and layer norms", least=0)
    beta1: float = _optimizer(0.9, "decay rate of AdamW's running mean of the gradients", least=0, below=1)
    muon_momentum: float = _optimizer(0.95, "decay rate of Muon's running mean of the gradients", least=0, below=1)
    beta2: float = _of_preset("beta2", "decay rate of AdamW's running mean of squared gradients", least=0, below=1)
    clip: float = _optimizer(1.0, "largest norm of the gradient; a larger one is scaled down", above=0, below=math.inf)
    loss_average: str = _batch(
        "token", "average the loss over all masked tokens of a batch (token), or within each micro-batch and then over "
        "these, as Megatron-LM does (micro-batch)", choices=("token", "micro-batch"),
    )  # fmt: skip
    precision: str = _batch(
        "auto", "precision of weights and activations: auto is bf16 on GPUs and fp32 on CPUs; bf16-products, for CPUs "
        "that support it, rounds only the inputs of matrix products; master weights are always fp32",
        choices=("auto", "fp32", "bf16", "bf16-products"),
    )  # fmt: skip

    micro_batch_rows: int = _layout(8, "rows in one forward pass of one process", least=1)
    tensor_parallel: int = _layout(1, "number of processes that share one copy of the model", least=1)
    sequence_parallel: bool = _layout(False, "with --tensor-parallel: split layer norms and dropout too, by tokens")
    shard_optimizer: bool = _layout(False, "split the optimizer's state over the data-parallel processes")
    recompute: bool = _layout(False, "save memory: store only the input of each block, and repeat its forward pass")

    out: str = _run("runs/base", "folder of the run; if it holds one already, that run is resumed")
    fresh: bool = _run(False, "discard the checkpoints in --out and start over")
    eval_every_tokens: int = _run(262_144_000, "measure the loss on held-out documents after every N tokens", least=1)
    eval_rows: int = _run(512, "held-out rows in one such measurement, at most", least=1)
    checkpoint_every_tokens: int = _run(524_288_000, "save a checkpoint after every N tokens", least=1)
    keep_checkpoints: int = _run(2, "number of latest checkpoints to keep; the best one is kept as well", least=1)
    max_skipped: int = _run(10, "end the run if the gradient is not finite for more than N steps in a row", least=0)
    timeout: float = _run(600.0, "seconds to wait for another process before the job gives up", above=0, below=math.inf)
    price_per_gpu_hour: float = _run(0.0, "dollars per GPU and hour, from which the cost is reported", least=0)
    tensorboard: bool = _run(False, "also write the figures of metrics.jsonl for TensorBoard, to OUT/tensorboard")

    plan: bool = _plan(False, "print memory, time and cost of the layouts that fit, without training")
    gpu: str = _plan("H100", "kind of GPU that --plan assumes", metavar="NAME")
    gpus: int = _plan(8, "number of GPUs that --plan assumes", least=1)
    mfu: float = _plan(0.4, "fraction of a GPU's peak FLOP/s that --plan assumes training to use", above=0, most=1)

    def __post_init__(self):
        self._settle()
        check_options(self)
        model = PRESETS[self.preset]
        others = [name for name in MODERN_SIZES if getattr(self, name) != getattr(model, name)]
        if self.init:
            if given := [name for name in (*SIZES, *MODERN_SIZES) if getattr(self, name) is not None]:
                raise ValueError(f"{flag(given[0])} cannot be changed in the model of --init; leave it out")
        elif others and not model.is_modern:
            raise ValueError(f"{flag(others[0])} is for modern presets, and --preset is {self.preset}; leave it out")
        else:
            self._check_row(self._sized(), self.preset)  # checks the sizes, too
        if self.schedule == "wsd" and self.warmup_fraction + self.decay_fraction > 1:
            raise ValueError(
                f"--warmup-fraction {self.warmup_fraction:g} and --decay-fraction {self.decay_fraction:g} add up to "
                "more than the whole run; choose fractions whose sum is at most 1"
            )
        self.mask_rate_after(0)
        if (largest := max(size for _, size in self.batch_ramp)) > MOST_TOKENS:
            raise ValueError(f"a batch has {largest:,} row positions; dropout can count {MOST_TOKENS:,} at most")

    def _check_row(self, model: ModelConfig, whose: str) -> None:
        if not model.is_modern and self.row_tokens > model.positions:
            raise ValueError(
                f"--row-tokens is {self.row_tokens:,}, and {whose} has a table of {model.positions:,} positions; "
                f"choose {model.positions:,} or less, or a modern preset, which needs no such table"
            )

    def _settle(self) -> None:
        """Takes every option that was left out from the preset; with --init the sizes stay None."""
        if self.preset in PRESETS:
            sizes = {} if self.init else dataclasses.asdict(PRESETS[self.preset])
            for name, value in {**sizes, **RECIPES[self.preset]}.items():
                if getattr(self, name, value) is None:
                    object.__setattr__(self, name, value)

    @property
    def name(self) -> str:
        return self.init.rstrip("/").rpartition("/")[2] or self.preset

    @property
    def batch_ramp(self) -> list[tuple[int, int]]:
        """Pairs, in order: (consumed row positions from which it applies, row positions per optimizer step)."""
        if not self.batch_schedule:
            return [(0, self.tokens_per_batch)]
        try:
            first, *between, last = self.batch_schedule.split(":")
            texts = [first, *(text for size_and_start in between for text in _two_numbers(size_and_start)), last]
            numbers = [whole_number(text) for text in texts]
            starts, sizes = numbers[::2], numbers[1::2]
        except (ValueError, OverflowError):
            starts, sizes = [], []
        if not starts or starts[0] != 0 or starts != sorted(set(starts)) or min(sizes) < 1:
            raise ValueError(
                f"--batch-schedule is {self.batch_schedule!r}; it must be pairs of row positions read and row "
                "positions a step, beginning with 0 and increasing: 0:131072,1e9:524288"
            )
        return list(zip(starts, sizes))

    def batch_sizes(self, consumed: int = 0) -> Iterator[tuple[int, int]]:
        """Yields (row positions consumed before it, row positions in it) for each step after `consumed`."""
        ramp = self.batch_ramp
        while consumed < self.train_tokens:
            size = next(size for start, size in reversed(ramp) if start <= consumed)
            yield consumed, size
            consumed += size

    def steps(self, data_parallel: int, consumed: int = 0) -> Iterator[Step]:
        """The steps after `consumed` row positions. Call `check` first: batches must divide evenly."""
        for before, tokens in self.batch_sizes(consumed):
            accumulation = self.accumulation(tokens, data_parallel)
            rows, mask_rate = tokens // self.row_tokens, self.mask_rate_after(before)
            yield Step(before // self.row_tokens, rows, tokens, accumulation, mask_rate)

    def mask_rate_after(self, consumed: int) -> float:
        """The mask rate of the step after `consumed` row positions. Unlike the learning rate, it depends on the place
        in the data and not on applied steps: masks are made ahead, before it is known which steps are skipped."""
        if not self.mask_schedule:
            return self.mask_rate
        try:
            first, last = (number(text) for text in self.mask_schedule.split(":"))
        except ValueError:
            first = last = 0
        if not (0 < first <= 1 and 0 < last <= 1):
            raise ValueError(
                f"--mask-schedule is {self.mask_schedule!r}; it must be the rates to begin and to end with, each "
                "more than 0 and at most 1, as in 0.3:0.15"
            )
        return first + (last - first) * min(consumed / self.train_tokens, 1)

    def model_config(self, vocab_size: int, init: ModelConfig | None = None) -> ModelConfig:
        """The model for a tokenizer of vocab_size pieces, or the one of --init for rows of this length."""
        if init:
            self._check_row(init, self.init)
        model = init or dataclasses.replace(self._sized(), vocabulary=padded_vocabulary(vocab_size), gelu=self.gelu)
        return dataclasses.replace(model, positions=self.row_tokens) if model.is_modern else model

    def _sized(self) -> ModelConfig:
        sizes = {name: getattr(self, name) for name in (*SIZES, *MODERN_SIZES)}
        return dataclasses.replace(PRESETS[self.preset], **sizes)

    def accumulation(self, tokens_per_batch: int, data_parallel: int, most: float = math.inf) -> int:
        """Micro-batches of each process in one step.

        Raises ValueError if tokens_per_batch does not divide evenly, or is more than the `most` tokens of an epoch.
        """
        per_pass = self.micro_batch_rows * self.row_tokens * data_parallel
        if tokens_per_batch % per_pass == 0 and tokens_per_batch <= most:
            return tokens_per_batch // per_pass
        if tokens_per_batch <= most:
            problem = (
                f"tokens_per_batch = micro_batch_rows × row_tokens × data_parallel × accumulation does not divide: "
                f"{tokens_per_batch:,} = {self.micro_batch_rows} × {self.row_tokens:,} × {data_parallel} × "
                f"{tokens_per_batch / per_pass:.4g}"
            )
        else:
            problem = f"{self.data} packs into {most // self.row_tokens:,} rows, fewer than the " + (
                f"{tokens_per_batch / self.row_tokens:,.4g} of one batch"
            )
        raise ValueError(f"{problem}; choose {', or '.join(self._advice(data_parallel, most))}")

    def _advice(self, data_parallel: int, most: float) -> list[str]:
        """Options, each of which makes all batches divide evenly and fit into the `most` tokens of an epoch."""
        most = min(most, MOST_TOKENS)
        row, sizes = self.row_tokens * data_parallel, [size for _, size in self.batch_ramp]  # row: one per process
        fits = max(sizes) <= most
        most = most if fits else min(most, max(most // 100, row))  # a hundred steps in an epoch, if possible, not one
        choices = self.near_batches(self.micro_batch_rows * row, most)
        rows, rest = divmod(math.gcd(*sizes), row)
        if fits and not rest:
            divisors = [n for n in range(1, rows + 1) if rows % n == 0]
            choices.append(f"--micro-batch-rows {words(nearest(divisors, self.micro_batch_rows))}")
        choices = choices or [f"--micro-batch-rows 1 with {batches}" for batches in self.near_batches(row, most)]
        processes = [] if choices else [f"at most {int(most) // self.row_tokens * self.tensor_parallel} processes"]
        return choices + processes + ([] if fits and choices else ["more text for data.prepare"])

    def near_batches(self, unit: int, most: float = math.inf) -> list[str]:
        """The option for batches near those given: multiples of `unit`, at most `most` tokens; [] if there are none."""
        most = int(min(most, MOST_TOKENS)) // unit * unit
        if not most:
            return []
        near = []  # the next smaller and the next larger sizes
        for rounded in (math.floor, math.ceil):
            sizes = [min(max(rounded(size / unit) * unit, unit), most) for _, size in self.batch_ramp]
            starts = [start for start, _ in self.batch_ramp]
            pairs = ",".join(f"{start}:{size}" for start, size in zip(starts, sizes))
            near.append(pairs if self.batch_schedule else f"{sizes[0]:,}")
        option = "--batch-schedule" if self.batch_schedule else "--tokens-per-batch"
        return [f"{option} {words(dict.fromkeys(near))}"]

    def check(self, rows: int, data_parallel: int) -> None:
        """Raises ValueError if a batch does not divide over the layout or is larger than an epoch of `rows` rows."""
        for _, tokens_per_batch in self.batch_ramp:
            self.accumulation(tokens_per_batch, data_parallel, most=rows * self.row_tokens)

    def resumable_fields(self) -> set[str]:
        return {f.name for f in dataclasses.fields(self) if f.metadata["resumable"]}
