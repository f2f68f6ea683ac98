"""What a reader sees of a post is what its text holds, whatever the markup."""

import html
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minisobert.corpus.html import comment_to_text, html_to_text


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
        ("<code>List<String></code> is", "List<String> is"),
        ('see <a href="https://x.y" rel="nofollow">that <i>one</i></a>', "see that one"),
        ("an unclosed <b> stays, so does </i>", "an unclosed <b> stays, so does </i>"),
        ("<code>Map<i></code>", "Map<i>"),
        ("in back-ticks `<b>x</b>` it is code, <b>here</b> not", "in back-ticks `<b>x</b>` it is code, here not"),
        ("<dependency><version>3</version></dependency>", "<dependency><version>3</version></dependency>"),
        ("AT&amp;T &lt; 3", "AT&amp;T &lt; 3"),  # the dump has decoded it already
        (" a\r\nb ", "a\nb"),
        ("spring-boot-star\u200c\u200bter", "spring-boot-starter"),
    ],
)
def test_a_comment_loses_only_what_the_api_rendered(source, text):
    assert comment_to_text(source) == text


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
    assert time.process_time() - start < 10  # about one second; a quadratic expression takes minutes


@settings(deadline=None, derandomize=True)
@given(st.lists(st.sampled_from([*NASTY, "</pre>", "x", ">", '"', "<td>", "-->", "&lt;", "&amp;", "\r", "\ud800"])))
def test_no_input_makes_it_fail(units):
    html_to_text("".join(units))
    comment_to_text("".join(units))


@settings(deadline=None, derandomize=True)
@given(st.text(st.sampled_from('&ltgqmpao;#x3<>" ')))
def test_text_without_markup_decodes_as_the_standard_library_does(source):
    source = " ".join(source.replace("<", "(").split())
    assert html_to_text(source) == html.unescape(source)
