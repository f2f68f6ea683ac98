"""Named entities in posts: the StackOverflow NER corpus (Tabassum et al. 2020), read by the rules of its authors.

A file has one word per line, a tab, and the word's BIO tag; further columns are ignored. A line of white space ends a
sentence. Sentences that are not text are left out: headers with the question's id or address, and placeholders such as
"(code omitted for annotation)". Some types are merged into others and some become O, which leaves 20 types.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from minisobert.tasks.dataset import Dataset, Example, Task
from minisobert.tasks.files import File, find
from minisobert.tasks.splits import Labelled, dataset

TYPES = (
    "Algorithm", "Application", "Class", "Code_Block", "Data_Structure", "Data_Type", "Device", "File_Name",
    "File_Type", "Function", "HTML_XML_Tag", "Language", "Library", "Operating_System", "Output_Block",
    "User_Interface_Element", "User_Name", "Variable", "Version", "Website",
)  # fmt: skip
MERGED = {
    "Library_Function": "Function", "Function_Name": "Function", "Class_Name": "Class", "Library_Class": "Class",
    "Library_Variable": "Variable", "Variable_Name": "Variable", "Organization": "Website",
}  # fmt: skip
OUTSIDE = ("Value", "Error_Name", "Keyboard_IP", "Licence")
_HEADER = re.compile(r"Question_(?:ID|URL) :(?: (\d+)$)?")


def read(paths: list[Path], seed: int) -> Dataset:
    """Sentences with a tag for each word. The labels are "O", then B- and I- for each type that occurs.

    An I- that does not continue an entity of its type is read as a B-, as seqeval reads it, and counted in the notes.
    If there are no files for dev or test, whole questions are taken from train; without headers, sentences are. Raises
    ValueError if anything is wrong with the files.
    """
    files = find(paths)
    if stray := [file for file in files if file.named and file.kind != ".txt"]:
        raise ValueError(f"{stray[0]} is not .txt; ner reads a word and its tag per line, separated by a tab")
    files = [file for file in files if file.kind == ".txt"]
    if not files:
        raise ValueError(f"no .txt file in {', '.join(map(str, paths))}; ner reads a word and its tag per line")
    notes: list[str] = []
    sentences = [(file, question, name, *rest) for file in files for question, name, *rest in _sentences(file, notes)]
    there = {tag[2:] for *_, tags in sentences for tag in tags}
    labels = ("O", *(f"{prefix}-{kind}" for kind in TYPES if kind in there for prefix in "BI"))
    index = {tag: i for i, tag in enumerate(labels)}
    items = [
        Labelled(question, file.split, Example(name, words=words, tags=tuple(index[tag] for tag in tags)))
        for file, question, name, words, tags in sentences
    ]
    found = dataset(TASK, labels, items, seed, notes)
    known = {example.words for example in found.train}
    for split, part in (("dev", found.dev), ("test", found.test)):
        if repeated := sum(example.words in known for example in part):
            notes.append(f"{repeated:,} sentences of {split} are in train too, and were kept")
    return found


def _sentences(file: File, notes: list[str]) -> Iterator[tuple[str, str, tuple[str, ...], tuple[str, ...]]]:
    """(question or, if none is known, id; id; words; tags) of each sentence that is text, with repaired tags."""
    counts: Counter = Counter()
    question = ""
    for i, (words, tags) in enumerate(_blocks(file)):
        tags, repaired = _repair(tags)
        text = " ".join(words)
        if header := _HEADER.search(text):
            question = header[1] or question
            counts["headers left out"] += 1
        elif "omitted for annotation" in text:
            counts["placeholders left out"] += 1
            counts["entities in them"] += sum(tag[0] == "B" for tag in tags)
        else:
            counts["I- that continued no entity of their type, read as B-"] += repaired
            yield question or f"{file.stem}:{i}", f"{file.stem}:{i}", words, tags
    notes += [f"{file.stem}: {count:,} {what}" for what, count in counts.items() if count]


def _blocks(file: File) -> Iterator[tuple[tuple[str, ...], list[str]]]:
    block: list[tuple[str, str]] = []
    with file.text(newline="\n") as stream:
        for number, line in enumerate(stream, 1):
            if line.strip():
                block.append(_word(line, f"{file}, line {number}"))
            elif block:
                yield tuple(word for word, _ in block), [tag for _, tag in block]
                block = []
    if block:
        yield tuple(word for word, _ in block), [tag for _, tag in block]


def _word(line: str, where: str) -> tuple[str, str]:
    """The word and its tag, with the types merged."""
    word, _, rest = line.rstrip("\r\n").partition("\t")
    tag = rest.partition("\t")[0].strip()
    prefix, _, kind = tag.partition("-")
    kind = MERGED.get(kind, kind)
    if not word.strip() or not tag:
        raise ValueError(f"{where}: {line.strip()!r} is not a word and its tag, separated by a tab")
    if tag == "O" or (prefix in ("B", "I") and kind in OUTSIDE):
        return word, "O"
    if prefix not in ("B", "I") or kind not in TYPES:
        known = ", ".join((*TYPES, *MERGED, *OUTSIDE))
        raise ValueError(f"{where}: unknown label {tag!r}; the labels are O, and B- or I- with one of {known}")
    return word, f"{prefix}-{kind}"


def _repair(tags: list[str]) -> tuple[tuple[str, ...], int]:
    """The tags, with a B- wherever an entity begins, and how many of them were changed."""
    starts = [tag[0] == "I" and before[2:] != tag[2:] for before, tag in zip(["O", *tags], tags)]
    return tuple(f"B{tag[1:]}" if start else tag for start, tag in zip(starts, tags)), sum(starts)


TASK = Task(
    "ner",
    read,
    "You find named entities in sentences of Stack Overflow, which are given as words with a space between.",
    kind="token",
    figures=("f1",),
    published=(("SoftNER", "Tabassum et al. 2020", "79.10"),),
)
