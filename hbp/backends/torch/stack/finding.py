"""The stack of layers inside a model: found, or taken by its name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby, pairwise
from typing import Any

from torch import nn

from hbp.backends.torch.hooks import sharded

LISTS = (nn.ModuleList, nn.Sequential)
Row = tuple[str, list[nn.Module]]
"""Consecutive layers, and the name of the list they stand in."""


def largest(model: nn.Module) -> Row:
    """The row of layers of one class with most parameters; in a model of stages that differ in width, the longest.

    Raises:
        ValueError: there is none.
    """
    lists = [(name, part) for name, part in model.named_modules() if _is_list(part)]
    kinds = [(name, list(row)) for name, part in lists for _, row in groupby(part, type)]
    rows = [(name, row) for name, entries in kinds for row in _cut(entries) if len(row) > 1 and any(map(_size, row))]
    if not rows:
        seen = ", ".join(repr(name) for name, _ in lists) or "none"
        over_time = any(type(part) in (nn.GRU, nn.LSTM) for part in model.modules())
        recurrent = "; for torch.nn's GRU or LSTM put hb.GRU or hb.LSTM and load its state_dict" if over_time else ""
        raise ValueError(
            f"found no stack to convert in this {type(model).__name__}: a torch.nn.ModuleList or Sequential with at "
            f"least two consecutive layers of one class; its lists are: {seen}; give stacks= to convert one whole"
            f"{recurrent}"
        )
    staged = any(_staged(entries) for _, entries in kinds)
    return max(rows, key=lambda row: (len(row[1]) if staged else 0, sum(map(_size, row[1]))))


def named(model: nn.Module, names: str | Sequence[str]) -> list[Row]:
    """The lists of these names, whole.

    Raises:
        TypeError, ValueError: a name is none, or not that of a list with layers.
    """
    wanted = (names,) if isinstance(names, str) else names
    if not isinstance(wanted, list | tuple) or not wanted or not all(isinstance(name, str) for name in wanted):
        raise TypeError(f"stacks={names!r}; give the name of a list in the model, or several")
    found = []
    for name in dict.fromkeys(wanted):
        part: Any = dict(model.named_modules()).get(name)
        if not _is_list(part) or not len(part):
            kind = "there is none" if part is None else f"it is a {type(part).__name__} of {len(list(part.children()))}"
            raise ValueError(f"stacks={name!r}: {kind}; name a torch.nn.ModuleList or Sequential with layers in it")
        found.append((name, list(part)))
    return found


def _is_list(part: Any) -> bool:
    """Whether a module is a plain list, fully sharded or not; a class derived from one has its own ways."""
    kind = type(part).__bases__[-1] if sharded(part) else type(part)
    return kind in LISTS


def _cut(entries: list[nn.Module]) -> Iterator[list[nn.Module]]:
    """A row, between those of its entries whose widths differ where it is one of stages."""
    start = 0
    if _staged(entries):
        for i, (one, other) in enumerate(pairwise(entries), 1):
            if not _fit(one, other):
                yield entries[start:i]
                start = i
    yield entries[start:]


def _staged(entries: list[nn.Module]) -> bool:
    """Whether entries look like stages: lists of layers themselves, and of several widths."""
    return any(map(_holds_rows, entries)) and not all(_fit(one, other) for one, other in pairwise(entries))


def _fit(one: nn.Module, other: nn.Module) -> bool:
    """Whether parameters of one name have one shape in both."""
    shapes = {name: p.shape for name, p in one.named_parameters()}
    return all(shapes.get(name, p.shape) == p.shape for name, p in other.named_parameters())


def _holds_rows(layer: nn.Module) -> bool:
    lists = [part for part in layer.modules() if _is_list(part)]
    return any(type(one) is type(other) for part in lists for one, other in pairwise(part))


def _size(layer: nn.Module) -> int:
    return sum(p.numel() for p in layer.parameters())
