"""The processes along one axis of a mesh: who they are, what they agree on, and what travels between them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

NUMBERS = 4
"""How many numbers of its own a rank may add when all agree."""


class Ranks:
    """The ranks of a process group, in its order; each holds a piece of a stack.

    All methods but the properties are collective: every rank calls them in the same order.
    """

    def __init__(self, group: Any, device: torch.device) -> None:
        self.group, self.device = group, device
        self.count: int = dist.get_world_size(group)
        self.here: int = dist.get_rank(group)

    @classmethod
    def along(cls, mesh: Any) -> Ranks:
        """Those of a mesh of one axis.

        Raises:
            TypeError, ValueError: the mesh is none, has several axes, or this process is not on it.
        """
        if not isinstance(mesh, dist.DeviceMesh if dist.is_available() else ()):
            raise TypeError(f"mesh is a {type(mesh).__name__}; give a torch.distributed DeviceMesh of one axis")
        if mesh.ndim != 1:
            names = mesh.mesh_dim_names or [f"axis {i}" for i in range(mesh.ndim)]
            raise ValueError(f"mesh has the axes {', '.join(names)}; give the one along depth, as mesh[{names[-1]!r}]")
        if mesh.get_coordinate() is None:
            raise ValueError(f"rank {dist.get_rank()} is none of the mesh's ranks, {mesh.mesh.tolist()}")
        return cls(mesh.get_group(), torch.device(mesh.device_type))

    def __deepcopy__(self, memo: Any) -> Ranks:
        return self

    def __reduce__(self) -> Any:
        raise TypeError("layers over several ranks cannot be pickled; save their state_dict")

    @property
    def first(self) -> bool:
        """Whether this is the rank of the first piece."""
        return self.here == 0

    @property
    def last(self) -> bool:
        """Whether this is the rank of the last piece."""
        return self.here == self.count - 1

    def agree(self, what: str, facts: Mapping[str, Any], numbers: Sequence[int] = (), trouble: str = "") -> Any:
        """Check that all ranks are at the same point, with the same facts and without trouble.

        Returns:
            Each rank's numbers, (ranks, len(numbers)).

        Raises:
            ValueError: they are not; on every rank, with the same sentence.
        """
        text = repr((what, {name: repr(value) for name, value in facts.items()}, trouble))
        row = [crc32(text.encode()), bool(trouble), *numbers, *[0] * (NUMBERS - len(numbers))]
        rows = torch.stack(self.gather(torch.tensor(row, device=self.device))).tolist()
        if any(other[:2] != [row[0], 0] for other in rows):
            told: list[Any] = [None] * self.count
            dist.all_gather_object(
                told, (what, {name: repr(fact) for name, fact in facts.items()}, trouble), self.group
            )
            raise ValueError(_disagreement(told))
        return [other[2 : 2 + len(numbers)] for other in rows]

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """Around checks that each rank does alone: where they fail on one, all raise, with the same sentence.

        Raises:
            TypeError, ValueError: they failed; a ValueError where they failed on other ranks only.
        """
        error: Exception | None = None
        try:
            yield
        except (TypeError, ValueError) as found:
            error = found
        try:
            self.agree(what, {}, [], str(error or ""))
        except ValueError as told:
            raise type(error or told)(str(told)) from error

    def gather(self, x: Tensor) -> list[Tensor]:
        """All ranks' tensors of one shape."""
        found = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(self.count)]
        dist.all_gather(found, x.contiguous(), self.group)
        return found

    def transposed(self, x: Tensor) -> Tensor:
        """``x[r]`` of rank s as ``x[s]`` of rank r."""
        found = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(found, x.contiguous(), group=self.group)
        return found

    def shifted(self, arrays: Sequence[Tensor], shift: int) -> list[Tensor] | None:
        """The arrays of the rank ``shift`` further on, None where there is none; this rank's go as far back."""
        found = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in arrays]
        moves = []
        if self.here >= shift:
            peer = self.here - shift
            moves += [dist.P2POp(dist.isend, x.contiguous(), group=self.group, group_peer=peer) for x in arrays]
        comes = self.here + shift < self.count
        if comes:
            peer = self.here + shift
            moves += [dist.P2POp(dist.irecv, x, group=self.group, group_peer=peer) for x in found]
        for work in dist.batch_isend_irecv(moves) if moves else ():
            work.wait()
        return found if comes else None

    def hand(self, x: Tensor, to: int) -> None:
        """Send a state to one other rank, which `take`s it."""
        dist.send(x.contiguous(), group=self.group, group_dst=to)

    def take(self, like: Tensor, source: int) -> Tensor:
        """A state that another rank `hand`s on, in shape and dtype as ``like``."""
        found = torch.empty_like(like, memory_format=torch.contiguous_format, requires_grad=False)
        dist.recv(found, group=self.group, group_src=source)
        return found

    def spread(self, x: Tensor, source: int) -> Tensor:
        """The tensor of one rank, on all of them."""
        found = (
            x.detach().contiguous() if self.here == source else torch.empty_like(x, requires_grad=False).contiguous()
        )
        dist.broadcast(found, group=self.group, group_src=source)
        return found

    def summed(self, x: Tensor) -> Tensor:
        """The sum of all ranks' tensors, the same bits on all."""
        found = x.detach().clone(memory_format=torch.contiguous_format)
        dist.all_reduce(found, group=self.group)
        return found


def _disagreement(told: Sequence[tuple[str, Mapping[str, str], str]]) -> str:
    """One sentence on what the ranks do not have in common."""
    places = _places([one[2] for one in told])
    if any(places):  # where all ranks have the same trouble, it need not be said where
        return "; ".join(
            f"{where}: {trouble}" if len(places) > 1 else trouble for trouble, where in places.items() if trouble
        )
    calls = [what for what, _, _ in told]
    if len(set(calls)) > 1:
        return f"the ranks are not at the same point: {_by_rank(calls)}; every rank must make the same calls"
    names = dict.fromkeys(name for _, facts, _ in told for name in facts)
    values = {name: [facts.get(name, "nothing") for _, facts, _ in told] for name in names}
    differing = [f"{name} is {_by_rank(found)}" for name, found in values.items() if len(set(found)) > 1]
    more = f" (and {len(differing) - 3} more)" if len(differing) > 3 else ""
    return f"the ranks disagree on {calls[0]}: {'; '.join(differing[:3])}{more}; give all ranks the same"


def _by_rank(values: Sequence[str]) -> str:
    return ", ".join(f"{value} on {where}" for value, where in _places(values).items())


def _places(values: Sequence[str]) -> dict[str, str]:
    """Each value with the ranks that have it."""
    ranks: dict[str, list[str]] = {}
    for rank, value in enumerate(values):
        ranks.setdefault(value, []).append(str(rank))
    return {value: f"rank {' and '.join(on)}" for value, on in ranks.items()}
