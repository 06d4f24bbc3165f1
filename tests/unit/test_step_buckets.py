"""Sizes of a decode step: what is rounded up, how far, and what the rounding tells the kernels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mmr5_kernels.sequences import COLUMNS, INACTIVE, LENGTH
from mmr5_runtime.kvcache import KVArena
from mmr5_runtime.spec import TextSpec
from mmr5_runtime.step.buckets import MAX_ROWS, SEQUENCES, TOKENS, Bucket, pick, spans
from mmr5_runtime.step.inputs import InputBuffer

CPU = torch.device("cpu")
SPEC = TextSpec(100, 64, 2, 4, 2, 16, 96, 1e-6, 1e4, (2, 3, 3), 512, False)

counts = st.integers(1, 8)
lengths = st.integers(0, 200_000)
chunks = st.sampled_from([16, 64, 128, 256])


@given(sequences=counts, tokens=counts, longest=lengths, chunk=chunks)
def test_a_bucket_holds_what_it_is_picked_for(
    sequences: int, tokens: int, longest: int, chunk: int
) -> None:
    bucket = pick(sequences, tokens, longest, chunk)
    assert sequences <= bucket.sequences <= 2 * sequences and bucket.sequences in SEQUENCES
    assert tokens <= bucket.tokens <= 4 * tokens and bucket.tokens in TOKENS
    assert bucket.rows == bucket.sequences * bucket.tokens <= MAX_ROWS
    # Padded tokens look back as well, and must find their keys within the span.
    reach = longest + bucket.tokens
    assert reach <= bucket.span and (bucket.span == chunk or bucket.span < 2 * reach)
    assert bucket.span % chunk == 0 and (bucket.span // chunk).bit_count() == 1
    assert bucket.span in spans(reach, chunk)


@given(sequences=counts, tokens=counts, longest=lengths, chunk=chunks)
def test_picking_for_all_of_a_bucket_gives_it_again(
    sequences: int, tokens: int, longest: int, chunk: int
) -> None:
    bucket = pick(sequences, tokens, longest, chunk)
    assert pick(bucket.sequences, bucket.tokens, bucket.span - bucket.tokens, chunk) == bucket


@given(longest=st.integers(1, 200_000), chunk=chunks)
def test_spans_double_up_to_the_longest(longest: int, chunk: int) -> None:
    found = spans(longest, chunk)
    assert found[0] == chunk and all(b == 2 * a for a, b in zip(found, found[1:], strict=False))
    assert found[-1] >= longest and (len(found) == 1 or found[-2] < longest)


@pytest.mark.parametrize(("sequences", "tokens"), [(0, 1), (9, 1), (1, 0), (1, 9)])
def test_sizes_that_no_bucket_has(sequences: int, tokens: int) -> None:
    with pytest.raises(ValueError, match="takes 1 to 8"):
        pick(sequences, tokens, 10, 128)


def arenas_of(sizes: list[int]) -> list[KVArena]:
    held = []
    for size in sizes:
        arena = KVArena(SPEC, 300, torch.bfloat16)
        arena.advance(size)
        held.append(arena)
    return held


@given(
    sizes=st.lists(st.integers(0, 200), min_size=1, max_size=8),
    tokens=counts,
    seed=st.integers(0, 9),
)
def test_the_inputs_of_a_step(sizes: list[int], tokens: int, seed: int) -> None:
    """Whatever an earlier, larger step left there: asked rows are as given, the others harmless."""
    arenas = arenas_of(sizes)
    generator = torch.Generator().manual_seed(seed)
    shape = (len(sizes), tokens)
    ids = torch.randint(0, 100, shape, generator=generator)
    positions = torch.randint(0, 300, shape, generator=generator)
    buffer = InputBuffer(CPU, vocab_size=100)
    everything = Bucket(8, 8, 256)
    buffer.views(everything).ids.fill_(-7)
    buffer.views(everything).positions.fill_(-7)
    buffer.views(everything).table.fill_(-7)
    bucket = pick(*shape, max(sizes), 128)
    buffer.fill(bucket, ids, positions, arenas)
    found_ids, found_positions, table = buffer.views(bucket)
    grid = (bucket.sequences, bucket.tokens)
    padded = torch.zeros(grid, dtype=torch.int64)
    for found, given_ in ((found_ids, ids), (found_positions, positions)):
        expected = padded.clone()
        expected[: len(sizes), :tokens] = given_
        assert torch.equal(found.view(grid), expected)
    assert table.shape == (bucket.sequences, COLUMNS)
    assert table[: len(sizes), LENGTH].tolist() == sizes
    assert set(table[len(sizes) :, LENGTH].tolist()) <= {INACTIVE}
    assert table[0, 0] == arenas[0].k.data_ptr() and table[0, 1] == arenas[0].v.data_ptr()


def test_views_keep_their_place_and_a_cleared_step_has_no_sequence() -> None:
    buffer = InputBuffer(CPU, vocab_size=100)
    bucket = Bucket(2, 4, 128)
    before = [view.data_ptr() for view in buffer.views(bucket)]
    ids = torch.ones(2, 4, dtype=torch.int64)
    buffer.fill(bucket, ids, ids, arenas_of([5, 6]))
    buffer.clear(bucket)
    views = buffer.views(bucket)
    assert [view.data_ptr() for view in views] == before
    assert not views.ids.any() and not views.positions.any()
    assert views.table[:, LENGTH].tolist() == [INACTIVE, INACTIVE]
