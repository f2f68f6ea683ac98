"""A dump is read to its end, whatever single rows hold; one that cannot be trusted is refused."""

import io
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisobert.corpus.dump import sites
from minisobert.corpus.posts import Post, posts
from minisobert.corpus.rows import xml_rows

DUMPS = Path(__file__).resolve().parents[2] / "../shared/data/dumps"
HEAD = '<?xml version="1.0" encoding="utf-8"?>\n<posts>\n'
GOOD = '  <row Id="{0}" PostTypeId="1" Score="3" Title="t{0}" Body="&lt;p&gt;b{0}&lt;/p&gt;" />\n'


def dump(folder: Path, content: str | bytes, comments: str | None = None) -> Path:
    """Writes a dump into `folder`, with these rows or, given bytes, with this Posts.xml."""
    folder.mkdir(exist_ok=True)
    content = content if isinstance(content, bytes) else f"{HEAD}{content}</posts>".encode()
    (folder / "Posts.xml").write_bytes(content)
    if comments is not None:
        (folder / "Comments.xml").write_text(f"<comments>\n{comments}</comments>", encoding="utf-8")
    return folder


def read(folder: Path, tmp_path: Path, **settings) -> tuple[list[Post], Counter]:
    dropped: Counter = Counter()
    (site,), _ = sites([folder])
    found = [entry.post for entry in posts(site, tmp_path, dropped, **settings)]
    assert not list(tmp_path.glob("comments*"))
    return found, +dropped


def archive(path: Path, folder: Path, prefix: str = "") -> Path:
    py7zr = pytest.importorskip("py7zr")
    with py7zr.SevenZipFile(path, "w") as file:
        for name in ("Comments.xml", "Posts.xml"):
            if (folder / name).exists():
                file.write(folder / name, prefix + name)
    return path


def test_comments_join_their_post_in_the_dumps_order(tmp_path):
    comments = "".join(f'<row Id="{n}" PostId="{post}" Text="c{n}" />\n' for n, post in enumerate((2, 1, 2, 9, 2)))
    found, dropped = read(dump(tmp_path / "d", GOOD.format(1) + GOOD.format(2), comments), tmp_path)
    assert [post.comments for post in found] == [["c1"], ["c0", "c2", "c4"]]
    assert dropped == {"comments without their post": 1}


def test_a_text_is_title_body_and_comments_with_blank_lines_between():
    assert Post(1, " T &amp; t ", "<p>b &amp; c</p>", ["one &lt;", "  ", "<i>two</i>"]).text() == (
        "T &amp; t\n\nb & c\n\none &lt;\n\ntwo"
    )
    assert Post(1, "only a title", "", []).text() == "only a title"
    assert Post(1, "", "<p><img src='a.png'></p>", ["nice picture"]).text() == "nice picture"
    assert Post(1, "", "<p> </p>", [" "]).text() == ""


def test_an_answer_belongs_to_the_thread_of_its_question(tmp_path):
    answers = '<row Id="6" PostTypeId="2" ParentId="5" Body="x" /><row Id="7" PostTypeId="2" Body="y" />\n'
    found, _ = read(dump(tmp_path / "d", GOOD.format(5) + answers), tmp_path)
    assert [post.thread for post in found] == [5, 5, 7]


def test_posts_are_chosen_by_kind_and_score(tmp_path):
    content = "".join(
        f'<row Id="{n}" PostTypeId="{kind}" {score} Body="{n}" />\n'
        for n, (kind, score) in enumerate([(1, 'Score="-1"'), (2, 'Score="5"'), (2, ""), (4, ""), (1, 'Score="1"')])
    )
    folder = dump(tmp_path / "d", content, '<row Id="1" PostId="0" Text="c" />\n')
    bodies = lambda **settings: [post.body for post in read(folder, tmp_path, **settings)[0]]  # noqa: E731
    assert bodies() == ["0", "1", "2", "4"]
    assert bodies(kind="answers") == ["1", "2"]
    assert bodies(kind="questions", min_score=0) == ["4"]
    assert read(folder, tmp_path, kind="questions", min_score=0)[1] == {
        "neither question nor answer": 1,
        "not among the questions": 2,
        "score below 0": 1,
        "comments of dropped posts": 1,
    }


