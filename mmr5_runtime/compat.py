"""Drop-in replacement for the class of MM-R5's public ``examples/reranker.py``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mmr5_runtime.pages import Page
from mmr5_runtime.reranker import Reranker


class QueryReranker:
    """Same constructor and method as the reference; ``model_path`` is an exported engine folder.

    Two differences are deliberate: decoding is greedy unless ``temperature`` says otherwise (the
    reference samples at 0.3), and a page id the model repeats appears once in the result.
    """

    def __init__(
        self,
        model_path: str | Path,
        *,
        device: str = "auto",
        temperature: float = 0.0,
        seed: int | None = None,
    ) -> None:
        self._reranker = Reranker.load(model_path, device)
        self._temperature = temperature
        self._seed = seed

    def rerank(self, query: str, image_list: Sequence[Page]) -> list[int]:
        """0-based indices of ``image_list``, most relevant first; a permutation."""
        result = self._reranker.rerank(
            query,
            image_list,
            max_new_tokens=8192,
            temperature=self._temperature,
            seed=self._seed,
        )
        return list(result.order)
