"""What the methods cost in memory, beside the paper's formulas (24) and (25)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from benchmarks import memory, rnn, stack
from benchmarks.measure import library
from experiments import figures
from experiments.experiment import Claim, Context, Experiment, Record, Request, Section
from experiments.timing import Measurement

CASES: dict[str, dict[str, dict[str, Any]]] = {
    "paper": {
        "LSTM": {"cell": "lstm", "T": 256, "B": 128, "H": 512, "weights": 1.0, "setting": "paper"},
        "GRU": {"cell": "gru", "T": 256, "B": 128, "H": 512, "weights": 1.0, "setting": "paper"},
        "residual stack": {"L": 54, "d": 512, "B": 4096},
    },
    "laptop": {
        "LSTM": {"cell": "lstm", "T": 512, "B": 16, "H": 128, "weights": 1.0, "setting": "paper"},
        "GRU": {"cell": "gru", "T": 512, "B": 16, "H": 128, "weights": 1.0, "setting": "paper"},
        "residual stack": {"L": 54, "d": 128, "B": 512},
    },
}
"""As `benchmarks.memory` takes them; "setting" adds the step loop."""
K = 3
FLOAT = 4


@dataclass(frozen=True)
class Peaks(Measurement):
    """The memory of all ways to one model's gradient, each in a process of its own."""

    kind: ClassVar[str] = "memory"
    case: tuple[tuple[str, Any], ...]

    def estimate(self) -> Record:
        return {"seconds": 5.0 * len(self._methods()), "how": "5 s for the process of each way to a gradient"}

    def perform(self, context: Context) -> Record:
        rows, ways = [], self._methods()
        for index, method in enumerate(ways):
            context.advance(index, len(ways))
            if not method.yardstick:
                saved, peak = memory.measured(dict(self.case), self.backend, index)
                found = {"method": method.name, "k": method.k, "chunk": method.chunk}
                rows.append({**found, "saved": saved, "peak": peak})
        return {"name": self.name, "case": dict(self.case), "hidden": self.hidden, "rows": rows}

    def _methods(self) -> list[Any]:
        return list(memory.methods({**dict(self.case), **self._table.CHECK}, library(self.backend)))

    @property
    def _table(self) -> Any:
        return rnn if "cell" in dict(self.case) else stack

    @property
    def hidden(self) -> int:
        """The bytes of all hidden states: M_h of the paper, summed over the layers."""
        case = dict(self.case)
        sizes = (case["T"], case["B"], case["H"]) if "cell" in case else (case["L"], case["B"], case["d"])
        return FLOAT * sizes[0] * sizes[1] * sizes[2]


def work(request: Request) -> list[Peaks]:
    """Both gated cells, and a stack of small layers."""
    return [Peaks(name, request.backend, tuple(case.items())) for name, case in CASES[request.preset].items()]


def section(request: Request, records: Mapping[str, Record]) -> Section:
    """Bytes saved and the peak, in hidden states."""
    found = [records[work.key] for work in work(request) if work.key in records]
    return Section([_claim(found)], "\n\n".join([TEXT, *map(_table, found)]), {"memory": _figure(found)})


TEXT = """M_h is the size of all hidden states h of the model, over all of its layers or steps. *Saved* is what lives
between the passes beside parameters and inputs, the paper's M_cache; *peak* the growth of the memory in use at its
largest in one step. The paper counts M_cache + 2 M_h for backprop (24) and M_cache + 4 M_h for Highway-BP (25), which
keeps w^0 and the products of the scan. hbp saves its gates too, unless told to compute them again (`keep="states"`),
needs no w^0 (its iteration is folded) and no products (its scan on a CPU is a loop in place), but holds the temporaries
of all layers at once, which (25) does not count."""


def _exact(record: Record) -> Record:
    """The exact way that differs from Highway-BP in nothing else."""
    by_name = {row["method"]: row for row in record["rows"]}
    names = ("exact adjoint", "iterations=None", "torch autograd", "jax.lax.scan")
    return next(by_name[name] for name in names if name in by_name)


def _highway(record: Record) -> Record:
    return next(row for row in record["rows"] if row["k"] == K and row["chunk"] == 1)


def _extra(record: Record) -> float | None:
    """Highway-BP's peak beyond the exact one's, in hidden states."""
    peaks = _highway(record)["peak"], _exact(record)["peak"]
    return None if None in peaks else float((peaks[0] - peaks[1]) / record["hidden"])


def _claim(found: Sequence[Record]) -> Claim:
    paper = "Appendix D: Highway-BP holds two hidden states per layer more than backprop."
    extras = {record["name"]: _extra(record) for record in found}
    known = {name: extra for name, extra in extras.items() if extra is not None}
    measured = "; ".join(f"{name}: {extra:+.1f}" for name, extra in known.items()) or "the system does not tell"
    rule = f"The peak of a step at k = {K} is at most 2.2 M_h above that of exact backprop by the same code."
    return Claim(paper, measured, rule, all(extra <= 2.2 for extra in known.values()) if known else None)


def _table(record: Record) -> str:
    lines = [["", "saved, M_h", "peak, M_h", "peak, MB"], ["---", "---:", "---:", "---:"]]
    for row in record["rows"]:
        saved, peak = (row[name] and row[name] / record["hidden"] for name in ("saved", "peak"))
        cells = [f"{saved:.2f}" if saved is not None else "-", f"{peak:.2f}" if peak is not None else "-"]
        lines.append([_name(row), *cells, f"{row['peak'] / 1e6:.1f}" if row["peak"] is not None else "-"])
    saved = _highway(record)["saved"]
    if saved is not None:
        cache = saved / record["hidden"]
        lines.append(["*(24), with what Highway-BP saves*", f"{cache:.2f}", f"{cache + 2:.2f}", ""])
        lines.append(["*(25), with what Highway-BP saves*", f"{cache:.2f}", f"{cache + 4:.2f}", ""])
    sizes = ", ".join(f"{name} = {record['case'][name]}" for name in "TLBHd" if name in record["case"])
    title = f"{record['name']}, {sizes}; M_h = {record['hidden'] / 1e6:.1f} MB:"
    return title + "\n\n" + "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _name(row: Record) -> str:
    k = "" if row["k"] is None else f", k = {row['k']}"
    return f"{row['method']}{k}" + (f", chunk {row['chunk']}" if (row["chunk"] or 1) > 1 else "")


def _figure(found: Sequence[Record]) -> Any:
    figure, axes = figures.panels(len(found), 5.5, 3)
    for axis, record in zip(axes, found, strict=True):
        for at, row in enumerate(record["rows"]):
            for name, color, shift in (("saved", "C0", -0.2), ("peak", "C1", 0.2)):
                axis.barh(at + shift, (row[name] or 0) / record["hidden"], 0.4, color=color, label=name)
        cache = (_highway(record)["saved"] or 0) / record["hidden"]
        for hidden, equation, style in ((2, "(24)", ":"), (4, "(25)", "--")):
            axis.axvline(cache + hidden, color="black", linestyle=style, label=f"peak by {equation}")
        axis.set_yticks(range(len(record["rows"])), map(_name, record["rows"]), fontsize=8)
        axis.set(xlabel="hidden states M_h", title=record["name"])
        axis.invert_yaxis()
    figures.legend(figure, axes)
    return figure


EXPERIMENT = Experiment("memory", "Memory", work, section)
