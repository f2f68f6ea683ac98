"""Pictures as SVG text: boxes, lines, arrows and words in a few colours, for light and dark pages.

Pages show a picture with <img>, so it cannot know the colours of the page around it. It only knows whether the reader
prefers dark pages. It therefore has its own background, and stays legible if the page ignores that preference.
"""

from __future__ import annotations

from collections.abc import Iterator
from html import escape

WIDTH = 900  # of every picture; sizes are in pixels if a page shows it this wide
SIZE, SMALL = 14, 13  # font sizes
# meaning of a colour: (area, edge) on light pages, (area, edge) on dark pages
COLORS = {
    "document": (("#b5d6f6", "#2b6cb0"), ("#1c4a7d", "#6cb2f7")),  # documents, their tokens and their hidden states
    "document2": (("#d9eafb", "#2b6cb0"), ("#123053", "#6cb2f7")),  # the same, to tell neighbours apart
    "document3": (("#8fc0ee", "#2b6cb0"), ("#2a66a6", "#6cb2f7")),
    "weight": (("#c8ecd8", "#1a7a55"), ("#12442f", "#4cc38a")),
    "gradient": (("#ffdcc4", "#bf5310"), ("#552a12", "#f39a5c")),
    "communication": (("#ead4f0", "#84399a"), ("#43244f", "#cf94de")),
    "disk": (("#f4ecd4", "#84702f"), ("#37301a", "#cdb266")),  # files on disk
    "op": (("#e6eaee", "#7d8590"), ("#29313b", "#7d8590")),  # operations without weights, and padding
    "panel": (("#fafbfc", "#dfe3e8"), ("#11161d", "#2b323b")),
}
INKS = {"ground": ("#ffffff", "#0d1117"), "ink": ("#1f2328", "#e6edf3"), "muted": ("#57606a", "#9ea7b1")}


def _style() -> str:
    def variables(scheme: int) -> Iterator[str]:
        for name, shades in INKS.items():
            yield f"--{name}:{shades[scheme]}"
        for name, shades in COLORS.items():
            area, edge = shades[scheme]
            yield f"--{name}:{area};--{name}-edge:{edge}"

    lines = [
        f":root{{{';'.join(variables(0))}}}",
        f"@media (prefers-color-scheme:dark){{:root{{{';'.join(variables(1))}}}}}",
        'text{font-family:-apple-system,"Segoe UI",Helvetica,Arial,sans-serif;fill:var(--ink)}',
        "text.code{font-family:ui-monospace,Menlo,Consolas,monospace}text.bold{font-weight:bold}",
        "text.muted{fill:var(--muted)}.ground{fill:var(--ground)}",
        "path{fill:none;stroke-width:1.5}.dashed{stroke-dasharray:5 4}.thick{stroke-width:4}",
        "path.disk{stroke-width:1}path.disk.filled{fill:var(--disk)}",
        "rect.hollow{fill:none}",
        "path.ink{stroke:var(--ink)}",
        ".picked{fill:none;stroke:var(--ink);stroke-width:2}",  # marks what a picture points at
    ]
    for name in COLORS:
        lines.append(
            f".{name}{{fill:var(--{name});stroke:var(--{name}-edge)}}"
            f"path.{name}{{fill:none}}.{name}-ink{{fill:var(--{name}-edge)}}.{name}-area{{fill:var(--{name})}}"
        )
    return "\n".join(lines)


class Picture:
    """Coordinates are pixels from the upper left corner. A look is a colour's name, with words such as "dashed"."""

    def __init__(self, height: float, title: str):
        self.height, self.title = height, title
        self.parts: list[str] = []

    def __str__(self) -> str:
        size = f'width="{WIDTH}" height="{self.height:g}" viewBox="0 0 {WIDTH} {self.height:g}"'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">\n<title>{escape(self.title)}</title>'
        ground = f'<rect class="ground" width="{WIDTH}" height="{self.height:g}" rx="8"/>'
        return "\n".join([head, f"<style>\n{_style()}\n</style>", ground, *self.parts, "</svg>\n"])

    def rect(self, x: float, y: float, w: float, h: float, look: str = "op", round: float = 4) -> None:
        self.parts.append(f'<rect class="{look}" x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}" rx="{round:g}"/>')

    def text(self, x: float, y: float, words: str, look: str = "", size: float = SIZE, anchor: str = "middle") -> None:
        """y: the middle of the letters. Draws nothing if words is empty."""
        if not words:
            return
        class_ = f' class="{look}"' if look else ""
        place = f'x="{x:g}" y="{y + 0.36 * size:g}" font-size="{size:g}" text-anchor="{anchor}"'
        self.parts.append(f"<text{class_} {place}>{escape(words, quote=False)}</text>")

    def lines(
        self, x: float, y: float, *words: str, look: str = "", size: float = SIZE, anchor: str = "middle"
    ) -> None:
        """Lines of text, centred on y. A line that begins with ` is set as code."""
        for i, line in enumerate(words):
            own = f"{look} code".strip() if line.startswith("`") else look
            at = y + (i - (len(words) - 1) / 2) * size * 1.35
            self.text(x, at, line.removeprefix("`"), own, size - line.startswith("`"), anchor)

    def box(self, x: float, y: float, w: float, h: float, *words: str, look: str = "op", size: float = SIZE) -> None:
        self.rect(x, y, w, h, look)
        self.lines(x + w / 2, y + h / 2, *words, size=size)

    def line(self, *points: tuple[float, float], look: str = "op") -> None:
        d = " ".join(f"{'L' if i else 'M'}{x:g} {y:g}" for i, (x, y) in enumerate(points))
        self.parts.append(f'<path class="{look}" d="{d}"/>')

    def arrow(self, *points: tuple[float, float], look: str = "op", head: float = 7) -> None:
        """An arrow along the points. Its last segment must be horizontal or vertical."""
        (x0, y0), (x, y) = points[-2:]
        dx, dy = (x > x0) - (x < x0), (y > y0) - (y < y0)
        bx, by = x - dx * head, y - dy * head
        self.line(*points[:-1], (bx, by), look=look)
        half = head * 0.6
        corners = f"{x:g},{y:g} {bx - dy * half:g},{by + dx * half:g} {bx + dy * half:g},{by - dx * half:g}"
        self.parts.append(f'<polygon class="{look.split()[0]}-ink" points="{corners}"/>')

    def disk(self, x: float, y: float, w: float, h: float, title: str, *files: str) -> None:
        """A sheet with a folded corner for a folder or file, with a list of its contents."""
        fold = 14
        self.parts.append(
            f'<path class="disk filled" d="M{x:g} {y:g}h{w - fold:g}l{fold} {fold}v{h - fold:g}h{-w:g}z"/>'
        )
        self.line((x + w - fold, y), (x + w - fold, y + fold), (x + w, y + fold), look="disk")
        self.text(x + 10, y + 16, title, "bold", SMALL, "start")
        for i, file in enumerate(files):
            self.text(x + 10, y + 38 + 18 * i, file, "code muted", 12, "start")

    def curve(self, d: str, look: str = "op") -> None:
        """Any SVG path. d: its data."""
        self.parts.append(f'<path class="{look}" d="{d}"/>')
