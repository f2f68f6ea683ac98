"""Whatever bytes a reader is given, it reads them or says in one line that it cannot: no other error, and no hang.

MINISOBERT_FUZZ=SECONDS runs each test for so long in place of its few examples.
"""

import gzip
import io
import json
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
from minisobert.corpus.texts import texts
from minisobert.corpus.tokenizer import Tokenizer, open_tokenizer, train
from minisobert.files import read_safetensors, safetensors_header

SECONDS = float(os.environ.get("MINISOBERT_FUZZ", 0))
MOST = 5  # seconds for an input of some hundred bytes
few = settings(max_examples=50, deadline=1_000 * MOST)
TEXTS = [f"word {n}, some words <b> é\n\tagain" for n in range(40)]


def hostile(strategy, check) -> None:
    """Runs the check on examples of a strategy: a few, or for SECONDS."""
    end = time.monotonic() + SECONDS
    while True:
        few(given(strategy)(check))()
        if time.monotonic() >= end:
            return


def damaged(content: bytes, tokens: list[bytes]):
    """A strategy: the content with some bytes taken out and others put in."""
    put = st.one_of(st.sampled_from(tokens), st.binary(max_size=4))
    edits = st.lists(st.tuples(st.integers(0, len(content)), st.integers(0, 20), put), max_size=6)

    def apply(edits) -> bytes:
        edited = content
        for place, deleted, inserted in edits:
            edited = edited[:place] + inserted + edited[place + deleted :]
        return edited

    return edits.map(apply)


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


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.txt.gz"])
def test_texts(tmp_path, name):
    content = "".join(json.dumps({"text": text}) + "\n" for text in ("one", "two\nlines", "é")).encode()
    content = gzip.compress(content) if name.endswith(".gz") else content

    def check(content: bytes) -> None:
        (tmp_path / name).write_bytes(content)
        dropped: Counter = Counter()
        try:
            for _, text in texts(tmp_path / name, dropped):
                text.encode()
        except ValueError as error:
            one_line(error)

    hostile(damaged(content, [b"{", b"[" * 50, b'"', b"\\ud800", b"null", b"\n", b"\xff", b"1e999"]), check)


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
