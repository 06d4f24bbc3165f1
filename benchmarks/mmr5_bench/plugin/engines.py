"""Loaded engines of one run, and the orders of the reference on the lists of a cell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from mmr5_bench.plugin.drawing import DrawnList, draw_lists
from mmr5_bench.plugin.recording import Recording
from mmr5_bench.plugin.settings import is_engine, quant_name, source_name
from mmr5_runtime import Reranker

Orders = tuple[tuple[int, ...], ...]
_WARMUP_SEED = 1_000_000
"""Added to the seed: lists that warm up are never measured."""


class Engines:
    """Loads engines by quantization and keeps them until the run ends, or another is alone wanted.

    Also keeps the lists that were drawn and what the reference made of them.
    """

    def __init__(self, recording: Recording) -> None:
        self._recording = recording
        self._settings = recording.settings
        self._loaded: dict[Path, Reranker] = {}
        self._lists: dict[tuple[int, bool], tuple[DrawnList, ...]] = {}
        self._orders: dict[str, Orders] = {}

    def path(self, quant: str) -> Path:
        """ValueError for a name that no engine has."""
        engines = self._settings.engines
        if quant not in engines:
            raise ValueError(f"no engine is called {quant}; there are {', '.join(engines)}")
        return engines[quant]

    def load(self, quant: str) -> Reranker:
        """The engine called ``quant``, loaded on first use; others stay loaded."""
        return self._load(self.path(quant))

    def only(self, quant: str) -> Reranker:
        """The same, and every other engine closed: memory then is that of one engine."""
        return self._only(self.path(quant))

    def lists(self, pages: int) -> tuple[DrawnList, ...]:
        """The measured lists of ``pages`` pages, as many as the options say."""
        return self._drawn(pages, warmup=False)

    def warmup_lists(self, pages: int) -> tuple[DrawnList, ...]:
        """Other lists of the same size."""
        return self._drawn(pages, warmup=True)

    @property
    def reference(self) -> Path | None:
        """The engine that orders are held against; None when none is bf16 and none was named."""
        settings = self._settings
        if settings.reference is not None:
            return settings.reference
        named = (path for path in settings.engines.values() if is_engine(path))
        return next((path for path in named if quant_name(path) == "bf16"), None)

    def reference_orders(
        self,
        quant: str,
        work: str,
        own: Sequence[tuple[int, ...]],
        ask: Callable[[Reranker], Orders],
    ) -> Orders | None:
        """Orders of the reference on the lists of ``work``, asked untimed by ``ask`` and kept.

        ``own`` are those of ``quant``, which count where it is the reference itself. None without
        a reference.
        """
        reference = self.reference
        if reference is None:
            return None
        if work not in self._orders:
            measured = self.path(quant).resolve() == reference.resolve()
            self._orders[work] = tuple(own) if measured else ask(self._only(reference))
        return self._orders[work]

    def close(self) -> None:
        while self._loaded:
            self._loaded.popitem()[1].close()

    def _drawn(self, pages: int, *, warmup: bool) -> tuple[DrawnList, ...]:
        if (pages, warmup) not in self._lists:
            settings = self._settings
            count = settings.warmup if warmup else settings.lists
            seed = settings.seed + (_WARMUP_SEED if warmup else 0)
            self._lists[pages, warmup] = draw_lists(count, pages, seed)
        return self._lists[pages, warmup]

    def _only(self, path: Path) -> Reranker:
        for other in [other for other in self._loaded if other != path]:
            self._loaded.pop(other).close()
        return self._load(path)

    def _load(self, path: Path) -> Reranker:
        if path not in self._loaded:
            self._recording.sources.add(source_name(path))
            device, dtype = self._recording.device, self._settings.dtype
            self._loaded[path] = Reranker.load(path, device, dtype=dtype, backend="native")
        return self._loaded[path]
