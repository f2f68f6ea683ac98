"""Processes die, hang, run out of disk or make NaNs: only a few steps are lost, and messages say what happened."""

from __future__ import annotations

import ctypes
import errno
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from runs import BATCH, ROW, column, finish, launch, metrics, start, weights, words

import train
from minisobert.parallel import roll_call
from minisobert.parallel.data import Gradients
from minisobert.training import checkpoint, loop

ROOT = Path(__file__).parents[2]
EVERY = {"checkpoint_every_tokens": 2 * BATCH, "micro_batch_rows": 2, "learning_rate": 1e-3}  # two steps


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """An undisturbed run of two data-parallel processes."""
    out = tmp_path_factory.mktemp("whole") / "run"
    assert finish(start(words(corpus, out, steps=8, **EVERY), out.with_suffix(".log"), 2)) == [0, 0]
    return out


def is_the_same_as(out, whole) -> bool:
    ours, expected = weights(out), weights(whole)
    return torch.equal(column(out), column(whole)) and all(torch.equal(ours[name], expected[name]) for name in expected)


def wait_for_checkpoint(out, processes, log) -> None:
    until = time.monotonic() + 60
    while not checkpoint.steps(out / "checkpoints"):
        assert time.monotonic() < until and processes[0].is_alive(), log.read_text()
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("number", "lost", "ranks", "tensor_parallel"),
    [(signal.SIGKILL, 1, 4, 2), (signal.SIGKILL, 0, 2, 1), (signal.SIGSTOP, 1, 2, 1), (signal.SIGSTOP, 1, 2, 2)],
    ids=["1 of 4 dies", "0 dies", "1 hangs", "1 hangs, tensor parallel"],
)
def test_a_process_that_dies_or_hangs_is_named_and_the_run_goes_on(
    corpus, tmp_path, whole, number, lost, ranks, tensor_parallel
):
    out, log = tmp_path / "run", tmp_path / "log"
    argv = words(corpus, out, steps=8, timeout=7, tensor_parallel=tensor_parallel, **EVERY)
    processes = start(argv, log, ranks)
    wait_for_checkpoint(out, processes, log)
    os.kill(processes[lost].pid, number)
    began = time.monotonic()
    others = [process for rank, process in enumerate(processes) if rank != lost]
    for process in others:
        process.join(40)
    processes[lost].join(5)
    ended = processes[lost].exitcode
    processes[lost].kill()
    said = [line for line in log.read_text().splitlines() if "gave up waiting" in line]
    assert [process.exitcode for process in others] == [1] * (ranks - 1), log.read_text()
    assert time.monotonic() - began < 30
    assert len(said) == 1 and "from the last checkpoint" in said[0]
    host = re.escape(socket.gethostname())
    assert re.search(rf"rank {lost} \(host {host}\) did not answer; rank \d on {host} ", said[0]), said[0]
    assert ended == -signal.SIGKILL  # so that torchrun need not wait for a stopped process
    assert len(metrics(out)) < 8
    if (ranks, tensor_parallel) == (2, 1):
        assert finish(start(argv, log, ranks)) == [0] * ranks
        assert "continuing after step" in log.read_text()
        assert is_the_same_as(out, whole)


@pytest.mark.skipif(not hasattr(os, "pidfd_open"), reason="Linux only")
def test_only_the_very_process_on_this_very_machine_is_killed():
    neighbour = subprocess.Popen(["sleep", "100"])
    try:
        own = roll_call.Process.own()
        process = own._replace(pid=neighbour.pid, started=roll_call._started(neighbour.pid))
        calls = roll_call.RollCall(None, 0, 3, 6)
        calls.processes = [own, process._replace(machine="another"), process._replace(started="1")]
        calls.kill_missing({0: 5})
        with pytest.raises(subprocess.TimeoutExpired):
            neighbour.wait(0.2)
        calls.processes.append(process)
        calls.kill_missing({0: 5})
        assert neighbour.wait(5) == -signal.SIGKILL
    finally:
        neighbour.kill()


def sleep_in_a_step(rank: int) -> None:
    """Rank 1 is alive, but does not come to the meeting of the hosts."""
    step = loop.train_step

    def sleeping(model, optimizer, batches, step_of_run, config, mesh, progress, *rest):
        if rank == 1 and progress.step == 3:
            time.sleep(100)
        return step(model, optimizer, batches, step_of_run, config, mesh, progress, *rest)

    loop.train_step = sleeping


def test_a_process_that_lives_but_does_not_come_is_named_too(corpus, tmp_path):
    log = tmp_path / "log"
    processes = start(words(corpus, tmp_path / "run", timeout=7, **EVERY), log, 2, sleep_in_a_step)
    assert finish(processes, 60) == [1, 1]
    said = [line for line in log.read_text().splitlines() if "gave up waiting" in line]
    assert len(said) == 1 and re.search(r"rank 1 \(host \S+\) answered, but hung; rank 0 on", said[0])


