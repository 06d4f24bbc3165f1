"""Arenas of 8-bit keys and values: what they hold, hand out and take back."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from torch import Tensor

from helpers.pictures import noise
from helpers.reading import forgetful, load, read, remember
from mmr5_kernels.attention_reference import dequantize_kv, quantize_kv
from mmr5_runtime.capacity import kv_bytes_per_token
from mmr5_runtime.kvcache import KVArena
from mmr5_runtime.model import native_model
from mmr5_runtime.reuse.relocate import PageSegment, capture_pages
from mmr5_runtime.spec import TextSpec
from mmr5_runtime.types import ContextOverflowError, RequestError

SPEC = TextSpec(
    vocab_size=10,
    hidden_size=64,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    intermediate_size=8,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    mrope_section=(4, 2, 2),
    max_position_embeddings=64,
    tie_word_embeddings=False,
)
CAPACITY = 12


def drawn(tokens: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Keys and values [L, K, T, D] of very different sizes, a head of zeros among them."""
    shape = (2, SPEC.num_layers, SPEC.num_kv_heads, tokens, SPEC.head_dim)
    sizes = 10.0 ** torch.randint(-6, 6, (*shape[:-1], 1), generator=generator)
    values = torch.randn(shape, generator=generator) * sizes
    values[0, 0, 0, :1] = 0
    return values[0], values[1]


class CodedArenaMachine(RuleBasedStateMachine):
    """The model is what :func:`quantize_kv` says of all committed keys and values."""

    @initialize(capacity=st.integers(1, CAPACITY), dtype=st.sampled_from(["float32", "bfloat16"]))
    def start(self, capacity: int, dtype: str) -> None:
        self.dtype = getattr(torch, dtype)
        self.arena = KVArena(SPEC, capacity, self.dtype, kv="int8")
        self.generator = torch.Generator().manual_seed(capacity)
        self.held = drawn(0, self.generator)

    def _expected(self, values: Tensor) -> Tensor:
        return dequantize_kv(*quantize_kv(values.to(self.dtype)), self.dtype)

    def _append(self, count: int, layers: range) -> tuple[Tensor, Tensor]:
        new = drawn(count, self.generator)
        both = [torch.cat(pair, dim=2) for pair in zip(self.held, new, strict=True)]
        for layer in layers:
            found = self.arena.append(layer, *(part[layer].to(self.dtype) for part in new))
            for seen, values in zip(found, both, strict=True):
                assert seen.dtype == self.dtype
                assert torch.equal(seen, self._expected(values[layer]))
        return both[0], both[1]

    @rule(count=st.integers(1, CAPACITY))
    def append_and_commit(self, count: int) -> None:
        if self.arena.length + count > self.arena.capacity:
            with pytest.raises(ContextOverflowError):
                self._append(count, range(1))
            return
        self.held = self._append(count, range(SPEC.num_layers))
        self.arena.commit(count)

    @rule()
    def abandoned_pass(self) -> None:
        if self.arena.length < self.arena.capacity:
            self._append(1, range(1))

    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        length = data.draw(st.integers(0, self.arena.length))
        self.arena.truncate(length)
        self.held = (self.held[0][:, :, :length], self.held[1][:, :, :length])

    @rule(data=st.data())
    def move_in_pieces(self, data: st.DataObject) -> None:
        length = self.arena.length
        cut = data.draw(st.integers(0, length))
        other = KVArena(SPEC, self.arena.capacity, self.dtype, kv="int8")
        for piece in (self.arena.view(0, cut), self.arena.view(cut, length)):
            for part in piece:
                assert part.dtype == torch.uint8 and part.shape[-1] == SPEC.head_dim + 4
            other.load(*piece)
        for ours, theirs in zip(self.arena.view(0, length), other.view(0, length), strict=True):
            assert torch.equal(ours, theirs)
        self.arena = other

    @invariant()
    def holds_the_codes_of_its_tokens(self) -> None:
        arena, length = self.arena, self.held[0].shape[2]
        assert arena.length == length
        pairs = ((arena.k, arena.k_scales), (arena.v, arena.v_scales))
        for (codes, scales), values in zip(pairs, self.held, strict=True):
            assert scales is not None
            expected = quantize_kv(values.to(self.dtype))
            assert torch.equal(codes[:, :, :length], expected[0])
            assert torch.equal(scales[:, :, :length], expected[1])


