"""A run: every question of the benchmark reranked once, kept as it is answered.

Questions go by document in the order of their rows, so that the pages file is read once from its
beginning to its end, and only the candidates of one document are in memory. The order does not
change a record; records are put back into file order at the end.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from mmr5_bench.evidence.observe import Observation, observe
from mmr5_bench.mmdocir.annotations import AnnotatedDocument, Question
from mmr5_bench.mmdocir.pages import PageTable
from mmr5_bench.mmdocir.records import Journal, Record
from mmr5_bench.mmdocir.work import Work
from mmr5_runtime import Reranker
from mmr5_runtime.pages import Page
from mmr5_runtime.types import PageError, RequestError

Progress = Callable[[int, int, Record | None], None]
WARM_UP_TOKENS = 8


def run(
    work: Work,
    journal: Path,
    *,
    keep_text: bool = True,
    progress: Progress = lambda done, total, record: None,
) -> list[Record]:
    """Asks what ``journal`` lacks; returns the records of all questions of ``work`` in file order.

    What a question itself causes (a page that cannot be read, a list that does not fit the
    context) is recorded as its error and counted. What the machine causes (no memory, no disk)
    raises, and so does Ctrl-C: finished questions stay in the journal, and the next run goes on.
    ``keep_text=False`` keeps only the hash of every reply. ``progress`` is called with finished
    and wanted questions, and the record that was just made.
    """
    store = Journal(journal, work.key)
    found = store.read()
    wanted = {question.id for question in work.questions}
    missing = [question for question in work.questions if question.id not in found]
    progress(len(wanted & set(found)), len(wanted), None)
    if missing:
        journal.parent.mkdir(parents=True, exist_ok=True)
        with PageTable(work.shards) as table, work.load() as reranker:
            for record in _records(work, reranker, table, missing, keep_text):
                store.add(record)
                found[record["question"]] = record
                progress(len(wanted & set(found)), len(wanted), record)
    return [found[question.id] for question in work.questions]


def _records(
    work: Work,
    reranker: Reranker,
    table: PageTable,
    questions: Iterable[Question],
    keep_text: bool,
) -> Iterator[Record]:
    def row(question: Question) -> tuple[int, int]:
        return work.annotations.document(question).first, question.document

    warm = False
    for _, group in groupby(sorted(questions, key=row), key=row):
        asked = list(group)
        document = work.annotations.document(asked[0])
        lists = {one.id: work.candidates.cut(one.id, work.options.k) for one in asked}
        images = table.read({document.first + page for pages in lists.values() for page in pages})
        for question in asked:
            if not warm:
                pages = _pages(document, lists[question.id], images)
                warm = _warm_up(work, reranker, question, pages)
            record = _record(work, reranker, question, lists[question.id], images, keep_text)
            yield {**record, "warm": warm}


def _pages(
    document: AnnotatedDocument, pages: Sequence[int], images: Mapping[int, bytes | None]
) -> list[Page]:
    """Image files; empty bytes, which the runtime refuses as it does any other bad page."""
    return [images[document.first + page] or b"" for page in pages]


def _warm_up(work: Work, reranker: Reranker, question: Question, pages: list[Page]) -> bool:
    """What happens once in a process, such as choosing kernels, is no part of a question.

    Whether the model ran: it does not for a list that is refused, nor for one of a single page.
    """
    try:
        result = reranker.rerank(
            question.text, pages, plan=work.options.plan, max_new_tokens=WARM_UP_TOKENS
        )
    except RequestError:
        return False  # it is recorded when the question is asked
    finally:
        reranker.cache.clear()
    return result.usage.completion_tokens > 0


def _record(
    work: Work,
    reranker: Reranker,
    question: Question,
    candidates: tuple[int, ...],
    images: Mapping[int, bytes | None],
    keep_text: bool,
) -> Record:
    document = work.annotations.document(question)
    record: Record = {
        "question": question.id,
        "document": question.document,
        "domain": document.domain,
        "gold": list(question.gold),
        "candidates": list(candidates),
        "order": list(candidates),
        "status": "error",
        "stop_reason": None,
        "error": None,
        "interventions": 0,
        "exactness": None,
        "warm": False,
        "tokens": None,
        "ms": None,
        "first_token_ms": None,
        "stages_ms": {},
        "text_sha256": None,
    }
    pages = _pages(document, candidates, images)
    options = work.options
    try:
        empty = [page for page, image in zip(candidates, pages, strict=True) if not image]
        if empty:
            raise PageError(f"page {empty[0]} of {document.name} has no image in the pages file")
        observed = observe(
            lambda: reranker.rerank(question.text, pages, options.top_k, **options.keywords()),
            work.machine["device"],
        )
    except RequestError as error:
        record["error"] = {"type": type(error).__name__, "message": str(error)}
        return record
    return {**record, **_measured(observed, candidates, keep_text)}  # type: ignore[typeddict-item]


def _measured(observed: Observation, candidates: Sequence[int], keep_text: bool) -> dict[str, Any]:
    result, first = observed.result, observed.ttft_ms
    usage = result.usage
    tokens = {
        "prompt": usage.prompt_tokens,
        "image": usage.image_tokens,
        "completion": usage.completion_tokens,
        "decode_steps": usage.decode_steps,
    }
    return {
        "order": [candidates[index] for index in result.order],
        "status": result.status,
        "stop_reason": result.stop_reason,
        "interventions": result.interventions,
        "exactness": result.exactness,
        "tokens": tokens,
        "ms": round(observed.ms, 3),
        "first_token_ms": None if first is None else round(first, 3),
        "stages_ms": {stage: round(value, 3) for stage, value in observed.stages_ms.items()},
        "text_sha256": hashlib.sha256(result.text.encode("utf-8", "replace")).hexdigest(),
        **({"text": result.text} if keep_text else {}),
    }
