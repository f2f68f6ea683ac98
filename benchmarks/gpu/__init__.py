"""What a GPU makes of this project: `python -m benchmarks.gpu`, under nine minutes on one H100 or H200.

setting.py    sizes, device and documents of a run: the real ones, and toy ones that walk every stage on a CPU
timing.py     how long functions take on the device, and whether two compute the same
attention.py  attention beside SDPA, FlexAttention and varlen_attn; other tiles; what surrounds it in a block
rowwise.py    copies and matrix products (the ceilings); layer norm, GELU and cross-entropy beside torch's
training.py   training throughput, beside transformers' MegatronBert and ModernBert; where a micro-batch's time goes
steps.py      twenty steps of train.py itself
predict.py    what each figure should be, by a model of the chip: `python -m benchmarks.gpu.predict`
records.py    what was measured, kept as soon as it is; what need not be measured again
report.py     gpu.md, with the goals; plots.py: the three pictures
__main__.py   the plan, most valuable first, and the clock
"""

import time

BEGAN = time.monotonic()  # before torch is imported, which takes seconds that count
