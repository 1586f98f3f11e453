"""The command line: ``hbp compare`` (the main job), ``hbp plan``, ``hbp tune`` and ``hbp info``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import hbp
from hbp.backends._kernels import level
from hbp.backends._tuning import timings
from hbp.cli import compare, info, plan, tune
from hbp.cli.common import INTERRUPTED, InputError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 2 for bad input, 130 when interrupted."""
    options = _parser().parse_args(arguments)
    try:
        _check_environment(options.run is not tune.run)  # which mends the times
        return int(options.run(options))
    except InputError as error:
        print(f"hbp: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("hbp: interrupted", file=sys.stderr)
        return INTERRUPTED


def _check_environment(with_times: bool) -> None:
    try:
        level()
        if with_times:
            timings()
    except (ValueError, OSError) as error:
        raise InputError(str(error)) from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hbp", description="Highway backpropagation: a parallel backward pass.")
    parser.add_argument("--version", action="version", version=f"hbp {hbp.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (info, compare, plan, tune):
        command.add(commands)
    return parser
