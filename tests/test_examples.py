"""The worked examples in a shortened form, and the docstrings of the front ends."""

from __future__ import annotations

import doctest
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

import hbp

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str, monkeypatch: Any) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


@pytest.mark.parametrize("arguments", [[], ["--masked", "--model", "llama"]])
def test_convert_transformer(monkeypatch, tmp_path, arguments):
    for needed in ("torch", "transformers", "rich", "matplotlib"):
        pytest.importorskip(needed)
    module = example("convert_transformer", monkeypatch)
    monkeypatch.setattr(module, "LENGTH", 16)
    monkeypatch.setattr(module, "BATCH", 4)
    (result,) = module.main([*arguments, "--steps", "4", "--target", "0.05", "--plot", str(tmp_path / "curves.png")])
    assert result["k"] < result["layers"]
    assert result["highway"] == pytest.approx(result["exact"], rel=1e-3)
    assert (tmp_path / "curves.png").exists()


def test_resnet_digits(monkeypatch):
    for needed in ("torch", "sklearn", "rich"):
        pytest.importorskip(needed)
    rows = example("resnet_digits", monkeypatch).main(
        ["--iterations", "9", "--seeds", "1", "--epochs", "1", "--width", "4"]
    )
    assert rows[1]["loss"] == pytest.approx(rows[0]["loss"], rel=1e-2)


def test_language_model_gru(monkeypatch):
    for needed in ("torch", "rich"):
        pytest.importorskip(needed)
    module, made = example("language_model_gru", monkeypatch), []

    class Kept(module.LanguageModel):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    class AtZero(hbp.Schedule):
        def __post_init__(self) -> None:
            object.__setattr__(self, "phases", {0: 0})

    def trained() -> list[Any]:
        """The recurrent weights that training ends with, by each method."""
        made.clear()
        rows = module.main(["--steps", "4", "--length", "24", "--hidden", "8", "--chunk", "12"])
        assert len({round(row["loss"], 3) for row in rows}) == 1
        return [module.torch.cat([p.detach().flatten() for p in model.gru.parameters()]) for model in made]

    monkeypatch.setattr(module, "LanguageModel", Kept)
    library, adjoint, highway = trained()  # two stages: all parameters' gradients are exact from k = 1
    monkeypatch.setattr(hbp, "Schedule", AtZero)
    *_, rough = trained()
    assert (adjoint - library).norm() < 1e-3 * (rough - library).norm()
    assert (highway - library).norm() < 1e-3 * (rough - library).norm()


@pytest.mark.parametrize("library", ["numpy", "cupy"], indirect=True)
def test_adding_arrays(library, monkeypatch):
    main = example("adding_arrays", monkeypatch).main
    arguments = ["--library", library.name, "--steps", "30", "--length", "16", "--hidden", "8", "--chunk", "8"]
    exact, rough, whole = (row["loss"] for row in main([*arguments, "--iterations", "0", "2"]))  # two stages
    assert abs(whole - exact) < 1e-2 * abs(rough - exact)


def test_digits_jax(monkeypatch):
    for needed in ("jax", "optax", "sklearn"):
        pytest.importorskip(needed)
    main = example("digits_jax", monkeypatch).main
    exact, rough, whole = (row["loss"] for row in main(["--layers", "3", "--epochs", "1", "--iterations", "0", "3"]))
    assert abs(whole - exact) < 1e-2 * abs(rough - exact)


def depth_parallel_on(mesh: Any, rounds: str) -> Any:
    sys.path.insert(0, str(EXAMPLES))
    try:
        arguments = ["--layers", "4", "--steps", "4", "--rounds", rounds, "--exact-from", "1"]
        return importlib.import_module("depth_parallel").main(arguments)
    finally:
        sys.path.remove(str(EXAMPLES))


def test_depth_parallel(ranks):
    for needed in ("torch", "transformers"):
        pytest.importorskip(needed)
    for rounds, error in (("4", 1e-6), ("0", 1e-2)):
        found, *others = ranks(depth_parallel_on, rounds)
        assert others == [None] * 3
        assert found["losses"] == pytest.approx(found["alone"], rel=error)
        assert found["losses"][0] == pytest.approx(found["alone"][0], rel=1e-6)
    assert found["losses"] != pytest.approx(found["alone"], rel=1e-5)  # one round less shows


OPTIONAL = {"torch.kernels": "triton"}
"""Folders below `hbp.backends` that need more than their library."""


@pytest.mark.parametrize("folder", ["jax", "torch", *OPTIONAL])
def test_docstrings(folder):
    pytest.importorskip(folder.split(".")[0])
    pytest.importorskip(OPTIONAL.get(folder, "doctest"))
    backends = Path(hbp.__file__).parent / "backends"
    files = (path.relative_to(backends).with_suffix("") for path in backends.joinpath(*folder.split(".")).rglob("*.py"))
    names = [".".join(path.parts).removesuffix(".__init__") for path in files]
    names = [name for name in names if not any(name.startswith(other) for other in OPTIONAL if other != folder)]
    results = [doctest.testmod(importlib.import_module(f"hbp.backends.{name}")) for name in names]
    assert folder in OPTIONAL or sum(result.attempted for result in results) >= 10
    assert not any(result.failed for result in results)
