"""Where kernels run and which of them may: the half of a dispatch key that a model shares.

A :class:`Target` is fixed when an engine is loaded. It never starts CUDA for a CPU, and importing
this module imports no Triton.
"""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from functools import cache
from importlib import metadata

import torch

from mmr5_kernels import proven

KERNELS = ("auto", "portable", "triton", "cuda")
CUDA_KERNELS = frozenset({"int4_w4_cuda"})  # the others of the table that are ours are Triton's
MIN_CAPABILITY = (8, 0)  # bf16 in tensor cores
MIN_TRITON = (3, 6)  # the oldest that the kernels were compiled with
MIN_DRIVER = 12_000  # Triton 3.6 assembles with ptxas of CUDA 12


@dataclass(frozen=True)
class Target:
    """One device, and the kernels that may be chosen for it.

    ``device_type`` is "cpu" or "cuda"; ``capability`` the SM of a GPU, as (9, 0). ``kernels`` is
    "portable" (torch alone), "auto" (and those kernels of ours that have been proven on this SM),
    "triton" (all Triton kernels) or "cuda" (the CUDA C++ kernels, and Triton's where there is
    none). ``interpreted``: tensors lie on the CPU, as Triton's interpreter has it.
    """

    device_type: str
    capability: tuple[int, int] | None = None
    kernels: str = "portable"
    interpreted: bool = False

    @classmethod
    def of(cls, device: torch.device | str, kernels: str = "auto") -> Target:
        """The target that ``device`` is, with the kernels asked for.

        "auto" becomes "portable" where the device cannot run Triton kernels (on a GPU one warning
        says why) or none has been proven on it. Raises ``ValueError`` for an unknown ``kernels``,
        and for "triton" and "cuda" where they cannot run.
        """
        device = torch.device(device)
        if kernels not in KERNELS:
            raise ValueError(f"kernels is one of {', '.join(KERNELS)}, not {kernels!r}.")
        if device.type != "cuda":
            if kernels in ("triton", "cuda"):
                raise ValueError(
                    f"{kernels} kernels need a CUDA device, not {device.type}; use device='cuda' "
                    "or kernels='auto'."
                )
            return cls(device.type)
        if kernels == "portable":
            return cls("cuda", _capability(device))
        capability = _capability(device)
        obstacle = _obstacle(capability)
        if obstacle and kernels != "auto":
            raise ValueError(f"{obstacle}; or use kernels='portable'.")
        if obstacle:
            _warn(f"{obstacle}. Kernels of plain torch are used until then.")
        elif kernels != "auto" or proven.names(capability):
            return cls("cuda", capability, kernels)
        return cls("cuda", capability)

    def allows(self, kernel: str) -> bool:
        """Whether our kernel of this name may be chosen here."""
        if self.kernels == "auto":
            return self.capability is not None and kernel in proven.names(self.capability)
        if kernel in CUDA_KERNELS:
            return self.kernels == "cuda"
        return self.kernels in ("triton", "cuda")


# What tests run on a CPU: every kernel of an H200, on CPU tensors.
INTERPRETED = Target("cuda", (9, 0), "triton", interpreted=True)


def _capability(device: torch.device) -> tuple[int, int]:
    try:
        return torch.cuda.get_device_capability(device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0].rstrip(".")
        raise ValueError(
            f"{device} cannot be used: {reason}. Install a CUDA build of torch and a driver that "
            "serves it, or use device='cpu'."
        ) from error


def _obstacle(capability: tuple[int, int]) -> str | None:
    """Why Triton kernels cannot run here and what would help, or None; no full stop."""
    found = "{}.{}".format(*capability)
    if capability < MIN_CAPABILITY:
        wanted = "{}.{}".format(*MIN_CAPABILITY)
        return f"this GPU has compute capability {found} and the Triton kernels need {wanted}"
    version = _triton_version()
    if version is None or version < MIN_TRITON:
        have = "missing" if version is None else "{}.{}".format(*version)
        wanted = "{}.{}".format(*MIN_TRITON)
        return f"Triton is {have} and the kernels need {wanted}: pip install 'triton>={wanted}'"
    driver = _driver_version()
    if driver is not None and driver < MIN_DRIVER:
        have, wanted = (f"{v // 1000}.{v % 1000 // 10}" for v in (driver, MIN_DRIVER))
        return f"the driver serves CUDA {have} and Triton's programs need {wanted}: update it"
    return None


def triton_version() -> str | None:
    """The version of Triton that is installed, as "3.6.0"; None without. Does not import it."""
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return None


def _triton_version() -> tuple[int, int] | None:
    found = re.match(r"(\d+)\.(\d+)", triton_version() or "")
    return (int(found[1]), int(found[2])) if found else None


def _driver_version() -> int | None:
    """CUDA version the driver serves, as 12080; None where torch does not say."""
    ask = getattr(torch._C, "_cuda_getDriverVersion", None)
    return None if ask is None else int(ask())


@cache  # once per sentence, not once per linear
def _warn(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=3)
