"""`make gpu`: tests, ceilings, kernels and training on one GPU, the most valuable first.

gpu.json, gpu.md, tests.log and the plots go to $OUT or runs/gpu, and with --write to benchmarks/results/gpu. A
measurement that one of these folders already has, from the same sources and the same chip, is not repeated. So the same
command continues a run that was cut short.
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
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import torch

from benchmarks import RESULTS
from benchmarks.gpu import BEGAN, attention, plots, report, rowwise, steps, training
from benchmarks.gpu.records import ROOT, Records
from benchmarks.gpu.setting import DROPOUTS, LENGTHS, REAL, TOY, Setting
from benchmarks.gpu.timing import Disagreement
from minisobert.cli import Parser, fail
from minisobert.ops import dispatch

TESTS_SHARE = 0.5  # of the time, so that tests that hang leave time for the measurements
# Seconds that must be left before starting something that torch compiles first. For a whole model that leaves 150
# seconds until minute nine.
COMPILED, COMPILED_MODEL = 25, 120
FIRST_COMPILED = ("attention/64/posts/0.0/flex", "training/base/posts/0.0/")  # the most important peers
SWEEP = 45  # seconds that must be left for tiles: all take a minute, and train.py is worth more
SECONDS = 510
OURS = "ceilings", "profile", "rows", "tiles", "tables", "surroundings", "train.py"  # stages without peers
ON_KERNELS = "training/base/posts/0.1/minisobert", "training/modern-base/posts/0.0/minisobert"  # in a dry run
STEPPED = "base", "modern-base"  # the presets that train.py runs and that are profiled


@dataclass(frozen=True)
class Measurement:
    name: str  # parts with slashes between them
    measure: Callable[[], dict]
    ours: bool  # whether a failure is a mistake in this project
    needs: float = 4  # seconds that must be left


def plan(setting: Setting, run_tests: Callable[[], dict]) -> list[Measurement]:
    """All measurements, the most valuable first: tests, our own code, peers that need no compiler, peers that do."""
    implementations = list(attention.IMPLEMENTATIONS)
    bert = {preset: model for preset, (model, *_) in setting.models.items() if not model.is_modern}
    hidden, ffn = zip(*((model.hidden, model.ffn) for model in bert.values()))
    table = [  # stage, function, and the values of each argument; the arguments are the other parts of a name
        ("ceilings/copy", rowwise.measure_copy),
        ("ceilings/gemm", rowwise.measure_gemm),
        ("attention", attention.measure, setting.heads, LENGTHS, DROPOUTS, implementations),
        ("add_norm", rowwise.measure_norm, hidden, DROPOUTS, ("minisobert", "eager", "compiled")),
        ("add_norm", rowwise.measure_norm, hidden, (0.0,), ("layer_norm",)),
        ("bias_gelu", rowwise.measure_gelu, ffn, ("minisobert", "eager", "compiled")),
        ("cross_entropy", rowwise.measure_cross_entropy, rowwise.CROSS_ENTROPIES),
        ("rows", training.measure_rows, setting.rows, DROPOUTS),
        ("ceilings/gemm", rowwise.measure_gemm, bert, rowwise.PRODUCTS),
        ("tables", attention.measure_earlier, (64,), LENGTHS, DROPOUTS),
        ("surroundings", attention.measure_surroundings, (64,), ("posts",), (0.0,), attention.SURROUNDINGS),
        *(("tiles", attention.measure_tile, (kernel,), tiles) for kernel, tiles in attention.TILES.items()),
    ]
    for preset, (model, *_) in setting.models.items():
        names = ["minisobert", *filter(installed, training.PEERS[model.architecture])]
        table.append(("training", training.measure, (preset,), LENGTHS, setting.dropouts(preset), names))
    for preset in STEPPED:
        table.append(("profile", training.profile, (preset,)))
        if find_spec("tokenizers"):
            table.append(("train.py", steps.measure, (preset,)))
    measurements = []
    for stage, measure, *parts in table:
        for arguments in product(*parts):
            if stage == "attention" and not attention.takes(*arguments[1:]):
                continue
            name = "/".join(map(str, (stage, *arguments)))
            ours = name.endswith("minisobert") or stage.startswith(OURS)
            if stage in ("training", "rows", "profile", "train.py"):
                needs = (40 if stage == "train.py" else 15) if ours else COMPILED_MODEL
            else:
                needs = SWEEP if stage == "tiles" else COMPILED if name.endswith("flex") or "compiled" in name else 4
            measurements.append(Measurement(name, partial(measure, setting, *arguments), ours, needs))

    def order(each: Measurement) -> tuple:
        compiles = each.needs >= COMPILED and not each.name.startswith(FIRST_COMPILED)
        return not each.ours, compiles, each.needs, "/0.1/" in each.name

    return [Measurement("tests", run_tests, ours=True, needs=10), *sorted(measurements, key=order)]


def installed(peer: str) -> bool:
    return not peer.endswith("-flash") or find_spec("flash_attn") is not None


def run_tests(log: Path, left: Callable[[], float], dry: bool) -> dict:
    """Runs tests/gpu in a process group of its own, with its output in log. In a dry run the tests see no GPU."""
    # most of the time goes into compiling, which takes one core per process
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
            if tests.returncode is None:  # also on an interrupt; xdist's workers would keep the GPU busy
                os.killpg(tests.pid, signal.SIGKILL)
    lines = [line.strip("= ") for line in log.read_text().splitlines()]
    outcome = re.compile(r"\d+ (passed|failed|skipped|deselected|error)|no tests ran")
    summary = next(filter(outcome.search, reversed(lines)), "no outcome")
    if code not in (0, 5):  # 5: nothing was collected
        raise RuntimeError(f"{summary} (exit status {code}; see {log.name})")
    return {"summary": summary}


def make(measurement: Measurement, records: Records) -> None:
    """Measures, and records the result or the failure."""
    began = time.monotonic()
    record = {"fingerprint": records.fingerprint, "ours": measurement.ours}
    try:
        torch.manual_seed(0)  # the same numbers, whatever was measured before
        record["result"] = measurement.measure()
    except Exception as error:
        message = " ".join(str(error).split()) or "no message"
        reason = message if type(error) is RuntimeError else f"{type(error).__name__}: {message}"
        record["failed"] = reason[:300]
        record["ours"] |= isinstance(error, Disagreement)
    record["seconds"] = round(time.monotonic() - began, 2)
    records.measurements[measurement.name] = record
    outcome = f"FAILED, {record['failed'][:100]}" if "failed" in record else f"took {record['seconds']} s"
    print(f"{time.monotonic() - BEGAN:6.1f} s  {measurement.name}: {outcome}", file=sys.stderr)


def device_works() -> bool:
    """Frees memory. Returns False after an illegal access, from which a process cannot recover."""
    torch.compiler.reset()  # each measurement compiles anew, so none meets the limit on recompilations
    gc.collect()
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    except RuntimeError:
        return False
    return True


def on_kernels(name: str) -> bool:
    """Whether a dry run makes this measurement with the kernels, in Triton's interpreter. These are the measurements of
    single kernels and one model of each architecture. The rest use the references, which are far faster on a CPU."""
    of_kernels = name.endswith("minisobert") and not name.startswith("training")
    return of_kernels or name.startswith(("tables", "surroundings", "tiles")) or name in ON_KERNELS


@contextmanager
def in_interpreter() -> Iterator[None]:
    """Within this context, CPU tensors use the kernels too."""
    from tests import bfloat16

    bfloat16.install()
    usual = dispatch.takes_kernel
    dispatch.takes_kernel = lambda x: dispatch.HAVE_TRITON
    try:
        yield
    finally:
        dispatch.takes_kernel = usual


def main() -> int:
    about = "Results go to $OUT or runs/gpu. Repeat the command to measure what is missing; `make gpu` does the same."
    parser = Parser("benchmarks.gpu", about, "python -m benchmarks.gpu --dry --fresh", allow_abbrev=False)
    parser.add_argument("--seconds", type=float, default=SECONDS, metavar="X", help="seconds after which to end")
    parser.add_argument("--fresh", nargs="?", const="", metavar="PART",
                        help="measure again what was measured: everything, or what has PART in its name")  # fmt: skip
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--dry", action="store_true", help="only try every stage, at toy sizes on the CPU")
    kind.add_argument("--write", action="store_true", help="store the results in benchmarks/results/gpu")
    options = parser.parse_args()
    if not options.dry and not torch.cuda.is_available():
        fail("benchmarks.gpu: there is no CUDA device; --dry walks every stage at toy sizes on the CPU")
    if options.dry:
        torch.set_num_threads(1)  # at toy sizes more threads gain nothing, and wait for each other on busy cores
        os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is imported

    setting = TOY if options.dry else REAL
    usual, kept = ROOT / ("runs/gpu-dry" if options.dry else "runs/gpu"), RESULTS / "gpu"
    folder = kept if options.write else Path(os.environ.get("OUT") or usual)
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "tests.log"
    records = Records(folder, setting)
    for earlier in (folder,) if options.dry else (folder, usual, kept):
        records.load(earlier / "gpu.json")
        if (earlier / log.name).exists() and not log.exists():
            shutil.copy(earlier / log.name, log)
    if options.fresh is not None:
        records.measurements = {name: r for name, r in records.measurements.items() if options.fresh not in name}

    def left() -> float:
        return options.seconds - (time.monotonic() - BEGAN)

    todo = plan(setting, lambda: run_tests(log, left, setting.dry))
    missing = [each for each in todo if each.name not in records.measurements]
    records.not_reached = [each.name for each in missing]
    drawn = False
    for each in missing:
        if left() < each.needs:
            continue
        if each.needs == COMPILED_MODEL and not drawn:
            plots.write(records, folder)  # before compiling a whole model, which may take all the time that is left
            drawn = True
        with in_interpreter() if setting.dry and on_kernels(each.name) else nullcontext():
            make(each, records)
        records.not_reached.remove(each.name)
        records.save()
        report.write(records, folder)
        if not (setting.dry or device_works()):
            print("the device is out of order after this; starting again for the rest", file=sys.stderr, flush=True)
            os.environ["OUT"] = str(folder)
            again = ["-m", "benchmarks.gpu", "--seconds", f"{max(left(), 0):.0f}"]
            os.execv(sys.executable, [sys.executable, *again])

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
