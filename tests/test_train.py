"""train.py as its users run it: what it writes, what it refuses, and that layout and interruptions do not matter."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack, nullcontext
from functools import partial
from pathlib import Path
from threading import Timer

import pytest
import torch
from runs import BATCH, ROW, column, finish, make_small, metrics, start, weights, words
from torch.distributed.run import get_args_parser

import train
from minisobert.cli import parse
from minisobert.config import TrainConfig
from minisobert.corpus.loader import Rows
from minisobert.corpus.packing import SPECIALS
from minisobert.corpus.shards import Shards, open_shards
from minisobert.files import locked
from minisobert.training import checkpoint, loop, run

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    make_small(monkeypatch.setitem)


@pytest.fixture(scope="module")
def plain(corpus, tmp_path_factory):
    """The run with which others are compared: one process, one micro-batch per step, never interrupted."""
    out = tmp_path_factory.mktemp("plain") / "run"
    assert finish(start(words(corpus, out), out.with_suffix(".log"))) == [0]
    return out


def test_a_run_leaves_its_config_metrics_tokenizer_and_checkpoint(corpus, tmp_path, capsys):
    out = tmp_path / "run"
    argv = words(corpus, out, steps=4, eval_every_tokens=2 * BATCH, checkpoint_every_tokens=BATCH, learning_rate=1e-3,
                 price_per_gpu_hour=3.6)  # fmt: skip
    assert train.main(argv) == 0
    lines = metrics(out)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [line["positions"] for line in lines] == [BATCH, 2 * BATCH, 3 * BATCH, 4 * BATCH]
    for line in lines:
        assert {"tokens", "loss", "lr", "grad_norm", "tokens_per_second", "dollars"} <= line.keys()
        assert 0.9 * line["positions"] < line["tokens"] <= line["positions"]
        assert ("validation_loss" in line) == ("validation_accuracy" in line) == (line["step"] in (2, 4))
    assert 0 < lines[0]["dollars"] < lines[3]["dollars"] < 0.1
    assert (out / "tokenizer.model").read_bytes() == (corpus.folder / "tokenizer.model").read_bytes()
    assert json.loads((out / "config.json").read_text())["model"]["vocabulary"] == 512
    assert [path.name for path in checkpoint.steps(out / "checkpoints")] == ["step-00000003", "step-00000004"]
    assert capsys.readouterr().out.splitlines()[-1] == f"{out}: step 4, loss {lines[-1]['loss']:.4f}"
    # the same command again: the run is complete, and says the same
    assert train.main(argv) == 0
    assert capsys.readouterr().out.splitlines()[-1] == f"{out}: step 4, loss {lines[-1]['loss']:.4f}"
    assert metrics(out) == lines


def reweighted(corpus, tmp_path, weight: float) -> Shards:
    """The corpus, with this weight for all its documents."""
    folder = shutil.copytree(corpus.folder, tmp_path / "reweighted")
    documents = [0, len(corpus.training_documents)]
    meta = {**corpus.meta, "weights": [{"input": "toy.jsonl", "weight": weight, "documents": documents, "tokens": 1}]}
    (folder / "meta.json").write_text(json.dumps(meta))
    return open_shards(folder)


@pytest.mark.parametrize(
    ("epochs", "weight", "said"),
    [
        (3.9, 1, ""), (4, 1, ""), (5, 1, "5.0 epochs of this corpus; after about 4"), (1.9, 2.0, ""),
        (2.5, 2.0, "2.5 epochs of this corpus, with weights of up to 2; after about 4"),
    ],
)  # fmt: skip
def test_a_run_of_many_epochs_says_so_and_is_not_refused(corpus, tmp_path, monkeypatch, capsys, epochs, weight, said):
    def no_steps(model, optimizer, training, validation, run, mesh, progress, stop):
        progress.loss = 0.0
        return 0

    monkeypatch.setattr(train, "train", no_steps)
    corpus = corpus if weight == 1 else reweighted(corpus, tmp_path, weight)
    epoch = len(Rows(corpus, corpus.training_documents, 1, ROW, weights=corpus.weights)) * ROW
    assert train.main(words(corpus, tmp_path / "run", train_tokens=int(epochs * epoch))) == 0
    output = capsys.readouterr().out
    assert f"--train-tokens is {said}, repeated text teaches little (Muenn" in output if said else "Muenn" not in output


def test_training_lowers_the_loss_on_held_out_text(corpus, tmp_path):
    out = tmp_path / "run"
    assert train.main(words(corpus, out, steps=12, learning_rate=3e-3, eval_every_tokens=BATCH)) == 0
    held_out = [line["validation_loss"] for line in metrics(out) if "validation_loss" in line]
    assert held_out[-1] < held_out[0] - 1


@pytest.mark.slow
def test_a_run_that_is_killed_ten_times_ends_bit_for_bit_like_one_that_never_was(corpus, tmp_path):
    # so many steps that even a fast machine has some left after ten attempts of up to 0.2 seconds
    options = {"steps": 48, "checkpoint_every_tokens": BATCH, "micro_batch_rows": 2, "learning_rate": 1e-3}
    whole, killed, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    assert finish(start(words(corpus, whole, **options), log)) == [0]
    draw = random.Random(1)
    for kill in range(10):
        before = checkpoint.steps(killed / "checkpoints")
        process, *_ = start(words(corpus, killed, **options), log)
        if kill % 2:  # every second attempt makes progress first; the others may die while they start
            while process.is_alive() and checkpoint.steps(killed / "checkpoints") == before:
                time.sleep(0.005)
        process.join(draw.uniform(0, 0.2))
        assert process.exitcode is None, log.read_text()
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL
    (process,) = start(words(corpus, killed, **options), log)
    process.join()
    assert log.read_text().count("; continuing after step") >= 3  # not ten fresh starts
    assert process.exitcode == 0
    timed = {"tokens_per_second", "dollars"}
    expected, found = ([{k: line[k] for k in line.keys() - timed} for line in metrics(out)] for out in (whole, killed))
    assert found == expected
    ours, theirs = weights(killed), weights(whole)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("ranks", "signalled", "number"),
    [(1, [0], signal.SIGTERM), (1, [0], signal.SIGINT), (2, [1], signal.SIGTERM), (2, [0, 1], signal.SIGINT)],
)
def test_a_signal_saves_says_so_and_leaves_and_the_run_goes_on(corpus, tmp_path, plain, ranks, signalled, number):
    out, log = tmp_path / "run", tmp_path / "log"
    argv = words(corpus, out, micro_batch_rows=2)
    processes = start(argv, log, ranks)
    wait_for_steps(3, out, processes, log)
    for rank in signalled:  # even if only one rank gets it, all leave after the same step
        os.kill(processes[rank].pid, number)
    assert finish(processes) == [128 + number] * ranks
    stopped_at = metrics(out)[-1]["step"]
    assert 3 <= stopped_at < 20
    assert f"stopped after step {stopped_at}; repeat the command to resume from {out}/checkpoints/" in log.read_text()
    assert finish(start(argv, log, ranks)) == [0] * ranks
    torch.testing.assert_close(column(out), column(plain), rtol=0, atol=1e-5)


def in_step(number: int, happens, rank: int) -> None:
    """A `prepare` that makes something happen in a step, and writes to the log when the step begins."""
    step = loop.train_step

    def stepping(*args):
        if args[6].step == number - 1:
            os.write(2, b"it happens\n")
            happens()
        return step(*args)

    loop.train_step = stepping


def multiply() -> None:
    """A single operation that takes about a second, during which no signal handler runs."""
    x = torch.ones(3_000, 3_000)
    x @ x
    os.write(2, b"multiplied\n")


def for_long() -> None:
    time.sleep(100)


def signal_when(text: str, process, log: Path, number=signal.SIGINT, times: int = 1) -> None:
    wait_until(lambda: log.exists() and log.read_text().count(text) >= times, [process], log)
    os.kill(process.pid, number)


WILL = "will save and exit after this step; Ctrl-C again exits at once"


def test_ctrl_c_in_a_long_operation_is_answered_at_once(corpus, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    (process,) = start(words(corpus, out, steps=9), log, prepare=partial(in_step, 3, multiply))
    signal_when("it happens", process, log)
    assert finish([process]) == [130]
    said = log.read_text()
    assert said.index("it happens") < said.index(WILL) < said.index("multiplied") < said.index("stopped after step 3")
    assert said.count(WILL) == 1 and checkpoint.steps(out / "checkpoints")[-1].name == "step-00000003"


def test_torchruns_copy_of_ctrl_c_is_not_taken_for_a_second_one(corpus, tmp_path):
    """A terminal sends Ctrl-C to all processes, and torchrun also passes it on to its workers."""
    out, log = tmp_path / "run", tmp_path / "log"
    argv = words(corpus, out, steps=9, micro_batch_rows=2)
    processes = start(argv, log, 2, partial(in_step, 3, partial(time.sleep, 1.5)))
    signal_when("it happens", processes[0], log, times=2)
    os.kill(processes[1].pid, signal.SIGINT)
    time.sleep(0.3)
    for process in processes:
        os.kill(process.pid, signal.SIGINT)
    assert finish(processes) == [130, 130]
    assert log.read_text().count(WILL) == 1 and checkpoint.steps(out / "checkpoints")[-1].name == "step-00000003"


@pytest.mark.parametrize(("every", "lost"), [(2 * BATCH, "all steps after {out}/checkpoints/step-00000002 are lost"),
                                             ("1e9", "nothing had been saved")])  # fmt: skip
def test_a_second_ctrl_c_leaves_at_once_and_says_what_is_lost(corpus, tmp_path, every, lost):
    out, log = tmp_path / "run", tmp_path / "log"
    argv = words(corpus, out, steps=9, checkpoint_every_tokens=every)
    (process,) = start(argv, log, prepare=partial(in_step, 5, for_long))
    signal_when("it happens", process, log)
    wait_until(lambda: WILL in log.read_text(), [process], log)
    time.sleep(1.1)
    os.kill(process.pid, signal.SIGINT)
    assert finish([process], 10) == [130]
    said = log.read_text()
    assert said.splitlines()[-1] == f"train.py: exited at once; {lost.format(out=out)}" and "Traceback" not in said


def block_at(name: str, rank: int) -> None:
    def blocked(*args, **kwargs):
        os.write(2, b"blocked\n")
        time.sleep(100)

    setattr(train, name, blocked)


@pytest.mark.parametrize("name", ["open_shards", "MaskedLM", "Optimizer"])
def test_ctrl_c_at_the_start_leaves_at_once(corpus, tmp_path, name):
    out, log = tmp_path / "run", tmp_path / "log"
    (process,) = start(words(corpus, out), log, prepare=partial(block_at, name))
    signal_when("blocked", process, log)
    assert finish([process], 10) == [130]
    said = log.read_text().split()
    assert " ".join(said) in ("blocked train.py: exited at once; nothing is lost", "blocked train.py: interrupted")


def test_ctrl_c_in_the_last_save_does_not_end_it_and_a_second_one_does(corpus, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    argv = words(corpus, out, steps=3, checkpoint_every_tokens=2 * BATCH)
    (process,) = start(argv, log, prepare=block_last_save)
    signal_when("saving", process, log)
    wait_until(lambda: "is being saved; Ctrl-C again exits at once" in log.read_text(), [process], log)
    time.sleep(1.1)
    os.kill(process.pid, signal.SIGINT)
    assert finish([process], 10) == [130]
    said = log.read_text()
    assert said.endswith(f"train.py: exited at once; all steps after {out}/checkpoints/step-00000002 are lost\n")
    assert "Traceback" not in said
    assert finish(start(argv, log)) == [0]


def block_last_save(rank: int) -> None:
    write = checkpoint._write

    def writing(work, *args):
        if work.name.endswith("3"):
            os.write(2, b"saving\n")
            time.sleep(100)
        write(work, *args)

    checkpoint._write = writing


def test_fresh_discards_the_run_and_starts_over(corpus, tmp_path):
    out = tmp_path / "run"
    assert train.main(words(corpus, out, steps=2)) == 0
    first = metrics(out)
    assert train.main([*words(corpus, out, steps=3, seed=9), "--fresh"]) == 0
    assert [line["step"] for line in metrics(out)] == [1, 2, 3] and metrics(out)[0]["loss"] != first[0]["loss"]
    assert [path.name for path in checkpoint.steps(out / "checkpoints")] == ["step-00000003"]


@pytest.mark.parametrize(("ranks", "more"), [(1, ["--fresh"]), (1, ["--learning-rate", "1e-3"]), (2, [])])
def test_a_second_run_in_the_folder_is_refused_and_the_first_one_undisturbed(corpus, tmp_path, ranks, more):
    out, log, second, go_on = (tmp_path / name for name in ("run", "log", "second", "go-on"))
    argv = words(corpus, out, steps=5, micro_batch_rows=2, checkpoint_every_tokens=2 * BATCH)
    first = start(argv, log, ranks, partial(wait_in_step_4, go_on))
    wait_for_steps(3, out, first, log)
    assert finish(start([*argv, *more], second, ranks)) == [2] * ranks
    said = second.read_text().splitlines()
    another_config = f"{out} holds a run with --learning-rate"  # said if the first run has saved by now
    in_use = rf"{out} is in use by process {first[0].pid} on .* choose another --out"
    assert len(said) == 1 and re.search(f"train.py: ({in_use}|{another_config})", said[0]), said
    go_on.touch()
    assert finish(first) == [0] * ranks, log.read_text()
    assert [line["step"] for line in metrics(out)] == [1, 2, 3, 4, 5]
    checkpoint.verify(checkpoint.steps(out / "checkpoints")[-1])


def wait_in_step_4(go_on: Path, rank: int) -> None:
    step = loop.train_step

    def waiting(*args):
        if args[6].step == 3:
            wait_until(go_on.exists)
        return step(*args)

    loop.train_step = waiting


def wait_for_steps(steps: int, out, processes, log) -> None:
    metrics = Path(out) / "metrics.jsonl"
    wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= steps, processes, log)


def wait_until(condition, processes=(), log=None) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline and all(process.is_alive() for process in processes), log and log.read_text()
        time.sleep(0.01)


def test_a_run_that_waits_for_one_that_ends_looks_at_the_folder_again(corpus, tmp_path, monkeypatch):
    """This happens when torchrun starts the job again while the old first process is still ending."""
    monkeypatch.setattr(run, "CLAIM", 30)
    out = tmp_path / "run"
    out.mkdir()
    for rate, refused in ((1e-4, False), (1e-3, True)):
        with ExitStack() as held:
            held.enter_context(locked(out / ".lock", out))
            other = tmp_path / "other"
            shutil.rmtree(other, ignore_errors=True)
            assert train.main(words(corpus, other, steps=2)) == 0

            def end(held=held, other=other):
                shutil.copytree(other, out, dirs_exist_ok=True)
                held.close()

            Timer(0.5, end).start()
            argv = words(corpus, out, steps=2, learning_rate=rate)
            with pytest.raises(SystemExit) if refused else nullcontext():
                assert train.main(argv) == 0
            assert checkpoint.steps(out / "checkpoints")
        shutil.rmtree(out / "checkpoints")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_file_that_cannot_be_written_at_the_start_ends_all_ranks_with_one_line(corpus, tmp_path, ranks):
    out, log = tmp_path / "run", tmp_path / "log"
    (out / "config.json").mkdir(parents=True)
    assert finish(start(words(corpus, out, micro_batch_rows=2), log, ranks)) == [2] * ranks
    assert log.read_text() == f"train.py: {out}/config.json: Is a directory\n"


SBATCH = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_NNODES": "1", "SLURM_PROCID": "0"}
STEP = {**SBATCH, "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "1"}


@pytest.mark.parametrize(
    ("environment", "alone"),
    [
        (SBATCH, True),  # a batch script runs once, whatever srun would start inside it
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1"}, True),  # srun --ntasks=1 inside it
        ({**STEP, "RANK": "0", "WORLD_SIZE": "1"}, True),  # set by torchrun
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, True),
        (STEP, False),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "0"}, False),
        ({"PMI_SIZE": "4", "PMI_RANK": "0"}, False),
    ],
)
def test_tasks_that_do_not_know_of_each_other_are_told_how_to_start(tmp_path, monkeypatch, capsys, environment, alone):
    monkeypatch.setattr(os, "isatty", lambda descriptor: False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    argv = ["--data", str(tmp_path / "nowhere"), "--out", str(tmp_path / "run")]
    for rank in ("0", "3"):
        for name in environment.keys() & {"SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK"}:
            monkeypatch.setenv(name, rank)
        with pytest.raises(SystemExit) as left:
            train.main(argv)
        error = capsys.readouterr().err
        assert left.value.code == 2
        if alone:
            assert "nowhere holds no prepared data" in error
        elif rank == "0":
            assert error.count("\n") == 1 and "each would train by itself" in error
            command = error.split("torchrun ")[-1].split(" train.py …")[0]
            parsed = get_args_parser().parse_args([*command.split(), "train.py"])
            assert parsed.nproc_per_node == "4"
            assert parsed.nnodes == ("2" if environment.get("SLURM_STEP_NUM_NODES") == "2" else "1:1")
        else:
            assert error == ""  # once is enough


def test_a_terminal_of_an_interactive_job_is_one_process_whatever_its_variables_say(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "isatty", lambda descriptor: True)
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        train.main(["--data", str(tmp_path / "nowhere")])
    assert "nowhere holds no prepared data" in capsys.readouterr().err


def test_counters_without_a_checksum_of_their_own_are_believed_and_that_is_said(corpus, tmp_path, capsys):
    """Version 0.1.0 wrote no such checksum."""
    out = tmp_path / "run"
    assert train.main(words(corpus, out, steps=2, checkpoint_every_tokens=BATCH)) == 0
    state = out / "checkpoints" / "step-00000002" / "state.json"
    content = json.loads(state.read_text())
    del content["checksum"]
    state.write_text(json.dumps(content, indent=2) + "\n")
    capsys.readouterr()
    assert train.main(words(corpus, out, steps=2, checkpoint_every_tokens=BATCH)) == 0
    assert capsys.readouterr().err.count(f"{state} has no checksum of its own (version 0.1.0)") == 1
    state.write_text(state.read_text().replace("consumed_tokens", "consumed_tokenr"))
    with pytest.raises(SystemExit):
        train.main(words(corpus, out, steps=2, checkpoint_every_tokens=BATCH))
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "state.json is damaged" in error
    advice = re.search("remove (.*) to go on from the one before", error).group(1)
    shutil.rmtree(advice)
    assert train.main(words(corpus, out, steps=2, checkpoint_every_tokens=BATCH)) == 0
    assert "continuing after step 1" in capsys.readouterr().out


def damaged(corpus, tmp_path, change) -> Path:
    folder = tmp_path / "shards"
    shutil.copytree(corpus.folder, folder)
    change(folder)
    return folder


def flip(path: Path) -> None:
    """Replaces the first id by another valid one, which only a checksum can tell."""
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)


MODERN = {"preset": "modern-tiny"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data": __file__}, "is a file; --data takes a folder .*python -m data.prepare --input .*test_train.py --out"),
        ({"data": "nowhere"}, "nowhere holds no prepared data .*python -m data.prepare --input .* --out nowhere"),
        ({"preset": "huge"}, "--preset: invalid choice: 'huge'"),
        ({"tokens_per_batch": 10_000}, r"10,000 = 4 × 512 × 1 × 4.883; choose --tokens-per-batch 8,192 or 10,240"),
        ({"tokens_per_batch": ROW * 400}, r"400 of one batch; choose --micro-batch-rows 1 with --tokens-per-batch \d"),
        ({"train_tokens": "27e9.5"}, "'27e9.5' is not a whole number"),
        ({"train_tokens": 0}, "--train-tokens is 0; it must be at least 1"),
        ({"dropout": 1}, "--dropout is 1.0; it must be at least 0 and less than 1"),
        ({"learning_rate": "nan"}, "--learning-rate is nan; it must be more than 0"),
        ({"learning_rat": 1}, "unknown option --learning-rat; did you mean --learning-rate?"),
        ({"hidden": 66}, "hidden 66 cannot be split over 4 heads; choose 2, 3 or 6"),
        (MODERN | {"heads": 64}, "64 heads of even width, which rotary positions need; choose 8, 16 or 32"),
        (MODERN | {"hidden": 63}, "hidden 63 cannot be split over 4 heads of even width, .*choose a multiple of 8"),
        (MODERN | {"window": 0}, "--window is 0; it must be at least 1"),
        ({"window": 32}, "--window is for modern presets, and --preset is tiny; leave it out"),
        (MODERN | {"warmup_fraction": 0.5, "decay_fraction": 0.6}, "0.5 and --decay-fraction 0.6 add up to more than "),
        (
            {"mask_schedule": "0.3"},
            "--mask-schedule is '0.3'; it must be the rates to begin and to end with, .*0.3:0.1",
        ),
        ({"mask_schedule": "0.3:0"}, "--mask-schedule is '0.3:0'; .*each more than 0 and at most 1"),
        ({"mask_schedule": "a:b"}, "--mask-schedule is 'a:b'; "),
        ({"mask_rate": 15}, "--mask-rate is 15.0; it must be more than 0 and at most 1"),
        (
            {"row_tokens": 4_096},
            "4,096, and tiny has a table of 2,048 positions; choose 2,048 or less, or a modern pre",
        ),
    ],
)
def test_mistakes_are_one_line_with_exit_status_2_and_nothing_written(corpus, tmp_path, capsys, options, message):
    out = tmp_path / "run"
    with pytest.raises(SystemExit) as left:
        train.main(words(corpus, out, **options))
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.count("\n") == 1 and error.startswith("train.py: ")
    assert re.search(message.replace("?", r"\?"), error), error
    assert not out.exists()


LONG = {"preset": "modern-tiny", "optimizer": "muon", "row_tokens": 4_096, "micro_batch_rows": 1,
        "tokens_per_batch": 8_192, "train_tokens": 4 * 8_192}  # fmt: skip


def test_rows_longer_than_any_table_of_positions_are_packed_trained_resumed_and_planned(corpus, tmp_path, capsys):
    out = tmp_path / "run"
    argv = words(corpus, out, **LONG, checkpoint_every_tokens=2 * 8_192)
    assert Rows(corpus, corpus.training_documents, 1, 4_096).packing.chunk_length.max() > 2_048
    assert train.main(argv) == 0
    whole, last = weights(out), checkpoint.steps(out / "checkpoints")[-1]
    assert [line["positions"] for line in metrics(out)] == [8_192, 16_384, 24_576, 32_768]
    rates = column(out, "lr").tolist()  # by the recipe's schedule, wsd
    assert rates == pytest.approx([1e-4, 1e-4, 1e-4, 0.0], abs=1e-12)
    assert json.loads((out / "config.json").read_text())["model"]["positions"] == 4_096
    shutil.rmtree(last)
    assert train.main(argv) == 0
    assert "continuing after step 2" in capsys.readouterr().out
    assert all(torch.equal(w, whole[name]) for name, w in weights(out).items())
    assert train.main([*argv, "--plan", "--gpus", "1"]) == 0
    assert "32,768 tokens in 4 steps of 8,192" in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        train.main(words(corpus, out, **{**LONG, "row_tokens": 2_048}))
    assert left.value.code == 2
    expected = f"train.py: {out} holds a run with --row-tokens 4096, not 2048; give the same, choose another --out"
    assert capsys.readouterr().err.startswith(expected)


@pytest.mark.parametrize(("cuda", "cpu", "advice"), [(True, True, "choose bf16"), (False, False, "choose fp32")])
def test_bf16_products_where_there_are_none_are_refused(corpus, tmp_path, capsys, monkeypatch, cuda, cpu, advice):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: cpu)
    with pytest.raises(SystemExit) as left:
        train.main(words(corpus, tmp_path / "run", precision="bf16-products"))
    error = capsys.readouterr().err
    assert (left.value.code, error.count("\n"), (tmp_path / "run").exists()) == (2, 1, False)
    assert error.startswith("train.py: --precision bf16-products") and advice in error


def test_training_masks_what_it_is_told_to_and_evaluation_15_percent_whatever_that_is(corpus, tmp_path, monkeypatch):
    shares = {"masking": [], "validation": []}
    micro_batch = Rows.micro_batch

    def noting(rows, *span):
        batch = micro_batch(rows, *span)
        maskable = batch.real_tokens - SPECIALS * len(batch.lengths)
        shares[rows.purpose].append(len(batch.targets) / maskable)
        return batch

    monkeypatch.setattr(Rows, "micro_batch", noting)
    for name, options, expected in (
        ("rate", {"mask_rate": 0.4}, [0.4] * 4),
        ("schedule", {"mask_schedule": "0.5:0.1"}, [0.5, 0.4, 0.3, 0.2]),
    ):
        assert train.main(words(corpus, tmp_path / name, steps=4, **options)) == 0
        assert shares["masking"] == pytest.approx(expected, abs=0.04)  # four standard errors for 2,048 tokens
        assert shares["validation"] == pytest.approx([0.15], abs=0.04)
        shares["masking"].clear(), shares["validation"].clear()


def test_rows_that_tensor_parallelism_cannot_split_are_refused(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for options, message in (
        ({"row_tokens": 511, "tokens_per_batch": 4 * 511}, "511 tokens of a row cannot be split"),
        ({"ffn": 97}, "97 ffn cannot be split"),
    ):
        with pytest.raises(SystemExit) as left:
            train.main(words(corpus, tmp_path / "run", preset="modern-tiny", tensor_parallel=2, **options))
        assert left.value.code == 2
        assert capsys.readouterr().err == f"train.py: {message} over --tensor-parallel 2; choose 1\n"
        assert not (tmp_path / "run").exists()


def test_changed_shards_are_refused(corpus, tmp_path, capsys):
    out = tmp_path / "run"
    for change, options, message in (
        (lambda folder: flip(folder / "tokens.bin"), ["--verify"], "checksum"),
        (lambda folder: os.truncate(folder / "tokens.bin", 1_000), [], "has 1,000 bytes"),
        (lambda folder: flip(folder / "tokenizer.model"), [], "checksum"),
    ):
        folder = damaged(corpus, tmp_path, change)
        with pytest.raises(SystemExit) as left:
            train.main([*words(corpus, out, data=folder), *options])
        error = capsys.readouterr().err
        assert left.value.code == 2 and error.count("\n") == 1 and message in error, error
        assert not out.exists()
        shutil.rmtree(folder)


def test_a_config_or_data_that_is_not_the_checkpoints_is_refused_and_the_run_left_alone(corpus, tmp_path, capsys):
    out = tmp_path / "run"
    assert train.main(words(corpus, out, steps=2)) == 0
    capsys.readouterr()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    other = damaged(corpus, tmp_path, lambda folder: None)
    meta = json.loads((other / "meta.json").read_text())
    meta["files"]["tokens.bin"]["sha256"] = "0" * 64
    (other / "meta.json").write_text(json.dumps(meta))
    for options, message in (
        ({"data": reweighted(corpus, tmp_path, 2.0).folder}, "on other data than"),
        ({"learning_rate": 2e-4}, "--learning-rate 0.0001, not 0.0002; give the same, choose another --out"),
        ({"seed": 2}, "--seed 1, not 2"),
        ({"data": other}, "on other data than"),
    ):
        with pytest.raises(SystemExit) as left:
            train.main(words(corpus, out, steps=2, **options))
        error = capsys.readouterr().err
        assert left.value.code == 2 and error.count("\n") == 1 and message in error, error
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    # but the layout may change
    assert train.main(words(corpus, out, steps=2, micro_batch_rows=2)) == 0


def test_torchrun_without_a_word_names_the_prepare_command(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(ROOT / "train.py")]
    result = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=120
    )
    said = [line for line in result.stderr.splitlines() if line.startswith("train.py: ")]
    assert result.returncode != 0 and len(said) == 1, result.stderr
    assert "data/prepared holds no prepared data" in said[0] and "python -m data.prepare" in said[0]
    assert "exitcode  : 2" in result.stderr or "exitcode: 2" in result.stderr.replace(" ", "")


def test_numbers_may_be_written_short():
    config = parse(TrainConfig, ["--train-tokens", "27e9", "--tokens-per-batch", "524_288"])
    assert config.train_tokens == 27_000_000_000 and config.tokens_per_batch == 524_288
    assert parse(TrainConfig, []) == TrainConfig()
    assert (config.data, config.preset, config.out) == ("data/prepared", "base", "runs/base")