BAD_ROWS = {
    "a reference without an end": '  <row Id="2" PostTypeId="1" Body="a&#x1F b" />\n',
    "no id": '  <row PostTypeId="1" Body="a" />\n',
    "an id that is no number": '  <row Id="12x" PostTypeId="1" Body="a" />\n',
    "an id beyond 64 bits": '  <row Id="99999999999999999999" PostTypeId="1" Body="a" />\n',
    "no kind": '  <row Id="2" Body="a" />\n',
    "a score that is no number": '  <row Id="2" PostTypeId="1" Score="many" Body="a" />\n',
    "an attribute twice": '  <row Id="2" Id="3" PostTypeId="1" />\n',
    "a quote never closed": '  <row Id="2" PostTypeId="1" Body="a />\n',
    "no end": '  <row Id="2" PostTypeId="1" Body="a"\n',
    "an unknown entity": '  <row Id="2" PostTypeId="1" Body="&nbsp;" />\n',
    "two lines and an error": '  <row Id="2" PostTypeId="1"\n Body="&nbsp;" />\n',
    "no quote at the end, and no line end": '  <row Id="2" PostTypeId="1" Body="a',
    "no beginning": 'ow Id="2" PostTypeId="1" Body="a" />\n',
    "another name": '  <rov Id="2" PostTypeId="1" Body="a" />\n',
    "no slash": '  <row Id="2" PostTypeId="1" Body="a" >\n',
    "a comment that never ends": '  <!-- Id="2" PostTypeId="1" Body="a" />\n',
}


@pytest.mark.parametrize("row", BAD_ROWS.values(), ids=BAD_ROWS)
@pytest.mark.parametrize("times", [1, 3])
def test_a_bad_row_is_counted_and_takes_no_other_with_it(tmp_path, row, times):
    content = GOOD.format(1) + row * times + GOOD.format(3) + GOOD.format(4)
    found, dropped = read(dump(tmp_path / "d", content), tmp_path)
    assert [post.title for post in found] == ["t1", "t3", "t4"]
    assert dropped == {"malformed rows": times}


@pytest.mark.parametrize("row", BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_first_or_last_row_is_survived(tmp_path, row):
    found, dropped = read(dump(tmp_path / "d", row + GOOD.format(1) + row), tmp_path)
    assert [post.title for post in found] == ["t1"]
    assert dropped == {"malformed rows": 2}


TOKENS = [b"<", b">", b'"', b"'", b"&", b"/>", b"\n", b"\0", b"\xff", b"<row ", b"</posts>", b"<!--", b"]]>", b"&#1;"]
inserted = st.one_of(st.sampled_from(TOKENS), st.binary(max_size=3))
edits = st.lists(st.tuples(st.integers(0, 10**6), st.sampled_from([0, 1, 2, 30]), inserted), min_size=1, max_size=6)


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 5), edits, st.sampled_from([16, 300, 1 << 16]))
def test_damage_in_one_row_leaves_every_other_as_it_is(number, edits, block):
    lines = [GOOD.format(n).encode() for n in range(6)]
    whole = list(xml_rows(io.BytesIO(HEAD.encode() + b"".join(lines) + b"</posts>"), "Posts.xml", "posts", Counter()))
    assert len(whole) == 6
    for place, deleted, inserted in edits:
        place %= len(lines[number]) + 1
        lines[number] = lines[number][:place] + inserted + lines[number][place + deleted :]
    stream = io.BytesIO(HEAD.encode() + b"".join(lines) + b"</posts>")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("minisobert.corpus.rows.BLOCK", block)
        found = iter(list(xml_rows(stream, "Posts.xml", "posts", Counter())))
    assert all(row in found for row in whole[:number] + whole[number + 1 :])  # in the same order


