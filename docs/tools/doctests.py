"""Docstrings as the pages show them: their examples, which doctest runs, as code."""

from __future__ import annotations

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"(?:^>>> .*\n?(?:^(?!\s*$).*\n?)*\n?)+", re.MULTILINE)


class Doctests(griffe.Extension):
    """Put each run of ``>>>`` lines and what they print under a heading that the parser knows."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called with each object that was loaded."""
        if obj.docstring is not None:
            obj.docstring.value = EXAMPLE.sub(indented, obj.docstring.value)


def indented(found: re.Match[str]) -> str:
    """An example as a section of Google's style."""
    body = "\n".join(f"    {line}" if line else "" for line in found[0].strip().splitlines())
    return f"Examples:\n{body}\n\n"
