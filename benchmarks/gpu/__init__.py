"""``python -m benchmarks gpu``: everything there is to measure on a CUDA device, in given minutes, in order of worth.

`command` plans and runs the `steps`, each in a process of its own (`process`) that writes each result at once
(`record`); `page` and `defaults` read what is there. It needs a checkout and the array libraries: what else it would
like (pytest, matplotlib, accelerated-scan) is said to be missing where it is.
"""
