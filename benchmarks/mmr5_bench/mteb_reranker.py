"""An engine as an mteb cross-encoder, so that mteb's reranking tasks run on it.

mteb (2.26, ``SearchCrossEncoderWrapper`` in ``mteb/models/search_wrappers.py``) makes one pair per
question and candidate, question by question, cuts the pairs into batches and asks ``predict`` for
one number per pair (``CrossEncoderProtocol`` in ``mteb/models/models_protocols.py``). Here the
pairs of a question become one list again (:mod:`mmr5_bench.mteb_grouping`), the engine orders it,
in windows where it is long, and every pair gets the score of its place.

Scores are ranks, not similarities: strictly decreasing inside a list, so no metric depends on how
ties are broken, and without meaning between lists. mteb's abstention metrics (``nauc``) read scores
as confidence and say nothing here. When an answer cannot be read the order is the one mteb gave; a
task that lists the relevant pages first then flatters, which ``shuffle_seed`` prevents.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Unpack

import numpy as np
import numpy.typing as npt

from mmr5_bench.evidence.observe import work_id
from mmr5_bench.mteb_grouping import KeptLists, RankedList, score_pairs, shuffled
from mmr5_runtime import Reranker
from mmr5_runtime.artifact import read_manifest
from mmr5_runtime.options import RerankKeywords
from mmr5_runtime.types import Mmr5Error

Batches = Iterable[Mapping[str, Any]]


@dataclass(frozen=True)
class _Question:
    """What makes pairs one list: mteb's id of the question (None without one) and its text."""

    id: str | None
    text: str


@dataclass(frozen=True)
class _Candidate:
    id: str | None
    image: Any


class EngineCrossEncoder:
    """Implements mteb's ``CrossEncoderProtocol`` with a :class:`Reranker`.

    ``lists`` has every list of all ``predict`` calls in turn, by the key under which ``keep_in``
    keeps it. Pages are images only: text that a task gives beside them is not read.
    """

    def __init__(
        self,
        model_name: str,
        revision: str | None = None,
        device: str | None = None,
        *,
        dtype: str = "auto",
        shuffle_seed: int | None = None,
        keep_in: Path | None = None,
        **options: Unpack[RerankKeywords],
    ) -> None:
        """Loads the engine folder ``model_name``; ``options`` are those of ``rerank``.

        ``revision`` is mteb's and has to be None or what :attr:`mteb_model_meta` says.
        ``shuffle_seed`` puts candidates in a random order, the same in every run, before the model
        sees them. ``keep_in`` is the file of finished lists. Raises what :meth:`Reranker.load`
        raises, and ValueError for a revision the engine has not.
        """
        folder = Path(model_name)
        self._manifest = read_manifest(folder)
        self._reranker = Reranker.load(folder, device or "auto", dtype=dtype, backend="native")
        self.options: RerankKeywords = options
        self.shuffle_seed = shuffle_seed
        self.info = self._reranker.info
        settings = work_id(asdict(self.info), dict(options), shuffle_seed)
        self.revision = f"{self.info.identity[:12]}-{settings[:8]}"
        if revision not in (None, self.revision):
            self._reranker.close()
            raise ValueError(
                f"{folder} with these options is revision {self.revision}, not {revision}; leave "
                "the revision out"
            )
        self._kept = None if keep_in is None else KeptLists(keep_in, settings)
        self.lists: dict[str, RankedList] = {}

    @property
    def mteb_model_meta(self) -> Any:
        """mteb's ``ModelMeta``: which engine, how quantized, and that scores are ranks.

        The revision changes with everything that may change a score, since mteb caches by it.
        """
        from mteb.models import ModelMeta

        source, quant = self._manifest.source, self._manifest.quant
        stem = source.name.rstrip("/").rsplit("/", 1)[-1]
        return ModelMeta.create_empty(
            {
                "name": f"mmr5-runtime/{stem}-{quant.name}",
                "revision": self.revision,
                "languages": ["eng-Latn"],
                "framework": ["PyTorch", "safetensors"],
                "modalities": ["text", "image"],
                "model_type": ["cross-encoder"],
                "max_tokens": float(self.info.context),
                "use_instructions": False,
                "training_datasets": None,
                "adapted_from": source.name,
                "experiment_kwargs": {
                    "quant": quant.name,
                    "quant_method": quant.method,
                    "dtype": self.info.dtype,
                    "max_pixels": self.info.max_pixels,
                    "profile": self.info.profile,
                    "shuffle_seed": self.shuffle_seed,
                    "scores": "rank within the list, no similarity",
                    **self.options,
                },
            }
        )

    def predict(
        self,
        inputs1: Batches,
        inputs2: Batches,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **kwargs: Any,
    ) -> npt.NDArray[np.float64]:
        """Scores of the pairs in ``inputs1`` (questions) and ``inputs2`` (page images), [pairs].

        ``kwargs`` (batch size, progress bar) do not change a score and are not used. ValueError for
        a question without text, a candidate without an image, and a list the engine refuses.
        """
        task = str(task_metadata.name)
        kept = {} if self._kept is None else self._kept.read()

        def rank(question: _Question, candidates: list[_Candidate]) -> tuple[int, ...]:
            ids = [candidate.id for candidate in candidates]
            key = work_id(task, hf_split, hf_subset, question.id, question.text, ids)
            # Without ids two lists could differ in their images alone.
            named = question.id is not None and None not in ids
            found = kept.get(key) if named else None
            if found is None or len(found.order) != len(candidates):
                found = self._rank(question, candidates, task)
                if self._kept is not None and named:
                    self._kept.add(key, found)
            self.lists[key if named else f"{key}-{len(self.lists)}"] = found
            return found.order

        questions = list(_questions(inputs1, task))
        return np.array(score_pairs(questions, _candidates(inputs2, task), rank), np.float64)

    def close(self) -> None:
        """Frees the model."""
        self._reranker.close()

    def _rank(self, question: _Question, candidates: list[_Candidate], task: str) -> RankedList:
        shown = list(range(len(candidates)))
        if self.shuffle_seed is not None:
            shown = shuffled(len(candidates), self.shuffle_seed, f"{question.id}:{question.text}")
        start = time.perf_counter()
        try:
            result = self._reranker.rerank(
                question.text, [candidates[i].image for i in shown], **self.options
            )
        except Mmr5Error as error:
            raise ValueError(
                f"{task}, question {question.id or question.text!r}: {error}"
            ) from error
        return RankedList(
            tuple(shown[index] for index in result.order),
            result.status,
            result.stop_reason,
            1e3 * (time.perf_counter() - start),
        )


def _questions(batches: Batches, task: str) -> Iterator[_Question]:
    for batch in batches:
        texts = batch.get("text")
        if texts is None:
            raise ValueError(f"{task} asks without text; choose a task whose questions are text")
        yield from (_Question(id, text) for id, text in zip(_ids(batch, texts), texts, strict=True))


def _candidates(batches: Batches, task: str) -> Iterator[_Candidate]:
    for batch in batches:
        images = batch.get("image")
        if images is None:
            raise ValueError(f"{task} has no page images; choose a task whose documents are images")
        for id, image in zip(_ids(batch, images), images, strict=True):
            if image is None:
                raise ValueError(f"{task}: document {id} has no image; choose another task")
            yield _Candidate(id, image)


def _ids(batch: Mapping[str, Any], values: Any) -> list[str | None]:
    ids = batch.get("id")
    return [None] * len(values) if ids is None else [str(id) for id in ids]
