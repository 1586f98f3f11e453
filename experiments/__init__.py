"""The paper's figures and tables, and what goes beyond them: ``python -m experiments --help``."""
