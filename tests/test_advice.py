"""The advice in an error works: it is read from the message and given to the command line."""

from __future__ import annotations

import random
import re
from collections import Counter

import pytest

from minisobert.cli import parse
from minisobert.config import PRESETS, TrainConfig
from minisobert.parallel.mesh import check_layout
from minisobert.planning.report import layouts
from minisobert.training.meter import CHIPS


def choices(message: str) -> list[list[str]]:
    """Reads `…; choose --a 1, 2 or 3, or --b 4 with --c 5, or more text` as command-line words, a list per choice."""
    found = []
    for part in re.split(", or (?=--|more|at most)", message.split("; choose ", 1)[1]):
        *fixed, last = part.split(" with ")
        if last.startswith("--"):
            option, values = last.split(" ", 1)
            before = [word for each in fixed for word in each.split(" ")]
            found += [[*before, option, value] for value in re.split(", (?=[0-9])| or ", values)]
    return found


def test_choices_are_read_as_they_are_meant():
    message = "x; choose --tokens-per-batch 393,216 or 589,824, or --micro-batch-rows 4, 8 or 16, or more text"
    assert [words[1] for words in choices(message)] == ["393,216", "589,824", "4", "8", "16"]
    assert choices("x; choose --a 1 with --b 2:3,4:5") == [["--a", "1", "--b", "2:3,4:5"]]


def test_a_batch_that_does_not_divide_or_is_too_large_for_the_text(capsys):
    draw, followed, alone = random.Random(1), Counter(), 0
    for _ in range(600):
        row, data_parallel, rows = draw.choice([3, 100, 512, 2_048]), draw.randint(1, 12), int(10 ** draw.uniform(0, 4))
        size = lambda row=row: draw.choice([draw.randint(1, 2_000_000), row * draw.randint(1, 2_000)])  # noqa: E731
        argv = ["--row-tokens", str(row), "--micro-batch-rows", str(draw.randint(1, 20))]
        if draw.random() < 0.3:
            argv += ["--batch-schedule", f"0:{size()},1e5:{size()},200,000:{size()}"]
        else:
            argv += ["--tokens-per-batch", str(size())]
        try:
            parse(TrainConfig, argv).check(rows, data_parallel)
            continue
        except ValueError as error:
            message = str(error)
        if not (advice := choices(message)):
            assert rows < data_parallel and message.endswith(f"at most {rows} processes, or more text for data.prepare")
            alone += 1
        for words in advice:
            advised = parse(TrainConfig, [*argv, *words])
            advised.check(rows, data_parallel)
            if "fewer than the" in message:  # one row of each process, or many steps an epoch
                assert all(n == row * data_parallel or n * 100 <= rows * row for _, n in advised.batch_ramp), message
            followed[" ".join(words[::2])] += 1
    assert len(followed) == 5 and min(followed.values()) > 10 and alone > 10, followed


def test_a_batch_of_the_largest_size_is_not_rounded_up_beyond_it():
    config = parse(TrainConfig, ["--tokens-per-batch", "16_777_216", "--micro-batch-rows", "3"])
    with pytest.raises(ValueError, match="does not divide") as error:
        config.check(rows=1_000_000, data_parallel=1)
    for words in choices(str(error.value)):
        parse(TrainConfig, ["--tokens-per-batch", "16_777_216", "--micro-batch-rows", "3", *words]).check(1_000_000, 1)


def test_a_model_that_cannot_be_split():
    followed = 0
    for model in PRESETS.values():
        for world in (1, 2, 3, 4, 6, 8, 12, 16, 24):
            for row in (2_048, 1_000, 7):
                for tensor_parallel in range(1, 26):
                    try:
                        check_layout(model, world, tensor_parallel, row)
                    except ValueError as error:
                        numbers = re.findall("[0-9]+", str(error).split("; choose ")[1])
                        assert numbers
                        for n in numbers:
                            check_layout(model, world, int(n), row)
                            followed += 1
    assert followed > 1_000


def test_a_plan_whose_batch_cannot_be_split_over_the_gpus():
    draw, followed = random.Random(2), Counter()
    while followed.total() < 150:
        argv = ["--plan", "--preset", "tiny", "--row-tokens", "512", "--gpus", str(draw.randint(1, 40))]
        size = lambda: draw.choice([draw.randint(1, 400_000), 512 * draw.randint(1, 300)])  # noqa: E731
        if draw.random() < 0.3:
            argv += ["--batch-schedule", f"0:{size()},1e5:{size()}"]
        else:
            argv += ["--tokens-per-batch", str(size())]

        def plan(*words, argv=argv):
            config = parse(TrainConfig, [*argv, *words])
            return layouts(PRESETS["tiny"], config, config.gpus, CHIPS["H100"].memory)

        try:
            plan()
        except ValueError as error:
            assert choices(str(error)), error
            for words in choices(str(error)):
                assert plan(*words)
                followed[words[0]] += 1
    assert followed.keys() == {"--gpus", "--tokens-per-batch", "--batch-schedule"}, followed
