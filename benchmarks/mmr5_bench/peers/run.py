"""A run of several contenders over the same lists, list by list, that keeps what it measured.

Reasons for skipping -> contenders opened -> warm-up lists -> every list through all contenders, in
an order drawn anew for each -> check of what was read -> journal and evidence file. Interleaving
spreads what the machine does meanwhile over everybody, and a drawn order what a contender leaves
behind for the next. Where the models do not fit side by side, ``sequential`` opens one after the
other and says so in the note.

Memory and GPU are watched from the first warm-up list on. Of memory only what torch allocated on
the GPU is reported, and only with ``sequential``: side by side nobody knows whose it is, and the
resident memory of a process keeps what earlier contenders loaded. What the GPU did side by side is
of all contenders together, and stands once in the note.

A contender that raises, or that read something else, is closed and listed as skipped with the
reason and how far it came; what it did until then is kept, and the others go on.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmr5_bench.evidence.document import Evidence, Skipped, write_evidence
from mmr5_bench.evidence.gpu import GpuSampler
from mmr5_bench.evidence.memory import PeakMemory
from mmr5_bench.peers.base import (
    Answer,
    ListWork,
    Peer,
    Session,
    Setting,
    WorkMismatchError,
    check,
)
from mmr5_bench.peers.journal import Journal, journal_path
from mmr5_bench.peers.names import PEERS
from mmr5_bench.peers.rounds import Round, Track, entries_of
from mmr5_bench.peers.workloads import Workload

# Making the document takes a bootstrap per figure; it may take this share of the run's time.
_WRITING_SHARE = 0.05


@dataclass(frozen=True)
class Plan:
    """How much is run. ``seconds`` bounds the time after which no new list is begun.

    Raises ValueError for no lists, a negative warm-up and a bound of nothing.
    """

    lists: int
    warmup: int = 1
    seconds: float | None = None
    sequential: bool = False
    baseline: str = PEERS[0]

    def __post_init__(self) -> None:
        if self.lists < 1:
            raise ValueError(f"--lists {self.lists} measures nothing; ask for 1 or more")
        if self.warmup < 0:
            raise ValueError(f"--warmup {self.warmup} is no number of lists; pass 0 or more")
        if self.seconds is not None and self.seconds <= 0:
            raise ValueError(f"--seconds {self.seconds} ends before it begins; pass more than 0")


@dataclass
class Board:
    """The run's state, and the two files it is kept in."""

    evidence: Evidence
    workloads: Sequence[Workload]
    plan: Plan
    output: Path
    progress: Callable[[str], None]
    journal: Journal
    tracks: list[Track] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    _written: float = 0.0
    _cost: float = 0.0

    def skip(self, subject: str, reason: str) -> None:
        """Lists something as not measured, or not to its end."""
        self.skipped.append({"subject": subject, "reason": reason})
        self.progress(f"skipped: {subject}: {reason}")

    def keep(self, track: Track, workload: Workload, round: Round) -> None:
        """Writes a round to the journal, before anything is made of it, and adds it."""
        self.journal.add(track.subject, workload.label, round)
        track.rounds.setdefault(workload.label, []).append(round)

    def write(self, *, now: bool = False) -> None:
        """Replaces the evidence file after a list, unless that would take too much of the time.

        One that is there already is not replaced by one without entries.
        """
        began = time.monotonic()
        if not now and began - self._written < self._cost / _WRITING_SHARE:
            return
        entries = entries_of(self.tracks, self.workloads, self.plan.baseline)
        self.evidence["entries"] = entries
        self.evidence["skipped"] = list(self.skipped)
        if entries or not self.output.exists():
            write_evidence(self.evidence, self.output)
        else:
            self.progress(f"nothing was measured: {self.output} is left as it was")
        self._written = time.monotonic()
        self._cost = self._written - began


class Contender:
    """A peer that takes part: open until it fails or the run ends."""

    def __init__(self, peer: Peer, track: Track, setting: Setting, board: Board) -> None:
        self.peer, self.track = peer, track
        self._setting, self._board = setting, board
        self._stack = ExitStack()
        self._session: Session | None = None
        self._seen: set[str] = set()  # workloads whose pixels were compared

    @property
    def active(self) -> bool:
        """Whether it still takes part."""
        return self._session is not None

    def open(self) -> None:
        """Loads the peer; one that cannot be loaded is skipped."""
        try:
            self._session = self._stack.enter_context(self.peer.open(self._setting))
        except Exception as error:
            self._fail("cannot be opened", error)

    def ask(self, workload: Workload, work: ListWork, index: int | None) -> None:
        """Answers one list, timed; ``index`` None is a warm-up, which is checked but not kept."""
        if self._session is None:
            return
        place = f"warm-up of {workload.label}" if index is None else f"list {index + 1}"
        try:
            self._session.forget()
            ms, answer = _timed(self._session, work, torch.device(self._setting.device))
            pixels = workload.label not in self._seen
            reading = self._session.reading(work, pixels=pixels)
            wanted = workload.reader.pixels(work) if pixels and reading.pixels else None
            check(work, answer, reading, wanted)
            self._seen.add(workload.label)
            round = None if index is None else Round.of(index, work, ms, answer)
        except Exception as error:
            verb = "refused" if isinstance(error, WorkMismatchError) else "failed"
            self._fail(f"{verb} at {place} after {self.track.count} lists", error)
            return
        if round is not None:
            self._board.keep(self.track, workload, round)

    def close(self) -> None:
        """Frees what the peer holds; an error of its own clean-up is listed, not raised."""
        self._session = None
        try:
            self._stack.close()
        except Exception as error:
            self._board.skip(self.track.subject, f"did not close: {_line(error)}")
        gc.collect()
        if self._setting.on_gpu:
            torch.cuda.empty_cache()

    def _fail(self, what: str, error: Exception) -> None:
        self._board.skip(self.track.subject, f"{what}: {_line(error)}")
        self.close()


