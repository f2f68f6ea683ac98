"""gpu.md: the machine, the goals, then a table per stage."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from benchmarks.gpu import attention, rowwise, training
from benchmarks.gpu.records import Records
from benchmarks.gpu.setting import DROPOUTS, LENGTHS
from minisobert.cli import table
from minisobert.training.meter import dollars

DRY = "**A DRY RUN: toy sizes on a CPU. No figure here means anything.**"
TOKENS = 27e9  # of a whole pre-training
GOALS_PRICE = 3.0  # dollars per GPU-hour
DIRECTIONS = ("forward", "backward")


def number(value: float, digits: int = 3) -> str:
    """With so many significant digits."""
    return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"


def cell(field: str, value) -> str:
    """A field of a result, in the unit that a reader wants of what its name ends in; empty for None."""
    if value is None or isinstance(value, str):
        return value or ""
    if field == "shape":
        return " × ".join(f"{n:,}" for n in value)
    if field.endswith(("share", "mfu")):
        return f"{value:.1%}"
    if field.endswith("bytes"):
        return number(value / 1e9)  # GB
    if field.endswith("bytes_per_second"):
        return number(value / 1e12)  # TB/s
    if field.endswith("seconds"):
        return number(value * 1e3)  # ms
    return number(value, 2 if field == "difference" else 3)


def headline(record: dict) -> str:
    """A record in a few words, for whoever watches the run."""
    if "failed" in record:
        return f"FAILED, {record['failed'][:100]}"
    shown = {field: value for field, value in record["result"].items() if isinstance(value, float | str)}
    return ", ".join(f"{field} {value if isinstance(value, str) else number(value)}" for field, value in shown.items())


@dataclass(frozen=True)
class Goal:
    what: str
    goal: float | None
    reach: float | None
    measured: float | None
    at_most: bool = False

    def met(self) -> str:
        """The highest mark that was met; empty where nothing was measured."""
        if self.measured is None:
            return ""
        marks = {"reach": self.reach, "goal": self.goal}
        sign = -1 if self.at_most else 1
        return next((name for name, mark in marks.items() if mark and sign * self.measured >= sign * mark), "no")


def goals(records: Records) -> Iterator[Goal]:
    """What the project wants of an H200, and what was measured."""

    def attention(lengths: str, dropout: float, name: str = "minisobert") -> dict:
        return records.get("attention", 64, lengths, dropout, name)

    norms = {name: result for name, result in against_copy(records) if name[2:] == ("0.0", "minisobert")}
    for direction, goal, reach in (("forward", 350, 420), ("backward", 230, 300)):
        speed = {case: attention(*case).get(f"{direction}_tflops") for case in product(LENGTHS, DROPOUTS)}
        rows = speed["rows", 0.0]
        yield Goal(f"attention d = 64, rows, {direction}: TFLOP/s", goal, reach, rows)
        yield Goal(f"the same on posts, {direction}: of the rate on rows", 0.8, None, ratio(speed["posts", 0.0], rows))
        for lengths in LENGTHS:
            share = ratio(speed[lengths, 0.1], speed[lengths, 0.0])
            yield Goal(f"dropout 0.1, {lengths}, {direction}: of the rate without", 0.6, None, share)
        for width in (768, 1_536):
            share = norms.get(("add_norm", str(width), "0.0", "minisobert"), {}).get(f"{direction}_share")
            yield Goal(f"layer norm, {width:,} wide, {direction}: of copy bandwidth", 0.85, None, share)
    totals = (
        sum(attention("posts", 0.0, name).get(f"{part}_seconds", 0) for part in (*DIRECTIONS, "build"))
        for name in ("flex", "minisobert")
    )
    yield Goal("attention on posts, beside FlexAttention and its mask: times as fast", 1.5, None, ratio(*totals))
    for preset, lengths, goal, reach, cheap, cheaper in (
        ("base", "rows", 475e3, 600e3, 47, 37),
        ("base", "posts", None, 800e3, None, 28),
        ("large", "rows", 74e3, 100e3, 304, 225),
    ):
        speed = records.get("training", preset, lengths, 0.0, "minisobert").get("tokens_per_second")
        yield Goal(f"training {preset}, {lengths}: tokens/s", goal, reach, speed)
        what = f"27 B tokens, {preset}, {lengths}, at ${GOALS_PRICE:.0f} per hour: dollars"
        yield Goal(what, cheap, cheaper, speed and cost(speed, GOALS_PRICE), at_most=True)


def ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def cost(tokens_per_second: float, price: float) -> float:
    """Dollars for a whole pre-training on one GPU."""
    return dollars(TOKENS / tokens_per_second, 1, price)


def against_copy(records: Records) -> Iterator[tuple[tuple[str, ...], dict]]:
    """((operation, width or "", dropout or "", implementation), result with shares of copy bandwidth) pairs."""
    bandwidth = records.get("ceilings", "copy").get("bytes_per_second")
    for operation in ("add_norm", "bias_gelu", "cross_entropy"):
        for (*size, name), result in records.results(operation).items():
            shares = {f"{d}_share": ratio(result[f"{d}_bytes_per_second"], bandwidth) for d in DIRECTIONS}
            yield (operation, *(*size, "", "")[:2], name), result | shares


def in_training(records: Records) -> Iterator[tuple[tuple[str, ...], dict]]:
    """((preset, documents, dropout, implementation), result beside ours) pairs."""
    speed = "micro_batch_tokens_per_second"
    for (*case, name), result in records.results("training").items():
        if name == "minisobert":
            yield (*case, name), result | {"dollars": cost(result["tokens_per_second"], records.price)}
        else:
            ours = records.get("training", *case, "minisobert")
            more = {
                "times": ratio(ours.get(speed), result[speed]),
                "padding_share": 1 - result["real_tokens"] / result["padded_tokens"],
            }
            yield (*case, f"{name} ({result['attends']}{', compiled' * result['compiled']})"), result | more


def write(records: Records, folder: Path) -> None:
    about = records.machine
    versions = [f"{name} {about[name]}" for name in ("driver", "CUDA", "torch", "triton", "transformers", "Python")
                if about[name]]  # fmt: skip
    lines = [
        "# Kernels and training on one GPU (`make gpu`)",
        "",
        *[DRY, ""] * records.dry,
        f"{about['chip']}; {', '.join(versions)}.",
        f"{about['date']}, commit {about['commit'] or 'unknown'}. bf16 throughout. Times are medians of several calls, "
        "by CUDA events, with a cold L2. *Differs*: how far results and gradients are from minisobert's, relative, by "
        "root mean square; in training, nats between the first losses. With dropout each draws its own mask.",
        *goal_lines(records),
        *_trouble(records),
        *_tests(records),
        *_measured(records),
    ]
    (folder / "gpu.md").write_text("\n".join(lines) + "\n")


def _section(title: str, text: str, names: list[str], columns: dict[str, str], results: Iterable) -> list[str]:
    """A table with a line for each (name, result): the parts of the name, under `names`, then the fields of columns,
    {heading: field}. Nothing where there are no results."""
    rows = [[*name, *(cell(field, result.get(field)) for field in columns.values())] for name, result in results]
    head, _, *body = table([*names, *columns], rows)
    lines = ["", f"## {title}", "", text.strip(), "", head, "|---" * len(names) + "|--:" * len(columns) + "|", *body]
    return lines if rows else []


def goal_lines(records: Records) -> list[str]:
    text = "Set for an H200 (989 TFLOP/s by datasheet) at dropout 0 unless it says otherwise."
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
        lines += ["", "## Not reached", "", f"{count} measurements; the same command goes on with them.", ""]
        lines += [f"- `{name}`" for name in records.not_reached]
    return lines


def _tests(records: Records) -> list[str]:
    if not (result := records.get("tests")):
        return []
    told = "" if result["ran"] else " No test ran: they need a CUDA device."
    return ["", "## Tests", "", f"`pytest tests/gpu`: {result['summary']}. The log is `tests.log`.{told}"]


def _measured(records: Records) -> Iterator[str]:
    """A table for each stage."""
    yield from _section(
        "Ceilings",
        "A copy, read and written, and bf16 matrix products: a square one, and those of each model's forward pass.",
        [""],
        {"shape (m, n, k)": "shape", "ms": "seconds", "TFLOP/s": "tflops", "TB/s": "bytes_per_second"},
        [((" ".join(name),), result) for name, result in records.results("ceilings").items()],
    )
    yield from _section("Attention", attention.__doc__, ["d", "documents", "dropout", ""], {
        "forward ms": "forward_seconds", "forward TFLOP/s": "forward_tflops", "backward ms": "backward_seconds",
        "backward TFLOP/s": "backward_tflops", "build ms": "build_seconds", "differs": "difference",
    }, records.results("attention").items())  # fmt: skip
    yield from _section("What memory bounds", rowwise.__doc__, ["", "width", "dropout", ""], {
        "forward ms": "forward_seconds", "forward of copy": "forward_share", "backward ms": "backward_seconds",
        "backward of copy": "backward_share", "differs": "difference",
    }, against_copy(records))  # fmt: skip
    yield from _section("Training", training.__doc__, ["", "documents", "dropout", ""], {
        "step, tokens/s": "tokens_per_second", "MFU": "mfu",
        f"27 B tokens at ${records.price:g} per GPU-hour, dollars": "dollars", "optimizer ms": "optimizer_seconds",
        "micro-batch": "micro_batch_tokens", "ms": "micro_batch_seconds", "tokens/s": "micro_batch_tokens_per_second",
        "times as fast": "times", "padding": "padding_share", "peak GB": "peak_bytes", "differs": "difference",
    }, in_training(records))  # fmt: skip
    profile = records.get("profile")
    what = "torch's operations on the CPU" if records.dry else "kernels"
    yield from _section(
        "Where a micro-batch's time goes",
        f"base, posts, dropout 0, forward and backward: {cell('seconds', profile.get('seconds'))} ms in {what}.",
        [""],
        {"calls": "calls", "ms": "seconds", "share": "share"},
        [((f"`{kernel['name'][:90]}`",), kernel) for kernel in profile.get("kernels", [])],
    )
