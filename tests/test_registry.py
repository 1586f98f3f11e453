"""Which backend is chosen, and that nothing is imported to find out."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from contextlib import nullcontext
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

import hbp
from hbp.core import registry
from hbp.core.registry import load, resolve

X = np.ones(3)
CHAIN = hbp.LinearizedChain([lambda g: 0.5 * g] * 2)
LIBRARIES = ("numpy", "torch", "jax", "cupy")


@pytest.fixture(params=["torch", "jax"])
def other(request: pytest.FixtureRequest) -> str:
    """An installed backend that does not own NumPy's arrays."""
    return pytest.importorskip(request.param).__name__


def chosen(*arrays: Any, backend: Any = None) -> str:
    return resolve(backend, *(arrays or (X,))).name


# Order of precedence


def test_the_arrays_choose_where_nothing_is_pinned(library):
    assert hbp.backend_of(library.array(X), library.array(X)) == library.name
    assert resolve(None, library.array(X)) is library.front_end.backend


@pytest.mark.parametrize(("name", "kind"), [("cupy", "ndarray"), ("torch", "Tensor"), ("jax", "Array")])
def test_whose_an_array_is_needs_no_installation(name, kind, monkeypatch):
    library = ModuleType(name)
    monkeypatch.setattr(library, kind, type(kind, (), {}), raising=False)
    monkeypatch.setitem(sys.modules, name, library)
    assert hbp.backend_of(getattr(library, kind)()) == name


def test_numpy_scalars_belong_to_numpy():
    assert hbp.backend_of(np.float64(1.0), X) == "numpy"


def test_the_process_pin_beats_the_arrays(other):
    front_end = hbp.use(other)
    assert front_end is load(other)
    assert front_end.__name__ == f"hbp.backends.{other}"
    with pytest.raises(TypeError, match=rf"backend is '{other}' and the arrays belong to numpy; give {other} arrays"):
        hbp.backprop(CHAIN, X)
    assert hbp.use(None) is None
    assert chosen() == "numpy"


def test_the_scope_beats_the_process_pin(other):
    hbp.use(other)
    with hbp.using("numpy") as front_end:
        assert front_end.__name__ == "hbp.backends.numpy"
        assert chosen() == "numpy"
        with hbp.using(other), pytest.raises(TypeError, match=other):
            chosen()
        assert chosen() == "numpy"
    with pytest.raises(TypeError, match=other):
        chosen()
    with hbp.using(None) as nothing:
        assert nothing is None
        assert chosen() == "numpy"


def test_the_argument_beats_scope_and_pin(other):
    hbp.use(other)
    with hbp.using(other):
        for backend in ("numpy", load("numpy").backend):
            assert chosen(backend=backend) == "numpy"
            assert hbp.backprop(CHAIN, X, backend=backend)[0].tolist() == [2.25] * 3
    with pytest.raises(TypeError, match=rf"backend is '{other}'"):
        hbp.highway(CHAIN, X, 1, backend=other)


@pytest.mark.parametrize("entrance", ["backprop", "highway", "iterates", "report", "propagate", "linearize"])
def test_every_entrance_reads_the_pin(entrance, other):
    def half(x: Any) -> Any:
        return 0.5 * x, lambda g: 0.5 * g

    calls = {
        "backprop": lambda **kw: hbp.backprop(CHAIN, X, **kw),
        "highway": lambda **kw: hbp.highway(CHAIN, X, 1, **kw),
        "iterates": lambda **kw: list(hbp.iterates(CHAIN, X, **kw)),
        "report": lambda **kw: hbp.report(CHAIN, X, **kw),
        "propagate": lambda **kw: hbp.propagate(hbp.Scalar(0.5), X, **kw),
        "linearize": lambda **kw: (hbp.linearize([half], X, **kw), hbp.linearize_layers([half], X, **kw)),
    }
    with hbp.using(other):
        with pytest.raises(TypeError, match="arrays belong to numpy"):
            calls[entrance]()
        calls[entrance](backend="numpy")


def test_a_front_end_is_bound_to_its_backend_and_ignores_the_pin(library, other):
    x, own = library.array(X), library.front_end
    chain = own.LinearizedChain([lambda g: 0.5 * g] * 3, own.Diagonal(library.array(np.ones((3, 3)))))
    pin = other if library.name != other else "numpy"
    hbp.use(pin)
    with hbp.using(pin):
        assert library.numpy(own.backprop(chain, x))[0].tolist() == [1.5**3] * 3
        assert library.numpy(own.highway(chain, x, iterations=1, chunk=2))[0].shape == (3,)
        assert len(list(own.iterates(chain, x, chunk=2))) == 3
        assert own.report(chain, x, chunk=2).exact
        assert library.numpy(own.propagate(own.Scalar(0.5), x)).tolist() == [1.75, 1.5, 1.0]
        y, _ = own.linearize([lambda x: (0.5 * x, lambda g: 0.5 * g)], x)
        assert library.numpy(y).tolist() == [1.5] * 3
        y, _ = own.linearize_layers([lambda x: (0.5 * x, lambda g: 0.5 * g)], x)
        assert library.numpy(y).tolist() == [0.5] * 3


