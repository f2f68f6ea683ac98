"""gpu.md: the machine, the goals, then a table per stage."""

from __future__ import annotations

from pathlib import Path

from benchmarks.gpu.goals import dollars, goals, ratio
from benchmarks.gpu.records import Records
from benchmarks.gpu.words import called, line, number, table

DRY = "**A DRY RUN: toy sizes on a CPU. No figure here means anything.**"


def headline(record: dict) -> str:
    """A record in a few words."""
    if "failed" in record:
        return f"FAILED, {record['failed'][:100]}"
    shown = {
        "summary": "{}", "tokens_per_second": "{:,.0f} tokens/s", "forward_tflops": "{:.0f} TFLOP/s forward",
        "backward_tflops": "{:.0f} backward", "tflops": "{:.0f} TFLOP/s", "bytes_per_second": "{:.3g} B/s",
        "forward_bytes_per_second": "{:.3g} B/s forward", "backward_bytes_per_second": "{:.3g} backward",
        "both_bytes_per_second": "{:.3g} both ways", "milliseconds": "{:.1f} ms",
    }  # fmt: skip
    result = record["result"]
    if "tokens_per_second" not in result:
        shown = {"micro_batch_tokens_per_second": "{:,.0f} tokens/s in micro-batches", **shown}
    return ", ".join(text.format(result[name]) for name, text in shown.items() if name in result)


def write(records: Records, folder: Path) -> None:
    stages = (goal_lines, _trouble, _tests, _ceilings, _attention, _rowwise, _training, _profile)
    title = "# Kernels and training on one GPU (`make gpu`)"
    head = [title, "", DRY] if records.dry else [title]
    lines = [*head, "", *_machine(records)]
    for stage in stages:
        lines += ["", *part] if (part := stage(records)) else []
    (folder / "gpu.md").write_text("\n".join(lines) + "\n")


def _machine(records: Records) -> list[str]:
    about = records.machine
    shown = {
        "driver": about["driver"], "CUDA": about["cuda"], "torch": about["torch"], "triton": about["triton"],
        "transformers": about["transformers"], "Python": about["python"],
    }  # fmt: skip
    versions = ", ".join(f"{name} {value}" for name, value in shown.items() if value)
    return [
        f"{about['chip']}; {versions}.",
        f"{about['date']}, commit {about['commit'] or 'unknown'}. bf16 throughout. Times are medians of several calls, "
        "by CUDA events, with a cold L2.",
    ]


def goal_lines(records: Records) -> list[str]:
    lines = ["## Goals", "", "Set for an H200 (989 TFLOP/s by datasheet) at dropout 0 unless it says otherwise.", ""]
    lines += table("", "goal", "reach", "measured", "met")
    for each in goals(records):
        numbers = [number(value) for value in (each.goal, each.reach, each.measured)]
        lines.append(line(f"{each.what}: {each.unit}", *numbers, each.met()))
    return lines


def _trouble(records: Records) -> list[str]:
    lines = []
    for title, failures in (
        ("Failed here: to be mended", records.failures(ours=True)),
        ("What the others could not do", records.failures(ours=False)),
    ):
        if failures:
            lines += [f"## {title}", ""]
            for reason in dict.fromkeys(failures.values()):
                names = ", ".join(f"`{name}`" for name in failures if failures[name] == reason)
                lines.append(f"- {names}: {reason}")
            lines.append("")
    if records.not_reached:
        count = len(records.not_reached)
        lines += ["## Not reached", "", f"{count} measurements; the same command goes on with them.", ""]
        lines += [f"- `{name}`" for name in records.not_reached]
    return lines[:-1] if lines and not lines[-1] else lines


def _tests(records: Records) -> list[str]:
    result = records.get("tests")
    if not result:
        return []
    told = "" if result["ran"] else " No test ran: they need a CUDA device."
    return ["## Tests", "", f"`pytest tests/gpu`: {result['summary']}. The log is `tests.log`.{told}"]


def _ceilings(records: Records) -> list[str]:
    copy, found = records.get("ceilings", "copy"), records.under("ceilings", "gemm")
    if not copy and not found:
        return []
    lines = ["## Ceilings", "", *table("", "shape (m, n, k)", "ms", "")]
    if copy:
        rate = f"{number(copy['bytes_per_second'] / 1e12)} TB/s"
        lines.append(line("copy, read and written", "", number(copy["seconds"] * 1e3), rate))
    for name, record in found.items():
        if result := record.get("result"):
            shape = " × ".join(f"{n:,}" for n in result["shape"])
            cells = number(result["seconds"] * 1e3), f"{number(result['tflops'])} TFLOP/s"
            lines.append(line(f"bf16 product {' '.join(name)}".strip(), shape, *cells))
    return lines


def _attention(records: Records) -> list[str]:
    found = records.under("attention")
    if not any("result" in record for record in found.values()):
        return []
    lines = [
        "## Attention",
        "",
        "TFLOP/s on visible pairs: 4 d H Σn² forward, 2.5 times that backward. *Build*: the mask, made for each batch. "
        "*Differs*: result and gradients from minisobert's, relative, root mean square (with dropout each draws its "
        "own mask). SDPA is told of posts by a boolean mask, which its flash backend does not take; varlen_attn and "
        "FlexAttention have no dropout.",
        "",
        *table("", "d", "dropout", "forward ms", "TFLOP/s", "backward ms", "TFLOP/s", "build ms", "differs"),
    ]
    order = sorted(found, key=lambda key: (int(key[0]), key[1] != "rows", key[2]))
    for key in order:
        width, lengths, dropout, name = key
        if result := found[key].get("result"):
            ms = [number(result[f"{part}_seconds"] * 1e3) for part in ("forward", "backward", "build")]
            rates = [number(result[f"{direction}_tflops"]) for direction in ("forward", "backward")]
            lines.append(line(
                f"{called(lengths)}: {called(name)}", width, dropout, ms[0], rates[0], ms[1], rates[1],
                ms[2] if result["build_seconds"] else "", number(result.get("difference"), 2),
            ))  # fmt: skip
    return lines


