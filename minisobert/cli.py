"""The command line: a flag for each field of a config, and one-line errors that say what to do."""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import math
import os
import re
import select
import shutil
import signal
import sys
import textwrap
import time
import typing
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from decimal import Decimal
from typing import NoReturn

from minisobert.commands import sentence, typed

PATIENCE = 30  # seconds
WIDTH = 100  # columns of --help, at most


def option(
    default,
    help: str,
    choices: Collection[str] | None = None,
    *,
    group: str = "",
    least: float | None = None,
    above: float | None = None,
    below: float | None = None,
    most: float | None = None,
    resumable: bool = False,
    metavar: str = "PATH",
    shown: str = "",
):
    """A field of a config: its default, its help text and its allowed values.

    group: the heading under which --help lists it. The bounds: least <= value <= most and above < value < below.
    resumable: whether a resumed run may change it. metavar: what --help calls the value of a text. shown: the default
    as --help gives it, if `default` is None because the config decides.
    """
    bounds = {"at least": least, "more than": above, "less than": below, "at most": most}
    metadata = {"help": help, "choices": choices, "group": group, "resumable": resumable, "metavar": metavar}
    return dataclasses.field(default=default, metadata={**metadata, "bounds": bounds, "shown": shown})


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
        if value is None:  # left open
            continue
        bounds = {which: bound for which, bound in f.metadata["bounds"].items() if bound is not None}
        if not all(_WITHIN[which](value, bound) for which, bound in bounds.items()):  # NaN is within none
            allowed = " and ".join("finite" if bound == math.inf else f"{w} {bound:,}" for w, bound in bounds.items())
            raise ValueError(f"{flag(f.name)} is {value:,}; it must be {allowed}")
        if choices and value != f.default and value not in choices:
            raise ValueError(f"{flag(f.name)} is {value!r}; choose {words(choices)}")


def nearest(values: list[int], wanted: int) -> list[int]:
    """Up to three of the values, those nearest to `wanted`, in increasing order."""
    return sorted(sorted(values, key=lambda n: abs(n - wanted))[:3])


def words(values: Iterable, joint: str = "or") -> str:
    """`1, 2 or 4`."""
    values = [str(value) for value in values]
    return values[0] if len(values) == 1 else f"{', '.join(values[:-1])} {joint} {values[-1]}"


def table(columns: Sequence[str], rows: Iterable[Sequence]) -> list[str]:
    """The lines of a Markdown table."""
    cells = ([str(cell).replace("|", "\\|") for cell in row] for row in rows)
    header = (column.replace("|", "\\|") for column in columns)
    return [f"| {' | '.join(header)} |", f"|{'---|' * len(columns)}", *(f"| {' | '.join(row)} |" for row in cells)]


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


class Parser(argparse.ArgumentParser):
    """argparse with a --help for newcomers and one-line errors (exit status 2) that suggest the option that was
    probably meant.

    prog: the command's name in commands.py; the description begins with its sentence there and continues with
    `description`. examples: the last part of --help, command lines as a user types them. usages: what to type after the
    command; by default, the required arguments.
    """

    def __init__(self, prog: str | None = None, description: str = "", examples: str = "", usages=(), **more):
        super().__init__(
            prog, description=" ".join(filter(None, [sentence(prog), description])), formatter_class=_Help,
            add_help=False, **more,
        )  # fmt: skip
        self.examples, self.usages = examples.strip(), usages
        self._positionals.title = "arguments"
        self.register("type", int, _integer)
        self.register("type", float, _number)
        # not listed: a user who sees the list has found it
        self.add_argument("-h", "--help", action="help", help=argparse.SUPPRESS)

    def format_help(self) -> str:
        lines, width = [], self._get_formatter()._width
        for usage in self.usages or [self._what_must_be_given()]:
            # a no-break space keeps an option and its value on one line
            unbroken = re.sub(r" (?=[A-Z…])", "\xa0", f"{typed(self.prog)} {usage}")
            lines += textwrap.wrap(
                unbroken, width, initial_indent=" " * 7, subsequent_indent=" " * 11, break_on_hyphens=False
            )
        self.usage = "\n".join(lines).strip().replace("\xa0", " ").replace("%", "%%")
        heading = "examples" if re.search(r"[^\\]\n", self.examples) else "example"  # an example may continue after a \
        examples = f"\n{heading}:\n{textwrap.indent(self.examples, '  ')}\n" if self.examples else ""
        return super().format_help() + examples

    def _what_must_be_given(self) -> str:
        formatter, given = self._get_formatter(), []
        for action in sorted(self._actions, key=lambda action: bool(action.option_strings)):
            if action.required or not action.option_strings:
                given += [*action.option_strings[:1], formatter._format_args(action, action.dest.upper())]
        others = any(a.help != argparse.SUPPRESS and a.option_strings and not a.required for a in self._actions)
        return " ".join([*given, *["[options]"] * others])

    def error(self, message: str):
        if message.startswith("unrecognized arguments: "):
            unknown = message.split(": ", 1)[1].split()[0]
            near = _meant(unknown.split("=")[0], list(self._option_string_actions))
            what = "unknown option" if unknown.startswith("-") else "unexpected argument"
            message = f"{what} {unknown}" + (f"; did you mean {words(near)}?" if near else "; see --help")
        fail(f"{self.prog}: {message}")


