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
    whole = file.read_bytes()
    for altered in (whole[:-3], whole[:-1] + bytes([whole[-1] ^ 1])):
        file.write_bytes(altered)
        with pytest.raises(ExportError, match=r"00000\.safetensors was altered.*--force"):
            hidden.read("a-00", 0)
    file.unlink()
    with pytest.raises(ExportError, match=r"00000\.safetensors cannot be read back.*--force"):
        hidden.read("a-00", 0)


def test_a_later_process_reads_only_what_the_journal_says(tmp_path: Path) -> None:
    written = states(2)
    hashes = HiddenStates(tmp_path).write("a-00", written)
    later = HiddenStates(tmp_path)
    with pytest.raises(ExportError, match="cannot be read back"):
        later.read("a-00", 0)  # nothing says what it should be
    later.expect("a-00", hashes)
    assert torch.equal(later.read("a-00", 1), written[1])
    HiddenStates(tmp_path).write("a-00", states(2))
    with pytest.raises(ExportError, match="was altered"):
        later.read("a-00", 1)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no disk that is full")
def test_a_full_disk_leaves_no_stage(tmp_path: Path) -> None:
    def filling() -> Iterator[Tensor]:
        yield from states(1)
        (tmp_path / "a-00.unfinished" / "00001.safetensors").symlink_to("/dev/full")
        yield from states(1)

    hidden = HiddenStates(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        hidden.write("a-00", filling())
    assert not hidden.has("a-00")
