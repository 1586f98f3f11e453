"""Iterate k for PyTorch's layers by its definition: explicit Jacobians, path sums, each layer's own vjp."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import pytest

torch = pytest.importorskip("torch")


@dataclass
class Cuts:
    """A run of layers cut at its states: each layer starts from a leaf, and what reads its result reads another.

    Registered on a plain model's layers, it records one forward pass. What the loss then gives to the leaves is what
    enters the chain of states from outside.
    """

    layers: list[Callable[[Any], Any]] = field(default_factory=list)
    """One function of the state per call."""
    arrived: list[Any] = field(default_factory=list)
    """The states as the model gave them."""
    starts: list[Any] = field(default_factory=list)
    """The leaves that the layers start from."""
    ends: list[Any] = field(default_factory=list)
    """The layers' results."""
    handed: list[Any] = field(default_factory=list)
    """What the model goes on with in place of ``ends``."""

    def register(self, layers: Sequence[Any]) -> list[Any]:
        """Hooks on the layers; remove them afterwards."""
        before = [layer.register_forward_pre_hook(self._enter, with_kwargs=True) for layer in layers]
        return before + [layer.register_forward_hook(self._leave, with_kwargs=True) for layer in layers]

    def _enter(self, layer: Any, args: Any, kwargs: Any) -> Any:
        x, *rest = args or kwargs.values()
        self.arrived.append(x)
        self.starts.append(x.detach().requires_grad_())
        return (self.starts[-1], *rest), {} if not args else kwargs

    def _leave(self, layer: Any, args: Any, kwargs: Any, output: Any) -> Any:
        self.layers.append(lambda x: first(layer.forward(x, *args[1:], **kwargs)))
        self.ends.append(first(output))
        self.handed.append(self.ends[-1].detach().requires_grad_())
        if not isinstance(output, tuple):
            return self.handed[-1]
        rest = (self.handed[-1], *output[1:])
        return type(output)(*rest) if hasattr(output, "_fields") else rest

    def problem(self, loss: Any) -> tuple[np.ndarray, np.ndarray]:
        """The layers' Jacobians, (L, n, n), and what the loss gives to the states from outside, (L+1, n)."""
        given = {"retain_graph": True, "materialize_grads": True, "allow_unused": True}
        reached = torch.autograd.grad(loss, self.handed, **given)
        entered = torch.autograd.grad(loss, self.starts, **given)
        length = max(i + 1 for i, g in enumerate(reached) if g.any())  # layers behind the loss's last state are idle
        c = np.zeros((length + 1, self.starts[0].numel()))
        for i in range(length):
            c[i] += entered[i].numpy().reshape(-1)
            c[i + 1] += reached[i].numpy().reshape(-1)
        return np.stack([jacobian(f, x) for f, x in zip(self.layers[:length], self.starts, strict=False)]), c

    def surrogate(self, loss: Any, g: np.ndarray) -> Any:
        """A scalar whose gradients are those that the layers' own pullbacks make of the states' cotangents ``g``."""
        states = [self.arrived[0], *self.ends]
        given = torch.from_numpy(g).reshape(len(g), *states[0].shape)
        return loss + sum((cotangent * state).sum() for cotangent, state in zip(given, states, strict=False))


def first(output: Any) -> Any:
    """The state among what a layer returns."""
    return output[0] if isinstance(output, tuple) else output


def jacobian(f: Callable[[Any], Any], x: Any) -> np.ndarray:
    """The Jacobian of f at x by the library's autograd, on flattened states."""
    found = torch.autograd.functional.jacobian(f, x.detach())
    return found.reshape(x.numel(), x.numel()).numpy()


@cache
def under_autocast(kind: str) -> bool:
    """Whether PyTorch has a layer in bfloat16 on this processor: oneDNN has no LSTM on some."""
    try:
        with torch.autocast("cpu", torch.bfloat16):
            getattr(torch.nn, kind)(1, 1)(torch.zeros(1, 1, 1))
    except RuntimeError as error:
        if "primitive descriptor" not in str(error):
            raise
        return False
    return True


def opened(layer: Any) -> Any:
    """A GRU or LSTM with gates so open, and recurrent weights so large, that the blocks carry much."""
    gates = [3.0, -3.0, 0.0] if "GRU" in type(layer).__name__ else [2.0, 0.0, 0.0, 2.0]
    with torch.no_grad():
        for name, p in layer.named_parameters():
            if name.startswith("weight_hh"):
                p.mul_(2)
            if name.startswith("bias_ih"):
                p.add_(torch.tensor(gates).repeat_interleave(layer.hidden_size).to(p))
    return layer
