"""The HTML that the page of `minisobert.playground` shows for a post: a card for each model.

All text from users and files (posts, classes, types of entities, names of models) goes through `shown`, so that a
browser displays it and never executes it. All other markup comes from this file. Nothing here needs gradio.
"""

from __future__ import annotations

import io
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import redirect_stderr
from functools import lru_cache
from html import escape
from typing import NamedTuple

import numpy as np

from minisobert.corpus.packing import SPECIALS
from minisobert.finetuning import apply
from minisobert.inference import Entity, Loaded, guess, with_masks
from minisobert.model import MaskedLM

LONGEST = 100_000  # characters of a post; a post on Stack Overflow has up to 30,000
TOKENS = 2_000  # tokens that are drawn; more make a browser slow
MASKS = 50  # masks at a time: each costs a row of the vocabulary's size
LINES = 500  # texts to compare with; each goes through the model while a person waits
NEAREST = 5  # nearest texts shown
SHOWN = 300  # characters of each
COLOURS = 5  # colours that tokens take in turn; page.css defines them
GOLDEN = 137.5  # degrees of hue between two types of entities; keeps any number of them apart

HINT = "Paste a post: its tokens, and what each model makes of it, appear here."

# characters that a browser would not show, or that reverse the order of letters; half of a surrogate pair cannot even
# be sent to it
_ODD = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff]")

_MARKS = {" ": "<i>·</i>", "\t": "<i>⇥</i>", "\n": "<i>↵</i>"}


def shown(text: str) -> str:
    """A text escaped as HTML. Characters without a visible shape are shown by their number."""
    return _ODD.sub(lambda found: f'<i class="odd">U+{ord(found[0]):04X}</i>', escape(text))


def piece(text: str) -> str:
    """The text of a token, with a mark in place of each space, tab and line end."""
    return "".join(_MARKS.get(character) or shown(character) for character in text)


class Mask(NamedTuple):
    """A span of a post's ids that was clicked on, for one of the models."""

    model: int
    start: int
    stop: int


class Chip(NamedTuple):
    """Tokens that are shown as one: usually a single token, or all bytes of a character that is spelt in bytes."""

    text: str
    start: int  # the ids [start, stop)
    stop: int


def chips(decode: Callable[[list[int]], str], ids: Sequence[int]) -> list[Chip]:
    found, at = [], 0
    while at < len(ids):
        sizes = range(1, min(4, len(ids) - at) + 1)  # a character has at most four bytes
        whole = (n for n in sizes if "\N{REPLACEMENT CHARACTER}" not in decode(list(ids[at : at + n])))
        stop = at + next(whole, 1)
        found.append(Chip(decode(list(ids[at:stop])), at, stop))
        at = stop
    return found


def tokens(
    model: int,
    found: Iterable[Chip],
    ids: Sequence[int],
    masked: Sequence[int],
    typed: Collection[int],
    best: Sequence[str],
) -> str:
    """The tokens of a text, to be clicked on.

    model: its number, which a click sends back. ids: of the text; masked: the indices that the model does not see, in
    order; typed: those of them where the text itself has [MASK]; best: the likeliest piece for each of masked.
    """  # fmt: skip
    likeliest, parts = dict(zip(masked, best)), []
    for i, chip in enumerate(found):
        places = range(chip.start, chip.stop)
        numbers, text = " ".join(str(ids[place]) for place in places), chip.text
        kind, says = f"c{i % COLOURS}", f"id {numbers}; a click masks it"
        if chip.start in likeliest:
            text = "".join(likeliest.get(place, "") for place in places)
            kind, says = "masked", "a click shows the word again"
        click = f' role="button" tabindex="0" data-mask="{model} {chip.start} {chip.stop}"'
        if chip.start in typed:
            says, click = "[MASK] of the text itself", ""
        parts.append(f'<span class="token {kind}" title="{says}"{click}>{piece(text)}</span>')
        parts.append("<br>" * min(chip.text.count("\n"), 2))
    return f'<div class="tokens">{"".join(parts)}</div>'


