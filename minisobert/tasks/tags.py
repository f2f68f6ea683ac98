"""Your own types of entities, from columns of words and tags, or from texts with spans.

    python finetune.py --task tags --data train.conll dev.conll --model runs/base --out results/parts
    python finetune.py --task tags --data spans.jsonl --model runs/base --out results/parts

- CoNLL columns (.conll, .bio, .iob, .txt, .tsv): each line has a word first and its tag last, or in the column whose
  number --label gives, with tabs or spaces between them. A blank line ends a sentence, and a line that begins with
  -DOCSTART- ends a document. Tags are BIO, in either form, or BIOES and its relatives (E or L ends an entity, S or U is
  a whole one, M is inside one).
- .jsonl: {"text": "…", "spans": [[start, end, "Type"], …]}, in characters, as --predict --out writes it. A span is
  widened to whole words; texts are cut into words as in prediction (`words.py`).

What cannot be used is left out and counted.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from minisobert.corpus.tables import NOT_UTF8, rows, text_of
from minisobert.tasks.dataset import Dataset, Example, Task
from minisobert.tasks.files import DUMP, File, find
from minisobert.tasks.labels import LABEL, class_name
from minisobert.tasks.splits import Labelled, dataset, fingerprint
from minisobert.tasks.words import word_spans

COLUMNS = (".conll", ".bio", ".iob", ".txt", ".tsv")
DOCUMENTS = 20  # with this many or more, dev and test are drawn by document; with fewer, by sentence
_BEGINS, _INSIDE, _ENDS, _SINGLE = "B", "IM", "EL", "SU"


class Sentence(NamedTuple):
    document: str
    id: str
    words: tuple[str, ...]
    tags: tuple[str, ...]  # BIO


def read(paths: list[Path], seed: int, *, label: str = "") -> Dataset:
    """Sentences with a tag for each word. The labels are "O", then B- and I- for each type, the commonest first. label:
    the number of the column with the tags, where 1 is the column of the words (default: the last column). Raises
    ValueError if anything is wrong with a file as a whole."""
    files = find(paths, (*COLUMNS, ".jsonl"))
    if not files or any(file.kind == DUMP for file in files):
        raise ValueError(
            f"{', '.join(map(str, paths))}: tags reads words and tags in {', '.join(COLUMNS)}, or texts with spans in "
            ".jsonl"
        )
    if label and not (label.isdecimal() and int(label) > 1):
        raise ValueError(f"--label is {label!r}; for tags give the number of a column, 2 or more (1 is the word's)")
    notes: list[str] = []
    found = [(file, each) for file in files for each in _sentences(file, int(label or 0), notes)]
    types = Counter(tag[2:] for _, sentence in found for tag in sentence.tags if tag[0] == "B")
    if not types:
        raise ValueError("; ".join(["tags: no sentence has an entity", *notes]))
    labels = ("O", *(f"{prefix}-{kind}" for kind in sorted(types, key=lambda k: (-types[k], k)) for prefix in "BI"))
    index = {tag: i for i, tag in enumerate(labels)}
    by_document = len({sentence.document for _, sentence in found}) >= DOCUMENTS
    items = [
        Labelled(
            sentence.document if by_document else fingerprint(" ".join(sentence.words)), file.split,
            Example(sentence.id, words=sentence.words, tags=tuple(index[tag] for tag in sentence.tags)),
        )
        for file, sentence in found
    ]  # fmt: skip
    data = dataset(TASK, labels, items, seed, notes, unit="document" if by_document else "sentence")
    trained = {labels[tag][2:] for e in data.train for tag in e.tags}
    if unknown := [kind for kind in types if kind not in trained]:
        notes.append(f"types that train lacks, whose entities count as missed: {', '.join(unknown[:5])}")
    return data


def _sentences(file: File, column: int, notes: list[str]) -> Iterator[Sentence]:
    counts: Counter = Counter()
    yield from _of_spans(file, counts) if file.kind == ".jsonl" else _of_columns(file, column, counts)
    notes += [f"{file}: {what}: {count:,}" for what, count in counts.items() if count]


def _of_columns(file: File, column: int, counts: Counter) -> Iterator[Sentence]:
    for document, line, block in _blocks(file, column):
        kept = [(word, tag) for word, tag in block if word.strip()]
        counts["words left out, since they are white space"] += len(block) - len(kept)
        if not kept:
            continue
        words, given = zip(*kept)
        tags = [_split(tag) for tag in given]
        id = f"{file.stem}:{line}"
        if None in tags:
            wrong = given[tags.index(None)]
            counts[f"sentences left out, since {wrong!r} is not a tag (O, or B-, I-, E- or S- with a type)"] += 1
        else:
            bio, repaired = to_bio(tags)
            counts["tags that continued no entity of their type, read as its beginning"] += repaired
            yield Sentence(f"{file}:{document}" if document else id, id, words, bio)


def _blocks(file: File, column: int) -> Iterator[tuple[int, int, list[tuple[str, str]]]]:
    """(document, line, words and tags) of each sentence. Documents are counted from 1, and 0 if none are marked; the
    line is that on which the sentence begins. column: that of the tags, from 1, or 0 for the last. A line that is too
    short for it has the tag "", which is not a tag."""
    block: list[tuple[str, str]] = []
    document = 0
    with file.text(newline=None) as stream:
        for number, line in enumerate((*stream, ""), 1):
            fields = line.rstrip("\n").split("\t") if "\t" in line else [*filter(None, line.rstrip("\n").split(" "))]
            is_document = bool(fields) and fields[0] == "-DOCSTART-"
            is_comment = bool(fields) and fields[0].startswith("#") and _split(fields[-1].strip()) is None
            there = len(fields) >= max(column, 2)
            if line.strip() and not is_document and not is_comment:
                block.append((fields[0], fields[column - 1].strip() if there else ""))
            elif block and not is_comment:
                yield document, number - len(block), block
                block = []
            document += is_document


def _split(tag: str) -> tuple[str, str] | None:
    """A tag as ("B", "Type") or ("O", ""); None if it is not a tag."""
    if tag == "O":
        return "O", ""
    prefix, _, kind = tag.partition("-")
    known = prefix in (*_BEGINS, *_INSIDE, *_ENDS, *_SINGLE)
    return (prefix, class_name(kind)) if known and class_name(kind) else None


def to_bio(tags: Sequence[tuple[str, str]]) -> tuple[tuple[str, ...], int]:
    """The tags of a sentence, in any of the schemes, as BIO. A tag inside an entity that continues none of its type
    begins one; the second result is the number of such tags."""
    found, repaired, going_on = [], 0, ""  # going_on: the type of the entity that the previous word has left open
    for prefix, kind in tags:
        if prefix == "O":
            found.append("O")
            going_on = ""
            continue
        inside = prefix in _INSIDE + _ENDS
        repaired += inside and going_on != kind
        found.append(f"{'I' if inside and going_on == kind else 'B'}-{kind}")
        going_on = "" if prefix in _ENDS + _SINGLE else kind
    return tuple(found), repaired


def _of_spans(file: File, counts: Counter) -> Iterator[Sentence]:
    for row in rows(file):
        if row.problem == NOT_UTF8:
            raise ValueError(f"{file}:{row.line}: {row.problem}")
        try:
            if row.problem:
                raise ValueError(row.problem)
            if not isinstance(row.fields.get("text"), str):
                raise ValueError("without a text")
            text_of(row.fields, ["text"])  # raises for half a surrogate pair, which would stop training
            text = row.fields["text"]  # as it is, since the offsets count its line ends too
            spans = _spans(row.fields, len(text))
        except ValueError as error:
            counts[f"rows left out, {error}"] += 1
            continue
        places = word_spans(text)
        if not places:
            counts["rows left out, without a text"] += 1
            continue
        tags = tag(places, spans, counts)
        document = hashlib.blake2b(fingerprint(text).encode(), digest_size=16).hexdigest()
        yield Sentence(document, f"{file.stem}:{row.line}", tuple(text[a:b] for a, b in places), tags)


def _spans(fields: dict, length: int) -> list[tuple[int, int, str]]:
    """The (start, end, type) of each span. Raises ValueError if they are not as the head of this file describes."""
    given = fields.get("spans")
    if not isinstance(given, list):
        raise ValueError('without "spans", a list of [start, end, "Type"]')
    found = []
    for span in given:
        if isinstance(span, dict):  # as some annotation tools write it
            span = [span.get(name) for name in ("start", "end", "label")]
        if not (isinstance(span, list) and len(span) == 3 and [*map(type, span)] == [int, int, str]):
            raise ValueError('a span is not [start, end, "Type"]')
        start, end, kind = span
        if not 0 <= start < end <= length or not class_name(kind):
            raise ValueError("a span is empty, or reaches beyond the text")
        found.append((start, end, class_name(kind)))
    return found


def tag(places: Sequence[tuple[int, int]], spans: Sequence[tuple[int, int, str]], counts: Counter) -> tuple[str, ...]:
    """The BIO tags of the words at these places. Of overlapping spans, the longest stays. Spans that were left out or
    widened are counted."""
    tags = ["O"] * len(places)
    for start, end, kind in sorted(spans, key=lambda span: (span[0] - span[1], span[0])):
        inside = [i for i, (a, b) in enumerate(places) if a < end and b > start]
        if not inside:
            counts["spans left out, since they hold no word"] += 1
        elif any(tags[i] != "O" for i in inside):
            counts["spans left out, since they share words with a longer one"] += 1
        else:
            first, last = inside[0], inside[-1]
            counts["spans widened, since they began or ended inside a word"] += (
                places[first][0] < start or places[last][1] > end
            )
            tags[first : last + 1] = [f"B-{kind}", *[f"I-{kind}"] * (last - first)]
    return tuple(tags)


TASK = Task(
    "tags",
    read,
    "You find entities in sentences, which are given as words with a space between.",
    kind="token",
    figures=("f1",),
    options={"label": LABEL},
    own_classes=True,
)
