"""One pool of processes for a test session, each a rank of `torch.distributed` over the loopback.

Spawned, never forked (OpenMP's threads do not survive that); the parent ends its own children by their ids.
"""

from __future__ import annotations

import os
import pickle
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Any

GROUP_TIMEOUT = 30.0
"""Seconds after which a collective that waits for a rank fails."""
LIMIT = 180.0
"""Seconds after which a rank that has not answered counts as hung."""
START = 600.0
"""Seconds until all ranks have imported torch and met, on a machine that has other things to do."""
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TOKENIZERS_PARALLELISM": "false"}


class RanksError(RuntimeError):
    """What went wrong on which rank."""


class Pool:
    """``count`` ranks that run functions of test modules; smaller groups and meshes are parts of them."""

    def __init__(self, count: int) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="hbp-ranks-")
        context, kept = get_context("spawn"), {name: os.environ.get(name) for name in ENVIRONMENT}
        os.environ.update(ENVIRONMENT)  # a child reads it when it imports torch
        try:
            pipes = [context.Pipe() for _ in range(count)]
            store = Path(self.folder.name) / "store"
            self.processes = [
                context.Process(target=serve, args=(pipes[rank][1], rank, count, store), daemon=True)
                for rank in range(count)
            ]
            for process in self.processes:
                process.start()
        finally:
            for name, value in kept.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        self.pipes = [parent for parent, child in pipes if child.close() is None]
        self.met = False

    def __call__(self, function: Callable[..., Any], *args: Any, ranks: int = 4) -> list[Any]:
        """What ``function(mesh, *args)`` returns on each of the first ranks; the mesh is theirs, of one axis.

        Raises:
            RanksError: a rank raised, or gave no answer.
        """
        answers = self.outcomes(function, *args, ranks=ranks)
        failed = [f"rank {rank}: {told}" for rank, (fine, told) in enumerate(answers) if not fine]
        if failed:
            raise RanksError("\n".join(failed))
        return [told for _, told in answers]

    def outcomes(self, function: Callable[..., Any], *args: Any, ranks: int = 4) -> list[tuple[bool, Any]]:
        """Per rank whether the function returned, and what, or the traceback."""
        if not self.met:
            here = self._answers(len(self.pipes), START)
            if not all(fine for fine, _ in here):
                return here
            self.met = True
        for pipe in self.pipes[:ranks]:
            pipe.send_bytes(pickle.dumps((function, ranks, args)))
        return self._answers(ranks, LIMIT)

    def _answers(self, ranks: int, limit: float) -> list[tuple[bool, Any]]:
        end, answers = time.monotonic() + limit, []
        for rank, pipe in enumerate(self.pipes[:ranks]):
            try:
                told = pipe.poll(max(0.0, end - time.monotonic()))
                answers.append(pickle.loads(pipe.recv_bytes()) if told else (False, "no answer: hung"))
            except (EOFError, OSError):
                answers.append((False, f"gone, exit code {self.processes[rank].exitcode}"))
        return answers

    def close(self) -> None:
        for process in self.processes:
            if process.is_alive():
                process.kill()
            process.join(10)
        self.folder.cleanup()


def serve(pipe: Any, rank: int, count: int, store: Path) -> None:
    """A child's life."""
    import torch

    torch.set_num_threads(1)
    parts = meshes(rank, count, store)
    pipe.send_bytes(pickle.dumps((True, "here")))
    while True:
        try:
            function, ranks, args = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                torch.manual_seed(0)
                answer = True, function(parts[ranks], *args)
        except BaseException:
            answer = False, traceback.format_exc()
        pipe.send_bytes(pickle.dumps(answer))


def meshes(rank: int, count: int, store: Path) -> dict[int, Any]:
    """A mesh of one axis of the first 1, 2, ... ranks, for those that are on it."""
    import torch.distributed as dist

    timeout, start = timedelta(seconds=GROUP_TIMEOUT), timedelta(seconds=START)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count, timeout=start)
    groups = {size: dist.new_group(list(range(size)), timeout=timeout) for size in range(1, count + 1)}
    return {
        size: dist.DeviceMesh.from_group(group, "cpu", mesh_dim_names=("depth",))
        for size, group in groups.items()
        if rank < size
    }


@cache
def square() -> Any:
    """The mesh of 2 x 2 ranks, data and depth; collective, made once."""
    import torch.distributed as dist

    names, timeout = ("data", "depth"), timedelta(seconds=GROUP_TIMEOUT)
    axes = [dist.new_subgroups_by_enumeration(pairs, timeout)[0] for pairs in ([[0, 2], [1, 3]], [[0, 1], [2, 3]])]
    return dist.DeviceMesh.from_group(axes, "cpu", mesh=[[0, 1], [2, 3]], mesh_dim_names=names)


if __name__ == "__main__":
    sys.exit("run by pytest")
