"""The learning rate, as a function of tokens: linear warm-up from 0, then one of two decays to a fraction of the peak.

linear    falls linearly from the end of the warm-up on
wsd       warm-up, stable, decay: stays, then falls as 1 - sqrt(part of the decay that is over) (Hägele et al. 2024)
"""

from __future__ import annotations


def learning_rate(
    schedule_tokens: int,
    train_tokens: int,
    peak: float,
    warmup_fraction: float,
    final_fraction: float,
    decay_fraction: float | None = None,
) -> float:
    """The rate of the step after which schedule_tokens row positions have been trained on, its own included.

    So the first step has a rate above 0, and the last one runs at final_fraction × peak. (Megatron-LM counts the tokens
    before the step: its first step has the rate 0.)

    decay_fraction: the part of train_tokens in which `wsd` decays; None: `linear`.
    """
    warmup = warmup_fraction * train_tokens
    if schedule_tokens < warmup:
        return peak * schedule_tokens / warmup
    if decay_fraction is None:
        part = min((schedule_tokens - warmup) / (train_tokens - warmup), 1)
    else:
        decay = decay_fraction * train_tokens
        part = min(max(schedule_tokens - (train_tokens - decay), 0) / decay, 1) ** 0.5
    return peak * (1 - (1 - final_fraction) * part)
