"""What `hbp compare` measures with and shows: its threads, its plot, the block steps in its table."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

import hbp
from hbp import cli

pytestmark = pytest.mark.skipif(
    any(find_spec(module) is None for module in cli.compare.DEMO), reason="the extra hbp[demo] is not installed"
)


def threads_of(backend):
    """Those that NumPy's BLAS, PyTorch and the compiled kernels use now, and the variables that say so."""
    from threadpoolctl import threadpool_info

    found = {Path(pool["filepath"]).name: pool["num_threads"] for pool in threadpool_info()}
    if find_spec("numba"):
        from hbp.backends._numba.compile import own_threads

        found["kernels"] = own_threads().count
    if backend == "torch":
        report = sys.modules["torch"].__config__.parallel_info()  # of OpenMP's and, where it is linked in, MKL's
        found |= {name: int(count) for name, count in re.findall(r"(\w+_max_threads)\(\) : (\d+)", report)}
    return found, {name: os.environ.get(name) for name in ("OMP_NUM_THREADS", "NPROC")}


@pytest.fixture
def two_threads(library, monkeypatch):
    """Two threads where a library can be told, as on a machine with two cores."""
    import threadpoolctl

    import hbp.demo.results  # noqa: F401 - scikit-learn's pools are there

    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    if find_spec("numba"):
        import numba

        monkeypatch.setattr(numba.config, "NUMBA_NUM_THREADS", 2)
    torch = sys.modules["torch"] if library.name == "torch" else None
    with threadpoolctl.threadpool_limits(2):
        before = torch and torch.get_num_threads()
        if torch:
            torch.set_num_threads(2)
        yield
        if torch:
            torch.set_num_threads(before)


@pytest.mark.parametrize("threads", [None, 2])
def test_training_has_the_threads_it_is_given_and_gives_them_back(threads, library, two_threads, tmp_path, monkeypatch):
    from hbp.demo import compare

    seen, step = [], compare.Trainer.step
    monkeypatch.setattr(compare.Trainer, "step", lambda *args: (seen.append(threads_of(library.name)), step(*args)))
    monkeypatch.setattr(cli.compare.os, "cpu_count", lambda: 2)
    before = threads_of(library.name)
    assert set(before[0].values()) == {2}
    chosen = [] if threads is None else ["--threads", str(threads)]
    arguments = [
        "--backend",
        library.name,
        "--steps",
        "1",
        "--iterations",
        "0",
        "--chunks",
        "1",
        "--ranks",
        "0",
        *chosen,
    ]
    assert cli.main(["compare", *arguments, "--ranks", "0", "--output", str(tmp_path)]) == 0
    assert len(seen) == 2
    expected = threads or 1
    for pools, variables in seen:
        assert set(pools.values()) == {expected}
        assert set(variables.values()) == {str(expected)}
    assert threads_of(library.name) == before
    assert json.loads((tmp_path / "compare.json").read_text())["settings"]["threads"] == expected


