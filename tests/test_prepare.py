"""`python -m data.prepare`, from files to shards, as a user runs it."""

import gzip
import json
import lzma
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from data import prepare as module
from data import reading
from data.prepare import main, prepare
from minisobert.corpus.shards import open_shards
from minisobert.corpus.tokenizer import MASK
from minisobert.files import new_folder

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT / "../shared/data"
ROW = (
    '<row Id="{0}" PostTypeId="1" Score="{0}" Title="How to do {0}?" '
    'Body="&lt;p&gt;I tried {0}:&lt;/p&gt;&#xA;'
    '&lt;pre&gt;&lt;code&gt;if a &amp;lt; {0}:&#xA;    return&lt;/code&gt;&lt;/pre&gt;" />\n'
    '<row Id="1{0}" PostTypeId="2" ParentId="{0}" Score="1" '
    'Body="&lt;p&gt;Do {0} &lt;b&gt;again&lt;/b&gt;.&lt;/p&gt;" />\n'
)


@pytest.fixture
def site(tmp_path):
    folder = tmp_path / "site"
    folder.mkdir()
    rows = "".join(map(ROW.format, range(100, 160)))
    empty = '<row Id="9" PostTypeId="2" Body="&lt;p&gt;&lt;/p&gt;" />\n<row Id="8" PostTypeId="5" Body="wiki" />\n'
    (folder / "Posts.xml").write_text(f"<posts>\n{rows}{empty}</posts>")
    of = enumerate((103, 8, 103, 77))
    comments = "".join(f'<row Id="{n}" PostId="{post}" Text="c{n} [MASK]" />\n' for n, post in of)
    (folder / "Comments.xml").write_text(f"<comments>\n{comments}</comments>")
    return folder


def texts(out):
    shards = open_shards(out, verify=True)
    tokenizer = shards.tokenizer()
    return [tokenizer.decode(shards.tokens[a:b]) for a, b in zip(shards.offsets, shards.offsets[1:])]


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_dump_becomes_shards(site, tmp_path):
    meta = prepare([site], tmp_path / "out", vocab_size=400, workers=1)
    assert meta["posts"] == meta["documents"] == 120
    assert meta["comments"] == 2
    assert meta["dropped"] == {
        "neither question nor answer": 1,
        "empty": 1,
        "comments of dropped posts": 1,
        "comments without their post": 1,
    }
    found = texts(tmp_path / "out")
    assert "How to do 103?\n\nI tried 103:\n\nif a < 103:\n    return\n\nc0 [MASK]\n\nc2 [MASK]" in found
    assert meta["characters"] == sum(map(len, found))
    shards = open_shards(tmp_path / "out")
    assert {key: shards.meta[key] for key in meta} == json.loads(json.dumps(meta))
    assert meta["tokens"] == len(shards.tokens)
    assert MASK not in shards.tokens


def test_whole_threads_are_held_out_and_stored_last(site, tmp_path):
    prepare([site], tmp_path / "out", vocab_size=400, workers=1)
    shards, found = open_shards(tmp_path / "out"), texts(tmp_path / "out")
    assert len(shards.validation_documents) == 6  # 3 of 60 threads, each a question and its answer
    questions = [text.split("?")[0].removeprefix("How to do ") for text in found[-6::2]]
    assert [text for text in found[-5::2]] == [f"Do {name} again." for name in questions]


def test_the_result_is_the_same_for_any_number_of_workers(site, tmp_path, monkeypatch):
    for place in (module, reading):
        monkeypatch.setattr(place, "BATCH", 1_000)
    pids = set()
    render = reading._render
    monkeypatch.setattr(reading, "_render", lambda batch: pids.add(os.getpid()) or render(batch))
    prepare([site], tmp_path / "one", vocab_size=400, workers=1)
    assert pids == {os.getpid()}  # one worker is this process
    monkeypatch.setattr(reading, "_render", render)
    for workers in (2, 3):
        prepare([site], tmp_path / "many", vocab_size=400, workers=workers)
        assert files(tmp_path / "many") == files(tmp_path / "one")
        for path in (tmp_path / "many").iterdir():
            path.unlink()


def test_the_seed_changes_what_is_held_out_and_nothing_else(site, tmp_path):
    for seed in (0, 1):
        prepare([site], tmp_path / str(seed), vocab_size=400, workers=1, seed=seed)
    first, second = texts(tmp_path / "0"), texts(tmp_path / "1")
    assert first != second
    assert sorted(first) == sorted(second)


