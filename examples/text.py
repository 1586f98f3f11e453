"""Text to train on that every machine has: the sources of Python's standard library, byte by byte."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = 128
"""ASCII; 0 is padding."""


def source_text(size: int = 500_000) -> Tensor:
    """The first ``size`` ASCII characters of the standard library's modules, in the order of their names."""
    parts: list[bytes] = []
    length = 0
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        data = path.read_bytes()
        if data.isascii() and b"\0" not in data:
            parts.append(data)
            length += len(data)
        if length >= size:
            break
    text = b"".join(parts)[:size]
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()


def batch_of(text: Tensor, length: int, size: int, generator: torch.Generator) -> Tensor:
    """Random excerpts, (size, length)."""
    starts = torch.randint(len(text) - length, (size,), generator=generator)
    return torch.stack([text[start : start + length] for start in starts.tolist()])
