"""All experiments, by name, in the order of the page."""

from __future__ import annotations

from importlib import import_module

from experiments.experiment import Experiment

MODULES: tuple[str, ...] = (
    "fig2",
    "fig3",
    "fig4",
    "fig5",
    "fig6",
    "tables",
    "schedules",
    "chunks",
    "damping",
    "changing",
    "ranks",
    "gates",
    "adding",
    "adding_gates",
    "wide",
    "wide_gates",
    "splits",
    "memory",
)
"""Each a module beside this one that holds an `EXPERIMENT` of its name."""


def experiment(name: str) -> Experiment:
    """One of them; ValueError for an unknown name."""
    if name not in MODULES:
        raise ValueError(f"there is no experiment {name!r}; give some of {', '.join(MODULES)}, or all")
    found: Experiment = import_module(f"experiments.{name}").EXPERIMENT
    return found
