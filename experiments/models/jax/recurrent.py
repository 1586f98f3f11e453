"""Recurrent models on hbp's GRU and LSTM for JAX: the same as in PyTorch, with one bias per gate."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

import hbp
import hbp.backends.jax as hb
from experiments.models import sizes as s
from experiments.models.jax.drawing import Drawn, linear
from hbp import cells
from hbp.cells import GRUParameters, GRUPullback, LSTMParameters, LSTMPullback

CELLS: dict[str, tuple[int, Any]] = {"gru": (3, GRUParameters), "lstm": (4, LSTMParameters)}


def _layers(drawn: Drawn, cell: str, hidden: int, count: int, remembers: int | None = None) -> list[dict[str, Any]]:
    rows = CELLS[cell][0] * hidden
    shapes = {"weight_ih": (rows, hidden), "weight_hh": (rows, hidden), "bias_ih": (rows,)}
    found = [{name: drawn.uniform(hidden**-0.5, *shape) for name, shape in shapes.items()} for _ in range(count)]
    for layer in found if remembers is not None else ():
        forget = jnp.log(1 + (remembers - 2) * (0.5 + drawn.uniform(0.5, hidden)))
        layer["bias_ih"] = jnp.concatenate([-forget, forget, layer["bias_ih"][2 * hidden :]])
    return found


def _run(cell: str, layers: list[dict[str, Any]], x: Any, solver: hbp.Solver, residual: Any = None, **how: Any) -> Any:
    """Steps first: (T, B, H) -> (T, B, H), each layer after the first beside a residual connection."""
    start = jnp.zeros_like(x[0])
    state = {"gru": start, "lstm": (start, start)}[cell]
    for i, layer in enumerate(layers):
        params = CELLS[cell][1](**layer)
        if residual is not None:
            h = _resplit(cell, residual, solver)(params, x, state)
        else:
            h = getattr(hb, cell)(params, x, state, solver=solver, **how)[1]
        x = x + h if i else h
    return x


def _resplit(cell: str, residual: Any, solver: hbp.Solver) -> Any:
    """A layer that is pulled back under another split than hbp's own."""
    pullback: Any = {"gru": GRUPullback, "lstm": LSTMPullback}[cell]

    def run(*given: Any) -> Any:
        return getattr(cells, cell)(*given, backend=hb.backend)[0]

    @jax.custom_vjp
    def layer(*given: Any) -> Any:
        found = run(*given)
        return found if cell == "gru" else found[0]

    def forward(*given: Any) -> tuple[Any, Any]:
        found = run(*given)
        return (found if cell == "gru" else found[0]), (given, found)

    def backward(saved: Any, dh: Any) -> Any:
        given, found = saved
        d = dh if cell == "gru" else (dh, None)
        return pullback(*given, found, hb.backend)(d, solver=solver, residual=residual)

    layer.defvjp(forward, backward)
    return layer


def _init_lm(sizes: s.RecurrentLM, seed: int) -> Any:
    drawn = Drawn(seed)
    return {
        "embed": drawn.normal(sizes.vocabulary, sizes.hidden),
        "layers": _layers(drawn, sizes.cell, sizes.hidden, sizes.layers),
        "head": drawn.linear(sizes.hidden, sizes.vocabulary),
    }


def _apply_lm(sizes: s.RecurrentLM, params: Any, symbols: Any, **how: Any) -> Any:
    h = _run(sizes.cell, params["layers"], params["embed"][symbols.T], **how)
    return linear(params["head"], h).swapaxes(0, 1)


def _init_classifier(sizes: s.RecurrentClassifier, seed: int) -> Any:
    drawn = Drawn(seed)
    return {
        "embed": drawn.linear(sizes.inputs, sizes.hidden),
        "layers": _layers(drawn, sizes.cell, sizes.hidden, sizes.layers, sizes.remembers),
        "head": [drawn.linear(sizes.hidden, sizes.hidden), drawn.linear(sizes.hidden, sizes.outputs)],
    }


def _apply_classifier(sizes: s.RecurrentClassifier, params: Any, x: Any, **how: Any) -> Any:
    last = _run(sizes.cell, params["layers"], linear(params["embed"], x.swapaxes(0, 1)), **how)[-1]
    first, second = params["head"]
    return linear(second, jax.nn.relu(linear(first, last)))


language_model = _init_lm, _apply_lm
classifier = _init_classifier, _apply_classifier
