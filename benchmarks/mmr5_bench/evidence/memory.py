"""The most memory that was in use while something was measured."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import torch

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")


@dataclass
class PeakMemory:
    """Peak of the process's resident memory, and of what torch allocated on a CUDA ``device``.

    Resident memory is sampled, because the kernel's high-water mark is one for the whole
    process, in which others measure too; a peak shorter than ``every_s`` can be missed.
    """

    device: str = "cpu"
    every_s: float = 0.05
    _peak: int = 0
    _over: threading.Event = field(default_factory=threading.Event)
    _thread: threading.Thread | None = None

    def __enter__(self) -> PeakMemory:
        if torch.device(self.device).type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self._over.clear()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over.set()
        if self._thread is not None:
            self._thread.join()

    def bytes(self) -> dict[str, int]:
        """``peak_rss_bytes`` where the system tells it, ``peak_gpu_bytes`` on a CUDA device."""
        found = {"peak_rss_bytes": self._peak} if self._peak else {}
        if torch.device(self.device).type == "cuda":
            found["peak_gpu_bytes"] = torch.cuda.max_memory_allocated(self.device)
        return found

    def _run(self) -> None:
        while True:
            self._peak = max(self._peak, resident_bytes())
            if self._over.wait(self.every_s):
                return


def resident_bytes() -> int:
    """Resident memory of this process, 0 where the system does not tell."""
    return _told("VmRSS:")


def peak_resident_bytes() -> int:
    """Linux's high-water mark of this process (proc(5): ``VmHWM``), 0 where there is none."""
    return _told("VmHWM:")


def reset_peak() -> bool:
    """Sets the high-water mark back to what is resident now; False where that is not allowed.

    The mark is the process's own: for programs that do nothing but measure, and not beside others.
    """
    try:
        _CLEAR_REFS.write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def _told(field: str) -> int:
    if not _STATUS.is_file():
        return 0
    for line in _STATUS.read_text(encoding="utf-8").splitlines():
        if line.startswith(field):
            return int(line.split()[1]) << 10
    return 0
