"""The parts of attention's kernels: tiles, products of tiles, and which tiles of the other side a tile visits.

Heads are 32, 64, 96 or 128 wide, but the width of a tile must be a power of two. So a tile of 96 columns is two tiles,
of 64 and of 32, and a product over the width is the sum of two: a quarter less work than with one tile of 128. REST is
the width of the second part. It is 0 if there is none; then functions return the first part in its place, and no code
is compiled for it.
"""

from __future__ import annotations

import triton
import triton.language as tl

# The functions' arguments:
#   ROWS, D, REST      the rows of a tile, and the widths of its two parts
#   x_rest, y_rest     the second parts of tiles whose first parts are x and y
#   PRECISION          that of products: "ieee" for fp32, or "tf32"
#   start, stop        (T,) int32: the bounds of each token's document
#   tokens, window     T; how far away the tokens that a token sees may be, or None
#   rotation, sums     (2, T, d/2) fp32: cos and sin of rotary positions; (tiles, H, 3, d) fp32; each may be None


@triton.jit
def from_row(x, row, stride):
    """The pointer to x[row]. Loops advance it, which takes fewer instructions than multiplying each time."""
    # 64 bits: T * stride passes 2**31 at 0.9 million tokens of the base model's qkv
    return x + tl.cast(row, tl.int64) * stride


@triton.jit
def _tile(x, row, stop, stride, ROWS: tl.constexpr, D: tl.constexpr, CHECKED: tl.constexpr):
    """x[row : row + ROWS], (ROWS, D). stride: from row to row. CHECKED: rows from `stop` on are 0."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, D)
    at = from_row(x, row, stride) + (rows[:, None] * stride + columns[None, :])
    if CHECKED:
        return tl.load(at, rows[:, None] < stop - row, 0.0)
    return tl.load(at)


@triton.jit
def load(x, row, stop, stride, ROWS: tl.constexpr, D: tl.constexpr, REST: tl.constexpr, CHECKED: tl.constexpr):
    """Both parts of x[row : row + ROWS], (ROWS, D) and (ROWS, REST). stride, stop, CHECKED: see `_tile`."""
    first = _tile(x, row, stop, stride, ROWS, D, CHECKED)
    if REST:
        return first, _tile(x + D, row, stop, stride, ROWS, REST, CHECKED)
    else:  # without this else, the last line would be compiled even if REST is not 0
        return first, first


@triton.jit
def _store_part(x, value, row, stop, stride, ROWS: tl.constexpr, D: tl.constexpr):
    """x[row : row + ROWS] = value (ROWS, D), without the rows from `stop` on. stride: from row to row."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, D)
    at = from_row(x, row, stride) + (rows[:, None] * stride + columns[None, :])
    tl.store(at, value.to(x.dtype.element_ty), rows[:, None] < stop - row)


@triton.jit
def store(x, value, rest, row, stop, stride, ROWS: tl.constexpr, D: tl.constexpr, REST: tl.constexpr):
    """x[row : row + ROWS] = value (ROWS, D) and rest (ROWS, REST). stop, stride: see `_store_part`."""
    _store_part(x, value, row, stop, stride, ROWS, D)
    if REST:
        _store_part(x + D, rest, row, stop, stride, ROWS, REST)


@triton.jit
def _turned_back(x, rotation, row, tokens, ROWS: tl.constexpr, D: tl.constexpr):
    """x (ROWS, D) with each pair of columns i and i + D/2 rotated back by its angle, which depends on row and pair."""
    HALF: tl.constexpr = D // 2
    rows, pairs = row + tl.arange(0, ROWS), tl.arange(0, HALF)
    at = rotation + tl.cast(rows, tl.int64)[:, None] * HALF + pairs[None, :]
    cos = tl.load(at, rows[:, None] < tokens, 0.0)
    sin = tl.load(at + tl.cast(tokens, tl.int64) * HALF, rows[:, None] < tokens, 0.0)
    a, b = tl.split(tl.permute(tl.reshape(x, (ROWS, 2, HALF)), (0, 2, 1)))
    turned = tl.join(a * cos + b * sin, b * cos - a * sin)
    return tl.reshape(tl.permute(turned, (0, 2, 1)), (ROWS, D))


