"""Which tokens a masked language model has to guess (Devlin et al. 2019): a share of the ordinary ones, each by itself.

Of those chosen, 80 % become [MASK], 10 % a random piece, and 10 % stay. Every choice is a hash of (row key, place in
the row), and a row key is a hash of (seed, purpose, epoch, row). So any rank makes the same masks and nothing is
stored. A token that is masked at a lower rate is also masked at a higher one.
"""

from __future__ import annotations

import numpy as np

from minisobert.corpus.tokenizer import Vocabulary
from minisobert.hashing import lowbias32

EVALUATION_RATE = 0.15  # whatever rate training uses, so that held-out losses can be compared
TO_MASK, TO_RANDOM = 0.8, 0.1  # the rest stays as it is


def mask_rows(
    tokens: np.ndarray, row_keys: np.ndarray, vocabulary: Vocabulary, rate: float = EVALUATION_RATE
) -> tuple[np.ndarray, np.ndarray]:
    """Masks `tokens` (rows, row_tokens) in place, except specials and padding. row_keys: (rows,) uint32; rate: 0 to 1.

    Returns (M,) int64 indices into the flat tokens and the (M,) int64 ids that were there. M may be 0.
    """
    first, ordinary = vocabulary.first, vocabulary.stop - vocabulary.first
    if ordinary < 1:
        raise ValueError(f"the vocabulary has {vocabulary.size} ids, and all of them are special")
    # three independent numbers per place: is it chosen, what becomes of it, which random piece
    place = np.arange(3 * tokens.shape[1], dtype=np.uint32).reshape(3, -1)
    chosen_by, fate_by, piece_by = lowbias32(place)

    chosen = lowbias32(row_keys[:, None] ^ chosen_by) < np.uint64(round(rate * 2**32))  # 2**32 chooses all
    chosen &= (tokens >= first) & (tokens < vocabulary.stop)
    row, column = np.nonzero(chosen)
    targets = tokens[row, column].astype(np.int64)

    fate = lowbias32(row_keys[row] ^ fate_by[column])
    piece = lowbias32(row_keys[row] ^ piece_by[column]).astype(np.uint64)
    piece = first + (piece * np.uint64(ordinary) >> np.uint64(32)).astype(np.int64)
    replaced = np.where(fate < _share(TO_MASK + TO_RANDOM), piece, targets)
    replaced[fate < _share(TO_MASK)] = vocabulary.mask
    tokens[row, column] = replaced
    return row * tokens.shape[1] + column, targets


def _share(probability: float) -> np.uint32:
    return np.uint32(round(probability * 2**32))
