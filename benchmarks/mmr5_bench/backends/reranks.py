"""Whole reranks of mini: every format in both of our engines beside ``transformers``.

What ``mmr5-bench peers`` does with its lists, contenders and checks, for other contenders: from the
bytes of the pages to the order, cold, decoding in full. ``transformers`` reads the unquantized
checkpoint; "same answers" are those of it in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from mmr5_bench.backends.entries import PREFIX, compared
from mmr5_bench.backends.names import RERANK
from mmr5_bench.evidence.document import Entry, new_evidence
from mmr5_bench.peers.base import Peer, Setting
from mmr5_bench.peers.checkpoints import check_engines
from mmr5_bench.peers.huggingface import TransformersPeer, TransformersSession
from mmr5_bench.peers.names import MINI
from mmr5_bench.peers.ours import Backend, OursPeer
from mmr5_bench.peers.prompts import PromptReader
from mmr5_bench.peers.run import Plan, run_peers
from mmr5_bench.peers.workloads import Workload
from mmr5_bench.random_weights.shapes import Quant
from mmr5_export.source import locate

QUANTS: tuple[Quant, ...] = ("int4", "int8", "bf16")
BACKENDS: tuple[Backend, ...] = ("native", "onnxruntime")
_NOTE = "Whole reranks of held-out lists."


@dataclass(frozen=True)
class DensePeer(TransformersPeer):
    """``transformers``, greedy, in a ``dtype`` of its own."""

    dtype: str = "float32"

    @property
    def name(self) -> str:
        return f"{super().name}-{self.dtype}"

    def subject(self, setting: Setting) -> str:
        return f"transformers {self.dtype}"

    def axes(self, setting: Setting) -> dict[str, Any]:
        return {**super().axes(self._own(setting)), "dtype": self.dtype}

    @contextmanager
    def open(self, setting: Setting) -> Iterator[TransformersSession]:
        with super().open(self._own(setting)) as session:
            yield session

    def _own(self, setting: Setting) -> Setting:
        return replace(setting, dtype=self.dtype)


def measure_reranks(
    engines: Mapping[str, Path],
    pages: Sequence[int],
    lists: int,
    seed: int,
    say: Callable[[str], None],
    backends: Sequence[Backend] = BACKENDS,
) -> list[Entry]:
    """Entries of every engine in every backend; ``engines`` are folders made of mini, by quant.

    Raises ValueError when a contender cannot take part, or failed in the course of it.
    """
    checkpoint = locate(MINI).folder
    check_engines(engines, checkpoint)
    setting = Setting(checkpoint=checkpoint, engines=engines, seed=seed)
    peers: list[Peer] = [DensePeer(dtype="bfloat16"), DensePeer(dtype="float32")]
    peers += [OursPeer(quant, backend=backend) for quant in QUANTS for backend in backends]
    for peer in peers:
        if reason := peer.why_not(setting):
            raise ValueError(f"{peer.subject(setting)} cannot take part: {reason}")
    reader = PromptReader.from_checkpoint(checkpoint)
    workloads = [Workload(MINI, count, None, reader, seed) for count in pages]
    evidence = new_evidence("Whole reranks of mini", _NOTE, {})
    plan = Plan(lists, baseline=DensePeer(dtype="float32").name)
    with TemporaryDirectory() as folder:
        run_peers(peers, setting, workloads, plan, evidence, Path(folder, "reranks.json"), say)
    if failed := evidence.get("skipped"):
        raise ValueError(
            f"{failed[0]['subject']} did not take part to the end: {failed[0]['reason']}"
        )
    entries: list[Entry] = [
        {**entry, "name": f"{PREFIX}shape={MINI},case={RERANK},pages={entry['axes']['pages']}]"}
        for entry in evidence["entries"]
    ]
    for entry in entries:
        entry["axes"] = {**entry["axes"], "shape": MINI, "case": RERANK}
    return compared(entries)
