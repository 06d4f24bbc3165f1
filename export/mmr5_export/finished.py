"""A complete native engine folder as the writers of other backends see it.

A backend adds files to an engine that is there already: it reads the engine's stored tensors, one
at a time, and what calibration knows beside them, and writes nothing else than its own files. So
what it writes is a function of the engine alone, and can be thrown away and made again.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from torch import Tensor

from mmr5_kernels.layout import Format
from mmr5_runtime.artifact import Manifest, TensorReader, read_manifest
from mmr5_runtime.spec import ModelSpec


@dataclass(frozen=True)
class FinishedEngine:
    """An engine folder whose native files and manifest are complete.

    ``original`` gives the dense tensors of the source checkpoint by canonical name; it is None
    when the checkpoint came quantized. ``input_absmax`` is the largest absolute input that each
    decoder linear met in calibration, by canonical linear name; it is empty where nothing was
    calibrated.
    """

    folder: Path
    manifest: Manifest
    original: Callable[[str], Tensor] | None = None
    input_absmax: Mapping[str, float] = field(default_factory=dict)

    @property
    def spec(self) -> ModelSpec:
        """Architecture of the model."""
        return self.manifest.spec

    @property
    def formats(self) -> Mapping[str, Format]:
        """Storage format by linear; what is not listed is dense."""
        return self.manifest.formats

    @cached_property
    def _reader(self) -> TensorReader:
        return TensorReader(self.folder, self.manifest)

    def get(self, name: str) -> Tensor:
        """A stored tensor by canonical name, on the CPU, in its stored dtype and shape.

        It may share memory with the file. Raises :class:`EngineError` when there is none.
        """
        return self._reader.get(name)


def open_finished(
    folder: Path,
    original: Callable[[str], Tensor] | None = None,
    input_absmax: Mapping[str, float] | None = None,
) -> FinishedEngine:
    """Reads the manifest of a finished engine; raises :class:`EngineError` like reading it does."""
    return FinishedEngine(folder, read_manifest(folder), original, dict(input_absmax or {}))
