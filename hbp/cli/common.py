"""What all commands share: how they tell bad input."""

from __future__ import annotations

import argparse
from collections.abc import Callable

INTERRUPTED = 130


class InputError(Exception):
    """Bad input, found before any work is done."""


def at_least(minimum: int) -> Callable[[str], int]:
    """A type of arguments: an integer of at least this."""

    def integer(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = minimum - 1
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer of at least {minimum}")
        return value

    return integer
