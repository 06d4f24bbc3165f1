"""Runs of ``mmr5-bench reuse``: what stopping early and reusing saves, and what it costs.

Four parts, each of which can be run by itself: ``latency`` asks lists in every way, timed one by
one; ``document`` asks a long document many questions; ``exact`` holds the exact options against
full decoding on many lists, ``approximate`` the others. The last two are not about time and share
the lists among processes.

Every finished list is kept in a journal beside the output, under a hash of all that decides its
result (engine, code and parameters), so that an interrupted run goes on where it was.
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Literal, get_args

import torch
from PIL import Image

import mmr5_kernels
import mmr5_runtime
from mmr5_bench.files import append_lines, read_lines
from mmr5_bench.minidocs.lists import PageKey, RerankCase, held_out_cases
from mmr5_bench.minidocs.pages import render_page
from mmr5_bench.quantization import draw_case, open_contender
from mmr5_bench.reuse_cases import (
    APPROXIMATE,
    BASELINE,
    DOCUMENT,
    DRAFTED,
    EXACT,
    LATENCY,
    UNMASKED,
    Memory,
    PaperCase,
    Record,
    Session,
    Trial,
    ask,
    make_document,
)
from mmr5_runtime import Reranker
from mmr5_runtime.reuse.config import CacheConfig

Part = Literal["latency", "document", "exact", "approximate"]
PARTS: tuple[Part, ...] = get_args(Part)
Answers = dict[str, Record]
"""What was made of one list, by trial, or of one question over a document, by memory."""

DTYPE = "float32"
CASES_PER_TASK = 20  # loading the engine for a task then takes a few percent of its time
LONG = "long list"
# Enough for the lists of one task; the default is a quarter of the machine, for every process.
SMALL = CacheConfig(embeddings_gib=0.25, kv_gib=0.5)


@dataclass(frozen=True)
class Scale:
    """How much is measured; the same for everybody but for a quick look."""

    sizes: tuple[int, ...] = (5, 10, 20)
    lists: int = 8
    pages: int = 50
    questions: int = 10
    long_pages: int = 100
    exact: int = 1000
    drafted: int = 500
    approximate: int = 200
    seed: int = 5

    @classmethod
    def quick(cls) -> Scale:
        """About a minute: shows that everything runs, and measures nothing."""
        return cls((3,), 1, pages=24, questions=1, long_pages=24, exact=3, drafted=2, approximate=2)


@dataclass(frozen=True)
class Journal:
    """Lines of finished ``work`` under ``run``; lines of other runs are passed over."""

    path: Path
    run: str

    def add(self, work: str, answers: Sequence[Answers]) -> None:
        """Adds a line in one write, so that processes may share the file."""
        kept = [{name: asdict(record) for name, record in one.items()} for one in answers]
        append_lines(self.path, [{"run": self.run, "work": work, "answers": kept}])

    def read(self) -> dict[str, list[Answers]]:
        """Answers of every finished work."""
        found: dict[str, list[Answers]] = {}
        for _, data in read_lines(self.path):
            if data.get("run") == self.run:
                found[data["work"]] = [
                    {name: Record.from_json(record) for name, record in one.items()}
                    for one in data["answers"]
                ]
        return found


@dataclass(frozen=True)
class Bench:
    """An engine, how much is measured of it, and where results are kept."""

    engine: Path
    scale: Scale
    journal: Journal

    @classmethod
    def open(cls, engine: Path, scale: Scale, journal: Path) -> Bench:
        """EngineError when ``engine`` is no engine folder."""
        deciding = [open_contender(engine).key, code_sha256(), DTYPE, scale.seed]
        run = hashlib.sha256(json.dumps(deciding).encode()).hexdigest()[:16]
        return cls(engine, scale, Journal(journal, run))

    def load(self, cache: CacheConfig) -> Reranker:
        return Reranker.load(self.engine, "cpu", dtype=DTYPE, cache=cache, backend="native")


def code_sha256() -> str:
    """Of every source file that answers a request or asks for it."""
    digest = hashlib.sha256()
    folders = [Path(module.__path__[0]) for module in (mmr5_runtime, mmr5_kernels)]
    files = [file for folder in folders for file in sorted(folder.rglob("*.py"))]
    for file in [*files, Path(__file__), Path(__file__).with_name("reuse_cases.py")]:
        digest.update(f"{file.name} {file.stat().st_size}\n".encode() + file.read_bytes())
    return digest.hexdigest()


def draw(keys: Iterable[PageKey]) -> list[Image.Image]:
    return [render_page(page.topic, page.kind, page.seed) for page in keys]


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def latency(bench: Bench) -> dict[int, list[Answers]]:
    """Every list in every session, by list size; sessions begin one later with every list.

    A list that a session leaves out has no record of its trials.
    """
    scale, known = bench.scale, bench.journal.read()
    works = {size: [f"latency {size} {n}" for n in range(scale.lists)] for size in scale.sizes}
    if any(work not in known for listed in works.values() for work in listed):
        with (
            bench.load(CacheConfig.off()) as none,
            bench.load(CacheConfig.off()) as drafts,
            bench.load(CacheConfig()) as kept,
        ):
            rerankers: dict[Memory, Reranker] = {"none": none, "drafts": drafts, "kept": kept}
            for size, listed in works.items():
                missing = [n for n, work in enumerate(listed) if work not in known]
                known |= _lists_of(bench, rerankers, size, missing)
    return {
        size: [answers for work in listed for answers in known[work]]
        for size, listed in works.items()
    }


def _lists_of(
    bench: Bench, rerankers: Mapping[Memory, Reranker], size: int, missing: Sequence[int]
) -> dict[str, list[Answers]]:
    """Asks lists ``missing`` of ``size`` pages, by their work."""
    cases = held_out_cases(bench.scale.lists + 1, size, bench.scale.seed)
    warm = held_out_cases(1, size, bench.scale.seed + 1)[0]
    for reranker in rerankers.values() if missing else ():
        reranker.rerank(warm.question, draw(warm.pages), max_new_tokens=16)
    found = {}
    for number in missing:
        work = f"latency {size} {number}"
        found[work] = [_list_in_every_way(rerankers, cases, number)]
        bench.journal.add(work, found[work])
        say(f"latency: {size} pages, list {number + 1} of {bench.scale.lists}")
    return found


def _list_in_every_way(
    rerankers: Mapping[Memory, Reranker], cases: Sequence[RerankCase], number: int
) -> Answers:
    case, pages = cases[number], draw(cases[number].pages)
    other = next(c.question for c in (*cases[number + 1 :], *cases) if c.question != case.question)
    answers: Answers = {}
    turn = number % len(LATENCY)
    for session in (*LATENCY[turn:], *LATENCY[:turn]):
        if number % session.every == 0:
            answers |= _session(session, rerankers[session.memory], case.question, other, pages)
    return answers


def _session(
    session: Session, reranker: Reranker, question: str, other: str, pages: list[Image.Image]
) -> Answers:
    if session.before is not None:
        reranker.cache.clear()
        reranker.rerank(other, pages, **session.before)
    rerank = partial(reranker.rerank, question, pages)
    answers = {trial.name: ask(rerank, trial) for trial in session.trials}
    if session.memory == "kept":
        reranker.cache.clear()
    return answers


def document(bench: Bench) -> dict[str, list[Answers]]:
    """Every plan over one document, with reuse and without, in turns; then one longer list."""
    scale, known = bench.scale, bench.journal.read()
    paper = make_document(scale.pages, scale.questions, scale.seed)
    found: dict[str, list[Answers]] = {}
    for trial in DOCUMENT:
        work = f"document {scale.pages} {scale.questions} {trial.name}"
        if work not in known:
            known[work] = _document(bench, paper, trial)
            bench.journal.add(work, known[work])
            say(f"document: {trial.name}")
        found[trial.name] = known[work]
    work = f"long {scale.long_pages}"
    if work not in known:
        known[work] = _long_list(bench)
        bench.journal.add(work, known[work])
    found[LONG] = known[work]
    return found


def _document(bench: Bench, paper: PaperCase, trial: Trial) -> list[Answers]:
    """Every question with nothing kept (``none``) and through an open document (``reuse``).

    The first of ``reuse`` carries what opening the document took.
    """
    pages = draw(paper.pages)
    plain = replace(trial, options={**trial.options, **BASELINE.options})
    answers: list[Answers] = []
    with bench.load(CacheConfig.off()) as forgetful, bench.load(CacheConfig()) as reranker:
        started = time.perf_counter()
        with reranker.open_document(pages) as kept:
            opening_ms = 1e3 * (time.perf_counter() - started)
            encoded = reranker.cache.stats().encoder.host.entries
            for question, _ in paper.questions:
                none = ask(partial(forgetful.rerank, question, pages), plain)
                answers.append({"none": none, "reuse": ask(partial(kept.rerank, question), trial)})
    first = answers[0]["reuse"]
    answers[0]["reuse"] = replace(
        first, ms=round(first.ms + opening_ms, 3), encodes=first.encodes + encoded
    )
    return answers


def _long_list(bench: Bench) -> list[Answers]:
    """Sliding windows of 20 over a long list, asked once of an empty memory, or of none at all."""
    paper = make_document(bench.scale.long_pages, 1, bench.scale.seed + 1)
    pages, [(question, _)] = draw(paper.pages), paper.questions
    answers: Answers = {}
    for name, cache in (("none", CacheConfig.off()), ("reuse", CacheConfig())):
        with bench.load(cache) as reranker:
            answers[name] = ask(partial(reranker.rerank, question, pages), DOCUMENT[0])
    return [answers]


def exact(bench: Bench, jobs: int) -> list[Answers]:
    """Every list of 2 to 10 pages in :data:`EXACT`; only the first ``drafted`` with drafts."""
    return _shared(bench, "exact", bench.scale.exact, jobs)


def approximate(bench: Bench, jobs: int) -> list[Answers]:
    """Every list of 2 to 10 pages in those of :data:`APPROXIMATE` that it is long enough for."""
    return _shared(bench, "approximate", bench.scale.approximate, jobs)


def trials(scale: Scale, part: Part, index: int) -> tuple[Trial, ...]:
    """What list ``index`` of ``part`` is asked."""
    if part == "exact":
        return tuple(t for t in EXACT if t is not DRAFTED or index < scale.drafted)
    size = len(draw_case(index, scale.seed).pages)
    return tuple(t for t in APPROXIMATE if size >= t.least_pages)


def _shared(bench: Bench, part: Part, lists: int, jobs: int) -> list[Answers]:
    works = {index: _work(bench.scale, part, index) for index in range(lists)}
    known = bench.journal.read()
    todo = [index for index, work in works.items() if work not in known]
    tasks = [todo[at : at + CASES_PER_TASK] for at in range(0, len(todo), CASES_PER_TASK)]
    done = lists - len(todo)
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as executor:
        try:
            running = [executor.submit(_task, bench, part, task) for task in tasks]
            for future in as_completed(running):
                done += future.result()
                say(f"{part}: {done} of {lists} lists")
        finally:  # after an error or Ctrl-C only what is running is waited for
            executor.shutdown(cancel_futures=True)
    known = bench.journal.read()
    return [answers for work in works.values() for answers in known[work]]


def _work(scale: Scale, part: Part, index: int) -> str:
    drafted = part == "exact" and index < scale.drafted
    return f"{part} {index}{' drafted' if drafted else ''}"


def _task(bench: Bench, part: Part, indices: Sequence[int]) -> int:
    torch.set_num_threads(1)
    with bench.load(SMALL) as reranker, bench.load(CacheConfig.off()) as forgetful:
        for index in indices:
            case = draw_case(index, bench.scale.seed)
            question, pages = case.question, draw(case.pages)
            answers: Answers = {}
            for trial in trials(bench.scale, part, index):
                served_by = forgetful if trial is UNMASKED else reranker
                answers[trial.name] = ask(partial(served_by.rerank, question, pages), trial)
            bench.journal.add(_work(bench.scale, part, index), [answers])
    return len(indices)
