"""The text of a post holds what a reader of the page sees, whatever the markup."""

import html
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisobert.corpus.html import BLOCK, CELL, INLINE, LINE, comment_to_text, html_to_text


@pytest.mark.parametrize(
    "source, text",
    [
        ("<p>One\n two.</p>\n\n<p>Three</p>", "One two.\n\nThree"),
        ("<p>a<br>b<br />\nc</p>", "a\nb\nc"),
        ('<p>see <a href="https://x.y/?a=1&amp;b=2" title="a > b">this <b>link</b></a></p>', "see this link"),
        ("<p>x<!-- language: lang-js -->y</p>", "xy"),
        ("<p>x <!-- never closed</p>", "x <!-- never closed"),
        ("<p>before <img src='a.png' alt=\"c\"> after</p>", "before after"),
        ("<ul>\n<li>one</li>\n<li><p>two</p>\n\n<p>more</p></li>\n</ul>", "- one\n- two\n\nmore"),
        ("<table><tr><th>a</th>\n<th>b</th></tr>\n<tr><td>1</td><td>2</td></tr></table>", "a | b\n1 | 2"),
        ("<h2>Title</h2>text<hr>end", "Title\n\ntext\n\nend"),
        ("<blockquote>\n<p>said</p>\n</blockquote>\n<p>so</p>", "said\n\nso"),
        ("<p>a<!--><b>b</b><!--->c<!---->d</p>", "abcd"),
        ('<p><a href="/?a&b">c</a> <a href="/?a&amp;b">d</a></p>', "c d"),
        ("a&nbsp;b  c", "a\u00a0b c"),
        ("", ""),
        ("  \n ", ""),
    ],
)
def test_markup_becomes_layout(source, text):
    assert html_to_text(source) == text


def test_code_keeps_its_newlines_and_indentation():
    source = "<p>Try</p>\n<pre class='py'><code>\n  def f(a):\r\n\n      return  a &lt; 2\n</code></pre>\n<p>ok</p>"
    assert html_to_text(source) == "Try\n\n  def f(a):\n\n      return  a < 2\n\nok"


def test_a_line_break_in_code_is_one():
    """Posts of the first years have such code: in 122 of the first 1,000 rows, lines of code end only so."""
    source = "<pre><code>int a;<br>int b;<br />  int c;<BR></code></pre>"
    assert html_to_text(source) == "int a;\nint b;\n  int c;"


def test_entities_are_decoded_once():
    assert html_to_text("<p>&amp;lt; &lt;b&gt; &#39;&#x41;&quot;</p>") == "&lt; <b> 'A\""
    assert html_to_text("<pre><code>&amp;amp; &lt;p&gt;</code></pre>") == "&amp; <p>"


def test_what_is_no_tag_of_the_site_stays_text():
    assert html_to_text("<p>a List<String> and <T extends Comparable<T>> if a < b > c <3</p>") == (
        "a List<String> and <T extends Comparable<T>> if a < b > c <3"
    )


@pytest.mark.parametrize(
    "source, text",
    [
        ("&#11<code>1</code>", "1"),  # U+000B is not a character of HTML
        ("&#65<b>9</b> &#x41<i>1</i> &#<b>49;</b> &#x<b>49;</b>", "A9 A1 &#49; &#x49;"),
        ("&l<b></b>t; &<i>amp;</i> &am<!-- -->p; &<!-- -->lt;", "&lt; &amp; &amp; &lt;"),
        ("&copy<b>x</b>; &lt<b>p&gt</b> &ampx<b>;</b>", "\u00a9x; <p> &x;"),
        ("<<b>p>one</b> <p<!-- -->>two <<!-- -->br> <!-<b></b>- -->", "<p>one <p>two <br> <!-- -->"),
        ("<p <b>x> <pre <!-- -->> </pr<b>e>", "<p x> <pre > </pre>"),
        ('<p title="x > <b>y"> z', '<p title="x > y"> z'),
        ("&#" + "9" * 5_000 + "<b>1</b>", "\ufffd1"),
    ],
)
def test_taking_a_tag_out_joins_nothing_to_markup_or_references(source, text):
    assert html_to_text(source) == text


def tag_ends(source: str, at: int) -> int:
    """The end of the tag of the site that begins here, or 0 if none does. Read by character, unlike in html.py."""
    name, i = "", at + 1 + source.startswith("/", at + 1)
    while i < len(source) and source[i].isalnum():
        name, i = name + source[i].lower(), i + 1
    if source[at] != "<" or name not in f"{INLINE}|{BLOCK}|{LINE}|{CELL}".split("|"):
        return 0
    if source[i : i + 1] not in (">", "/") and not source[i : i + 1].isspace():
        return 0
    quote = ""
    for end, character in enumerate(source[i:], i + 1):
        if character == "<":
            return 0
        if character == quote:
            quote = ""
        elif not quote and character in "\"'":
            quote = character
        elif not quote and character == ">":
            return end
    return 0