def bars(rows: Iterable[tuple[str, float]], chosen: Collection[str] = (), percent: bool = True, mark=shown) -> str:
    """A row for each (name, share), with a bar as long as the share, at most 1. chosen: names to highlight. mark: turns
    a name into HTML."""
    parts = []
    for name, share in rows:
        kind = "row chosen" if name in chosen else "row"
        width = 100 * min(max(share, 0.0), 1.0) if math.isfinite(share) else 0.0
        figure = f"{share:.1%}" if percent else f"{share:.3f}"
        parts.append(
            f'<div class="{kind}"><span class="name">{mark(name)}</span><span class="bar">'
            f'<b style="width:{width:.1f}%"></b></span><span class="figure">{figure}</span></div>'
        )
    return f'<div class="bars">{"".join(parts)}</div>'


def entities(text: str, found: Sequence[Entity]) -> str:
    """The text with its entities in the colours of their types, below a line that counts each type."""
    counts = Counter(entity.kind for entity in found)
    hues = {kind: GOLDEN * i % 360 for i, kind in enumerate(sorted(counts))}
    parts, at = [], 0
    for entity in found:
        parts.append(shown(text[at : entity.start]))
        parts.append(
            _entity(text[entity.start : entity.stop], hues[entity.kind], f"<small>{shown(entity.kind)}</small>")
        )
        at = entity.stop
    legend = "".join(_entity(kind, hues[kind], f"<small>{counts[kind]}</small>") for kind in hues)
    return f'<div class="legend">{legend}</div><div class="post">{"".join(parts)}{shown(text[at:])}</div>'


def _entity(text: str, hue: float, after: str) -> str:
    return f'<mark style="--hue:{hue:.0f}">{shown(text)}{after}</mark>'


def note(text: str, kind: str = "note") -> str:
    return f'<p class="{kind}">{shown(text)}</p>'


def card(name: str, does: str, content: str) -> str:
    return f'<section class="card"><h3>{shown(name)}<small>{does}</small></h3>{content}</section>'


