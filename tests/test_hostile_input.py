"""Given any bytes, a reader reads them or says in one line that it cannot; it raises no other error and does not hang.

MINISOBERT_FUZZ=SECONDS runs each test for that long, instead of on its few examples.
"""

import bz2
import gzip
import io
import json
import lzma
import os
import time
from collections import Counter
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisobert.corpus.html import comment_to_text, html_to_text
from minisobert.corpus.posts import Post
from minisobert.corpus.rows import xml_rows
from minisobert.corpus.sources import TextFile, kind_of
from minisobert.corpus.texts import DOCUMENTS, PLAIN, Reading, texts
from minisobert.corpus.tokenizer import Tokenizer, open_tokenizer, train
from minisobert.files import read_safetensors, safetensors_header

SECONDS = float(os.environ.get("MINISOBERT_FUZZ", 0))
MOST = 5  # seconds for an input of a few hundred bytes
few = settings(max_examples=50, deadline=1_000 * MOST)
TEXTS = [f"word {n}, some words <b> é\n\tagain" for n in range(40)]


def hostile(strategy, check) -> None:
    """Runs the check on examples of a strategy: a few of them, or as many as SECONDS allow."""
    end, count = time.monotonic() + SECONDS, 0

    def counted(example) -> None:
        nonlocal count
        count += 1
        check(example)

    while True:
        few(given(strategy)(counted))()
        if time.monotonic() >= end:
            return print(f"{count:,} examples")


def damaged(content: bytes, tokens: list[bytes]):
    """A strategy: the content with some bytes removed and others inserted."""
    put = st.one_of(st.sampled_from(tokens), st.binary(max_size=4))
    edits = st.lists(st.tuples(st.integers(0, len(content)), st.integers(0, 20), put), max_size=6)

    def apply(edits) -> bytes:
        edited = content
        for place, deleted, inserted in edits:
            edited = edited[:place] + inserted + edited[place + deleted :]
        return edited

    return edits.map(apply)


PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def one_line(error: ValueError) -> None:
    assert str(error) and "\n" not in str(error)


ROWS = "".join(f'<row Id="{n}" PostTypeId="1" Title="t&#xA;{n}" Body="&lt;p&gt;é{n}" />\n' for n in range(4)).encode()
XML = [
    b"<row ",
    b"<r",
    b"/>",
    b"</posts>",
    b"<posts>",
    b'"',
    b"'",
    b"&#1;",
    b"&lt;",
    b"<!--",
    b"]]>",
    b"<![CDATA[",
    b"<?",
    b"\0",
]


def test_xml():
    def check(content: bytes) -> None:
        dropped: Counter = Counter()
        try:
            found = list(xml_rows(io.BytesIO(content), "Posts.xml", "posts", dropped))
        except ValueError as error:
            return one_line(error)
        for row in found:
            Post(1, row.get("Title", ""), row.get("Body", ""), [row.get("Body", "")]).text(links=True).encode()
        try:
            root = ElementTree.fromstring(content)
        except ElementTree.ParseError:
            return
        if root.tag == "posts" and all(child.tag == "row" and not len(child) for child in root):  # a sound dump
            assert found == [dict(child.attrib) for child in root if not (child.text or "").strip()] or dropped

    hostile(damaged(b"<posts>\n" + ROWS + b"</posts>\n", XML), check)


def test_html():
    soup = st.sampled_from(
        ["<", ">", "</", "b", "a", "<a href='", "'", '"', "<pre>", "<!--", "-->", "&#", "&", ";", "1" * 30, "\r"]
    )

    def check(source: str) -> None:
        for links in (False, True):
            assert len(html_to_text(source, links)) <= 4 * len(source) + 10
            assert len(comment_to_text(source, links)) <= 4 * len(source) + 10

    hostile(st.lists(st.one_of(soup, st.text(max_size=5)), max_size=60).map("".join), check)


