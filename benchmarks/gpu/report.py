"""Writes gpu.md: the machine, the goals, and a table for each stage."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from benchmarks.gpu import attention, rowwise, steps, training
from benchmarks.gpu.predict import WITHIN
from benchmarks.gpu.records import Records
from benchmarks.gpu.setting import DROPOUTS, LENGTHS
from minisobert.cli import table
from minisobert.training.meter import dollars

DRY = "**A DRY RUN: toy sizes on a CPU. No figure here means anything.**"
TOKENS = 27e9  # tokens of a whole pre-training
PRICE = 3.0  # dollars per GPU-hour
DIRECTIONS = ("forward", "backward")
TELLING = {  # fields to compare with their predictions; the times would only repeat them
    "bytes_per_second", "tflops", "tokens_per_second", "peak_bytes",
    *(f"{direction}_{rate}" for direction in DIRECTIONS for rate in ("tflops", "bytes_per_second")),
}  # fmt: skip
UNITS = {"bytes": 1e9, "bytes_per_second": 1e12, "seconds": 1e-3}  # GB, TB/s, ms; by the end of a field's name


def number(value: float) -> str:
    """A number with three significant digits, or with all digits before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def cell(field: str, value) -> str:
    """A field of a result as text, in the unit that UNITS has for the end of its name; empty for None."""
    if value is None or isinstance(value, str):
        return value or ""
    if field == "shape":
        return " × ".join(f"{n:,}" for n in value)
    if field.endswith(("share", "mfu")):
        return f"{value:.1%}"
    unit = next((UNITS[end] for end in UNITS if field.endswith(end)), 1)
    return number(value / unit)


def both(field: str, result: dict) -> str:
    """The measured value, and the predicted one in parentheses."""
    expected = result.get("predicted", {}).get(field)
    return cell(field, result.get(field)) + (f" ({cell(field, expected)})" if expected is not None else "")


def surprises(records: Records) -> Iterator[tuple[tuple[str, str], dict]]:
    """((measurement, field), {"measured", "expected", "ratio"}) for each figure that is off its prediction by more than
    WITHIN, the furthest first."""
    found = []
    for name, record in records.measurements.items():
        result = record.get("result", {})
        for field, expected in (records.predicted(name, result) if result else {}).items():
            measured = result.get(field)
            if field in TELLING and measured and expected and not 1 - WITHIN < measured / expected < 1 + WITHIN:
                cells = {"measured": cell(field, measured), "expected": cell(field, expected)}
                found.append(((name, field), {**cells, "ratio": measured / expected}))
    yield from sorted(found, key=lambda each: -abs(math.log(each[1]["ratio"])))


@dataclass(frozen=True)
class Goal:
    what: str
    goal: float | None
    reach: float | None
    measured: float | None
    at_most: bool = False

    def met(self) -> str:
        """The highest mark that was met, "no", or an empty string if nothing was measured."""
        if self.measured is None:
            return ""
        marks = {"reach": self.reach, "goal": self.goal}
        sign = -1 if self.at_most else 1
        return next((name for name, mark in marks.items() if mark and sign * self.measured >= sign * mark), "no")


def goals(records: Records) -> Iterator[Goal]:
    """The project's goals for an H200, with the measured values."""
    copied = records.get("ceilings", "copy").get("bytes_per_second")
    for direction, goal, reach in (("forward", 350, 420), ("backward", 230, 300)):
        rows, dropped_rows, posts, dropped_posts = (
            records.get("attention", 64, lengths, dropout, "minisobert").get(f"{direction}_tflops")
            for lengths, dropout in product(LENGTHS, DROPOUTS)
        )
        yield Goal(f"attention d = 64, rows, {direction}: TFLOP/s", goal, reach, rows)
        yield Goal(f"the same on posts, {direction}: of the rate on rows", 0.8, None, ratio(posts, rows))
        for lengths, dropped, full in (("rows", dropped_rows, rows), ("posts", dropped_posts, posts)):
            what = f"dropout 0.1, {lengths}, {direction}: of the rate without"
            yield Goal(what, 0.6, None, ratio(dropped, full))
        for width in (768, 1_536):
            speed = records.get("add_norm", width, 0.0, "minisobert").get(f"{direction}_bytes_per_second")
            what = f"layer norm, {width:,} wide, {direction}: of copy bandwidth"
            yield Goal(what, 0.85, None, ratio(speed, copied))
    flex, ours = (records.get("attention", 64, "posts", 0.0, name) for name in ("flex", "minisobert"))
    totals = (sum(r.get(f"{part}_seconds", 0) for part in (*DIRECTIONS, "build")) for r in (flex, ours))
    yield Goal("attention on posts, beside FlexAttention and its mask: times as fast", 1.5, None, ratio(*totals))
    for preset, lengths, goal, reach, cheap, cheaper in (
        ("base", "rows", 475e3, 600e3, 47, 37),
        ("base", "posts", None, 800e3, None, 28),
        ("large", "rows", 74e3, 100e3, 304, 225),
    ):
        speed = records.get("training", preset, lengths, 0.0, "minisobert").get("tokens_per_second")
        yield Goal(f"training {preset}, {lengths}: tokens/s", goal, reach, speed)
        what = f"27 B tokens, {preset}, {lengths}, at ${PRICE:.0f} per hour: dollars"
        yield Goal(what, cheap, cheaper, speed and cost(speed), at_most=True)


def ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def cost(tokens_per_second: float) -> float:
    """Dollars for a whole pre-training on one GPU."""
    return dollars(TOKENS / tokens_per_second, 1, PRICE)


def against_copy(records: Records) -> Iterator[tuple[tuple[str, ...], dict]]:
    """((operation, width or "", dropout or "", implementation), result with shares of copy bandwidth) pairs."""
    bandwidth = records.get("ceilings", "copy").get("bytes_per_second")
    for operation in ("add_norm", "bias_gelu", "cross_entropy"):
        for (*size, name), result in records.results(operation).items():
            shares = {f"{d}_share": ratio(result[f"{d}_bytes_per_second"], bandwidth) for d in DIRECTIONS}
            yield (operation, *(*size, "", "")[:2], name), result | shares


def in_training(records: Records) -> Iterator[tuple[tuple[str, ...], dict]]:
    """((preset, documents, dropout, implementation), result) pairs. Our results have "dollars" too; those of peers have
    "times", our speed divided by theirs."""
    speed = "micro_batch_tokens_per_second"
    for (*case, name), result in records.results("training").items():
        if name == "minisobert":
            more = {"dollars": cost(result["tokens_per_second"])}
        else:
            more = {"times": ratio(records.get("training", *case, "minisobert").get(speed), result[speed])}
            name = f"{name} ({result['attends']}{', compiled' * (not records.dry)})"
        yield (*case, name), result | more


def beside_shipped(records: Records) -> Iterator[tuple[tuple[str, ...], dict]]:
    """The measurements with earlier tiles; their "predicted" fields are the measurements of the tiles that ship."""
    for case, result in records.results("tables").items():
        yield case, result | {"predicted": records.get("attention", *case, "minisobert")}


def by_rows(records: Records) -> list[tuple[tuple[str, ...], dict]]:
    """base on posts, by rows of a micro-batch, including the usual number, which the training stage measures."""
    usual = {
        (str(records.setting.models["base"][1]), case[2]): result
        for case, result in records.results("training").items()
        if (case[0], case[1], case[3]) == ("base", "posts", "minisobert")
    }
    return sorted((records.results("rows") | usual).items(), key=lambda each: (int(each[0][0]), each[0][1]))


def write(records: Records, folder: Path) -> None:
    about = records.machine
    lines = [
        "# Kernels and training on one GPU (`make gpu`)",
        "",
        *[DRY, ""] * records.dry,
        f"{about['chip']}; {about['versions']}.",
        f"{about['date']}, commit {about['commit']}. bf16 throughout. Times are medians of several calls, "
        "by CUDA events, with a cold L2. *Differs* is the relative root mean square difference between the results and "
        "gradients of a peer and minisobert's; in training, the difference in nats between the first losses. "
        "With dropout each implementation draws its own mask, and nothing is compared. Parentheses hold predicted "
        "figures; for SDPA and varlen they hold published ones.",
        "",
        f"`pytest tests/gpu`: {records.get('tests').get('summary', 'no outcome')}. The log is `tests.log`.",
        *goal_lines(records),
        *_section(
            "Not as predicted",
            f"These figures are more than {WITHIN:.0%} off the predictions of [predict.py](../../gpu/predict.py), the "
            "furthest first. The kernel, the measurement or the model of the chip is wrong.",
            ["measurement", "figure"],
            {"measured": "measured", "predicted": "expected", "ratio": "ratio"},
            surprises(records),
        ),
        *_trouble(records),
        *_measured(records),
    ]
    (folder / "gpu.md").write_text("\n".join(lines) + "\n")


def _section(title: str, text: str, names: list[str], columns: dict[str, str], results: Iterable) -> list[str]:
    """A table with a line for each (name, result): the parts of the name, under `names`, then the fields of `columns`
    ({heading: field}), each with its prediction in parentheses. Returns no lines if there are no results."""
    rows = [[*name, *(both(field, result) for field in columns.values())] for name, result in results]
    head, _, *body = table([*names, *columns], rows)
    lines = ["", f"## {title}", "", text.strip(), "", head, "|---" * len(names) + "|--:" * len(columns) + "|", *body]
    return lines if rows else []


def goal_lines(records: Records) -> list[str]:
    text = "These goals are for an H200 (989 TFLOP/s by its datasheet), at dropout 0 unless stated otherwise."
    columns = {name: name for name in ("goal", "reach", "measured", "met")}
    return _section("Goals", text, [""], columns, [((g.what,), vars(g) | {"met": g.met()}) for g in goals(records)])


