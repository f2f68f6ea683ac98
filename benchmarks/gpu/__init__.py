"""Tests and measures this project on a GPU: `python -m benchmarks.gpu`, under nine minutes on one H100 or H200.

setting.py    sizes, device and documents of a run: the real ones, and toy ones that try every stage on a CPU
timing.py     measures how long functions take on the device, and checks that two compute the same
attention.py  attention beside SDPA, FlexAttention and varlen_attn; other tiles; what surrounds it in a block
rowwise.py    copies and matrix products (the ceilings); layer norm, GELU and cross-entropy beside torch's
training.py   training throughput, beside transformers' MegatronBert and ModernBert; where a micro-batch's time goes
steps.py      twenty steps of train.py itself
predict.py    predicts each figure from a model of the chip: `python -m benchmarks.gpu.predict`
records.py    saves each measurement at once, and knows which need not be repeated
report.py     writes gpu.md, with the goals; plots.py draws the three pictures
__main__.py   runs the plan, the most valuable measurements first, against the clock
"""

import time

BEGAN = time.monotonic()  # before the import of torch, whose seconds count too
