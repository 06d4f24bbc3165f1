"""Checks of every kernel that computes a linear, alone and with what is fused around it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mmr5_bench.kernels_bench import ours
from mmr5_bench.kernels_bench.operands import FORMATS, random_tensors, reference_linear
from mmr5_bench.proof.case import Case, Finding, Scale, near, same, worst
from mmr5_kernels import dispatch
from mmr5_kernels.dispatch import Prepared
from mmr5_kernels.fused import Norm, fused_linear
from mmr5_kernels.layout import Format
from mmr5_kernels.table import DECODE_ROWS, TABLE
from mmr5_kernels.target import INTERPRETED, Target

_DTYPE = torch.bfloat16
_EXACT = ("int8_skinny", "int8_gemm", "int8_int_mm")
# By mean square: the reference rounds weights that kernels do not, both round their outputs.
_ALLOWED = 5e-3
# A norm's sum in another order moves some inputs to their neighbour, a code of 8 bits by a step.
_FUSED_ALLOWED = 1e-2


def linear_cases(scale: Scale, device: torch.device) -> Iterator[Case]:
    """Every kernel of ours in the table in every format it reads, one check per weight."""
    # Those in CUDA C++ are not interpreted; with "cuda" Triton's are allowed beside them.
    target = INTERPRETED if device.type == "cpu" else Target.of(device, "cuda")
    for format_name in scale.formats:
        format = FORMATS[format_name]
        for n, k in scale.linears:
            if format is not None and format.group_size and k % format.group_size:
                continue
            for kernel in _names(scale, format, target, n, k):
                about = f"{kernel}, {format_name} {n} x {k}"
                given = _Given(scale, kernel, format, n, k, target, device)
                yield Case((kernel,), about, partial(_linear, given))
                if _is_step(kernel):
                    name = f"{about}: rows do not depend on their company"
                    yield Case((kernel,), name, partial(_company, given))
                    yield Case((kernel,), f"{about}, fused", partial(_fused, given))


def _names(scale: Scale, format: Format | None, target: Target, n: int, k: int) -> list[str]:
    """Kernels of ours among those that serve the weight at any number of rows."""
    own = {row.kernel for row in TABLE if row.own} | set(ours.EXTRAS)
    if target.interpreted and not multiplies_fp8_rows():
        own.discard("fp8_scaled_mm")
    found: dict[str, None] = {}
    for m in scale.rows:
        found |= dict.fromkeys(ours.kernels(format, [target], _DTYPE, m, n, k))
    return [name for name in found if name in own]


def multiplies_fp8_rows() -> bool:
    """Whether torch's product with a scale per row works on a CPU: in version 2.11 it does not."""
    codes, scale = torch.zeros(16, 16).to(torch.float8_e4m3fn), torch.ones(16, 1)
    try:
        torch._scaled_mm(codes, codes.t(), scale, scale.t(), out_dtype=_DTYPE)
    except RuntimeError:
        return False
    return True


def _is_step(kernel: str) -> bool:
    return dispatch.KERNELS[kernel].fused is not None


@dataclass(frozen=True)
class _Given:
    """One kernel and one weight [n, k] that it has to multiply."""

    scale: Scale
    kernel: str
    format: Format | None
    n: int
    k: int
    target: Target
    device: torch.device

    def weight(self) -> tuple[dict[str, Tensor], Prepared]:
        """New random tensors, stored and prepared."""
        drawn = random_tensors(
            self.format, self.n, self.k, bias=True, device=self.device, seed=_seed()
        )
        return drawn, dispatch.prepare(self.format, drawn, _DTYPE, self.device, self.target)

    def rows(self, m: int) -> Tensor:
        """New random rows [m, k]."""
        return _draw((m, self.k), self.device)


def _linear(given: _Given) -> Finding:
    tensors, prepared = given.weight()
    findings = []
    for m in given.scale.rows:
        serving = ours.kernels(given.format, [given.target], _DTYPE, m, given.n, given.k)
        if given.kernel not in serving:
            continue
        x = given.rows(m)
        found = [ours.run_kernel(given.kernel, prepared, x) for _ in range(2)]
        wanted = reference_linear(x, given.format, tensors)
        close = same if given.kernel in _EXACT else partial(near, allowed=_ALLOWED)
        findings += [close(found[0], wanted), same(*found)]
    return worst(*findings)


def _company(given: _Given) -> Finding:
    """The first rows of 64 and the same rows by themselves: the same bits."""
    _, prepared = given.weight()
    x = given.rows(DECODE_ROWS)
    together = ours.run_kernel(given.kernel, prepared, x)
    alone = [m for m in given.scale.rows if m < DECODE_ROWS]
    return worst(
        *(same(ours.run_kernel(given.kernel, prepared, x[:m].clone()), together[:m]) for m in alone)
    )


def _fused(given: _Given) -> Finding:
    tensors, prepared = given.weight()
    fused = dispatch.KERNELS[given.kernel].fused
    assert fused is not None
    norm = Norm(torch.rand(given.k).to(given.device, _DTYPE) + 0.5, 1e-6)
    bias = tensors["bias"].to(_DTYPE)
    findings = []
    for m in (rows for rows in given.scale.rows if rows <= DECODE_ROWS):
        x, residual = given.rows(m), _draw((m, given.n), given.device)
        for around in (
            {"norm": norm},
            {"residual": residual},
            {"norm": norm, "swiglu": True},
        ):
            if around.get("swiglu") and given.n % 2:
                continue
            found = fused(x, prepared, **around)
            wanted = fused_linear(x, given.format, tensors, bias, **around)
            findings.append(near(found, wanted, _FUSED_ALLOWED))
    return worst(*findings)


def _seed() -> int:
    return int(torch.randint(1 << 30, ()))


def _draw(size: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.randn(*size).to(device, _DTYPE)
