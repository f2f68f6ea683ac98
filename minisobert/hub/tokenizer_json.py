"""Our SentencePiece model as the files of a fast tokenizer of Hugging Face.

The two give the same ids, except in two rare cases that the format cannot express:

    U+2581              ours encodes it as bytes; theirs reads it as a space, which it marks in the pieces of both
    [MASK], [SEP], …    ours reads such words in a text as plain letters; theirs reads them as the special pieces

SentencePiece merges the two neighbours whose union is the piece with the highest score, and the leftmost of several. A
BPE of `tokenizers` has a list of pairs instead, and merges the pair that is first in the list. So the list has, for
each piece in the order of the scores, a pair for each way to cut it into two pieces.
"""

from __future__ import annotations

from minisobert.corpus.tokenizer import CLS, FIRST_ORDINARY_ID, MASK, PAD, SEP, SPECIAL_PIECES, UNK, Tokenizer
from minisobert.corpus.tokenizer_json import JsonTokenizer

_SPACE_MARK = "\u2581"
_ROLES = {"pad_token": PAD, "unk_token": UNK, "cls_token": CLS, "sep_token": SEP, "mask_token": MASK}


def tokenizer_files(tokenizer: Tokenizer | JsonTokenizer, longest: int) -> dict[str, dict]:
    """File name → content of all files, except the tokenizer.json that an imported model already has. longest: the
    number of tokens in a document that the model can read, [CLS] and [SEP] included."""
    # without this file, AutoTokenizer chooses a class by the model's type, which silently gives other ids
    common = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": longest,
        "model_input_names": ["input_ids", "attention_mask"],  # modernbert takes no token types
        "clean_up_tokenization_spaces": False,
        "padding_side": "right",
        "truncation_side": "right",
    }
    if isinstance(tokenizer, JsonTokenizer):
        roles = {f"{what}_token": name for what, name in tokenizer.special_names.items()}
        return {"tokenizer_config.json": {**common, **roles}, "special_tokens_map.json": roles}
    return {
        "tokenizer.json": _tokenizer(tokenizer),
        "tokenizer_config.json": {
            **common,
            "added_tokens_decoder": {str(i): _special(i) for i in range(FIRST_ORDINARY_ID)},
            **{role: SPECIAL_PIECES[i] for role, i in _ROLES.items()},
        },
        "special_tokens_map.json": {
            role: {name: value for name, value in _special(i).items() if name != "special"}
            for role, i in _ROLES.items()
        },
    }


def _special(i: int) -> dict:
    """A special piece as an AddedToken. [MASK] includes the space before it, as every piece does. Otherwise that space
    would be a piece of its own, which no model has seen before a mask."""
    return {
        "content": SPECIAL_PIECES[i],
        "single_word": False,
        "lstrip": i == MASK,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }


def _tokenizer(tokenizer: Tokenizer) -> dict:
    pieces = [tokenizer.sentencepiece.id_to_piece(i) for i in range(tokenizer.vocab_size)]
    cls, sep = ({"SpecialToken": {"id": SPECIAL_PIECES[i], "type_id": 0}} for i in (CLS, SEP))
    a, b = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")  # token types other than 0 were never trained
    mark, space = {"String": _SPACE_MARK}, {"String": " "}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, **_special(i)} for i in range(FIRST_ORDINARY_ID)],
        "normalizer": {"type": "Replace", "pattern": space, "content": _SPACE_MARK},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [cls, a, sep],
            "pair": [cls, a, sep, b, sep],
            "special_tokens": {
                piece: {"id": piece, "ids": [i], "tokens": [piece]}
                for i, piece in enumerate(SPECIAL_PIECES)
                if i in (CLS, SEP)
            },
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": mark, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": SPECIAL_PIECES[UNK],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": _merges(tokenizer, pieces),
        },
    }


def _merges(tokenizer: Tokenizer, pieces: list[str]) -> list[list[str]]:
    processor = tokenizer.sentencepiece
    learnt = {pieces[i]: i for i in range(FIRST_ORDINARY_ID, len(pieces)) if not processor.is_byte(i)}
    pairs = []
    for piece, i in learnt.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in learnt and right in learnt:
                pairs.append((-processor.get_score(i), learnt[left], learnt[right], [left, right]))
    return [pair for *_, pair in sorted(pairs)]