class _Help(argparse.HelpFormatter):
    """Lines are as wide as the terminal but at most WIDTH columns, or WIDTH without a terminal. Every default is shown.
    The overridden methods are private to argparse and may change; tests/test_help.py would fail then."""

    def __init__(self, prog: str, **more):
        columns = shutil.get_terminal_size((WIDTH, 24)).columns
        super().__init__(prog, max_help_position=32, width=min(columns, WIDTH), **more)

    def add_argument(self, action):
        super().add_argument(action)
        if isinstance(action, argparse._SubParsersAction):  # argparse forgets that their names are indented once more
            self._action_max_length += self._indent_increment

    def _metavar_formatter(self, action, default_metavar):
        if _has_long_choices(action):
            return lambda count: ("NAME",) * count
        return super()._metavar_formatter(action, default_metavar)

    def _format_args(self, action, default_metavar):
        if action.nargs == "+":  # argparse repeats the name: PATH [PATH ...]
            return f"{self._metavar_formatter(action, default_metavar)(1)[0]} …"
        return super()._format_args(action, default_metavar)

    def _get_help_string(self, action):
        text, default = action.help, action.default
        if _has_long_choices(action) and not all(choice in text for choice in action.choices):
            text += f"; one of {', '.join(action.choices)}"
        values = default if isinstance(default, (tuple, list)) else [default]
        if any(value not in (None, "") and value is not False for value in values) and "(default" not in text:
            text += f" (default: {' '.join(map(shown_default, values))})".replace("%", "%%")
        return text

    def _split_lines(self, text, width):
        text = " ".join(text.split()).replace("(default: ", "(default:\xa0")
        return [line.replace("\xa0", " ") for line in textwrap.wrap(text, width, break_on_hyphens=False)]

    def _fill_text(self, text, width, indent):
        return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _has_long_choices(action) -> bool:
    """Whether {a,b,c} would push the help of this option to a line of its own."""
    return action.metavar is None and len(f"{action.option_strings[:1]} {','.join(action.choices or ())}") > 30


def shown_default(value) -> str:
    """`10,000`, `0.1` or `600` (for 600.0)."""
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)


# options of other tools
_ELSEWHERE = {
    "batch-size": "tokens-per-batch", "epochs": "train-tokens", "max-steps": "train-tokens", "init": "model",
}  # fmt: skip


def _meant(unknown: str, options: list[str]) -> list[str]:
    """The options that an unknown one may stand for: a misspelling, an abbreviation, or another tool's name."""
    names = [option.removeprefix("--") for option in options if option.startswith("--")]
    typed = unknown.strip("-").replace("_", "-").lower()
    typed = _ELSEWHERE[typed] if _ELSEWHERE.get(typed) in names else typed
    parts = {name: name.split("-") for name in names}
    abbreviated = [n for n, of in parts.items() if typed in (n, "".join(of), "".join(part[0] for part in of))]
    holding = [name for name, of in parts.items() if set(typed.split("-")) <= set(of)]
    held = [n for n, of in parts.items() if set(of) <= set(typed.split("-")) or (len(n) > 2 and typed.startswith(n))]
    close = difflib.get_close_matches(typed, names, n=1, cutoff=0.7)
    found = abbreviated[:1] or holding[:3] or close or sorted(held, key=len)[-1:]
    return [f"--{name}" for name in found]


