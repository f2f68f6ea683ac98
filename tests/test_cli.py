"""The command line: numbers as people write them, mistyped options, errors, and readers that stop reading."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import train
from data import prepare
from minisobert import __main__ as overview
from minisobert import playground, plot
from minisobert.cli import Parser, command, parse
from minisobert.config import TrainConfig
from minisobert.finetuning import compare
from minisobert.finetuning.config import FineTuneConfig

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("text", ["524288", "524,288", "524_288", "5.24288e5", "524,288.0", " 524288 "])
def test_whole_numbers_are_written_as_people_write_them(text):
    assert parse(TrainConfig, ["--tokens-per-batch", text]).tokens_per_batch == 524_288
    parser = Parser()
    parser.add_argument("--n", type=int)
    parser.add_argument_group("more").add_argument("--m", type=int)
    assert parser.parse_args(["--n", text, "--m", text]).n == 524_288


@pytest.mark.parametrize("text", ["1000.5", "1,000.5", "1_000.5", "1.0005e3"])
def test_other_numbers_are_written_as_people_write_them(text):
    assert parse(TrainConfig, ["--timeout", text]).timeout == 1_000.5


@pytest.mark.parametrize(
    "text", ["1,00", "1,0000", ",100", "5,24288", "1__0", "27e9.5", "", "1.5", "nan", "inf", "1e400", "0x10"]
)
def test_what_is_not_a_whole_number_is_said_not_to_be_one(text, capsys):
    with pytest.raises(SystemExit):
        parse(TrainConfig, ["--seed", text])
    assert "is not a whole number (27e9 and 524,288 are)" in capsys.readouterr().err


def test_large_whole_numbers_are_exact():
    for text, value in (("9_007_199_254_740_993", 2**53 + 1), ("9,007,199,254,740,993", 2**53 + 1), ("1e20", 10**20)):
        assert parse(TrainConfig, ["--train-tokens", text]).train_tokens == value


@pytest.mark.parametrize(
    ("schedule", "batches"),
    [
        ("0:131072,1e9:524288", [(0, 131_072), (10**9, 524_288)]),
        ("0:131,072,1e9:524,288", [(0, 131_072), (10**9, 524_288)]),
        ("0:131_072,1_000_000:524_288", [(0, 131_072), (10**6, 524_288)]),
        ("0:131,072,1,000,000,000:524,288", [(0, 131_072), (10**9, 524_288)]),
        ("0:8192,20,000:16,384,5e4:32768", [(0, 8_192), (20_000, 16_384), (50_000, 32_768)]),
    ],
)
def test_the_numbers_of_a_batch_schedule_may_have_commas(schedule, batches):
    assert TrainConfig(batch_schedule=schedule).batch_ramp == batches


def test_a_schedule_that_can_be_read_in_two_ways_is_refused():
    with pytest.raises(ValueError, match="--batch-schedule is '0:131,172,500,000:524,288'; it must be pairs"):
        TrainConfig(batch_schedule="0:131,172,500,000:524,288")


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("--lr", "--learning-rate"),
        ("-lr", "--learning-rate"),
        ("--learning_rate", "--learning-rate"),
        ("--learning-rat", "--learning-rate"),
        ("--LearningRate", "--learning-rate"),
        ("--wd", "--weight-decay"),
        ("--tp", "--tensor-parallel"),
        ("--batch-size", "--tokens-per-batch"),
        ("--epochs", "--train-tokens"),
        ("--max-steps", "--train-tokens"),
        ("--output-dir", "--out"),
        ("--output", "--out"),
        ("--data-dir", "--data"),
        ("--micro-batch-size", "--micro-batch-rows"),
        ("--warmup", "--warmup-fraction"),
        ("--grad-clip", "--clip"),
        ("--eval", "--eval-every-tokens or --eval-rows"),
        ("--seeds", "--seed"),
        ("--plann", "--plan"),
    ],
)
def test_the_option_that_was_meant_is_named(typed, meant, capsys):
    with pytest.raises(SystemExit):
        parse(TrainConfig, [typed, "3"], prog="train.py")
    assert capsys.readouterr().err == f"train.py: unknown option {typed}; did you mean {meant}?\n"


@pytest.mark.parametrize("typed", ["--workers", "--resume", "--fp16", "--device", "--compile", "--x"])
def test_help_is_named_if_no_option_is_similar(typed, capsys):
    with pytest.raises(SystemExit):
        parse(TrainConfig, [typed], prog="train.py")
    assert capsys.readouterr().err == f"train.py: unknown option {typed}; see --help\n"


def test_a_word_that_is_no_option_is_named_as_an_argument(capsys):
    with pytest.raises(SystemExit):
        parse(TrainConfig, ["tiny"], prog="train.py")
    assert capsys.readouterr().err == "train.py: unexpected argument tiny; see --help\n"


def test_an_option_that_is_there_is_not_taken_for_another_tools(capsys):
    with pytest.raises(SystemExit):
        parse(FineTuneConfig, ["--epoch", "3"], prog="finetune.py")
    assert "did you mean --epochs?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("main", "argv"),
    [(train.main, ["--plan"]), (train.main, ["--help"]), (plot.main, ["--help"]), (playground.main, ["--help"]),
     (prepare.main, ["--help"]), (overview.main, []), (compare.main, ["--help"])],
)  # fmt: skip
def test_a_reader_that_stops_early_is_not_an_error(main, argv, monkeypatch, capsys):
    """Such as `| head`, which ends before all is written."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stdout, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", stdout)
        try:
            assert not main(argv)
        except SystemExit as left:
            assert left.code == 0
    assert capsys.readouterr().err == ""


def test_another_pipe_that_breaks_is_an_error(capsys):
    with pytest.raises(SystemExit) as left, command("tool"):
        raise BrokenPipeError(32, "Broken pipe")
    assert left.value.code == 2 and capsys.readouterr().err == "tool: Broken pipe\n"


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (ValueError("5 is\n  too many"), 2, "tool: 5 is too many\n"),
        (FileNotFoundError(2, "No such file or directory", "runs/x"), 2, "tool: runs/x: No such file or directory\n"),
        (OSError(28, "No space left on device"), 2, "tool: No space left on device\n"),
        (KeyboardInterrupt(), 130, "tool: interrupted\n"),
    ],
)
def test_what_ends_a_command_is_one_line(error, status, said, capsys):
    with pytest.raises(SystemExit) as left, command("tool"):
        raise error
    assert left.value.code == status and capsys.readouterr().err == said


def test_an_error_of_the_program_itself_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError), command("tool"):
        1 / 0  # noqa: B018


@pytest.mark.slow
def test_a_mistake_under_torchrun_is_said_once_and_nobody_waits_for_it(tmp_path):
    script = tmp_path / "patient.py"
    script.write_text("import train\nfrom minisobert import cli\ncli.PATIENCE = 1_000\ntrain.main()\n")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", str(script)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    result = subprocess.run([*torchrun, "--lr", "3"], capture_output=True, text=True, timeout=300, env=environment)
    said = [line for line in result.stderr.splitlines() if "unknown option" in line]
    assert len(said) == 1 and said[0].endswith("unknown option --lr; did you mean --learning-rate?")
    assert result.returncode != 0 and re.search(r"exitcode\s*: 2", result.stderr)
