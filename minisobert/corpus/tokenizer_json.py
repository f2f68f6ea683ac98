"""A Hugging Face tokenizer, from its `tokenizer.json`, with the interface of `tokenizer.Tokenizer` (extra [hf]).

Imported models come with one. Unlike ours it may lose something: many turn a text into lower case, or drop spaces.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

import numpy as np

from minisobert.corpus.tokenizer import Vocabulary, token_dtype

# The names of the four special ids that we need, in the order in which they are tried
NAMES = {
    "pad": ("[PAD]", "<pad>"),
    "cls": ("[CLS]", "<s>", "<bos>"),
    "sep": ("[SEP]", "</s>", "<eos>"),
    "mask": ("[MASK]", "<mask>"),
}


class JsonTokenizer:
    """content: of a tokenizer.json; where: what errors call it. Raises ValueError if it cannot be used here."""

    file_name = "tokenizer.json"

    def __init__(self, content: bytes, where: str = "tokenizer.json"):
        try:
            import tokenizers
        except ImportError:
            raise ValueError(f"{where} needs the package tokenizers: pip install 'minisobert[hf]'") from None
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode())
        except Exception as error:  # the library has no exception of its own
            raise ValueError(f"{where} is not a valid tokenizer.json ({' '.join(str(error).split())[:200]})") from None
        self._tokenizer.no_padding()
        self._tokenizer.no_truncation()
        self._tokenizer.encode_special_tokens = True  # "[MASK]" in a post is text, not the token of that name
        self.content = content
        self.vocabulary = self._vocabulary(where)
        self.vocab_size = self.vocabulary.size
        self.dtype = token_dtype(self.vocab_size)

    def _vocabulary(self, where: str) -> Vocabulary:
        ids = self._tokenizer.get_vocab(with_added_tokens=True)
        size = max(ids.values(), default=-1) + 1
        special, self.special_names = {}, {}
        for what, names in NAMES.items():
            found = [name for name in names if name in ids]
            if not found:
                raise ValueError(
                    f"{where} has none of the tokens {' or '.join(names)}, which masked language models need; "
                    "use the tokenizer of an encoder"
                )
            special[what], self.special_names[what] = ids[found[0]], found[0]
        if unknown := [name for name in ("[UNK]", "<unk>") if name in ids]:
            self.special_names["unk"] = unknown[0]
        added = self._tokenizer.get_added_tokens_decoder()
        edges = sorted({-1, size, *special.values(), *(i for i, token in added.items() if token.special)})
        # the widest stretch between them: some models have their special ids at the beginning, some at the end
        first, stop = max(((a + 1, b) for a, b in pairwise(edges)), key=lambda pair: pair[1] - pair[0])
        return Vocabulary(size, **special, first=first, stop=stop)

    def encode(self, text: str) -> np.ndarray:
        """(n,) ids, without special ones. Raises ValueError for a text with a lone surrogate."""
        try:
            return np.array(self._tokenizer.encode(text, add_special_tokens=False).ids, self.dtype)
        except (UnicodeEncodeError, TypeError):
            raise ValueError(f"text with a lone surrogate cannot be encoded: {text[:40]!a}") from None

    def encode_bytes(self, text: str) -> bytes:
        """The same ids as little-endian bytes, which is what a shard holds."""
        return self.encode(text).tobytes()

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids, special ones by name."""
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=False)
