"""The sequence table as kernels read it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mmr5_kernels import sequences
from mmr5_kernels.sequences import Sequence, sequence_table


def test_every_slot_has_its_row() -> None:
    plain = Sequence(k=1 << 40, v=(1 << 40) + 64, capacity=300, length=17)
    coded = Sequence(k=64, v=128, capacity=9, length=0, k_scales=4, v_scales=8)
    table = sequence_table([plain, None])
    assert table.dtype == torch.int64 and tuple(table.shape) == (2, sequences.COLUMNS)
    assert table[0].tolist() == [1 << 40, (1 << 40) + 64, 300, 17, 0, 0]
    assert table[1, sequences.LENGTH] == sequences.INACTIVE
    assert sequence_table([None, coded])[1].tolist() == [64, 128, 9, 0, 4, 8]


def test_what_no_kernel_could_read_is_refused() -> None:
    with pytest.raises(ValueError, match="10 tokens does not fit an arena of 9"):
        Sequence(k=64, v=64, capacity=9, length=10)
    with pytest.raises(ValueError, match="both scales"):
        Sequence(k=64, v=64, capacity=9, length=1, k_scales=4)
    with pytest.raises(ValueError, match="0x48 of v"):
        Sequence(k=64, v=72, capacity=9, length=1)
    with pytest.raises(ValueError, match="at least one slot"):
        sequence_table([])
    plain = Sequence(k=64, v=64, capacity=9, length=1)
    coded = Sequence(k=64, v=64, capacity=9, length=1, k_scales=4, v_scales=4)
    with pytest.raises(ValueError, match="cannot mix"):
        sequence_table([plain, None, coded])


def test_a_table_is_made_in_one_operation() -> None:
    rows = [Sequence(k=64, v=64, capacity=9, length=1)] * 8

    class Counting(TorchDispatchMode):
        calls: int = 0

        def __init__(self) -> None:
            super().__init__()  # type: ignore[no-untyped-call]

        def __torch_dispatch__(self, *given: Any, **named: Any) -> Any:
            self.calls += 1
            return given[0](*given[2], **(given[3] if len(given) > 3 else {}))

    with Counting() as one:
        sequence_table(rows[:1])
    with Counting() as eight:
        sequence_table(rows)
    assert one.calls == eight.calls <= 2
