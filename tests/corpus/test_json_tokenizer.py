"""Hugging Face's tokenizers behind our interface, with special ids first, as in BERT, or last, as in ModernBERT."""

from __future__ import annotations

import io
import json
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from data.prepare import main, prepare
from minisobert.corpus.loader import Rows
from minisobert.corpus.shards import open_shards
from minisobert.corpus.tokenizer import Tokenizer, Vocabulary, open_tokenizer, train
from minisobert.corpus.tokenizer_json import JsonTokenizer

tokenizers = pytest.importorskip("tokenizers")

TEXTS = ["How do I sort a list?", "for i in range(10):\n\tprint(i)", "naïve café, 東京 and 👍", "a [MASK] b </s>"]
SPECIAL = ["[UNK]", "[CLS]", "[SEP]", "[PAD]", "[MASK]"]


@cache  # training is not deterministic
def wordpiece() -> str:
    """[PAD] has id 0, then come the other special tokens, then lower-cased words."""
    made = tokenizers.Tokenizer(tokenizers.models.WordPiece(unk_token="[UNK]"))
    made.normalizer = tokenizers.normalizers.BertNormalizer()
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made.train_from_iterator(
        TEXTS * 5, tokenizers.trainers.WordPieceTrainer(vocab_size=200, special_tokens=special, show_progress=False)
    )
    made.enable_padding(length=50)
    made.enable_truncation(4)
    return made.to_str()


