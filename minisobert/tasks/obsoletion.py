"""Obsolete answers: does an answer still hold?

The label comes from comments (Zhang et al. 2019): an answer is obsolete if a comment on it says deprecated, outdated,
obsolete or out of date. The model does not see the comments; it reads the question's title and the answer. The rule
ignores negation ("not outdated" counts), and the answer is the text after its last edit.

For each obsolete answer, an answer without such a comment is drawn by hashes of (seed, answer): one to the same
question or, if that has none left, one from the same year.

The data is one of

- a dump with Comments.xml;
- a dump and a .csv of QuestionID, AnswerID, CommentID, CommentText: the comments of the .csv make answers obsolete, and
  answers that only the dump's comments call obsolete are left out;
- a .csv of QuestionID, AnswerID, Title, Body (HTML), Label, as `data.tasks` writes it.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

from minisobert.corpus.html import html_to_text
from minisobert.corpus.rows import xml_rows
from minisobert.hashing import key, mix
from minisobert.tasks import dumps
from minisobert.tasks.dataset import Dataset, Example, Task
from minisobert.tasks.files import DUMP, File, class_of, csv_rows, select
from minisobert.tasks.splits import Labelled, dataset

LABELS = ("current", "obsolete")
COLUMNS = ("QuestionID", "AnswerID", "Title", "Body", "Label")
LAYOUTS = {"answers": COLUMNS, "comments": ("QuestionID", "AnswerID", "CommentID", "CommentText"), DUMP: ()}
KEYWORDS = re.compile(r"\b(?:deprecated|outdated|obsolete|out of date)\b", re.I)
_YEAR = re.compile("[0-9]{4}")


def read(paths: list[Path], seed: int) -> Dataset:
    """See the head of this file. Raises ValueError if anything is wrong with the files."""
    files = select(paths, TASK.name, LAYOUTS)
    comments = [file for file, layout in files if layout == "comments"]
    dumped = [file for file, layout in files if layout == DUMP]
    if comments and len(dumped) != 1:
        raise ValueError(f"{comments[0]} holds comments, not answers; add the one dump that they are from")
    items, notes = [], []
    obsolete = _listed(comments, notes) if comments else None
    for file, layout in files:
        if layout == "comments":
            continue
        prefix = f"{file.stem}:" if layout == DUMP else ""
        if layout == DUMP:
            derived = derive(file.path, seed, notes, obsolete)
            found = ((f"{file}, answer {row['AnswerID']}", row) for row in derived)
        else:
            found = csv_rows(file)
        for where, row in found:
            label = class_of(row["Label"], LABELS, where)
            if not dumps.text("", row["Body"]):
                raise ValueError(f"{where}: the text is empty; remove the row")
            example = Example(prefix + row["AnswerID"], dumps.text(row["Title"], row["Body"]), label)
            items.append(Labelled(prefix + row["QuestionID"], file.split, example, group=label))
    return dataset(TASK, LABELS, items, seed, notes, cleaning="html")


def _listed(files: list[File], notes: list[str]) -> np.ndarray:
    """The ids of the answers that a comment in these files calls obsolete, sorted. Other comments are counted in the
    notes."""
    found, others = set(), 0
    for file in files:
        for where, row in csv_rows(file):
            if (answer := dumps.number(row, "AnswerID")) is None:
                raise ValueError(f"{where}: the AnswerID {row['AnswerID']!r} is not a number")
            if KEYWORDS.search(row["CommentText"]):
                found.add(answer)
            else:
                others += 1
    if others:
        notes.append(f"{others:,} comments left out, since they have none of the words that call an answer obsolete")
    return np.array(sorted(found), np.int64)


def derive(dump: Path, seed: int, notes: list[str], obsolete: np.ndarray | None = None) -> list[dict[str, str]]:
    """The rows of a set in COLUMNS, ordered by answer. obsolete: ids of the obsolete answers, if it is not the dump's
    comments that tell; answers that only the dump's comments call obsolete are then left out. notes: what was left out
    is appended.

    Posts.xml is read twice, so that memory holds only three numbers for each answer and the texts of the chosen ones.
    """
    there = obsolete is None or dumps.site_of(dump).comments
    said = _said_obsolete(dump, notes) if there else np.empty(0, np.int64)
    obsolete = said if obsolete is None else obsolete
    answers, questions, years = array("q"), array("q"), array("q")
    for row in dumps.posts(dump, notes):
        question = dumps.number(row, "ParentId")
        if row["PostTypeId"] == "2" and question is not None and dumps.text("", row["Body"]):
            answers.append(int(row["Id"]))
            questions.append(question)
            years.append(int(year[0]) if (year := _YEAR.match(row.get("CreationDate", ""))) else 0)
    if not answers:
        raise dumps.NothingToDerive(f"{dump} holds no answers, which obsoletion is about")
    answer, question, year = (np.frombuffer(numbers, np.int64) for numbers in (answers, questions, years))
    sound = np.isin(answer, obsolete) | ~np.isin(answer, said)
    answer, question, year = answer[sound], question[sound], year[sound]
    label = _choose(answer, question, year, np.isin(answer, obsolete), seed)
    chosen = {int(answer[i]): LABELS[label[i]] for i in np.flatnonzero(label >= 0)}
    titles = dict.fromkeys(question[label >= 0].tolist(), "")
    bodies = {}
    for row in dumps.posts(dump, []):
        post = int(row["Id"])
        if post in titles:
            titles[post] = row.get("Title", "")
        if post in chosen:
            bodies[post] = (int(row["ParentId"]), row["Body"])
    others = len(obsolete) - int(np.isin(answer, obsolete).sum())
    dumps.note(dump, Counter({"posts left out that are called obsolete, but are questions or missing": others}), notes)
    return [
        dict(zip(COLUMNS, (str(bodies[post][0]), str(post), titles[bodies[post][0]], bodies[post][1], chosen[post])))
        for post in sorted(chosen)
    ]


def _said_obsolete(dump: Path, notes: list[str]) -> np.ndarray:
    """The ids of the posts that a comment calls obsolete, sorted."""
    table = dumps.site_of(dump).comments
    if not table:
        raise dumps.NothingToDerive(f"{dump} holds no Comments.xml, which tells which answers are obsolete")
    found, dropped = set(), Counter()
    with table.open() as stream:
        for row in xml_rows(stream, str(table), "comments", dropped):
            if KEYWORDS.search(row.get("Text", "")) and (post := dumps.number(row, "PostId")):
                found.add(post)
    dumps.note(dump, dropped, notes)
    return np.array(sorted(found), np.int64)


def _choose(answer: np.ndarray, question: np.ndarray, year: np.ndarray, obsolete: np.ndarray, seed: int) -> np.ndarray:
    """(A,) the class of each answer, -1 for those that are not drawn. answer, question, year: (A,) int64; obsolete:
    (A,) bool."""
    rank = mix(key(seed, "obsoletion"), answer, answer >> 32)
    label = np.full(len(answer), -1)

    def by_rank(mask: np.ndarray) -> np.ndarray:
        index = np.flatnonzero(mask)
        return index[np.argsort(rank[index], kind="stable")]

    positives = by_rank(obsolete)[: dumps.PER_CLASS]
    label[positives] = 1
    beside = defaultdict(list)  # question → its other answers; they are taken from the end
    for i in by_rank(~obsolete & np.isin(question, question[positives]))[::-1]:
        beside[question[i]].append(i)
    of_year: Counter = Counter()
    for i in positives:
        if beside[question[i]]:
            label[beside[question[i]].pop()] = 0
        else:
            of_year[year[i]] += 1
    for y, count in of_year.items():
        label[by_rank(~obsolete & (label < 0) & (year == y))[:count]] = 0
    return label


TASK = Task(
    "obsoletion",
    read,
    "You are shown the title of a question of Stack Overflow and an answer to it. Tell whether the answer is obsolete, "
    "because it is deprecated, outdated or out of date, or still current.",
    cleaning={"html": html_to_text},
    derive=derive,
    columns=COLUMNS,
    classes=LABELS,
)
