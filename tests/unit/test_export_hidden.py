"""Hidden states on disk: whole stages or none."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from mmr5_export.hidden import HiddenStates
from mmr5_runtime.types import ExportError


def states(count: int) -> list[Tensor]:
    return [torch.randn(3 + index, 4, dtype=torch.bfloat16) for index in range(count)]


def test_states_read_back_as_written(tmp_path: Path) -> None:
    hidden, written = HiddenStates(tmp_path), states(3)
    hidden.write("a-00", written)
    for index, state in enumerate(written):
        assert torch.equal(hidden.read("a-00", index), state)


def test_advancing_applies_the_step_to_each_state(tmp_path: Path) -> None:
    hidden, written = HiddenStates(tmp_path), states(3)
    hidden.write("a-00", written)
    hidden.advance("a-00", "a-01", 3, lambda index, state: state + index)
    assert torch.equal(hidden.read("a-01", 2), written[2] + 2)
    hidden.keep_only("a-01")
    assert not hidden.has("a-00") and hidden.has("a-01")


def test_a_broken_off_stage_is_not_there_and_can_be_written_again(tmp_path: Path) -> None:
    hidden = HiddenStates(tmp_path)

    def broken() -> Iterator[Tensor]:
        yield from states(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hidden.write("a-00", broken())
    assert not hidden.has("a-00")
    hidden.write("a-00", states(2))
    assert hidden.has("a-00") and len(list((tmp_path / "a-00").iterdir())) == 2


def test_a_damaged_state_is_an_error_that_names_the_file(tmp_path: Path) -> None:
    hidden = HiddenStates(tmp_path)
    hidden.write("a-00", states(1))
    file = tmp_path / "a-00" / "00000.safetensors"
    file.write_bytes(file.read_bytes()[:-3])
    with pytest.raises(ExportError, match=r"00000\.safetensors cannot be read back.*--force"):
        hidden.read("a-00", 0)
