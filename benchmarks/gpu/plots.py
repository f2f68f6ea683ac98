"""Draws rates.png (rates beside the peers'), step.png (the time of a micro-batch by parts) and cost.png (27B tokens).

Black marks are predictions (predict.py).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import matplotlib

from benchmarks.gpu.records import Records
from benchmarks.gpu.report import DIRECTIONS, PRICE, against_copy, cost, number

matplotlib.use("Agg")
import matplotlib.pyplot as plt

COLORS = {  # in the order of the bars; only ours are red
    "minisobert": "#d1495b", "minisobert, dropout 0.1": "#eaa4ad", "train.py, its recipe": "#66101f",
    "sdpa-cudnn": "#00798c", "sdpa-flash": "#30638e", "sdpa-efficient": "#8fb8de", "varlen": "#003d5b",
    "flex": "#edae49", "eager": "#8fb8de", "eager-bf16": "#8fb8de", "eager-fp32": "#30638e", "compiled": "#00798c",
    "compiled-fp32": "#00798c", "layer_norm": "#aaaaaa", "MegatronBert": "#8fb8de", "ModernBert": "#8fb8de",
    "ModernBert-flash": "#30638e",
}  # fmt: skip
PARTS = {
    "matrix products": "#8fb8de", "attention, forward": "#f3c9cf", "attention, backward": "#e58a96",
    "layer norms": "#edae49", "GELU": "#f6dca8", "loss": "#7fc4bd", "the rest": "#cccccc",
}  # fmt: skip
Bar = tuple[str, str, str, float, str, float | None]  # panel, group in it, implementation, height, label, prediction


def attention(records: Records) -> Iterator[Bar]:
    for (width, lengths, dropout, name), result in records.results("attention").items():
        if dropout == "0.0" or name == "minisobert":
            shown = name if dropout == "0.0" else f"{name}, dropout {dropout}"
            for direction in DIRECTIONS:
                field = f"{direction}_tflops"
                panel = f"Attention on {lengths}, {direction}\nTFLOP/s on visible pairs"
                yield panel, f"d = {width}", shown, result[field], number(result[field]), result["predicted"].get(field)


def bandwidth(records: Records) -> Iterator[Bar]:
    for (operation, width, dropout, name), result in against_copy(records):
        group = f"{operation}\n{width}" + f"\np = {dropout}" * bool(dropout)
        for direction in DIRECTIONS:
            if share := result[f"{direction}_share"]:
                panel = f"What memory bounds, {direction}\n% of measured copy bandwidth"
                yield panel, group, name, 100 * share, f"{share:.0%}", None


def training(records: Records) -> Iterator[Bar]:
    for (preset, lengths, dropout, name), result in records.results("training").items():
        field = "micro_batch_tokens_per_second"
        expected, speed = result["predicted"].get(field), result[field] / 1e3
        mfu = f" ({result['mfu']:.0%})" if result.get("mfu") else ""
        panel = f"Training {preset}\nthousand real tokens/s in micro-batches (MFU of steps)"
        yield panel, f"{lengths}\ndropout {dropout}", name, speed, f"{number(speed)}{mfu}", expected and expected / 1e3


def costs(records: Records) -> Iterator[Bar]:
    """The bars of cost.png, from whole steps."""
    for (preset, lengths, dropout, name), result in records.results("training").items():
        if name == "minisobert":
            shown = name if dropout == "0.0" else f"{name}, dropout {dropout}"
            yield _cost(f"{preset}, {lengths}", shown, result)
    for (preset,), result in records.results("train.py").items():
        yield _cost(f"{preset}, posts", "train.py, its recipe", result)


def _cost(group: str, name: str, result: dict) -> Bar:
    spent, expected = cost(result["tokens_per_second"]), result["predicted"].get("tokens_per_second")
    return f"dollars for 27B tokens on one GPU at ${PRICE:.0f} an hour", group, name, spent, f"${number(spent)}", (
        cost(expected) if expected else None
    )  # fmt: skip


def write(records: Records, folder: Path) -> None:
    """Draws all that has been measured. A plot without measurements is not written."""
    rates = [*attention(records), *bandwidth(records), *training(records)]
    _bars(records, folder / "rates.png", "Rates beside rivals, bf16 (black: predicted)", rates, 2)
    _bars(records, folder / "cost.png", "What a pre-training costs (black: predicted)", [*costs(records)], 1)
    _steps(records, folder / "step.png")


def _bars(records: Records, path: Path, title: str, bars: list[Bar], columns: int) -> None:
    panels = defaultdict(lambda: defaultdict(dict))
    for panel, group, name, *bar in bars:
        panels[panel][group][name] = bar
    if not panels:
        return
    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, grid = plt.subplots(rows, columns, figsize=(13, 1.4 + 3.4 * rows), layout="constrained", squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (panel, groups) in zip(grid.flat, panels.items()):
        _draw(axes, groups, records.dry)
        axes.set_title(panel, fontsize=10)
    handles = {label: handle for axes in grid.flat for handle, label in zip(*axes.get_legend_handles_labels())}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=6, frameon=False, fontsize=9)
    _save(records, figure, title, path)


def _draw(axes, groups: dict[str, dict[str, tuple[float, str, float | None]]], dry: bool) -> None:
    width, highest = 0.84 / max(map(len, groups.values())), 0.0
    for x, bars in enumerate(groups.values()):
        for i, name in enumerate(sorted(bars, key=list(COLORS).index)):
            (height, label, expected), at = bars[name], x + (i - (len(bars) - 1) / 2) * width
            axes.bar(at, height, width * 0.92, color=COLORS[name], label=name)
            if expected and not dry:
                axes.hlines(expected, at - 0.46 * width, at + 0.46 * width, color="black", linewidth=1.5)
                height = max(height, expected)
            above = {"xytext": (0, 4), "textcoords": "offset points", "ha": "center", "va": "bottom"}
            axes.annotate(label, (at, height), rotation=90, fontsize=7.5, **above)
            highest = max(highest, height)
    axes.set_xticks(range(len(groups)), groups, fontsize=8.5 if len(groups) < 7 else 6.5)
    axes.set_ylim(0, 1.4 * highest)  # room for the labels
    _plain(axes, "y")


def _steps(records: Records, path: Path) -> None:
    """Two bars for each preset: the measured time and the predicted time."""
    bars = {}
    for (preset,), profile in records.results("profile").items():
        bars[f"{preset}\nmeasured"] = profile["parts"]
        bars[f"{preset}\npredicted"] = profile["predicted"].get("parts")
    bars = {name: parts for name, parts in bars.items() if parts}
    if not bars:
        return
    figure, axes = plt.subplots(figsize=(12, 1.6 + 0.75 * len(bars)), layout="constrained")
    for y, parts in enumerate(bars.values()):
        left = 0.0
        for part, color in PARTS.items():
            taken = 1e3 * parts[part]
            bar = axes.barh(y, taken, left=left, color=color, height=0.7, label=part if y == 0 else None)
            if taken > 0.04 * 1e3 * max(sum(each.values()) for each in bars.values()):
                axes.bar_label(bar, [number(taken)], label_type="center", fontsize=8.5)
            left += taken
        axes.text(left, y, f" {number(left)} ms", va="center", fontsize=9)
    axes.set_yticks(range(len(bars)), bars)
    axes.invert_yaxis()
    axes.set_xlabel("ms")
    axes.margins(x=0.1)
    _plain(axes, "x")
    figure.legend(loc="outside lower center", ncols=len(PARTS), frameon=False, fontsize=9)
    _save(records, figure, "Where the milliseconds of a micro-batch go: posts, forward and backward, its recipe", path)


def _plain(axes, grid: str) -> None:
    axes.grid(axis=grid, alpha=0.3)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _save(records: Records, figure, title: str, path: Path) -> None:
    machine = "; ".join(records.machine[name] for name in ("chip", "versions", "date"))
    figure.suptitle(f"{title}\n{machine}", fontsize=11)
    if records.dry:
        figure.text(0.5, 0.5, "DRY RUN\ntoy sizes on a CPU:\nno figure means anything", ha="center", va="center",
                    fontsize=40, color="red", alpha=0.18, rotation=20)  # fmt: skip
    figure.savefig(path, dpi=120)
    plt.close(figure)
