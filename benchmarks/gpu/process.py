"""One step in a process of its own: the parent's side, which limits it, and the child's, which runs the parts.

python -m benchmarks.gpu.process STEP MODULE:FUNCTION FOLDER DEADLINE END [--rehearse]
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import traceback
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from time import monotonic
from typing import Any

from benchmarks.gpu import defaults
from benchmarks.gpu.device import ROOT, origin
from benchmarks.gpu.record import COMPLETE, OUT_OF_TIME, Record
from benchmarks.gpu.steps import Part, Step, There, WrongError
from hbp.backends import _measured

REHEARSAL = {
    "CUDA_VISIBLE_DEVICES": "",
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # of programs that run once
    "TRITON_INTERPRET": "1",
}
MARGIN = 3.0
"""Seconds before its limit at which a process begins no more parts."""
PARENT_DEATH = 1
"""PR_SET_PDEATHSIG."""
DEVICE = {
    "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # other libraries live beside JAX
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",  # what is tested is what is timed
}


def run(step: Step, folder: Path, seconds: float, end: float, rehearse: bool) -> str:
    """Run a step for so many seconds at most, of a call that ends then; returns how it ended, as its record says."""
    deadline = monotonic() + seconds - min(MARGIN, seconds / 10)
    command = [
        sys.executable,
        "-m",
        "benchmarks.gpu.process",
        step.name,
        step.parts,
        *map(str, (folder, deadline, end)),
    ]
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    extra = REHEARSAL if rehearse else DEVICE
    environment = os.environ | extra | {"PYTHONPATH": paths, "PYTHONUNBUFFERED": "1"}
    with (folder / f"{step.name}.log").open("a") as log:
        child = subprocess.Popen(
            command + ["--rehearse"] * rehearse, env=environment, stderr=log, start_new_session=True
        )
        started = monotonic()
        try:
            status = child.wait(seconds)
            reason = f"ended with exit status {status}"
        except subprocess.TimeoutExpired:
            reason = f"cut off after {seconds:.0f} s"
        finally:
            _kill(child)
    record = Record.of(folder, step.name, origin(rehearse))
    record.seconds += round(monotonic() - started, 1)
    if record.ended is None:
        record.cut_off(reason)
    record.write()
    return str(record.ended)


def _kill(child: subprocess.Popen[bytes]) -> None:
    """The child and all it has started."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def main(arguments: list[str]) -> int:
    """The child's side."""
    name, where, folder, deadline, end, *flags = arguments
    there = There(Path(folder), origin(bool(flags)), bool(flags), float(deadline), float(end))
    record = Record.of(there.folder, name, there.origin)
    record.ended = None
    record.write()
    parent = os.getppid()
    with suppress(OSError, AttributeError):  # on Linux, where devices are: no orphan keeps one busy
        ctypes.CDLL(None).prctl(PARENT_DEATH, signal.SIGKILL)
    _measured.TABLE = defaults.searched(there.folder)  # the block sizes found before, for what comes after
    module, function = where.split(":")
    parts: list[Part] = list(getattr(import_module(module), function)(there))
    longest = 0.0
    for number, part in enumerate(parts, 1):
        if part.name in record.parts:
            continue
        if os.getppid() != parent:  # whoever started this has gone
            return 1
        if monotonic() + longest > there.deadline:
            record.ended = OUT_OF_TIME
            record.write()
            return 0
        started = monotonic()
        _run(part, record, there)
        longest = max(longest, monotonic() - started)
        _tell(f"{name} {number}/{len(parts)}", part.name, record.parts[part.name])
        if not there.rehearse and _poisoned():  # a table's part goes on where a method fails
            return 3  # a new process goes on with the next part
    record.ended = COMPLETE
    record.write()
    return 0


def _run(part: Part, record: Record, there: There) -> None:
    record.begin(part.name)
    if part.only is not None and there.rehearse:
        record.end(skipped=part.only)
        return
    try:
        record.end(result=part.run())
    except WrongError as found:
        record.end(failed=str(found), result=found.result)
    except Exception as error:
        traceback.print_exc()
        record.end(failed=f"{type(error).__name__}: {error}"[:2000])


def _poisoned() -> bool:
    """Whether a kernel has left the device's context unusable."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
        torch.ones(1, device="cuda").item()
    except Exception:
        return True
    return False


def _tell(where: str, name: str, part: dict[str, Any]) -> None:
    said = next((f": {kind}: {part[kind].splitlines()[0][:120]}" for kind in ("failed", "skipped") if kind in part), "")
    print(f"{where} {name} ({part['seconds']:.1f} s){said}", flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