DIES_ONCE = f"""
import os, signal, sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import torch, train, runs
from minisobert.training import loop
torch.set_num_threads(1)
runs.make_small()
step = loop.train_step
def dying(model, optimizer, batches, step_of_run, config, mesh, progress, *rest):
    if mesh.rank == 1 and progress.step == 5 and not os.path.exists(sys.argv[1]):
        open(sys.argv[1], "w").close()
        os.kill(os.getpid(), signal.SIGKILL)
    return step(model, optimizer, batches, step_of_run, config, mesh, progress, *rest)
loop.train_step = dying
sys.exit(train.main(sys.argv[2:]))
"""


@pytest.mark.parametrize("machines", [1, 2])
def test_torchrun_starts_the_job_again_and_it_goes_on_bit_for_bit(corpus, tmp_path, whole, machines):
    """--fresh is only for the first start: when torchrun starts the job again, the folder holds the job's own work.

    Of two machines, one counts a restart, and the other a change of members.
    """
    out = tmp_path / "run"
    (tmp_path / "dies_once.py").write_text(DIES_ONCE)
    argv = words(corpus, out, steps=8, timeout=30, **EVERY)
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={2 // machines}", "--max-restarts=1"]
    if machines > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            endpoint = f"--rdzv-endpoint=127.0.0.1:{free.getsockname()[1]}"
        command += [f"--nnodes={machines}", "--rdzv-backend=c10d", "--rdzv-id=test", endpoint]
    command += ["--monitor-interval=0.5", str(tmp_path / "dies_once.py"), str(tmp_path / "died"), *argv, "--fresh"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    agents = [subprocess.Popen(command, **pipes) for _ in range(machines)]
    said = [agent.communicate(timeout=120) for agent in agents]
    assert [agent.returncode for agent in agents] == [0] * machines, said
    assert (tmp_path / "died").exists() and "continuing after step" in "".join(stdout for stdout, _ in said)
    assert is_the_same_as(out, whole)


SLOW_STEPS = f"""
import os, sys, time
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "tests")!r}]
import torch, train, runs
from minisobert.training import loop
print("pid", os.getpid(), flush=True)
torch.set_num_threads(1)
runs.make_small()
step = loop.train_step
def slow(*args):
    time.sleep(float(sys.argv[1]) if args[-2].step == 5 else 0.2)
    return step(*args)
loop.train_step = slow
sys.exit(train.main(sys.argv[2:]))
"""


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes where Linux lists them")
@pytest.mark.parametrize(("pause", "ranks"), [(0.2, 2), (100, 2), (0.2, 1)], ids=["between", "hanging", "alone"])
def test_processes_whose_torchrun_is_killed_save_and_end_within_the_timeout(corpus, tmp_path, whole, pause, ranks):
    out, log, script = tmp_path / "run", tmp_path / "log", tmp_path / "slow_steps.py"
    script.write_text(SLOW_STEPS)
    argv = words(corpus, out, steps=8, timeout=8, **EVERY)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={ranks}",
        str(script),
        str(pause),
        *argv,
    ]
    with open(log, "w") as file:
        agent = subprocess.Popen(command, stdout=file, stderr=file)
    until = time.monotonic() + 60
    while not checkpoint.steps(out / "checkpoints") or (pause == 100 and len(metrics(out)) < 5):
        assert time.monotonic() < until and agent.poll() is None, log.read_text()
        time.sleep(0.01)
    agent.kill()
    agent.wait()
    pids = [int(pid) for pid in re.findall(r"^pid (\d+)$", log.read_text(), re.MULTILINE)]
    assert len(pids) == ranks and all(is_alive(pid) for pid in pids)
    until = time.monotonic() + 8
    while any(is_alive(pid) for pid in pids):
        assert time.monotonic() < until, log.read_text()
        time.sleep(0.05)
    said = log.read_text()
    assert said.count(f"torchrun on {socket.gethostname()} (pid {agent.pid}) is gone; its processes save and exit") == 1
    saved = checkpoint.steps(out / "checkpoints")[-1]
    if pause == 100:
        assert saved.name < "step-00000005" and "exited without saving: --timeout 8 seconds are over" in said
    else:
        assert f"stopped after step {len(metrics(out))}; repeat the command" in said and saved.name > "step-00000002"
    assert finish(start(argv, log, ranks)) == [0] * ranks
    if ranks == 2:
        assert is_the_same_as(out, whole)


def make_nan(steps: range):
    """A `prepare` that makes a gradient of rank 1 NaN in these steps."""

    def break_it(rank: int) -> None:
        count, begin, start = 0, Gradients.before_last_backward, Gradients._start

        def counting(self):
            nonlocal count
            count += 1
            begin(self)

        def spoiling(self, bucket):
            name = "encoder.blocks.1.qkv.weight"
            if rank == 1 and count in steps and name in bucket.names:
                self.flat.gradient(name)[3, 4] = torch.nan
            return start(self, bucket)

        Gradients.before_last_backward, Gradients._start = counting, spoiling

    return break_it


def nan_once(rank: int) -> None:
    make_nan(range(3, 4))(rank)


def nan_for_ever(rank: int) -> None:
    make_nan(range(4, 100))(rank)


def test_a_nan_on_one_rank_skips_the_step_on_all_and_is_counted(corpus, tmp_path, whole):
    out, log = tmp_path / "run", tmp_path / "log"
    assert finish(start(words(corpus, out, steps=8, **EVERY), log, 2, nan_once)) == [0, 0], log.read_text()
    ours, expected = metrics(out), metrics(whole)
    assert [line["skipped"] for line in ours] == [0, 0] + [1] * 6
    assert [line["positions"] for line in ours] == [line["positions"] for line in expected]
    # the counter of the learning rate does not advance in this step; that of the data does
    assert ours[2]["lr"] == ours[3]["lr"] == expected[2]["lr"] and ours[7]["lr"] == expected[6]["lr"]
    assert ours[2]["loss"] == expected[2]["loss"] and ours[7]["loss"] != expected[7]["loss"]
    assert all(tensor.isfinite().all() for tensor in weights(out).values())


def test_too_many_in_a_row_end_the_run_with_a_report_and_the_run_can_go_on(corpus, tmp_path, whole):
    out, log = tmp_path / "run", tmp_path / "log"
    argv = words(corpus, out, steps=8, max_skipped=2, **EVERY)
    assert finish(start(argv, log, 2, nan_for_ever)) == [1, 1]
    said = [line for line in log.read_text().splitlines() if "train.py: " in line]
    assert len(said) == 1
    assert "the gradients of 3 steps in a row were not finite; the last was step 6 with rows 20 to 23" in said[0]
    assert "where it began: rank 1: encoder.blocks.1.qkv.weight;" in said[0]
    # its last checkpoint is that of step 4, whose gradient was the first to be skipped
    assert finish(start(argv, log, 2)) == [0, 0]
    assert metrics(out)[-1]["skipped"] == 1 and metrics(out)[-1]["step"] == 8


def no_space(rank: int) -> None:
    """The disk of rank 1 is full from the second checkpoint on."""
    calls, write = 0, checkpoint._write

    def writing(*args):
        nonlocal calls
        calls += 1
        if rank == 1 and calls == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(*args)

    checkpoint._write = writing


def test_a_full_disk_ends_the_run_on_all_ranks_and_nothing_saved_is_lost(corpus, tmp_path, whole):
    out, log = tmp_path / "run", tmp_path / "log"
    argv = words(corpus, out, steps=8, shard_optimizer=True, **EVERY)
    assert finish(start(argv, log, 2, no_space)) == [1, 1]
    said = [line for line in log.read_text().splitlines() if "train.py: " in line]
    assert len(said) == 1 and "step-00000004 could not be written: [Errno 28] No space left on device" in said[0]
    assert [path.name for path in checkpoint.steps(out / "checkpoints")] == ["step-00000002"]
    assert finish(start(argv, log, 2)) == [0, 0]
    torch.testing.assert_close(column(out), column(whole), rtol=0, atol=1e-5)


def slow_disk(rank: int) -> None:
    """The first process needs longer than --timeout to begin and to end the last checkpoint, and rank 1 to write it."""
    calls = dict.fromkeys(("_create", "_write", "_publish"), 0)

    def slowed(name: str, work: Callable, slow: int):
        def working(*args):
            calls[name] += 1
            if rank == slow and calls[name] == 4:
                time.sleep(7.5)
            work(*args)

        return working

    for name, slow in zip(calls, (0, 1, 0)):
        setattr(checkpoint, name, slowed(name, getattr(checkpoint, name), slow))


@pytest.mark.slow
def test_a_disk_slower_than_the_timeout_ends_nothing_while_somebody_writes(corpus, tmp_path, whole):
    out, log = tmp_path / "run", tmp_path / "log"
    assert finish(start(words(corpus, out, steps=8, timeout=7, **EVERY), log, 2, slow_disk)) == [0, 0], log.read_text()
    assert is_the_same_as(out, whole)


def dies_while_it_writes(number: signal.Signals, rank: int) -> None:
    def writing(*args):
        os.kill(os.getpid(), number)

    if rank == 1:
        checkpoint._write = writing


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["dies", "hangs"])
def test_a_process_that_dies_or_hangs_while_it_writes_is_not_waited_for(corpus, tmp_path, number):
    log = tmp_path / "log"
    argv = words(corpus, tmp_path / "run", steps=2, micro_batch_rows=2, timeout=7)
    first, second = start(argv, log, 2, partial(dies_while_it_writes, number))
    first.join(30)
    second.kill()
    assert first.exitcode == 1, log.read_text()
    assert re.search(r"rank 1 \(host \S+\) did not answer; rank 0 on", log.read_text())