TestCodedArena = CodedArenaMachine.TestCase
TestCodedArena.settings = settings(max_examples=30, stateful_step_count=15)


def test_codes_are_within_half_a_step() -> None:
    k, _ = drawn(9, torch.Generator().manual_seed(1))
    codes, scale = quantize_kv(k)
    assert codes.min() >= -127 and (scale > 0).all()
    error = (dequantize_kv(codes, scale, torch.float32) - k).abs()
    assert (error <= 0.501 * scale[..., None]).all()
    assert torch.equal(codes.abs().amax(-1) == 127, k.any(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_arena_takes_the_bytes_that_limits_are_computed_from(dtype: torch.dtype) -> None:
    for kv in ("bf16", "int8"):
        arena = KVArena(SPEC, 5, dtype, kv=kv)
        parts = (arena.k, arena.v, arena.k_scales, arena.v_scales)
        total = sum(part.nbytes for part in parts if part is not None)
        assert total == 5 * kv_bytes_per_token(SPEC, dtype, kv)
        k, v = drawn(3, torch.Generator().manual_seed(2))
        for layer in range(SPEC.num_layers):
            arena.append(layer, k[layer].to(dtype), v[layer].to(dtype))
        arena.commit(3)
        assert sum(part.nbytes for part in arena.view(0, 3)) == total * 3 // 5


def test_arenas_of_other_kinds_are_not_mixed_up() -> None:
    plain, coded = (KVArena(SPEC, 5, kv=kv) for kv in ("bf16", "int8"))
    for arena, other in ((plain, coded), (coded, plain)):
        for layer in range(SPEC.num_layers):
            arena.append(layer, *(part[layer] for part in drawn(2, torch.Generator())))
        arena.commit(2)
        with pytest.raises(RequestError, match="not from an arena like this one"):
            other.load(*arena.view(0, 2))
        other.reset()
    with pytest.raises(RequestError, match="kv='fp8' is unknown; pass bf16 or int8"):
        KVArena(SPEC, 5, kv="fp8")  # type: ignore[arg-type]


@pytest.mark.parametrize("kv", ["bf16", "int8"])
def test_the_table_row_says_where_the_arena_lies(kv: str) -> None:
    arena = KVArena(SPEC, 5, torch.bfloat16, kv=kv)  # type: ignore[arg-type]
    arena.advance(2)
    row = arena.sequence
    assert (row.k, row.v, row.capacity, row.length) == (
        arena.k.data_ptr(),
        arena.v.data_ptr(),
        5,
        2,
    )
    parts = (arena.k_scales, arena.v_scales)
    assert (row.k_scales, row.v_scales) == tuple(0 if x is None else x.data_ptr() for x in parts)
    with pytest.raises(ContextOverflowError):
        arena.advance(4)


def test_warm_is_cold_with_eight_bits(tiny_engine: Callable[[str], Path]) -> None:
    loaded = load(tiny_engine("int4"), kv="int8")
    pages = [noise(56, 56 + 28 * (i % 4), i) for i in range(5)]
    memory, chooser = remember(loaded), random.Random(8)
    remembered = 0
    for number in range(6):
        chosen = chooser.sample(pages, 3) if number % 2 else pages[: 2 + number % 3]
        warm = read(loaded, memory, chosen)
        assert warm.cursor.arena.k.dtype == torch.int8
        assert warm.equals(read(loaded, forgetful(loaded), chosen))
        remembered += warm.counts.segments_remembered
    assert remembered > 4


def test_pages_are_not_relocated_in_eight_bits(tiny_engine: Callable[[str], Path]) -> None:
    model = native_model(load(tiny_engine("int4"), kv="int8").engine.model)
    page = PageSegment([1], torch.zeros(0, 8), (1, 4, 4))
    with pytest.raises(RequestError, match=r"stored as int8; load the engine with kv='bf16'"):
        list(capture_pages(model, [1, 2], [page]))
