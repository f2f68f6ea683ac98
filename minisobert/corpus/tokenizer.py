"""Text to ids and back, without loss: a SentencePiece BPE with bytes as fallback.

    from minisobert.corpus.tokenizer import Tokenizer, train
    tokenizer = Tokenizer(train(texts, vocab_size=50_000))
    tokenizer.decode(tokenizer.encode("if (a < b)\\n    return;")) == "if (a < b)\\n    return;"

Ids: five special pieces, then 256 pieces of one byte each, then the learnt pieces. Half of a post is code, so nothing
is normalised; newlines and runs of spaces are pieces like any other. Two characters that SentencePiece cannot
represent are spelt in bytes: the tab (its trainer learns none, and the site's Markdown makes them spaces), and U+2581,
its own mark for a space.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np

PAD, UNK, CLS, SEP, MASK = range(5)
FIRST_ORDINARY_ID = 5  # lower ids are special pieces, to which no text is encoded
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json")  # names in a folder; if it has both, the first counts
SPECIAL_PIECES = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


class Vocabulary(NamedTuple):
    """What the data path has to know about a tokenizer's ids: how many there are, four special ones, and the range of
    the ordinary ones. Only ordinary ids are masked, or put in place of a masked one."""

    size: int
    pad: int
    cls: int
    sep: int
    mask: int
    first: int  # of the ordinary ids
    stop: int


def our_vocabulary(size: int) -> Vocabulary:
    """The vocabulary of a tokenizer that `train` made."""
    return Vocabulary(size, PAD, CLS, SEP, MASK, FIRST_ORDINARY_ID, size)


_SPACE_MARK = "\u2581"
# Training sentences are cut to this many characters: SentencePiece ignores lines that are longer than it was told to
# expect, and cannot handle words of more than 65,535 characters. A cut costs one word, and a newline at the end of a
# sentence.
_SENTENCE = 30_000


def train(texts: Iterable[str], vocab_size: int, coverage: float = 0.9998) -> bytes:
    """Learns a tokenizer and returns the content of a SentencePiece model file.

    `coverage` is the share of the text's characters that get pieces of their own; rarer ones are spelt in bytes. A text
    that is too short for so many pieces gives fewer. Raises ValueError if `vocab_size` is too small for the special
    pieces, the bytes and those characters, or if there is no text.
    """
    import sentencepiece

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_sentences(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            hard_vocab_limit=False,  # fewer pieces, not an error, when there is nothing left to merge
            pad_id=PAD,
            pad_piece=SPECIAL_PIECES[PAD],
            unk_id=UNK,
            unk_piece=SPECIAL_PIECES[UNK],
            bos_id=-1,
            eos_id=-1,
            control_symbols=list(SPECIAL_PIECES[CLS:]),  # control: the same characters in a text do not encode to them
            byte_fallback=True,
            character_coverage=coverage,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=4 * _SENTENCE + 1,  # in bytes
            minloglevel=2,
        )
    except RuntimeError as error:
        if small := re.search(r"required_chars\. (\d+) vs (\d+)", str(error)):
            raise ValueError(
                f"a vocabulary of {small[1]} pieces is too small for this text: its characters, the 256 bytes and the "
                f"{len(SPECIAL_PIECES)} special pieces need at least {small[2]}"
            ) from None
        if "sentences_.empty()" in str(error):
            raise ValueError("there is no text to train a tokenizer on") from None
        raise ValueError(f"SentencePiece could not train a vocabulary of {vocab_size} pieces: {error}") from None
    return model.getvalue()


def _sentences(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for start in range(0, len(text), _SENTENCE):
            yield text[start : start + _SENTENCE]


def token_dtype(vocab_size: int) -> np.dtype:
    """The dtype of stored ids: little-endian uint16 if it can hold vocab_size - 1, else uint32."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