INSERTED = [b"<", b">", b'"', b"/", b"&", b"\0", b"<r\n", b"<row ", b"/>", b"</row>", b"</posts>", b"<posts>", b"<!--",
            b"]]>", b"<![CDATA[", b"<?x ", b"<!DOCTYPE p [", b'<!DOCTYPE p [<!ENTITY a "b">]>']  # fmt: skip
INSTEAD = [b"", b"  <r\n", b"  <r", b"  <row", b"  <row\n", b"<\n", b"</row>\n", b"<row>\n", b"<rows />\n"]


@pytest.mark.parametrize("block", [16, 200, 1 << 16])
def test_one_row_damaged_at_any_place_in_any_way_costs_no_other(monkeypatch, block):
    monkeypatch.setattr("minisobert.corpus.rows.BLOCK", block)
    lines = [GOOD.format(n).encode() for n in range(3)]

    def rows(lines: list[bytes]) -> tuple[list[dict], Counter]:
        dropped: Counter = Counter()
        stream = io.BytesIO(HEAD.encode() + b"".join(lines) + b"</posts>")
        return list(xml_rows(stream, "Posts.xml", "posts", dropped)), dropped

    whole, dropped = rows(lines)
    assert len(whole) == 3 and not dropped
    for number, line in enumerate(lines):
        damaged = {*INSTEAD, *(row + line for row in INSTEAD)}
        for place in range(len(line)):
            head, tail = line[:place], line[place:]
            damaged |= {head, head + b"\n", tail, head + tail[1:], head + bytes([tail[0] ^ 128]) + tail[1:]}
            damaged |= {head + inserted + tail[delete:] for inserted in INSERTED for delete in (0, 1)}
        for row in damaged:
            found, dropped = rows([*lines[:number], row, *lines[number + 1 :]])
            left = iter(found)
            assert all(other in left for other in whole[:number] + whole[number + 1 :]), row
            assert len(found) <= 3, row
            assert len(found) == 3 or dropped["malformed rows"] or not row.strip(), row  # a loss is counted


@pytest.mark.parametrize(
    "unit, times, kept, counted",
    [
        ("x", 50_000_000, 50_000_000, {}),
        ("<", 50_000_000, None, {"malformed rows": 1}),
        ("&#x1F;".rjust(100), 100_000, 9_400_000, {"control characters left out": 100_000}),
    ],
    ids=["sound", "damaged", "mended"],
)
def test_a_row_of_50_mb_costs_at_most_itself(unit, times, kept, counted):
    row = GOOD.format(2).replace("b2", unit * times)
    dropped: Counter = Counter()
    stream = io.BytesIO(f"{HEAD}{GOOD.format(1)}{row}{GOOD.format(3)}</posts>".encode())
    found = {row["Id"]: row["Body"] for row in xml_rows(stream, "Posts.xml", "posts", dropped)}
    assert list(found) == (["1", "3"] if kept is None else ["1", "2", "3"])
    assert kept is None or len(found["2"]) == kept + len("<p></p>")
    assert dropped == counted


def test_a_file_that_is_cut_anywhere_is_refused():
    content = (HEAD + "".join(map(GOOD.format, range(3))) + "</posts>").encode()
    for size in range(len(content)):
        with pytest.raises(ValueError, match=r"is (truncated|empty|not an XML dump)"):
            list(xml_rows(io.BytesIO(content[:size]), "Posts.xml", "posts", Counter()))


FORBIDDEN = [
    "&#x0E;", "&#14;", "&#x1F;", "&#x1f;", "&#X1F;", "&#x0001F;", "&#0031;", "&#0;", "&#xFFFE;", "&#xffff;", "&#xD800;",
    "&#57343;", "&#x110000;", "&#99999999999999999999;", "\x00", "\x08", "\x0e", "\x1f", "\ufffe", "\uffff",
]  # fmt: skip