def test_posts_can_be_chosen(site, tmp_path):
    meta = prepare([site], tmp_path / "out", vocab_size=400, workers=1, kind="questions", min_score=150)
    assert meta["posts"] == 10
    assert all(text.startswith("How to do 15") for text in texts(tmp_path / "out"))


@pytest.mark.parametrize("name, pack", [("a.txt", bytes), ("a.txt.gz", gzip.compress), ("a.txt.xz", lzma.compress)])
def test_a_text_file_is_a_document_per_line(tmp_path, name, pack):
    lines = "\ufeffone line\r\n\n  two ½\nbad \udcff line\nthree"
    (tmp_path / name).write_bytes(pack(lines.encode(errors="surrogateescape")))
    meta = prepare([tmp_path / name], tmp_path / "out", vocab_size=290, workers=1, skip_unreadable=True)
    assert sorted(texts(tmp_path / "out")) == ["  two ½", "one line", "three"]
    assert meta["posts"] == 0
    assert meta["dropped"] == {"empty": 1, "malformed lines": 1}


@pytest.mark.parametrize(
    "name, pack", [("a.jsonl", bytes), ("a.jsonl.gz", gzip.compress), ("a.jsonl.xz", lzma.compress)]
)
def test_a_json_file_is_a_document_per_object(tmp_path, name, pack):
    good = ['{"text": "a\\r\\nb"}', "", '{"text": "c", "more": 1}']
    bad = ["{", "[1]", '{"other": 1}', '{"text": 5}', '{"text": "\\ud800"}', "null", '"text"', "[" * 100_000]
    (tmp_path / name).write_bytes(pack("\n".join(good[:2] + bad + good[2:]).encode()))
    meta = prepare([tmp_path / name], tmp_path / "out", vocab_size=290, workers=1, skip_unreadable=True)
    assert sorted(texts(tmp_path / "out")) == ["a\nb", "c"]
    assert meta["dropped"] == {"malformed lines": 8}