def test_front_ends_offer_the_same_names():
    names = {name: set(load(name).__all__) for name in LIBRARIES[:3] if find_spec(name)}
    core = {"Dense", "Diagonal", "Identity", "LinearizedChain", "Pair", "Scalar", "Schedule", "Zero", "backprop"}
    core |= {"highway", "iterates", "linearize", "linearize_layers", "propagate", "report", "vjp"}
    for name, offered in names.items():
        assert core <= offered
        assert all(hasattr(load(name), entry) for entry in offered)


# Scopes


def test_exceptions_restore_the_scope(other):
    with pytest.raises(KeyError), hbp.using(other):
        raise KeyError
    assert chosen() == "numpy"
    with hbp.using("numpy"):
        with pytest.raises(ValueError, match="unknown"), hbp.using("nonsense"):
            pytest.fail("the body must not run")
        assert chosen() == "numpy"


def test_a_failed_use_keeps_the_pin(other):
    hbp.use(other)
    with pytest.raises(ValueError, match="nonsense"):
        hbp.use("nonsense")
    with pytest.raises(TypeError, match=other):
        chosen()


def test_scopes_belong_to_their_threads(other):
    barrier, found = threading.Barrier(2, timeout=30), {}

    def work(name: str) -> None:
        try:
            with hbp.using(name):
                barrier.wait()  # both are inside
                try:
                    found[name] = chosen()
                except TypeError as error:
                    found[name] = str(error)
                barrier.wait()
            barrier.wait()  # both are outside
            found[name, "after"] = chosen()
        except BaseException:
            barrier.abort()
            raise

    threads = [threading.Thread(target=work, args=(name,)) for name in ("numpy", other)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found["numpy"] == "numpy"
    assert f"the backend is {other!r}" in found[other]
    assert found["numpy", "after"] == found[other, "after"] == "numpy"


def test_the_process_pin_reaches_new_threads_and_a_scope_does_not(other):
    found = []

    def work() -> None:
        try:
            found.append(chosen())
        except TypeError as error:
            found.append(str(error))

    for pin in (None, other):
        hbp.use(pin)
        with hbp.using(other if pin is None else "numpy"):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
    assert found[0] == "numpy"
    assert other in found[1]


# Errors


@pytest.mark.parametrize("name", ["nonsense", "Torch", "", "hbp"])
def test_an_unknown_name_is_a_value_error(name):
    for call in (hbp.use, load, lambda name: resolve(name, X), lambda name: hbp.backprop(CHAIN, X, backend=name)):
        with pytest.raises(ValueError, match=r"unknown backend .*numpy, cupy, torch, jax.*installed here: .*numpy"):
            call(name)


@pytest.mark.parametrize("name", ["torch", "jax", "cupy"])
def test_a_missing_library_is_an_import_error(name, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    message = rf"'{name}' needs the library {name}, .*not installed.*installed here: .*numpy.*pip install"
    for call in (hbp.use, load, lambda name: resolve(name, X)):
        with pytest.raises(ImportError, match=message):
            call(name)
    entry = hbp.available()[name]
    assert not entry
    assert (entry.version, entry.device) == (None, None)
    assert "not installed" in entry.reason
    assert "unusable" in str(entry)
    assert hbp.backend_of(X) == "numpy"


def test_cupy_without_a_device_is_a_runtime_error(monkeypatch):
    cupy = ModuleType("cupy")
    cupy.__version__ = "13.9"
    cupy.cuda = SimpleNamespace(is_available=lambda: False)
    cupy.ndarray = type("ndarray", (), {})
    for name in [name for name in sys.modules if name.split(".")[0] == "cupy" or name.startswith("hbp.backends.cupy")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    for _ in range(2):  # a failed import must not be remembered as a good one
        with pytest.raises(RuntimeError, match=r"cupy 13.9 finds no CUDA device.*use numpy"):
            hbp.use("cupy")
    assert hbp.backend_of(cupy.ndarray()) == "cupy"  # whose an array is needs no device
    entry = hbp.available()["cupy"]
    assert not entry
    assert (entry.version, entry.device) == ("13.9", None)
    assert "no CUDA device" in entry.reason
    assert chosen() == "numpy"
    sys.modules.pop("hbp.backends.cupy.array", None)


def test_what_is_available():
    found = hbp.available()
    assert list(found) == ["numpy", "cupy", "torch", "jax"]
    assert found["numpy"]
    assert found["numpy"].version == np.__version__
    assert str(found["numpy"]) == f"{np.__version__}, cpu"
    for name, entry in found.items():
        assert bool(entry) == (entry.reason is None) == (entry.device is not None)
        if entry:
            assert hbp.use(name).backend.name == name


@pytest.mark.parametrize("value", [[1.0, 2.0], (1.0,), 3.0, None, "numpy"])
def test_what_is_no_array_is_refused(value):
    for call in (hbp.backend_of, lambda value: resolve(None, value), lambda value: hbp.backprop(CHAIN, value)):
        with pytest.raises(TypeError, match=rf"a {type(value).__name__} is not an array of numpy.*nothing is conver"):
            call(value)


def test_no_arrays_tell_nothing():
    with pytest.raises(TypeError, match="at least one array"):
        hbp.backend_of()


def test_mixed_libraries_are_refused(other):
    y = __import__(other).asarray(X) if other == "torch" else load(other).backend.xp.asarray(X)
    message = rf"several libraries: \['{min('numpy', other)}', '{max('numpy', other)}'\]; nothing is converted"
    with pytest.raises(TypeError, match=message):
        hbp.backend_of(X, y)
    with pytest.raises(TypeError, match=message):
        hbp.highway(CHAIN, X, 1, sources=y)
    chain = hbp.LinearizedChain(CHAIN.pullbacks, hbp.Scalar(y[:2]))
    with pytest.raises(TypeError, match=message):
        hbp.highway(chain, X, 1)
    with pytest.raises(TypeError, match=message):
        load("numpy").highway(chain, X, 1)


# Imports


def imported(code: str) -> set[str]:
    """The modules that a fresh interpreter holds after running this code."""
    script = f"{code}\nimport json, sys\nprint(json.dumps(sorted(sys.modules)))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return set(json.loads(run.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "code",
    [
        "import hbp",
        "import hbp.core.adjoint, hbp.core.registry, hbp.core.scan, hbp.core.schedule",
        "import hbp; hbp.Schedule({0: 1}); hbp.Identity(); hbp.Scalar(0.5) @ hbp.Zero(); hbp.LinearizedChain([])",
        "import hbp\ntry: hbp.backend_of([1.0])\nexcept TypeError: pass",
        "import hbp\ntry: hbp.use('nonsense')\nexcept ValueError: pass",
    ],
)
def test_no_array_library_is_imported(code):
    modules = imported(code)
    assert "hbp.core.chain" in modules
    assert not modules & set(LIBRARIES)
    assert not {name for name in modules if name.startswith("hbp.backends.")} - {"hbp.backends"}


USE = """
import hbp
hb = hbp.use({name!r})
x = hb.backend.xp.{ones}
chain = hbp.LinearizedChain([lambda g: 0.5 * g] * 3, hbp.Scalar(0.9))
assert hbp.backend_of(x) == {name!r}
hbp.use(None)
hbp.highway(chain, x, 1)
"""


@pytest.mark.parametrize("name", LIBRARIES)
def test_a_backend_imports_no_other(name):
    if find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    try:
        load(name)
    except RuntimeError as error:
        pytest.skip(str(error))
    modules = imported(USE.format(name=name, ones="ones(3)"))
    assert name in modules
    assert not modules & {"torch", "jax", "cupy"} - {name}
    found = {module for module in modules if module.count(".") == 2 and module.startswith("hbp.backends.")}
    assert {module for module in found if not module.startswith("hbp.backends._")} == {f"hbp.backends.{name}"}


def test_a_broken_library_is_unusable_and_says_why(monkeypatch):
    def broken(_):
        raise OSError("libcublas.so is missing")

    monkeypatch.setattr(registry, "import_module", broken)
    state = hbp.available()["numpy"]
    assert not state
    assert "OSError: libcublas.so is missing" in str(state)
    with pytest.raises(RuntimeError, match="cannot be loaded"):
        hbp.use("numpy")


@pytest.mark.parametrize("pin", [hbp.use, hbp.using])
@pytest.mark.parametrize("length", [6, 7])  # the last stage whole, and shorter
def test_an_explicit_backend_coarsens_and_solves_whatever_is_pinned(length, pin, foreign, rng):
    residual = hbp.Diagonal(rng.uniform(-1, 1, (length, 3)))
    chain, x = hbp.LinearizedChain([lambda g: 0.5 * g] * length, residual), rng.normal(size=3)
    expected = [hbp.highway(chain, x, k, chunk=3) for k in (0, 1)]
    with pin(foreign) if pin is hbp.using else nullcontext(pin(foreign)):
        with pytest.raises(TypeError, match="the backend is 'cupy' and the arrays belong to numpy"):
            hbp.highway(chain, x, 1)
        coarse = chain.coarsen(3)
        for k in (0, 1):
            found = hbp.highway(coarse, x, k, backend="numpy")
            np.testing.assert_allclose(found, expected[k][[*range(0, length, 3), length]], rtol=1e-14)
            found = hbp.highway(chain, x, k, chunk=3, backend="numpy")
            np.testing.assert_array_equal(found, expected[k])
        assert len(hbp.report(chain, x, chunk=3, backend="numpy").sizes) == len(coarse) + 1
        stages = [it.iteration for it in hbp.iterates(chain, x, chunk=3, backend="numpy")]
        assert stages == list(range(len(coarse) + 1))


@pytest.mark.parametrize(("name", "extra"), [("cupy", "cupy-cuda12"), ("torch", "torch"), ("jax", "jax")])
def test_a_missing_library_names_its_extra(name, extra, monkeypatch):
    monkeypatch.setattr(registry, "_is_installed", lambda library: library == "numpy")
    with pytest.raises(ImportError, match=rf"installed here: numpy\).*pip install 'hbp\[{extra}\]'"):
        load(name)
