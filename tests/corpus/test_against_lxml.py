"""html_to_text and xml_rows read a post as lxml does (with libxml2, which reads HTML as browsers do)."""

import html
import io
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisobert.corpus.dump import sites
from minisobert.corpus.html import BLOCK, CELL, INLINE, LINE, html_to_text
from minisobert.corpus.rows import xml_rows

lxml = pytest.importorskip("lxml.html")
lxml_etree = pytest.importorskip("lxml.etree")
DUMPS = Path(__file__).resolve().parents[2] / "../shared/data/dumps"
BREAKING = f"{BLOCK}|{LINE}".split("|")
CELLS = CELL.split("|")


def words(text: str) -> list[str]:
    """The text, cut at HTML's own white space."""
    return re.findall(r"[^ \t\n\r\f]+", text)


def reading(source: str, links: bool) -> tuple[list[str], list[str]]:
    """(the words of a page; the text of each <pre>), by lxml's tree and by what html_to_text is documented to add."""
    parts, pres = [], []

    def walk(element, in_pre: bool) -> None:
        if not isinstance(element.tag, str):  # a comment
            return
        before = after = "\n" if element.tag in BREAKING else ""
        if element.tag == "li" and not in_pre:
            before = "\n- "
        elif element.tag in CELLS and not in_pre and element.getprevious() is not None:
            before = " | "
        elif element.tag == "a" and "href" in element.attrib and links and not in_pre:
            target = element.get("href").replace("<", "%3C")
            before, after = "[", f"](<{target}>)" if re.search(r"[\s()]", target) else f"]({target})"
        elif element.tag == "pre":
            for line_break in element.iter("br"):
                line_break.tail = "\n" + (line_break.tail or "")
            pres.append(element.text_content())
        parts.extend((before, element.text or ""))
        for child in element:
            walk(child, in_pre or element.tag == "pre")
            parts.append(child.tail or "")
        parts.append(after)

    walk(lxml.document_fromstring(f"<div>{source}</div>"), False)
    return words("".join(parts)), pres


# The ways in which people and programs write a character. A reference ends at a semicolon, or where browsers end it.
CHARACTERS = st.characters(exclude_categories=("Cc", "Cs", "Cn")) | st.sampled_from("<>&\"'\n\t -|[]#;x1")
ENCODED = [
    html.escape,
    html.escape,
    lambda text: "".join(f"&#{ord(c)};" for c in text),
    lambda text: "".join(f"&#x{ord(c):X};" for c in text),
    lambda text: html.escape(text).replace(";", "; "),
]
SOUP = st.sampled_from(
    [
        " ",
        "\n",
        "a",
        "1",
        ";",
        "&copy",
        "&amp",
        "&amp;lt;",
        "&eacute;",
        "&",
        "&#65",
        "&#x41",
        "&nbsp;",
        "&bogus;",
        "&notit",
    ]
)
TEXT = st.lists(st.tuples(st.text(CHARACTERS, max_size=5), st.sampled_from(ENCODED)), max_size=3).map(
    lambda pieces: "".join(encode(text) for text, encode in pieces)
)
TEXT = TEXT | st.lists(SOUP, max_size=5).map("".join)