def test_what_a_company_has_becomes_one_corpus(tmp_path, capsys):
    """In one command: tickets as a spreadsheet exports them, a wiki as a folder of pages, and a .zip."""
    wiki = tmp_path / "wiki/pages"
    wiki.mkdir(parents=True)
    for i in range(20):
        (wiki / f"page {i}.MD").write_text(f"# Page {i}\n\nIt has\n\n    code {i}\n")
    (wiki / "logo.svg").write_text("<svg/>")
    rows = "".join(f'{i};"Printer {i}";"It is \r\non fire; again"\r\n' for i in range(100))
    (tmp_path / "tickets.csv").write_bytes(b"\xef\xbb\xbf" + f"id;subject;description\r\n{rows}3;cut\r\n".encode())
    with zipfile.ZipFile(tmp_path / "mail.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("2024/mail.jsonl", "".join(json.dumps({"subject": f"Re: {i}"}) + "\n" for i in range(30)))
    inputs = [tmp_path / "tickets.csv", tmp_path / "wiki"]
    options = ["--text-key", "subject", "description", "--vocab-size", 330, "--workers", 2]
    status, output, errors = run("--input", *inputs, *options, "--out", tmp_path / "out", capsys=capsys)
    assert status == 0 and re.search("documents +120", output)
    assert "tickets.csv:202: 2 fields, but the header has 3; is a quote missing? (1 of 201 lines left out)" in errors
    assert "note: left out of" in errors and "pages/logo.svg" in errors
    found = texts(tmp_path / "out")
    assert "Printer 7\n\nIt is \non fire; again" in found and "# Page 3\n\nIt has\n\n    code 3" in found
    meta = json.loads((tmp_path / "out/meta.json").read_text())
    assert meta["reading"] == {"keys": ["subject", "description"], "document": "", "unreadable": 0.01}
    assert meta["dropped"] == {"files of no known kind": 1, "malformed lines": 1}
    assert any("logo.svg" in note for note in meta["notes"])
    status, _, errors = run(
        "--input", tmp_path / "mail.zip", "--text-key", "subject", "body", "--out", tmp_path / "b", capsys=capsys
    )
    assert status == 2 and "mail.zip: 2024/mail.jsonl has no column 'body'; its columns are subject" in errors
    assert not (tmp_path / "b").exists()


def test_standard_input_goes_in(tmp_path):
    words = ["--input", "-", "--out", tmp_path / "out", "--vocab-size", "290", "--workers", "2"]
    content = "".join(json.dumps({"text": f"piped {i}"}) + "\n" for i in range(20_000)).encode()
    done = subprocess.run([sys.executable, "-m", "data.prepare", *words], input=content, capture_output=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert sorted(texts(tmp_path / "out")) == sorted(f"piped {i}" for i in range(20_000))
    assert json.loads((tmp_path / "out/meta.json").read_text())["sources"] == ["-"]


def test_several_inputs_become_one_corpus(site, tmp_path):
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    (tmp_path / "other").mkdir()
    (tmp_path / "other/Posts.xml").write_text(
        (site / "Posts.xml").read_text().replace("do ", "undo ").replace("Do ", "Undo ")
    )
    inputs = [site, tmp_path / "a.txt", tmp_path / "other"]
    meta = prepare(inputs, tmp_path / "out", vocab_size=400, workers=1)
    assert (meta["posts"], meta["documents"]) == (240, 242)
    assert meta["sources"] == ["site", "a.txt", "other"]
    assert meta["notes"] == ["no Comments.xml for other: the posts are read without comments"]
    for twice in ([site, site], [*inputs, inputs[1]]):
        with pytest.raises(ValueError, match="is given twice"):
            prepare(twice, tmp_path / "twice")


@pytest.fixture
def weighed(site, tmp_path):
    """Three inputs: a dump, a folder with two files and 100 lines in all, and a file whose name ends like a weight."""
    (tmp_path / "wiki").mkdir()
    for name, lines in (("a.txt", range(60)), ("b.txt", range(60, 100))):
        (tmp_path / "wiki" / name).write_text("".join(f"page {i} of the wiki\n" for i in lines))
    (tmp_path / "x=2").mkdir()
    (tmp_path / "x=2" / "c.txt").write_text("".join(f"line {i}\n" for i in range(30)))
    return [site, tmp_path / "wiki", tmp_path / "x=2"]


def test_weights_are_written_down_and_change_nothing_else(weighed, tmp_path, capsys):
    site, wiki, x = weighed
    plain = prepare(weighed, tmp_path / "plain", vocab_size=400, workers=1)
    assert "weights" not in plain
    given = (f"{site}=2", f"{wiki}/=0.25", x)
    status, output, _ = run(
        "--input", *given, "--out", tmp_path / "out", "--vocab-size", 400, "--workers", 1, capsys=capsys
    )
    assert status == 0
    a, b = files(tmp_path / "plain"), files(tmp_path / "out")
    assert all(a[name] == b[name] for name in ("tokens.bin", "documents.npy", "tokenizer.model"))
    meta = json.loads(b["meta.json"])
    found = meta.pop("weights")
    before = json.loads(a["meta.json"])
    assert meta.pop("sha256") != before.pop("sha256") and meta == before
    assert [(one["input"], one["weight"]) for one in found] == [("site", 2), ("wiki", 0.25), ("x=2", 1)]
    text = texts(tmp_path / "out")
    shards = open_shards(tmp_path / "out")
    for (documents, weight), beginning, one in zip(shards.weights, ("How to|Do ", "page ", "line "), found):
        assert len(documents) and all(re.match(beginning, text[i]) for i in documents)
        assert one["tokens"] == shards.offsets[documents.stop] - shards.offsets[documents.start]
        held = int(weight * len(documents) + 0.5)
        said = rf"an epoch of {one['input']} +{held:,} documents: {len(documents):,} of weight {weight:g}\n"
        assert re.search(said, output)
    assert shards.weights[-1][0].stop == shards.validation_documents.start


def test_a_weight_that_cannot_be_is_an_error_and_a_path_that_exists_is_that_path(weighed, tmp_path):
    site, wiki, x = weighed
    meta = prepare([f"{x}=3"], tmp_path / "out", vocab_size=300, workers=1)
    assert [(one["input"], one["weight"]) for one in meta["weights"]] == [("x=2", 3)]
    posts, comments = (tmp_path / name / "ai.stackexchange.com" for name in ("posts", "comments"))
    for folder, table in ((posts, "Posts.xml"), (comments, "Comments.xml")):
        folder.mkdir(parents=True)
        (site / table).rename(folder / table)
    for inputs, message in (
        ([f"{wiki}=0"], "'0' is not a weight for .*wiki; give a number above 0 and at most 1,000, as in .*wiki=0.5"),
        *(([f"{wiki}={bad}"], f"'{bad}' is not a weight for") for bad in ("", "two", "-1", "nan", "1001", "inf")),
        ([f"{tmp_path}/none.txt=2"], "none.txt does not exist"),
        ([wiki, f"{wiki}=2"], "is given twice"),
        ([posts, f"{comments}=2"], "comments.* has a weight, but no posts or texts; give the weight to"),
    ):
        with pytest.raises(ValueError, match=message):
            prepare(inputs, tmp_path / "never", workers=1)
        assert not (tmp_path / "never").exists()


def test_a_given_tokenizer_is_used_as_it_is(site, tmp_path):
    prepare([site], tmp_path / "a", vocab_size=400, workers=1)
    prepare([site], tmp_path / "b", workers=1, tokenizer=tmp_path / "a" / "tokenizer.model")
    a, b = files(tmp_path / "a"), files(tmp_path / "b")
    assert all(a[name] == b[name] for name in ("tokens.bin", "documents.npy", "tokenizer.model"))


def test_a_large_corpus_is_sampled_for_the_tokenizer(site, tmp_path, monkeypatch):
    seen = []
    draw = module._sample

    def draw_and_note(*given):
        drawn = draw(*given)
        seen.append([tuple(span) for span in drawn.tolist()])
        return drawn

    monkeypatch.setattr(module, "_sample", draw_and_note)
    for limit in (10**9, 1_500):
        monkeypatch.setattr(module, "TRAINING_TEXT", limit)
        prepare([site], tmp_path / str(limit), vocab_size=320, workers=1)
    whole, sample = seen
    assert len(whole) == 114  # all but the held-out documents
    assert 20 < len(sample) < 75  # four in ten of them, by chance
    assert set(sample) < set(whole)


# The command


def run(*arguments, capsys) -> tuple[int, str, str]:
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = stop.code
    output, errors = capsys.readouterr()
    return status, output, errors


def test_the_command_prints_what_it_made(site, tmp_path, capsys):
    status, output, _ = run("--input", site, "--out", tmp_path / "out", "--workers", 1, capsys=capsys)
    assert status == 0
    rows = dict(line.split("  ", 1) for line in output.splitlines() if "  " in line)
    rows = {name: value.strip() for name, value in rows.items()}
    assert rows["posts"] == "120"
    assert rows["dropped: empty"] == "1"
    assert float(rows["characters per token"]) > 1
    assert "of 50,000 asked for" in rows["vocabulary"]


def broken(name, content):
    def make(folder):
        (folder / name).write_bytes(content)
        return folder / name

    return make


def dump(content):
    def make(folder):
        (folder / "Posts.xml").write_text(content)
        return folder

    return make


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda folder: folder / "none.7z", "does not exist"),
        (lambda folder: folder, "holds no Posts.xml"),
        (dump(""), "holds no Posts.xml, or an empty one"),
        (dump("<posts>\n</posts>"), "holds no posts"),
        (dump('<posts>\n<row Id="x" />\n</posts>'), "no document in .*1 malformed rows"),
        (dump('<posts>\n<row Id="1" PostTypeId="1" Body="b" />\n'), "truncated"),
        (dump('<!DOCTYPE p [<!ENTITY a "b">]>\n<posts></posts>'), "declares an XML entity"),
        (broken("a.7z", b"7z\xbc\xaf'\x1c\0\4cut"), "truncated or not a .7z archive"),
        (broken("a.pdf", b"x"), "of an unknown kind"),
        (broken("a.txt", b"\n\n"), "no document"),
        (broken("a.jsonl", b"{\n[]\n"), r"a.jsonl:1: no JSON object \(2 of the first 2 lines .*--skip-unreadable"),
        (broken("a.txt.gz", gzip.compress(b"text " * 1_000)[:-10]), "truncated or damaged"),
        (broken("a.txt.xz", lzma.compress(b"text " * 1_000)[:-10]), "truncated or damaged"),
        (broken("a.jsonl.gz", b"no gzip"), "truncated or damaged"),
    ],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, capsys, make, message, workers):
    pytest.importorskip("py7zr")
    (tmp_path / "in").mkdir()
    path = make(tmp_path / "in")
    out = tmp_path / "a" / "out"
    status, output, errors = run("--input", path, "--out", out, "--workers", workers, capsys=capsys)
    assert status == 2
    assert output == ""
    (line,) = [line for line in errors.splitlines() if line.startswith("data.prepare: ")]
    assert errors.rstrip().endswith(line)
    with pytest.raises(ValueError, match=message):
        prepare([path], out)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    "options, message",
    [
        (["--vocab-size", "100"], "at least 262"),
        (["--vocab-size", "265"], "need at least"),
        (["--workers", "0"], "--workers is 0; it must be at least 1"),
        (["--posts", "some"], "invalid choice"),
        (["--unknown"], "unknown option --unknown"),
    ],
)
def test_bad_options_are_one_line(site, tmp_path, capsys, options, message):
    status, _, errors = run("--input", site, "--out", tmp_path / "out", *options, capsys=capsys)
    assert status == 2
    assert message in errors.splitlines()[-1]
    assert errors.splitlines()[-1].startswith("data.prepare: ")
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


