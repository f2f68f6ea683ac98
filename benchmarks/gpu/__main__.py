"""`make gpu`: tests, ceilings, kernels and training on one GPU, the most valuable first.

Results go to $OUT or runs/gpu, with --write to benchmarks/results/gpu: gpu.json, gpu.md, tests.log and plots. What is
in one of these already, made by the same sources on the same chip, is not repeated: a run that was cut short goes on.
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
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import torch

from benchmarks import RESULTS
from benchmarks.gpu import BEGAN, attention, plots, report, rowwise, training
from benchmarks.gpu.records import BENCHMARKS, ROOT, TESTS, Records
from benchmarks.gpu.setting import DROPOUTS, LENGTHS, REAL, TOY, Setting
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


STAGES = {  # what measures; it takes the setting and the rest of a measurement's name
    "ceilings/copy": rowwise.measure_copy,
    "ceilings/gemm": rowwise.measure_gemm,
    "attention": attention.measure,
    "add_norm": rowwise.measure_norm,
    "bias_gelu": rowwise.measure_gelu,
    "cross_entropy": rowwise.measure_cross_entropy,
    "training": training.measure,
    "profile": training.profile,
}


def plan(setting: Setting, run_tests: Callable[[], dict]) -> list[Measurement]:
    """Everything, the most valuable first."""
    (first, *others), presets = setting.heads, list(setting.models)
    hidden, ffn = setting.widths, [4 * width for width in setting.widths]
    rivals = ["sdpa-cudnn", "sdpa-flash", "sdpa-efficient", "varlen"]
    table = [  # the parts of names; of a list, each
        ["ceilings/copy"],
        ["ceilings/gemm"],
        ["attention", first, LENGTHS, DROPOUTS, "minisobert"],
        ["add_norm", hidden, DROPOUTS, "minisobert"],
        ["bias_gelu", ffn, "minisobert"],
        ["cross_entropy", "minisobert"],
        ["training", presets, LENGTHS, DROPOUTS, "minisobert"],
        ["profile"],
        ["attention", first, LENGTHS, DROPOUTS, rivals],
        ["attention", first, LENGTHS, 0.0, "flex"],
        ["ceilings/gemm", presets, rowwise.PRODUCTS],
        ["add_norm", hidden, DROPOUTS, "eager"],
        ["add_norm", hidden, 0.0, "layer_norm"],
        ["bias_gelu", ffn, "eager"],
        ["cross_entropy", ["eager-bf16", "eager-fp32"]],
        ["attention", others, LENGTHS, DROPOUTS, "minisobert"],
        ["training", "base", "posts", 0.0, training.PEERS],
        ["attention", others, LENGTHS, DROPOUTS, rivals],
        ["add_norm", hidden, DROPOUTS, "compiled"],
        ["bias_gelu", ffn, "compiled"],
        ["cross_entropy", "compiled-fp32"],
        ["attention", others, LENGTHS, 0.0, "flex"],
        ["training", "large", "posts", 0.0, training.PEERS],
        ["training", presets, LENGTHS, DROPOUTS, training.PEERS],
    ]
    names = {}  # in this order, each once
    for row in table:
        each = product(*(part if isinstance(part, list | tuple) else [part] for part in row))
        names |= dict.fromkeys(sorted(each, key=lambda name: 0.1 in name))  # first without dropout
    tests = Measurement("tests", run_tests, ours=True, needs=10, sources=TESTS)
    possible = (name for name in names if name[0] != "attention" or attention.takes(name[-1], *name[2:4]))
    return [tests, *(_measurement(setting, *name) for name in possible)]


def _measurement(setting: Setting, stage: str, *arguments) -> Measurement:
    name = "/".join(map(str, (stage, *arguments)))
    ours = name.endswith("minisobert") or stage.startswith(("ceilings", "profile"))
    if stage == "training":
        needs = 15 if ours else COMPILED_MODEL
    elif name.endswith("flex") or "compiled" in name:
        needs = COMPILED
    else:
        needs = 10 if stage == "profile" else 4
    return Measurement(name, partial(STAGES[stage], setting, *arguments), ours, needs)


def run_tests(log: Path, left: Callable[[], float], dry: bool) -> dict:
    """tests/gpu in a process group of its own; its output is kept in log. A dry run shows them no GPU."""
    # compiling takes most of the time, a core for each process
    at_once = ["-n", str(min(os.cpu_count() or 1, 8))] if find_spec("xdist") else []
    command = [sys.executable, "-m", "pytest", "tests/gpu", "-rfE", "--durations=10", *at_once]
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if dry else {})
    started = {"cwd": ROOT, "env": environment, "stderr": subprocess.STDOUT, "start_new_session": True}
    with log.open("w") as file, subprocess.Popen(command, stdout=file, **started) as tests:
        try:
            code = tests.wait(left() * TESTS_SHARE)
        except subprocess.TimeoutExpired as expired:
            raise RuntimeError(f"tests/gpu did not end within {expired.timeout:.0f} s; see {log.name}") from None
        finally:
            if tests.returncode is None:  # on an interrupt as well; and xdist's workers, which would keep the GPU busy
                os.killpg(tests.pid, signal.SIGKILL)
    lines = [line.strip("= ") for line in log.read_text().splitlines()]
    outcome = re.compile(r"\d+ (passed|failed|skipped|deselected|error)|no tests ran")
    summary = next(filter(outcome.search, reversed(lines)), "no outcome")
    if code not in (0, 5):  # 5: nothing was collected
        raise RuntimeError(f"{summary} (exit status {code}; see {log.name})")
    return {"summary": summary, "ran": "passed" in summary}


def make(measurement: Measurement, records: Records) -> None:
    """Measures, and puts what came of it on record."""
    began = time.monotonic()
    record = {"fingerprint": records.fingerprints[measurement.sources], "ours": measurement.ours}
    torch.manual_seed(0)  # the same numbers, whatever was measured before
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


def device_works() -> bool:
    """Gives back what the last measurement held. False after an illegal access, from which a process never recovers."""
    torch.compiler.reset()  # each measurement compiles for itself: no leftovers, no limit on recompilations
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except RuntimeError:
        return False
    return True


def main() -> int:
    parser = Parser(prog="benchmarks.gpu", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=SECONDS, metavar="X", help=f"to end after (default {SECONDS})")
    parser.add_argument("--price-per-gpu-hour", type=float, default=3.0, metavar="X", help="dollars (default 3)")
    parser.add_argument("--fresh", nargs="?", const="", metavar="PART",
                        help="measure anew: all, or what has PART in its name")  # fmt: skip
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--dry", action="store_true", help="toy sizes on the CPU: walks every stage, measures nothing")
    kind.add_argument("--write", action="store_true", help="keep the results in benchmarks/results/gpu")
    options = parser.parse_args()
    if not options.dry and not torch.cuda.is_available():
        fail("benchmarks.gpu: there is no CUDA device; --dry walks every stage at toy sizes on the CPU")
    if options.dry:
        torch.set_num_threads(1)  # more gain nothing at toy sizes, and wait for each other where cores are busy

    setting = TOY if options.dry else REAL
    usual, kept = ROOT / ("runs/gpu-dry" if options.dry else "runs/gpu"), RESULTS / "gpu"
    folder = kept if options.write else Path(os.environ.get("OUT") or usual)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "tests.log"
    records = Records(folder, setting.device, options.price_per_gpu_hour)
    for earlier in (folder,) if options.dry else (folder, usual, kept):
        records.load(earlier / "gpu.json")
        if (earlier / log.name).exists() and not log.exists():
            shutil.copy(earlier / log.name, log)
    if options.fresh is not None:
        records.measurements = {name: r for name, r in records.measurements.items() if options.fresh not in name}

    def left() -> float:
        return options.seconds - (time.monotonic() - BEGAN)

    todo = plan(setting, lambda: run_tests(log, left, setting.dry))
    known = {name: record["fingerprint"] for name, record in records.measurements.items()}
    missing = [each for each in todo if known.get(each.name) != records.fingerprints[each.sources]]
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
        if not (setting.dry or device_works()):
            print("the device is out of order after this; starting again for the rest", file=sys.stderr, flush=True)
            arguments = ["--seconds", f"{max(left(), 0):.0f}", "--price-per-gpu-hour", str(records.price)]
            os.environ["OUT"] = str(folder)
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
        print("\n".join(report.goal_lines(records)))
    for name, reason in (broken := records.failures(ours=True)).items():
        print(f"FAILED {name}: {reason} (--fresh {name} tries again)", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