class Tokenizer:
    """A trained tokenizer: `model` is a file's path or its content.

    Encoding cuts a text into chunks that no piece crosses (a word with the spaces before it, a run of signs and
    digits). SentencePiece encodes a chunk the same way wherever it is, so its ids are remembered: most chunks of a text
    were seen before, and cost a dictionary lookup each.
    """

    file_name = "tokenizer.model"

    def __init__(self, model: str | Path | bytes):
        import sentencepiece  # not above: a machine that only measures kernels need not have it

        name = "this" if isinstance(model, bytes) else str(model)
        self.content = model if isinstance(model, bytes) else Path(model).read_bytes()
        try:
            if not self.content:  # SentencePiece would make a model without pieces of it
                raise RuntimeError
            self.sentencepiece = sentencepiece.SentencePieceProcessor(model_proto=self.content)
        except RuntimeError:
            raise ValueError(f"{name} is not a SentencePiece model") from None
        processor = self.sentencepiece
        self.vocab_size: int = processor.vocab_size()
        self.vocabulary = our_vocabulary(self.vocab_size)
        pieces = [processor.id_to_piece(i) for i in range(self.vocab_size)]
        if tuple(pieces[:FIRST_ORDINARY_ID]) != SPECIAL_PIECES:
            raise ValueError(
                f"{name} is not a tokenizer of minisobert: its first pieces are {pieces[:5]}, not "
                f"{list(SPECIAL_PIECES)}; for the tokenizer of another model, give its tokenizer.json"
            )
        byte = {f"<0x{value:02X}>": bytes([value]) for value in range(256)}
        self._bytes = [
            byte[piece] if processor.is_byte(i) else piece.replace(_SPACE_MARK, " ").encode()
            for i, piece in enumerate(pieces)
        ]
        self.dtype = token_dtype(self.vocab_size)
        self._cache = _Cache(processor, self.dtype)

    @cached_property
    def _chunks(self):  # made on first use: decoding, or asking for the size, does not need them
        learnt = range(FIRST_ORDINARY_ID, self.vocab_size)
        return _chunks_that_cut_no_piece([self._bytes[i].decode() for i in learnt if not self.sentencepiece.is_byte(i)])

    def encode(self, text: str) -> np.ndarray:
        """(n,) ids, uint16 if the vocabulary allows it, else uint32; without [CLS] and [SEP].

        Raises ValueError for a text that is not UTF-8-encodable (a lone surrogate).
        """
        return np.frombuffer(self.encode_bytes(text), self.dtype)

    def encode_bytes(self, text: str) -> bytes:
        """The same ids as little-endian bytes, which is what a shard holds."""
        return b"".join(map(self._cache.__getitem__, self._chunks(text)))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of these ids. Special pieces are written by name. Bytes that are no character, because a part of it
        was cut off or masked, become U+FFFD."""
        table = self._bytes
        return b"".join([table[i] for i in ids]).decode(errors="replace")


def tokenizer_files(path: str | Path) -> list[Path]:
    """The tokenizer files in a folder, or the file itself. Raises ValueError if the folder has none."""
    path = Path(path)
    if not path.is_dir():
        return [path]
    if there := [path / name for name in TOKENIZER_FILES if (path / name).is_file()]:
        return there
    raise ValueError(f"{path} holds no {' and no '.join(TOKENIZER_FILES)}")


def open_tokenizer(path: str | Path):
    """Opens the tokenizer of a file (a SentencePiece model of ours, or a tokenizer.json) or of a folder that holds one:
    a `Tokenizer` or a `JsonTokenizer`. Raises ValueError if it cannot be used."""
    ours, *theirs = tokenizer_files(path)
    try:
        content = ours.read_bytes()
    except OSError as error:
        raise ValueError(f"{ours}: {error.strerror}") from None
    if content[:1] == b"{":
        from minisobert.corpus.tokenizer_json import JsonTokenizer  # which needs an extra

        return JsonTokenizer(content, str(ours))
    try:
        return Tokenizer(ours)
    except ValueError:
        if theirs:  # the tokenizer.model is another library's
            return open_tokenizer(theirs[0])
        raise


class _Cache(dict):
    """Chunk → ids as bytes. It is filled on demand and emptied when full: frequent words are soon back."""

    LIMIT = 1 << 18  # chunks; about 40 MB

    def __init__(self, processor, dtype: np.dtype):
        super().__init__()
        self.pieces = processor.encode
        self.id_bytes = [i.to_bytes(dtype.itemsize, "little") for i in range(processor.vocab_size())]
        self.mark = b"".join(self.id_bytes[processor.piece_to_id(f"<0x{value:02X}>")] for value in _SPACE_MARK.encode())

    def __missing__(self, chunk: str) -> bytes:
        if _SPACE_MARK in chunk:
            return self.mark.join([self[part] if part else b"" for part in chunk.split(_SPACE_MARK)])
        try:
            ids = b"".join([self.id_bytes[i] for i in self.pieces(chunk)])
        except (RuntimeError, UnicodeEncodeError):
            raise ValueError(f"text with a lone surrogate cannot be encoded: {chunk[:40]!a}") from None
        if len(chunk) <= 64:
            if len(self) >= self.LIMIT:
                self.clear()
            self[chunk] = ids
        return ids


def _chunks_that_cut_no_piece(pieces: list[str]):
    """A function text → list of chunks that cuts none of these pieces, and otherwise cuts as often as it can.

    BPE only ever makes pieces, so it never merges two characters that are side by side in no piece. Characters that are
    side by side in some piece are put into one class; SentencePiece learns no piece of two scripts, so the classes turn
    out to be Latin letters; digits and signs; Greek letters; and so on. A chunk is a run of one class with the spaces
    before it.
    """
    if any(" " in piece.lstrip(" ") for piece in pieces):  # not learnt by `train`
        return lambda text: [text]
    classes: dict[str, list[str]] = {}  # character → the characters of its class, one list shared by all of them
    for piece in pieces:
        first, *others = piece.lstrip(" ") or " "
        for character in (first, *others):
            classes.setdefault(character, [character])
        for other in others:
            large, small = classes[first], classes[other]
            if large is not small:
                if len(large) < len(small):
                    large, small = small, large
                large += small
                classes.update(dict.fromkeys(small, large))
    classes.pop(" ", None)
    sets = {id(members): "".join(map(re.escape, members)) for members in classes.values() if len(members) > 1}
    ordered = sorted(sets.values(), key=len, reverse=True)
    rest = f"[^{''.join(ordered)} ]"  # spelt in bytes, or a piece by itself
    return re.compile("|".join([f" *[{members}]+" for members in ordered] + [f" *{rest}+", " +"])).findall
