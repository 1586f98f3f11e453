"""The Python blocks of README and of the site run as they stand, and print what the pages say; every name is explained.

A block that begins with its imports starts afresh, as a reader would copy it; one that does not goes on from the block
before. ``<!-- needs: LIBRARY, ... -->`` above it names the libraries without which it is skipped.
"""

from __future__ import annotations

import doctest
import io
import os
import re
import sys
from contextlib import nullcontext, redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest

import hbp
from hbp.core.registry import LIBRARIES, load

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
BLOCK = re.compile(
    r"(?:^<!-- needs: (?P<needs>[\w., ]+) -->\n+)?^```python[^\n]*\n(?P<code>.*?)^```\n"
    r"(?:\n*^```text\n(?P<printed>.*?)^```)?",
    re.DOTALL | re.MULTILINE,
)
PRINTED = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
"""Where a page says ``...``, anything may stand: times."""


@dataclass(frozen=True)
class Block:
    page: Path
    line: int
    needs: tuple[str, ...]
    code: str
    printed: str

    @property
    def fresh(self) -> bool:
        return self.code.startswith(("import ", "from "))

    def run(self, names: dict[str, Any]) -> None:
        """Run it, with the page's own line numbers in what is raised, and compare what it prints."""
        out = io.StringIO()
        with redirect_stdout(out):
            exec(compile("\n" * self.line + self.code, str(self.page), "exec"), names)
        if self.printed or "print(" in self.code:
            same = doctest.OutputChecker().check_output(self.printed, out.getvalue(), PRINTED)
            assert same, f"{self.page.name}, line {self.line}, prints\n{out.getvalue()}"


def blocks(page: Path) -> list[Block]:
    text = page.read_text()
    found = []
    for match in BLOCK.finditer(text):
        needs = tuple(name.strip() for name in (match["needs"] or "").split(",") if name.strip())
        line = text[: match.start("code")].count("\n")
        found.append(Block(page, line, needs, match["code"], match["printed"] or ""))
    return found


def stories() -> list[Any]:
    """Blocks that share their names, in order."""
    found: list[list[Block]] = []
    for page in PAGES:
        first = True
        for block in blocks(page):
            if block.fresh or first:
                found.append([])
            found[-1].append(block)
            first = False
    return [pytest.param(own, id=f"{own[0].page.relative_to(ROOT)}:{own[0].line}") for own in found]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_all_blocks_are_found(page):
    text = page.read_text()
    found = blocks(page)
    assert len(found) == len(re.findall(r"^ *```+ *(?:py|python)\b", text, re.MULTILINE))
    assert sum(bool(block.printed) for block in found) == len(re.findall(r"^```text", text, re.MULTILINE))
    assert sum(bool(block.needs) for block in found) == text.count("<!-- needs:")
    assert not found or found[0].fresh


@pytest.mark.parametrize("story", stories())
def test_blocks_run(story, tmp_path, monkeypatch, request):
    needs = dict.fromkeys(name for block in story for name in block.needs)
    if not needs and request.config.getoption("--backends") not in ("", "numpy"):
        pytest.skip("it needs NumPy alone, in whose session it runs")
    for name in needs:
        if name in LIBRARIES:
            available(name)
        pytest.importorskip(name)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__page__"}
    with as_at_home(), patch.dict(LIBRARIES), patch.dict(os.environ):  # a page adds one, a page sets one
        for block in story:
            block.run(names)


def as_at_home() -> Any:
    """JAX as a reader's begins: without the 64 bits that the tests have switched on."""
    if "jax" not in sys.modules:
        return nullcontext()
    import jax

    return jax.enable_x64(False) if hasattr(jax, "enable_x64") else import_module("jax.experimental").disable_x64()


def available(name: str) -> Any:
    """An array library's front end; skips where it is not usable."""
    try:
        return load(name)
    except (ImportError, RuntimeError) as error:
        pytest.skip(str(error))


def test_the_numbers_of_the_readme_are_those_measured():
    shown = re.findall(r"^\| (?:GRU|LSTM) T = .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    measured = (ROOT / "benchmarks/results/cpu/crossover.md").read_text().splitlines()
    assert len(shown) >= 5
    assert set(shown) <= set(measured)


ELSEWHERE = {
    "backend": "hbp.core.backend.Backend",
    "jit": "hbp.backends._surface.jit",
    "vjp": "hbp.core.backend.Backend.vjp",
}
"""What all front ends offer that is no name of `hbp`."""


@pytest.mark.parametrize("front_end", ["hbp", "hbp.cells", "hbp.testing", *LIBRARIES])
def test_every_public_name_is_explained(front_end):
    if front_end in LIBRARIES:
        available(front_end)
        front_end = f"hbp.backends.{front_end}"
    explained = set(re.findall(r"^::: (\S+)$", "\n".join(p.read_text() for p in DOCS.rglob("*.md")), re.MULTILINE))
    for name in import_module(front_end).__all__:
        own = {f"{front_end}.{name}"}
        shared = {f"hbp.{name}", ELSEWHERE.get(name)} if front_end.startswith("hbp.backends.") else set()
        assert explained & (own | shared) or (front_end, name) == ("hbp", "cells"), f"{front_end}.{name} has no entry"
    assert hbp.__all__