@triton.jit
def store_gradient(
    x, value, rest, rotation, sums, which: tl.constexpr, row, tokens, stride,
    ROWS: tl.constexpr, D: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    """`store` for the gradient of q, k or v (which: 0, 1, 2), with the same x, value, rest, row and stride. With a
    rotation, the gradient is first rotated back; REST must then be 0. With sums, the sum of the tile's rows is stored
    in sums[program of axis 0, program of axis 1, which]."""
    if rotation is not None:
        value = _turned_back(value, rotation, row, tokens, ROWS, D)
    store(x, value, rest, row, tokens, stride, ROWS, D, REST)
    if sums is not None:
        program = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
        sums += (program * 3 + which) * (D + REST)
        tl.store(sums + tl.arange(0, D), tl.sum(value, 0))  # rows after the last token see nothing, so they are 0
        if REST:
            tl.store(sums + D + tl.arange(0, REST), tl.sum(rest, 0))


@triton.jit
def zeros(ROWS: tl.constexpr, D: tl.constexpr, REST: tl.constexpr):
    """Both parts of a sum, (ROWS, D) and (ROWS, REST) fp32, filled with 0."""
    first = tl.zeros([ROWS, D], tl.float32)
    if REST:
        return first, tl.zeros([ROWS, REST], tl.float32)
    else:
        return first, first


@triton.jit
def across(x, x_rest, y, y_rest, REST: tl.constexpr, PRECISION: tl.constexpr):
    """x yᵀ: the products over the width of each row of x with each row of y."""
    product = tl.dot(x, tl.trans(y), input_precision=PRECISION)
    if REST:
        product = tl.dot(x_rest, tl.trans(y_rest), product, input_precision=PRECISION)
    return product


@triton.jit
def add_product(total, total_rest, x, y, y_rest, REST: tl.constexpr, PRECISION: tl.constexpr):
    """Both parts of total + x y, where total_rest is the second part of total. x is rounded to the dtype of y first."""
    x = x.to(y.dtype)
    total = tl.dot(x, y, total, input_precision=PRECISION)
    if REST:
        return total, tl.dot(x, y_rest, total_rest, input_precision=PRECISION)
    else:
        return total, total


@triton.jit
def uint32(x):
    return x.to(tl.uint32, bitcast=True)


@triton.jit
def line(x, first, stop, COUNT: tl.constexpr, CHECKED: tl.constexpr):
    """x[first : first + COUNT]. CHECKED: 0 from `stop` on."""
    return lines(x, x, first, stop, COUNT, CHECKED)[0]


@triton.jit
def lines(x, y, first, stop, COUNT: tl.constexpr, CHECKED: tl.constexpr):
    """x[first : first + COUNT] and the same of y, loaded as the columns of one tensor. CHECKED: 0 from `stop` on.

    Triton considers a load cheap if it has fewer numbers than the program has threads. Then every thread loads all the
    numbers that it uses: for 64 numbers along the rows of a tile, 16 copies by each of 128 threads.
    """
    index = (first + tl.arange(0, COUNT))[:, None]
    at = tl.where(tl.arange(0, 2)[None, :] == 0, x, y) + index
    if CHECKED:
        return tl.split(tl.load(at, index < stop, 0))
    return tl.split(tl.load(at))


@triton.jit
def stretches(start, stop, first, tokens, window, HELD: tl.constexpr, VISITED: tl.constexpr):
    """(lo, full, rest, hi), the edges of three stretches. The HELD rows from `first` on may see [lo, hi). In
    [full, rest), which is whole steps of VISITED, every row sees all tokens. Without a window [lo, full) is empty."""
    last = tl.minimum(first + HELD, tokens) - 1
    lo, hi = tl.load(start + first), tl.load(stop + last)
    # a tile with rows after the last token is masked, so that their gradients, which enter the sums, are 0
    one_document = (tl.load(start + last) == lo) & (first + HELD <= tokens)
    if window is None:
        full, rest = lo, tl.where(one_document, lo + (hi - lo) // VISITED * VISITED, lo)
    else:
        begin, end = tl.maximum(lo, last - window), tl.minimum(hi, first + window + 1)  # seen by first and last
        lo, hi = tl.maximum(lo, first - window), tl.minimum(hi, last + window + 1)
        full = lo + tl.cdiv(begin - lo, VISITED) * VISITED
        # without a whole step in the middle, all is in the last stretch, which alone may end in part of a step
        some = one_document & (full + VISITED <= end)
        full, rest = tl.where(some, full, lo), tl.where(some, full + (end - full) // VISITED * VISITED, lo)
    return lo, full, rest, hi


@triton.jit
def bounds(start, stop, rows, tokens, window):
    """The bounds of what each row sees, which is nothing for rows after the last token."""
    begin, end = tl.load(start + rows, rows < tokens, 0), tl.load(stop + rows, rows < tokens, 0)
    if window is not None:
        begin, end = tl.maximum(begin, rows - window), tl.minimum(end, rows + window + 1)
    return begin, end


@triton.jit
def sees(begin, end, index):
    """(rows, columns): whether a row, which sees [begin, end), sees each of the tokens `index`."""
    return (index[None, :] >= begin[:, None]) & (index[None, :] < end[:, None])
