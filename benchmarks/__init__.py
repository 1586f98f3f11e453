"""Benchmarks that compare frameworks: ``python -m benchmarks --help``."""
