"""The KV arena against a list of tokens, under any sequence of operations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from helpers.tiny import tiny_pair
from mmr5_runtime.kvcache import KVArena
from mmr5_runtime.spec import TextSpec
from mmr5_runtime.types import ContextOverflowError, RequestError

SPEC = TextSpec(
    vocab_size=10,
    hidden_size=8,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    intermediate_size=8,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    mrope_section=(1, 1, 0),
    max_position_embeddings=64,
    tie_word_embeddings=False,
)
CAPACITY = 12


def entries(tokens: list[int], layer: int, sign: float) -> torch.Tensor:
    """[K, T, D] made of the token number, the layer and the head, so that no mix-up is silent."""
    values = torch.tensor(tokens, dtype=torch.float32)[None, :, None] * sign
    head = torch.arange(SPEC.num_kv_heads)[:, None, None]
    return (values + 1000 * layer + 100 * head).expand(-1, -1, SPEC.head_dim)


class ArenaMachine(RuleBasedStateMachine):
    """The model is the list of committed token numbers."""

    @initialize(capacity=st.integers(1, CAPACITY))
    def start(self, capacity: int) -> None:
        self.arena = KVArena(SPEC, capacity)
        self.addresses = (self.arena.k.data_ptr(), self.arena.v.data_ptr())
        self.tokens: list[int] = []
        self.next_token = 1

    def _append(self, count: int, layers: range) -> list[int]:
        new = list(range(self.next_token, self.next_token + count))
        self.next_token += count
        for layer in layers:
            k, v = self.arena.append(layer, entries(new, layer, 1), entries(new, layer, -1))
            assert torch.equal(k, entries(self.tokens + new, layer, 1))
            assert torch.equal(v, entries(self.tokens + new, layer, -1))
        return new

    @rule(count=st.integers(1, CAPACITY))
    def append_and_commit(self, count: int) -> None:
        if len(self.tokens) + count > self.arena.capacity:
            with pytest.raises(ContextOverflowError, match=f"{count} more tokens"):
                self._append(count, range(1))
            return
        new = self._append(count, range(SPEC.num_layers))
        self.arena.commit(count)
        self.tokens += new

    @precondition(lambda self: len(self.tokens) < self.arena.capacity)
    @rule()
    def abandoned_pass(self) -> None:
        self._append(1, range(1))
        with pytest.raises(RequestError, match="cannot commit"):
            self.arena.commit(1)

    @rule(data=st.data())
    def truncate(self, data: st.DataObject) -> None:
        length = data.draw(st.integers(0, len(self.tokens)))
        self.arena.truncate(length)
        del self.tokens[length:]

    @rule()
    def reset(self) -> None:
        self.arena.reset()
        self.tokens = []

    @invariant()
    def holds_the_committed_tokens_in_place(self) -> None:
        assert self.arena.length == len(self.tokens)
        assert (self.arena.k.data_ptr(), self.arena.v.data_ptr()) == self.addresses
        for layer in range(SPEC.num_layers):
            held = self.arena.k[layer, :, : self.arena.length]
            assert torch.equal(held, entries(self.tokens, layer, 1))
            held = self.arena.v[layer, :, : self.arena.length]
            assert torch.equal(held, entries(self.tokens, layer, -1))


TestArena = ArenaMachine.TestCase
TestArena.settings = settings(max_examples=60, stateful_step_count=25)


@pytest.mark.parametrize("length", [-1, 4])
def test_truncating_beyond_the_tokens_is_refused(length: int) -> None:
    arena = KVArena(SPEC, CAPACITY)
    for layer in range(SPEC.num_layers):
        arena.append(layer, entries([1, 2, 3], layer, 1), entries([1, 2, 3], layer, -1))
    arena.commit(3)
    with pytest.raises(RequestError, match=f"truncate to {length} "):
        arena.truncate(length)
    assert arena.length == 3


def test_an_empty_arena_is_refused() -> None:
    with pytest.raises(RequestError, match="0 tokens"):
        KVArena(SPEC, 0)


def test_the_model_makes_arenas_of_its_own_shape_and_dtype() -> None:
    _, model = tiny_pair("three_heads")
    arena = model.new_arena(5)
    text = model.spec.text
    assert tuple(arena.k.shape) == (text.num_layers, text.num_kv_heads, 5, text.head_dim)
    assert arena.v.shape == arena.k.shape and arena.k.is_contiguous()
    assert arena.k.dtype == model.dtype == torch.float32


def test_viewed_tokens_load_bit_for_bit() -> None:
    arena = KVArena(SPEC, 6)
    for layer in range(SPEC.num_layers):
        arena.append(layer, entries([*range(6)], layer, 1.0), entries([*range(6)], layer, -1.0))
    arena.commit(6)
    k, v = arena.view(0, 6)
    wider = KVArena(SPEC, 9)
    wider.load(*arena.view(0, 4))
    wider.load(*arena.view(4, 6))
    assert wider.length == 6
    assert torch.equal(wider.k[:, :, :6], k) and torch.equal(wider.v[:, :, :6], v)
    with pytest.raises(RequestError, match="cannot take tokens 2 to 7"):
        wider.view(2, 7)
    with pytest.raises(RequestError, match="not from an arena like this one"):
        wider.load(k.double(), v.double())
    with pytest.raises(ContextOverflowError):
        wider.load(k, v)
    assert wider.length == 6
