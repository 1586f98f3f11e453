"""Mutation testing of the parts that NumPy's tests cover: `nox -s mutants`, which prints the rate of mutants killed.

    python tests/mutants.py [--sample N] [--seed S] [FOLDER_OR_FILE ...]

mutmut's operators make the mutants, with three more of our own. mutmut's own runner is not used: it wraps every
function in another, which changes the stack depths that tests of warnings look at, and leaves decorated functions out.
Each mutant of a sample with a fixed seed is tried in a copy of the tree. What no test can see stands in
`mutants.toml` with its reason, by the text of the change, whatever its line, and counts for nothing.
"""

from __future__ import annotations

import argparse
import difflib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue

import libcst as cst
from mutmut.mutation.file_mutation import deep_replace
from mutmut.mutation.mutators import mutation_operators, operator_string

ROOT = Path(__file__).parents[1]
COPIED = ("hbp", "tests", "pyproject.toml", "README.md")
CORE = [
    f"tests/test_{name}.py"
    for name in ("operators", "scan", "schedule", "solver", "properties", "bad_input", "adjoint")
]
SUITES = {
    "hbp/core": [*CORE, "tests/test_registry.py", "tests/test_cells.py"],
    "hbp/linearization.py": CORE,
    "hbp/cells": ["tests/test_cells.py", "tests/test_cpu_kernels.py"],
    "hbp/backends/_array.py": [*CORE, "tests/test_cpu_kernels.py"],
    "hbp/backends/_numba": ["tests/test_cpu_kernels.py", "tests/test_scan.py"],
}
"""The tests of each part, the quick ones first."""
TARGET, SECONDS = 0.95, 900


@dataclass(frozen=True)
class Mutant:
    """One changed file."""

    path: str
    source: str
    change: str
    """What is different: ``before -> after``, the lines without their indentation."""


class Collector(cst.CSTVisitor):
    """All mutations of a module, as pairs of nodes; types, decorators and the wording of errors stay."""

    def __init__(self) -> None:
        self.found: list[tuple[cst.CSTNode, cst.CSTNode]] = []
        self.raising = 0

    def on_visit(self, node: cst.CSTNode) -> bool:
        if isinstance(node, cst.Annotation | cst.Decorator | cst.Import | cst.ImportFrom) or is_for_types(node):
            return False
        self.raising += words_an_error(node)
        for kind, operator in (*mutation_operators, *OWN):
            if isinstance(node, kind) and not (self.raising and operator is operator_string):
                self.found += [(node, mutated) for mutated in operator(node)]
        return True

    def on_leave(self, node: cst.CSTNode) -> None:
        self.raising -= words_an_error(node)


def words_an_error(node: cst.CSTNode) -> bool:
    """What raises, or a check that is told the words of its error."""
    checks = isinstance(node, cst.Call) and isinstance(node.func, cst.Name)
    return isinstance(node, cst.Raise) or (checks and node.func.value.startswith(("check_", "_entered", "_run")))


def is_for_types(node: cst.CSTNode) -> bool:
    """An alias of a type, the list of a module's names, or what only a type checker reads."""
    code = cst.Module([]).code_for_node(node) if isinstance(node, cst.AnnAssign | cst.Assign | cst.If) else ""
    return ": TypeAlias = " in code.split("\n")[0] or code.startswith(("__all__ =", "if TYPE_CHECKING:"))


def swapped(node: cst.BinaryOperation) -> Iterator[cst.CSTNode]:
    if isinstance(node.operator, cst.MatrixMultiply | cst.Subtract):
        yield node.with_changes(left=node.right, right=node.left)


def dropped(node: cst.BinaryOperation) -> Iterator[cst.CSTNode]:
    if isinstance(node.operator, cst.Add):
        yield from (node.left, node.right)


def negated(node: cst.If) -> Iterator[cst.CSTNode]:
    test = node.test.with_changes(lpar=[cst.LeftParen()], rpar=[cst.RightParen()])
    yield node.with_changes(test=cst.UnaryOperation(operator=cst.Not(), expression=test))


OWN = ((cst.BinaryOperation, swapped), (cst.BinaryOperation, dropped), (cst.If, negated))


@dataclass(frozen=True)
class Place:
    """A mutation that has not been made yet."""

    path: Path
    module: cst.Module
    node: cst.CSTNode
    mutated: cst.CSTNode

    def made(self) -> Mutant | None:
        """The mutant; None where it does not compile or is the same."""
        before, after = self.module.code, deep_replace(self.module, self.node, self.mutated).code
        try:
            compile(after, str(self.path), "exec")
        except SyntaxError:
            return None
        return Mutant(str(self.path.relative_to(ROOT)), after, change(before, after)) if after != before else None


