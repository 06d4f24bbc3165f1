"""Times the contenders of one shape: same tokens, round by round, in an order drawn anew.

All contenders are open at once. Every case is first run once by each, outside the clock, and its
logits are held against the reference's; only then are rounds timed. A round has new tokens, the
same for everybody, and its logits are compared as well, outside the clock.

The clock has only the call in it: from token ids to logits, keys and values in between included.
Getting back to the prefix lies outside, and so does a pause in which the threads of the contender
before stop spinning. A step is done once untimed in every round, since steps follow each other.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmr5_bench.backends.agreement import Agreement, agreement, require
from mmr5_bench.backends.contenders import Contender, Session
from mmr5_bench.backends.names import REFERENCE
from mmr5_bench.backends.shapes import Case, Shape
from mmr5_bench.peers.run import turns
from mmr5_runtime.artifact import read_manifest
from mmr5_runtime.spec import ModelSpec

_PAUSE_SECONDS = 0.05  # OpenMP and ONNX Runtime spin for a few ms after their last work
_PREFIX, _WARMUP = -1, -2  # rounds of tokens that are not timed


@dataclass(frozen=True)
class Rounds:
    """How often steps are timed, and prompts: in the first rounds only, since they take long.

    Raises ValueError for none, and for more of prompts than of steps.
    """

    steps: int
    prompts: int

    def __post_init__(self) -> None:
        if not 1 <= self.prompts <= self.steps:
            raise ValueError(
                f"{self.steps} rounds, prompts in {self.prompts} of them: both are at least 1, and "
                "prompts are timed in no more rounds than there are"
            )

    def of(self, case: Case) -> int:
        """Rounds of ``case``."""
        return self.prompts if case.kind == "prefill" else self.steps


@dataclass
class Timed:
    """What one contender did with one case: per round ms, cores in use, and agreement."""

    contender: Contender
    case: Case
    samples_ms: list[float] = field(default_factory=list)
    cores: list[float] = field(default_factory=list)
    agreements: list[Agreement] = field(default_factory=list)


@dataclass(frozen=True)
class Clocked:
    """Mean wall time and cores in use of some calls, and the logits of the last."""

    ms: float
    cores: float
    logits: Tensor


def measure_shape(
    shape: Shape,
    folder: Path,
    contenders: Sequence[Contender],
    plan: Rounds,
    seed: int,
    keep: Callable[[Sequence[Timed]], None],
    say: Callable[[str], None],
) -> None:
    """Runs every case of ``shape`` on the engine in ``folder``; ``keep`` gets all after each round.

    One of the contenders is :data:`REFERENCE`. Raises WorkMismatchError before anything is timed
    when a contender's logits are not the reference's, and later for a round of which they are not;
    EngineError when a contender cannot be opened.
    """
    tokens = _Tokens(read_manifest(folder).spec, seed)
    prefixes = sorted({case.behind for case in shape.cases} - {0})
    with ExitStack() as stack:
        sessions: list[Session] = []
        for contender in contenders:
            say(f"{shape.name}: opening {contender.subject}")
            sessions.append(stack.enter_context(contender.open(folder)))
        found = [[Timed(contender, case) for contender in contenders] for case in shape.cases]
        for length in prefixes:
            for session in sessions:
                session.read(tokens.draw(_PREFIX, length))
        for case, tracks in zip(shape.cases, found, strict=True):
            ids = tokens.draw(_WARMUP, case.tokens)
            done = [_clock(session, case, [ids]) for session in sessions]
            found_alike = _compare([one.logits for one in done], tracks)
            for one, alike, track in zip(done, found_alike, tracks, strict=True):
                subject = track.contender.subject
                say(
                    f"{shape.name}: {case.label}: {subject}: cosine {alike.cosine:.5f}, untimed "
                    f"{one.ms:.0f} ms"
                )
        for number in range(plan.steps):
            for position, tracks in enumerate(found):
                if number >= plan.of(tracks[0].case):
                    continue
                _round(sessions, tracks, tokens, number, turns(len(tracks), seed, number, position))
            keep([track for tracks in found for track in tracks if track.samples_ms])
            say(f"{shape.name}: {number + 1} of {plan.steps} rounds")


class _Tokens:
    """Draws token ids of text, the same ones for the same round and number."""

    def __init__(self, spec: ModelSpec, seed: int) -> None:
        special = (spec.image_token_id, spec.vision_start_token_id, spec.vision_end_token_id)
        self._below = min(*special, *spec.eos_token_ids, spec.pad_token_id)
        self._seed = seed

    def draw(self, number: int, count: int, call: int = 0) -> Tensor:
        """Ids [count] int64 of the ``call``-th call of round ``number``."""
        rng = np.random.default_rng([self._seed, number - _WARMUP, count, call])
        return torch.from_numpy(rng.integers(0, self._below, count, dtype=np.int64))


def _round(
    sessions: Sequence[Session],
    tracks: Sequence[Timed],
    tokens: _Tokens,
    number: int,
    order: Sequence[int],
) -> None:
    """One case by everybody in ``order``; adds to ``tracks`` when all have answered alike."""
    case = tracks[0].case
    lead = case.kind == "step"
    ids = [tokens.draw(number, case.tokens, call) for call in range(lead + case.calls)]
    done: dict[int, Clocked] = {}
    for turn in order:
        gc.collect(1)
        time.sleep(_PAUSE_SECONDS)
        for untimed in ids[:lead]:
            _ask(sessions[turn], case, untimed)
        done[turn] = _clock(sessions[turn], case, ids[lead:])
    agreements = _compare([done[index].logits for index in range(len(tracks))], tracks)
    for index, track in enumerate(tracks):
        track.samples_ms.append(done[index].ms)
        track.cores.append(done[index].cores)
        track.agreements.append(agreements[index])


def _clock(session: Session, case: Case, calls: Sequence[Tensor]) -> Clocked:
    """Runs ``case`` on each of ``calls``, rewinding between them outside the clock."""
    wall = process = 0.0
    logits = torch.empty(0)
    for ids in calls:
        session.rewind(case.behind)
        run = session.prefill if case.kind == "prefill" else session.step
        cpu, start = time.process_time(), time.perf_counter()
        logits = run(ids)
        wall += time.perf_counter() - start
        process += time.process_time() - cpu
    return Clocked(1e3 * wall / len(calls), process / wall, logits)


def _ask(session: Session, case: Case, ids: Tensor) -> Tensor:
    return _clock(session, case, [ids]).logits


def _compare(logits: Sequence[Tensor], tracks: Sequence[Timed]) -> list[Agreement]:
    """Everybody's logits against the reference's; WorkMismatchError when one has other ones."""
    subjects = [track.contender.subject for track in tracks]
    reference = logits[subjects.index(REFERENCE)]
    found = [agreement(rows, reference) for rows in logits]
    for one, track in zip(found, tracks, strict=True):
        require(one, track.contender.subject, track.case)
    return found
