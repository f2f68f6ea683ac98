"""The questions that `finetuning.chat` asks a model, and how its answers are read.

For a sequence task, the answer must be a label and nothing else; for ner, a list of {"text", "type"}, whose texts are
searched for in the sentence as runs of whole words, in order. Any other answer is unparsable. An entity that is not in
the sentence is added after it as a word, and so becomes a false positive. (If a sentence repeats a word, the wrong one
may be found: when the corpus's own entities are written as answers, 99.97 % of them are found again.)
"""

from __future__ import annotations

import dataclasses
import json
import re

import numpy as np

from minisobert.finetuning import evaluation
from minisobert.hashing import key, permutation_keys
from minisobert.tasks import metrics
from minisobert.tasks.dataset import Dataset, Example

LONGEST = 8_000  # characters of a post, about as many as the 2,048 tokens that our encoders read
_FENCE = re.compile(r"```(?:json)?\n(.*)\n```", re.S)


def introduction(data: Dataset, shots: int) -> list[dict]:
    """The messages before each question: what to do, and `shots` examples of train, of each class in turn (sentences
    in the order of a hash). Raises ValueError if train has fewer."""
    if shots > len(data.train):
        raise ValueError(f"--shots is {shots:,}, but train has only {len(data.train):,} examples; choose fewer")
    order = [data.train[i] for i in np.argsort(permutation_keys(len(data.train), key(0, "shots")))]
    turn: dict[int, int] = {}  # class → how many of its examples came before
    turns = []
    for e in order:
        turns.append(turn.get(e.label, 0))
        turn[e.label] = turns[-1] + 1
    if data.kind == "sequence":
        how = f"Answer with one of these labels and nothing else: {', '.join(data.labels)}."
    else:
        how = (
            f"The types of entities are {', '.join(types(data))}. Answer with a JSON list and nothing else: for each "
            'entity, in the order of the sentence, {"text": its words as they stand there, "type": its type}. Without '
            "entities answer []."
        )
    messages = [{"role": "system", "content": f"{data.task.instruction} {how}"}]
    for _, e in sorted(zip(turns, order), key=lambda pair: pair[0])[:shots]:
        messages += [question(data, e), {"role": "assistant", "content": answer(data, e)}]
    return messages


def question(data: Dataset, e: Example) -> dict:
    return {"role": "user", "content": e.text[:LONGEST] if data.kind == "sequence" else " ".join(e.words)}


def answer(data: Dataset, e: Example) -> str:
    """The right answer."""
    if data.kind == "sequence":
        return data.labels[e.label]
    found = sorted(metrics.entities(evaluation.names(data, e.tags)), key=lambda entity: entity[1])
    return json.dumps([{"text": " ".join(e.words[a:b]), "type": kind} for kind, a, b in found], ensure_ascii=False)


def types(data: Dataset) -> list[str]:
    return [label[2:] for label in data.labels if label.startswith("B-")]


def parse(data: Dataset, e: Example, text: str) -> tuple[Example, list[int]]:
    """The example, with an additional word for each entity that is not in it, and the class of the document or of each
    word. The class is len(data.labels) if the answer cannot be parsed."""
    if data.kind == "sequence":
        label = text.strip().strip("\"'`*.").casefold()
        known = [name.casefold() for name in data.labels]
        return e, [known.index(label) if label in known else len(known)]
    unparsable = [len(data.labels)] * len(e.words)
    fenced = _FENCE.fullmatch(text.strip())
    try:
        entities = json.loads(fenced[1] if fenced else text)
        found = [(entity["text"].split(), entity["type"]) for entity in entities]
        sound = [words and kind in types(data) and " ".join(words).encode() for words, kind in found]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return e, unparsable
    if not isinstance(entities, list) or not all(sound):
        return e, unparsable
    tags, absent, at = ["O"] * len(e.words), [], 0
    for words, kind in found:
        if span := find(e.words, "".join(words), tags, at):
            first, at = span
            tags[first:at] = [f"B-{kind}", *[f"I-{kind}"] * (at - first - 1)]
        else:
            absent.append((" ".join(words), f"B-{kind}"))
    e = dataclasses.replace(e, words=(*e.words, *(w for w, _ in absent)), tags=(*e.tags, *[0] * len(absent)))
    return e, [data.labels.index(tag) for tag in (*tags, *(tag for _, tag in absent))]


def find(words: tuple[str, ...], wanted: str, tags: list[str], at: int) -> tuple[int, int] | None:
    """(begin, end) of the first run of untagged words that spells `wanted` without spaces. The search begins at `at`
    and then goes on from the beginning."""
    for first in (*range(at, len(words)), *range(at)):
        spelt = ""
        for last in range(first, len(words)):
            spelt += words[last]
            if tags[last] != "O" or not wanted.startswith(spelt):
                break
            if spelt == wanted:
                return first, last + 1
    return None
