"""One module per array library; each imports its library, and is imported only when it is chosen."""
