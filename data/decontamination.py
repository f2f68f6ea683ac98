"""Finds documents that contain a text on which a model will be tested: `data.prepare --decontaminate TASK=PATH …`.

These texts are the dev and test texts that `finetune.py --task TASK --data PATH …` reads. A document contains one of
them if

- the two share RUN consecutive words (GPT-3's authors looked for 13: Brown et al. 2020, appendix C), or
- the text is shorter than RUN words, and it is the whole document or, if it has LINE words or more, one of the
  document's lines, such as its title.

A word is a run of two or more letters and digits, in any case. Function words do not count, since some publishers
remove them, nor does anything between words, so other punctuation cannot hide a text. The rule leaves out too much
rather than too little: text that everybody pastes, such as the head of a pom.xml, counts too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from minisobert.tasks import SPLIT_SEED, TASKS

RUN = 8
LINE = 4  # "thanks in advance for any help" is a sentence of ner's test split, and a line of many posts
_WORD = re.compile(r"[^\W_]{2,}")
_ENGLISH = """
about above after again against ain all also am an and any are aren arent as at be because been before being below
between both but by can cannot cant could couldn couldnt did didn didnt do does doesn doesnt doing don dont down
during each few for from further get had hadn has hasn hasnt have haven havent having he her here hers herself him
himself his how if in into is isn isnt it its itself just ll me more most mustn my myself needn no nor not now of off
on once only or other our ours ourselves out over own re same shan she should shouldn so some such than that the their
theirs them themselves then there these they this those through to too under until up us use using ve very was wasn
wasnt we were weren what when where which while who whom whose why will with won wont would wouldn you your yours
yourself yourselves
"""
_FUNCTION_WORDS = frozenset(_ENGLISH.split())


class Texts:
    """Dev and test texts of some tasks, indexed so that documents can be searched for them."""

    def __init__(self, texts: Iterable[tuple[str, str]]):
        """texts: pairs (task, text). Words that texts of several tasks share belong to the first of these tasks."""
        self.counts: Counter = Counter()  # task → number of its texts
        self.runs: dict[str, str] = {}  # RUN consecutive words, or all words of a shorter text → task
        for task, text in texts:
            self.counts[task] += 1
            for run in _runs(content_words(text)):
                self.runs.setdefault(run, task)

    def task_of(self, document: str) -> str | None:
        """The task of a text that the document contains, or None if it contains none."""
        if not self.runs:
            return None
        found = [content_words(line) for line in document.split("\n")]
        whole = [word for line in found for word in line]
        lines = (" ".join(line) for line in found if LINE <= len(line) < RUN)
        return next((self.runs[run] for run in (*_runs(whole), *lines) if run in self.runs), None)


def content_words(text: str) -> list[str]:
    return [word for word in _WORD.findall(text.casefold()) if word not in _FUNCTION_WORDS]


def _runs(found: list[str]) -> Iterator[str]:
    """Every run of RUN consecutive words; all words as a single run if there are fewer."""
    for i in range(max(len(found) - RUN + 1, min(len(found), 1))):
        yield " ".join(found[i : i + RUN])


def read(named: Sequence[str]) -> Texts:
    """The texts of several TASK=PATH; the paths of one task are read together. Raises ValueError if anything is wrong
    with them."""
    paths: dict[str, list[Path]] = {}
    for name in named:
        task, _, path = name.partition("=")
        if task not in TASKS or not path:
            raise ValueError(
                f"--decontaminate is {name!r}; it must be TASK=PATH, where TASK is one of {', '.join(TASKS)}"
            )
        paths.setdefault(task, []).append(Path(path))
    data = {task: TASKS[task].read(files, SPLIT_SEED) for task, files in paths.items()}
    held_out = [(task, e) for task, d in data.items() for e in (*d.dev, *d.test)]
    return Texts((task, text) for task, e in held_out for text in (e.text or " ".join(e.words), e.other) if text)
