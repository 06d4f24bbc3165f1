"""Random stored tensors of a whole engine, drawn on the device that will use them.

Nothing passes through main memory: 7 GB of int4 at the 7B's shape are there in seconds. Weights are
spread as the inverse square root of what they sum over, so that activations keep their size through
the layers and logits are finite; codes have mean zero, as trained ones do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from mmr5_kernels.layout import FP8_MAX, INT8_MAX, Format
from mmr5_runtime.spec import ModelSpec, linear_shapes, stored_tensors

_WORDS = 1 << 31  # int32 words are drawn from -_WORDS to _WORDS - 1
_NIBBLE_LOW_BITS = 0x11111111
_FP8_SPREAD = 100.0
# Standard deviation of the codes that are drawn: int4 are -7..7 with zero twice as often.
_CODE_SPREAD = {
    "int4": math.sqrt(2 * sum(code**2 for code in range(1, 8)) / 16),
    "int8": math.sqrt(((2 * INT8_MAX + 1) ** 2 - 1) / 12),
    "fp8": _FP8_SPREAD,
}


class RandomTensors:
    """Draws the stored tensors of an engine by canonical name; see :meth:`get`."""

    def __init__(
        self,
        spec: ModelSpec,
        formats: Mapping[str, Format],
        device: torch.device | str,
        seed: int = 7,
    ) -> None:
        self._formats = formats
        self._stored = stored_tensors(spec, formats)
        self._columns = {name: k for name, (_, k) in linear_shapes(spec, formats).items()}
        self._ends = torch.tensor(spec.eos_token_ids)
        self._device = torch.device(device)
        self._generator = torch.Generator(self._device).manual_seed(seed)

    def get(self, name: str) -> Tensor:
        """A new tensor of the shape and dtype that the engine stores under ``name``.

        The same calls in the same order give the same tensors on one device. The head's rows of
        the end tokens are zero, so that greedy decoding goes on for as long as it is let. KeyError
        for a tensor that the engine does not have.
        """
        shape, dtype = self._stored[name]
        linear, _, suffix = name.rpartition(".")
        format = self._formats.get(linear)
        if format is None:
            drawn = self._dense(shape, suffix, dtype)
        elif suffix == "weight_scale":
            spread = _CODE_SPREAD[format.weights] * math.sqrt(self._columns[linear])
            return torch.full(shape, 1 / spread, dtype=dtype, device=self._device)
        elif suffix == "bias":
            return self._normal(shape, dtype).mul_(0.1)
        elif suffix == "weight_shape":
            return torch.tensor((shape[0], self._columns[linear]))
        elif suffix == "weight_zero_point":
            return torch.zeros(shape, dtype=dtype, device=self._device)
        else:
            drawn = self._codes(shape, format.weights)
        if linear == "lm_head":
            self._silence_ends(drawn)
        return drawn

    def _dense(self, shape: tuple[int, ...], suffix: str, dtype: torch.dtype) -> Tensor:
        drawn = self._normal(shape, dtype)
        if suffix == "bias":
            return drawn.mul_(0.1)
        if len(shape) == 1:  # the weight of a norm
            return drawn.mul_(0.1).add_(1)
        return drawn.mul_(math.prod(shape[1:]) ** -0.5)

    def _codes(self, shape: tuple[int, ...], weights: str) -> Tensor:
        if weights == "int8":
            return self._whole(-INT8_MAX, INT8_MAX + 1, shape, torch.int8)
        if weights == "fp8":
            codes = self._normal(shape, torch.bfloat16).mul_(_FP8_SPREAD)
            return codes.clamp_(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn)
        words = self._whole(-_WORDS, _WORDS, shape, torch.int32)
        # Nibbles are code + 8: 0 becomes 8, which leaves -7..7 with mean zero.
        empty = ~(words | words >> 1 | words >> 2 | words >> 3) & _NIBBLE_LOW_BITS
        return words | empty << 3

    def _silence_ends(self, drawn: Tensor) -> None:
        zero = -2004318072 if drawn.dtype == torch.int32 else 0  # eight nibbles of 8
        drawn[self._ends.to(drawn.device)] = torch.tensor(zero, dtype=drawn.dtype).to(drawn.device)

    def _whole(self, low: int, high: int, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        where, generator = self._device, self._generator
        return torch.randint(low, high, shape, generator=generator, device=where, dtype=dtype)

    def _normal(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.randn(shape, generator=self._generator, device=self._device, dtype=dtype)
