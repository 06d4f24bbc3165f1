"""One cell: an engine, lists, a state of memory, and a way of asking."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mmr5_bench.evidence.observe import work_id
from mmr5_bench.evidence.quality import Judged
from mmr5_bench.plugin.axes import Cell, cell_name
from mmr5_bench.plugin.drawing import DrawnList
from mmr5_bench.plugin.engines import Engines, Orders
from mmr5_bench.plugin.settings import Settings, source_name
from mmr5_runtime import Reranker, RerankResult
from mmr5_runtime.loading import EngineInfo
from mmr5_runtime.options import RerankKeywords

Asked = tuple[str, tuple[bytes, ...]]
"""A question and its pages."""


@dataclass(frozen=True)
class BenchCase:
    """What ``rerank_case`` gives: everything a test needs to measure one cell, or to assert on it.

    ``axes`` has ``pages``, ``quant``, ``cache``, ``stop`` and ``think``.
    """

    axes: Cell
    settings: Settings
    engines: Engines

    @property
    def name(self) -> str:
        return cell_name("rerank", self.axes)

    @property
    def quant(self) -> str:
        return str(self.axes["quant"])

    @property
    def reranker(self) -> Reranker:
        """The engine of this cell, the only one loaded."""
        return self.engines.only(self.quant)

    @property
    def lists(self) -> tuple[DrawnList, ...]:
        """One per round, in order."""
        return self.engines.lists(int(self.axes["pages"]))

    @property
    def warmup_lists(self) -> tuple[DrawnList, ...]:
        return self.engines.warmup_lists(int(self.axes["pages"]))

    @property
    def options(self) -> RerankKeywords:
        """Options of the measured request. ``eos`` is plain decoding: to the end, without mask."""
        stop, think = self.axes["stop"], self.axes["think"]
        options: RerankKeywords = {
            "stop": stop,  # type: ignore[typeddict-item]
            "think": think,  # type: ignore[typeddict-item]
            "constrain": stop != "eos",
            "max_new_tokens": self.settings.max_new_tokens,
        }
        return options

    @property
    def work(self) -> str:
        """Over everything that decides what is asked; engine and state of memory do not."""
        info = self.reranker.info
        asked = [[one.question, one.pixels] for one in self.lists]
        pixels = [info.min_pixels, info.max_pixels]
        return work_id(asked, pixels, info.profile, dict(self.options))

    @property
    def note(self) -> str:
        """What a reader of this entry has to know beside its axes."""
        mini = source_name(self.engines.path(self.quant)) == "mini"
        if mini and self.axes["think"] != "full":
            return "mini was not trained to answer so; its quality here is no guide"
        return ""

    def prepare(self, number: int) -> Asked:
        """Brings memory into the state of the cell; question and pages of list ``number``.

        Below zero are the lists that warm up.
        """
        drawn = self.warmup_lists[number] if number < 0 else self.lists[number]
        cache, reranker = self.axes["cache"], self.reranker
        reranker.cache.clear()
        read_only: RerankKeywords = {**self.options, "max_new_tokens": 1}
        if cache == "warm":
            reranker.rerank(drawn.other, drawn.pages, **read_only)
        elif cache == "seen":
            # Under another way of decoding, so that its token is not remembered as the answer's.
            read_only["constrain"] = not self.options["constrain"]
            reranker.rerank(drawn.question, drawn.pages, **read_only)
        return drawn.question, drawn.pages

    def rerank(self, question: str, pages: Sequence[bytes]) -> RerankResult:
        """What is measured."""
        return self.reranker.rerank(question, pages, **self.options)

    async def arerank(self, question: str, pages: Sequence[bytes]) -> RerankResult:
        """The same through the asynchronous interface."""
        return await self.reranker.arerank(question, pages, **self.options)

    def judge(self, results: Sequence[RerankResult]) -> list[Judged]:
        """Results of all lists, in order, beside what is right and what the reference ranked."""
        own, info = [result.order for result in results], self.reranker.info

        def ask_all(reference: Reranker) -> Orders:
            _check_same_prompts(info, reference.info)
            return self._ask_all(reference)

        orders = self.engines.reference_orders(self.quant, self.work, own, ask_all)
        references: Sequence[tuple[int, ...] | None] = orders or [None] * len(self.lists)
        return [
            Judged(result.order, one.gold, result.status, one.domain, reference)
            for one, result, reference in zip(self.lists, results, references, strict=True)
        ]

    def _ask_all(self, reranker: Reranker) -> Orders:
        orders = []
        for one in self.lists:
            reranker.cache.clear()
            orders.append(reranker.rerank(one.question, one.pages, **self.options).order)
        return tuple(orders)


def _check_same_prompts(engine: EngineInfo, reference: EngineInfo) -> None:
    """ValueError for a reference that is asked something else by the same question."""
    for name in ("profile", "min_pixels", "max_pixels"):
        ours, theirs = getattr(engine, name), getattr(reference, name)
        if ours != theirs:
            raise ValueError(
                f"the reference engine has {name} {theirs} and the measured one {ours}; export "
                "both with the same options, or name another --mmr5-reference"
            )