LINES = ["one", 'two, "three"', "é", "four"]
OBJECTS = [json.dumps({"text": text}) for text in LINES]
FILES = {
    ".txt": "\n".join(LINES),
    ".md": "\n\n".join(LINES),
    ".jsonl": "\n".join(OBJECTS),
    ".json": f"[{', '.join(OBJECTS)}]",
    ".csv": 'text,score\none,1\n"two, ""three""",2\né,3\n"four\nfive",4\n',
}


@pytest.mark.parametrize("name", [*FILES, ".txt.gz", ".jsonl.gz", ".jsonl.bz2", ".csv.xz"])
def test_texts(tmp_path, name):
    path = tmp_path / f"a{name}"
    content = FILES[kind_of(path.name)].encode()
    if (packer := path.suffix) in PACKERS:
        content = PACKERS[packer](content)
    file = TextFile(path, kind_of(path.name))

    def check(content: bytes) -> None:
        path.write_bytes(content)
        for document in DOCUMENTS if file.kind in PLAIN else ("",):
            try:
                for _, text in texts(file, Counter(), reading=Reading(document=document)):
                    text.encode()
            except ValueError as error:
                one_line(error)

    hostile(
        damaged(content, [b"{", b"[" * 50, b'"', b"\\ud800", b"null", b"\n", b"\xff", b"1e999", b"\r", b","]), check
    )


@pytest.mark.parametrize("document", ["line", "paragraph"])
def test_no_line_that_is_damaged_costs_another(tmp_path, document):
    """Nor does it change another: all sound lines come out, in order, whatever is between them."""
    path = tmp_path / "a.txt"
    lines = st.binary(max_size=20).map(lambda line: line.translate(None, b"\0\n"))

    def check(found: list[bytes]) -> None:
        found = [b"a mark of UTF-16 is none here", *found]
        path.write_bytes((b"\n" if document == "line" else b"\n\n").join(found) + b"\n")
        reading = Reading(document=document, unreadable=1)
        sound = [line.removesuffix(b"\r").decode().lstrip("\ufeff") for line in found if is_utf8(line)]
        got = [text for _, text in texts(TextFile(path, ".txt"), Counter(), reading=reading)]
        assert [text for text in got if text.strip()] == [text for text in sound if text.strip()]

    hostile(st.lists(lines, max_size=8), check)


def test_tokenizer_model(tmp_path):
    model = train(TEXTS, 300)

    def check(content: bytes) -> None:
        (tmp_path / "tokenizer.model").write_bytes(content)
        try:
            tokenizer = open_tokenizer(tmp_path)
        except ValueError as error:
            return one_line(error)
        if isinstance(tokenizer, Tokenizer) and content == model:
            assert tokenizer.decode(tokenizer.encode(TEXTS[0])) == TEXTS[0]

    hostile(damaged(model, [b"\0", b"\xff" * 4, b"{", b"[MASK]"]), check)


def test_tokenizer_json(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    vocabulary = {name: i for i, name in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "b"])}
    model = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, "[UNK]"))
    model.add_special_tokens(list(vocabulary)[:5])

    def check(content: bytes) -> None:
        (tmp_path / "tokenizer.json").write_bytes(content)
        try:
            open_tokenizer(tmp_path / "tokenizer.json")
        except ValueError as error:
            one_line(error)

    hostile(damaged(model.to_str().encode(), [b"{", b"}", b"[", b'"', b"null", b"-1", b"99999999999"]), check)


def test_safetensors(tmp_path):
    header, _, size = safetensors_header({"a": ("float32", (2, 3)), "b": ("float32", ()), "c": ("int64", (0, 2))})

    def check(content: bytes) -> None:
        (tmp_path / "a").write_bytes(content)
        try:
            found = read_safetensors(tmp_path / "a")
        except ValueError as error:
            return one_line(error)
        begin = 8 + int.from_bytes(content[:8], "little")
        assert sum(tensor.nbytes for tensor in found.values()) == len(content) - begin

    hostile(
        damaged(header + bytes(size - len(header)), [b"-", b"9" * 20, b"[", b"]", b"null", b",", b"0", b"F64"]), check
    )
