"""`make gpu`: tests, ceilings, kernels and training on one GPU, the most valuable first.

Results go to $OUT, or to benchmarks/results/gpu: gpu.json, gpu.md, tests.log and plots. What is there already (or in
benchmarks/results/gpu), made by the same sources on the same chip, is not repeated: a run that was cut short goes on.
"""

from __future__ import annotations

import gc
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import torch

from benchmarks import RESULTS
from benchmarks.gpu import BEGAN, attention, plots, report, rowwise, training
from benchmarks.gpu.records import BENCHMARKS, ROOT, TESTS, Records
from benchmarks.gpu.setting import DROPOUTS, LENGTHS, Setting, real_setting, toy_setting
from benchmarks.gpu.timing import Disagreement
from minisobert.cli import Parser, fail

TESTS_SHARE = 0.5  # of the time: tests that hang leave the rest for the measurements
# Seconds that must be left to begin with what torch compiles first. A whole model then has 150 until minute nine.
COMPILED, COMPILED_MODEL = 25, 120
SECONDS = 510


@dataclass(frozen=True)
class Measurement:
    name: str  # parts with slashes between them
    measure: Callable[[], dict]
    ours: bool  # a failure is a mistake of this project
    needs: float = 4  # seconds that must be left
    sources: tuple[str, ...] = BENCHMARKS


def plan(setting: Setting, run_tests: Callable[[], dict]) -> Iterator[Measurement]:
    """Everything, the most valuable first."""

    def kernel(width: int, lengths: str, dropout: float, name: str) -> Measurement:
        measure = partial(attention.measure, setting, width, lengths, dropout, name)
        needs = COMPILED if name == "flex" else 4
        return Measurement(f"attention/{width}/{lengths}/{dropout}/{name}", measure, name == "minisobert", needs)

    def attentions(width: int, names: list[str]) -> Iterator[Measurement]:
        for dropout in DROPOUTS:
            for lengths in LENGTHS:
                yield from (kernel(width, lengths, dropout, name) for name in names
                            if attention.takes(name, lengths, dropout))  # fmt: skip

    def rowwises(which: Callable[[str], bool]) -> Iterator[Measurement]:
        def measurement(name: str, function: Callable[..., dict], *arguments) -> Measurement:
            needs = COMPILED if "compiled" in name else 4
            return Measurement(name, partial(function, setting, *arguments), name.endswith("minisobert"), needs)

        for width in setting.widths:
            for name in filter(which, rowwise.NORM):
                for dropout in DROPOUTS if name != "layer_norm" else (0.0,):
                    path = f"add_norm/{width}/{dropout}/{name}"
                    yield measurement(path, rowwise.measure_norm, width, dropout, name)
        for width in setting.widths:
            for name in filter(which, rowwise.GELU):
                yield measurement(f"bias_gelu/{4 * width}/{name}", rowwise.measure_gelu, 4 * width, name)
        for name in filter(which, rowwise.CROSS_ENTROPY):
            yield measurement(f"cross_entropy/{name}", rowwise.measure_cross_entropy, name)

    def trainings(preset: str) -> Iterator[Measurement]:
        for dropout in DROPOUTS:
            for lengths in LENGTHS:
                measure = partial(training.measure, setting, preset, lengths, dropout)
                yield Measurement(f"training/{preset}/{lengths}/{dropout}/minisobert", measure, True, 15)

    def peers(preset: str, lengths: str, dropout: float) -> Iterator[Measurement]:
        for name in training.PEERS:
            measure = partial(training.measure_peer, setting, preset, lengths, dropout, name)
            path = f"training/{preset}/{lengths}/{dropout}/{name}"
            yield Measurement(path, measure, False, COMPILED_MODEL)

    widths = list(setting.heads)
    eager = [name for name in attention.IMPLEMENTATIONS if name not in ("minisobert", "flex")]
    yield Measurement("tests", run_tests, True, 10, TESTS)
    yield Measurement("ceilings/copy", partial(rowwise.copy, setting), True)
    yield Measurement("ceilings/gemm", partial(rowwise.gemm, setting, *[setting.gemm] * 3), True)
    yield from attentions(widths[0], ["minisobert"])
    yield from rowwises(lambda name: name == "minisobert")
    yield from trainings("base")
    yield from trainings("large")
    yield Measurement("profile", partial(training.profile, setting, "base", "posts", 0.0), True, 10)
    yield from attentions(widths[0], eager)
    yield kernel(widths[0], "posts", 0.0, "flex")
    for preset, size in setting.training.items():
        tokens = size.micro_batch_rows * setting.row_tokens
        for name, shape in rowwise.products(size.model, tokens, int(training.MASKED * tokens)).items():
            yield Measurement(f"ceilings/gemm/{preset}/{name}", partial(rowwise.gemm, setting, *shape), True)
    yield from rowwises(lambda name: name.startswith("eager") or name == "layer_norm")
    for width in widths[1:]:
        yield from attentions(width, ["minisobert"])
    yield from peers("base", "posts", 0.0)
    for width in widths[1:]:
        yield from attentions(width, eager)
    yield kernel(widths[0], "rows", 0.0, "flex")
    yield from rowwises(lambda name: name.startswith("compiled"))
    for width in widths[1:]:
        yield from attentions(width, ["flex"])
    yield from peers("large", "posts", 0.0)
    for preset in setting.training:
        yield from peers(preset, "rows", 0.0)
    for preset in setting.training:
        for lengths in LENGTHS:
            yield from peers(preset, lengths, 0.1)