def test_micro_batch_means_are_megatrons_and_another_loss(corpus, tmp_path, whole):
    """With unequal numbers of masked tokens, a mean of means is not the mean, unless a step has one micro-batch."""
    losses = {}
    for average in ("token", "micro-batch"):
        for rows in (1, 4):
            out = tmp_path / f"{average} {rows}"
            argv = words(corpus, out, steps=2, micro_batch_rows=rows, loss_average=average, dropout=0)
            assert finish(start(argv, tmp_path / "log")) == [0]
            losses[average, rows] = column(out)
    torch.testing.assert_close(losses["token", 1], losses["token", 4], rtol=0, atol=1e-5)
    torch.testing.assert_close(losses["micro-batch", 4], losses["token", 4], rtol=0, atol=1e-6)
    assert (losses["micro-batch", 1] - losses["token", 1]).abs().max() > 1e-5


def test_a_run_whose_batches_grow_takes_each_row_once_and_goes_on_where_it_was(corpus, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    options = {"batch_schedule": f"0:{2 * ROW},{4 * ROW}:{4 * ROW}", "train_tokens": 20 * ROW, "micro_batch_rows": 1}
    options |= {"checkpoint_every_tokens": 2 * ROW, "keep_checkpoints": 9}
    argv = words(corpus, out, **options)
    assert finish(start(argv, log, 2)) == [0, 0], log.read_text()
    assert [line["positions"] for line in metrics(out)] == [n * ROW for n in (2, 4, 8, 12, 16, 20)]
    before, after = metrics(out), weights(out)
    for path in checkpoint.steps(out / "checkpoints")[1:]:
        path.rename(tmp_path / path.name)
    assert finish(start(argv, log, 2)) == [0, 0]
    assert [line["loss"] for line in metrics(out)] == [line["loss"] for line in before]
    assert all(torch.equal(tensor, after[name]) for name, tensor in weights(out).items())


def a_store_that_takes_its_time() -> None:
    """A thread that asks it something still waits for the answer when a short run has ended."""
    check = dist.PrefixStore.check

    def slowly(store, keys):
        try:
            store.wait(["what nobody ever sets"], timedelta(seconds=1))
        except dist.DistStoreError:
            return check(store, keys)

    dist.PrefixStore.check = slowly


def full_disk(rank: int) -> None:
    def writing(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    checkpoint._write = writing


def nan_from_the_start(rank: int) -> None:
    make_nan(range(100))(rank)


class TakesLongToGo:
    """For sys.modules, since modules are torn down after the interpreter has stopped all threads but one."""

    def __del__(self):
        time.sleep(1.1)


def name_of(thread: str) -> str:
    try:
        return Path(f"/proc/self/task/{thread}/comm").read_text()
    except OSError:  # it has just ended
        return ""


def train_and_leave(argv: list[str], prepare: Callable[[int], None] | None) -> None:
    """Ends as a script does. Processes of multiprocessing end at once, without tearing down the interpreter."""
    a_store_that_takes_its_time()
    if prepare:
        prepare(int(os.environ["RANK"]))
    status = train.main(argv)
    threads = [name_of(thread) for thread in os.listdir("/proc/self/task")]
    print(f"{sum('gloo' in name for name in threads)} threads of gloo", flush=True)
    sys.modules["takes_long_to_go"] = TakesLongToGo()
    ctypes.pythonapi.Py_Exit(status)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted where Linux lists them")
@pytest.mark.parametrize(
    ("prepare", "before", "status"), [(None, 0, 0), (None, 1, 0), (nan_from_the_start, 0, 1), (full_disk, 0, 1)],
    ids=["finished", "nothing left to train", "too many skipped", "disk full"],
)  # fmt: skip
def test_a_run_ends_with_its_own_status_however_long_the_interpreter_takes(corpus, tmp_path, prepare, before, status):
    """A thread that returns into an interpreter during its teardown would abort the process."""
    log = tmp_path / "log"
    argv = words(corpus, tmp_path / "run", steps=2, micro_batch_rows=2, max_skipped=1)
    processes = launch([partial(train.main, argv)] * before + [partial(train_and_leave, argv, prepare)], log, 2)
    assert finish(processes, 60) == [status] * 2, log.read_text()
    assert re.findall(r"(\d+) threads of gloo", log.read_text()) == ["0", "0"]
