"""data.prepare after a power cut, on a full disk, and when the files of an earlier run were deleted."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from data import journal, prepare, reading
from data.prepare import main
from minisobert.corpus import comments, posts, rows
from tests.disks import Disk, FullDisk, restore, states

POST = '<row Id="{0}" PostTypeId="1" Title="On {0}" Body="&lt;p&gt;What is {0} for?&lt;/p&gt;" />\n'


@pytest.fixture
def command(tmp_path, monkeypatch):
    """Runs data.prepare in small pieces, with an entry in the journal after each."""
    for module, name in ((rows, "BLOCK"), (posts, "PART"), (prepare, "BATCH"), (reading, "BATCH")):
        monkeypatch.setattr(module, name, 500)
    monkeypatch.setattr(comments, "RUN", 50)
    monkeypatch.setattr(journal, "SECONDS", 0)
    site, text, disk = tmp_path / "site", tmp_path / "more.txt", tmp_path / "disk"
    site.mkdir()
    of_posts = "".join(map(POST.format, range(1, 21)))
    of_comments = "".join(f'<row Id="{n}" PostId="{n % 22 + 1}" Text="comment {n}" />\n' for n in range(40))
    (site / "Posts.xml").write_text(f"<posts>\n{of_posts}</posts>")
    (site / "Comments.xml").write_text(f"<comments>\n{of_comments}</comments>")
    text.write_text("".join(f"line {n}, a text of its own\n" for n in range(60)))
    disk.mkdir()
    arguments = ["--input", site, text, "--workers", "1", "--vocab-size", "300"]
    given = tmp_path / "given"
    assert main([*map(str, arguments), "--out", str(given)]) == 0  # the tokenizer that the run itself would train
    arguments = [*arguments[:-2], "--tokenizer", given / "tokenizer.model"]
    return [*map(str, arguments), "--out", str(disk / "out"), "--work", str(disk / "work")]


def status(arguments: list[str]) -> int:
    try:
        return main(arguments)
    except SystemExit as left:
        return left.code


def files(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_whatever_was_not_flushed_is_lost_and_the_shards_are_the_same(command, tmp_path, monkeypatch, capsys):
    root = tmp_path / "disk"
    with monkeypatch.context() as patch:
        disk = Disk(root, patch)
        assert main(command) == 0
    expected = files(root)
    assert {path.parts[0] for path in expected} == {"out"}
    found = [state for state, _ in states(disk)]
    disk.close()
    went_on = done = 0
    for state in found:
        restore(root, state)
        capsys.readouterr()
        ended, said = status(command), capsys.readouterr().err
        if ended == 2 and "exists already" in said:
            done += 1
        else:
            assert ended == 0, said
            went_on += "continuing in" in said
        left = files(root)
        for hidden in (".out.unfinished.lock", "out/journal.json"):  # after a cut just before they were deleted
            left.pop(Path(hidden), None)
        assert left == expected, state.keys()
    assert done and went_on > 20, (done, went_on)


@pytest.mark.slow
def test_a_disk_that_is_full_from_any_write_on_is_one_line_and_leaves_nothing(command, tmp_path, monkeypatch, capsys):
    root = tmp_path / "disk"
    with monkeypatch.context() as patch:
        disk = FullDisk(float("inf"), 0, root, patch)
        assert main(command) == 0
    expected, kinds = files(root), disk.kinds
    assert len(kinds) > 30 and {*kinds} == {"open", "pwrite", "mkdir", "replace"}
    for n in range(1, len(kinds) + 1):
        shutil.rmtree(root)
        root.mkdir()
        capsys.readouterr()
        with monkeypatch.context() as patch:
            disk = FullDisk(n, n % 2 * 100, root, patch)
            ended = status(command)
        disk.make_room()
        *_, line = capsys.readouterr().err.splitlines()
        assert ended == 2 and line.startswith("data.prepare: "), (n, kinds[n - 1], line)
        assert "No space left on device" in line or "File too large" in line
        assert not files(root)
        assert main(command) == 0
        assert files(root) == expected, (n, kinds[n - 1])


def interrupt(*given):
    raise KeyboardInterrupt


@pytest.mark.parametrize("last", range(1, 5))
def test_comments_stay_until_the_journal_needs_them_no_more(command, tmp_path, monkeypatch, last):
    """last: how many entries are made. Later ones are left out, so the journal is behind at the interruption."""
    assert main(command) == 0
    expected = files(tmp_path / "disk")
    make, made = journal.Journal.now_and_then, []

    def few(self, *entry):
        made.append(entry)
        if len(made) <= last:
            make(self, *entry)

    shutil.rmtree(tmp_path / "disk" / "out")
    with monkeypatch.context() as patch:
        patch.setattr(journal.Journal, "now_and_then", few)
        patch.setattr(reading, "_batches", interrupt)
        assert status(command) == 130
    assert len(made) > last
    assert main(command) == 0
    assert files(tmp_path / "disk") == expected


def test_without_what_an_earlier_run_left_in_work_it_starts_over(command, tmp_path, monkeypatch, capsys):
    assert main(command) == 0
    expected = files(tmp_path / "disk")
    shutil.rmtree(tmp_path / "disk" / "out")
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "_encode", interrupt)
        assert status(command) == 130
    shutil.rmtree(tmp_path / "disk" / "work")
    capsys.readouterr()
    assert main(command) == 0
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "starting over" in line]
    assert f"starting over in {tmp_path}/disk/.out.unfinished, whose temporary files are no longer in" in line
    assert files(tmp_path / "disk") == expected
