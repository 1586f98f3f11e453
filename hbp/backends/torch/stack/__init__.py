"""Stacks of residual layers: a container of its own, and existing models converted in place."""
