"""How an engine computes: device, arithmetic and kernels, checked before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, cast, get_args

import torch

from mmr5_kernels import proven, tuning
from mmr5_kernels.layout import Format
from mmr5_kernels.target import Target, triton_version
from mmr5_runtime.capacity import KVFormat
from mmr5_runtime.types import EngineError, RequestError

Kernels = Literal["auto", "portable", "triton", "cuda"]
Prefill = Literal["exact", "int8", "fp8"]

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
_FP8_CAPABILITY = (8, 9)
_PROMPT_KERNELS = {"int8": "int8_gemm", "fp8": "fp8_scaled_mm"}
_OURS = ("triton", "cuda")
_STEP_KERNELS = ("rope_append", "decode_attention")  # what a fused decode step cannot do without


@dataclass(frozen=True)
class Compute:
    """``target`` says which kernels may run; ``prefill`` how prompts are multiplied, ``kv`` how
    keys and values are kept, ``graphs`` whether decode steps are recorded as CUDA graphs."""

    device: torch.device
    dtype: torch.dtype
    target: Target
    prefill: Prefill = "exact"
    kv: KVFormat = "bf16"
    graphs: bool = False

    @classmethod
    def plain(cls, device: torch.device, dtype: torch.dtype) -> Compute:
        """Torch alone, keys and values as they are computed."""
        return cls(device, dtype, Target(device.type))

    @property
    def fused_steps(self) -> bool:
        """Whether decode steps run on the kernels of :mod:`mmr5_runtime.step`."""
        return all(self.target.allows(kernel) for kernel in _STEP_KERNELS)

    def to_json(self) -> dict[str, Any]:
        """All of it that may change a bit of a result, for the engine's identity.

        Where kernels of ours run, that is also what compiles them and the sizes of their tiles:
        both decide in which order sums are added up.
        """
        target = self.target
        allowed: list[str] = []
        if target.kernels == "auto" and target.capability is not None:
            allowed = sorted(proven.names(target.capability))
        ours = target.kernels in _OURS or allowed
        made = {"triton": triton_version(), "tuning": tuning.digest()} if ours else {}
        return made | {
            "kernels": target.kernels,
            "proven": allowed,
            "interpreted": target.interpreted,
            "prefill": self.prefill,
            "kv": self.kv,
        }


def resolve(
    device: str,
    dtype: str,
    formats: Mapping[str, Format],
    *,
    kernels: str = "auto",
    prefill: str = "exact",
    kv: str = "bf16",
    graphs: bool | None = None,
    target: Target | None = None,
) -> Compute:
    """The options of a load as one checked whole; ``target`` replaces what ``kernels`` gives.

    Raises RequestError for an option that is unknown or means nothing here, EngineError where the
    GPU, its driver or Triton does not serve what was asked.
    """
    where = resolve_device(device)
    compute = resolve_dtype(dtype, where)
    _among("kernels", kernels, Kernels)
    _among("prefill", prefill, Prefill)
    _among("kv", kv, KVFormat)
    wide = compute is torch.float32
    if target is None and where.type == "cuda" and kernels in _OURS and wide:
        raise RequestError(
            f"kernels={kernels!r} computes in bfloat16 only; pass dtype='bfloat16', or "
            "kernels='auto'."
        )
    if target is None:
        target = _target(where, "portable" if wide and where.type == "cuda" else kernels)
    _check_prefill(prefill, formats, target)
    found = Compute(where, compute, target, cast(Prefill, prefill), cast(KVFormat, kv))
    possible = where.type == "cuda" and found.fused_steps
    if graphs and not possible:
        if where.type == "cpu":
            remedy = "device='cuda'"
        elif wide:
            remedy = "dtype='bfloat16' and kernels='triton'"
        else:
            remedy = "kernels='triton'"
        raise RequestError(
            "graphs=True records decode steps of the Triton kernels on a GPU, but those of this "
            f"engine are plain torch on {where}; leave graphs out, or pass {remedy}."
        )
    return replace(found, graphs=possible if graphs is None else graphs)


def resolve_device(name: str) -> torch.device:
    """``auto``, ``cpu``, ``cuda`` or ``cuda:N`` to a device that is there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise RequestError(f"device={name!r} is unknown; pass auto, cpu, cuda or cuda:N.")
    if device.type == "cuda":
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise RequestError(f"device={name!r} is not there ({count} GPUs seen); pass cpu.")
    return device


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """``auto`` is bfloat16 on a GPU and float32 on a CPU, where few have bfloat16 arithmetic."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    if name not in DTYPES:
        raise RequestError(f"dtype={name!r} is unknown; pass auto, bfloat16 or float32.")
    return DTYPES[name]


def _among(option: str, value: str, choices: Any) -> None:
    if value not in get_args(choices):
        raise RequestError(f"{option}={value!r} is unknown; pass {', '.join(get_args(choices))}.")


def _target(device: torch.device, kernels: str) -> Target:
    if device.type == "cpu" and kernels in _OURS:
        raise RequestError(
            f"kernels={kernels!r} needs a GPU and this engine is loaded on the CPU; pass "
            "device='cuda', or kernels='auto'."
        )
    try:
        return Target.of(device, kernels)
    except ValueError as error:
        raise EngineError(f"this engine cannot run on {device}: {error}") from error


def _check_prefill(prefill: str, formats: Mapping[str, Format], target: Target) -> None:
    if prefill == "exact":
        return
    if all(format.weights != "int4" for format in formats.values()):
        raise RequestError(
            f"prefill={prefill!r} makes a second copy of int4 weights, and this engine has none; "
            "leave prefill out, it multiplies what is stored."
        )
    sm = target.capability
    if prefill == "fp8" and sm is not None and sm < _FP8_CAPABILITY:
        raise EngineError(
            "prefill='fp8' needs a GPU that multiplies 8-bit floats (compute capability 8.9 or "
            f"newer), and this one has {sm[0]}.{sm[1]}; pass prefill='int8'."
        )
    if target.device_type == "cuda" and not target.allows(_PROMPT_KERNELS[prefill]):
        raise EngineError(
            f"prefill={prefill!r} would run on the reference here, slower than in 16 bits: its "
            "kernel is not among those that may be used; pass kernels='triton', or leave prefill "
            "out."
        )
