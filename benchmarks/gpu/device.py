"""What the results belong to: the device, the commit, the code."""

from __future__ import annotations

import ctypes
import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks.environment import commit

ROOT = Path(__file__).parents[2]
NONE = "no CUDA device"


@dataclass(frozen=True)
class Origin:
    """Results of different origins are not mixed."""

    device: str
    """As the driver names it; `NONE` in a rehearsal."""
    commit: str | None
    """None outside a clone."""
    source: str
    """A digest of hbp's and the benchmarks' code: a tree may have changes, or travel without its history."""

    def differs(self, other: dict[str, Any]) -> str | None:
        """The first field in which results differ, as "device A, not B"."""
        for name, own in asdict(self).items():
            if other.get(name) != own and not (name == "commit" and None in (own, other.get(name))):
                return f"{name} {other.get(name)}, and this is {own}"
        return None


def origin(rehearse: bool) -> Origin:
    """Of what is measured here and now."""
    return Origin(NONE if rehearse else cuda_device() or NONE, commit(), source_digest())


def cuda_device() -> str | None:
    """The first CUDA device's name, by the driver alone; None where there is none."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
        count, handle, name = ctypes.c_int(), ctypes.c_int(), ctypes.create_string_buffer(100)
        if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) or not count.value:
            return None
        if driver.cuDeviceGet(ctypes.byref(handle), 0) or driver.cuDeviceGetName(name, 100, handle):
            return None
    except (OSError, AttributeError):
        return None
    return name.value.decode()


def source_digest() -> str:
    """Twelve digits of the digest of all code that is measured or measures."""
    digest = hashlib.sha256()
    for folder in ("hbp", "benchmarks"):
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in (".py", ".cu"):
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]
