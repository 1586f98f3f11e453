"""Whether layers over devices pay: step times of pipelines and of Highway-BP predicted, compared, and an advice."""

from hbp.planning.costs import Costs, Link, Step
from hbp.planning.rows import Plan, Row, Settings

__all__ = ["Costs", "Link", "Plan", "Row", "Settings", "Step"]
