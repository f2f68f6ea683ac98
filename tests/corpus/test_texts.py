"""Text files as people have them: what becomes a document, what is left out with a note, and what is refused."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import random
import re
import sys
import tracemalloc
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from data import inputs
from minisobert.corpus import sources, tables
from minisobert.corpus import texts as module
from minisobert.corpus.dump import Site
from minisobert.corpus.sources import TextFile, kind_of
from minisobert.corpus.texts import KINDS, Reading, texts

TEXTS = ["one", "two\n\n  lines ½", 'a "quote", a comma; a\ttab', "日本語 🐈", "x" * 200]
ROWS = [{"id": str(i), "text": text, "more": "m"} for i, text in enumerate(TEXTS)]


def read(path: Path | str, dropped: Counter | None = None, progress=lambda size: None, **reading) -> list[str]:
    found, _, _ = inputs.check([Path(path)])
    dropped = Counter() if dropped is None else dropped
    return [text for file in found for _, text in texts(file, dropped, progress, Reading(**reading))]


def delimited(rows: list[dict], delimiter: str) -> bytes:
    out = io.StringIO()
    table = csv.DictWriter(out, list(rows[0]), delimiter=delimiter)
    table.writeheader()
    table.writerows(rows)
    return out.getvalue().encode()


def parquet(rows: list[dict], **options) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    out = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(rows), out, **options)
    return out.getvalue()


def as_lines(rows: list[dict]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def zst(content: bytes) -> bytes:
    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        zstd = pytest.importorskip("backports.zstd")
    return zstd.compress(content)


WRITE = {
    ".jsonl": as_lines, ".ndjson": as_lines,
    ".json": lambda rows: json.dumps(rows, indent=1).encode(),
    ".csv": lambda rows: delimited(rows, ","), ".tsv": lambda rows: delimited(rows, "\t"),
    ".parquet": parquet,
}  # fmt: skip
PACK = {"": bytes, ".gz": gzip.compress, ".xz": lzma.compress, ".bz2": bz2.compress, ".zst": zst}


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("kind", WRITE)
def test_a_table_is_a_document_for_each_row_packed_or_not(tmp_path, kind, packed):
    content = WRITE[kind](ROWS)
    path = tmp_path / f"A{kind}{packed}".upper()
    path.write_bytes(PACK[packed](content))
    seen: list[int] = []
    assert read(path, progress=seen.append) == TEXTS
    assert sum(seen) == len(content)


@pytest.mark.parametrize("packed", PACK)
@pytest.mark.parametrize("kind", [".txt", ".md"])
def test_text_is_a_document_by_line_paragraph_or_file(tmp_path, kind, packed):
    content = "\ufeff# One\r\nline\r\n \r\n\r\n  two ½\nlines\n\n\n"
    path = tmp_path / f"a{kind}{packed}"
    path.write_bytes(PACK[packed](content.encode()))
    seen: list[int] = []
    lines = ["# One", "line", " ", "", "  two ½", "lines", "", ""]
    whole = ["# One\nline\n \n\n  two ½\nlines"]
    assert read(path, progress=seen.append) == (lines if kind == ".txt" else whole)
    assert read(path, document="line") == lines
    assert read(path, document="paragraph") == ["# One\nline", "  two ½\nlines"]
    assert read(path, document="file") == whole
    assert sum(seen) == len(content.encode())


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be", "utf-8"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("kind", [".txt", ".jsonl", ".csv", ".json"])
def test_encodings_with_a_mark_and_all_line_ends_are_read(tmp_path, kind, end, encoding):
    words = ["one ½", "日本語 🐈", "three"]
    made = {
        ".txt": words, ".jsonl": [json.dumps({"text": word}, ensure_ascii=False) for word in words],
        ".csv": ["id,text", *(f"1,{word}" for word in words)],
        ".json": json.dumps([{"text": word} for word in words], ensure_ascii=False, indent=1).split("\n"),
    }  # fmt: skip
    path = tmp_path / f"a{kind}"
    path.write_bytes(("\ufeff" + "".join(line + end for line in made[kind])).encode(encoding))
    assert read(path) == words


def test_files_that_were_put_together_have_marks_inside(tmp_path):
    (tmp_path / "a.txt").write_text("\ufeffone\n\ufefftwo\n")
    (tmp_path / "a.jsonl").write_text('\ufeff{"text": "one"}\n\ufeff{"text": "two"}\n')
    (tmp_path / "a.json").write_text('\ufeff[{"text": "one"}]\ufeff[{"text": "two"}]\n')
    for name in ("a.txt", "a.jsonl", "a.json"):
        assert read(tmp_path / name) == ["one", "two"]


@pytest.mark.parametrize("name, content, message", [
    ("a.txt", "text ½\n".encode("utf-16-le"), "not UTF-8 text: it holds NUL bytes; if it is UTF-16, convert it"),
    ("a.txt", b"PAR1" + bytes(100), "it is a .parquet file; name it so"),
    ("a.md", b"PK\x03\x04" + bytes(100), "it is a .zip, or a file of an office program"),
    ("a.txt", "caf\xe9\n".encode("latin-1") * 9, r"a.txt:1: not UTF-8; convert the file, e.g. with iconv \(9 of "),
    ("a.md", "one\ncaf\xe9\n".encode("latin-1"), "a.md:2: not UTF-8"),
    ("a.csv", "id,text\n1,caf\xe9\n".encode("latin-1"), "a.csv:2: not UTF-8"),
    ("a.json", '[{"text": "caf\xe9"}]\n'.encode("latin-1"), "a.json:1: not UTF-8"),
    ("a.txt", "abc".encode("utf-16") + b"x", "is not UTF-16 .truncated data"),
    ("a.csv", b'id,"bo\n\ndy"\n1,x\n', "has no column 'text'; its columns are id, bo dy; name yours with --text-key"),
    ("a.jsonl", b'{"a\\nb": "x"}\n', "no 'text'; its keys are a b; "),
    ("a.csv", b"id,body\n1,x\n", "has no column 'text'; its columns are id, body; name yours with --text-key"),
    ("a.csv", b'te"xt,"a" b\n1,x\n', "a.csv: its header has a quote too few or too many"),
    ("a.csv", b'"text\n1\n', "a.csv: its header has a quote too few or too many"),
    ("a.jsonl", b'{"id": 1, "body": "x"}\n', "a.jsonl:1: it has no 'text'; its keys are id, body; name yours with --t"),
    ("a.jsonl", b'{"text": 5}\n', "a.jsonl:1: text is a number, not text"),
    ("a.json", b'[{"text": "a"}, {"text": ', "a.json: value 2 is not JSON"),
    ("a.json", b'[{"text": "a"}', "truncated: its array never ends"),
    ("a.json", b'[{"text": "a"} {"te', "value 2 is not JSON"),
    ("a.json", b'[[{"text": "a"}]]', "a.json:1: no JSON object"),
    ("a.parquet", b"x" * 50, "cannot be read as .parquet"),
    ("a.parquet", b"", "cannot be read as .parquet"),
    ("a.txt.bz2", bz2.compress(b"text " * 9_000)[:-10], "truncated or damaged"),
    ("a.txt.bz2", b"no bzip2", "truncated or damaged"),
    ("a.txt.zst", b"no zstandard", "truncated or damaged"),
    ("a.zip", b"PK\x03\x04", "truncated or not a .zip archive"),
    ("a.gz", gzip.compress(b"text"), "of an unknown kind"),
])  # fmt: skip
def test_what_cannot_be_read_is_one_line_that_says_what_to_do(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        read(tmp_path / name)
    assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)


def test_one_unreadable_line_in_a_hundred_is_said_and_more_are_refused(tmp_path, capsys):
    good = [json.dumps({"text": str(i)}) for i in range(99)]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join([*good, "{\x1b[31m"]))
    dropped = Counter()
    assert len(read(path, dropped)) == 99 and dropped == {"malformed lines": 1}
    assert f"note: {path}:100: no JSON object (1 of 100 lines left out)" in capsys.readouterr().err
    path.write_text("\n".join(['{"\\u001b[31m": 1}', *good, "{"]))
    with pytest.raises(ValueError, match=r"a.jsonl:1: it has no 'text'.*2 of the first 101 .*--skip-unreadable"):
        read(path)
    assert len(read(path, unreadable=1)) == 99
    assert "\x1b" not in capsys.readouterr().err
    path.write_text("{\n" * 5_000 + "\n".join(good * 10_000))
    with pytest.raises(ValueError, match="1,000 of the first 1,000"):  # not at the end, terabytes later
        read(path)


def test_a_stray_quote_counts_all_lines_that_it_hides(tmp_path):
    rows = [f"{i},t{i}\n" for i in range(1_000)]
    rows[100], rows[150] = '100,"open\n', '150,"closed\n'
    (tmp_path / "a.csv").write_text("id,text\n" + "".join(rows))
    with pytest.raises(ValueError, match=r"a.csv:102: a quote is missing or too many .*\(51 of the first "):
        read(tmp_path / "a.csv")
    dropped = Counter()
    assert len(read(tmp_path / "a.csv", dropped, unreadable=1)) == 949 and dropped == {"malformed lines": 51}


@pytest.mark.parametrize("kind", WRITE)
def test_several_keys_are_joined_by_a_blank_line(tmp_path, kind):
    rows = [{"id": "1", "subject": "Printer", "description": "It is\non fire."},
            {"id": "2", "subject": "Empty", "description": " \n"}, {"id": "3", "subject": "", "description": "alone"},
            {"id": "4", "subject": "", "description": ""}]  # fmt: skip
    (tmp_path / f"a{kind}").write_bytes(WRITE[kind](rows))
    keys = ("subject", "description")
    assert read(tmp_path / f"a{kind}", keys=keys) == ["Printer\n\nIt is\non fire.", "Empty", "alone", ""]
    with pytest.raises(
        ValueError, match="no column 'descripton'; its columns are id, subject, description; name yours"
    ):
        read(tmp_path / f"a{kind}", keys=("subject", "descripton"))
    if kind in tables.OBJECTS:  # in which an empty field is often missing
        rows = [{key: value for key, value in row.items() if value.strip()} for row in rows[:3]]
        (tmp_path / f"a{kind}").write_bytes(WRITE[kind]([*rows, {"subject": None, "description": "none"}]))
        assert read(tmp_path / f"a{kind}", keys=keys) == ["Printer\n\nIt is\non fire.", "Empty", "alone", "none"]


def test_a_json_may_hold_lines_or_objects_in_a_row(tmp_path):
    path = tmp_path / "a.json"
    for joint in ("\n", "", ",\n", " "):
        for indent in (None, 2):
            path.write_text(joint.join(json.dumps({"text": text}, indent=indent) for text in TEXTS))
            assert read(path) == TEXTS
    path.write_bytes(as_lines(ROWS) * 40 + b"{\n" + as_lines(ROWS))  # the damaged line costs no other
    assert read(path) == TEXTS * 41
    path.write_text("")
    assert read(path) == []


def test_a_json_array_is_the_same_wherever_it_is_cut_into_pieces(tmp_path, monkeypatch):
    draw = random.Random(0)
    values = [{"text": draw.choice(TEXTS) * draw.randrange(3), "n": [draw.randrange(10**9), {"a": None}]}
              for _ in range(200)]  # fmt: skip
    path = tmp_path / "a.json"
    for indent in (None, 1):
        path.write_text(json.dumps(values, indent=indent))
        monkeypatch.setattr(tables, "LONGEST", 3_000)  # longer than a value, shorter than the array
        for piece in (1, 2, 7, 64):
            monkeypatch.setattr(tables, "HEAD", piece)
            assert read(path) == [value["text"].strip("\n") for value in values]
    path.write_text(json.dumps([{"text": "x" * 9_000}]))
    with pytest.raises(ValueError, match="more than 3,000 characters"):
        read(path)


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv", ".txt", ".parquet"])
def test_memory_does_not_grow_with_the_file(tmp_path, kind):
    draw = random.Random(0)  # text that compression does not shrink
    rows = [{"text": f"{draw.getrandbits(2_000):x}"} for _ in range(20_000)]
    content = {**WRITE, ".txt": lambda rows: "".join(row["text"] + "\n" for row in rows).encode()}[kind](rows)
    path = tmp_path / f"a{kind}.gz"
    path.write_bytes(gzip.compress(content, 1))
    del rows, content
    (file,), _, _ = inputs.check([path])
    tracemalloc.start()
    count = sum(1 for _ in texts(file, Counter()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 20_000 and peak < 2.5e6  # the text has 10 MB


@pytest.mark.parametrize("document", ["line", "paragraph", "file"])
def test_a_document_without_end_is_refused(tmp_path, monkeypatch, document):
    (tmp_path / "a.txt").write_text("x" * 5_000 if document == "line" else "x\n" * 5_000)
    assert len(read(tmp_path / "a.txt", document=document)) == 1
    monkeypatch.setattr(sources, "LONGEST", 3_000)
    monkeypatch.setattr(module, "LONGEST", 3_000)
    with pytest.raises(ValueError, match="more than 3,000 characters"):
        read(tmp_path / "a.txt", document=document)


@pytest.fixture
def mixed(tmp_path):
    """A folder with files of many kinds, as on a real disk."""
    folder = tmp_path / "mine"
    (folder / "sub").mkdir(parents=True)
    (folder / ".git").mkdir()
    for name, content in {
        "b.TXT": b"line", "sub/a.jsonl.gz": gzip.compress(as_lines(ROWS)), "sub/c.csv": delimited(ROWS, ";"),
        "readme.md": b"# Read\n\nme", "picture.png": b"\x89PNG\0", ".git/x.txt": b"no", ".DS_Store": b"\0",
    }.items():  # fmt: skip
        (folder / name).write_bytes(content)
    return folder


def zipped(folder: Path, path: Path) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            archive.write(file, file.relative_to(folder))
        archive.writestr("__MACOSX/sub/._c.csv", b"\0\5\x16\7")
        link = zipfile.ZipInfo("link.txt")
        link.create_system, link.external_attr = 3, 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
    return path


def test_a_folder_and_a_zip_give_the_files_inside(mixed, tmp_path):
    (mixed / "round").symlink_to(mixed)
    expected = ["line", "# Read\n\nme", *TEXTS, *TEXTS]
    assert read(mixed) == expected
    _, size, notes = inputs.check([mixed])
    assert size is None and notes == [
        f"left out of {mixed}, because their kind is not known: .DS_Store, .git/x.txt, picture.png, round"
    ]
    (mixed / "round").unlink()
    archive = zipped(mixed, tmp_path / "mine.ZIP")
    assert read(archive) == expected
    _, size, notes = inputs.check([archive])
    assert size is None and notes == [
        f"left out of {archive}, because their kind is not known: .DS_Store, .git/x.txt, __MACOSX/sub/._c.csv, "
        "link.txt, picture.png"
    ]


def test_the_bytes_to_read_are_known_where_nothing_is_packed(mixed, tmp_path):
    (mixed / "sub/a.jsonl.gz").unlink()
    for path in (mixed, zipped(mixed, tmp_path / "a.zip")):
        found, size, _ = inputs.check([path])
        seen: list[int] = []
        for file in found:
            list(texts(file, Counter(), seen.append))
        assert sum(seen) == size > 0


def test_a_folder_with_a_dump_is_a_dump(mixed):
    (mixed / "sub/Posts.xml").write_text("<posts>\n</posts>")
    (found,), _, notes = inputs.check([mixed])
    assert isinstance(found, Site) and any("since they are neither posts nor comments" in note for note in notes)


def test_a_zip_with_a_dump_says_to_unpack_it(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("site/Posts.xml", "<posts>\n</posts>")
    with pytest.raises(ValueError, match=r"a.zip holds site/Posts.xml; .*unpack it"):
        inputs.check([tmp_path / "a.zip"])


def test_a_damaged_member_of_a_zip_is_named(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "text of the file " * 9)
    path.write_bytes(path.read_bytes().replace(b"text of", b"test of", 1))
    with pytest.raises(ValueError, match=r"a.zip: a.txt is truncated or damaged .Bad CRC"):
        read(path)
    content = bytearray(path.read_bytes())
    for sign, at in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
        content[content.index(sign) + at] |= 1
    (tmp_path / "b.zip").write_bytes(content)
    with pytest.raises(ValueError, match=r"b.zip: a.txt is encrypted"):
        read(tmp_path / "b.zip")


def test_a_folder_of_nothing_that_can_be_read_says_what_it_holds(tmp_path):
    (tmp_path / "a.docx").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"holds a.docx, which is of an unknown kind; give a .7z, .*.parquet"):
        inputs.check([tmp_path])


def test_what_is_there_twice_is_refused(mixed):
    with pytest.raises(ValueError, match=r"b.TXT is given twice"):
        inputs.check([mixed, mixed / "b.TXT"])


def test_files_that_are_no_text_can_be_left_out(mixed, capsys):
    (mixed / "bad.txt").write_bytes(b"\0")
    (mixed / "other.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match=r"bad.txt is not UTF-8 text"):
        read(mixed)
    dropped = Counter()
    assert len(read(mixed, dropped, unreadable=1)) == 12 and dropped == {"unreadable files": 2}
    assert re.search("note: .*bad.txt is not UTF-8.*note: .*other.csv has no column", capsys.readouterr().err, re.S)


@pytest.mark.parametrize("content, expected", [
    (as_lines(ROWS), TEXTS), (b"one\ntwo\n", ["one", "two"]), ("\ufeff{\"text\": \"½\"}\n".encode("utf-16-le"), ["½"]),
    (b"", []),
])  # fmt: skip
def test_standard_input_is_lines_or_objects(monkeypatch, content, expected):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(content))))
    assert read("-") == expected


def test_standard_input_is_text_where_documents_are_asked_for(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(b'{"text": 1}\nx\n'))))
    ((file,), _, _) = inputs.check([Path("-")], "line")
    assert file.kind == ".txt" and [text for _, text in texts(file, Counter())] == ['{"text": 1}', "x"]


def test_half_of_a_pair_costs_its_line_alone(tmp_path):
    """In UTF-16, which can hold half a surrogate pair; UTF-8 cannot."""
    lines = [*map(str, range(100)), "half \ud83d", "after"]
    (tmp_path / "a.txt").write_bytes(("\ufeff" + "\n".join(lines)).encode("utf-16-le", "surrogatepass"))
    dropped = Counter()
    assert read(tmp_path / "a.txt", dropped) == [*lines[:100], "after"] and dropped == {"malformed lines": 1}


def test_a_number_in_an_array_is_one_value_wherever_it_is_cut(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "HEAD", 1)
    monkeypatch.setattr(tables, "LONGEST", 100)
    (tmp_path / "a.json").write_text("[" + " " * 98 + '1234567, {"text": "a"}]')
    dropped = Counter()
    assert read(tmp_path / "a.json", dropped, unreadable=1) == ["a"] and dropped == {"malformed lines": 1}


def test_parquet_reads_the_columns_of_the_text_alone_and_says_what_is_no_text(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    bad = pyarrow.array([b"caf\xe9"] + [b"good"] * 2_000, pyarrow.binary()).view(pyarrow.string())
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": bad, "vector": [[0.5] * 4] * 2_001, "at": [1] * 2_001}), path)
    dropped = Counter()
    assert read(path, dropped) == ["good"] * 2_000 and dropped == {"malformed lines": 1}
    with pytest.raises(ValueError, match=r"a.parquet:1: at is a number, not text"):
        read(path, keys=("at",))
    fields = next(tables.rows(TextFile(path, ".parquet"), ("at",))).fields
    assert fields == {"at": 1}


def test_a_window_of_two_gibibytes_is_unpacked(tmp_path):
    """`zstd --long=31` makes such files, and large archives are published so."""
    zstd = pytest.importorskip("backports.zstd")
    options = {zstd.CompressionParameter.window_log: 28, zstd.CompressionParameter.enable_long_distance_matching: 1}
    compressor = zstd.ZstdCompressor(options=options)
    packed = compressor.compress(as_lines(ROWS)) + compressor.flush()
    (tmp_path / "a.jsonl.zst").write_bytes(packed + zst(as_lines(ROWS)))  # with a second frame
    assert read(tmp_path / "a.jsonl.zst") == TEXTS * 2


def test_every_kind_is_told_by_its_name():
    assert {kind_of(f"A{kind}{packed}".upper()) for kind in KINDS for packed in PACK} == {*KINDS}
