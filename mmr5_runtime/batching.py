"""Decode steps of several sequences as one pass over the weights.

A decode step costs the reading of the weights, whether for one sequence or for eight. So threads
that decode at the same time take *seats*: each hands in its step and waits, and when every seat has
handed one in, or eight have, one of them runs the pass for all. Nobody waits for a thread that is
not decoding: a seat is *joined* from the first step of an answer to its end, and a stream whose
reader is slow leaves while it waits for that reader.

What is run together: the steps that were handed in first, up to eight, and of those the ones with
the same number of tokens at once (one token, or a draft of several; a different number is another
pass). On the kernels of the GPU path a row does not depend on its company. In plain torch, sums are
ordered by the number of rows, so the last bits of logits may differ from those of a step alone; a
seat says whether it had company.

Calls, batches and errors refer to each other while a pass runs, and let go of each other when it is
over: what hangs on them (arenas, logits) must not wait for the collector of cycles.
"""

from __future__ import annotations

import copy
import threading
import traceback
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from mmr5_runtime.kvcache import KVArena
from mmr5_runtime.model import MAX_DECODE_SEQUENCES
from mmr5_runtime.transfer import upload
from mmr5_runtime.turns import Turns
from mmr5_runtime.types import EngineError


class Steps(Protocol):
    """What an :class:`~mmr5_runtime.engine.Engine` does with a batch."""

    @property
    def device(self) -> torch.device: ...

    def step(self, token_ids: Tensor, positions: Tensor, arenas: Sequence[KVArena]) -> Tensor: ...


@dataclass(eq=False)
class _Call:
    """One step handed in: token_ids, positions [1, T]. ``batch`` is set for the one that runs it,
    ``logits`` [1, T, V] or ``error`` when it has been run, ``shared`` if others were run with it.
    """

    token_ids: Tensor
    positions: Tensor
    arena: KVArena
    woken: threading.Event = field(default_factory=threading.Event)
    batch: list[_Call] | None = None
    logits: Tensor | None = None
    error: Exception | None = None
    shared: bool = False

    @property
    def tokens(self) -> int:
        return self.token_ids.shape[1]

    @property
    def served(self) -> bool:
        return self.logits is not None or self.error is not None

    def result(self) -> Tensor:
        """The logits, or raises the error; asked once, since it lets go of everything."""
        logits, error = self.logits, self.error
        self.batch = self.logits = self.error = None
        del self.arena  # an error holds frames in which this call is known
        if error is not None:
            try:
                raise error
            finally:
                del error
        assert logits is not None
        return logits


