"""How a text is cut into the words that a token task tags, in training on spans and in prediction alike."""

from __future__ import annotations

import re

# a word of letters, digits and the signs of names (node.js, C++, scikit-learn), or one other sign: as ner's corpus cuts
WORD = re.compile(r"\w[^\s,;:!?()\"']*[\w+#]|\w|[^\w\s]")


def word_spans(text: str) -> list[tuple[int, int]]:
    """From where to where in the text each word goes."""
    return [match.span() for match in WORD.finditer(text)]
