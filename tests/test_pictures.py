"""The pictures in the docs are what the script draws, are legible in both colour schemes, and agree with the code."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
from test_docs import code
from torch import nn

from minisobert.config import PRESETS
from minisobert.corpus.loader import PREFETCH
from minisobert.model import Block, MaskedLM
from minisobert.parallel.data import lay_out

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs/pictures"
PICTURES = sorted(FOLDER.glob("*.svg"))
SHOWN_AT = 900  # pixels of width, at which the size of letters is judged
SMALLEST = 12  # pixels, the smallest letters at that width
CONTRAST = 4.5  # the lowest contrast of letters with what is behind them: WCAG 2.2, level AA

by_picture = pytest.mark.parametrize("path", PICTURES, ids=lambda path: path.stem)


def elements(path: Path, tag: str) -> list[ET.Element]:
    return list(ET.parse(path).getroot().iter("{http://www.w3.org/2000/svg}" + tag))


def numbers(element: ET.Element, *names: str) -> list[float]:
    return [float(element.get(name)) for name in names]


def words(name: str) -> list[str]:
    return [text.text for text in elements(FOLDER / f"{name}.svg", "text")]


def extent(text: ET.Element) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a text in DejaVu Sans, which is wider than the fonts of most readers."""
    font_manager, ft2font = pytest.importorskip("matplotlib.font_manager"), pytest.importorskip("matplotlib.ft2font")
    look = (text.get("class") or "").split()
    family, weight = "DejaVu Sans Mono" if "code" in look else "DejaVu Sans", "bold" if "bold" in look else "normal"
    file = font_manager.findfont(font_manager.FontProperties(family=family, weight=weight), fallback_to_default=False)
    font = ft2font.FT2Font(file)
    font.set_size(100, 72)
    font.set_text(text.text)
    x, y, size = numbers(text, "x", "y", "font-size")
    width = font.get_width_height()[0] / 64 * size / 100
    left = x - width * {"start": 0, "middle": 0.5, "end": 1}[text.get("text-anchor")]
    return left, y - 0.76 * size, left + width, y + 0.2 * size


def test_the_pictures_are_what_the_script_draws(tmp_path):
    subprocess.run([sys.executable, "-B", FOLDER / "draw.py", tmp_path], check=True)
    drawn = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert drawn == {path.name: path.read_text() for path in PICTURES}


@by_picture
def test_a_page_shows_it_and_tells_what_is_in_it(path):
    told = [alt for page in (ROOT / "README.md", *ROOT.glob("docs/*.md"))
            for alt, link in re.findall(r"!\[([^]]*)\]\(([^)]+)\)", page.read_text())
            if (page.parent / link).resolve() == path.resolve()]  # fmt: skip
    assert told
    assert min(len(alt.split()) for alt in told) >= 8


@by_picture
def test_letters_are_large_and_in_nobodys_way(path):
    width, height = numbers(ET.parse(path).getroot(), "width", "height")
    texts = [(text.text, extent(text)) for text in elements(path, "text")]
    small = [t.text for t in elements(path, "text") if float(t.get("font-size")) * SHOWN_AT / width < SMALLEST]
    cut_off = [name for name, (left, top, right, bottom) in texts
               if left < 4 or top < 4 or right > width - 4 or bottom > height - 4]  # fmt: skip
    collide = [(one, other) for (one, a), (other, b) in combinations(texts, 2)
               if a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]]  # fmt: skip
    across = []  # the edge of a box
    for box in elements(path, "rect"):
        if box.get("x") and "picked" not in box.get("class"):
            x, y, w, h = numbers(box, "x", "y", "width", "height")
            for name, (left, top, right, bottom) in texts:
                apart = right <= x or x + w <= left or bottom <= y or y + h <= top
                if not apart and not (x <= left and right <= x + w and y <= top and bottom <= y + h):
                    across.append((name, box.attrib))
    assert (small, cut_off, collide, across) == ([], [], [], [])


def luminance(colour: str) -> float:
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(weight * c for weight, c in zip((0.2126, 0.7152, 0.0722), linear))


