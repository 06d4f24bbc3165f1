"""How much the decoder minds when one group of linears is stored in fewer bits.

For every layer and every group of linears that run as one, the layer is run with that group alone
rounded to a format, and the noise this puts on the residual stream is compared with the stream:
|layer'(x) - layer(x)|^2 / |layer(x)|^2 over all tokens. The stream is what all later layers read,
so these figures can be compared between layers and between an attention and an MLP. The inputs come
from unquantized layers; a few prompts are enough, and they stay in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import isfinite

import torch
from torch import Tensor

from mmr5_export.finite import is_finite
from mmr5_export.layer_pass import GROUPS, LayerPass, group_linears
from mmr5_export.quantize import quantize_linear
from mmr5_export.sequential import Prepared, Walk, embed, read_layer
from mmr5_kernels.layout import Format
from mmr5_kernels.reference import noise_energy
from mmr5_runtime.types import CheckpointError

PROMPTS = 8

Sensitivity = dict[str, dict[str, float]]
"""Error by group (named as in :func:`mmr5_export.mixed.layer_groups`) and format name."""


def measure_sensitivity(
    walk: Walk,
    candidates: Mapping[str, Mapping[str, Format | None]],
    progress: Callable[[int, int], None],
) -> Sensitivity:
    """Errors of every group of ``candidates`` in each of its formats, over the first prompts.

    A group without a choice is not measured, nor is bf16: both count as free of error. Raises
    :class:`CheckpointError` for weights that are not finite, and naming the layer or the group
    whose output is not finite or too large to be compared.
    """
    samples = walk.calibration[:PROMPTS]
    states = list(embed(walk, samples))
    found: Sensitivity = {}
    layers = walk.spec.text.num_layers
    for index in range(layers):
        dense = read_layer(walk.checkpoint, index)
        original = LayerPass(walk.spec, index, dense, {}, walk.dtype, walk.device)
        after = _run(original, states, samples)
        del original
        if not all(is_finite(state) for state in after):
            raise _overflow(f"model.layers.{index} as it is")
        for group in GROUPS:
            name = f"model.layers.{index}.{group}"
            found[name] = {
                key: _error(walk, index, group, dense, format, states, after)
                if format is not None and len(candidates[name]) > 1
                else 0.0
                for key, format in candidates[name].items()
            }
        states = after
        progress(index + 1, layers)
    return found


def _error(
    walk: Walk,
    index: int,
    group: str,
    dense: Mapping[str, Tensor],
    format: Format,
    states: Sequence[Tensor],
    expected: Sequence[Tensor],
) -> float:
    tensors = dict(dense)
    linears = group_linears(index, group)
    for linear in linears:
        weight = dense[f"{linear}.weight"].to(walk.device)
        parts, _ = quantize_linear(weight, format, "mse")
        tensors |= {f"{linear}.{suffix}": part for suffix, part in parts.items()}
    rounded = LayerPass(
        walk.spec, index, tensors, dict.fromkeys(linears, format), walk.dtype, walk.device
    )
    signal = noise = 0.0
    found = _run(rounded, states, walk.calibration[: len(states)])
    for one, other in zip(expected, found, strict=True):
        sample_signal, sample_noise = noise_energy(one, other)
        signal, noise = signal + sample_signal, noise + sample_noise
    if not (isfinite(signal) and isfinite(noise)):
        raise _overflow(f"model.layers.{index} with {group} as {format.name}")
    return noise / max(signal, torch.finfo(torch.float32).tiny)


def _run(layer: LayerPass, states: Sequence[Tensor], samples: Sequence[Prepared]) -> list[Tensor]:
    pairs = zip(states, samples, strict=True)
    return [layer.run(state, sample.prompt.positions).cpu() for state, sample in pairs]


def _overflow(what: str) -> CheckpointError:
    return CheckpointError(
        f"what comes out of {what} is not finite over the first samples, or too large to be "
        "squared; try --dtype float32 or other samples, or a --quant that measures nothing."
    )