def test_a_folder_that_holds_something_is_refused(site, capsys):
    status, _, errors = run("--input", site, "--out", site, capsys=capsys)
    assert status == 2
    assert "exists already" in errors


def test_a_bad_out_is_refused_before_anything_is_read(tmp_path, capsys):
    (tmp_path / "file").write_text("x")
    with new_folder(tmp_path / "out"):
        for out, message in [("file", "is not a folder"), ("out", f"is in use by process {os.getpid()}")]:
            status, _, errors = run("--input", tmp_path / "none", "--out", tmp_path / out, capsys=capsys)
            assert (status, len(errors.splitlines())) == (2, 1)
            assert errors.startswith(f"data.prepare: {tmp_path / out}")
            assert message in errors


# What ends a run early

AT_WORK = """
import hashlib, sys, time
from pathlib import Path
from data import prepare, processes, reading

name, seconds, mark, *arguments = sys.argv[1:]
place = {"_begin": processes, "_render": reading}.get(name, prepare)
function = getattr(place, name)

def busy(*given):
    Path(mark).touch()
    if name == "train":  # as SentencePiece does: minutes of C code, which hears no signal
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
    end = time.monotonic() + float(seconds)
    while time.monotonic() < end:
        pass
    return function(*given)

setattr(place, name, busy)
sys.exit(prepare.main(arguments))
"""


