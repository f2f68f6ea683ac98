"""The tiles that attention's kernels use on each chip.

Each entry is (rows that a program holds, rows of a tile that it visits, warps, stages of the pipeline that loads them),
by (bytes of an element, width of a head), for three chips: sm_80 and others, sm_90, sm_100. The tiles were chosen
because they compile without spilling and take few instructions per score. They have not been tuned on a GPU yet.
"""

FORWARD = {
    (2, 32): [(128, 64, 4, 3)] * 3,
    (2, 64): [(128, 64, 4, 3)] * 3,
    (2, 96): [(64, 64, 4, 3), (128, 128, 8, 3), (64, 64, 4, 3)],
    (2, 128): [(64, 64, 4, 3)] * 3,
    (4, 32): [(32, 16, 4, 2)] * 3,
    (4, 64): [(32, 16, 4, 2)] * 3,
    (4, 96): [(32, 16, 8, 1)] * 3,
    (4, 128): [(16, 16, 4, 2)] * 3,
}
FORWARD_DROPOUT = {
    **FORWARD,
    (2, 32): [(128, 64, 4, 3), (128, 64, 4, 3), (64, 64, 4, 3)],
    (2, 64): [(64, 64, 4, 3), (128, 128, 8, 3), (64, 64, 4, 3)],
}
# A window takes registers and favours small tiles: a tile of r rows visits r + 2w tokens, and a row sees 2w + 1
FORWARD_WINDOW = {**FORWARD, (2, 64): [(64, 64, 4, 3), (64, 64, 4, 3), (64, 64, 4, 2)]}
QUERY_GRADIENT = {
    (2, 32): [(128, 64, 8, 2), (128, 128, 8, 3), (128, 64, 8, 2)],
    (2, 64): [(128, 64, 8, 2), (128, 128, 8, 3), (128, 64, 8, 2)],
    (2, 96): [(128, 32, 8, 2), (64, 64, 4, 3), (128, 64, 8, 2)],
    (2, 128): [(64, 64, 4, 2), (128, 64, 8, 3), (128, 64, 8, 2)],
    (4, 32): [(32, 16, 4, 2)] * 3,
    (4, 64): [(32, 16, 4, 2)] * 3,
    (4, 96): [(16, 16, 4, 2)] * 3,
    (4, 128): [(16, 16, 4, 1), (16, 16, 4, 2), (16, 16, 4, 2)],
}
QUERY_GRADIENT_WINDOW = {
    **QUERY_GRADIENT,
    (2, 64): [(128, 64, 8, 2), (64, 64, 4, 3), (128, 64, 8, 2)],
    (4, 64): [(32, 16, 4, 2), (32, 16, 4, 2), (32, 16, 8, 2)],
}
KEY_GRADIENT = {
    (2, 32): [(128, 64, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2)],
    (2, 64): [(128, 64, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2)],
    (2, 96): [(64, 16, 4, 2), (64, 32, 4, 3), (128, 32, 8, 2)],
    (2, 128): [(64, 64, 8, 2), (128, 32, 8, 1), (128, 32, 8, 2)],
    (4, 32): [(32, 16, 4, 1)] * 3,
    (4, 64): [(32, 16, 4, 1)] * 3,
    (4, 96): [(32, 16, 8, 2)] * 3,
    (4, 128): [(32, 16, 8, 2)] * 3,
}
DELTA = 2_048, 4  # elements, warps
