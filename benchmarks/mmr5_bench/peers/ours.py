"""Engines of this project as contenders: decoding in full, and the way a user gets it.

``plain`` writes what ``generate`` writes: no early stop, no mask, nothing kept between lists.
``default`` is an engine as it is loaded without options; what it kept is dropped before every
list, but keeping it is part of its time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmr5_bench.peers.base import Answer, ListWork, Peer, Reading, Session, Setting
from mmr5_bench.peers.checkpoints import check_name, rounding_of
from mmr5_bench.peers.prompts import PromptReader
from mmr5_bench.random_engine import random_engine, reranker_of
from mmr5_bench.random_weights.shapes import QUANTS, Quant
from mmr5_runtime import Reranker
from mmr5_runtime.loading import LoadedEngine, load_engine
from mmr5_runtime.options import RerankKeywords
from mmr5_runtime.reuse.config import CacheConfig
from mmr5_runtime.types import EngineError

Way = Literal["plain", "default"]
Backend = Literal["native", "onnxruntime"]


@dataclass(frozen=True)
class OursPeer(Peer):
    """An engine of ``quant``, asked in one ``way``, run by ``backend``."""

    quant: Quant
    way: Way = "plain"
    backend: Backend = "native"

    @property
    def name(self) -> str:
        backend = "" if self.backend == "native" else f"-{self.backend}"
        return f"ours-{self.quant}" + ("" if self.way == "plain" else "-default") + backend

    def subject(self, setting: Setting) -> str:
        rounding = self._rounding(setting)
        parts = [] if rounding.get("method", "none") == "none" else [rounding["method"]]
        parts += [f"g{rounding['group']}"] if "group" in rounding else []
        parts += [self.way] if self.backend == "native" else [self.way, "ONNX Runtime"]
        return " ".join(["ours", self.quant, *parts])

    def axes(self, setting: Setting) -> dict[str, Any]:
        stop = "eos" if self.way == "plain" else "determined"
        backend = {} if self.backend == "native" else {"backend": self.backend}
        return {"quant": self.quant, "stop": stop, **self._rounding(setting), **backend}

    def _rounding(self, setting: Setting) -> dict[str, Any]:
        """Nothing where there is no engine, which :meth:`why_not` says."""
        folder = setting.engines.get(self.quant)
        try:
            return {} if folder is None else rounding_of(folder)
        except EngineError:
            return {}

    def why_not(self, setting: Setting) -> str | None:
        if setting.random is None:
            if self.quant not in setting.engines:
                return f"no {self.quant} engine was given; pass --engine {self.quant}=FOLDER"
            try:
                check_name(self.quant, setting.engines[self.quant])
            except (EngineError, ValueError) as error:
                return str(error)
            return None
        if self.backend != "native":
            return "random engines are made in memory and have no graphs; pass --engine instead"
        if self.quant not in QUANTS:
            return f"no random engine can be made in {self.quant}"
        if self.way == "default":
            return "random weights never write a list that could end early; plain is the same work"
        return None

    @contextmanager
    def open(self, setting: Setting) -> Iterator[Session]:
        """Loads the folder, or draws the random engine; raises as ``Reranker.load`` does."""
        if setting.random is None:
            loaded = _load(setting.engines[self.quant], setting, self.backend)
        else:
            loaded = random_engine(setting.random, self.quant, setting.device, setting.dtype)
        cache = CacheConfig.off() if self.way == "plain" else CacheConfig()
        with reranker_of(loaded, cache) as reranker:
            yield OursSession(reranker, PromptReader.from_loaded(loaded), self.way)


class OursSession:
    """An opened engine."""

    def __init__(self, reranker: Reranker, reader: PromptReader, way: Way) -> None:
        self._reranker, self._reader = reranker, reader
        self._options = RerankKeywords(plan="single")
        if way == "plain":
            self._options |= {"stop": "eos", "constrain": False}
        self._prompt_tokens = 0

    def forget(self) -> None:
        """Drop pages, keys and values, and answers."""
        self._reranker.cache.clear()

    def answer(self, work: ListWork) -> Answer:
        """Reranks the pages from their bytes; raises as ``Reranker.rerank`` does."""
        options: RerankKeywords = {**self._options, "max_new_tokens": work.max_new_tokens}
        result = self._reranker.rerank(work.question, work.pages, **options)
        self._prompt_tokens = result.usage.prompt_tokens
        return Answer(
            text=result.text,
            order=result.order,
            status=result.status,
            tokens=result.usage.completion_tokens,
            ttft_ms=result.first_token_ms,
            stages_ms={name: ms for name, ms in result.timings_ms.items() if name != "total"},
        )

    def reading(self, work: ListWork, *, pixels: bool) -> Reading:
        """Ids, grids and pixels by the engine's own tokenizer and settings."""
        found = self._reader.reading(work, pixels=pixels)
        return Reading(self._prompt_tokens, found.prompt_ids, found.grids, found.pixels)


def _load(folder: Path, setting: Setting, backend: Backend) -> LoadedEngine:
    return load_engine(
        folder,
        device=setting.device,
        dtype=setting.dtype if backend == "native" else "auto",  # its graphs say
        min_pixels=None,
        max_pixels=None,
        check_hashes=False,
        backend=backend,
    )