def _trouble(records: Records) -> list[str]:
    lines = []
    for title, ours in (("Failed here: to be mended", True), ("What the others could not do", False)):
        failures = records.failures(ours)
        lines += ["", f"## {title}", ""] if failures else []
        for reason in dict.fromkeys(failures.values()):
            names = ", ".join(f"`{name}`" for name in failures if failures[name] == reason)
            lines.append(f"- {names}: {reason}")
    if count := len(records.not_reached):
        lines += ["", "## Not reached", "", f"{count} measurements are missing; the same command makes them.", ""]
        lines += [f"- `{name}`" for name in records.not_reached]
    return lines


def _measured(records: Records) -> Iterator[str]:
    """The lines of a table for each stage."""
    yield from _section(
        "Ceilings",
        "A copy, counted as read and written, and bf16 products: a square one, and those of each model's forward pass.",
        [""],
        {"shape (m, n, k)": "shape", "ms": "seconds", "TFLOP/s": "tflops", "TB/s": "bytes_per_second"},
        [((" ".join(name),), result) for name, result in records.results("ceilings").items()],
    )
    yield from _section("Attention", attention.__doc__, ["d", "documents", "dropout", ""], {
        "forward ms": "forward_seconds", "forward TFLOP/s": "forward_tflops", "backward ms": "backward_seconds",
        "backward TFLOP/s": "backward_tflops", "build ms": "build_seconds", "differs": "difference",
    }, records.results("attention").items())  # fmt: skip
    yield from _section(
        "Attention with what surrounds it",
        "d = 64, posts, dropout 0, on one qkv tensor that is copied first. Attention's own passes include the bias or "
        "rotary positions; in the lines with *apart* these take a separate pass.",
        ["d", "documents", "dropout", "with"],
        {"forward ms": "forward_seconds", "backward ms": "backward_seconds"},
        records.results("surroundings").items(),
    )
    yield from _section(
        "The tiles before",
        "d = 64, with the tiles that were chosen before instructions were counted. The times in parentheses are those "
        "of the tiles that ship, from the table of attention.",
        ["d", "documents", "dropout"],
        {"forward ms": "forward_seconds", "backward ms": "backward_seconds"},
        beside_shipped(records),
    )
    yield from _section(
        "Tiles of attention",
        "d = 64, posts, dropout 0.1. Each line has another tile (rows held, tokens visited, warps, stages) for one "
        "kernel; the others are as they ship. The first tile of each kernel is the one that ships for sm_90.",
        ["kernel", "tile"],
        {"forward ms": "forward_seconds", "backward ms": "backward_seconds"},
        records.results("tiles").items(),
    )
    yield from _section("What memory bounds", rowwise.__doc__, ["", "width", "dropout", ""], {
        "forward ms": "forward_seconds", "forward of copy": "forward_share", "backward ms": "backward_seconds",
        "backward of copy": "backward_share", "differs": "difference",
    }, against_copy(records))  # fmt: skip
    yield from _section("Training", training.__doc__, ["", "documents", "dropout", ""], {
        "step, tokens/s": "tokens_per_second", "MFU": "mfu",
        f"27 B tokens at ${PRICE:.0f} per GPU-hour, dollars": "dollars", "optimizer ms": "optimizer_seconds",
        "micro-batch": "micro_batch_tokens", "ms": "micro_batch_seconds", "tokens/s": "micro_batch_tokens_per_second",
        "times as fast": "times", "padding": "padding_share", "peak GB": "peak_bytes", "differs": "difference",
    }, in_training(records))  # fmt: skip
    yield from _section(
        "Rows of a micro-batch",
        "base on posts. Where the tokens per second fall, the device waits for the host.",
        ["rows", "dropout"],
        {
            "step, tokens/s": "tokens_per_second",
            "MFU": "mfu",
            "micro-batch ms": "micro_batch_seconds",
            "peak GB": "peak_bytes",
        },
        by_rows(records),
    )
    yield from _section("train.py", steps.__doc__, ["", "rows a micro-batch"], {
        "steps": "steps", "dropout": "dropout", "tokens/s": "tokens_per_second", "MFU": "mfu", "peak GB": "peak_bytes",
    }, (((*name, result["rows"]), result) for name, result in records.results("train.py").items()))  # fmt: skip
    what = "torch's operations on the CPU" if records.dry else "kernels"
    for (preset,), profile in records.results("profile").items():
        yield from _section(
            f"Where the time of a micro-batch of {preset} goes",
            f"Posts, dropout {profile['dropout']:g}, forward and backward: {both('seconds', profile)} ms in {what}.",
            [""],
            {"ms": "seconds", "share": "share"},
            [
                ((part,), {"seconds": taken, "share": taken / profile["seconds"], "predicted": {
                    "seconds": profile["predicted"].get("parts", {}).get(part)}})
                for part, taken in profile["parts"].items()
            ],
        )  # fmt: skip
        yield from _section(
            f"Its kernels: {preset}",
            "These kernels take the most time.",
            [""],
            {"calls": "calls", "ms": "seconds", "share": "share"},
            [((f"`{kernel['name'][:90]}`",), kernel) for kernel in profile["kernels"]],
        )
