"""What happens while MkDocs builds the site: code, drawings and formulas come in, and the pages of numbers are made."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from drawings import DRAWINGS
from formulas import drawn
from names import unexplained
from results import case_of, pages, pictures, rows_of
from sources import shown

TABLE = re.compile(r"^<!-- table: (\S+)\n(.*?)-->$", re.DOTALL | re.MULTILINE)
CASE = re.compile(r"^<!-- case: (\S+) (.*?) -->$", re.MULTILINE)
DRAWING = re.compile(r"^<!-- drawing: (\w+) -->$", re.MULTILINE)
PLOT = re.compile(r"(?<!\[)!\[([^\]]*)\]\((\S+\.png)\)")
NUMBERS = "numbers"


def on_config(config: Any) -> Any:
    """Let the navigation lead to the pages that are made."""
    for section in config.nav:
        if "Numbers" in section:
            section["Numbers"] += [f"{NUMBERS}/{path}" for path in pages()]
    return config


def on_pre_build(config: Any) -> None:
    """Stop where a public name has no entry in the reference."""
    if names := unexplained(Path(config.docs_dir)):
        raise PluginError(f"no entry in docs/reference for {', '.join(names)}")


def on_files(files: Files, *, config: Any) -> Files:
    """Add the pages of numbers and their pictures."""
    for path, text in pages().items():
        files.append(File.generated(config, f"{NUMBERS}/{path}", content=text))
    for path, source in pictures().items():
        files.append(File.generated(config, f"{NUMBERS}/{path}", abs_src_path=str(source)))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put code, rows of results and drawings in the place of the comments that name them; plots open on a click."""
    markdown = PLOT.sub(r"[![\1](\2)](\2)", markdown)
    markdown = TABLE.sub(lambda found: rows_of(found[1], found[2].splitlines()), markdown)
    markdown = CASE.sub(lambda found: case_of(found[1], found[2]), markdown)
    return DRAWING.sub(lambda found: f"<figure>{DRAWINGS[found[1]]()}</figure>", shown(markdown))


def on_page_content(html: str, **_: Any) -> str:
    """Draw the formulas."""
    return drawn(html)
