"""What the project wants of an H200, and what was measured."""

from __future__ import annotations

from dataclasses import dataclass

from benchmarks.gpu.records import Records
from benchmarks.gpu.words import called

TOKENS = 27e9  # of a whole pre-training
GOALS_PRICE = 3.0  # dollars per GPU-hour


@dataclass(frozen=True)
class Goal:
    what: str
    unit: str
    goal: float | None
    reach: float | None
    measured: float | None
    at_most: bool = False

    def met(self) -> str:
        """The highest mark that was met; empty where nothing was measured."""
        if self.measured is None:
            return ""
        marks = {"reach": self.reach, "goal": self.goal}
        sign = -1 if self.at_most else 1
        return next((name for name, mark in marks.items() if mark and sign * self.measured >= sign * mark), "no")


def ratio(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def goals(records: Records) -> list[Goal]:
    """Those of the project, which are meant for an H200."""

    def ours(lengths: str, dropout: float, direction: str) -> float | None:
        return records.get("attention", 64, lengths, dropout, "minisobert").get(f"{direction}_tflops")

    def total(name: str) -> float | None:
        result = records.get("attention", 64, "posts", 0.0, name)
        parts = ("forward_seconds", "backward_seconds", "build_seconds")
        return sum(result[part] for part in parts) if result else None

    def tokens(preset: str, lengths: str) -> float | None:
        return records.get("training", preset, lengths, 0.0, "minisobert").get("tokens_per_second")

    def cost(preset: str, lengths: str) -> float | None:
        speed = tokens(preset, lengths)
        return dollars(speed, GOALS_PRICE) if speed else None

    found = []
    for direction, goal, reach in (("forward", 350, 420), ("backward", 230, 300)):
        found.append(Goal(f"attention d = 64, whole rows, {direction}", "TFLOP/s", goal, reach,
                          ours("rows", 0.0, direction)))  # fmt: skip
    for direction in ("forward", "backward"):
        share = ratio(ours("posts", 0.0, direction), ours("rows", 0.0, direction))
        found.append(Goal(f"the same on posts, {direction}", "of the rate on whole rows", 0.8, None, share))
    found.append(Goal("the same on posts, beside FlexAttention and its mask", "times as fast", 1.5, None,
                      ratio(total("flex"), total("minisobert"))))  # fmt: skip
    for lengths in ("rows", "posts"):
        for direction in ("forward", "backward"):
            share = ratio(ours(lengths, 0.1, direction), ours(lengths, 0.0, direction))
            found.append(Goal(f"dropout 0.1, {called(lengths)}, {direction}", "of the rate without", 0.6, None, share))
    bandwidth = records.get("ceilings", "copy").get("bytes_per_second")
    for width in (768, 1_536):
        for direction in ("forward", "backward"):
            speed = records.get("add_norm", width, 0.0, "minisobert").get(f"{direction}_bytes_per_second")
            found.append(Goal(f"layer norm, {width:,} wide, {direction}", "of copy bandwidth", 0.85, None,
                              ratio(speed, bandwidth)))  # fmt: skip
    for preset, lengths, goal, reach in (("base", "rows", 475e3, 600e3), ("base", "posts", None, 800e3),
                                         ("large", "rows", 74e3, 100e3)):  # fmt: skip
        found.append(Goal(f"training {preset}, {called(lengths)}", "tokens/s", goal, reach, tokens(preset, lengths)))
    for preset, lengths, goal, reach in (("base", "rows", 47, 37), ("base", "posts", None, 28),
                                         ("large", "rows", 304, 225)):  # fmt: skip
        found.append(Goal(f"27 B tokens, {preset}, {called(lengths)}, at ${GOALS_PRICE:.0f} per hour", "dollars",
                          goal, reach, cost(preset, lengths), at_most=True))  # fmt: skip
    return found


def dollars(tokens_per_second: float, price: float) -> float:
    """For 27 billion tokens on one GPU."""
    return TOKENS / tokens_per_second / 3_600 * price
