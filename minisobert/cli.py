"""The command line: a flag for each field of a config, and errors of one line that say what to do."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import os
import re
import signal
import sys
import time
import typing
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

PATIENCE = 30  # seconds

def option(
    default,
    help: str,
    choices: Sequence[str] | None = None,
    *,
    group: str = "",
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    most: float | None = None,
    resumable: bool = False,
    metavar: str = "PATH",
):
    """A field of a config: its default, its line of --help, and what it may be.

    group: the heading under which --help lists it. The bounds: least <= value <= most and above < value < below.
    resumable: whether a resumed run may change it. metavar: what --help calls the value of a text.
    """
    bounds = {"at least": least, "more than": above, "less than": below, "at most": most}
    metadata = {"help": help, "choices": choices, "group": group, "resumable": resumable, "metavar": metavar}
    return dataclasses.field(default=default, metadata={**metadata, "bounds": bounds})


_WITHIN = {
    "at least": lambda value, bound: value >= bound,
    "more than": lambda value, bound: value > bound,
    "less than": lambda value, bound: value < bound,
    "at most": lambda value, bound: value <= bound,
}


def check_options(config) -> None:
    """Raises ValueError for the first field of a config that is out of its bounds or not one of its choices."""
    for f in dataclasses.fields(config):
        value, choices = getattr(config, f.name), f.metadata["choices"]
        bounds = {which: bound for which, bound in f.metadata["bounds"].items() if bound is not None}
        if not all(_WITHIN[which](value, bound) for which, bound in bounds.items()):  # NaN is within none
            allowed = " and ".join("finite" if bound == math.inf else f"{w} {bound:,}" for w, bound in bounds.items())
            raise ValueError(f"{flag(f.name)} is {value:,}; it must be {allowed}")
        if choices and value != f.default and value not in choices:
            raise ValueError(f"{flag(f.name)} is {value!r}; choose {words(choices)}")


def nearest(values: list[int], wanted: int) -> list[int]:
    """The up to three values nearest to the one wanted, in order."""
    return sorted(sorted(values, key=lambda n: abs(n - wanted))[:3])


def words(values: Iterable, joint: str = "or") -> str:
    """`1, 2 or 4`."""
    values = [str(value) for value in values]
    return values[0] if len(values) == 1 else f"{', '.join(values[:-1])} {joint} {values[-1]}"


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, with the option that was probably meant. Exit status 2."""

    def error(self, message: str):
        if message.startswith("unrecognized arguments: "):
            unknown = message.split(": ", 1)[1].split()[0]
            near = _meant(unknown.split("=")[0], list(self._option_string_actions))
            message = f"unknown option {unknown}" + (f"; did you mean {near}?" if near else "; see --help")
        fail(f"{self.prog}: {message}")


def _meant(unknown: str, options: list[str]) -> str | None:
    """Of the options, the one that a misspelt or abbreviated one stands for, if any."""
    typed = unknown.strip("-").replace("_", "-").lower()
    parts = {option: option.strip("-").split("-") for option in options if option.startswith("--")}
    abbreviated = [o for o, names in parts.items() if typed in ("".join(n[0] for n in names), "".join(names))]
    holding = [o for o, names in parts.items() if set(typed.split("-")) <= set(names)]
    close = difflib.get_close_matches(f"--{typed}", parts, n=1, cutoff=0.7)
    return next(iter([*abbreviated, *close, *holding]), None)


def fail(message: object) -> NoReturn:
    """What a user's mistake ends in: one line on standard error, exit status 2.

    torchrun kills all ranks when one exits. So the first rank speaks, and the others, which as a rule have found the
    same mistake, wait for that; one that is alone with it is still there afterwards, and speaks too.
    """
    if int(os.environ.get("RANK", 0)) > 0:
        time.sleep(PATIENCE)
    print(" ".join(str(message).split()), file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def command(name: str, stopped: str = "nothing was written") -> Iterator[None]:
    """What a command does its work in: a mistake ends in one line and status 2, Ctrl-C in 130, SIGTERM in 143.

    A signal raises KeyboardInterrupt, so that the block clears up behind itself; those that follow within PATIENCE are
    ignored, so that it can. stopped: what the message says of the work.
    """
    received, when = signal.SIGINT, -math.inf

    def stop(number, frame):
        nonlocal received, when
        if time.monotonic() - when > PATIENCE:
            received, when = number, time.monotonic()
            raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number, handler in before.items():
            if handler != signal.SIG_IGN:  # as a shell asks of what it runs in the background
                signal.signal(number, stop)
        yield
    except KeyboardInterrupt:
        print(f"{name}: interrupted; {stopped}", file=sys.stderr)
        raise SystemExit(128 + received) from None
    except (ValueError, OSError) as error:
        fail(f"{name}: {error}")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def parse(cls, argv: list[str] | None = None, prog: str | None = None, description: str | None = None):
    """A config from command-line words, one flag per field in kebab case. Mistakes leave by `fail`."""
    parser = Parser(prog=prog, description=description, allow_abbrev=False)
    types, groups = typing.get_type_hints(cls), {}
    for f in dataclasses.fields(cls):
        title, help = f.metadata["group"], f.metadata["help"]
        group = groups.setdefault(title, parser.add_argument_group(title) if title and title not in groups else parser)
        kind = types[f.name]
        if kind is bool:
            group.add_argument(flag(f.name), action="store_true", help=help.replace("%", "%%"))
            continue
        several = kind == tuple[str, ...]
        default = f"{f.default:,}" if kind is int and f.default >= 10_000 else f.default
        shown = "" if default in ("", ()) else f" (default {default})"
        group.add_argument(
            flag(f.name),
            type={int: _integer, float: _number}.get(kind, str),
            nargs="+" if several else None,
            default=f.default,
            metavar=None if f.metadata["choices"] else {int: "N", float: "X"}.get(kind, f.metadata["metavar"]),
            choices=f.metadata["choices"],
            help=f"{help}{shown}".replace("%", "%%"),
        )
    values = vars(parser.parse_args(argv))
    try:
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in values.items()})
    except ValueError as error:
        parser.error(str(error))


_THOUSANDS = re.compile(r"[+-]?\d{1,3}(,\d{3})+(\.\d*)?")


def number(text: str) -> float:
    """`0.5`, `1e-4`, `1_000` or `1,000`. Raises ValueError on anything else."""
    return float(text.replace(",", "") if _THOUSANDS.fullmatch(text.strip()) else text)


def whole_number(text: str) -> int:
    """`524288`, `524_288`, `524,288` or `27e9`. Raises ValueError or OverflowError on anything else."""
    value = number(text)
    if value != int(value):
        raise ValueError(text)
    return int(value) if abs(value) < 2**53 else int(text.replace(",", ""))  # above, not every float is exact


def _integer(text: str) -> int:
    try:
        return whole_number(text)
    except (ValueError, OverflowError):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number (27e9 and 524,288 are)") from None


def _number(text: str) -> float:
    try:
        return number(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number (0.1 and 1e-4 are)") from None