@contextmanager
def at_work(site, function: str, seconds: float):
    """A run of data.prepare in which a process is now in this function, where it stays for so long. The output of a run
    ends when its last process does."""
    mark = site.parent / "mark"
    arguments = ["--input", site, "--out", site.parent / "out", "--workers", "2", "--vocab-size", "400"]
    command = [sys.executable, "-c", AT_WORK, function, seconds, mark, *arguments]
    process = subprocess.Popen(
        list(map(str, command)), cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        while not mark.exists():
            assert process.poll() is None
            time.sleep(0.01)
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        mark.unlink()


forked = pytest.mark.skipif(sys.platform != "linux", reason="replaces a function of processes that are forked")


@forked
@pytest.mark.parametrize("function, seconds", [("_begin", 0.3), ("_render", 60), ("train", 60), ("_encode_part", 60)])
def test_a_killed_run_leaves_no_process_and_the_next_removes_its_folder(site, tmp_path, capsys, function, seconds):
    with at_work(site, function, seconds) as process:
        process.kill()
        process.communicate(timeout=15)
    begun = any((tmp_path / ".out.unfinished").iterdir())
    status, _, errors = run("--input", site, "--out", tmp_path / "out", "--workers", 1, capsys=capsys)
    assert status == 0
    assert (f"starting over in {tmp_path}/.out.unfinished, which another run left" in errors) == begun
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "site"]
    assert len(texts(tmp_path / "out")) == 120


@forked
@pytest.mark.parametrize(
    "number, status, function, seconds",
    [
        (signal.SIGINT, 130, "_begin", 0.3),
        (signal.SIGINT, 130, "_render", 0.3),
        (signal.SIGINT, 130, "train", 60),
        (signal.SIGTERM, 143, "_render", 0.3),
    ],
)
def test_an_interrupted_run_leaves_what_the_next_goes_on_with(site, tmp_path, number, status, function, seconds):
    with at_work(site, function, seconds) as process:
        os.kill(process.pid, number)
        if number == signal.SIGINT:  # as a terminal does, to all processes
            os.killpg(process.pid, number)  # as when Ctrl-C is pressed twice
        _, errors = process.communicate(timeout=15)
    assert process.returncode == status
    assert errors.splitlines()[-1].startswith("data.prepare: interrupted; repeat the command to continue")
    assert "Traceback" not in errors
    assert {path.name for path in tmp_path.iterdir()} == {"site", ".out.unfinished", ".out.unfinished.lock"}


# Going on


