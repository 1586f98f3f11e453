"""``python -m benchmarks``: measure, write the JSON, and make the tables and the plots from it."""

from __future__ import annotations

import sys
from importlib import import_module

COMMANDS = {"gpu": "benchmarks.gpu.command", "report": "benchmarks.report"}
"""By the first word; anything else is the names of tables. What a GPU's command needs is less than the tables'."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns 0, 1 where something failed, 2 for bad input."""
    given = sys.argv[1:] if arguments is None else arguments
    module = COMMANDS.get(given[0]) if given else None
    try:
        command = import_module(module or "benchmarks.command")
    except ModuleNotFoundError as error:
        if error.name not in ("matplotlib", "rich"):
            raise
        print(f"benchmarks: {error.name} is not installed; pip install matplotlib rich", file=sys.stderr)
        return 2
    return int(command.main(given[1:] if module else given))


if __name__ == "__main__":
    sys.exit(main())
