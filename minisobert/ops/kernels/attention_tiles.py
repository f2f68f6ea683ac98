"""Which tiles attention's kernels take on which chip.

(rows that a program holds, rows of a tile it visits, warps, stages of the pipeline that loads them), by (bytes of an
element, padded width), for sm_80 and others, sm_90, sm_100. Chosen by what compiles without spilling and by
instructions per score, on no GPU yet.
"""

FORWARD = {
    (2, 32): [(128, 64, 4, 3)] * 3,
    (2, 64): [(128, 64, 4, 3)] * 3,
    (2, 128): [(64, 64, 4, 3)] * 3,
    (4, 32): [(32, 16, 4, 2)] * 3,
    (4, 64): [(32, 16, 4, 2)] * 3,
    (4, 128): [(16, 16, 4, 2)] * 3,
}
FORWARD_DROPOUT = {**FORWARD, (2, 32): [(64, 64, 4, 3)] * 3, (2, 64): [(64, 64, 4, 3)] * 3}
# A window takes registers too, and favours small tiles: one of r rows visits r + 2w where a row sees 2w + 1
FORWARD_WINDOW = {**FORWARD_DROPOUT, (2, 64): [(64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2)]}
QUERY_GRADIENT = {
    (2, 32): [(128, 64, 8, 2), (64, 64, 4, 2), (128, 64, 8, 2)],
    (2, 64): [(128, 64, 8, 2), (64, 64, 4, 2), (128, 64, 8, 2)],
    (2, 128): [(64, 64, 4, 2), (128, 64, 8, 2), (128, 64, 8, 2)],
    (4, 32): [(32, 16, 4, 2)] * 3,
    (4, 64): [(32, 16, 4, 2)] * 3,
    (4, 128): [(16, 16, 4, 2)] * 3,
}
KEY_GRADIENT = {
    (2, 32): [(128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 2)],
    (2, 64): [(128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 2)],
    (2, 128): [(64, 64, 8, 2), (128, 32, 8, 2), (128, 32, 8, 2)],
    (4, 32): [(32, 16, 4, 1)] * 3,
    (4, 64): [(32, 16, 4, 1)] * 3,
    (4, 128): [(32, 16, 8, 2)] * 3,
}
KEY_GRADIENT_WINDOW = {**KEY_GRADIENT, (2, 64): [(128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2)]}
DELTA, HASHES = (2_048, 4), (1_024, 4)  # elements, warps