@by_picture
def test_letters_stand_out_in_both_colour_schemes(path):
    (style,) = elements(path, "style")
    light, dark = (dict(re.findall(r"--([\w-]+):(#\w{6})", line)) for line in style.text.split("\n") if ":root" in line)
    assert light.keys() == dark.keys() >= set(re.findall(r"var\(--([\w-]+)\)", style.text))
    boxes = [box for box in elements(path, "rect") if box.get("x") and "hollow" not in box.get("class")]
    for text in elements(path, "text"):
        look = (text.get("class") or "").split()
        ink = next((name.replace("-ink", "-edge") for name in look if name.endswith("-ink")), None)
        ink = ink or ("muted" if "muted" in look else "ink")
        left, top, right, bottom = extent(text)
        behind = "ground"
        for box in boxes:
            x, y, w, h = numbers(box, "x", "y", "width", "height")
            if x < (left + right) / 2 < x + w and y < (top + bottom) / 2 < y + h and "picked" not in box.get("class"):
                behind = box.get("class").split()[0].removesuffix("-area")
        for scheme in (light, dark):
            low, high = sorted(luminance(scheme[name]) for name in (ink, behind))
            assert (high + 0.05) / (low + 0.05) >= CONTRAST, (text.text, ink, behind)


def test_the_buckets_are_those_of_base_on_eight_ranks():
    with torch.device("meta"):
        model = MaskedLM(dataclasses.replace(PRESETS["base"], vocabulary=50_048))
    places, buckets = lay_out({name: parameter.numel() for name, parameter in model.named_parameters()}, 8)
    assert [f"{i}: {(b.stop - b.start) / 1e6:.1f} M" for i, b in enumerate(buckets)] == [
        word for word in words("data-parallel") if re.fullmatch(r"\d: .* M", word)
    ]
    # blocks and buckets are drawn to the same scale, so that a bucket ends in the block in which it really ends
    drawn = [numbers(rect, "x", "width") for rect in elements(FOLDER / "data-parallel.svg", "rect")
             if rect.get("class") == "gradient" and rect.get("height") == "28"]  # fmt: skip
    scale = buckets[-1].stop / sum(width for _, width in drawn)
    for layer, (x, width) in enumerate(drawn[1:13]):
        inside = [place for name, place in places.items() if f"blocks.{11 - layer}." in name]
        start, stop = min(place.start for place in inside), max(place.stop for place in inside)
        assert abs(scale * (x - drawn[0][0]) - start) < 0.002 * buckets[-1].stop
        assert abs(scale * width - (stop - start)) < 0.002 * buckets[-1].stop


@pytest.mark.parametrize(("preset", "left", "right"), [("base", 0, 450), ("modern-base", 450, 900)])
def test_a_block_has_the_layers_of_the_model(preset, left, right):
    drawn = [text.text for text in elements(FOLDER / "blocks.svg", "text")
             if left < float(text.get("x")) < right and "code" in (text.get("class") or "")]  # fmt: skip
    layers = [name for name, layer in Block(PRESETS[preset], 1).named_children() if isinstance(layer, nn.Linear)]
    assert [name for name in drawn if name in layers] == layers
    assert drawn.count("add_norm") == 2
    assert ("rotary" in drawn) == ("gated_gelu" in drawn) == (preset == "modern-base") == ("bias_gelu" not in drawn)
    first = Block(PRESETS[preset], 0).attention_norm
    assert ("attention_norm" in drawn) == isinstance(first, nn.LayerNorm)


def test_the_loader_is_as_far_ahead_as_it_is_drawn():
    made = [int(word.split()[1]) for word in words("step") if word.startswith("batch ")]
    assert made == [PREFETCH + i for i in (1, 2, 3)]


def test_the_scores_of_a_packed_row_are_counted_right():
    bounds = sorted({int(word) for word in words("packing")[1:] if word.isdigit()})
    told = [int(word.split()[0]) for word in words("packing") if word.endswith("are computed")]
    lengths, scores = (8, 6, 4, 2), code("rotary.md")["scores"]
    assert bounds[-1] == sum(lengths)
    assert told == [scores(lengths, 20), scores(lengths, 2)]


def test_tiles_are_whole_where_the_page_says_so():
    lengths, held, visited = (21, 12, 15), 8, 4
    ends = [0, *torch.tensor(lengths).cumsum(0).tolist()]
    whole = 0
    for window in (sum(lengths), 6):
        for lo, hi in pairwise(ends):
            for first in range(0, ends[-1], held):
                if lo <= first and first + held <= hi:
                    _, full, rest, _ = code("attention.md")["stretches"](
                        first, first + held - 1, lo, hi, window, visited
                    )
                    whole += (rest - full) // visited
    drawn = [rect for rect in elements(FOLDER / "tiles.svg", "rect") if rect.get("class") == "document3"]
    assert len(drawn) == whole + 1  # and one in the legend