@cache
def byte_level(texts: tuple[str, ...] = (*TEXTS,) * 5, size: int = 300) -> str:
    """Bytes come first, then learnt pieces, then the special tokens."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(texts, trainer)
    made.add_special_tokens(SPECIAL)
    made.post_processor = tokenizers.processors.TemplateProcessing(
        "[CLS] $A [SEP]", special_tokens=[(name, made.token_to_id(name)) for name in ("[CLS]", "[SEP]")]
    )
    return made.to_str()


@pytest.mark.parametrize("make", [wordpiece, byte_level])
def test_ids_are_those_of_the_library_without_special_ones_padding_or_a_cut(make):
    ours, theirs = JsonTokenizer(make().encode()), tokenizers.Tokenizer.from_str(make())
    theirs.no_padding()
    theirs.no_truncation()
    for text in TEXTS[:3]:
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert ours.encode(text).tolist() == expected and len(expected) > 4
        assert np.frombuffer(ours.encode_bytes(text), "<u2").tolist() == expected


def test_what_is_written_like_a_special_token_is_text():
    for make in (wordpiece, byte_level):
        tokenizer = JsonTokenizer(make().encode())
        special = {tokenizer.vocabulary.mask, tokenizer.vocabulary.sep}
        assert not special & set(tokenizer.encode(TEXTS[3]).tolist())
    assert tokenizer.decode(tokenizer.encode(TEXTS[3])) == TEXTS[3]
    assert tokenizer.decode([tokenizer.vocabulary.mask]) == "[MASK]"


def test_the_numbers_of_a_vocabulary():
    first = JsonTokenizer(wordpiece().encode())
    assert first.vocabulary == Vocabulary(first.vocab_size, pad=0, cls=2, sep=3, mask=4, first=5, stop=first.vocab_size)
    last = JsonTokenizer(byte_level().encode())
    n = last.vocab_size - 5
    assert last.vocabulary == Vocabulary(n + 5, pad=n + 3, cls=n + 1, sep=n + 2, mask=n + 4, first=0, stop=n)


def test_a_corpus_in_the_ids_of_such_a_tokenizer(tmp_path):
    (tmp_path / "toy.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS * 20))
    (tmp_path / "tokenizer.json").write_text(byte_level())
    meta = prepare([tmp_path / "toy.jsonl"], tmp_path / "shards", workers=1, tokenizer=tmp_path)
    shards = open_shards(tmp_path / "shards", verify=True)
    tokenizer = open_tokenizer(tmp_path)
    assert shards.vocabulary == tokenizer.vocabulary and meta["vocab_size"] == tokenizer.vocab_size
    assert shards.tokenizer_file.read_text() == byte_level()
    decoded = {shards.tokenizer().decode(shards.tokens[a:b]) for a, b in zip(shards.offsets, shards.offsets[1:])}
    assert decoded == set(TEXTS)
    row = Rows(shards, shards.training_documents, 1, 64).micro_batch(0, 1, 0.3)
    starts = row.documents.bounds[:-1]
    assert set(row.tokens[starts].tolist()) <= {tokenizer.vocabulary.cls, tokenizer.vocabulary.pad}
    assert tokenizer.vocabulary.mask in row.tokens.tolist()

    damaged = json.loads((tmp_path / "shards/meta.json").read_text())
    damaged["vocabulary"]["mask"] = 7
    (tmp_path / "shards/meta.json").write_text(json.dumps(damaged))
    with pytest.raises(ValueError, match="other special ids than"):
        open_shards(tmp_path / "shards")


def test_a_tokenizer_of_ours_for_another_corpus(tmp_path):
    (tmp_path / "toy.txt").write_text("\n".join(TEXTS[:1] * 30))
    (tmp_path / "tokenizer.model").write_bytes(train(TEXTS * 5, 330))
    for where in (tmp_path, tmp_path / "tokenizer.model"):
        out = tmp_path / f"shards of {where.name}"
        prepare([tmp_path / "toy.txt"], out, workers=1, tokenizer=where)
        assert (out / "tokenizer.model").read_bytes() == (tmp_path / "tokenizer.model").read_bytes()
        shards = open_shards(out)
        expected = Tokenizer(tmp_path / "tokenizer.model").encode(TEXTS[0])
        assert shards.tokens[: shards.offsets[1]].tolist() == expected.tolist()


@pytest.mark.parametrize(("content", "expected"), [
    ("{}", "not a valid tokenizer.json"),
    (tokenizers.Tokenizer(tokenizers.models.BPE({"a": 0}, [])).to_str(), "none of the tokens [PAD] or <pad>"),
    ("", "not a SentencePiece model"),
])  # fmt: skip
def test_what_cannot_be_used(content, expected, tmp_path, capsys):
    refused(tmp_path, capsys, content, expected)


def refused(tmp_path: Path, capsys, content: str, expected: str, *more: str) -> None:
    (tmp_path / "given").write_text(content)
    (tmp_path / "toy.txt").write_text("text\n" * 30)
    with pytest.raises(SystemExit) as left:
        main(["--input", str(tmp_path / "toy.txt"), "--out", str(tmp_path / "out"), "--tokenizer",
              str(tmp_path / "given"), *more])  # fmt: skip
    assert left.value.code == 2
    assert expected in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "out").exists()


def test_two_vocabularies_at_once(tmp_path, capsys):
    refused(tmp_path, capsys, byte_level(), "leave --vocab-size out", "--vocab-size", "400")


def test_a_folder_with_the_tokenizer_model_of_another_library(tmp_path):
    """Gemma's folders are such; their tokenizer.json counts."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 5), model_writer=model, vocab_size=60, hard_vocab_limit=False, minloglevel=2
    )
    (tmp_path / "tokenizer.model").write_bytes(model.getvalue())
    with pytest.raises(ValueError, match="is not a tokenizer of minisobert: its first pieces are"):
        open_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(byte_level())
    assert open_tokenizer(tmp_path).vocabulary == JsonTokenizer(byte_level().encode()).vocabulary


def test_a_folder_without_a_tokenizer(tmp_path):
    with pytest.raises(ValueError, match=r"holds no tokenizer.model and no tokenizer.json"):
        open_tokenizer(tmp_path)


def test_a_lone_surrogate():
    with pytest.raises(ValueError, match="lone surrogate"):
        JsonTokenizer(byte_level().encode()).encode("a \ud800")
