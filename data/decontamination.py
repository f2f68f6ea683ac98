"""Which documents hold what a model will be tested on: `data.prepare --decontaminate TASK=PATH …`.

The texts are those of dev and test that `finetune.py --task TASK --data PATH …` gets. A document holds one of them
where

- it shares RUN words in a row with the text (GPT-3's authors looked for 13: Brown et al. 2020, appendix C);
- the text is shorter than that, and is the whole document or, from LINE words on, one of its lines, such as its title.

Words are runs of letters and digits, whatever their case, but no single characters and no function words, which some
publishers take out: what stands between words does not hide a text. It is meant to leave out too much rather than too
little: what everybody pastes, such as the head of a pom.xml, counts too.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from minisobert.tasks import SPLIT_SEED, TASKS

RUN = 8
LINE = 4  # "thanks in advance for any help" is a sentence of ner's test, and a line of many posts
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
    """Dev and test texts of some tasks, made to be looked for."""

    def __init__(self, texts: Iterable[tuple[str, str]]):
        """texts: (task, text); of equal texts the first one's task counts."""
        self.counts: Counter = Counter()  # of texts of each task
        self.runs: dict[str, str] = {}  # RUN words in a row, or all words of a shorter text → task
        for task, text in texts:
            self.counts[task] += 1
            for run in _runs(content_words(text)):
                self.runs.setdefault(run, task)

    def task_of(self, document: str) -> str | None:
        """The task of a text that the document holds."""
        if not self.runs:
            return None
        found = [content_words(line) for line in document.split("\n")]
        whole = [word for line in found for word in line]
        lines = (" ".join(line) for line in found if LINE <= len(line) < RUN)
        return next((self.runs[run] for run in (*_runs(whole), *lines) if run in self.runs), None)


def content_words(text: str) -> list[str]:
    return [word for word in _WORD.findall(text.casefold()) if word not in _FUNCTION_WORDS]


def _runs(found: list[str]) -> Iterator[str]:
    """RUN words in a row, from each word on; of fewer words, all."""
    for i in range(max(len(found) - RUN + 1, min(len(found), 1))):
        yield " ".join(found[i : i + RUN])


def read(named: Sequence[str]) -> Texts:
    """The texts of several TASK=PATH; those of one task go together. Raises ValueError for whatever is wrong with
    them."""
    paths: dict[str, list[Path]] = {}
    for name in named:
        task, _, path = name.partition("=")
        if task not in TASKS or not path:
            raise ValueError(f"--decontaminate is {name!r}; it must be TASK=PATH, TASK one of {', '.join(TASKS)}")
        paths.setdefault(task, []).append(Path(path))
    data = {task: TASKS[task].read(files, SPLIT_SEED) for task, files in paths.items()}
    held_out = [(task, e) for task, d in data.items() for e in (*d.dev, *d.test)]
    return Texts((task, text) for task, e in held_out for text in (e.text or " ".join(e.words), e.other) if text)
