"""The learning rate, as a function of tokens: linear warm-up from 0, then linear decay to a part of the peak."""

from __future__ import annotations


def learning_rate(schedule_tokens: int, train_tokens: int, peak: float, warmup_fraction: float, final_fraction: float):
    """For the step after which schedule_tokens row positions have been trained on, that step's own included.

    So no step is lost at a rate of 0, and the last one runs at final_fraction × peak. (Megatron-LM counts the tokens
    before the step: its first step has the rate 0.)
    """
    warmup = warmup_fraction * train_tokens
    if schedule_tokens < warmup:
        return peak * schedule_tokens / warmup
    part = min((schedule_tokens - warmup) / (train_tokens - warmup), 1)
    return peak * (1 - (1 - final_fraction) * part)