INTO_PIECES = """
import os, signal, sys
from data import journal, prepare
from minisobert.corpus import comments, posts, rows

journal.SECONDS, rows.BLOCK, posts.PART, prepare.BATCH, comments.RUN = 0, 500, 500, 500, 20
calls, last = 0, int(sys.argv[1])

def count(event, arguments):
    global calls
    if event in ("open", "os.rename", "os.remove", "os.rmdir", "os.truncate", "os.mkdir"):
        calls += os.getpid() == main
        if calls == last:
            os.kill(main, signal.SIGKILL)

main = os.getpid()
prepare.prepare  # imported before the hook
sys.addaudithook(count)
try:
    status = prepare.main(sys.argv[2:])
finally:
    print(calls)
sys.exit(status)
"""


def run_until(last: int, *arguments) -> subprocess.CompletedProcess:
    """A run of data.prepare in small pieces, killed when it touches a file for the n-th time, where n is `last`."""
    command = [sys.executable, "-c", INTO_PIECES, last, *arguments, "--workers", "1", "--vocab-size", "400"]
    return subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True, timeout=60)


@pytest.mark.slow
def test_a_run_killed_at_any_moment_goes_on_and_gives_the_same(site, tmp_path):
    (site / "Comments.xml").write_text(
        "<comments>\n"
        + "".join(f'<row Id="{n}" PostId="{n % 130 + 1}" Text="c {n}" />\n' for n in range(60))
        + "</comments>"
    )
    write_lines(tmp_path / "more.txt")
    arguments = ["--input", site, tmp_path / "more.txt", "--work", tmp_path / "work", "--out"]
    whole = run_until(0, *arguments, tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    moments = int(whole.stdout.splitlines()[-1])
    assert moments > 150
    went_on = 0
    for last in range(5, moments, max(1, moments // 8)):
        out = tmp_path / "killed"
        killed = run_until(last, *arguments, out)
        if killed.returncode == 0 and last > moments - 20:  # Python itself does not always open the same files
            break
        assert killed.returncode == -signal.SIGKILL
        again = run_until(last, *arguments, out)  # killed once more, if it gets so far
        went_on += "continuing in" in again.stderr
        if again.returncode:
            assert again.returncode == -signal.SIGKILL, again.stderr
            again = run_until(0, *arguments, out)
            went_on += "continuing in" in again.stderr
        assert again.returncode == 0, again.stderr
        assert files(out) == files(tmp_path / "whole")
        assert {path.name for path in tmp_path.iterdir()} == {"site", "more.txt", "whole", "killed", "work"}
        assert not any((tmp_path / "work").iterdir())
        shutil.rmtree(out)
    assert went_on > 5


def write_lines(path):
    path.write_text("".join(f"line {n} of a text of its own\n" for n in range(100)) * 2)


@pytest.mark.parametrize("change", [["--seed", "7"], ["--fresh"], ["touch"]])
def test_what_another_command_left_is_not_gone_on_with(site, tmp_path, capsys, monkeypatch, change):
    monkeypatch.setattr(module, "_encode", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
    arguments = ["--input", site, "--out", tmp_path / "out", "--workers", 1, "--vocab-size", 400]
    assert run(*arguments, capsys=capsys)[0] == 130
    assert run(*arguments, capsys=capsys)[2].count("continuing in") == 1
    if change == ["touch"]:
        os.utime(site / "Posts.xml", (1, 1))
        change = []
    monkeypatch.undo()
    status, _, errors = run(*arguments, *change, capsys=capsys)
    assert status == 0
    assert f"starting over in {tmp_path}/.out.unfinished" in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "site"]


def _die(*arguments):
    os._exit(1)


@forked
@pytest.mark.parametrize(
    "function, message",
    [("_render", "a worker process died"), ("train", "the process that trains the tokenizer died")],
)
def test_a_process_that_dies_is_one_line_and_leaves_nothing(site, tmp_path, capsys, monkeypatch, function, message):
    monkeypatch.setattr(reading if function == "_render" else module, function, _die)
    status, _, errors = run("--input", site, "--out", tmp_path / "out", "--workers", 2, capsys=capsys)
    assert status == 2
    assert errors.splitlines()[-1].startswith(f"data.prepare: {message}")
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), int(sys.argv[1])))
from data import prepare, processes
sys.exit(prepare.main(sys.argv[2:]))
"""


@pytest.mark.parametrize(  # the spool gets too large; with many short documents, the offsets do
    "line, size", [("one word and another {}\n", 10_000), ("{}\n", 65_000)]
)
def test_a_file_that_cannot_grow_is_one_line_and_leaves_nothing(tmp_path, line, size):
    (tmp_path / "in.txt").write_text("".join(map(line.format, range(10_000))))
    arguments = ["--input", tmp_path / "in.txt", "--out", tmp_path / "out", "--workers", "1", "--vocab-size", "300"]
    command = [sys.executable, "-c", LIMITED, size, *arguments]
    process = subprocess.run(list(map(str, command)), cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=60)
    assert process.returncode == 2
    assert process.stderr.splitlines()[-1] == (
        f"data.prepare: {tmp_path}/out cannot be written: File too large in {tmp_path}; "
        "make room there or choose an --out elsewhere"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["in.txt"]


def test_comments_that_find_no_room_are_one_line_and_leave_nothing(site, tmp_path):
    (site / "Comments.xml").write_text(
        "<comments>\n" + "".join(f'<row Id="{n}" PostId="103" Text="{n}" />\n' for n in range(10_000)) + "</comments>"
    )
    arguments = ["--input", site, "--out", tmp_path / "out", "--workers", "1", "--vocab-size", "300"]
    command = [sys.executable, "-c", LIMITED, 20_000, *arguments]
    process = subprocess.run(list(map(str, command)), cwd=ROOT, stderr=subprocess.PIPE, text=True, timeout=60)
    assert process.returncode == 2
    assert f"{tmp_path}/out cannot be written: File too large in {tmp_path}; make" in process.stderr.splitlines()[-1]
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


def test_a_real_dump_comes_back_exactly(tmp_path):
    path = SHARED / "dumps" / "french.meta.stackexchange.com.7z"
    if not path.exists():
        pytest.skip("the real dumps are not beside this checkout (../shared/data)")
    pytest.importorskip("py7zr")
    (site,), _, _ = module.check([path])
    rendered = [entry.post.text() for entry in reading.posts(site, tmp_path, module.Counter())]
    meta = prepare([path], tmp_path / "out", vocab_size=4_000, workers=2)
    assert (meta["posts"], meta["comments"], meta["dropped"]["empty"]) == (760, 1_305, 1)  # one is only an image
    assert sorted(texts(tmp_path / "out")) == sorted(filter(None, rendered))


def pack(path, *files, **options):
    with pytest.importorskip("py7zr").SevenZipFile(path, "w", **options) as archive:
        for file in files:
            archive.write(file, file.name)
    return path


def test_one_archive_for_each_table_goes_in(site, tmp_path, capsys):
    (site / "Users.xml").write_text("<users>\n</users>")
    dump = [
        pack(tmp_path / f"stackoverflow.com-{name}.7z", site / f"{name}.xml") for name in ("Posts", "Comments", "Users")
    ]
    status, output, errors = run("--input", *dump, "--out", tmp_path / "a", "--workers", 1, capsys=capsys)
    assert status == 0
    assert re.search(r"^comments +2$", output, re.M)
    assert "note: left out, since they are neither posts nor comments: stackoverflow.com-Users.7z\n" in errors
    status, output, errors = run("--input", dump[0], "--out", tmp_path / "b", "--workers", 1, capsys=capsys)
    assert status == 0
    assert re.search(r"^comments +0$", output, re.M)
    assert "note: no Comments.xml for stackoverflow.com: the posts are read without comments\n" in errors
    prepare([site], tmp_path / "c", workers=1)
    content = {name: (tmp_path / name / "tokens.bin").read_bytes() for name in "abc"}
    assert content["a"] == content["c"] != content["b"]


def test_threads_of_two_sites_are_not_one_thread(site, tmp_path):
    content = (site / "Posts.xml").read_text()
    for name in ("a", "b"):
        (tmp_path / "both" / name).mkdir(parents=True)
        (tmp_path / "both" / name / "Posts.xml").write_text(
            content.replace("How", f"{name}: how").replace("Do", f"{name}: do")
        )
    meta = prepare([tmp_path / "both"], tmp_path / "out", vocab_size=400, workers=1)
    assert meta["posts"] == 240
    held_out = texts(tmp_path / "out")[-12:]  # those of 6 of 120 threads
    of_site = {name: set(re.findall(f"{name}: how to do ([0-9]+)", "\n".join(held_out))) for name in ("a", "b")}
    assert sum(map(len, of_site.values())) == 6
    assert of_site["a"] != of_site["b"]


def test_what_is_taken_out_of_a_dump_is_in_the_table(site, tmp_path, capsys):
    bad = (
        '<row Id="7" PostTypeId="1" Body="a&#x0E;b\0" />\n<row Id="77" PostTypeId="1" Body="x />\n'
        '<row Id="1000000001" PostTypeId="1" OwnerUserId="-1" Body="invented" />\n'
    )
    (site / "Posts.xml").write_text((site / "Posts.xml").read_text().replace("</posts>", f"{bad}</posts>"))
    status, output, _ = run("--input", site, "--out", tmp_path / "out", "--workers", 1, capsys=capsys)
    assert status == 0
    rows = dict(re.findall("^dropped: (.*?)  +([0-9]+)$", output, re.M))
    assert rows == {
        "empty": "1", "neither question nor answer": "1", "comments of dropped posts": "2", "malformed rows": "1",
        "control characters left out": "2", "fabricated rows": "1",
    }  # fmt: skip
    assert "ab" in texts(tmp_path / "out")


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda site, d: pack(d / "so-Comments.7z", site / "Comments.xml"), "so-Posts.7z is missing"),
        (lambda site, d: pack(d / "a.7z", site / "Posts.xml", password="secret"), "is encrypted; unpack it (7z x "),
        (lambda site, d: (site / "Posts.xml").rename(d / "a.7z.001"), "a volume of a split archive; unpack it (7z x "),
        (lambda site, d: d, "site/Posts.xml are the same posts; give one of them"),
    ],
)
def test_a_dump_that_does_not_go_in_is_one_short_line(site, tmp_path, capsys, make, message):
    pack(tmp_path / "a.com.7z", site / "Posts.xml")
    status, output, errors = run("--input", make(site, tmp_path), "--out", tmp_path / "out", capsys=capsys)
    assert (status, output) == (2, "")
    (line,) = errors.splitlines()
    assert message in line
    assert len(line) < 200 + 3 * len(str(tmp_path))
    assert not (tmp_path / "out").exists()


ESCAPE = "\x1b]0;owned\x07\x9b31m"


def test_no_escape_of_a_name_reaches_the_terminal(tmp_path, capsys):
    folder = tmp_path / f"so{ESCAPE}"
    folder.mkdir()
    (folder / "Posts.xml").write_text(f"<posts>\n{''.join(map(ROW.format, range(100, 160)))}</posts>")
    (folder / f"x{ESCAPE}.csv").write_text("")
    assert (
        main(["--input", str(folder), "--out", f"{tmp_path}/out{ESCAPE}", "--vocab-size", "300", "--workers", "1"]) == 0
    )
    shown = capsys.readouterr()
    assert "note: no Comments.xml for so\ufffd]0;owned" in shown.err and "\nwritten to " in shown.out
    assert not set("\x1b\x07\x9b") & set(shown.out + shown.err)


def test_links_are_kept_where_asked_and_nothing_else_changes(site, tmp_path):
    posts = site / "Posts.xml"
    posts.write_text(
        posts.read_text().replace("&lt;b&gt;again&lt;/b&gt;", "&lt;a href=&quot;/q/1&quot;&gt;again&lt;/a&gt;")
    )
    for links in ("drop", "keep"):
        assert (
            main(["--input", str(site), "--out", str(tmp_path / links), "--vocab-size", "320", "--links", links]) == 0
        )
    dropped, kept = texts(tmp_path / "drop"), texts(tmp_path / "keep")
    assert [text.replace("[again](/q/1)", "again") for text in kept] == dropped != kept
    meta = [json.loads((tmp_path / links / "meta.json").read_text()) for links in ("drop", "keep")]
    assert ["links" in each for each in meta] == [False, True]


def test_it_says_first_what_it_will_need_and_refuses_what_the_disk_cannot_hold(site, tmp_path, capsys, monkeypatch):
    arguments = ["--input", site, "--workers", 1, "--vocab-size", 400]
    errors = run(*arguments, "--out", tmp_path / "out", capsys=capsys)[2]
    assert errors.startswith("1 MB to read: expect about 1 MB of disk, 300 MB of memory and 1 minute with 1 process")
    size = sum(path.stat().st_size for path in site.iterdir())
    usage = type("Usage", (), {"free": size})
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    status, _, errors = run(*arguments, "--out", tmp_path / "more", "--work", tmp_path / "work", capsys=capsys)
    assert status == 2
    assert f"data.prepare: about 1 MB of disk will be needed in {tmp_path}, which has 1 MB free; make" in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "site", "work"]
    usage.free = 2 * size
    assert run(*arguments, "--out", tmp_path / "more", capsys=capsys)[0] == 0
