"""``hbp tune``: measure which way is the fastest on this CPU, and keep that."""

from __future__ import annotations

import argparse
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from hbp.backends._kernels import CPU
from hbp.backends._tuned import VARIABLE
from hbp.backends._tuning import cache_file
from hbp.cli.common import InputError
from hbp.tuning import LIBRARIES, tune


def add(commands: Any) -> None:
    """Add the command to the command line."""
    parser = commands.add_parser(
        "tune",
        help="measure on this CPU which way is the fastest at which size, and keep that",
        description="Time forward, backward and training steps of recurrent layers and stacks at a few sizes on this "
        "machine's CPU, in a minute or two, and keep the times in the user's cache folder, where the "
        "library looks from then on. Let the machine be idle meanwhile.",
    )
    parser.set_defaults(run=run)
    parser.add_argument("--backend", choices=LIBRARIES, help="one library only (default: all that are installed)")
    parser.add_argument("--output", type=Path, metavar="FILE", help=f"elsewhere, for the variable {VARIABLE}")
    parser.add_argument("--forget", action="store_true", help="delete the times kept, and go back to those shipped")


def run(options: argparse.Namespace) -> int:
    """Measure and keep the times, or forget those kept."""
    if options.forget:
        return _forget(alone=options.backend is None and options.output is None)
    compiled = CPU.load() is not None
    installed = [name for name in LIBRARIES if find_spec(name) is not None and (compiled or name != "numpy")]
    if not installed:
        raise InputError(f"nothing to tune: no PyTorch is installed, and no compiled loops: {CPU.state()}")
    try:
        path = tune([options.backend] if options.backend else installed, path=options.output)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        raise InputError(str(error)) from error
    print(f"wrote {path}")
    if options.output is None and os.environ.get(VARIABLE):
        print(f"{VARIABLE}={os.environ[VARIABLE]} is read instead, until it is unset")
    return 0


def _forget(alone: bool) -> int:
    try:
        path = cache_file()
        if not alone:
            raise InputError(f"--forget deletes {path}, whole; give it alone")
        found = path.exists()
        path.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:
        raise InputError(str(error)) from error
    print(f"deleted {path}" if found else f"nothing is kept at {path}")
    return 0
