"""Regular expressions that see untrusted text take linear time, whatever the text."""

import re
import time
from pathlib import Path

import pytest

from data import decontamination
from minisobert.corpus import dump, html, rows, tables, texts
from minisobert.finetuning import prompts
from minisobert.tasks import dumps, files, labels, ner, obsoletion, quality, words

MODULES = (html, rows, tables, texts, dump, decontamination, dumps, files, labels, ner, obsoletion, quality, words)
MODULES += (prompts,)


def expressions(value, name: str):
    if isinstance(value, re.Pattern):
        yield name, value
    elif isinstance(value, list | tuple):
        for i, member in enumerate(value):
            yield from expressions(member, f"{name}[{i}]")


FOUND = dict(
    found
    for module in MODULES
    for name, value in vars(module).items()
    for found in expressions(value, f"{module.__name__.split('.')[-1]}.{name}")
)
AT_THE_START = {  # the others are searched for everywhere
    "dumps._BODY_NOTICE": "match",
    "labels._NUMBER": "fullmatch",
    "prompts._FENCE": "fullmatch",
    "dump._OTHER_ARCHIVE": "fullmatch",
    "dump._VOLUME": "fullmatch",
}
# Each is repeated, after a beginning from which an expression may continue and before an end at which it fails.
UNITS = [
    '<a href="x">',
    "<a href = ",
    "<a\thref=''",
    *(" ", "\n", "a", "1", "_", "-", ".", "é", "\0", "\n>", "[", "](", "[1]", "[1]:", "![", "[closed] ", "[closed"),
    *(
        "<",
        "<a ",
        '<a "',
        '<a ""',
        "<p> ",
        "<pre>",
        "</td> <td> ",
        "<li> ",
        "<!--",
        "<b x=''",
        "&",
        "&#",
        "&#1",
        "&#x",
        "&a",
    ),
    *(
        "Id",
        "Id =",
        'Id="1',
        "<row",
        "</posts ",
        "`",
        "<code>",
        "</code>",
        "lang a ",
        "class snippet ",
        "-posts",
        ".7z",
        ".csv",
        "```json\n",
        "\n```",
        "a\n```",
        "question-posts",
    ),
    *("<blockquote>", "> **Possible Duplicate", "**", "# ", "1. ", "1.", "e1", "a.", "(/", "[a](/", "\ufffe"),
]
BEGINNINGS = [
    "<blockquote> <p> <strong>Possible Duplicate</strong>",
    '<p a="',
    "Id",
    "&#",
    "</posts",
    "[a](http:",
    "lang ",
]
TEXTS = [("", unit, end) for unit in UNITS for end in ("", "\0x")]
TEXTS += [(beginning, unit, "\0") for beginning in BEGINNINGS for unit in (" ", "1", "a")]
SIZE = 2_000
LEAST = 0.004  # seconds; below it, one measures the clock and the scheduler


def seconds(function, text: str) -> float:
    """The least of three times, since the machine may be busy."""
    taken = []
    for _ in range(3):
        start = time.process_time()
        function(text)
        taken.append(time.process_time() - start)
        if taken[-1] < LEAST:
            break
    return min(taken)


def superlinear(function) -> tuple[str, str, str] | None:
    """The first text of which 4 n characters take more than 8 times as long as n."""
    for beginning, unit, end in TEXTS:
        short, long = (beginning + unit * (size // len(unit)) + end for size in (SIZE, 4 * SIZE))
        if (taken := seconds(function, long)) > LEAST and taken > 8 * max(seconds(function, short), LEAST / 8):
            return beginning, unit, end
    return None


@pytest.mark.parametrize("name", FOUND)
def test_an_expression_takes_linear_time(name):
    expression, as_bytes = FOUND[name], isinstance(FOUND[name].pattern, bytes)
    used = {"match": expression.match, "fullmatch": expression.fullmatch}.get(
        AT_THE_START.get(name), expression.findall
    )
    assert superlinear(lambda text: used(text.encode() if as_bytes else text)) is None


FUNCTIONS = {
    "html_to_text": html.html_to_text,
    "html_to_text with links": lambda text: html.html_to_text(text, links=True),
    "comment_to_text": html.comment_to_text,
    "without_notices": lambda text: dumps.without_notices(text, text),
    "normalise": quality.normalise,
    "content_words": decontamination.content_words,
    "the stem of a file": lambda text: files.File(Path(), ".csv", text.replace("\0", "")).stem,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_made_of_them_takes_linear_time(name):
    assert superlinear(FUNCTIONS[name]) is None


def test_the_clock_finds_a_quadratic_expression():
    assert superlinear(re.compile(r"\s*\[closed\]\s*$").search)
    assert {"html._ANY", "rows._REFERENCE", "dumps._BODY_NOTICE", "quality._MARKDOWN[1][0]"} <= FOUND.keys()
