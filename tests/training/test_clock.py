"""Setting the clock back and forward during a run changes nothing: neither files nor figures nor the progress bar."""

from __future__ import annotations

import re
import time

import tqdm.std

import train
from minisobert.training import checkpoint, loop
from tests.runs import metrics
from tests.training.test_disk import command, content, minute_model  # noqa: F401

HOUR, DAY = 3_600.0, 86_400.0


def test_the_clock_is_set_back_an_hour_and_forward_a_day(corpus, tmp_path, monkeypatch, capsys):
    out = tmp_path / "run"
    argv = command(corpus, out)
    assert train.main(argv) == 0
    expected = content(out)
    capsys.readouterr()
    (tmp_path / "run").rename(tmp_path / "undisturbed")

    ahead, real, step = 0.0, time.time, loop.train_step

    def stepping(*args):
        nonlocal ahead
        ahead = [0.0, -HOUR, -HOUR, DAY][args[6].step]
        time.sleep(0.15)  # longer than the bar waits until it is drawn again
        return step(*args)

    with monkeypatch.context() as patch:
        for module in (time, tqdm.std):
            patch.setattr(module, "time", lambda: real() + ahead)
        patch.setattr(loop, "train_step", stepping)
        assert train.main(argv) == 0
    drawn = re.findall(r"([\d.]+)/512 \[([^<]*)<([^,]*), +([^\]]*)tok/s", capsys.readouterr().err)
    assert [float(done) for done, *_ in drawn] == [0, 128, 256, 384, 512, 512], drawn  # the last one when it is closed
    # an hour would be 1:00:00
    assert all(re.fullmatch(r"\d\d:\d\d", elapsed) for _, elapsed, *_ in drawn), drawn
    assert all(re.fullmatch(r"\?|\d\d:\d\d", remaining) for _, _, remaining, _ in drawn), drawn
    assert content(out) == expected
    assert all(1 < line["tokens_per_second"] < 1e6 for line in metrics(out))
    assert 0 < checkpoint.read_state(out / "checkpoints" / "step-00000004")["progress"]["seconds"] < 60
