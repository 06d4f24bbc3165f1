"""What an export is asked to add for other engines, known before it starts, and what that takes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mmr5_export.assemble import Progress
from mmr5_export.finished import FinishedEngine
from mmr5_export.options import ExportOptions
from mmr5_export.plan import Stored, make_plan
from mmr5_export.trtllm.refusals import Limits, resolve_limits
from mmr5_kernels.layout import Format
from mmr5_runtime.manifest import PixelRange
from mmr5_runtime.spec import ModelSpec, decoder_linear_shapes

_IN_DECODER = ("model.layers.", "model.norm.", "lm_head.")
GRAPHS_BYTES = 16 << 20  # of graphs without weights; those of the 7B take about 1 MB


@dataclass(frozen=True)
class Wish:
    """What is asked for, as far as it is known before the export.

    ``formats`` are those of the engine; ``chosen_later`` says that a mixed recipe will still widen
    some. ``original``: the dense checkpoint is at hand. ``ranges``: calibration will see the range
    of the inputs of every decoder linear.
    """

    spec: ModelSpec
    formats: Mapping[str, Format]
    budget: PixelRange
    options: ExportOptions
    original: bool
    ranges: bool
    chosen_later: bool

    @property
    def limits(self) -> Limits:
        """Sizes that TensorRT reserves for; raises :class:`OptionError` for wrong ones."""
        return resolve_limits(self.spec, self.budget, self.options)

    @property
    def input_absmax(self) -> dict[str, float]:
        """A value in place of each range that calibration will see."""
        return dict.fromkeys(decoder_linear_shapes(self.spec), 1.0) if self.ranges else {}

    @property
    def dense_bytes(self) -> int:
        """Bytes of a model with the decoder as it is in the engine and all else in 16 bits."""
        return sum(tensor.num_bytes for tensor in self._stored)

    @property
    def decoder_bytes(self) -> int:
        """Of those, the bytes of what a graph of the decoder with its head holds."""
        return sum(t.num_bytes for t in self._stored if t.name.startswith(_IN_DECODER))

    @property
    def _stored(self) -> tuple[Stored, ...]:
        decoder = {name: kind for name, kind in self.formats.items() if ".layers." in name}
        return make_plan(self.spec, decoder).stored

    @property
    def largest_bytes(self) -> int:
        """Bytes of the largest tensor in 16 bits: the embeddings."""
        return 2 * self.spec.text.vocab_size * self.spec.text.hidden_size


@dataclass(frozen=True)
class Planned:
    """What a part will add: names of files or of folders, bytes on disk, and of memory by stage."""

    files: tuple[str, ...]
    bytes: int
    memory: Mapping[str, int]


@dataclass(frozen=True)
class Part:
    """One row of the table. ``write`` returns facts for the manifest, among them ``verified``."""

    name: str
    check: Callable[[Wish], None]
    plan: Callable[[Wish], Planned]
    write: Callable[[FinishedEngine, ExportOptions, Progress], dict[str, Any]]