@pytest.mark.parametrize("forbidden", FORBIDDEN, ids=ascii)
def test_a_character_that_xml_forbids_costs_itself_alone(tmp_path, forbidden):
    row = f'  <row Id="2" PostTypeId="1" Title="t2" Body="press {forbidden}⌘&#x2D;&#49;&#x1F600;&#xA;&amp;#x0E;" />\n'
    comments = f'<row Id="1" PostId="2" Text="{forbidden}why?" />\n<row Id="2" PostId="1" Text="ok" />\n'
    found, dropped = read(dump(tmp_path / "d", GOOD.format(1) + row + GOOD.format(3), comments), tmp_path)
    assert [(post.title, post.comments) for post in found] == [("t1", ["ok"]), ("t2", ["why?"]), ("t3", [])]
    assert found[1].body == "press ⌘-1😀\n&#x0E;"  # the last is HTML, which allows such references
    assert dropped == {"control characters left out": 2}


@pytest.mark.parametrize("code", [0x9, 0xD, 0x20, 0x7F, 0x85, 0xD7FF, 0xE000, 0xFFFD, 0x10FFFF])
def test_a_character_that_xml_allows_is_kept(tmp_path, code):
    for beside in ("", "&#x1F;"):  # also in a row that is mended
        row = f'<row Id="2" PostTypeId="1" Title="t" Body="a&#x{code:X};{beside}b" />\n'
        (post,), _ = read(dump(tmp_path / "d", row), tmp_path)
        assert post.body == f"a{chr(code)}b"


def test_bytes_that_are_not_utf8_cost_themselves_alone(tmp_path):
    content = (HEAD + GOOD.format(1) + GOOD.format(2)).encode().replace(b"b1", b"b\xff1\xed\xa0\x80") + b"</posts>"
    found, dropped = read(dump(tmp_path / "d", content), tmp_path)
    assert [post.body for post in found] == ["<p>b1</p>", "<p>b2</p>"]
    assert dropped == {"bytes left out that are not UTF-8": 4}


@pytest.mark.parametrize("row", BAD_ROWS.values(), ids=BAD_ROWS)
def test_comments_of_a_row_that_cannot_be_read_are_not_without_their_post(tmp_path, row):
    comments = "".join(f'<row Id="{n}" PostId="{post}" Text="c" />\n' for n, post in enumerate((1, 2, 2, 9)))
    found, dropped = read(dump(tmp_path / "d", GOOD.format(1) + row + GOOD.format(3), comments), tmp_path)
    assert [post.comments for post in found] == [["c"], []]
    expected = {"malformed rows": 1, "comments of dropped posts": 2, "comments without their post": 1}
    if ' Id="2"' not in row:  # without an Id, nothing tells which they are
        expected = {"malformed rows": 1, "comments without their post": 3}
    assert dropped == expected


@pytest.mark.parametrize(
    "again, lost", [(GOOD.format(1), 0), (BAD_ROWS["no end"].replace('"2"', '"1"'), 1)], ids=["sound", "damaged"]
)
def test_posts_with_one_id_share_their_comments_and_hide_none_that_have_no_post(tmp_path, again, lost):
    comments = "".join(f'<row Id="{n}" PostId="{post}" Text="c" />\n' for n, post in enumerate((1, 1, 9, 9, 9)))
    found, dropped = read(dump(tmp_path / "d", GOOD.format(1) + again * 8, comments), tmp_path)
    assert [post.comments for post in found] == [["c", "c"]] * (1 if lost else 9)
    expected = {"comments without their post": 3}
    assert dropped == (expected | {"malformed rows": 8} if lost else expected)


def test_negative_ids_are_malformed(tmp_path):
    comments = '<row Id="1" PostId="-8" Text="c" />\n<row Id="-2" PostId="1" Text="ok" />\n'
    content = GOOD.format(-8) + GOOD.format(1) + '  <row Id="2" PostTypeId="2" ParentId="-8" Body="b" />\n'
    found, dropped = read(dump(tmp_path / "d", content, comments), tmp_path)
    assert [(post.title, post.comments) for post in found] == [("t1", ["ok"])]
    assert dropped == {"malformed rows": 3}