def run_peers(
    peers: Sequence[Peer],
    setting: Setting,
    workloads: Sequence[Workload],
    plan: Plan,
    evidence: Evidence,
    output: Path,
    progress: Callable[[str], None] = lambda line: None,
) -> Evidence:
    """Runs ``peers`` over the lists of ``workloads`` and fills ``evidence``.

    The document is written to ``output`` after lists, when one contender is done, at the end, and
    when the run is interrupted or fails. ``progress`` is called with lines for people. Raises
    ValueError for an ``output`` that is its own journal.
    """
    head = {"created": evidence["created"], "title": evidence["title"], "note": evidence["note"]}
    journal = Journal.begin(journal_path(output), head)
    board = Board(evidence, workloads, plan, output, progress, journal)
    contenders = []
    for peer in peers:
        if reason := peer.why_not(setting):
            board.skip(peer.subject(setting), reason)
            continue
        track = Track.of(peer, setting, plan.warmup)
        board.tracks.append(track)
        contenders.append(Contender(peer, track, setting, board))
    began = time.monotonic()
    groups = [[one] for one in contenders] if plan.sequential else [contenders]
    try:
        for number, group in enumerate(groups, start=1):
            # One after the other, each has its share of the time, and what others left of theirs.
            share = None if plan.seconds is None else plan.seconds * number / len(groups)
            _run_group(group, setting, board, None if share is None else began + share)
    finally:
        named = {skipped["subject"] for skipped in board.skipped}
        for contender in contenders:
            if not contender.track.count and contender.track.subject not in named:
                board.skip(contender.track.subject, "the run ended before its first list")
        board.write(now=True)
    return evidence


def _run_group(
    contenders: Sequence[Contender], setting: Setting, board: Board, until: float | None
) -> None:
    """Contenders that are open at the same time, from their opening to their end."""
    try:
        for contender in contenders:
            board.progress(f"opening {contender.track.subject}")
            contender.open()
        with _watched(contenders, setting, board):
            for workload in board.workloads:
                for index in range(board.plan.warmup):
                    work = workload.warmup(index)
                    for contender in contenders:
                        contender.ask(workload, work, None)
            _ask_lists(contenders, board, setting.seed, until)
        board.write(now=True)
    finally:
        for contender in contenders:
            contender.close()


@contextmanager
def _watched(contenders: Sequence[Contender], setting: Setting, board: Board) -> Iterator[None]:
    """Notes what memory and GPU did meanwhile, also when the run is interrupted."""
    gpu, memory = GpuSampler(setting.device), PeakMemory(setting.device)
    try:
        with gpu, memory:
            yield
    finally:
        summary, peak = gpu.summary(), memory.bytes().get("peak_gpu_bytes")
        if not board.plan.sequential:
            if summary is not None:
                board.evidence["note"] += f" GPU, all contenders together: {_said(summary)}."
        else:
            for contender in contenders:
                contender.track.gpu = summary
                contender.track.memory = {} if peak is None else {"peak_gpu_bytes": peak}


def _said(summary: Mapping[str, Any]) -> str:
    clock = summary["clock_mhz"]
    throttled = f"throttled ({', '.join(summary['reasons'])})" if summary["throttled"] else ""
    return f"{clock['min']:.0f} to {clock['max']:.0f} MHz, {throttled or 'not throttled'}"


def turns(count: int, seed: int, index: int, position: int) -> list[int]:
    """In which order ``count`` contenders answer list ``index`` of the workload at ``position``."""
    return [int(i) for i in np.random.default_rng([seed, index, position]).permutation(count)]


def _ask_lists(
    contenders: Sequence[Contender], board: Board, seed: int, until: float | None
) -> None:
    for index in range(board.plan.lists):
        for position, workload in enumerate(board.workloads):
            if not any(contender.active for contender in contenders):
                return
            # One list at the least: what took part is not left out because others were slow.
            if index and until is not None and time.monotonic() >= until:
                board.progress(f"time is over after {index} lists")
                return
            work = workload.list(index)
            for turn in turns(len(contenders), seed, index, position):
                contenders[turn].ask(workload, work, index)
            board.write()
        board.progress(f"{index + 1} of {board.plan.lists} lists")


def _timed(session: Session, work: ListWork, device: torch.device) -> tuple[float, Answer]:
    """Wall time of one answer in ms, the device idle at both ends."""
    gc.collect(1)  # young garbage of one contender is not for the next to clear
    _wait(device)
    start = time.perf_counter()
    answer = session.answer(work)
    _wait(device)
    return 1e3 * (time.perf_counter() - start), answer


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _line(error: Exception) -> str:
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
