"""attention.png, bandwidth.png, training.png: groups of bars, in each a bar per implementation."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import matplotlib

from benchmarks.gpu.records import Records
from benchmarks.gpu.report import DIRECTIONS, against_copy, number
from benchmarks.gpu.setting import DROPOUTS, LENGTHS

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import to_rgb

COLORS = {  # in the order of the bars; ours stands out
    "minisobert": "#d1495b", "minisobert, dropout 0.1": "#eaa4ad",
    "sdpa-cudnn": "#00798c", "sdpa-flash": "#30638e", "sdpa-efficient": "#8fb8de", "varlen": "#003d5b",
    "flex": "#edae49", "eager": "#8fb8de", "eager-bf16": "#8fb8de", "eager-fp32": "#30638e", "compiled": "#00798c",
    "compiled-fp32": "#00798c", "layer_norm": "#aaaaaa", "ModernBert": "#00798c", "MegatronBert": "#8fb8de",
}  # fmt: skip


def write(records: Records, folder: Path) -> None:
    for name, draw in (("attention", _attention), ("bandwidth", _bandwidth), ("training", _training)):
        if (figure := draw(records)) is None:
            continue
        machine = f"{records.machine['chip']}, torch {records.machine['torch']}, {records.machine['date']}"
        figure.suptitle(f"{figure.get_suptitle()}\n{machine}", fontsize=11)
        if records.dry:
            figure.text(0.5, 0.5, "DRY RUN\ntoy sizes on a CPU:\nno figure means anything", ha="center", va="center",
                        fontsize=40, color="red", alpha=0.18, rotation=20)  # fmt: skip
        figure.savefig(folder / f"{name}.png", dpi=130)
        plt.close(figure)


def _draw(title: str, size: tuple[float, float], grid: list[list[tuple]]):
    """grid: rows of panels, each (title, unit, {group: {implementation: (height, label)}}). Those of a column share
    their axis. None where there is nothing to draw."""
    if not any(groups for row in grid for *_, groups in row):
        return None
    figure, axes = plt.subplots(len(grid), len(grid[0]), figsize=size, layout="constrained", squeeze=False)
    for column, panels in zip(axes.T, zip(*grid)):
        top = max(height for *_, groups in panels for bars in groups.values() for height, _ in bars.values())
        for panel, (name, unit, groups) in zip(column, panels):
            _bars(panel, groups, top)
            panel.set(title=name, ylabel=unit)
    handles = {label: handle for panel in axes.flat for handle, label in zip(*panel.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=7, frameon=False, fontsize=9)
    figure.suptitle(title)
    return figure


def _bars(axes, groups: dict[str, dict[str, tuple[float, str]]], top: float) -> None:
    """On an axis that ends above `top`. Labels stand upright in the bars, or on top of short ones."""
    width = 0.84 / max(map(len, groups.values()), default=1)
    for x, bars in enumerate(groups.values()):
        for i, name in enumerate(sorted(bars, key=list(COLORS).index)):
            (height, label), at = bars[name], x + (i - (len(bars) - 1) / 2) * width
            axes.bar(at, height, width * 0.92, color=COLORS[name], label=name)
            inside = height > 0.35 * top
            axes.text(at, height * 0.97 if inside else height + 0.02 * top, label, rotation=90, ha="center",
                      va="top" if inside else "bottom", fontsize=7.5,
                      color="white" if inside and sum(to_rgb(COLORS[name])) < 1.8 else "black")  # fmt: skip
    axes.set_xticks(range(len(groups)), groups)
    axes.set(xlim=(-0.5, len(groups) - 0.5), ylim=(0, 1.08 * top))
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _attention(records: Records):
    found = records.results("attention")
    panels = {(lengths, direction): defaultdict(dict) for lengths in LENGTHS for direction in DIRECTIONS}
    for width, lengths, dropout, name in sorted(found, key=lambda key: int(key[0])):
        if dropout == "0.0" or name == "minisobert":
            shown = name if dropout == "0.0" else f"{name}, dropout {dropout}"
            for direction in DIRECTIONS:
                speed = found[width, lengths, dropout, name][f"{direction}_tflops"]
                panels[lengths, direction][f"d = {width}"][shown] = speed, number(speed)
    grid = [[(f"{lengths}, {direction}", "TFLOP/s on visible pairs", panels[lengths, direction])
             for direction in DIRECTIONS] for lengths in LENGTHS]  # fmt: skip
    return _draw("Attention in bf16, dropout 0 unless it says otherwise", (12, 8), grid)


def _bandwidth(records: Records):
    panels = {direction: defaultdict(dict) for direction in DIRECTIONS}
    for (operation, width, dropout, name), result in against_copy(records):
        group = f"{operation} {width}" + f"\ndropout {dropout}" * bool(dropout)
        for direction in DIRECTIONS:
            if share := result[f"{direction}_share"]:
                panels[direction][group][name] = 100 * share, f"{share:.0%}"
    grid = [[(direction, "% of measured copy bandwidth", groups)] for direction, groups in panels.items()]
    title = "What memory bounds, in bf16 (dotted: 85 %, layer norm's goal; cross_entropy's backward with its forward)"
    if figure := _draw(title, (12, 8), grid):
        for axes in figure.axes:
            axes.axhline(100, color="black", linewidth=0.8)
            axes.axhline(85, color="black", linewidth=0.8, linestyle=":")
    return figure


def _training(records: Records):
    found = records.results("training")
    panels = {preset: defaultdict(dict) for preset, *_ in found}
    for preset, groups in panels.items():
        for dropout in map(str, DROPOUTS):
            for lengths in LENGTHS:
                for name in ("minisobert", "ModernBert", "MegatronBert"):
                    if result := found.get((preset, lengths, dropout, name)):
                        speed = result["micro_batch_tokens_per_second"] / 1e3
                        mfu = f", MFU {result['mfu']:.0%}" if result.get("mfu") else ""
                        groups[f"{lengths}\ndropout {dropout}"][name] = speed, f"{number(speed)}{mfu}"
    grid = [[(preset, "thousand real tokens/s in micro-batches", groups) for preset, groups in panels.items()]]
    title = "Training on one GPU, bf16 (bars leave out the optimizer; MFU is that of whole steps)"
    return _draw(title, (6 * len(panels), 5), grid)