INVENTED = (
    '<row Id="1000000001" PostTypeId="1" Score="1" Body="b" OwnerUserId="-1" Title="t" AnswerCount="1" />\n'
    '<row Id="1000000010" PostTypeId="2" Score="1" Body="b" OwnerUserId="-1" />\n'
)


@pytest.mark.parametrize("first", [True, False])
def test_rows_invented_for_the_dump_are_left_out(tmp_path, first):
    genuine = GOOD.format(1) + GOOD.format(79_999_999)
    comments = '<row Id="1" PostId="1000000010" Text="c" />\n'
    content = INVENTED + genuine if first else genuine + INVENTED
    found, dropped = read(dump(tmp_path / "d", content, comments), tmp_path)
    assert [post.thread for post in found] == [1, 79_999_999]
    assert dropped == {"fabricated rows": 2, "comments of dropped posts": 1}


@pytest.mark.parametrize(
    "content",
    [
        GOOD.format(1) + GOOD.format(2).replace(" />", ' OwnerUserId="-1" />'),
        GOOD.format(1) + GOOD.format(1_000_000_001),
        GOOD.format(999_999_999) + INVENTED,
    ],
    ids=["of the Community user", "of a large Id", "of both, where the Ids have come so far"],
)
def test_genuine_rows_are_kept(tmp_path, content):
    found, dropped = read(dump(tmp_path / "d", content), tmp_path)
    assert len(found) == content.count("<row")
    assert not dropped


def test_a_bad_comment_is_counted(tmp_path):
    comments = '<row Id="1" Text="no post" />\n<row Id="2" PostId="1" Text="&" />\n<row Id="3" PostId="1" />\n'
    found, dropped = read(dump(tmp_path / "d", GOOD.format(1), comments), tmp_path)
    assert found[0].comments == []
    assert dropped == {"malformed rows": 2, "empty comments": 1}


@pytest.mark.parametrize(
    "content",
    [
        "\ufeff" + HEAD + GOOD.format(1) + "</posts>",
        HEAD.replace("<posts>", "<!DOCTYPE posts SYSTEM 'posts.dtd'>\n<posts>") + GOOD.format(1) + "</posts>\n\n",
        "<posts>" + GOOD.format(1).strip() + "</posts>",
        (HEAD + GOOD.format(1) + "</posts>").replace("\n", "\r\n"),
        HEAD + GOOD.format(1).replace(" Title", "\n    Title").replace("b1", "b1 >\nnext line") + "</posts>",
    ],
    ids=["byte order mark", "doctype", "one line", "CRLF", "a row of several lines"],
)
def test_what_genuine_dumps_look_like_is_read(tmp_path, content):
    found, dropped = read(dump(tmp_path / "d", content.encode()), tmp_path)
    assert [post.title for post in found] == ["t1"]
    assert not dropped


@pytest.mark.parametrize(
    "content, message",
    [
        (HEAD + GOOD.format(1), "truncated"),
        (HEAD + GOOD.format(1) + GOOD.format(2)[:40], "truncated"),
        (HEAD + BAD_ROWS["a quote never closed"], "truncated"),
        ("\n", "is empty"),
        ('<?xml version="1.0"?>\n', "is empty"),
        (HEAD + "</posts>", "holds no posts"),
        ("no XML at all", "is not an XML dump"),
        ("<html></html>", "the root element is <html>, not <posts>"),
        ('<!DOCTYPE p [<!ENTITY a "x">]>\n' + HEAD[39:] + GOOD.format(1) + "</posts>", "declares an XML entity"),
        ('<!DOCTYPE p [<!ENTITY % a SYSTEM "file:///etc/passwd"> %a;]>\n<posts></posts>', "declares an XML entity"),
    ],
)
def test_what_is_no_whole_dump_is_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read(dump(tmp_path / "d", content.encode()), tmp_path)
    assert not list(tmp_path.glob("comments*"))


