"""HTML and comment markup to plain text: a few passes of regular expressions, at C speed and in linear time.

A post's body is the HTML that Stack Exchange rendered. A tokenizer needs what a reader sees: paragraphs, list items,
and code with its newlines and indentation. Only the tags that Stack Exchange renders count as markup; anything else in
angle brackets is text, since people write `List<String>`.

No expression here can backtrack far on ill-formed input: each attempt to match stops at the next `<`.

Removing markup must not turn the text around it into new markup or references: `&#11<b>1</b>` is a character and a 1,
not `&#111`, and `<<b>p>` is no `<p>`. So text that could become markup is first written as entities (`_guarded`).
"""

from __future__ import annotations

import html
import re
from html.entities import html5

INLINE = "a|b|code|del|em|i|img|ins|kbd|s|span|strike|strong|sub|sup"
BLOCK = "blockquote|div|dl|h1|h2|h3|h4|h5|h6|hr|iframe|ol|p|pre|table|tbody|tfoot|thead|ul"
LINE = "br|dd|dt|li|tr"
CELL = "td|th"

# What may come between a tag's name and its end. A quoted value may hold ">", but no "<": Stack Exchange escapes it.
_ATTRIBUTES = r"""(?:[\s/][^<>"']*(?:"[^"<]*"[^<>"']*|'[^'<]*'[^<>"']*)*)?"""


def _tags(names: str, slash: str = "/?") -> str:
    """A regular expression for opening and closing tags of these names; `slash` "" or "/" means only one kind."""
    return f"<{slash}(?:{names}){_ATTRIBUTES}>"


_BR = re.compile(_tags("br"), re.I)
_PRE = re.compile(f"({_tags('pre')})", re.I)
_A = re.compile(_tags("a"), re.I)
_HREF = re.compile(r"""\shref\s*=\s*(?:"([^"]*)"|'([^']*)')""", re.I)
_INLINE = re.compile(_tags(INLINE), re.I)
_ANY = re.compile(_tags(f"{INLINE}|{BLOCK}|{LINE}|{CELL}"), re.I)
_ITEM = re.compile(f"{_tags('li', '')}(?: ?{_tags('p', '')})?", re.I)  # the text after a "- " stays on its line
_PLAIN = dict.fromkeys(
    ("</li> </ul>", "</li> </ol>", "</p> <p>", "<p>", "</p>", "<ul>", "</ul>", "<ol>", "</ol>"), "\n\n"
)
_PLAIN |= {"<blockquote>": "\n\n", "</blockquote>": "\n\n", "<br>": "\n"}
_BREAKS = re.compile(  # one group per kind of break; each alternative begins with "<", which makes it fast
    f"({_tags(BLOCK)})|({_tags(CELL, '/')} ?{_tags(CELL, '')} ?)|((?:{_tags(CELL)}|{_tags(LINE, '/')}) ?)"
    f"|{_tags(LINE, '')}",
    re.I,
)
_BREAK = {1: "\n\n", 2: " | ", 3: "", None: "\n"}
_NO_MARKUP = bytes({*range(256)} - {*b"<>&;"})
_OPEN_REFERENCE = re.compile(  # as html.unescape reads it
    r"&(?:[0-9A-Za-z]{0,32}|#(?:[0-9]+|[xX][0-9a-fA-F]*)?)(?=<|\Z)"
)
_TEXT_LESS = re.compile(f"<(?!{_tags(f'{INLINE}|{BLOCK}|{LINE}|{CELL}')[1:]})", re.I)  # a `<` that begins no tag
_NAMED = re.compile("&([0-9A-Za-z]+)([;=]?)")
_SPACES = re.compile("  +")
_BLANK_LINES = re.compile("\n\n\n+")
_LONG_NUMBER = re.compile(r"&#[0-9]{20,};?")  # Python refuses to parse a number of thousands of digits

_COMMENT_TOKEN = re.compile(r"`[^`]*`|<(code|i|b)>|<(a) href=\"([^\"<>]*)\"[^<>]*>|</(code|i|b|a)>")


def html_to_text(source: str, links: bool = False) -> str:
    """The text of a post's HTML. Never fails, whatever the input. links: whether to keep the targets of links, as
    Markdown does: `[text](target)`; not in `<pre>`.

    `<pre>` keeps its newlines and indentation; elsewhere white space collapses, blocks are separated by a blank line,
    list items begin with "- ", table cells are separated by " | "; inline tags, images and HTML comments are removed.
    Entities are decoded once, after the tags are removed: `&amp;lt;` becomes `&lt;`.
    """
    parts, in_pre = [], False
    for part in _PRE.split(_without_html_comments(source)):  # text, tag, text, tag, … text
        if part[:4].lower() == "<pre" or part[:5].lower() == "</pre":
            in_pre = part[1] != "/"
            continue
        text = (
            _ANY.sub("", _BR.sub("\n", part)).strip("\r\n") if in_pre else _flow(_with_targets(part) if links else part)
        )
        if text:
            parts.append(text)
    text = _decode("\n\n".join(parts))
    return text.replace("\r\n", "\n").replace("\r", "\n") if "\r" in text else text


