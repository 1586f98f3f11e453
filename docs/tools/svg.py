"""A small canvas for drawings that follow the page's colours: plain SVG, made to stand inside a page."""

from __future__ import annotations

from dataclasses import dataclass, field
from html import escape

RESIDUAL = "#2f8fdf"
BLOCK = "#e07b12"
INK = "currentColor"


@dataclass
class Canvas:
    """A drawing of a fixed size; coordinates are in its pixels, from the top left corner."""

    width: int
    height: int
    title: str
    """What a reader hears who does not see it."""
    parts: list[str] = field(default_factory=list)

    def line(self, start: tuple[float, float], end: tuple[float, float], color: str = INK, **style: object) -> None:
        """A straight line; ``width``, ``opacity``, ``arrow`` and ``dash`` say how."""
        self.path(f"M {_at(start)} L {_at(end)}", color, **style)

    def path(
        self,
        d: str,
        color: str = INK,
        width: float = 1.5,
        opacity: float = 1.0,
        arrow: bool = False,
        dash: str = "",
    ) -> None:
        """A path of SVG's own notation, not filled."""
        marks = f' marker-end="url(#arrow-{_key(color)})"' if arrow else ""
        marks += f' stroke-dasharray="{dash}"' if dash else ""
        style = f'fill="none" stroke="{color}" stroke-width="{width}" opacity="{opacity}"'
        self.parts.append(f'<path d="{d}" {style}{marks}/>')

    def box(
        self,
        corner: tuple[float, float],
        size: tuple[float, float],
        color: str = INK,
        fill: float = 0.12,
        radius: float = 4,
    ) -> None:
        """A rectangle, filled with its own colour, thinned."""
        (x, y), (width, height) = corner, size
        place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="{radius:g}"'
        self.parts.append(f'<rect {place} stroke="{color}" fill="{color}" fill-opacity="{fill}"/>')

    def disc(self, center: tuple[float, float], radius: float, color: str = INK, fill: float = 1.0) -> None:
        """A circle."""
        x, y = center
        place = f'cx="{x:g}" cy="{y:g}" r="{radius:g}"'
        self.parts.append(f'<circle {place} stroke="{color}" fill="{color}" fill-opacity="{fill}"/>')

    def text(
        self,
        place: tuple[float, float],
        words: str,
        size: float = 14,
        color: str = INK,
        anchor: str = "middle",
        weight: str = "normal",
    ) -> None:
        """A line of text for each line of ``words``; the place is the middle of its first line."""
        x, y = place
        style = f'font-size="{size:g}" text-anchor="{anchor}" font-weight="{weight}" fill="{color}"'
        for i, row in enumerate(words.split("\n")):
            self.parts.append(f'<text x="{x:g}" y="{y + (1.25 * i + 0.35) * size:g}" {style}>{escape(row)}</text>')

    def __str__(self) -> str:
        colors = sorted({color for color in (INK, RESIDUAL, BLOCK) if f"#arrow-{_key(color)}" in "".join(self.parts)})
        shape = 'viewBox="0 0 8 8" refX="7" refY="4" markerUnits="userSpaceOnUse" markerWidth="9" markerHeight="9"'
        tip = "M 0 0.5 L 8 4 L 0 7.5 z"
        heads = "".join(
            f'<marker id="arrow-{_key(c)}" {shape} orient="auto"><path d="{tip}" fill="{c}"/></marker>' for c in colors
        )
        size = f'viewBox="0 0 {self.width} {self.height}" style="max-width: {self.width}px"'
        title = f"<title>{escape(self.title)}</title>"
        return f'<svg class="drawing" role="img" {size}>{title}<defs>{heads}</defs>{"".join(self.parts)}</svg>'


def _at(place: tuple[float, float]) -> str:
    return f"{place[0]:g} {place[1]:g}"


def _key(color: str) -> str:
    return color.strip("#")
