"""Public names without an entry in the reference, from the source alone: no array library is needed to find them."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
MODULES = {
    "hbp": "hbp/__init__.py",
    "hbp.cells": "hbp/cells/__init__.py",
    "hbp.testing": "hbp/testing.py",
    "hbp.backends.torch": "hbp/backends/torch/__init__.py",
    "hbp.backends.jax": "hbp/backends/jax/__init__.py",
}
LISTS = {"__all__", "OWN"}
"""What such names are listed in; what all front ends share is held to its entries by the tests."""
ENTRY = re.compile(r"^::: (\S+)$", re.MULTILINE)


def unexplained(pages: Path) -> list[str]:
    """The names that no page below a folder has an entry for."""
    entries = {entry for page in pages.rglob("*.md") for entry in ENTRY.findall(page.read_text())}
    listed = ((module, name) for module, path in MODULES.items() for name in public(ROOT / path))
    return [f"{module}.{name}" for module, name in listed if f"{module}.{name}" not in entries | {"hbp.cells"}]


def public(path: Path) -> list[str]:
    """The names that a module lists as its public ones."""
    found = []
    for node in ast.parse(path.read_text()).body:
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if LISTS & {getattr(target, "id", None) for target in targets}:
            values = (getattr(part, "value", None) for part in ast.walk(node.value))
            found += [value for value in values if isinstance(value, str)]
    return found
