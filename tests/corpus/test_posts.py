"""A dump is read to its end whatever single rows hold, and refused where it cannot be trusted."""

import io
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest

from minisobert.corpus.dump import members, open_member
from minisobert.corpus.posts import Post, posts, rows

DUMPS = Path(__file__).resolve().parents[2] / "../shared/data/dumps"
HEAD = '<?xml version="1.0" encoding="utf-8"?>\n<posts>\n'
GOOD = '  <row Id="{0}" PostTypeId="1" Score="3" Title="t{0}" Body="&lt;p&gt;b{0}&lt;/p&gt;" />\n'


def dump(folder: Path, content: str | bytes, comments: str | None = None) -> Path:
    """A dump of these rows (or, given bytes, of this Posts.xml) in `folder`."""
    folder.mkdir(exist_ok=True)
    content = content if isinstance(content, bytes) else f"{HEAD}{content}</posts>".encode()
    (folder / "Posts.xml").write_bytes(content)
    if comments is not None:
        (folder / "Comments.xml").write_text(f"<comments>\n{comments}</comments>", encoding="utf-8")
    return folder


def read(folder: Path, tmp_path: Path, **settings) -> tuple[list[Post], Counter]:
    dropped: Counter = Counter()
    found = list(posts(folder, tmp_path, dropped, **settings))
    assert not (tmp_path / "comments.sqlite").exists()
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
    "a control character": '  <row Id="2" PostTypeId="1" Body="a&#x1F;b" />\n',
    "no id": '  <row PostTypeId="1" Body="a" />\n',
    "an id that is no number": '  <row Id="12x" PostTypeId="1" Body="a" />\n',
    "an id beyond 64 bits": '  <row Id="99999999999999999999" PostTypeId="1" Body="a" />\n',
    "no kind": '  <row Id="2" Body="a" />\n',
    "a score that is no number": '  <row Id="2" PostTypeId="1" Score="many" Body="a" />\n',
    "an attribute twice": '  <row Id="2" Id="3" PostTypeId="1" />\n',
    "a quote never closed": '  <row Id="2" PostTypeId="1" Body="a />\n',
    "no end": '  <row Id="2" PostTypeId="1" Body="a"\n',
    "an unknown entity": '  <row Id="2" PostTypeId="1" Body="&nbsp;" />\n',
    "two lines and an error": '  <row Id="2" PostTypeId="1"\n Body="&#0;" />\n',
}


@pytest.mark.parametrize("row", BAD_ROWS.values(), ids=BAD_ROWS)
@pytest.mark.parametrize("times", [1, 3])
def test_a_bad_row_is_counted_and_takes_no_other_with_it(tmp_path, row, times):
    content = GOOD.format(1) + row * times + GOOD.format(3) + GOOD.format(4)
    found, dropped = read(dump(tmp_path / "d", content), tmp_path)
    assert [post.title for post in found] == ["t1", "t3", "t4"]
    assert dropped == {"malformed rows": times}


def test_a_bad_first_or_last_row_is_survived(tmp_path):
    bad = BAD_ROWS["a control character"]
    found, dropped = read(dump(tmp_path / "d", bad + GOOD.format(1) + bad), tmp_path)
    assert len(found) == 1
    assert dropped == {"malformed rows": 2}


def test_bytes_that_are_no_utf8_cost_one_row(tmp_path):
    content = (HEAD + GOOD.format(1) + GOOD.format(2)).encode().replace(b"b1", b"\xff") + b"</posts>"
    found, dropped = read(dump(tmp_path / "d", content), tmp_path)
    assert [post.title for post in found] == ["t2"]
    assert dropped == {"malformed rows": 1}


def test_a_bad_comment_is_counted(tmp_path):
    comments = '<row Id="1" Text="no post" />\n<row Id="2" PostId="1" Text="&#x1F;" />\n<row Id="3" PostId="1" />\n'
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
        (HEAD + BAD_ROWS["a control character"], "truncated"),
        ("", "is empty"),
        (HEAD + "</posts>", "holds no posts"),
        ("no XML at all", "is no XML dump"),
        ("<html></html>", "the root element is <html>, not <posts>"),
        ('<!DOCTYPE p [<!ENTITY a "x">]>\n' + HEAD[39:] + GOOD.format(1) + "</posts>", "declares an XML entity"),
        ('<!DOCTYPE p [<!ENTITY % a SYSTEM "file:///etc/passwd"> %a;]>\n<posts></posts>', "declares an XML entity"),
    ],
)
def test_what_is_no_whole_dump_is_refused(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        read(dump(tmp_path / "d", content.encode()), tmp_path)
    assert not (tmp_path / "comments.sqlite").exists()


def test_an_endless_row_is_given_up(monkeypatch):
    monkeypatch.setattr("minisobert.corpus.posts.LONGEST_ROW", 1_000)
    stream = io.BytesIO(b'<posts>\n<row Id="1" Body="' + b"x" * 5_000 + b'" />\n<row Id="2" />\n</posts>')
    dropped: Counter = Counter()
    assert [row["Id"] for row in rows(stream, "Posts.xml", "posts", dropped)] == ["2"]
    assert dropped["malformed rows"] >= 1


# Archives


def test_an_archive_reads_like_its_folder(tmp_path):
    folder = dump(tmp_path / "d", "".join(map(GOOD.format, range(5_000))), '<row Id="1" PostId="7" Text="c" />\n')
    packed = archive(tmp_path / "site.7z", folder, prefix="some/where/")
    assert members(packed) == members(folder)
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
    with pytest.raises(ValueError, match=r"cut\.7z is truncated or no \.7z archive") as error:
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
    with open_member(packed, "Posts.xml") as stream:
        assert stream.readline().startswith(b"<?xml")
        assert threading.active_count() > threads
    assert threading.active_count() == threads


def test_without_py7zr_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "py7zr", None)
    with pytest.raises(ValueError, match=r"pip install minisobert\[dump\]"):
        members(tmp_path / "site.7z")


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
    assert sum(not post.text() for post in found) <= 1  # German Meta holds one that is an image
