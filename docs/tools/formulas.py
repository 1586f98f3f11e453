"""Formulas as pictures in the page itself, from STIX Two Math: no script, no font and no network to read them."""

from __future__ import annotations

import re
from html import escape, unescape

import ziamath

ziamath.config.svg2 = False  # whose shared glyphs have ids that several formulas of a page would repeat
SIZE = 17
FORMULA = re.compile(r'<(div|span) class="arithmatex">\\[\[(](.*?)\\[\])]</\1>', re.DOTALL)


def drawn(html: str) -> str:
    """A page whose formulas, as the Markdown extension `arithmatex` leaves them, are drawn."""
    return FORMULA.sub(lambda found: formula(unescape(found[2]).strip(), block=found[1] == "div"), html)


def formula(tex: str, block: bool) -> str:
    """One formula in the text's colour, spoken as its TeX."""
    made = ziamath.Latex(tex, size=SIZE, color="currentColor", inline=not block)
    svg = made.svg().replace("<svg ", f'<svg role="img" aria-label="{escape(tex)}" ', 1)
    if block:
        return f'<div class="formula">{svg}</div>'
    return f'<span class="formula" style="vertical-align: {made.getyofst():.1f}px">{svg}</span>'
