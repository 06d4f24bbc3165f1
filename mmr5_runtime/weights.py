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

from mmr5_runtime.linear import Linear, concat_rows
from mmr5_runtime.spec import ModelSpec, stored_shapes
from mmr5_runtime.types import CheckpointError, EngineError

# Storage dtypes that are not simply "any floating point".
_INTEGER_DTYPES = {
    ("int8", "weight"): torch.int8,
    ("int4", "weight_packed"): torch.int32,
    ("int4", "weight_shape"): torch.int64,
}


class Weights:
    """Hands out checked tensors and linears of one checkpoint.

    ``get`` returns a stored tensor by canonical name, on any device; ``formats`` maps a linear to
    its storage format where that is not ``dense``.
    """

    def __init__(
        self,
        spec: ModelSpec,
        get: Callable[[str], Tensor],
        formats: Mapping[str, str],
        dtype: torch.dtype,
        device: torch.device | str,
    ) -> None:
        self._shapes = stored_shapes(spec, formats)
        self._get, self._formats = get, formats
        self.dtype, self.device = dtype, device

    def tensor(self, name: str) -> Tensor:
        """A dense tensor (norm, embedding, convolution) in the compute dtype, on the device."""
        return self._checked(name, "dense").to(device=self.device, dtype=self.dtype, copy=True)

    def shared_linear(self, name: str, weight: Tensor) -> Linear:
        """A dense linear over a weight [N, K] that :meth:`tensor` gave, sharing its memory."""
        return self._prepare(name, {"weight": weight}, "dense")

    def linear(self, *names: str) -> Linear:
        """One linear, or several of the same input and format fused along their outputs."""
        kinds = {name: self._formats.get(name, "dense") for name in names}
        if len(set(kinds.values())) > 1:
            raise EngineError(
                f"linears that run as one are stored differently ({kinds}); export the engine with "
                "one format for them."
            )
        kind = kinds[names[0]]
        parts = [self._parts(name, kind) for name in names]
        return self._prepare(" + ".join(names), concat_rows(parts), kind)

    def _prepare(self, name: str, stored: Mapping[str, Tensor], kind: str) -> Linear:
        try:
            return Linear.from_tensors(stored, kind, self.dtype, self.device)
        except ValueError as error:
            raise EngineError(f"{name} cannot be run: {error}") from error

    def _parts(self, name: str, kind: str) -> dict[str, Tensor]:
        suffixes = ("weight", "weight_packed", "weight_scale", "bias")
        keys = {suffix: f"{name}.{suffix}" for suffix in suffixes}
        return {s: self._checked(key, kind) for s, key in keys.items() if key in self._shapes}

    def _checked(self, name: str, kind: str) -> Tensor:
        try:
            found = self._get(name)
        except KeyError as error:
            raise CheckpointError(
                f"the weights lack {name}; download or export every file again."
            ) from error
        expected = self._shapes[name]
        if tuple(found.shape) != expected:
            raise CheckpointError(
                f"{name} has shape {list(found.shape)} but the config says {list(expected)}; check "
                "that config.json belongs to these files."
            )
        wanted = _INTEGER_DTYPES.get((kind, name.rpartition(".")[2]))
        if found.dtype != wanted if wanted else not found.is_floating_point():
            raise CheckpointError(
                f"{name} is stored as {found.dtype} but its format {kind} keeps "
                f"{wanted or 'floating point numbers'}; export the weights again."
            )
        return found
