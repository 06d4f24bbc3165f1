"""Who is timed on a shape: ``transformers`` and our engines on the weights of one engine folder.

engine folder -> ``Contender.open`` -> ``Session``: read a prefix, rewind, prefill, step

All have the same weights, those that the engine stores: ``transformers`` gets them expanded, so
that logits can be held against each other and what differs is how they are computed. Its time does
not depend on the values. Token ids go in, logits come out, and keys and values are kept in between
as each does by default.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from mmr5_bench.backends.names import BASELINE, MEASURED, REFERENCE, TORCH
from mmr5_kernels.reference import dequantize
from mmr5_runtime.artifact import TensorReader, read_manifest
from mmr5_runtime.compute import DTYPES
from mmr5_runtime.kvcache import KVArena
from mmr5_runtime.loading import LoadedEngine, load_engine
from mmr5_runtime.manifest import Manifest
from mmr5_runtime.model import embed_prompt, prefill
from mmr5_runtime.spec import canonical_name

_STORED = ("weight", "weight_packed", "weight_scale", "weight_zero_point")


class Session(Protocol):
    """An opened contender. ``prefill`` and ``step`` are what is timed."""

    def read(self, ids: Tensor) -> None:
        """Reads a prefix, ids [S] int64; what follows may then be read behind none or S tokens."""

    def rewind(self, behind: int) -> None:
        """Back to ``behind`` tokens: none, or the whole prefix."""

    def prefill(self, ids: Tensor) -> Tensor:
        """Reads ids [T] int64 behind what there is; fp32 logits [1, V] of the last."""

    def step(self, ids: Tensor) -> Tensor:
        """The same of at most 8 tokens; fp32 logits [T, V] of all."""


@dataclass(frozen=True)
class Contender:
    """``subject`` as it stands in results; ``open`` loads an engine folder and frees it again."""

    subject: str
    backend: str
    dtype: str
    open: Callable[[Path], AbstractContextManager[Session]]


class EngineSession:
    """A loaded engine of ours; ``lengths`` are prefixes, ``room`` tokens fit behind each."""

    def __init__(self, loaded: LoadedEngine, lengths: Iterable[int], room: int) -> None:
        self._engine = loaded.engine
        new = self._engine.model.new_arena
        self._arenas: dict[int, KVArena] = {length: new(length + room) for length in lengths}
        self._arena = self._arenas[0]

    def read(self, ids: Tensor) -> None:
        self._arena = self._arenas[len(ids)]
        self._arena.reset()
        self.prefill(ids)

    def rewind(self, behind: int) -> None:
        self._arena = self._arenas[behind]
        self._arena.truncate(behind)

    @torch.inference_mode()
    def prefill(self, ids: Tensor) -> Tensor:
        positions = self._positions(ids).expand(3, -1)
        model = self._engine.model
        return prefill(model, embed_prompt(model, ids, []), positions, self._arena)[None]

    def step(self, ids: Tensor) -> Tensor:
        return self._engine.step(ids[None], self._positions(ids)[None], [self._arena])[0]

    def _positions(self, ids: Tensor) -> Tensor:
        return torch.arange(self._arena.length, self._arena.length + len(ids))


class TransformersSession:
    """``Qwen2_5_VLForConditionalGeneration`` with the growing cache of its ``generate``."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._prefix: Any = None
        self._cache: Any = None

    def read(self, ids: Tensor) -> None:
        self.rewind(0)
        self.prefill(ids)
        self._prefix = self._cache

    def rewind(self, behind: int) -> None:
        from transformers import DynamicCache

        if not behind:
            self._cache = DynamicCache(config=self._model.config)
            return
        self._cache = self._prefix
        if added := self._cache.get_seq_length() - behind:
            self._cache.crop(-added)

    def prefill(self, ids: Tensor) -> Tensor:
        return self._forward(ids, 1)

    def step(self, ids: Tensor) -> Tensor:
        return self._forward(ids, len(ids))

    @torch.inference_mode()
    def _forward(self, ids: Tensor, kept: int) -> Tensor:
        start = self._cache.get_seq_length()
        out = self._model(
            input_ids=ids[None],
            position_ids=torch.arange(start, start + len(ids)).expand(3, 1, -1),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=kept,
        )
        logits: Tensor = out.logits[0].float()
        return logits


@contextmanager
def _transformers(dtype: str, folder: Path) -> Iterator[Session]:
    """Raises EngineError for a folder that holds no whole engine."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
    from transformers.initialization import no_init_weights

    manifest = read_manifest(folder)
    document = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config = Qwen2_5_VLConfig.from_dict(document)
    # The engine keeps a head of its own where that is quantized, whatever the checkpoint did.
    tied = manifest.spec.text.tie_word_embeddings and "lm_head" not in manifest.formats
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    with no_init_weights():
        model: Any = Qwen2_5_VLForConditionalGeneration._from_config(
            config, dtype=DTYPES[dtype], attn_implementation="sdpa"
        )
    model.eval()
    with TensorReader(folder, manifest) as reader, torch.no_grad():
        for name, parameter in model.named_parameters():
            linear, _, suffix = canonical_name(name).rpartition(".")
            parameter.copy_(stored_weight(reader, manifest, linear, suffix, parameter.dtype))
    yield TransformersSession(model)
    del model
    gc.collect()


def stored_weight(
    reader: TensorReader, manifest: Manifest, module: str, suffix: str, dtype: torch.dtype
) -> Tensor:
    """What an engine stores for ``module.suffix``, expanded to ``dtype`` if it is a linear's."""
    format = manifest.formats.get(module)
    if format is None or suffix != "weight":
        return reader.get(f"{module}.{suffix}")
    names = {part: f"{module}.{part}" for part in _STORED}
    parts = {part: reader.get(name) for part, name in names.items() if name in manifest.tensors}
    return dequantize(format, parts, dtype)


@contextmanager
def _ours(backend: str, lengths: tuple[int, ...], room: int, folder: Path) -> Iterator[Session]:
    """Raises EngineError when the folder has no such backend or the machine cannot run it."""
    loaded = load_engine(
        folder,
        device="cpu",
        dtype="auto",
        min_pixels=None,
        max_pixels=None,
        check_hashes=False,
        backend=backend,
    )
    yield EngineSession(loaded, lengths, room)
    del loaded
    gc.collect()


def contenders(lengths: tuple[int, ...], room: int) -> tuple[Contender, ...]:
    """All of them, :data:`BASELINE` first; ``lengths`` and ``room`` as in ``EngineSession``."""
    return (
        Contender(BASELINE, "transformers", "bfloat16", partial(_transformers, "bfloat16")),
        Contender(REFERENCE, "transformers", "float32", partial(_transformers, "float32")),
        Contender(TORCH, "native", "float32", partial(_ours, "native", lengths, room)),
        Contender(MEASURED, "onnxruntime", "float32", partial(_ours, "onnxruntime", lengths, room)),
    )
