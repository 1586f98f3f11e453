"""What a training step takes on P devices in a row, by closed formulas.

Each device holds one of P equal stages; M microbatches go through them. F, Bi and Bw are the times of one stage for the
whole batch: forward, a cotangent pulled through, and the gradients of the weights; lambda is that of one hop of one
microbatch's state, C that of one exchange among all devices. A microbatch takes an M-th of the batch's time: where it
takes as long as the whole batch, as where launching is what takes long, M = 1 holds for every M.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from numbers import Real
from typing import Any


def check_number(name: str, value: Any, above: bool = False) -> None:
    """Raise ValueError unless ``value`` is a finite number, ``above`` zero or at least zero."""
    real = isinstance(value, Real) and not isinstance(value, bool)
    if not real or not math.isfinite(value) or value < 0 or (above and not value):
        raise ValueError(f"{name}={value!r}; give a finite number {'above 0' if above else 'of at least 0'}")


@dataclass(frozen=True)
class Costs:
    """What one of P equal stages takes for the whole batch.

    Attributes:
        forward, pull, weights: F, Bi and Bw, in seconds or any unit of time.
        state_bytes: the size of the state between two stages.
        outside: the time of what is done once a step outside of the stages, as embedding, head and loss.
        pieces: 2 where a stage can be cut in two, which zero bubble then does, or 1.

    Raises:
        ValueError: they are no such numbers.
    """

    forward: float
    pull: float
    weights: float
    state_bytes: float = 0.0
    outside: float = 0.0
    pieces: int = 2

    def __post_init__(self) -> None:
        for field in fields(self):
            check_number(field.name, getattr(self, field.name), above=field.name in ("forward", "pull"))
        if self.pieces not in (1, 2):
            raise ValueError(f"pieces={self.pieces!r}; give 1 or 2")

    def share(self, part: float, pieces: int) -> Costs:
        """What a part of this stage costs, from 0 to 1, with what is outside of it as it is."""
        forward, pull, weights = (part * time for time in (self.forward, self.pull, self.weights))
        return Costs(forward, pull, weights, self.state_bytes, self.outside, pieces)


@dataclass(frozen=True)
class Link:
    """What joins the devices: bytes per second, and seconds until the first byte arrives.

    Raises:
        ValueError: they are no such numbers.

    >>> round(1e3 * Link(bandwidth=50e9, latency=0).exchange(33e6, 16), 2)  # ms, to transpose and back
    1.24
    """

    bandwidth: float
    latency: float

    def __post_init__(self) -> None:
        check_number("bandwidth", self.bandwidth, above=True)
        check_number("latency", self.latency)

    def hop(self, size: float) -> float:
        """One message from a device to the next."""
        return self.latency + size / self.bandwidth

    def exchange(self, size: float, devices: int) -> float:
        """A suffix scan over the devices: by an all-gather or two all-to-alls; Hillis-Steele beats neither."""
        if devices == 1:
            return 0.0
        latency, state = self.latency, size / self.bandwidth
        return min(latency + (devices - 1) * state, 2 * latency + 2 * (devices - 1) / devices * state)


@dataclass(frozen=True)
class Step:
    """One training step on P stages of these costs with M microbatches; each method is the time by one schedule.

    >>> step = Step(Costs(1, 1, 1), Link(1, 0), stages=8, microbatches=1)
    >>> step.gpipe(), step.put_off(), step.zero_bubble(), step.highway(1), step.highway(3)
    (24.0, 17.0, 16.5, 11.0, 13.0)
    """

    costs: Costs
    link: Link
    stages: int
    microbatches: int

    @property
    def _hop(self) -> float:
        return self.link.hop(self.costs.state_bytes / self.microbatches)

    @property
    def _fill(self) -> float:
        return (self.stages + self.microbatches - 1) / self.microbatches

    def gpipe(self) -> float:
        """GPipe: (P+M-1)/M (F+Bi+Bw) + 2(P-1) lambda (Huang et al., 2019)."""
        c = self.costs
        return c.outside + self._fill * (c.forward + c.pull + c.weights) + 2 * (self.stages - 1) * self._hop

    def one_f_one_b(self) -> float:
        """1F1B: GPipe's time, and further hops that nothing hides, as only P microbatches are under way.

        (P+M-1)/M (F+Bi+Bw) + 2(P-1 + (M-2) - floor((M-2)/P)) lambda; infinite for M < P, which PyTorch's refuses.
        """
        P, M = self.stages, self.microbatches
        return math.inf if M < P else self.gpipe() + 2 * (M - 2 - (M - 2) // P) * self._hop

    def put_off(self) -> float:
        """GPipe whose weight gradients wait for the end: (P+M-1)/M (F+Bi) + Bw + 2(P-1) lambda."""
        c = self.costs
        return c.outside + self._fill * (c.forward + c.pull) + c.weights + 2 * (self.stages - 1) * self._hop

    def zero_bubble(self) -> float:
        """Zero bubble, the best exact schedule here (Qi et al., 2401.10241; PyTorch's ScheduleInterleavedZeroBubble).

        The longer of a device's work with what cannot be filled before and behind it, and of the way of all
        microbatches through all v P pieces and back. With v = 1 and M >= P that is ZB-H1, F+Bi+Bw + (P-1)(F+Bi-Bw)/M.
        Exact where Bw is at most F and Bi; where it is more, and with hops, the least it can take.
        """
        c, P, M = self.costs, self.stages, self.microbatches
        v = c.pieces if P > 1 else 1
        f, b, w = (cost / (v * M) for cost in (c.forward, c.pull, c.weights))
        work = v * M * (f + b + w) + (P - 1) * (f + b) + (v - 1) * max(P - M, 0) * f - (min(M, P) - 1) * min(f, b, w)
        way = (v * P + M - 1) * (f + b) + w
        return c.outside + max(work + 2 * (P - 1) * self._hop, way + 2 * (v * P - 1) * self._hop)

    def highway(self, iterations: int) -> float:
        """Highway-BP, one stage a block: (P+M-1)/M F + (P-1) lambda + (k+1)(Bi+C) + Bw; the graph is kept."""
        c, P = self.costs, self.stages
        rounds = min(iterations, P) + 1  # more than P are exact before
        exchange = self.link.exchange(c.state_bytes, P)
        return c.outside + self._fill * c.forward + (P - 1) * self._hop + rounds * (c.pull + exchange) + c.weights