def shares(records: Records) -> dict[tuple[str, str, str], dict]:
    """(operation, width or "", dropout or "", implementation) → result, with shares of copy bandwidth.

    For cross-entropy "backward" is forward and backward together.
    """
    bandwidth = records.get("ceilings", "copy").get("bytes_per_second")
    found = {}
    for operation in ("add_norm", "bias_gelu", "cross_entropy"):
        for key, record in records.under(operation).items():
            if (result := record.get("result")) and bandwidth:
                width, dropout = (*key[:-1], "", "")[:2]
                backward = "both" if operation == "cross_entropy" else "backward"
                found[operation, width, dropout, key[-1]] = {
                    "forward_ms": result["forward_seconds"] * 1e3,
                    "backward_ms": result[f"{backward}_seconds"] * 1e3,
                    "forward": result["forward_bytes_per_second"] / bandwidth,
                    "backward": result[f"{backward}_bytes_per_second"] / bandwidth,
                    "difference": result.get("difference"),
                }
    return found


def _rowwise(records: Records) -> list[str]:
    if not (found := shares(records)):
        return []
    lines = [
        "## What memory bounds",
        "",
        "Share of the measured copy bandwidth, counting what has to be read and written once. torch's side of add_norm "
        "is `F.layer_norm(residual + dropout(x + bias))`. Cross-entropy's backward is timed together with its forward.",
        "",
        *table("", "width", "dropout", "forward ms", "of copy", "backward ms", "of copy", "differs"),
    ]
    for key in sorted(found, key=lambda key: (key[0], int(key[1] or 0), key[2])):
        operation, width, dropout, name = key
        result = found[key]
        cells = [f"{number(result[f'{d}_ms'])} | {result[d]:.0%}" for d in ("forward", "backward")]
        shown = f"{int(width):,}" if width else ""
        lines.append(line(f"{operation}: {called(name)}", shown, dropout, *cells, number(result["difference"], 2)))
    return lines


def _training(records: Records) -> list[str]:
    found = records.under("training")
    found = {key: found[key] for key in sorted(found, key=lambda key: (key[0], key[2], key[1] != "rows"))}
    ours = {key: r["result"] for key, r in found.items() if key[-1] == "minisobert" and "result" in r}
    if not ours:
        return []
    first = next(iter(ours.values()))
    batch = first["accumulation"] * first["micro_batch_tokens"]
    lines = [
        "## Training",
        "",
        f"A step on {batch:,} tokens: forward, backward, AdamW. Tokens are real ones; MFU is of the datasheet's bf16 "
        f"rate, recomputation not counted. Dollars are for 27 B tokens at ${records.price:g} per GPU-hour.",
        "",
        *table("", "dropout", "tokens/s", "MFU", "micro-batch", "ms", "optimizer ms", "peak GB", "dollars"),
    ]
    for (preset, lengths, dropout, _), result in ours.items():
        lines.append(line(
            f"{preset}, {called(lengths)}", dropout, number(result["tokens_per_second"]),
            f"{result['mfu']:.1%}" if result["mfu"] else "", f"{result['micro_batch_tokens']:,}",
            number(result["micro_batch_seconds"] * 1e3), number(result["optimizer_seconds"] * 1e3),
            number(result["peak_bytes"] / 1e9) if result["peak_bytes"] else "",
            number(dollars(result["tokens_per_second"], records.price)),
        ))  # fmt: skip
    peers = {key: r["result"] for key, r in found.items() if key[-1] != "minisobert" and "result" in r}
    if not peers:
        return lines
    lines += [
        "",
        "Beside transformers' classes of the same size, compiled, on the same documents, padded: real tokens/s of "
        "micro-batches, optimizer left out on both sides. MegatronBert computes what minisobert does; ModernBERT is a "
        "cheaper model: two of three layers see 128 tokens. *Differs*: nats between the first losses, with the same "
        "weights for MegatronBert, with its own random ones for ModernBERT.",
        "",
        *table("", "dropout", "tokens/s", "minisobert's", "times as fast", "padding", "peak GB", "differs"),
    ]
    for (preset, lengths, dropout, name), result in peers.items():
        speed = result["micro_batch_tokens_per_second"]
        here = ours.get((preset, lengths, dropout, "minisobert"), {}).get("micro_batch_tokens_per_second")
        how = f"{name} ({result['attends']}{', compiled' * result['compiled']})"
        lines.append(line(
            f"{preset}, {called(lengths)}: {how}", dropout, number(speed), number(here), number(ratio(here, speed), 2),
            f"{1 - result['real_tokens'] / result['padded_tokens']:.0%}",
            number(result["peak_bytes"] / 1e9) if result["peak_bytes"] else "", number(result.get("difference"), 2),
        ))  # fmt: skip
    return lines


def _profile(records: Records) -> list[str]:
    result = records.get("profile")
    if not result:
        return []
    what = "torch's operations on the CPU" if records.dry else "kernels"
    lines = [
        "## Where a micro-batch's time goes",
        "",
        f"base, posts, dropout 0, forward and backward: {number(result['milliseconds'])} ms in {what}.",
        "",
        *table("", "calls", "ms", "share"),
    ]
    for each in result["kernels"]:
        name = each["name"].replace("|", "\\|")
        name = name if len(name) <= 90 else f"{name[:87]}…"
        lines.append(line(f"`{name}`", number(each["calls"]), number(each["milliseconds"]), f"{each['share']:.1%}"))
    return lines
