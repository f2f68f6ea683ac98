"""What each part of the modern recipe is worth: `python -m benchmarks.recipe --data NAME=SHARDS [NAME=SHARDS …]`.

Each arm trains two-layer models to the end of its schedule: first with one seed at each of RATES times the arm's
learning rates, then with the other SEEDS at the best of them. Losses are those on held-out rows with 15 % masked,
whatever the mask rate of training. Finished runs are not repeated, so an interrupted benchmark continues where it was.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks import RESULTS, machine, parser, shards, show
from minisobert.cli import flag, table
from minisobert.config import RECIPES
from minisobert.corpus.shards import Shards
from minisobert.plot import moving_mean, pyplot
from minisobert.training.run import read_metrics

RATES = (0.5, 1.0, 2.0, 4.0)  # factors for an arm's own rates
SEEDS = (1, 2, 3)
FEWER = (10, 12)  # the modern recipe gets this many times fewer tokens to reach the loss of the paper's
ROW = 2_048  # tokens in a row, and in a batch, for as many steps as the budget allows
# What the demo used with the paper's model in place of the paper's values: for a small model, few tokens, one epoch
SMALL = {"dropout": 0.0, "warmup_fraction": 0.1, "beta2": 0.98}
PAPER_RATE, PAPER_MUON = 1e-3, 4e-3  # AdamW's, which the demo used, and Muon's


@dataclass(frozen=True)
class Arm:
    """A recipe to measure. options: those of train.py; expected: what was predicted before the first run."""

    name: str
    options: dict
    expected: str

    @property
    def rates(self) -> tuple[float, float]:
        """The learning rates of AdamW and Muon, which are scaled together."""
        recipe = RECIPES[self.options["preset"]] | self.options
        return recipe["learning_rate"], recipe["muon_learning_rate"]


TINY = {"preset": "tiny", **SMALL, "learning_rate": PAPER_RATE, "muon_learning_rate": PAPER_MUON}
MODERN = {"preset": "modern-tiny"}
PAPER = Arm("paper's recipe, own rate", TINY, "")
BEST = Arm("modern", MODERN, "")
# From the paper's recipe to the modern one, one part at a time
STEPS = (
    PAPER,
    Arm("+ 30 % masks", {**TINY, "mask_rate": 0.3}, "a little: the plateau is left sooner"),
    Arm("+ Muon", {**TINY, "mask_rate": 0.3, "optimizer": "muon", "schedule": "wsd",
                   "final_learning_rate_fraction": 0.0, "learning_rate": 4e-3}, "0.5 nats"),
    Arm("modern architecture, AdamW", {**MODERN, "optimizer": "adamw", "learning_rate": 2e-3},
        "0.5 nats below the paper's: rotary positions"),
    BEST,
)  # fmt: skip
# The modern recipe with one part left out or replaced
WITHOUT = (
    Arm("15 % masks", {**MODERN, "mask_rate": 0.15}, "0.4 worse"),
    Arm("masks from 40 to 15 %", {**MODERN, "mask_schedule": "0.4:0.15"}, "no difference"),
    Arm("no window", {**MODERN, "global_every": 1}, "0.2 worse"),
    Arm("AdamW at half of Muon's rate", {**MODERN, "learning_rate": 4e-3}, "no difference"),
    Arm("linear decay", {**MODERN, "schedule": "linear"}, "0.1 worse"),
    Arm("dropout 0.1", {**MODERN, "dropout": 0.1}, "0.3 worse"),
    Arm("two rows a step", {**MODERN, "tokens_per_batch": 2 * ROW}, "0.5 worse: half the steps"),
)  # fmt: skip


@dataclass(frozen=True)
class Finished:
    folder: Path
    scale: float  # factor for the rates
    seed: int
    loss: float  # held out, in nats
    right: float  # share of held-out masked tokens
    seconds: float  # in training steps, without evaluations


def run(data: Shards, arm: Arm, scale: float, seed: int, tokens: int, out: Path) -> Finished:
    """Trains once, in a process of its own with one thread."""
    adam, muon = arm.rates
    options = {
        "tokens_per_batch": ROW, "micro_batch_rows": 1, **arm.options, "learning_rate": adam * scale,
        "muon_learning_rate": muon * scale, "seed": seed, "train_tokens": tokens, "row_tokens": ROW,
        "eval_rows": 32, "eval_every_tokens": max(tokens // 4, ROW), "checkpoint_every_tokens": tokens,
    }  # fmt: skip
    name = "".join(c if c.isalnum() else "-" for c in f"{arm.name} {tokens} x{scale:g} seed{seed}")
    folder = out / name
    done = folder / "finished.json"
    if not (done.exists() and json.loads(done.read_text())["options"] == options):
        words = [word for key, value in options.items() for word in (flag(key), str(value))]
        command = [sys.executable, "train.py", "--data", str(data.folder), "--out", str(folder), "--fresh", *words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        process = subprocess.run(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        if process.returncode:
            raise ValueError(f"{' '.join(command)} failed: {process.stderr[-500:]}")
        for checkpoint in (folder / "checkpoints").glob("*/*"):
            checkpoint.unlink()  # a hundred runs have 20 MB each; only their curves are kept
        done.write_text(json.dumps({"options": options}))
    last = read_metrics(folder)[-1]
    loss, right = last["validation_loss"] or math.inf, last["validation_accuracy"]
    return Finished(folder, scale, seed, loss, right, sum(step_seconds(folder)))


def step_seconds(folder: Path) -> list[float]:
    """The seconds of each step of a run."""
    lines = read_metrics(folder)
    real = np.diff([0] + [line["tokens"] for line in lines])
    return [n / line["tokens_per_second"] for n, line in zip(real, lines)]


@dataclass(frozen=True)
class Result:
    arm: Arm
    tokens: int
    tried: list[Finished]  # at each rate, with the first seed
    best: list[Finished]  # with each seed, at the best rate

    @property
    def loss(self) -> float:
        return statistics.mean(each.loss for each in self.best)

    @property
    def seconds(self) -> float:
        return statistics.mean(each.seconds for each in self.best)

    def cells(self, corpus: Corpus) -> list[str]:
        deviation = f" ± {statistics.stdev(each.loss for each in self.best):.2f}" if len(self.best) > 1 else ""
        right = statistics.mean(each.right for each in self.best)
        return [
            self.arm.name, f"{self.tokens / 1e6:.2f}", ", ".join(f"{each.loss:.2f}" for each in self.tried),
            " / ".join(f"{rate * self.best[0].scale:g}" for rate in self.arm.rates), f"{self.loss:.2f}{deviation}",
            f"{corpus.bits_per_byte(self.loss):.2f}", f"{right:.1%}",
            f"{self.seconds:.0f}", self.arm.expected,
        ]  # fmt: skip


COLUMNS = (
    "arm", "million positions", "loss at each rate, one seed", "best rates: AdamW / Muon", "held-out loss, nats",
    "bits per byte", "right", "seconds in steps", "expected",
)  # fmt: skip


class Corpus:
    def __init__(self, name: str, data: Shards):
        self.name, self.data = name, data
        counts = np.bincount(data.tokens, minlength=data.vocab_size)
        share = counts[counts > 0] / counts.sum()
        self.entropy = float(-(share * np.log(share)).sum())
        held_out = data.validation_documents
        first, last = data.offsets[held_out.start], data.offsets[held_out.stop]
        tokenizer = data.tokenizer()
        texts = (data.tokens[data.offsets[i] : data.offsets[i + 1]] for i in held_out)
        self.bytes_per_piece = sum(len(tokenizer.decode(ids).encode()) for ids in texts) / (last - first)

    def bits_per_byte(self, nats: float) -> float:
        return nats / math.log(2) / self.bytes_per_piece


def measure(corpus: Corpus, arms: list[tuple[Arm, int]], out: Path, jobs: int) -> list[Result]:
    """The result of each arm, trained on the number of tokens beside it."""
    with ThreadPoolExecutor(jobs) as pool:

        def submit(arm: Arm, tokens: int, scale: float, seed: int):
            return pool.submit(run, corpus.data, arm, scale, seed, tokens, out / corpus.name)

        tried = [[submit(arm, tokens, scale, SEEDS[0]) for scale in RATES] for arm, tokens in arms]
        results = []
        for (arm, tokens), futures in zip(arms, tried):
            finished = [future.result() for future in futures]
            best = min(finished, key=lambda each: each.loss)
            others = [submit(arm, tokens, best.scale, seed) for seed in SEEDS[1:]]
            results.append((arm, tokens, finished, best, others))
        return [Result(a, n, f, [b, *(each.result() for each in o)]) for a, n, f, b, o in results]


def draw(results: list[Result], corpus: Corpus, path: Path) -> None:
    """Draws the curves of one seed at the best rate of each arm, over positions and over seconds in steps."""
    plt = pyplot()
    figure, both = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained", sharey=True)
    for i, result in enumerate(results):
        run, lines = result.best[0], read_metrics(result.best[0].folder)
        positions = [line["positions"] for line in lines]
        held_out = [(n, line["validation_loss"]) for n, line in zip(positions, lines) if "validation_loss" in line]
        loss = moving_mean([line["loss"] for line in lines], max(len(lines) // 50, 1))
        label = f"{result.arm.name}, {result.tokens / 1e6:.2f} M"
        for axes, unit in zip(both, (1e-6, run.seconds / positions[-1])):
            axes.plot([n * unit for n in positions], loss, color=f"C{i}", alpha=0.3, linewidth=1)
            axes.plot([n * unit for n, _ in held_out], [y for _, y in held_out], "o-", color=f"C{i}", markersize=3,
                      linewidth=1.2, label=label)  # fmt: skip
    for axes, unit in zip(both, ("million row positions", "seconds in training steps, one thread")):
        axes.axhline(corpus.entropy, color="black", linewidth=1, linestyle=":", label="unigram entropy")
        axes.set(xlabel=unit)
        axes.grid(alpha=0.3)
    both[0].set(ylabel="masked-LM loss (nats): held out; pale: training", title=corpus.name)
    both[1].legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)


def named(text: str) -> tuple[str, Shards]:
    name, _, folder = text.partition("=")
    if not folder:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=SHARDS, as in standard-library=runs/demo/data")
    return name, shards(folder)


def main() -> None:
    command = parser("recipe", "--data stdlib=runs/demo/data", "Repeat the command to continue after an interruption.")
    command.add_argument(
        "--data", type=named, nargs="+", required=True, metavar="NAME=SHARDS",
        help="corpora: for each a name, and the folder that data.prepare wrote",
    )  # fmt: skip
    command.add_argument("--out", type=Path, default=Path("runs/recipe"), metavar="PATH", help="folder for the runs")
    command.add_argument("--tokens", type=int, default=614_400, metavar="N", help="tokens to train most recipes on")
    command.add_argument(
        "--long", type=int, default=3_072_000, metavar="N",
        help="tokens to train the paper's recipe on, for a loss that the modern one has to reach sooner",
    )  # fmt: skip
    command.add_argument(
        "--jobs", type=int, default=os.cpu_count(), metavar="N", help="runs at the same time (default: one per core)"
    )
    command.add_argument(
        "--ablations", nargs="+", default=[], metavar="NAME",
        help="corpora on which the modern recipe is also measured with one thing changed",
    )  # fmt: skip
    options = command.parse_args()
    lines = [
        "# The modern recipe beside the paper's", "",
        f"`python -m benchmarks.recipe` on {machine('torch', 'numpy')}. Two layers of 128; one row of {ROW:,} "
        f"positions a step; {len(RATES)} rates for each arm, {len(SEEDS)} seeds at the best: mean ± deviation.",
    ]  # fmt: skip
    for name, data in options.data:
        corpus = Corpus(name, data)
        budgets = [(PAPER, options.long), *((BEST, options.long // n // ROW * ROW) for n in FEWER)]
        results = measure(corpus, budgets + [(arm, options.tokens) for arm in STEPS], options.out, options.jobs)
        race = results[: len(budgets)]
        lines += [
            "", f"## {name}", "",
            f"{data.meta['documents']:,} documents, {len(data.tokens):,} pieces, unigram entropy {corpus.entropy:.2f}.",
            "", *(
                f"- With {each.tokens / options.long:.3f} of the positions and {each.seconds / race[0].seconds:.3f} of "
                f"the seconds: {each.loss - race[0].loss:+.2f} nats beside the paper's recipe." for each in race[1:]
            ), "",
            *table(COLUMNS, [result.cells(corpus) for result in results]),
        ]  # fmt: skip
        if name in options.ablations:  # with a tenth of the paper's tokens, as in the claim
            without = measure(corpus, [(arm, race[1].tokens) for arm in WITHOUT], options.out, options.jobs)
            lines += ["", "The modern recipe with one thing changed:", ""]
            lines += table(COLUMNS, [result.cells(corpus) for result in (race[1], *without)])
        picture = RESULTS / "recipe" / f"{name}.png" if options.write else options.out / f"{name}.png"
        picture.parent.mkdir(parents=True, exist_ok=True)
        draw(results, corpus, picture)
        lines += ["", f"![loss over positions and seconds](recipe/{name}.png)"]
    show(lines, "recipe", options.write)


if __name__ == "__main__":
    main()
