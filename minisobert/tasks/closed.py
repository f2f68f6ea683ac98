"""Closed questions: will a question be closed, and why?

The data is one of

- the Kaggle layout of 2012: Title, BodyMarkdown, OpenStatus (open and four reasons) and, optionally, PostId;
- titles: question_id, title, label (open, closed, duplicate);
- the same with a body (HTML), as `data.tasks` writes it: open or closed;
- a dump: a question with a ClosedDate is closed. If a .csv of question_id, closed_reason is given too, the class is the
  reason, and questions that the .csv does not list are left out.

The model sees neither comments nor the notices of closing in title and body, since these give the class away.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from minisobert.corpus.html import html_to_text
from minisobert.tasks import dumps
from minisobert.tasks.dataset import Dataset, Example, Option, Task
from minisobert.tasks.files import DUMP, File, class_of, csv_rows, select
from minisobert.tasks.splits import Labelled, dataset

CLASSES = {
    "kaggle": ("open", "not a real question", "not constructive", "off topic", "too localized"),
    "bodies": ("open", "closed"),
    "titles": ("open", "closed", "duplicate"),
    "reasons": (
        "open", "Duplicate", "Needs details or clarity", "Needs more focus", "Not suitable for this site",
        "Opinion-based",
    ),
    DUMP: ("open", "closed"),
}  # fmt: skip
COLUMNS = ("question_id", "title", "body", "label")
LAYOUTS = {
    "kaggle": ("Title", "BodyMarkdown", "OpenStatus"),
    "bodies": COLUMNS,
    "titles": ("question_id", "title", "label"),
    "reasons": ("question_id", "closed_reason"),
    DUMP: (),
}


def read(paths: list[Path], seed: int, *, binary: bool = False) -> Dataset:
    """See the head of this file. binary: the classes are open and closed, whatever the reason. Raises ValueError if
    anything is wrong with the files."""
    files = select(paths, TASK.name, LAYOUTS)
    if not any(layout == DUMP for _, layout in files):
        lists = [file for file, layout in files if layout == "reasons"]
        files = [(file, layout) for file, layout in files if layout != "reasons"]
        if lists and (not files or any(file.named for file in lists)):
            raise ValueError(f"{lists[0]} holds no texts; add the dump with its questions")
    layouts = {layout for _, layout in files}
    layout = "reasons" if layouts == {"reasons", DUMP} else layouts.pop()
    if layout != "reasons" and layouts:
        raise ValueError(
            f"these files have different sets of classes: {', '.join(str(file) for file, _ in files)}; give those of "
            "one set"
        )
    notes: list[str] = []
    reasons = _reasons([file for file, kind in files if kind == "reasons"]) if layout == "reasons" else None
    classes = ("open", "closed") if binary else CLASSES[layout]
    items = []
    for file, kind in files:
        if kind == "reasons":
            continue
        for i, (where, thread, text, name) in enumerate(_texts(file, kind, reasons, seed, notes)):
            label = class_of(name, CLASSES[layout], where)
            if not text.strip():
                raise ValueError(f"{where}: the text is empty; remove the row")
            thread = thread or f"{file.stem}:{i}"
            # with binary too, the split is drawn reason by reason, so that it is the same
            example = Example(thread, text, min(label, 1) if binary else label)
            items.append(Labelled(thread, file.split, example, group=label))
    html = layout in ("bodies", "reasons", DUMP)
    return dataset(TASK, classes, items, seed, notes, cleaning="html" if html else "")


def _texts(file: File, kind: str, reasons: dict[str, str] | None, seed: int, notes: list[str]) -> Iterator[tuple]:
    """(where it is, in words; question; text; class) of each question in a file."""
    if kind == DUMP:
        for row in derive(file.path, seed, notes, reasons):
            question, text = row["question_id"], dumps.text(row["title"], row["body"])
            yield f"{file}, question {question}", f"{file.stem}:{question}", text, row["label"]
        return
    question, title, body, label = COLUMNS
    if kind == "kaggle":
        question, title, body, label = "PostId", "Title", "BodyMarkdown", "OpenStatus"
    removed = 0
    for where, row in csv_rows(file):
        given = row[title].replace("\r\n", "\n"), row.get(body, "").replace("\r\n", "\n")
        cleaned = dumps.without_notices(*given)
        removed += cleaned != given
        text = "\n\n".join(filter(None, map(str.strip, cleaned))) if kind == "kaggle" else dumps.text(*cleaned)
        yield where, row.get(question, ""), text, row[label]
    if removed:
        notes.append(f"{file.stem}: {removed:,} {dumps.NOTICES}")


def _reasons(files: list[File]) -> dict[str, str]:
    found = {}
    for file in files:
        for where, row in csv_rows(file):
            class_of(row["closed_reason"], CLASSES["reasons"], where)
            found[row["question_id"]] = row["closed_reason"]
    return found


def derive(dump: Path, seed: int, notes: list[str], reasons: dict[str, str] | None = None) -> list[dict[str, str]]:
    """The rows of a set in COLUMNS. reasons: question → class, instead of the open or closed of the dump. notes: what
    was left out is appended."""
    return dumps.sample(_labelled(dump, notes, reasons), dump, seed, notes)


def _labelled(dump: Path, notes: list[str], reasons: dict[str, str] | None) -> Iterator[tuple[str, int, dict]]:
    for row in dumps.questions(dump, notes):
        label = "closed" if "ClosedDate" in row else "open"
        if reasons is not None:
            label = reasons.get(row["Id"])
        if label:
            yield label, int(row["Id"]), dict(zip(COLUMNS, (row["Id"], row["Title"], row["Body"], label)))


TASK = Task(
    "closed",
    read,
    "You are shown a question of Stack Overflow. Tell whether the community has closed it, and why.",
    options={"binary": Option("for closed: learn two classes, open and closed, instead of the reasons")},
    cleaning={"html": html_to_text},
    derive=derive,
    columns=COLUMNS,
    classes=CLASSES["bodies"],
    published=(
        ("TF-IDF + XGBoost", "SELU", "63.4 / 46.7"),
        ("bert-base-cased", "SELU", "68.9 / 54.5"),
        ("roberta-base", "SELU", "70.1 / 55.8"),
        ("ModernBERT-large", "SELU", "71.3 / 58.2"),
        ("GPT-4o, prompted", "SELU", "51.1 / 32.8"),
    ),
)
