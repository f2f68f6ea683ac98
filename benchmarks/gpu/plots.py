"""attention.png, bandwidth.png, training.png."""

from __future__ import annotations

from pathlib import Path

import matplotlib

from benchmarks.gpu.records import Records
from benchmarks.gpu.report import shares
from benchmarks.gpu.words import called, number

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.colors import to_rgb

COLORS = {  # ours stands out
    "minisobert": "#d1495b", "minisobert, dropout 0.1": "#eaa4ad",
    "sdpa-cudnn": "#00798c", "sdpa-flash": "#30638e", "sdpa-efficient": "#8fb8de", "varlen": "#003d5b",
    "flex": "#edae49", "eager": "#8fb8de", "eager-bf16": "#8fb8de", "eager-fp32": "#30638e", "compiled": "#00798c",
    "compiled-fp32": "#00798c", "layer_norm": "#aaaaaa", "ModernBert": "#00798c", "MegatronBert": "#8fb8de",
}  # fmt: skip


def write(records: Records, folder: Path) -> None:
    for name, draw in (("attention", _attention), ("bandwidth", _bandwidth), ("training", _training)):
        figure = draw(records)
        if figure is None:
            continue
        machine = f"{records.machine['chip']}, torch {records.machine['torch']}, {records.machine['date']}"
        figure.suptitle(f"{figure.get_suptitle()}\n{machine}", fontsize=11)
        if records.dry:
            figure.text(0.5, 0.5, "DRY RUN\ntoy sizes on a CPU:\nno figure means anything", ha="center", va="center",
                        fontsize=40, color="red", alpha=0.18, rotation=20)  # fmt: skip
        figure.savefig(folder / f"{name}.png", dpi=130)
        plt.close(figure)


def _bars(axes, groups: list[str], series: dict[str, list], labels: dict[str, list[str]], top: float) -> None:
    """Groups of vertical bars, one of each series, on an axis that ends above `top`. Labels stand upright in the bars,
    or on top of short ones."""
    width = 0.84 / max(len(series), 1)
    for i, (name, values) in enumerate(series.items()):
        for x, value in enumerate(values):
            if value is None:
                continue
            at = x + (i - (len(series) - 1) / 2) * width
            axes.bar(at, value, width * 0.92, color=COLORS[name], label=called(name))
            inside = value > 0.35 * top
            axes.text(at, value * 0.97 if inside else value + 0.02 * top, labels[name][x], rotation=90, ha="center",
                      va="top" if inside else "bottom", fontsize=7.5,
                      color="white" if inside and sum(to_rgb(COLORS[name])) < 1.8 else "black")  # fmt: skip
    axes.set_xticks(range(len(groups)), groups)
    axes.set(xlim=(-0.5, len(groups) - 0.5), ylim=(0, 1.08 * top))
    axes.grid(axis="y", alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _legend(figure, panels) -> None:
    handles = {label: handle for axes in panels for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=7, frameon=False, fontsize=9)


def _attention(records: Records):
    found = {key: record["result"] for key, record in records.under("attention").items() if "result" in record}
    if not found:
        return None
    widths = sorted({key[0] for key in found}, key=int)
    names = ["minisobert", "minisobert, dropout 0.1", "sdpa-cudnn", "sdpa-flash", "sdpa-efficient", "varlen", "flex"]
    figure, panels = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    for column, direction in zip(panels.T, ("forward", "backward")):
        top = max(result[f"{direction}_tflops"] for result in found.values())
        for axes, lengths in zip(column, ("rows", "posts")):
            series = {}
            for name in names:
                kind, _, dropped = name.partition(", dropout ")
                keys = [(width, lengths, dropped or "0.0", kind) for width in widths]
                series[name] = [found.get(key, {}).get(f"{direction}_tflops") for key in keys]
            series = {name: values for name, values in series.items() if any(values)}
            labels = {name: [number(value) for value in values] for name, values in series.items()}
            _bars(axes, [f"d = {width}" for width in widths], series, labels, top)
            axes.set(title=f"{called(lengths)}, {direction}", ylabel="TFLOP/s on visible pairs")
    _legend(figure, panels.flat)
    figure.suptitle("Attention in bf16, dropout 0 unless it says otherwise")
    return figure


def _bandwidth(records: Records):
    if not (found := shares(records)):
        return None
    order = sorted(found, key=lambda key: (key[0], int(key[1] or 0), key[2]))[::-1]  # the lowest bar first
    labels = []
    for operation, width, dropout, name in order:
        size = f" {int(width):,}" if width else ""
        labels.append(f"{operation}{size}{', dropout 0.1' * (dropout == '0.1')}: {called(name)}")
    figure, panels = plt.subplots(1, 2, figsize=(12, 1.8 + 0.27 * len(order)), layout="constrained", sharey=True)
    for axes, direction in zip(panels, ("forward", "backward")):
        values = [100 * found[key][direction] for key in order]
        axes.barh(range(len(order)), values, 0.75, color=[COLORS[key[-1]] for key in order])
        for y, value in enumerate(values):
            axes.text(value + 1, y, f"{value:.0f} %", va="center", fontsize=8)
        axes.axvline(100, color="black", linewidth=0.8)
        axes.axvline(85, color="black", linewidth=0.8, linestyle=":")
        axes.set_yticks(range(len(order)), labels, fontsize=8)
        axes.set(xlim=(0, max(112, max(values) * 1.1)), ylim=(-0.7, len(order) - 0.3),
                 xlabel="% of measured copy bandwidth",
                 title=direction + (" (of cross-entropy: forward and backward)" if direction == "backward" else ""))
        axes.spines[["top", "right"]].set_visible(False)  # fmt: skip
    figure.suptitle("What memory bounds, in bf16 (dotted: 85 %, the goal of layer norm)")
    return figure


def _training(records: Records):
    found = {key: record["result"] for key, record in records.under("training").items() if "result" in record}
    if not found:
        return None
    presets = list(dict.fromkeys(key[0] for key in found))
    figure, panels = plt.subplots(1, len(presets), figsize=(6 * len(presets), 5), layout="constrained", squeeze=False)
    for axes, preset in zip(panels[0], presets):
        groups = [(lengths, dropout) for dropout in ("0.0", "0.1") for lengths in ("rows", "posts")]
        series, labels = {}, {}
        top = max(r["micro_batch_tokens_per_second"] for key, r in found.items() if key[0] == preset) / 1e3
        for name in ("minisobert", "ModernBert", "MegatronBert"):
            results = [found.get((preset, *group, name), {}) for group in groups]
            values = [result.get("micro_batch_tokens_per_second") for result in results]
            if any(values):
                series[name] = [value and value / 1e3 for value in values]
                labels[name] = [
                    f"{number(value and value / 1e3)}" + (f", MFU {result['mfu']:.0%}" if result.get("mfu") else "")
                    for value, result in zip(values, results)
                ]
        _bars(axes, [f"{called(lengths)}\ndropout {dropout}" for lengths, dropout in groups], series, labels, top)
        axes.set(title=preset, ylabel="thousand real tokens/s in micro-batches")
    _legend(figure, panels.flat)
    figure.suptitle("Training on one GPU, bf16 (bars leave out the optimizer; MFU is that of whole steps)")
    return figure
