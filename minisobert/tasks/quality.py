"""Question quality: HQ, LQ_EDIT or LQ_CLOSE.

The data is one of

- the public set of 60,000 questions: Title, Body (HTML, but Markdown in LQ_EDIT), Y and, optionally, Id;
- two columns: text (which its publisher lower-cased and stripped of punctuation) and Y;
- a dump, by the published rule: HQ has a score of 30 or more and was never edited; LQ_EDIT has a negative score, was
  edited and is open; LQ_CLOSE is closed and was never edited. A question that fits two of these is left out. A dump
  has only the last version, so an LQ_EDIT is the text after the edit; the public set has the text before it.

In the public set the *form* of a text tells its class: LQ_EDIT is Markdown with CRLF, the others are HTML with LF. So
by default the markup is removed (see `normalise`), and from the two columns also the words that markup left behind,
such as "pre code" and "rel noreferrer". With `keep_leak` it stays, to measure how much it gives away.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from minisobert.corpus.html import html_to_text
from minisobert.tasks import dumps
from minisobert.tasks.dataset import Dataset, Example, Option, Task
from minisobert.tasks.files import DUMP, class_of, csv_rows, select
from minisobert.tasks.splits import Labelled, dataset, fingerprint

LABELS = ("HQ", "LQ_EDIT", "LQ_CLOSE")
COLUMNS = ("Id", "Title", "Body", "Tags", "CreationDate", "Y")
LAYOUTS = {"60k": ("Title", "Body", "Y"), "words": ("text", "Y"), DUMP: ()}

_MARKDOWN = [
    (re.compile(r"!\[[^\[\]]*\](?:\([^()\s]*\)|\[\d+\])"), ""),  # an image
    (re.compile(r"(?<!\w)\[([^\[\]]*)\](?:\((?:https?:|/|#)[^()\s]*\)|\[\d+\])"), r"\1"),  # a link
    (re.compile(r"(?<!\S)\[\d+\]:\s*\S+"), ""),  # the target of a link
    (re.compile(r"\*\*|`"), ""),  # bold, code
    (re.compile(r"(?<!\S)(?:#{1,6}|>|[-*+]|\d+\.)(?!\S)"), ""),  # a heading, quotation or list; HTML lists become "- "
]
_MARKUP_WORD = re.compile(
    r"\b(?:alt|amp|blockquote|br|code|del|em|gt|h[1-6]|hr|href|img|kbd|li|lt|nofollow|noreferrer|ol|pre|quot|rel|src|strike"
    r"|strong|sub|sup|ul)\b"
)
_SNIPPET = re.compile(  # what is left of the HTML or Markdown of a runnable snippet
    r"\b(?:class snippet data lang js data hide \w+ data console \w+ data babel \w+"
    r"|class snippet code(?: (?:js|css|html))?"
    r"|begin snippet(?: js hide \w+)?(?: console \w+)?(?: babel \w+)?|end snippet|language lang \w+"
    r"|(?:class )?(?:lang \w+ )?prettyprint(?: override)?)\b"
)


def read(paths: list[Path], seed: int, *, keep_leak: bool = False) -> Dataset:
    """See the head of this file. Raises ValueError if anything is wrong with the files."""
    items, notes = [], []
    if keep_leak:
        notes.append("line endings and markup are kept: in the public set they tell the class")
    else:
        notes.append("line endings, markup and runs of white space are removed: in the public set they tell the class")
    files = select(paths, TASK.name, LAYOUTS)
    layouts = {layout for _, layout in files}
    for file, layout in files:
        if layout == DUMP:
            found = ((f"{file}, question {row['Id']}", row) for row in derive(file.path, seed, notes))
        else:
            found = csv_rows(file)
        for i, (where, row) in enumerate(found):
            label = class_of(row["Y"], LABELS, where)
            text = row["text"] if layout == "words" else f"{row['Title']}\n\n{row['Body']}"
            cleaned = without_markup_words(text) if layout == "words" else normalise(text)
            thread = fingerprint(cleaned)  # with keep_leak too, so that the splits are the same
            text = text if keep_leak else cleaned
            if not text.strip():
                lacks = "" if keep_leak else " without its markup"
                raise ValueError(f"{where}: the text is empty{lacks}; remove the row")
            question = f"{file.stem}:{row['Id']}" if layout == DUMP else row.get("Id", "")
            example = Example(question or f"{file.stem}:{i}", text, label)
            items.append(Labelled(question or thread, file.split, example, group=label))
    cleaning = "" if keep_leak else "words" if layouts == {"words"} else "markup"
    return dataset(TASK, LABELS, items, seed, notes, cleaning=cleaning)


def derive(dump: Path, seed: int, notes: list[str]) -> list[dict[str, str]]:
    """The rows of a set, in the columns of the public set and by its rule. notes: what was left out is appended."""
    return dumps.sample(_labelled(dump, notes), dump, seed, notes)


def _labelled(dump: Path, notes: list[str]) -> Iterator[tuple[str, int, dict[str, str]]]:
    malformed = 0
    for row in dumps.questions(dump, notes):
        edited, closed = "LastEditDate" in row, "ClosedDate" in row
        try:
            score = int(row.get("Score") or 0)
        except ValueError:
            malformed += 1
            continue
        fits = {
            "HQ": score >= 30 and not edited,
            "LQ_EDIT": score < 0 and edited and not closed,
            "LQ_CLOSE": closed and not edited,
        }
        if sum(fits.values()) == 1 and normalise(row["Title"] + "\n\n" + row["Body"]):
            label = next(name for name, fit in fits.items() if fit)
            yield label, int(row["Id"]), {name: row.get(name, "") for name in COLUMNS} | {"Y": label}
    dumps.note(dump, Counter({"questions left out, since their score is not a number": malformed}), notes)


def normalise(text: str) -> str:
    """The words of a question in HTML or Markdown, without any markup: all on one line, without tags, and with only the
    text of links. Tags inside code are removed too, since in Markdown they cannot be told from markup."""
    for _ in range(2):  # the second pass is for code, in which HTML has tags as entities, and Markdown as they are
        text = html_to_text(text)
    for pattern, replacement in _MARKDOWN:
        text = pattern.sub(replacement, text)
    return " ".join(text.split())


def without_markup_words(text: str) -> str:
    """A text of the two-column set, without the words that markup left behind."""
    return " ".join(_MARKUP_WORD.sub("", _SNIPPET.sub("", " ".join(text.split()))).split())


TASK = Task(
    "quality",
    read,
    "You judge questions of Stack Overflow. HQ is a question of high quality, with a high score and never edited. "
    "LQ_EDIT is one of low quality, with a negative score, that was edited and stayed open. LQ_CLOSE is one of low "
    "quality that was closed without an edit.",
    options={"keep_leak": Option("for quality: keep the line ends and the markup that give the class away")},
    cleaning={"markup": normalise, "words": without_markup_words},
    derive=derive,
    columns=COLUMNS,
    classes=LABELS,
    published=(
        ("TF-IDF + XGBoost", "SELU", "76.3 / 76.4"),
        ("bert-base-cased", "SELU", "84.7 / 84.7"),
        ("roberta-base", "SELU", "86.4 / 86.5"),
        ("ModernBERT-large", "SELU", "87.9 / 87.9"),
        ("GPT-4o, prompted", "SELU", "43.7 / 38.4"),
    ),
)