@contextmanager
def command(prog: str, stopped: str = "") -> Iterator[None]:
    """Runs a command, as a block or a decorated function. Errors that a user can do something about end it in one line.

    ValueError and OSError end in `fail`, Ctrl-C in status 130. It is no error if the reader of standard output closes
    it, as `| head` does.

    stopped: what is said about the work after Ctrl-C or SIGTERM (status 143). If it is given, the first signal raises
    KeyboardInterrupt, so that the block can clean up, and further signals within PATIENCE are ignored.
    """
    received, when, failure = signal.SIGINT, -math.inf, None

    def stop(number, frame):
        nonlocal received, when
        if time.monotonic() - when > PATIENCE:
            received, when = number, time.monotonic()
            raise KeyboardInterrupt

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)} if stopped else {}
    try:
        for number, handler in before.items():
            if handler != signal.SIG_IGN:  # a shell sets SIG_IGN for background jobs
                signal.signal(number, stop)
        try:
            yield
        finally:
            sys.stdout.flush()  # here, where errors can be caught, and not at interpreter exit
    except KeyboardInterrupt:
        print(f"{prog}: interrupted" + (stopped and f"; {stopped}"), file=sys.stderr)
        raise SystemExit(128 + received) from None
    except (ValueError, OSError) as error:
        failure = error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if isinstance(failure, BrokenPipeError) and _nobody_reads():
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0)
    if failure:
        fail(str(failure) and f"{prog}: {reason(failure)}")


def _nobody_reads() -> bool:
    """Whether standard output is a pipe whose reader is gone."""
    poll = select.poll()
    with suppress(ValueError):  # standard output is not a file
        poll.register(sys.stdout.fileno(), 0)
    return any(events & select.POLLERR for _, events in poll.poll(0))


def reason(error: BaseException) -> str:
    """The message of an error. For an OSError: the file and what is wrong with it, without the error number."""
    if isinstance(error, OSError) and error.strerror:
        file = error.filename2 or error.filename  # for a rename, the new name
        return f"{file}: {error.strerror}" if file else error.strerror
    return f"it has no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__


def fail(message: object) -> NoReturn:
    """Ends the process after a user's mistake: one line on standard error, exit status 2.

    torchrun kills all ranks when one exits. The other ranks have usually found the same mistake, so they wait and only
    rank 0 prints. A rank that is alone with its mistake outlives the wait and prints its own message, if it has one.
    """
    if int(os.environ.get("RANK", 0)) > 0:
        time.sleep(PATIENCE)
    if message:
        print(printable(" ".join(str(message).split())), file=sys.stderr)
    raise SystemExit(2)


def add_argument(
    group, name: str, kind: type, default, help: str, metavar: str | None, choices: Collection[str] | None = None
) -> None:
    """Adds a flag. kind: bool for a switch, tuple for one or more values."""
    help = help.replace("%", "%%")
    if kind is bool:
        group.add_argument(flag(name), action="store_true", help=help)
        return
    several = "+" if typing.get_origin(kind) is tuple or kind is tuple else None
    kind = kind if kind in (int, float) else str
    group.add_argument(
        flag(name), type=kind, nargs=several, default=default, metavar=metavar, choices=choices, help=help
    )


def parse(cls, argv: list[str] | None = None, prog: str | None = None, **more):
    """Parses command-line arguments into a config: one flag per field, in kebab case. more: arguments of Parser.
    Mistakes end in `fail`."""
    parser = Parser(prog, allow_abbrev=False, **more)
    types, groups = typing.get_type_hints(cls), {}
    for f in dataclasses.fields(cls):
        title, help, shown = f.metadata["group"], f.metadata["help"], f.metadata["shown"]
        group = groups.setdefault(title, parser.add_argument_group(title) if title and title not in groups else parser)
        kind = types[f.name]
        metavar = None if f.metadata["choices"] else {int: "N", float: "X"}.get(kind, f.metadata["metavar"])
        help += shown and f" (default: {shown})"
        add_argument(group, f.name, kind, f.default, help, metavar, f.metadata["choices"])
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
    return int(value) if abs(value) < 2**53 else int(Decimal(text.replace(",", "")))  # above, floats are not exact


# characters that move a terminal's cursor, change its colours or title, or reverse the order of letters
_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\u2028\u2029]")


def printable(text: str) -> str:
    """The text with U+FFFD in place of characters that control a terminal. Tabs and line ends stay."""
    return _CONTROLS.sub("\N{REPLACEMENT CHARACTER}", text)


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
