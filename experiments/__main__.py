"""``python -m experiments``: run experiments, write the records, and make the page from them."""

from __future__ import annotations

import sys
from importlib import import_module

NEEDED = ("matplotlib", "rich", "threadpoolctl")


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns 0, 1 where something failed, 2 for bad input, 130 when interrupted."""
    given = sys.argv[1:] if arguments is None else arguments
    reports = given[:1] == ["report"]
    try:
        command = import_module("experiments.page" if reports else "experiments.command")
    except ModuleNotFoundError as error:
        if error.name not in NEEDED:
            raise
        print(f"experiments: {error.name} is not installed; pip install {' '.join(NEEDED)}", file=sys.stderr)
        return 2
    return int(command.main(given[1:] if reports else given))


if __name__ == "__main__":
    sys.exit(main())