def places(path: Path) -> list[Place]:
    """All mutations of one file."""
    module, collector = cst.parse_module(path.read_text()), Collector()
    module.visit(collector)
    return [Place(path, module, *pair) for pair in collector.found]


def chosen(found: list[Place], count: int, equivalent: set[tuple[str, str]]) -> list[Mutant]:
    """The first ``count`` mutants not known as equivalent, 0 for all, which says what is known and not there."""
    mutants: dict[str, Mutant] = {}
    seen = set()
    for place in found:
        mutant = place.made()
        if mutant is not None:
            seen.add((mutant.path, mutant.change))
            if (mutant.path, mutant.change) not in equivalent:
                mutants.setdefault(mutant.path + mutant.source, mutant)
        if count and len(mutants) == count:
            return list(mutants.values())
    for path, text in equivalent - seen:
        print(f"stale entry in mutants.toml, or of another part: {path}: {text}")
    return list(mutants.values())


def change(before: str, after: str) -> str:
    rows = list(difflib.ndiff(before.splitlines(), after.splitlines()))
    sides = (" ".join(row[2:].strip() for row in rows if row.startswith(sign)) for sign in ("- ", "+ "))
    return " -> ".join(sides)


def copy() -> Path:
    """A copy of the tree to try mutants in."""
    folder = Path(tempfile.mkdtemp(prefix="hbp-mutants-"))
    for name in COPIED:
        source = ROOT / name
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, folder / name, ignore=ignored) if source.is_dir() else shutil.copy(source, folder)
    return folder


def passes(folder: Path, path: str) -> bool:
    """Whether the tests of this file pass there."""
    suite = next(tests for part, tests in SUITES.items() if path.startswith(part))
    command = [
        sys.executable,
        "-B",
        "-m",
        "pytest",
        "-x",
        "-q",
        "--tb=no",
        "-p",
        "no:cacheprovider",
        "--backends=numpy",
    ]
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    try:
        run = subprocess.run(
            [*command, path, *suite], cwd=folder, env=environment, capture_output=True, timeout=SECONDS
        )
    except subprocess.TimeoutExpired:
        return False
    return run.returncode == 0


def survives(copies: SimpleQueue[Path], mutant: Mutant) -> bool:
    folder = copies.get()
    file = folder / mutant.path
    original = file.read_text()
    try:
        file.write_text(mutant.source)
        return passes(folder, mutant.path)
    finally:
        file.write_text(original)
        copies.put(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("parts", nargs="*", default=list(SUITES)[:4], help="folders or files below hbp")
    parser.add_argument("--sample", type=int, default=60, help="mutants tried, 0 for all")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    roots = [ROOT / part for part in given.parts]
    files = [file for root in roots for file in ([root] if root.is_file() else sorted(root.rglob("*.py")))]
    found = [place for file in files for place in places(file)]
    random.Random(given.seed).shuffle(found)
    entries = tomllib.loads(Path(__file__).with_suffix(".toml").read_text())["equivalent"]
    tried = chosen(found, given.sample, {(entry["path"], entry["change"]) for entry in entries})
    print(f"{len(found)} mutations of {len(files)} files; trying {len(tried)}, none known as equivalent", flush=True)
    copies: SimpleQueue[Path] = SimpleQueue()
    folders = [copy() for _ in range(os.cpu_count() or 1)]
    for folder in folders:
        copies.put(folder)
    try:
        with ThreadPoolExecutor(len(folders)) as pool:
            paths = {next(part for part in SUITES if mutant.path.startswith(part)): mutant.path for mutant in tried}
            for path in paths.values():  # in every copy, so that kernels are compiled there
                if not all(pool.map(lambda folder, path=path: passes(folder, path), folders)):
                    print(f"the tests of {path} fail without any mutation")
                    return 2
            alive = []
            for mutant, lives in zip(tried, pool.map(lambda mutant: survives(copies, mutant), tried), strict=True):
                alive += [mutant] * lives
                if lives:
                    print(f"survived: {mutant.path}: {mutant.change}", flush=True)
    finally:
        for folder in folders:
            shutil.rmtree(folder)
    rate = 1 - len(alive) / max(len(tried), 1)
    print(f"killed {len(tried) - len(alive)} of {len(tried)}: {rate:.1%}, the target is {TARGET:.0%}")
    return int(rate < TARGET)


if __name__ == "__main__":
    sys.exit(main())
