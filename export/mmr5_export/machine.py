"""What the machine has free, and how fast it is: main memory, GPU memory, disk, one product."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

_MEMINFO = Path("/proc/meminfo")
_CGROUPS, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_UNLIMITED = 1 << 60  # version 1 of cgroups writes a huge number for "no limit"


@dataclass(frozen=True)
class Speed:
    """Operations (a multiply-add is two) and bytes copied per second."""

    flops: float
    bytes: float


def available_memory(device: torch.device) -> int | None:
    """Free bytes of the memory that ``device`` computes in; None where the system does not tell."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free
    return main_memory()


def main_memory(
    meminfo: Path = _MEMINFO, cgroups: Path = _CGROUPS, membership: Path = _MEMBERSHIP
) -> int | None:
    """Bytes of main memory this process can still have; None where the system does not tell.

    The smaller of what the machine has available and what the limits of the process's cgroups (a
    container, a batch job) leave it. What the system would give back, page cache first, counts as
    free. The arguments are where Linux keeps these figures.
    """
    found = [*_machine_free(meminfo), *_cgroup_free(cgroups, membership)]
    return min(found, default=None)


def free_disk(folder: Path) -> int:
    """Free bytes on the disk that ``folder``, which need not exist yet, is or would be on."""
    return shutil.disk_usage(existing(folder)).free


def existing(folder: Path) -> Path:
    """``folder`` or the nearest one above it that exists."""
    return next(path for path in (folder, *folder.parents) if path.exists())


def measure_speed(dtype: torch.dtype, device: torch.device) -> Speed:
    """The speed of one matrix product and one copy on ``device``; takes about half a second."""
    gpu = device.type == "cuda"
    side = 4096 if gpu else 768
    square = torch.ones(side, side, dtype=dtype, device=device)
    product = _timed(lambda: square @ square, device)
    large = torch.ones((256 if gpu else 64) << 20, dtype=torch.int8, device=device)
    copy = _timed(lambda: large.clone(), device)
    return Speed(2 * side**3 / product, 2 * large.nbytes / copy)


def _machine_free(meminfo: Path) -> Iterator[int]:
    try:
        lines = meminfo.read_text(encoding="ascii").splitlines()
        found = dict(line.split(":", 1) for line in lines)
        yield int(found["MemAvailable"].split()[0]) << 10
    except (OSError, KeyError, ValueError):
        return


def _cgroup_free(root: Path, membership: Path) -> Iterator[int]:
    """What each limit leaves: of the process's own group and of every group around it."""
    try:
        lines = membership.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if not controllers:
            top, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            top = root / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # Inside a container the path may be that of the host, which is not visible there; the
        # container's own limit then stands at the top.
        own = top / path.strip("/")
        for folder in (own, *own.parents):
            if not folder.is_relative_to(top):
                break
            yield from _left(folder, *names)


def _left(folder: Path, limit: str, used: str, reclaimable: str) -> Iterator[int]:
    try:
        most = int((folder / limit).read_text(encoding="ascii"))
        taken = int((folder / used).read_text(encoding="ascii"))
        stat = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):  # no such group or file, or "max"
        return
    cache = next((int(line.split()[1]) for line in stat if line.startswith(f"{reclaimable} ")), 0)
    if most < _UNLIMITED:
        yield max(0, most - taken + cache)


def _timed(run: Callable[[], object], device: torch.device) -> float:
    best = float("inf")
    for _ in range(4):  # the first one warms up, and is never the best
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        started = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - started)
    return best
