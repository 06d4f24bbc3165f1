"""From stored tensors to loaded layers: the strict, streaming side of building a model.

Modules ask for their weights by canonical name; one tensor at a time is fetched, its shape and
dtype are compared with what the architecture and the storage format say, and it is copied to its
place. Peak memory is therefore the model plus the parts of one fused linear.

Copied even where a mapped file could be used as it is: a file replaced under a running process must
not reach the model, and where a tensor happens to lie in a file decides how it is aligned, which
changes the last bits of a product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from mmr5_kernels.layout import Format
from mmr5_runtime.linear import Linear, concat_rows
from mmr5_runtime.spec import ModelSpec, stored_tensors
from mmr5_runtime.types import CheckpointError, EngineError


class Weights:
    """Hands out checked tensors and linears of one checkpoint.

    ``get`` returns a stored tensor by canonical name, on any device; ``formats`` maps a linear to
    its storage format where it is not dense.
    """

    def __init__(
        self,
        spec: ModelSpec,
        get: Callable[[str], Tensor],
        formats: Mapping[str, Format],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self._stored = stored_tensors(spec, formats)
        self._get, self.formats = get, formats
        self.dtype, self.device = dtype, device

    def tensor(self, name: str) -> Tensor:
        """A dense tensor (norm, embedding, convolution) in the compute dtype, on the device."""
        return self._checked(name, None).to(device=self.device, dtype=self.dtype, copy=True)

    def shared_linear(self, name: str, weight: Tensor) -> Linear:
        """A dense linear over a weight [N, K] that :meth:`tensor` gave, sharing its memory."""
        return self._prepare(name, {"weight": weight}, None)

    def linear(self, *names: str) -> Linear:
        """One linear, or several of the same input and format fused along their outputs."""
        formats = {name: self.formats.get(name) for name in names}
        if len(set(formats.values())) > 1:
            kinds = {name: "dense" if kind is None else kind.name for name, kind in formats.items()}
            raise EngineError(
                f"linears that run as one are stored differently ({kinds}); export the engine with "
                "one format for them."
            )
        format = formats[names[0]]
        parts = [self._parts(name, format) for name in names]
        return self._prepare(" + ".join(names), concat_rows(parts), format)

    def _prepare(self, name: str, stored: Mapping[str, Tensor], format: Format | None) -> Linear:
        try:
            return Linear.from_tensors(stored, format, self.dtype, self.device)
        except ValueError as error:
            raise EngineError(f"{name} cannot be run: {error}") from error

    def _parts(self, name: str, format: Format | None) -> dict[str, Tensor]:
        """The stored tensors of a linear but ``weight_shape``, which only other readers need."""
        suffixes = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "bias")
        keys = {suffix: f"{name}.{suffix}" for suffix in suffixes}
        return {
            suffix: self._checked(key, None if suffix == "bias" else format)
            for suffix, key in keys.items()
            if key in self._stored
        }

    def _checked(self, name: str, format: Format | None) -> Tensor:
        try:
            found = self._get(name)
        except KeyError as error:
            raise CheckpointError(
                f"the weights lack {name}; download or export every file again."
            ) from error
        expected, dtype = self._stored[name]
        if tuple(found.shape) != expected:
            raise CheckpointError(
                f"{name} has shape {list(found.shape)} but the config says {list(expected)}; check "
                "that config.json belongs to these files."
            )
        # A dense tensor may come in any ordinary floating point; fp8 codes lack their scales.
        dense_fits = found.is_floating_point() and found.dtype.itemsize > 1
        if found.dtype != dtype if format else not dense_fits:
            kept = f"format {format.name} keeps {dtype}" if format else "dense tensors are floats"
            raise CheckpointError(
                f"{name} is stored as {found.dtype} but {kept}; export the weights again."
            )
        return found
