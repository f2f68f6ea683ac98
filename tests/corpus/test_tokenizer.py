"""Every text comes back exactly, and the cache of chunks changes no id."""

import os
import string
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from minisobert.corpus import tokenizer as module
from minisobert.corpus.tokenizer import FIRST_ORDINARY_ID, MASK, PAD, SPECIAL_PIECES, Tokenizer, token_dtype, train

CODE = "\n".join(Path(path).read_text(encoding="utf-8") for path in (string.__file__, os.__file__))
FRENCH = "« Où est-ce ? » Ça dépend : l’été, à Noël… " * 20
steady = settings(deadline=None, derandomize=True)  # no deadline, since the first call builds the table of chunks


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train([CODE, FRENCH], 1_500))


@steady
@given(st.text(st.characters(exclude_categories=["Cs"])))
@example("\0a\0")
@example("\u2581 \u2581\u2581")
@example("\t\tx\r\n\n   y  ")
@example("[MASK][CLS] [PAD]<0x41>")
@example("\U0010ffff\ufeff\u200b")
def test_every_text_comes_back_exactly(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@steady
@given(st.text(st.sampled_from("ab  \n\t.,;()«é”…1_²Ωж中")))
def test_the_cache_gives_the_ids_that_sentencepiece_gives(tokenizer, text):
    assert tokenizer.encode(text).tolist() == tokenizer.sentencepiece.encode(text)


def test_real_text_gives_the_ids_that_sentencepiece_gives(tokenizer):
    for text in (CODE, FRENCH):
        assert tokenizer.encode(text).tolist() == tokenizer.sentencepiece.encode(text)


def test_text_is_cut_into_words_and_signs(tokenizer):
    assert tokenizer._chunks("def  path(a):\n    return") == ["def", "  path", "(", "a", "):\n", "    return"]


def test_a_full_cache_starts_over_and_changes_nothing(tokenizer, monkeypatch):
    expected = tokenizer.encode(CODE)
    monkeypatch.setattr(module._Cache, "LIMIT", 10)
    small = Tokenizer(tokenizer.sentencepiece.serialized_model_proto())
    assert (small.encode(CODE) == expected).all()
    assert 0 < len(small._cache) <= 10


def test_a_chunk_too_long_to_remember_is_encoded_all_the_same(tokenizer):
    text = "x" * 100_000
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert text not in tokenizer._cache


def test_no_text_encodes_to_a_special_piece(tokenizer):
    ids = tokenizer.encode("".join(SPECIAL_PIECES) + CODE)
    assert ids.min() >= FIRST_ORDINARY_ID
    assert tokenizer.decode([PAD, MASK]) == "[PAD][MASK]"


def test_newlines_and_indentation_are_pieces(tokenizer):
    assert len(tokenizer.encode("\n")) == 1
    assert len(tokenizer.encode("        ")) < 8


def test_half_a_character_decodes_to_the_replacement_mark(tokenizer):
    assert tokenizer.decode(tokenizer.encode("\U0001f600")[:2]) == "\ufffd"


def test_a_lone_surrogate_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"lone surrogate cannot be encoded: '\\ud800'"):
        tokenizer.encode("x a\ud800")


def test_training_text_may_have_no_spaces_or_one_long_line():
    long = "ab" * 100_000
    trained = Tokenizer(train([long, "x y\n" * 60_000], 300))
    assert trained.decode(trained.encode(long)) == long
    assert len(trained.encode("abab")) < 4  # the long line was used for training, not left out


def test_too_small_a_vocabulary_is_refused_with_the_least():
    with pytest.raises(ValueError, match=r"of 262 pieces is too small .* need at least (\d+)") as error:
        train([CODE], 262)
    least = int(str(error.value).split()[-1])
    assert Tokenizer(train([CODE], least)).vocab_size == least


def test_text_too_short_for_the_vocabulary_gives_fewer_pieces():
    assert 261 < Tokenizer(train(["abc abd"], 50_000)).vocab_size < 300


def test_no_text_is_refused():
    with pytest.raises(ValueError, match="no text"):
        train([], 1_000)


def test_what_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "t.model").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"t\.model is not a SentencePiece model"):
        Tokenizer(tmp_path / "t.model")


def test_ids_take_two_bytes_up_to_65536_pieces():
    assert token_dtype(65_536) == np.uint16
    assert token_dtype(65_537) == np.uint32


@pytest.mark.parametrize("kind", ["words", "spaces inside"])
def test_whatever_the_pieces_are_none_is_cut(kind):
    pieces = ["a", " a", "b.", "c", ".1", " "] + ["d e"] * (kind == "spaces inside")
    chunks = module._chunks_that_cut_no_piece(pieces)
    assert all(chunks(piece) == [piece] for piece in pieces)
    assert "".join(chunks("ab. c1  zz ")) == "ab. c1  zz "
