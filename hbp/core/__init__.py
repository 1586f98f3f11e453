"""The algorithm, over abstract operators and pullbacks; imports no array library."""
