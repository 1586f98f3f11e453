"""The worked examples in a shortened form, and the docstrings of the front ends."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


def example(name: str, monkeypatch: Any) -> Any:
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delitem(sys.modules, name, raising=False)
    return importlib.import_module(name)


@pytest.mark.parametrize("arguments", [[], ["--masked", "--model", "llama"]])
def test_convert_transformer(monkeypatch, tmp_path, arguments):
    for needed in ("torch", "transformers", "rich", "matplotlib"):
        pytest.importorskip(needed)
    main = example("convert_transformer", monkeypatch).main
    (result,) = main([*arguments, "--steps", "4", "--target", "1e-4", "--plot", str(tmp_path / "curves.png")])
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
    rows = example("language_model_gru", monkeypatch).main(
        ["--steps", "4", "--length", "24", "--hidden", "8", "--chunk", "8"]
    )
    assert len({round(row["loss"], 3) for row in rows}) == 1


@pytest.mark.parametrize("library", ["jax", "torch"])
def test_docstrings(library):
    pytest.importorskip(library)
    package = importlib.import_module(f"hbp.backends.{library}")
    names = [found.name for found in pkgutil.walk_packages(package.__path__, f"hbp.backends.{library}.")]
    results = [doctest.testmod(importlib.import_module(name)) for name in names]
    assert sum(result.attempted for result in results) >= 10
    assert not any(result.failed for result in results)
