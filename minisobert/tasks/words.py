"""Cuts a text into the words that a token task tags, both in training on spans and in prediction."""

from __future__ import annotations

import re

# As in ner's corpus: a word of letters, digits and signs inside names (node.js, C++, scikit-learn), or one other sign
WORD = re.compile(r"\w[^\s,;:!?()\"']*[\w+#]|\w|[^\w\s]")


def word_spans(text: str) -> list[tuple[int, int]]:
    """(begin, end) of each word in the text."""
    return [match.span() for match in WORD.finditer(text)]
