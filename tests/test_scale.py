"""benchmarks.scale: its dumps look like real ones, its meters find everything, and its kills find what breaks."""

from __future__ import annotations

import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

import benchmarks
from benchmarks import scale, sessions
from benchmarks.dumps import write_dump
from benchmarks.scale import fit, kill
from benchmarks.sessions import Session
from minisobert.corpus.dump import sites
from minisobert.corpus.posts import posts

POSTS = 3_000
MB = 1_000_000

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="measures by Linux's /proc")


@pytest.fixture(scope="module")
def dump(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("scale") / "dump"
    size = write_dump(folder, POSTS, seed=1)
    assert size == sum(path.stat().st_size for path in folder.iterdir())
    return folder


def rows(dump: Path, name: str) -> list[dict[str, str]]:
    return [row.attrib for row in ElementTree.parse(dump / name).getroot()]


def test_posts_and_comments_are_ordered_by_ids_of_their_own(dump):
    found, comments = rows(dump, "Posts.xml"), rows(dump, "Comments.xml")
    number = {int(row["Id"]): place for place, row in enumerate(found)}
    assert len(number) == POSTS and list(number) == sorted(number) and max(number) > 1.1 * POSTS
    assert [int(row["Id"]) for row in comments] == list(range(1, len(comments) + 1))
    assert 1.3 < len(comments) / POSTS < 1.7
    places = [number[int(row["PostId"])] for row in comments if int(row["PostId"]) in number]
    assert 0 < len(comments) - len(places) < 0.02 * len(comments)
    assert 0.3 < np.mean([b < a for a, b in pairwise(places)]) < 0.6  # not ordered by post
    assert np.corrcoef(places, range(len(places)))[0, 1] > 0.5  # but later comments are on later posts
    questions = {row["Id"] for row in found if row["PostTypeId"] == "1"}
    assert {row["ParentId"] for row in found if row["PostTypeId"] == "2"} <= questions
    counts = Counter(row["PostId"] for row in comments)
    same = [int(row["CommentCount"]) - counts[row["Id"]] for row in found]
    assert min(same) == 0 and sum(same) == len(comments) - len(places)  # the others are on posts that are missing


def test_texts_are_as_long_as_posts_are_and_look_like_them(dump, tmp_path):
    (site,), _ = sites([dump])
    texts = [entry.post.text() for entry in posts(site, tmp_path, Counter())]
    assert 1_600 < np.mean([len(text) for text in texts]) < 2_100  # 527 tokens of 3.5 characters
    assert 5 < np.percentile([len(text) for text in texts], 95) / np.median([len(text) for text in texts]) < 7
    assert len(set(texts)) == POSTS
    bodies = "".join(row["Body"] for row in rows(dump, "Posts.xml"))
    assert bodies.count("<pre><code>") == bodies.count("</code></pre>") > POSTS
    ElementTree.fromstring(f"<all>{bodies}</all>")  # every tag that is opened is closed
    words = Counter(word for text in texts for word in text.split())
    assert words.most_common(1)[0][1] > 500 * np.median([*words.values()])  # Zipf's law: most words are rare


def test_the_same_seed_makes_the_same_dump(dump, tmp_path):
    for seed in (1, 2):
        write_dump(tmp_path / str(seed), POSTS, seed)
    same = [[(tmp_path / str(seed) / name).read_bytes() == (dump / name).read_bytes() for seed in (1, 2)]
            for name in ("Posts.xml", "Comments.xml")]  # fmt: skip
    assert same == [[True, False], [True, False]]


GREEDY = """
import os, sys, tempfile, time
place = sys.argv[1]
print("read:   0%| 0/2 [00:00<?, ?B/s]", end="\\r", file=sys.stderr, flush=True)
open(place + "/kept", "wb").write(bytes(3_000_000))
gone = tempfile.TemporaryFile(dir=place)
gone.write(bytes(5_000_000)); gone.flush()
elsewhere = tempfile.TemporaryFile()
elsewhere.write(bytes(7_000_000)); elsewhere.flush()
shared = bytearray(os.urandom(1_000_000))
shared *= 40  # in place: no second copy, even for a moment
if os.fork() == 0:
    own = bytearray(os.urandom(1_000_000))
    own *= 30
    time.sleep(1.5)
    os._exit(0)
time.sleep(0.5)
print("read: 100%| 2/2 [00:00<00:00, 2B/s]\\nnote: all is read", file=sys.stderr, flush=True)
os.wait()
os.remove(place + "/kept")
"""


def test_memory_and_disk_are_those_of_all_processes_and_of_files_without_a_name(tmp_path):
    place = tmp_path / "place"
    place.mkdir()
    run = Session([sys.executable, "-S", "-c", GREEDY, str(place)], place).measure()
    assert run.code == 0 and run.message == "note: all is read" and {*run.stages} == {"read"}
    assert 70 * MB < run.memory < 100 * MB  # shared memory counts once
    assert 15 * MB <= run.disk < 16 * MB
    assert 7 * MB <= run.elsewhere < 8 * MB
    assert 0.4 < run.stages["read"] < run.seconds - 0.5  # the grandchild runs for another second


SLOPPY = """
import os, subprocess, sys, time
place, wrong = sys.argv[1:]
kept = place + "/work"
killed = os.path.exists(kept)
open(kept, "w").close()
if wrong == "process" and not killed:
    subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(60)"])
if wrong == "refuses" and killed:
    sys.exit("place is in use")
time.sleep(0.15)
os.mkdir(place + "/out")
open(place + "/out/shard", "w").write("after a kill" if killed and wrong == "result" else "whole")
if not (killed and wrong == "file"):
    os.remove(kept)
"""


@pytest.mark.parametrize(("wrong", "where"), [
    ("", None), ("result", "wrong results"), ("file", "left-over files"), ("refuses", "failed runs"),
])  # fmt: skip
def test_kills_find_what_they_break(wrong, where, tmp_path):
    place = tmp_path / "place"
    _, found, bars = kill([sys.executable, "-S", "-c", SLOPPY, str(place), wrong], place, 8)
    assert {name for name, n in found.items() if n} - {"results"} == {where} - {None}
    assert found["results"] or wrong == "refuses"
    assert bars == {"before the first bar": 8}


def test_processes_that_outlive_a_kill_are_counted_and_ended(tmp_path, monkeypatch):
    monkeypatch.setattr(sessions, "END", 0.2)
    place = tmp_path / "place"
    place.mkdir()
    run = Session([sys.executable, "-S", "-c", SLOPPY, str(place), "process"], place)
    while len(run.processes()) < 2:
        assert run.process.poll() is None
    run.process.kill()
    run.process.wait()
    assert run.outliving() == 1
    assert run.outliving() == 0


def test_the_line_is_the_one_through_the_points():
    assert fit([1, 2, 4], [5, 7, 11]) == pytest.approx((2, 3))


def test_the_page_has_a_row_for_each_size_and_one_for_each_stage(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmarks, "RESULTS", tmp_path)
    words = ["--folder", str(tmp_path / "work"), "--posts", "100", "200", "--repeats", "1", "--kills", "0", "--write"]
    monkeypatch.setattr(sys, "argv", ["scale", *words])
    scale.main()
    shown = capsys.readouterr().out
    assert (tmp_path / "scale.md").read_text() == shown
    starts = [line.split("|")[1].strip() for line in shown.splitlines() if line.startswith("| ")]
    rows_of = [start for start in starts if start]
    assert rows_of[:9] == [
        "posts",
        "100",
        "200",
        "XML",
        "memory",
        "disk, beside the XML",
        "time",
        "CPU time",
        "whole run",
    ]
    assert {"read", "encode"} <= {*rows_of[9:]}
    assert list((tmp_path / "work").iterdir()) == []