def element(name: str, inside: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    tags = [
        (f"<{name}>", f"</{name}>"),
        (f"<{name.upper()} title='>'>", f"</{name} >"),
        (f'<{name}\nid="a b">', f"</{name}>"),
    ]
    return st.tuples(st.sampled_from(tags), inside).map(lambda drawn: drawn[1].join(drawn[0]))


def several(inside: st.SearchStrategy[str], between: str = "", least: int = 0) -> st.SearchStrategy[str]:
    return st.lists(inside, min_size=least, max_size=3).map(between.join)


INLINES = INLINE.replace("a|", "").replace("img|", "").split("|")
URLS = st.lists(
    st.sampled_from(["http://a", "?b=", "c", "&amp;", "&copy=", "&lt", "1", "&amp;amp;", "/", "&#38;", "&copy;"]),
    min_size=1,
).map("".join)
VOID = st.sampled_from(["<br>", "<br />", "<img src='>' alt=\"a\">", "<!-- a <b> -->", "<!---->", "<!-->"])
PHRASE = st.recursive(
    TEXT | VOID, lambda inside: several(inside) | st.sampled_from(INLINES).flatmap(lambda name: element(name, inside))
)
LINK = st.tuples(URLS, PHRASE).map('<a href="{0[0]}" rel="x">{0[1]}</a>'.format)
PARAGRAPH = several(PHRASE | LINK)
BLOCKS = st.recursive(
    PARAGRAPH,
    lambda inside: (
        st.sampled_from(["p", "h2", "pre"]).flatmap(lambda name: element(name, PARAGRAPH))
        | st.sampled_from(["blockquote", "div"]).flatmap(lambda name: element(name, inside))
        | element("ul", several(element("li", inside), "\n"))
        | element("dl", several(element("dt", PARAGRAPH) | element("dd", inside), "\n"))
        | element("table", several(element("tr", several(element("td", inside) | element("th", PARAGRAPH), " "))))
        | several(inside, "<hr>")
        | several(inside, "\n\n")
    ),
    max_leaves=10,
)


@pytest.mark.parametrize("links", [False, True])
def test_html_says_what_lxml_reads(links):
    @settings(max_examples=100, deadline=None)
    @given(BLOCKS)
    def check(source: str) -> None:
        expected, pres = reading(source, links)
        text = html_to_text(source, links)
        assert words(text) == expected
        assert all(pre.strip("\n") in text for pre in pres)

    check()


# The first year of Stack Overflow has the most varied HTML of the dumps at hand.
REAL = ("2008-sample.stackoverflow.com", "conlang.meta.stackexchange.com")


@pytest.mark.parametrize("site", REAL)
def test_real_posts_say_what_lxml_reads(site):
    path = DUMPS / f"{site}.7z"
    if not path.is_file():
        pytest.skip("the real dumps are not beside this checkout (../shared/data)")
    ((found,), _) = sites([path])
    with found.posts.open() as stream:
        content = stream.read()
    rows = list(xml_rows(io.BytesIO(content), "Posts.xml", "posts", Counter()))
    assert rows == [dict(row.attrib) for row in lxml_etree.fromstring(content)]
    for body in (row["Body"] for row in rows if row.get("Body")):
        for links in (False, True):
            expected, pres = reading(body, links)
            text = html_to_text(body, links)
            assert words(text) == expected
            assert all(pre.replace("\r\n", "\n").strip("\n") in text for pre in pres)


ATTRIBUTES = st.dictionaries(
    st.sampled_from(["Body", "Title", "Tags", "Text"]), st.text(CHARACTERS | st.sampled_from("\r\t\n"), max_size=8)
)
DAMAGE = st.sampled_from([b"<", b">", b'"', b"/>", b"&", b"&#1;", b"\0", b"\xff", b"<row ", b"</row>", b"<!--", b"]]>"])


@settings(max_examples=200, deadline=None)
@given(st.lists(ATTRIBUTES, min_size=1, max_size=5), st.integers(0), st.integers(0), st.none() | DAMAGE)
def test_xml_rows_reads_what_lxml_reads_and_damage_costs_no_sound_row(attributes, number, place, damage):
    """lxml, told to recover, keeps what it can of a damaged row. We count the row, since its content is unknown."""
    rows = [{"Id": str(n), **found} for n, found in enumerate(attributes)]
    lines = [b"  " + lxml_etree.tostring(lxml_etree.Element("row", row), encoding="utf-8") + b"\n" for row in rows]
    if damage is not None:
        number %= len(lines)
        place %= len(lines[number])
        lines[number] = lines[number][:place] + damage + lines[number][place:]
    content = b"<posts>\n" + b"".join(lines) + b"</posts>\n"
    ours = list(xml_rows(io.BytesIO(content), "Posts.xml", "posts", Counter()))
    if damage is None:
        assert ours == rows == [dict(row.attrib) for row in lxml_etree.fromstring(content)]
    else:
        left = iter(ours)
        assert all(row in left for row in rows[:number] + rows[number + 1 :])