def run_tests(log: Path, left: Callable[[], float], dry: bool) -> dict:
    """tests/gpu in a process group of its own; its output is kept in log. A dry run shows them no GPU."""
    # compiling takes most of the time, a core for each process
    at_once = ["-n", str(min(os.cpu_count() or 1, 8))] if find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-rfE", "--durations=10", *at_once]
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, **({"CUDA_VISIBLE_DEVICES": ""} if dry else {})}
    with (
        log.open("w") as file,
        subprocess.Popen(command, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT,
                         start_new_session=True) as tests,
    ):  # fmt: skip
        try:
            code = tests.wait(left() * TESTS_SHARE)
        except subprocess.TimeoutExpired as expired:
            raise RuntimeError(f"tests/gpu did not end within {expired.timeout:.0f} s; see {log.name}") from None
        finally:
            if tests.returncode is None:  # on an interrupt as well; and xdist's workers, which would keep the GPU busy
                os.killpg(tests.pid, signal.SIGKILL)
    outcome = re.compile(r"\d+ (passed|failed|skipped|deselected|error)|no tests ran")
    lines = [line.strip("= ") for line in log.read_text().splitlines()]
    summary = next(filter(outcome.search, reversed(lines)), "no outcome")
    if code not in (0, 5):  # 5: nothing was collected
        raise RuntimeError(f"{summary} (exit status {code}; see {log.name})")
    return {"summary": summary, "ran": "passed" in summary}


def make(measurement: Measurement, records: Records) -> None:
    """Measures, and puts what came of it on record."""
    began = time.monotonic()
    record = {"fingerprint": records.fingerprint(measurement.sources), "ours": measurement.ours}
    try:
        record["result"] = measurement.measure()
    except Exception as error:
        message = " ".join(str(error).split()) or "no message"
        reason = message if type(error) is RuntimeError else f"{type(error).__name__}: {message}"
        record["failed"] = reason if len(reason) <= 300 else f"{reason[:299]}…"
        record["ours"] |= isinstance(error, Disagreement)
    record["seconds"] = round(time.monotonic() - began, 2)
    records.measurements[measurement.name] = record
    print(f"{time.monotonic() - BEGAN:6.1f} s  {measurement.name}: {report.headline(record)}", file=sys.stderr)


def device_works(setting: Setting) -> bool:
    """Gives back what the last measurement held. False after an illegal access, from which a process never recovers."""
    if setting.dry:
        return True
    torch.compiler.reset()  # each measurement compiles for itself: no leftovers, no limit on recompilations
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def output_folder(dry: bool) -> Path:
    if out := os.environ.get("OUT"):
        return Path(out)
    return ROOT / "runs/gpu-dry" if dry else RESULTS / "gpu"


def main() -> int:
    parser = Parser(prog="benchmarks.gpu", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=SECONDS, metavar="X", help=f"to end after (default {SECONDS})")
    parser.add_argument("--price-per-gpu-hour", type=float, default=3.0, metavar="X", help="dollars (default 3)")
    parser.add_argument(
        "--fresh", nargs="?", const="", metavar="PART", help="measure anew: all, or what has PART in its name"
    )
    parser.add_argument("--dry", action="store_true", help="toy sizes on the CPU: walks every stage, measures nothing")
    options = parser.parse_args()
    if not options.dry and not torch.cuda.is_available():
        fail("benchmarks.gpu: there is no CUDA device; --dry walks every stage at toy sizes on the CPU")

    def left() -> float:
        return options.seconds - (time.monotonic() - BEGAN)

    if options.dry:
        torch.set_num_threads(1)  # more gain nothing at toy sizes, and wait for each other where cores are busy
    setting = toy_setting() if options.dry else real_setting()
    folder = output_folder(options.dry)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "tests.log"
    records = Records(folder, setting, options.price_per_gpu_hour)
    for earlier in (folder, *[RESULTS / "gpu"] * (not options.dry)):
        records.load(earlier / "gpu.json")
        if (earlier / log.name).exists() and not log.exists():
            shutil.copy(earlier / log.name, log)
    if options.fresh is not None:
        records.measurements = {name: r for name, r in records.measurements.items() if options.fresh not in name}

    todo = list(plan(setting, lambda: run_tests(log, left, setting.dry)))
    missing = [
        each for each in todo
        if records.measurements.get(each.name, {}).get("fingerprint") != records.fingerprint(each.sources)
    ]  # fmt: skip
    records.not_reached = [each.name for each in missing]
    drawn = False
    for each in missing:
        if left() < each.needs:
            continue
        if each.needs == COMPILED_MODEL and not drawn:
            plots.write(records, folder)  # now: nobody knows how long compiling takes
            drawn = True
        make(each, records)
        records.not_reached.remove(each.name)
        records.save()
        report.write(records, folder)
        if not device_works(setting):
            print("the device is out of order after this; starting again for the rest", file=sys.stderr, flush=True)
            arguments = ["--seconds", f"{max(left(), 0):.0f}", "--price-per-gpu-hour", str(records.price)]
            os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu", *arguments])

    records.save()
    report.write(records, folder)
    plots.write(records, folder)
    made = len(missing) - len(records.not_reached)
    print(f"{made} measured, {len(todo) - len(missing)} were there already, {len(records.not_reached)} not reached")
    if records.not_reached:
        print("the same command goes on with what is left")
    print(folder / "gpu.md")
    if not options.dry:
        print("\n".join(["", *report.goal_lines(records)]))
    broken = records.failures(ours=True)
    for name, reason in broken.items():
        print(f"FAILED {name}: {reason} (--fresh {name} tries again)", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