def test_an_endless_row_is_given_up(monkeypatch):
    monkeypatch.setattr("minisobert.corpus.rows.LONGEST_ROW", 1_000)
    stream = io.BytesIO(b'<posts>\n<row Id="1" Body="' + b"x" * 5_000 + b'" />\n<row Id="2" />\n</posts>')
    dropped: Counter = Counter()
    assert [row["Id"] for row in xml_rows(stream, "Posts.xml", "posts", dropped)] == ["2"]
    assert dropped["malformed rows"] >= 1


# Archives


def test_an_archive_reads_like_its_folder(tmp_path):
    folder = dump(tmp_path / "d", "".join(map(GOOD.format, range(5_000))), '<row Id="1" PostId="7" Text="c" />\n')
    packed = archive(tmp_path / "site.7z", folder, prefix="some/where/")
    ((there,), _), ((here,), _) = sites([packed]), sites([folder])
    assert (there.posts.size, there.comments.size) == (here.posts.size, here.comments.size)
    assert read(packed, tmp_path) == read(folder, tmp_path)


def test_nothing_of_an_archive_lands_on_disk(tmp_path, monkeypatch):
    packed = archive(tmp_path / "site.7z", dump(tmp_path / "d", GOOD.format(1)), prefix="evil/")
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    read(packed, tmp_path)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 0.999])
def test_a_truncated_archive_is_refused(tmp_path, share):
    content = archive(tmp_path / "site.7z", dump(tmp_path / "d", "".join(map(GOOD.format, range(3_000))))).read_bytes()
    (tmp_path / "cut.7z").write_bytes(content[: int(share * len(content))])
    with pytest.raises(ValueError, match=r"cut\.7z is truncated or not a \.7z archive") as error:
        read(tmp_path / "cut.7z", tmp_path)
    assert "\n" not in str(error.value)


def test_a_damaged_archive_is_refused_and_no_thread_is_left(tmp_path):
    path = archive(tmp_path / "site.7z", dump(tmp_path / "d", "".join(map(GOOD.format, range(3_000)))))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    threads = threading.active_count()
    with pytest.raises(ValueError, match="truncated"):
        read(path, tmp_path)
    assert threading.active_count() == threads


def test_a_reader_may_stop_early(tmp_path):
    packed = archive(tmp_path / "site.7z", dump(tmp_path / "d", GOOD.format(1).replace("b1", "b" * 10_000) * 3_000))
    threads = threading.active_count()
    with sites([packed])[0][0].posts.open() as stream:
        assert stream.readline().startswith(b"<?xml")
        assert threading.active_count() > threads
    assert threading.active_count() == threads


def test_without_py7zr_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "py7zr", None)
    (tmp_path / "site.7z").touch()
    with pytest.raises(ValueError, match=r"pip install minisobert\[dump\]"):
        sites([tmp_path / "site.7z"])


REAL = {"java-questions-2025.stackoverflow.com": (7_006, 12_706), "conlang.meta.stackexchange.com": (169, 230),
        "german.meta.stackexchange.com": (1_544, 3_399), "history.meta.stackexchange.com": (1_651, 3_454),
        "2008-sample.stackoverflow.com": (1_000, 0), "matheducators.stackexchange.com": (1_904, 0)}  # fmt: skip


@pytest.mark.parametrize("site", REAL)
def test_real_dumps_give_all_their_posts_and_comments(tmp_path, site):
    if not (path := DUMPS / f"{site}.7z").exists():
        pytest.skip("the real dumps are not beside this checkout (../shared/data)")
    pytest.importorskip("py7zr")
    found, dropped = read(path, tmp_path)
    assert (len(found), sum(len(post.comments) for post in found)) == REAL[site]
    assert set(dropped) <= {"neither question nor answer"}
    assert sum(not post.text() for post in found) <= 1  # in German Meta, one post is only an image
