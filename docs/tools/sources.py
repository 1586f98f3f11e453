"""Code of the library on a page, found by its name, so that no page shows what the library no longer is."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from textwrap import dedent

ROOT = Path(__file__).parents[2]
MODULES = re.compile(r"^<!-- modules: (\S+) -->$", re.MULTILINE)
DIRECTIVE = re.compile(r"^<!-- source: (\S+)(?: (\S+))? -->$", re.MULTILINE)


def shown(markdown: str) -> str:
    """A page in which each ``<!-- source: FILE NAME -->`` is that code; without a name it is the whole file.

    And each ``<!-- modules: FOLDER -->`` a table of what stands in that folder.

    Raises:
        LookupError: the file has no such function, class or assignment.
    """
    markdown = MODULES.sub(lambda found: modules(found[1]), markdown)
    return DIRECTIVE.sub(lambda found: fenced(found[1], found[2]), markdown)


def modules(folder: str) -> str:
    """The modules of a folder with what their docstrings begin with, as a table."""
    lines = [f"| `{folder}/` | |", "| --- | --- |"]
    for path in sorted((ROOT / folder).glob("*.py"), key=lambda path: (path.stem != "__init__", path.name)):
        told = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0].replace("\n", " ")
        lines.append(f"| `{path.name}` | {told} |")
    return "\n".join(lines)


def fenced(path: str, name: str | None) -> str:
    """The code as a block, with where it stands as its title."""
    text = (ROOT / path).read_text()
    if name is None:
        return f'```python title="{path}"\n{text}```'
    first, last, skipped = located(ast.parse(text), name, path)
    lines = [line for i, line in enumerate(text.splitlines(), 1) if first <= i <= last and i not in skipped]
    return f'```python title="{path}, line {first}"\n{dedent(chr(10).join(lines))}\n```'


def located(tree: ast.AST, name: str, path: str) -> tuple[int, int, range]:
    """The first and the last line of what bears a dotted name, and those of its docstring."""
    node = tree
    for part in name.split("."):
        node = next((child for child in ast.iter_child_nodes(node) if part in names(child)), None)
        if node is None:
            raise LookupError(f"{path} has no {name}, which a page shows")
    first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", []))])
    documented = isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None
    skipped = range(node.body[0].lineno, node.body[0].end_lineno + 1) if documented else range(0)
    return first, node.end_lineno, skipped


def names(node: ast.AST) -> set[str]:
    """What a statement defines."""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target] if isinstance(node, ast.AnnAssign) else []
    return {target.id for target in targets if isinstance(target, ast.Name)}