class Page:
    """Makes the HTML for a post, with what some models say about it."""

    def __init__(self, models: Sequence[tuple[str, Loaded]], texts: Sequence[str] = (), best: int = 5):
        """models: with their names. texts: to compare a post with, besides those typed. best: guesses for each mask."""
        self.models, self.texts, self.best = models, tuple(texts), best
        # cached, so that a click on a word only asks the models for its guesses
        self._answers = lru_cache(4 * len(models))(self._answer)
        self._vectors = lru_cache(4 * len(models))(self._embed)
        # embedded here, while a terminal can show progress: a file may be long
        self._ready = {i: self._embed(i, self.texts) for i, (_, model) in enumerate(models) if texts and _embeds(model)}

    def __call__(self, post: str, lines: str = "", masked: Collection[Mask] = ()) -> str:
        """The HTML. lines: texts to compare the post with, one per line. masked: what the models must not see."""
        try:
            post = _checked(post, "the post")
            others = tuple(line for line in _checked(lines, "the list of texts").split("\n") if line.strip())
            if len(others) > LINES:
                raise ValueError(
                    f"the list has {len(others):,} texts, and up to {LINES:,} fit; give more with --texts FILE"
                )
        except ValueError as error:
            return note(str(error), "error")
        if not post.strip():
            return note(HINT, "hint")
        parts = []
        for i, (_, model) in enumerate(self.models):
            if isinstance(model.model, MaskedLM):
                parts.append(self._card(i, "tokens and guesses", self._guesses, post, masked))
            parts.append(self._answers(i, post, others))
        return "".join(parts)

    def _card(self, i: int, does: str, content: Callable[..., str], *args) -> str:
        """A card with the content and what the library printed meanwhile, or the reason why there is no content."""
        with redirect_stderr(io.StringIO()) as said:
            try:
                html = content(i, *args)
            except ValueError as error:
                html = note(str(error), "error")
        # a line with a carriage return is a progress bar
        notes = (note(line) for line in said.getvalue().split("\n") if line.strip() and "\r" not in line)
        return card(self.models[i][0], does, html + "".join(notes))

    def _answer(self, i: int, post: str, others: tuple[str, ...]) -> str:
        model = self.models[i][1]
        if _answers(model.classify):
            return self._card(i, "labels", self._labels, post)
        if _answers(model.numbers):
            return self._card(i, "number", self._number, post)
        if _answers(model.entities):
            return self._card(i, "entities", self._entities, post)
        if _embeds(model) and (others or self.texts):
            return self._card(i, "nearest texts", self._nearest, post, others)
        return ""

    def _guesses(self, i: int, post: str, masked: Collection[Mask]) -> str:
        model = self.models[i][1]
        ids, typed = with_masks(model, post) if "[MASK]" in post else (model.tokenizer.encode(post), [])
        longest = model.model.config.positions - SPECIALS
        count, ids = len(ids), [int(n) for n in ids[:longest]]
        typed = [place for place in typed if place < longest]
        clicked = [
            place for mask in masked if mask.model == i for place in range(max(mask.start, 0), min(mask.stop, len(ids)))
        ]
        order = {place: when for when, place in enumerate(clicked)}
        places = sorted({*clicked, *typed})
        if len(places) > MASKS:
            raise ValueError(f"{len(places):,} tokens are masked; the page guesses up to {MASKS} at a time")
        found = guess(model, np.array(ids), places, self.best) if places else []
        rows = dict(zip(places, found))
        best = [row[0][0] for row in found]
        parts = [tokens(i, chips(model.tokenizer.decode, ids[:TOKENS]), ids, places, typed, best)]
        if len(ids) > TOKENS:
            parts.append(note(f"the first {TOKENS:,} of {len(ids):,} tokens are drawn"))
        if count > longest:
            parts.append(note(f"the post has {count:,} tokens, of which the model reads the first {longest:,}"))
        parts += [] if places else [note("Click a word to mask it.")]
        blocks = []
        for place in sorted(places, key=lambda place: -order.get(place, -1)):  # the last one clicked comes first
            was = "" if place in typed else model.tokenizer.decode([ids[place]])
            title = f"in place of <b>{piece(was)}</b>" if was else "for <b>[MASK]</b>"
            blocks.append(f"<div><h4>{title}</h4>{bars(rows[place], {was}, mark=piece)}</div>")
        return f'{"".join(parts)}<div class="guesses">{"".join(blocks)}</div>'

    def _labels(self, i: int, post: str) -> str:
        model = self.models[i][1]
        (p,) = model.classify([post])
        likeliest = [int(n) for n in np.argsort(-p, kind="stable")[: apply.LIKELIEST]]
        several = abs(p.sum() - 1) > 1e-3
        chosen = apply.classes(model.labels, p) if several else [model.labels[likeliest[0]]]
        html = bars([(model.labels[n], float(p[n])) for n in likeliest], chosen)
        rest = len(p) - len(likeliest)
        return html + (note(f"and {rest:,} less likely ones") if rest else "")

    def _number(self, i: int, post: str) -> str:
        model = self.models[i][1]
        (found,) = model.numbers([post])
        return f'<p class="number">{shown(model.labels[0])} <b>{found:.6g}</b></p>'

    def _entities(self, i: int, post: str) -> str:
        (found,) = self.models[i][1].entities([post])
        return entities(post, found) + ("" if found else note("no entities"))

    def _nearest(self, i: int, post: str, others: tuple[str, ...]) -> str:
        texts = (*others, *self.texts)
        (vector,) = self._vectors(i, (post,))
        vectors = [self._vectors(i, others)] if others else []
        vectors += [self._ready[i]] if self.texts else []
        cosines = np.concatenate(vectors) @ vector
        nearest = [int(n) for n in np.argsort(-cosines, kind="stable")[:NEAREST]]
        rows = [(texts[n][:SHOWN] + "…" * (len(texts[n]) > SHOWN), float(cosines[n])) for n in nearest]
        says = f"by cosine, of {len(texts):,}"
        if isinstance(self.models[i][1].model, MaskedLM):
            says += "; a model that was only pre-trained finds little: fine-tune it for retrieval"
        return f'<div class="texts">{bars(rows, percent=False)}</div>{note(says)}'

    def _embed(self, i: int, texts: Sequence[str]) -> np.ndarray:
        """(n, h) vectors of length 1, so that products are cosines."""
        vectors = self.models[i][1].embed(list(texts))
        return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)


def _embeds(model: Loaded) -> bool:
    return not model.labels and _answers(model.embed)


def _answers(question: Callable) -> bool:
    """Whether a model supports this method."""
    try:
        question([])
    except ValueError:
        return False
    return True


def _checked(text: str, what: str) -> str:
    if len(text) > LONGEST:
        raise ValueError(f"{what} has {len(text):,} characters; the page reads up to {LONGEST:,}")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} holds half of a surrogate pair, which is not a character; paste it again") from None
    return text.replace("\r\n", "\n")
