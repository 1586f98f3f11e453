"""``hbp plan``: whether layers spread over devices pay, from bare numbers."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from hbp.cli.common import InputError, at_least


def add(commands: Any) -> None:
    """Add the command to the command line."""
    plan = commands.add_parser(
        "plan",
        help="predict whether Highway-BP over devices pays: step times beside those of pipelines",
        description="Predict a training step's time on P devices, each with a stage of the model, with M microbatches: "
        "by GPipe, 1F1B, put-off weight gradients, zero bubble and Highway-BP. hb.plan measures a model for it.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    plan.set_defaults(run=run)
    times = {"forward": "F, its forward", "pull": "Bi, pulling a cotangent through", "weights": "Bw, weight gradients"}
    for name, what in times.items():
        plan.add_argument(f"--{name}", type=float, default=1.0, metavar="T", help=f"time of a stage, all of M: {what}")
    plan.add_argument("--state-bytes", type=float, default=0.0, metavar="N", help="between two stages, for all of M")
    plan.add_argument("--bandwidth", type=float, default=1e10, metavar="N", help="bytes per unit of time")
    plan.add_argument("--latency", type=float, default=0.0, metavar="T", help="of a message")
    for name, letter, default in (("stages", "P", [2, 4, 8, 16]), ("microbatches", "M", [1, 2, 4, 8])):
        plan.add_argument(f"--{name}", type=at_least(1), nargs="+", default=default, metavar=letter, help="to compare")
    plan.add_argument("--iterations", type=at_least(0), nargs="+", default=[1, 2, 3], metavar="K", help="to compare")
    plan.add_argument("--plot", type=Path, metavar="FILE", help="a picture of time against P")


def run(options: argparse.Namespace) -> int:
    """Print the plan, and draw it."""
    from hbp.planning import Costs, Plan, Settings

    try:
        costs = Costs(options.forward, options.pull, options.weights, options.state_bytes)
        names = ("stages", "microbatches", "iterations", "bandwidth", "latency", "plot")
        settings = Settings(**{name: getattr(options, name) for name in names})
    except (ValueError, ImportError, OSError) as error:
        raise InputError(str(error)) from error
    plan = Plan(settings, dict.fromkeys(settings.stages, costs))
    if options.plot is not None:
        plan.plot(options.plot)
        print(f"wrote {options.plot}")
    print(plan)
    return 0