@pytest.mark.skipif(sys.platform != "linux", reason="counts the threads that Linux lists")
def test_jax_starts_with_the_threads_given(library):
    if library.name != "jax":
        pytest.skip("PyTorch's and NumPy's can be told at any time")
    code = (
        "import pathlib, jax; from hbp.demo.threads import limited\n"
        "with limited(3): jax.numpy.ones(3).block_until_ready()\n"
        "print([path.read_text() for path in pathlib.Path('/proc/self/task').glob('*/comm')])"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.count("XLAEigen") == 3


SHARES = {"forward_ms": 0.25, "backward_ms": 0.5, "update_ms": 0.25}


def made(step_ms, **options):
    """A run whose steps took so long."""
    from hbp.demo.compare import Run

    n = len(step_ms)
    parts = {name: [ms * share for ms in step_ms] for name, share in SHARES.items()}
    return Run(**options, losses=[1 / (i + 1) for i in range(n)], cosines=[1.0], accuracies=[(n, 0.5)], **parts)


@pytest.fixture
def figure(monkeypatch, tmp_path):
    """Plots runs and returns the figure."""
    from hbp.demo import compare, results

    kept = []
    monkeypatch.setattr(results.plt, "close", kept.append)

    def plotted(runs):
        results.plot(runs, compare.Settings(steps=len(runs[0].losses)), tmp_path / "plot.png")
        return kept[-1]

    yield plotted
    monkeypatch.undo()
    results.plt.close("all")


def test_the_time_axis_is_the_tables_time_and_not_the_machines_load(figure):
    runs = [
        made([4, 4, 4000, 4, 4], method="exact", iterations=None, chunk=1),
        made([9, 8, 8, 8, 700], method="highway", iterations=1, chunk=1),
    ]
    lines = figure(runs).axes[1].get_lines()
    for line, median_ms in zip(lines, (4, 8), strict=True):
        assert line.get_xdata() == pytest.approx([step * median_ms / 1e3 for step in range(1, 6)])


@pytest.mark.parametrize("chunks", [(1, 8), (1, 2, 4, 8, 16)])
def test_legends_lie_off_the_curves(chunks, figure):
    families = [("exact", None, 1), *(("highway", k, chunk) for chunk in chunks for k in (0, 1, 3, 8))]
    runs = [made([1, 2], method=name, iterations=k, chunk=chunk) for name, k, chunk in families]
    runs += [made([1, 2], method="highway", iterations=None, chunk=1, rank=rank, tolerance=0.1) for rank in (8, "auto")]
    for run in runs:
        run.rounds += [3, 4]
    drawn = figure(runs)
    legends = [*drawn.legends, *(axes.get_legend() for axes in drawn.axes if axes.get_legend())]
    assert len(legends) == 2
    boxes = [legend.get_window_extent() for legend in legends]
    drawings = [part.get_tightbbox() for axes in drawn.axes for part in (axes.patch, axes.xaxis, axes.yaxis)]
    for i, box in enumerate(boxes):
        assert not any(box.overlaps(other) for other in [*drawings, *boxes[:i]])
        assert drawn.bbox.contains(box.x0, box.y0)
        assert drawn.bbox.contains(box.x1, box.y1)


def test_block_steps_are_those_of_the_longest_path_in_the_gradient():
    """Where blocks multiply by a, a gradient is a polynomial in a: its degree counts blocks one after another."""
    from hbp.demo.compare import Settings, runs

    def gradient(run, a):
        chain = hbp.LinearizedChain([lambda g: a * g] * 64)
        chain = chain if run.residual is None else chain.resplit(run.residual)
        return hbp.highway(chain, np.ones(1), iterations=run.k and round(run.k), chunk=run.chunk)[1:]

    for run in runs(Settings(iterations=(0, 1, 3))):
        run.rounds.append(2)
        low, high = gradient(run, 1e3), gradient(run, 1e4)
        degree = round(np.log10(high[low > 0] / low[low > 0]).max())
        assert run.block_steps(64) == degree + 1  # and the step from the state to the parameters


@pytest.mark.parametrize(("k", "chunk", "expected"), [(9, 100, 10 + 10), (3, 4, 4 * 4), (7, 4, 4 * 4), (99, 1, 11)])
def test_block_steps_stop_where_the_solver_does(k, chunk, expected):
    """Ten steps: no stage is longer, and as many iterations as there are stages are the last."""
    from hbp.demo.compare import Run

    calls = []
    chain = hbp.LinearizedChain([lambda g: calls.append(0) or g] + [lambda g: g] * 9)
    hbp.highway(chain, np.ones(1), iterations=k, chunk=chunk)
    rounds = len(calls)
    assert expected == min(chunk, 10) * (rounds + 1)
    assert Run("highway", k, chunk).block_steps(10) == expected
