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
from torch.nn.functional import pad

from mmr5_kernels import dispatch
from mmr5_kernels.eight_bit import eight_bit_copy
from mmr5_kernels.footprint import scratch_bytes
from mmr5_kernels.layout import Format
from mmr5_kernels.prefill import Scratch
from mmr5_kernels.target import Target
from mmr5_runtime.linear import Linear, concat_rows
from mmr5_runtime.spec import ModelSpec, stored_tensors
from mmr5_runtime.types import CheckpointError, EngineError

PREFILLS = ("exact", "int8", "fp8")
_LAYERS = "model.layers."


class Weights:
    """Hands out checked tensors and linears of one checkpoint.

    ``get`` returns a stored tensor by canonical name, on any device; ``formats`` maps a linear to
    its storage format where it is not dense. ``target`` says which kernels may run, by default what
    ``Target.of`` says of the device.

    ``prefill`` "int8" or "fp8" gives the weight-only linears of decoder layers a second copy in 8
    bits, rounded from the stored one, that prompts are multiplied with: more rows than
    ``table.DECODE_ROWS`` at a time. Linears that are dense or W8A8 stay as they are, and so do
    the head, whose rows are few, and the vision tower.
    """

    def __init__(
        self,
        spec: ModelSpec,
        get: Callable[[str], Tensor],
        formats: Mapping[str, Format],
        dtype: torch.dtype,
        device: torch.device | str,
        *,
        target: Target | None = None,
        prefill: str = "exact",
    ) -> None:
        """Raises ``ValueError`` for an unknown ``prefill``."""
        if prefill not in PREFILLS:
            raise ValueError(f"prefill is one of {', '.join(PREFILLS)}, not {prefill!r}.")
        self._stored = stored_tensors(spec, formats)
        self._get, self.formats = get, formats
        self.dtype, self.device = dtype, device
        self.target = target or Target.of(device)
        self.prefill = prefill
        self._scratch = Scratch()

    def tensor(self, name: str) -> Tensor:
        """A dense tensor (norm, embedding, convolution) in the compute dtype, on the device."""
        return self._checked(name, None).to(device=self.device, dtype=self.dtype, copy=True)

    def shared_linear(self, name: str, weight: Tensor) -> Linear:
        """A dense linear over a weight [N, K] that :meth:`tensor` gave, sharing its memory."""
        return self._prepare(name, {"weight": weight}, None)

    def linear(self, *names: str, zero_rows: int = 0, zero_columns: int = 0) -> Linear:
        """One linear, or several of the same input and format fused along their outputs.

        ``zero_rows`` and ``zero_columns``, for dense ones: outputs and inputs of zeros behind the
        own ones of each.
        """
        formats = {name: self.formats.get(name) for name in names}
        if len(set(formats.values())) > 1:
            kinds = {name: "dense" if kind is None else kind.name for name, kind in formats.items()}
            raise EngineError(
                f"linears that run as one are stored differently ({kinds}); export the engine with "
                "one format for them."
            )
        format = formats[names[0]]
        parts = [self._parts(name, format) for name in names]
        if zero_rows or zero_columns:
            parts = [_padded(part, zero_rows, zero_columns) for part in parts]
        return self._prepare(" + ".join(names), concat_rows(parts), format)

    def _prepare(self, name: str, stored: Mapping[str, Tensor], format: Format | None) -> Linear:
        copied = self.prefill != "exact" and name.startswith(_LAYERS)
        try:
            prepared = self._prepared(stored, format)
            many = None
            if copied and format is not None and format.activations is None:
                copy, parts = eight_bit_copy(format, stored, self.prefill, self.device)
                many = self._prepared(parts, copy)
        except ValueError as error:
            raise EngineError(f"{name} cannot be run: {error}") from error
        if name.startswith(_LAYERS) and many is None:
            # What every prompt will need is taken now, where a message can say what it is for.
            expanded = scratch_bytes(format, self.target, self.dtype, prepared.n, prepared.k)
            if expanded:
                self._scratch.reserve(prepared.n, prepared.k, prepared.device)
        return Linear(prepared, many=many, scratch=self._scratch)

    def _prepared(self, stored: Mapping[str, Tensor], format: Format | None) -> dispatch.Prepared:
        return dispatch.prepare(format, stored, self.dtype, self.device, self.target)

    def _parts(self, name: str, format: Format | None) -> dict[str, Tensor]:
        """The stored tensors of a linear but ``weight_shape``, which only other readers need."""
        suffixes = ("weight", "weight_packed", "weight_scale", "weight_zero_point", "bias")
        keys = {suffix: f"{name}.{suffix}" for suffix in suffixes}
        return {
            # Joined and repacked where it will be used: a GPU does it in no time.
            suffix: self._checked(key, None if suffix == "bias" else format).to(self.device)
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


def _padded(part: Mapping[str, Tensor], rows: int, columns: int) -> dict[str, Tensor]:
    """A dense linear with ``rows`` outputs and ``columns`` inputs of zeros behind its own."""
    padded = {"weight": pad(part["weight"], (0, columns, 0, rows))}
    return padded | {name: pad(part[name], (0, rows)) for name in ("bias",) if name in part}