def comment_to_text(source: str, links: bool = False) -> str:
    """The text of a comment, without white space at its ends. links: as in `html_to_text`.

    The site puts U+200C U+200B into long words of comments, to let browsers break them: that pair is removed.

    A comment is Markdown source and kept as it is: a dump has decoded its entities already. Comments from the API are
    rendered, with pairs of `<code>`, `<a href="…">`, `<i>` and `<b>`. Exactly those pairs are unwrapped, but not inside
    back-ticks, so `<code>List<String></code>` becomes `List<String>`.
    """
    source = source.replace("\r\n", "\n").replace("\u200c\u200b", "").strip()
    if "</" not in source:
        return source
    opened: list[tuple[str, re.Match]] = []
    count = dict.fromkeys(("code", "i", "b", "a"), 0)  # how often each name is in `opened`: no vain searches
    markup = []
    for token in _COMMENT_TOKEN.finditer(source):
        if name := token[1] or token[2]:
            opened.append((name, token))
            count[name] += 1
        elif (name := token[4]) and count[name]:
            other = None
            while other != name:  # tags opened in between were never closed: they are text
                other, opening = opened.pop()
                count[other] -= 1
            keep = links and name == "a"
            markup += ((*opening.span(), "[" if keep else ""), (*token.span(), _target(opening[3]) if keep else ""))
    at, parts = 0, []
    for start, stop, instead in sorted(markup):
        parts += (source[at:start], instead)
        at = stop
    return ("".join(parts) + source[at:]).strip()


def _with_targets(source: str) -> str:
    """The HTML with `[` and `](target)` in place of the tags of each link. A tag that is never closed stays."""
    parts, at, opened = [], 0, None
    for tag in _A.finditer(source):
        if tag[0][1] != "/":
            opened = tag
        elif opened and (found := _HREF.search(opened[0])):
            target = html.escape(_target(_decode_attribute(found[1] or found[2] or "")), quote=False)
            parts += (source[at : opened.start()], "[", source[opened.end() : tag.start()], target)
            at, opened = tag.end(), None
    return "".join(parts) + source[at:]


def _target(target: str) -> str:
    """What follows the text of a link in Markdown, in angle brackets if it would be misread otherwise."""
    target = target.replace("<", "%3C").replace(">", "%3E")
    return f"](<{target}>)" if re.search(r"[\s()]", target) else f"]({target})"


def _flow(source: str) -> str:
    """The text of HTML outside of `<pre>`, with entities still encoded."""
    text = _INLINE.sub("", source)
    for space in "\n\t\r\f":  # HTML's own white space, to which a no-break space does not belong
        text = text.replace(space, " ")
    if "  " in text:
        text = _SPACES.sub(" ", text)
    if "<l" in text or "<L" in text:
        text = _ITEM.sub("\n- ", text.replace("</li> <li>", "<li>"))
    for tag, instead in _PLAIN.items():  # nearly all breaks of genuine posts, several times faster than _BREAKS
        text = text.replace(tag, instead)
    if "<" in text:
        text = _BREAKS.sub(lambda match: _BREAK[match.lastindex], text)
    text = text.replace(" \n", "\n").replace("\n ", "\n")
    return _BLANK_LINES.sub("\n\n", text).strip(" \n")


def _decode(text: str) -> str:
    """`html.unescape`, but first replaces the three entities that are most common in posts (code), which is faster.

    Nothing is decoded twice: a decoded `<`, `>` or `"` begins no entity, and `&amp;lt;` does not hold `&lt;`.
    """
    if "&" not in text:
        return text
    text = text.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"')
    try:
        return html.unescape(text)
    except ValueError:
        return html.unescape(_LONG_NUMBER.sub("\ufffd", text))


def _decode_attribute(value: str) -> str:
    """Decodes an attribute as browsers do: `&copy` in `?a=1&copy=2` is no reference, though it would be one in text."""

    def kept(name: re.Match) -> str:
        reference = name[1] + ";" in html5 if name[2] == ";" else name[1] in html5 and name[2] != "="
        return name[0] if reference else f"&amp;{name[0][1:]}"

    return _decode(_NAMED.sub(kept, value))


def _guarded(source: str) -> str:
    """The same HTML, escaped so that no text can become markup or a reference once the tags are removed: a `<` that
    begins no tag is an entity, and a reference that a tag ends has a semicolon.

    If the brackets alternate, no `<` of text can meet a `>` of text later on, and if each `&` has a `;` before the next
    `<`, no tag ends a reference. Genuine posts are like that. Their `<>&;` alone show it, several times faster than a
    regular expression does.
    """
    marks = source.encode("utf-8", "surrogatepass").translate(None, _NO_MARKUP)
    brackets = marks.translate(None, b"&;")
    references = marks.translate(None, b">")
    if b"&<" in references or references.endswith(b"&"):
        source = _OPEN_REFERENCE.sub(_closed, source)
    return source if brackets == b"<>" * (len(brackets) // 2) else _TEXT_LESS.sub("&lt;", source)


def _closed(reference: re.Match) -> str:
    if reference[0][1:2] == "#" and reference[0][-1] not in "#xX":
        return reference[0] + ";"
    return html.escape(html.unescape(reference[0]), quote=False)  # `&ampx` is `&x`: the longest known name counts


def _without_html_comments(source: str) -> str:
    """The HTML without `<!-- … -->`, and `_guarded`. A comment that is never closed is text; `<!-->` is a whole
    comment, as it is in browsers."""
    if "<!--" not in source:
        return _guarded(source)
    parts, at = [], 0
    while (start := source.find("<!--", at)) >= 0 and (stop := source.find("-->", start + 2)) >= 0:
        parts.append(_guarded(source[at:start]))
        at = stop + 3
    return "".join(parts) + _guarded(source[at:])
