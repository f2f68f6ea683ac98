"""attention.png, bandwidth.png, training.png: groups of bars, in each a bar per implementation."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import matplotlib

from benchmarks.gpu.records import Records
from benchmarks.gpu.report import DIRECTIONS, against_copy, number

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = {  # in the order of the bars; ours stands out
    "minisobert": "#d1495b", "minisobert, dropout 0.1": "#eaa4ad",
    "sdpa-cudnn": "#00798c", "sdpa-flash": "#30638e", "sdpa-efficient": "#8fb8de", "varlen": "#003d5b",
    "flex": "#edae49", "eager": "#8fb8de", "eager-bf16": "#8fb8de", "eager-fp32": "#30638e", "compiled": "#00798c",
    "compiled-fp32": "#00798c", "layer_norm": "#aaaaaa", "ModernBert": "#00798c", "MegatronBert": "#8fb8de",
}  # fmt: skip
Bar = tuple[str, str, str, float, str]  # panel, group in it, implementation, height, label


def attention(records: Records) -> Iterator[Bar]:
    for (width, lengths, dropout, name), result in records.results("attention").items():
        if dropout == "0.0" or name == "minisobert":
            shown = name if dropout == "0.0" else f"{name}, dropout {dropout}"
            for direction in DIRECTIONS:
                speed = result[f"{direction}_tflops"]
                yield f"{lengths}, {direction}", f"d = {width}", shown, speed, number(speed)


def bandwidth(records: Records) -> Iterator[Bar]:
    for (operation, width, dropout, name), result in against_copy(records):
        group = f"{operation} {width}" + f"\ndropout {dropout}" * bool(dropout)
        for direction in DIRECTIONS:
            if share := result[f"{direction}_share"]:
                yield direction, group, name, 100 * share, f"{share:.0%}"


def training(records: Records) -> Iterator[Bar]:
    for (preset, lengths, dropout, name), result in records.results("training").items():
        speed = result["micro_batch_tokens_per_second"] / 1e3
        mfu = f", MFU {result['mfu']:.0%}" if result.get("mfu") else ""
        yield preset, f"{lengths}\ndropout {dropout}", name, speed, f"{number(speed)}{mfu}"


FIGURES = {  # by file: bars, title, unit, panels side by side (those below each other share an axis), dotted lines
    "attention": (attention, "Attention in bf16, dropout 0 unless it says otherwise",
                  "TFLOP/s on visible pairs", 2, []),
    "bandwidth": (bandwidth, "What memory bounds, in bf16 (dotted: 85 %, layer norm's goal, and 100 %; "
                  "cross_entropy's backward with its forward)", "% of measured copy bandwidth", 1, [85, 100]),
    "training": (training, "Training on one GPU, bf16 (bars leave out the optimizer; MFU is that of whole steps)",
                 "thousand real tokens/s in micro-batches", 2, []),
}  # fmt: skip


def write(records: Records, folder: Path) -> None:
    """Draws what has been measured; no file where that is nothing."""
    machine = "; ".join(records.machine[name] for name in ("chip", "versions", "date"))
    for file, (bars, title, unit, columns, lines) in FIGURES.items():
        panels = defaultdict(lambda: defaultdict(dict))
        for panel, group, name, *bar in bars(records):
            panels[panel][group][name] = bar
        if not panels:
            continue
        columns = min(columns, len(panels))
        rows = math.ceil(len(panels) / columns)
        figure, grid = plt.subplots(rows, columns, figsize=(12, 1 + 3.5 * rows), layout="constrained",
                                    sharey="col", squeeze=False)  # fmt: skip
        for axes, (panel, groups) in zip(grid.flat, panels.items()):
            _draw(axes, groups)
            axes.set(title=panel, ylabel=unit)
            for y in lines:
                axes.axhline(y, color="black", linewidth=0.8, linestyle=":", zorder=0)
        handles = {label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels())}
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=7, frameon=False, fontsize=9)
        figure.suptitle(f"{title}\n{machine}", fontsize=11)
        if records.dry:
            figure.text(0.5, 0.5, "DRY RUN\ntoy sizes on a CPU:\nno figure means anything", ha="center", va="center",
                        fontsize=40, color="red", alpha=0.18, rotation=20)  # fmt: skip
        figure.savefig(folder / f"{file}.png", dpi=130)
        plt.close(figure)


def _draw(axes, groups: dict[str, dict[str, tuple[float, str]]]) -> None:
    width = 0.84 / max(map(len, groups.values()))
    for x, bars in enumerate(groups.values()):
        for i, name in enumerate(sorted(bars, key=list(COLORS).index)):
            (height, label), at = bars[name], x + (i - (len(bars) - 1) / 2) * width
            bar = axes.bar(at, height, width * 0.92, color=COLORS[name], label=name)
            axes.bar_label(bar, [label], rotation=90, padding=2, fontsize=7.5)
    axes.set_xticks(range(len(groups)), groups)
    axes.margins(y=0.35)  # room for the labels
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
