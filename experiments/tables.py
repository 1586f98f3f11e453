"""Tables 3 and 6: how long a training step takes, and what the paper's speed-up is made of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar

from benchmarks.measure import library
from experiments import figures
from experiments.experiment import Claim, Context, Experiment, Record, Request, Section
from experiments.layers import (
    CASES,
    HIGHWAY,
    ITERATIONS,
    LAYER,
    LOOP,
    LOOP_EXACT,
    LOOP_FIXED,
    LOOP_HIGHWAY,
    OURS,
    PAPER,
    Case,
    methods,
    reference,
)
from experiments.timing import Measurement, pick, timed

RATIOS = (0, 5, 10)
"""The k of table 3."""
ROUNDS = 7
SHORTER = 16
"""An estimate times a sequence that is shorter by this factor."""


@dataclass(frozen=True)
class Steps(Measurement):
    """Training steps of one model in all ways, in turns."""

    kind: ClassVar[str] = "steps"
    case: Case
    rounds: int

    def estimate(self) -> Record:
        """From the first way's step through a shorter sequence, in which that of a round is taken for a third."""
        short = replace(self.case, T=max(self.case.T // SHORTER, 1))
        first, *others = methods(short, library(self.backend))
        once = min(sum(first.run()[:2]) for _ in range(2))  # code is compiled in the first run
        ways = sum(1 + (method.k or 0) / 3 for method in (first, *others))
        seconds = once * ways * self.case.T / short.T * (self.rounds + 1)
        how = f"the step of one way through a sequence {SHORTER} times shorter, each of k rounds a third of that more"
        return {"parameters": self.case.parameters, "steps": self.rounds, "seconds": seconds, "how": how}

    def perform(self, context: Context) -> Record:
        ways = list(methods(self.case, library(self.backend)))
        rows = timed(ways, reference(self.case), self.rounds, context.advance)
        return {"name": self.name, "case": asdict(self.case), "rounds": self.rounds, "rows": rows}


def work(request: Request) -> list[Steps]:
    """The paper's four models."""
    rounds = min(ROUNDS, request.steps or ROUNDS)
    return [Steps(name, request.backend, case, rounds) for name, case in zip(PAPER, CASES[request.preset], strict=True)]


def section(request: Request, records: Mapping[str, Record]) -> Section:
    """Both tables, times against k, and what they are the sum of."""
    found = [records[work.key] for work in work(request) if work.key in records]
    loops = request.backend == "torch"
    claims = [_ratios(found), _made_of(found)] if loops else []
    text = "\n\n".join([_text(loops), _table_3(found), *map(_table_6, found)])
    drawn = {"tables": _against_k(found), "tables-parts": _parts(found)}
    return Section([*claims, _layers(found)], text, drawn)


def whole(record: Record, method: str, k: int | None = None) -> float:
    """The median of a way's whole steps, milliseconds."""
    return float(pick(record["rows"], method, k)["whole_ms"][0])


def ratio(record: Record, slow: str, fast: str, k: int | None = None) -> float:
    """How many times faster one way's step is than another's."""
    return whole(record, slow) / whole(record, fast, k)


def _range(values: Sequence[float]) -> str:
    low, high = f"{min(values):.2g}", f"{max(values):.2g}"
    return low if low == high else f"{low} to {high}"


def _ratios(found: Sequence[Record]) -> Claim:
    paper = "Table 3: a training step is 2.9 to 3.5 times faster than backprop's at k = 0, 1.7 to 3.1 at k = 5, 1.2 to "
    paper += "2.9 at k = 10."
    parts, inside = [], []
    for k in RATIOS:
        here = [ratio(record, LOOP, LOOP_HIGHWAY, k) for record in found]
        inside += [0.5 < own / _paper(record, k) < 2 for own, record in zip(here, found, strict=True)]
        parts.append(f"{_range(here)} at k = {k}")
    rule = "Against the same loop over steps, forward included: each ratio between a half and twice the paper's."
    return Claim(paper, f"{'; '.join(parts)} ({sum(inside)} of {len(inside)} inside)", rule, all(inside))


def _paper(record: Record, k: int) -> float:
    """Table 3's entry."""
    loop, times = PAPER[record["name"]]
    return loop / times[HIGHWAY][ITERATIONS.index(k)]


def _made_of(found: Sequence[Record]) -> Claim:
    paper = "The speed-up comes from a backward pass that is parallel over the steps."
    ours = [ratio(record, LOOP, LOOP_HIGHWAY, 5) for record in found]
    exact = [ratio(record, LOOP, LOOP_EXACT) for record in found]
    measured = f"after the same loop, Highway-BP at k = 5 makes the step {_range(ours)} times faster, and the exact "
    measured += f"adjoint, step after step without autograd's graph, {_range(exact)} times"
    rule = "Highway-BP at k = 5 is faster than the exact adjoint after the same forward pass, in each model."
    return Claim(paper, measured, rule, all(a > b for a, b in zip(ours, exact, strict=True)))


def _layers(found: Sequence[Record]) -> Claim:
    paper = "Beyond the paper: Highway-BP against the library's own layer, with that layer's forward pass."
    ours = [ratio(record, LAYER, HIGHWAY, 5) for record in found]
    exact = [ratio(record, LAYER, OURS) for record in found]
    measured = (
        f"at k = 5 the step is {_range(ours)} times as fast as the library's, hbp's exact one {_range(exact)} times"
    )
    return Claim(paper, measured, "Faster than the library's layer at k = 5, in each model.", min(ours) > 1)


def _text(loops: bool) -> str:
    text = (
        "Whole steps: forward, a loss's cotangent, the gradient of all parameters; medians of interleaved rounds. "
        "Weights are random: errors are those of a first step, and later ones are larger. Highway-BP runs in compiled "
        "rounds and the fixed point in the library's general code, so that their errors compare and their times do so "
        "only roughly; of the LSTM, Highway-BP's path is hbp's own (c to c to h), one iteration ahead of the paper's."
    )
    if not loops:
        return text + " A loop over steps is compiled here to what `jax.lax.scan` is."
    return text + (
        " *Step loop* is a Python loop over `torch.nn`'s cell on unbound inputs, differentiated by autograd, which the "
        "paper's 209 ms for one GRU layer can only have been. *Step loop, X* is the same loop recording nothing, with "
        "X for its backward pass. The others have the library's own forward pass."
    )


def _table_3(found: Sequence[Record]) -> str:
    loops = [("the loop, after the loop", LOOP, LOOP_HIGHWAY)] if _has(found, LOOP) else []
    against = [*loops, ("the library's layer", LAYER, HIGHWAY), ("hbp, exact", OURS, HIGHWAY)]
    lines = [["", "against", *(f"k = {k}" for k in RATIOS)], ["---", "---", *["---:"] * len(RATIOS)]]
    for record in found:
        if loops:
            lines.append([record["name"], "*the paper's*", *(f"{_paper(record, k):.1f}" for k in RATIOS)])
        for label, slow, fast in against:
            lines.append([record["name"], label, *(f"{ratio(record, slow, fast, k):.2g}" for k in RATIOS)])
    return f"Table 3, how many times faster a step is:\n\n{_markdown(lines)}"


def _table_6(record: Record) -> str:
    case = record["case"]
    names = {LOOP: "step loop", LOOP_EXACT: "the same, exact adjoint", LAYER: "the library's layer", OURS: "hbp, exact"}
    base = ", ".join(f"{label} {whole(record, name):.3g}" for name, label in names.items() if _has([record], name))
    lines = [["ms", *(f"k = {k}" for k in ITERATIONS)], ["---", *["---:"] * len(ITERATIONS)]]
    if _has([record], LOOP):
        lines += [[f"*the paper's* {name}", *map(str, times)] for name, times in PAPER[record["name"]][1].items()]
    for method in (LOOP_FIXED, LOOP_HIGHWAY, HIGHWAY):
        if _has([record], method):
            rows = [pick(record["rows"], method, k) for k in ITERATIONS]
            lines.append([method, *(f"{row['whole_ms'][0]:.3g}" for row in rows)])
            lines.append(["its gradient's error", *(f"{row['error']:.1g}" for row in rows)])
    sizes = f"T = {case['T']}, B = {case['B']}, H = {case['H']}"
    paper = f"; the paper's step loop {PAPER[record['name']][0]:.0f} at its own sizes"
    return f"Table 6, {record['name']}, {sizes} ({base}{paper}):\n\n{_markdown(lines)}"


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _has(found: Sequence[Record], method: str) -> bool:
    return any(row["method"] == method for row in found[0]["rows"])


STYLES = {LOOP_FIXED: ("C0", "s--"), LOOP_HIGHWAY: ("C1", "o-"), HIGHWAY: ("C2", "o-")}
LINES = {LOOP: ("black", "-"), LOOP_EXACT: ("black", "--"), LAYER: ("gray", "-"), OURS: ("gray", "--")}


def _against_k(found: Sequence[Record]) -> Any:
    """Figure: whole steps against k, exact ways as lines."""
    figure, axes = figures.panels(len(found))
    for axis, record in zip(axes, found, strict=True):
        for method, (color, style) in LINES.items():
            if _has([record], method):
                axis.axhline(whole(record, method), color=color, linestyle=style, label=method)
        for method, (color, style) in STYLES.items():
            if _has([record], method):
                rows = [pick(record["rows"], method, k)["whole_ms"] for k in ITERATIONS]
                median, low, high = zip(*rows, strict=True)
                axis.plot(ITERATIONS, median, style, color=color, markersize=4, label=method)
                axis.fill_between(ITERATIONS, low, high, color=color, alpha=0.2)
        axis.set(xlabel="iterations k", ylabel="whole step, ms", yscale="log", title=record["name"])
    figures.legend(figure, axes)
    return figure


def _parts(found: Sequence[Record]) -> Any:
    """Figure: forward and backward passes as bars, and how many times faster than the first the whole is."""
    figure, axes = figures.panels(len(found), 6, 3)
    for axis, record in zip(axes, found, strict=True):
        rows = [row for row in record["rows"] if (row["method"], row["k"]) in list(_shown())]
        parts = [(row["forward_ms"][0], row["backward_ms"][0]) for row in rows]
        for at, (forward, backward) in enumerate(parts):
            axis.barh(at, forward, color="C0", label="forward")
            axis.barh(at, backward, left=forward, color="C1", label="backward")
            axis.text(forward + backward, at, f" {sum(parts[0]) / (forward + backward):.1f}x", va="center", fontsize=8)
        names = [row["method"] + ("" if row["k"] is None else f", k = {row['k']}") for row in rows]
        axis.set_yticks(range(len(rows)), names, fontsize=8)
        axis.set(xlabel="ms", title=record["name"], xlim=(0, 1.15 * max(map(sum, parts))))
        axis.invert_yaxis()
    figures.legend(figure, axes)
    return figure


def _shown() -> Iterator[tuple[str, int | None]]:
    for method in (LOOP, LOOP_HIGHWAY, LOOP_EXACT, LAYER, HIGHWAY, OURS):
        yield method, 5 if method in (LOOP_HIGHWAY, HIGHWAY) else None


EXPERIMENT = Experiment("tables", "Tables 3 and 6: the time of a training step", work, section)
