"""Progress without a terminal: nothing for short runs, a line per layer for long ones."""

from __future__ import annotations

import io
from collections.abc import Iterator

from mmr5_export.progress import progress_lines


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def lines(events: Iterator[tuple[float, tuple[str, int, int, str]]]) -> list[str]:
    """What is written when events come at these seconds after the start."""
    clock, stream = Clock(), io.StringIO()
    show = progress_lines(stream, clock)
    for seconds, (stage, done, total, note) in events:
        clock.now = 1000.0 + seconds
        show(stage, done, total, note)
    return stream.getvalue().splitlines()


def test_a_short_run_says_nothing() -> None:
    assert not lines((i / 2, ("layer", i, 28, "")) for i in range(29))


def test_a_long_run_says_when_layers_and_stages_are_done() -> None:
    found = lines((50.0 * i, ("layer", i, 3, "largest output error 1.00%")) for i in range(4))
    assert found == [
        "mmr5-export: quantizing layers: 1 of 3, 1 min, largest output error 1.00%",
        "mmr5-export: quantizing layers: 2 of 3, 2 min, largest output error 1.00%",
        "mmr5-export: quantizing layers: 3 of 3, 2 min, largest output error 1.00%",
    ]
    quick = lines(iter([(31.0, ("hash", 1, 3, "")), (32.0, ("hash", 3, 3, ""))]))
    assert [line.split(", ")[0] for line in quick] == [
        "mmr5-export: hashing the checkpoint: 1 of 3",
        "mmr5-export: hashing the checkpoint: 3 of 3",
    ]


def test_a_stage_of_many_steps_speaks_every_thirty_seconds() -> None:
    found = lines((float(i), ("respond", i, 160, "")) for i in range(160))
    assert len(found) == 5 and found[1].startswith("mmr5-export: writing calibration answers: 60")
