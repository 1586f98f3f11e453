"""The experiments' models: the parameter counts of the paper's table 2, and gradients exact when they should be."""

from __future__ import annotations

from dataclasses import replace

import pytest

from experiments.models import build
from experiments.settings import problem

torch = pytest.importorskip("torch")
pytest.importorskip("sklearn")

from experiments.models.torch import trained  # noqa: E402

TABLE_2 = {
    "resnet32": "464k", "resnet110": "1.7M", "resnet56": "917k", "lstm": "2.3M", "gru": "1.8M", "gru3": "21.1M",
    "pixels": "29.8k",
}  # fmt: skip


def printed(count: int, like: str) -> str:
    unit, digits = like[-1], len(like.partition(".")[2]) - 1 if "." in like else 0
    return f"{count / {'k': 1e3, 'M': 1e6}[unit]:.{digits}f}{unit}"


@pytest.mark.parametrize("name", TABLE_2)
def test_parameters_of_table_2(name):
    with torch.device("meta"):
        assert printed(trained(build(problem(name, "paper").sizes)), TABLE_2[name]) == TABLE_2[name]


def test_layers_of_table_2():
    """The column L, of those in parallel over depth."""
    expected = {"resnet32": 15, "resnet110": 54, "resnet56": 27, "gpt2": 24, "roberta": 24}
    with torch.device("meta"):
        found = {
            name: len(
                build(
                    replace(problem(name, "paper").sizes, **({"pretrained": None} if name == "roberta" else {}))
                ).stack
            )
            for name in expected
        }
    assert found == expected