class StepBatcher:
    """Collects steps and runs them together; every method may be called from any thread.

    ``model`` is held for each pass, and by whoever else uses the model.
    """

    def __init__(self, engine: Steps, model: Turns) -> None:
        self._engine, self.model = engine, model
        # Re-entrant: a garbage collection in here may end a generator that leaves its seat.
        self._lock = threading.RLock()
        self._joined = 0
        self._waiting: list[_Call] = []
        self.passes = 0
        self.steps = 0  # handed in; divided by `passes` it is how many sequences shared one

    def seat(self) -> Seat:
        """A place for one sequence at a time, not joined yet."""
        return Seat(self)

    def join(self) -> None:
        """From now on passes wait for one decoder more."""
        with self._lock:
            self._joined += 1

    def leave(self) -> None:
        """One decoder less to wait for; if all others wait, they go."""
        with self._lock:
            self._joined -= 1
            self._start()

    def step(self, token_ids: Tensor, positions: Tensor, arena: KVArena) -> tuple[Tensor, bool]:
        """One step of a joined decoder: logits [1, T, V] fp32, and whether it had company.

        Raises :class:`ContextOverflowError` when the arena is full, without anyone else noticing;
        what a pass raises reaches everyone who shared it, each as an exception of its own.
        """
        arena.require(token_ids.shape[1])
        call = _Call(token_ids, positions, arena)
        with self._lock:
            self._waiting.append(call)
            self._start()
        try:
            call.woken.wait()
            if call.batch is not None:
                self._run(call.batch)
        except BaseException:  # interrupted: the others go on without this one
            self._withdraw(call)
            raise
        return call.result(), call.shared

    def _start(self) -> None:
        """If nobody is missing, wake one of those that wait, to run the step of all."""
        if self._waiting and len(self._waiting) >= min(self._joined, MAX_DECODE_SEQUENCES):
            batch = self._waiting[:MAX_DECODE_SEQUENCES]
            del self._waiting[:MAX_DECODE_SEQUENCES]
            _lead(batch)

    def _withdraw(self, call: _Call) -> None:
        with self._lock:
            if call in self._waiting:
                self._waiting.remove(call)
            elif call.batch is not None:
                rest = [other for other in call.batch if other is not call and not other.served]
                call.batch = None
                if rest:
                    _lead(rest)

    def _run(self, batch: list[_Call]) -> None:
        """Run the steps of ``batch``, whose last one this thread has handed in."""
        calls = sorted(batch, key=lambda call: call.tokens)
        for _, group in groupby(calls, key=lambda call: call.tokens):
            together = list(group)
            try:
                self._run_together(together)
            except Exception as error:
                # The frames of the pass hold the arenas of all, and one may keep the error.
                traceback.clear_frames(error.__traceback__)
                for call in together:
                    call.error = error if call is batch[-1] else _again(error)
            except BaseException:  # meant for this thread alone
                for call in together:
                    call.error = _interrupted()
                raise
            finally:
                for call in together:
                    if call is not batch[-1]:
                        call.woken.set()

    def _run_together(self, calls: Sequence[_Call]) -> None:
        """One pass over the calls, all of as many tokens."""
        device = self._engine.device
        ids = [call.token_ids for call in calls]
        if len({part.device for part in ids}) > 1:  # some just chosen there, some written here
            ids = [upload(part, device) for part in ids]
        positions = torch.cat([call.positions for call in calls])
        with self.model.take():
            self.passes += 1
            self.steps += len(calls)
            logits = self._engine.step(torch.cat(ids), positions, [call.arena for call in calls])
        for call, rows in zip(calls, logits.split(1), strict=True):
            call.logits, call.shared = rows, len(calls) > 1


def _lead(batch: list[_Call]) -> None:
    leader = batch[-1]  # if it has just come, it need not be woken
    leader.batch = batch
    leader.woken.set()


def _again(error: Exception) -> Exception:
    """The same error for another thread: raising one writes into it where it came by.

    It does not refer to ``error``, which holds the frames of a thread, but says where that was.
    """
    try:
        other = copy.copy(error)
    except Exception:  # of a class that cannot be made from its arguments
        other = EngineError(f"a decode step failed: {error}")
    where = "".join(traceback.format_exception(error)).rstrip()
    other.__notes__ = [*getattr(error, "__notes__", ()), f"From a shared decode step:\n{where}"]
    return other


def _interrupted() -> EngineError:
    return EngineError(
        "a decode step that this request shared with another was interrupted there; send it again."
    )


class Seat:
    """One sequence's place among those that decode together; for one thread at a time."""

    def __init__(self, batcher: StepBatcher) -> None:
        self._batcher = batcher
        self._decoding = self._joined = False
        self.shared = False  # whether a step was run with those of others, until told otherwise

    @contextmanager
    def joined(self) -> Iterator[None]:
        """While an answer is decoded: the steps of others wait for this one's."""
        self._decoding = True
        self._join()
        try:
            yield
        finally:
            self._decoding = False
            self._leave()

    def turn(self) -> AbstractContextManager[None]:
        """Has the model alone, in the order of asking: for what is no decode step."""
        return self._batcher.model.take()

    @contextmanager
    def back(self) -> Iterator[None]:
        """While a stream is asked for its next event; in between nobody waits for this seat."""
        if self._decoding:
            self._join()
        try:
            yield
        finally:
            self._leave()

    def step(self, token_ids: Tensor, positions: Tensor, arenas: Sequence[KVArena]) -> Tensor:
        """:meth:`Engine.step` for one arena, together with the steps of the other seats."""
        (arena,) = arenas
        logits, shared = self._batcher.step(token_ids, positions, arena)
        self.shared |= shared
        return logits

    def _join(self) -> None:
        if not self._joined:
            self._batcher.join()
            self._joined = True

    def _leave(self) -> None:
        if self._joined:
            self._joined = False
            self._batcher.leave()