def shown(source: str) -> str:
    """What a reader sees, without spaces: the text between tags and comments, with each part decoded by itself."""
    found, text, at = "", "", 0
    while at < len(source):
        comment = source.startswith("<!--", at) and source.find("-->", at + 2) + 3
        if end := comment if comment and comment > 2 else tag_ends(source, at):
            found, text, at = found + html.unescape(text), "", end
        else:
            text, at = text + source[at], at + 1
    return "".join((found + html.unescape(text)).split())


SOUP = [
    *(
        "<",
        "</",
        "b",
        ">",
        "p",
        "<b>",
        "</b>",
        "<p>",
        "<pre>",
        "</pre>",
        "<br/>",
        "<td>",
        "</td>",
        "<li>",
        "<!--",
        "-->",
    ),
    *(
        "&",
        "&#",
        "&#1",
        "&#x",
        "x4",
        "9",
        "l",
        "lt",
        ";",
        "amp",
        "&lt;",
        '"',
        "'",
        "<a ",
        " ",
        "\n",
        "\r",
        "-",
        "|",
        "\0",
    ),
    *("é", "String", "<i title='>'>"),
]


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.sampled_from(SOUP), st.text(max_size=2)), max_size=40).map("".join))
def test_no_character_is_invented_or_lost(source):
    marks = str.maketrans("", "", "-|")  # those of list items and cells
    assert "".join(html_to_text(source).split()).translate(marks) == shown(source).translate(marks)


@pytest.mark.parametrize(
    "source, text",
    [
        ("<code>List<String></code> is", "List<String> is"),
        ('see <a href="https://x.y" rel="nofollow">that <i>one</i></a>', "see that one"),
        ("an unclosed <b> stays, so does </i>", "an unclosed <b> stays, so does </i>"),
        ("<code>Map<i></code>", "Map<i>"),
        ("in back-ticks `<b>x</b>` it is code, <b>here</b> not", "in back-ticks `<b>x</b>` it is code, here not"),
        ("<dependency><version>3</version></dependency>", "<dependency><version>3</version></dependency>"),
        ("AT&amp;T &lt; 3", "AT&amp;T &lt; 3"),  # already decoded in the dump
        (" a\r\nb ", "a\nb"),
        ("spring-boot-star\u200c\u200bter", "spring-boot-starter"),
    ],
)
def test_a_comment_loses_only_what_the_api_rendered(source, text):
    assert comment_to_text(source) == text


@pytest.mark.parametrize(
    "source, text",
    [
        (
            '<p>See <a href="http://x.y/?a=1&amp;b=2" rel="nofollow">the <b>docs</b></a>.</p>',
            "See [the docs](http://x.y/?a=1&b=2).",
        ),
        ("<a title='t' href='/q/1'>one</a> <A\nHREF = \"two\">2</A>", "[one](/q/1) [2](two)"),
        ('<a href="a (b).html">c</a> <a href="http://x/a_(b)">d</a>', "[c](<a (b).html>) [d](<http://x/a_(b)>)"),
        ('<a href="i.png"><img src="i.png" alt="x"></a>', "[](i.png)"),
        ('<a name="n">no link</a> </a> <a href="x">open', "no link open"),
        ('<a href="1">a <a href="2">b</a>', "a [b](2)"),
        ('<pre><a href="x">code</a></pre>', "code"),
        ('<a href="&lt;b&gt;">c</a>', "[c](%3Cb%3E)"),
        ('<ul><li><a href="x">y</a></li></ul>', "- [y](x)"),
    ],
)
def test_links_keep_their_targets_as_markdown_where_asked(source, text):
    assert html_to_text(source, links=True) == text
    assert "](" not in html_to_text(source)


def test_links_of_comments_keep_their_targets_too():
    source = '<a href="http://x.y" rel="nofollow">that <i>one</i></a> [this](z) `<a href="q">c</a>` <a href="w">'
    assert comment_to_text(source, links=True) == '[that one](http://x.y) [this](z) `<a href="q">c</a>` <a href="w">'


NASTY = [
    *("<", "</", "<p ", "<p> ", '<a "', "<a '", "<a x", '<a href="', "<pre>", "<!--", "<!-- --", "<li> <p> "),
    *("</td><td>", "&", "&#", "&#9", " ", "\n ", "`", "<i>", "</b>", "<i></b>", "<code>", "`<i>"),
]


@pytest.mark.parametrize("unit", NASTY)
def test_a_nasty_megabyte_takes_little_time(unit):
    long, half = unit * (1_000_000 // len(unit)), unit * (500_000 // len(unit))
    start = time.process_time()
    for source in (long, "<p " + half, "&#" + half):
        html_to_text(source)
    comment_to_text(long)
    assert time.process_time() - start < 10  # about one second; a quadratic expression would take minutes


@settings(deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([*NASTY, "</pre>", "x", ">", '"', "<td>", "-->", "&lt;", "&amp;", "\r", "\ud800"])))
def test_no_input_makes_it_fail(units):
    for links in (False, True):
        html_to_text("".join(units), links)
        comment_to_text("".join(units), links)


@settings(deadline=None, derandomize=True)
@given(st.text(st.sampled_from('&ltgqmpao;#x3<>" ')))
def test_text_without_markup_decodes_as_the_standard_library_does(source):
    source = " ".join(source.replace("<", "(").split())
    assert html_to_text(source) == html.unescape(source)
