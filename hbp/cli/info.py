"""``hbp info``: which backends work here, and what runs."""

from __future__ import annotations

import argparse
import sys
from typing import Any

import hbp
from hbp.backends._tuning import timings
from hbp.core.registry import load


def add(commands: Any) -> None:
    """Add the command to the command line."""
    info = commands.add_parser("info", help="backends, their versions, devices and kernels, and why one is unusable")
    info.set_defaults(run=run)


def run(_: argparse.Namespace) -> int:
    """Print it."""
    print(f"hbp {hbp.__version__}, Python {sys.version.split()[0]}")
    for name, state in hbp.available().items():
        print(f"  {name:<6} {state}")
        if state.device is not None:
            print(f"         kernels: {load(name).backend.kernel_state()}")
    print(f"  times  {'; '.join(timings().sources)}")
    return 0
