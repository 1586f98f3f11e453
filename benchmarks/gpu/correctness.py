"""Tests before times: the kernels', the front ends' with kernels and without, and the sanitizer's.

A kernel whose tests fail is off in all steps after this one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from shutil import which
from typing import Any

from benchmarks.gpu.device import ROOT
from benchmarks.gpu.steps import Part, There, WrongError
from hbp.availability import available
from hbp.backends._kernels import NAMES, VARIABLE

FILES = {lib: f"tests/test_{lib}_kernels.py" for lib in ("torch", "cupy", "jax")}
REHEARSED = {
    "torch": "test_rounds and 3-float32 or test_scan_cut_in_time and 47-float32 or test_bad_input",
    "cupy": "one and float32 or refused",
    "jax": "default_tiles or refused",
}
"""The tests of the kernels that a rehearsal runs; on a device, all that are marked ``gpu``."""
LIBRARY = {"torch": "torch-cuda", "cupy": "cupy", "jax": "jax-gpu"}
"""How the tests of the front ends name a library on a device."""
SECONDS = 120.0
"""For one run of pytest."""
EXERCISE = ("-m", "benchmarks.gpu.exercise")
TOOLS = {"memory errors": ("memcheck", "--report-api-errors", "no"), "races": ("racecheck",)}
"""A library that looks for a function its driver has not is no error."""
UNPOOLED = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "XLA_PYTHON_CLIENT_ALLOCATOR": "platform"}
"""Within a pool of memory no access is out of bounds."""
OURS = re.compile(r"(scan|gru|lstm|low_rank|settle)_kernel|(scan|summaries)_float|suffix_scan")
"""The kernels' names; the sanitizer watches the libraries' own, too."""


def parts(there: There) -> Iterator[Part]:
    """Kernels, sanitizer, front ends; of each library."""
    level = "off" if there.rehearse else "all"
    found = available()  # CuPy's kernels have a host for a device in their tests
    usable = [lib for lib in FILES if found[lib] or (there.rehearse and lib == "cupy")]
    workers = ["-n", "8"] if find_spec("xdist") and not there.rehearse else []
    for lib in usable:
        file = FILES[lib]
        chosen = ["-k", REHEARSED[lib]] if there.rehearse else ["-m", "gpu"]
        yield Part(f"kernels of {lib}", partial(_pytest, [*chosen, *workers, file], level))
    for lib in usable:
        only = "CuPy has no arrays without a device" if lib == "cupy" else None
        yield Part(f"every kernel of {lib} once", partial(_exercised, lib), only)
    reason = "compute-sanitizer watches programs on a device"
    for what, tool in TOOLS.items():
        for lib in usable:
            yield Part(f"{what} in the kernels of {lib}", partial(_sanitized, tool, lib), reason)
    others = [f"--ignore={file}" for file in FILES.values()]
    if find_spec("hypothesis") is None:
        others.append("--ignore=tests/test_properties.py")
    for level in ("all", "off"):
        for lib in usable:
            run = partial(_pytest, ["tests", *others, *workers, "-m", "gpu", "-k", LIBRARY[lib]], level)
            yield Part(f"front end of {lib}, kernels {level}", run, "the tests marked gpu; others run everywhere")


def passed(there: There) -> list[str]:
    """The kernels that may run in the steps after this one: all that were tested, without those that failed."""
    found = there.results("correctness")
    names = []
    for name in NAMES:
        lib = name.split(".")[0]
        own = found.get(f"kernels of {lib}")
        on, off = (found.get(f"front end of {lib}, kernels {level}", {"failed": []}) for level in ("all", "off"))
        wrong = [*(own or {}).get("failed", []), *(test for test in on["failed"] if test not in off["failed"])]
        sane = all(found.get(f"{what} in the kernels of {lib}", {}).get("errors", 0) == 0 for what in TOOLS)
        ran = own is not None and own["passed"] and f"every kernel of {lib} once" in found
        if ran and sane and not any(_concerns(test, name) for test in wrong):
            names.append(name)
    return names


def _concerns(test: str, kernel: str) -> bool:
    """A test that names a cell speaks of that cell's kernels, any other of all; with directions, of those with them."""
    cells = [cell for cell in ("gru", "lstm") if cell in test.lower()]
    told = not cells or any(f".{cell}_" in kernel for cell in cells)
    return told and ("directions" not in test or "low_rank" in kernel)


def _pytest(arguments: list[str], level: str) -> dict[str, Any]:
    """The names of the tests that failed, and how many passed and were skipped, also where time was over."""
    if find_spec("pytest") is None:
        raise RuntimeError("pytest is not installed: nothing is tested, and no kernel is measured")
    # a warning of a library that is newer than the tests know is no kernel's fault
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "--tb=short",
        "-p",
        "no:cacheprovider",
        "-W",
        "default",
        *arguments,
    ]
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | {VARIABLE: level}, capture_output=True, text=True, timeout=SECONDS
        )
        output, status = done.stdout + done.stderr, done.returncode
    except subprocess.TimeoutExpired as caught:
        output, status = (caught.stdout or b"").decode(errors="replace"), -1
    print(output, file=sys.stderr)
    found = outcomes(output)
    if status not in (0, 1) or not found["passed"]:
        what = f"had no end within {SECONDS:.0f} s" if status == -1 else f"ended with {status}"
        raise RuntimeError(f"pytest {what}: {found}; its last lines: {output.strip()[-500:]}")
    if found["failed"]:
        raise WrongError(f"{len(found['failed'])} tests failed", found)
    return found


def outcomes(output: str) -> dict[str, Any]:
    """What ``pytest -v`` printed, with or without workers: the failed tests, and how many passed and were skipped."""
    by_test = {}
    for line in output.splitlines():
        words = re.search(r"\b(PASSED|FAILED|ERROR|SKIPPED)\b", line)
        test = re.search(r"\S+\.py::\S+", line)
        if words and test:
            by_test[test.group()] = words.group()
    kinds = list(by_test.values())
    failed = [test for test, kind in by_test.items() if kind in ("FAILED", "ERROR")]
    return {"failed": failed, "passed": kinds.count("PASSED"), "skipped": kinds.count("SKIPPED")}


def _exercised(lib: str) -> str:
    command = [sys.executable, *EXERCISE, lib]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    print(done.stdout, done.stderr, file=sys.stderr)
    if done.returncode:
        raise RuntimeError(f"ended with {done.returncode}: {done.stderr.strip()[-500:]}")
    return done.stdout.strip()


def _sanitized(tool: Sequence[str], lib: str) -> dict[str, Any]:
    """How many errors the sanitizer saw in a library's kernels while each ran on small arrays, and in others."""
    found = which("compute-sanitizer") or which("compute-sanitizer", path="/usr/local/cuda/bin")
    if found is None:
        raise RuntimeError("compute-sanitizer is not installed")
    command = [found, "--tool", *tool, sys.executable, *EXERCISE, lib]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | UNPOOLED, capture_output=True, text=True, timeout=SECONDS)
    said = done.stdout + done.stderr
    print(said, file=sys.stderr)
    summary = re.search(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", said)
    if summary is None or "exercised" not in said:
        raise RuntimeError(f"{tool[0]} ended with {done.returncode}: {said.strip()[-500:]}")
    every = int(summary.group(1))
    errors = every if OURS.search(said) else 0
    if errors:
        raise WrongError(f"{errors} errors", {"errors": errors, "said": said.strip()[:2000]})
    return {"errors": 0, "in other kernels": every}
