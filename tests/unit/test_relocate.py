"""Relocated pages against exact reading, against the formula of attention, and against misuse."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import embedding

from helpers.inputs import GRIDS
from helpers.tiny import load_model, make_hf_model, tiny_configs, tiny_pair, write_checkpoint
from mmr5_runtime.kvcache import KVArena
from mmr5_runtime.model import Model, decode_step, embed_prompt, prefill, read_tokens
from mmr5_runtime.reuse.relocate import (
    PageSegment,
    Recompute,
    RelocatedRead,
    capture_pages,
    read_relocated,
)
from mmr5_runtime.reuse.relocate_store import RelocatablePage
from mmr5_runtime.rope import Grid, mrope_positions
from mmr5_runtime.types import ContextOverflowError, RequestError

NAMES = ["three_heads", "tied", "small_patches", "int4"]
HEAD, QUESTION, TAIL = [5, 80, 11, 12, 13, 9, 40], [11, 12, 13], [90, 91, 3, 7]
NEUTRAL = [5, 80, 60, 9, 40]  # the same instructions around another question
NOTHING, EVERYTHING = Recompute(0.0, 0), Recompute(1.0, 0)


def segments(model: Model, grids: Sequence[Grid] = GRIDS, seed: int = 0) -> list[PageSegment]:
    """Pages of random embeddings; a label in front of all but the first, as in a prompt."""
    generator = torch.Generator().manual_seed(seed)
    pages = []
    for number, grid in enumerate(grids):
        count = grid[1] * grid[2] // model.spec.vision.merge_unit
        embeds = torch.randn(count, model.spec.text.hidden_size, generator=generator)
        label = [70, 71, 100 + number] if number else []
        pages.append(PageSegment(label + markup(model, count), embeds.to(model.dtype), grid))
    return pages


def markup(model: Model, count: int) -> list[int]:
    spec = model.spec
    return [spec.vision_start_token_id, *[spec.image_token_id] * count, spec.vision_end_token_id]


def capture(
    model: Model, pages: Sequence[PageSegment], head: Sequence[int] = tuple(NEUTRAL)
) -> list[RelocatablePage]:
    """What each page leaves when it is the only one of a prompt."""
    bare = [
        PageSegment(markup(model, len(page.embeddings)), page.embeddings, page.grid)
        for page in pages
    ]
    return list(capture_pages(model, head, bare))


def read_head(model: Model, capacity: int = 300, start: int = 0) -> tuple[KVArena, int]:
    arena = model.new_arena(capacity)
    positions, following = mrope_positions(HEAD, [], model.spec, start)
    read_tokens(model, embed_prompt(model, torch.tensor(HEAD), []), positions, arena)
    return arena, following


def read_exactly(
    model: Model, pages: Sequence[PageSegment], arena: KVArena, start: int
) -> tuple[Tensor, int]:
    """Pages and tail behind the head, segment by segment: logits and the next position."""
    for page in pages:
        ids = torch.tensor(list(page.token_ids))
        positions, start = mrope_positions(ids, [page.grid], model.spec, start)
        read_tokens(model, embed_prompt(model, ids, [page.embeddings]), positions, arena)
    positions, start = mrope_positions(TAIL, [], model.spec, start)
    return prefill(model, embed_prompt(model, torch.tensor(TAIL), []), positions, arena), start


def relocate(
    model: Model,
    pages: Sequence[PageSegment],
    captured: Sequence[RelocatablePage],
    recompute: Recompute,
) -> tuple[KVArena, RelocatedRead]:
    arena, start = read_head(model)
    read = read_relocated(model, arena, start, pages, captured, TAIL, QUESTION, recompute)
    return arena, read


def image_rows(model: Model, pages: Sequence[PageSegment]) -> list[Tensor]:
    """Arena rows of the image tokens of every page behind the head."""
    rows, done = [], len(HEAD)
    for page in pages:
        ids = torch.tensor(list(page.token_ids))
        rows.append((ids == model.spec.image_token_id).nonzero().flatten() + done)
        done += len(ids)
    return rows


def changed(arena: KVArena, other: KVArena, rows: Tensor) -> Tensor:
    """Which of ``rows`` differ between two arenas in any layer, as row numbers."""
    keys = (arena.k[:, :, rows] != other.k[:, :, rows]).any(-1).any(1).any(0)
    values = (arena.v[:, :, rows] != other.v[:, :, rows]).any(-1).any(1).any(0)
    return rows[keys | values]


@pytest.mark.parametrize("name", NAMES)
def test_computing_everything_again_is_exact_reading(name: str) -> None:
    _, model = tiny_pair(name)
    pages = segments(model)
    arena, read = relocate(model, pages, capture(model, pages), EVERYTHING)
    exact, start = read_head(model)
    logits, position = read_exactly(model, pages, exact, start)
    assert arena.length == exact.length == len(HEAD) + read.computed
    assert (read.position, read.relocated) == (position, 0)
    assert (read.logits - logits).abs().max() <= 1e-4
    held = slice(0, exact.length)
    assert (arena.k[:, :, held] - exact.k[:, :, held]).abs().max() <= 1e-4
    assert (arena.v[:, :, held] - exact.v[:, :, held]).abs().max() <= 1e-4

    step = torch.tensor([[8, 9]]), torch.tensor([[position, position + 1]])
    found, expected = decode_step(model, *step, [arena]), decode_step(model, *step, [exact])
    assert (found - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", NAMES)
def test_a_page_captured_where_it_stands_has_the_exact_bits(name: str, grid: Grid) -> None:
    _, model = tiny_pair(name)
    pages = segments(model, [grid, GRIDS[1]])
    captured = capture(model, pages, HEAD)
    arena, read = relocate(model, pages, captured, NOTHING)
    exact, start = read_head(model)
    read_exactly(model, pages, exact, start)
    first, second = image_rows(model, pages)
    assert len(changed(arena, exact, first)) == 0
    assert len(changed(arena, exact, second)) == len(second)  # it has not seen the first
    assert read.relocated == len(first) + len(second)
    assert not torch.equal(captured[0].k, exact.k[:, :, first])  # kept before rotation


def test_bf16_keys_are_rotated_to_the_exact_bits(tmp_path: Any) -> None:
    folder = write_checkpoint(
        make_hf_model(tiny_configs()["int4"], 5), tmp_path, dtype=torch.bfloat16
    )
    model = load_model(folder, torch.bfloat16)
    pages = segments(model, [GRIDS[2]])
    arena, read = relocate(model, pages, capture(model, pages, HEAD), NOTHING)
    exact, start = read_head(model)
    read_exactly(model, pages, exact, start)
    assert arena.k.dtype == torch.bfloat16 and read.logits.dtype == torch.float32
    assert len(changed(arena, exact, image_rows(model, pages)[0])) == 0


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("name", NAMES)
def test_moving_a_page_turns_its_keys_to_their_true_position(name: str, grid: Grid) -> None:
    """Attention sees only distances: a prompt that begins elsewhere leaves the same keys, turned.

    So a page behind its own head moved by 900 positions must be what reading it there gives.
    """
    _, model = tiny_pair(name)
    pages = segments(model, [grid])
    captured = capture(model, pages, HEAD)
    arena, start = read_head(model, start=900)
    read = read_relocated(model, arena, start, pages, captured, TAIL, QUESTION, NOTHING)
    exact, _ = read_head(model, start=900)
    logits, position = read_exactly(model, pages, exact, start)
    [rows] = image_rows(model, pages)
    assert (arena.k[:, :, rows] - exact.k[:, :, rows]).abs().max() <= 1e-3
    assert (arena.v[:, :, rows] - exact.v[:, :, rows]).abs().max() <= 1e-3
    assert (read.logits - logits).abs().max() <= 1e-3
    assert read.position == position

    stale = captured[0].k - exact.k[:, :, rows]
    assert stale.abs().max() > 0.1  # it was turned at all


def test_pages_may_follow_pages_that_were_read_exactly() -> None:
    _, model = tiny_pair("small_patches")
    pages = segments(model)
    arena, start = read_head(model)
    for page in pages[:2]:
        ids = torch.tensor(list(page.token_ids))
        positions, start = mrope_positions(ids, [page.grid], model.spec, start)
        read_tokens(model, embed_prompt(model, ids, [page.embeddings]), positions, arena)
    captured = capture(model, pages[2:])
    read = read_relocated(model, arena, start, pages[2:], captured, TAIL, QUESTION, EVERYTHING)
    exact, start = read_head(model)
    logits, position = read_exactly(model, pages, exact, start)
    assert (read.logits - logits).abs().max() <= 1e-4
    assert (arena.length, read.position) == (exact.length, position)


@pytest.mark.parametrize("first_tokens", [0, 1, 16, 1000])
def test_the_first_tokens_are_computed_again_and_no_others(first_tokens: int) -> None:
    _, model = tiny_pair("tied")
    pages = segments(model)
    captured = capture(model, pages)
    moved, nothing = relocate(model, pages, captured, NOTHING)
    arena, read = relocate(model, pages, captured, Recompute(0.0, first_tokens))
    images = image_rows(model, pages)
    for rows in images:
        assert torch.equal(changed(arena, moved, rows), rows[:first_tokens])
    again = sum(len(rows[:first_tokens]) for rows in images)
    assert read.computed == nothing.computed + again
    assert read.relocated == nothing.relocated - again
    assert read.computed + read.relocated == arena.length - len(HEAD)


def attention_mass(model: Model, arena: KVArena, rows: int, position: int) -> Tensor:
    """Attention of the question, put behind the first ``rows`` of an arena, to each [rows]."""
    text = model.spec.text
    mass = torch.zeros(rows, dtype=torch.float64)

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        keys, values = (
            torch.cat((held[layer, :, :rows], new.transpose(0, 1)), dim=1)
            .repeat_interleave(text.num_heads // text.num_kv_heads, dim=0)
            .double()
            for held, new in ((arena.k, k), (arena.v, v))
        )
        scores = torch.einsum("thd,hsd->hts", q.double(), keys) / text.head_dim**0.5
        hidden = torch.ones(len(QUESTION), rows + len(QUESTION)).triu(rows + 1).bool()
        weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
        mass.add_(weights[:, :, :rows].sum((0, 1)))
        return torch.einsum("hts,hsd->thd", weights, values).flatten(1).float()

    embeds = embedding(torch.tensor(QUESTION), model.decoder.embed_tokens)
    positions = torch.arange(position, position + len(QUESTION)).expand(3, -1)
    with torch.no_grad():
        model.decoder(embeds, positions, attend)
    return mass


@pytest.mark.parametrize(("share", "first_tokens"), [(0.15, 4), (0.5, 0), (0.9, 1)])
@pytest.mark.parametrize("name", NAMES)
def test_what_the_question_attends_to_is_computed_again(
    name: str, share: float, first_tokens: int
) -> None:
    _, model = tiny_pair(name)
    pages = segments(model)
    captured = capture(model, pages)
    moved, plain = relocate(model, pages, captured, NOTHING)
    arena, read = relocate(model, pages, captured, Recompute(share, first_tokens))
    end = moved.length - len(TAIL)
    mass = attention_mass(model, moved, end, plain.position - len(TAIL))
    again = 0
    for rows in image_rows(model, pages):
        others = rows[first_tokens:]
        best = mass[others].topk(round(share * len(others))).indices
        expected = torch.cat((rows[:first_tokens], others[best])).sort().values
        assert torch.equal(changed(arena, moved, rows), expected)
        again += len(expected)
    assert read.relocated == plain.relocated - again
    assert arena.length == moved.length


def test_another_question_chooses_other_tokens_and_leaves_nothing_else_behind() -> None:
    _, model = tiny_pair("small_patches")
    pages = segments(model)
    captured = capture(model, pages)
    kept = [(page.k.clone(), page.v.clone()) for page in captured]
    moved, _ = relocate(model, pages, captured, NOTHING)
    chosen = []
    for question in (QUESTION, [200, 201, 202, 203, 204, 205, 206], QUESTION):
        arena, start = read_head(model)
        read_relocated(model, arena, start, pages, captured, TAIL, question, Recompute(0.2, 0))
        assert arena.length == moved.length  # also behind a question that is longer than the tail
        chosen.append(torch.cat([changed(arena, moved, r) for r in image_rows(model, pages)]))
    assert not torch.equal(chosen[0], chosen[1])
    assert torch.equal(chosen[0], chosen[2])
    for page, (k, v) in zip(captured, kept, strict=True):
        assert torch.equal(page.k, k) and torch.equal(page.v, v)


def test_a_long_question_needs_no_room_in_the_arena() -> None:
    _, model = tiny_pair("int4")
    pages = segments(model)
    captured = capture(model, pages)
    roomy, start = read_head(model)
    question = [*range(200), *QUESTION]
    expected = read_relocated(
        model, roomy, start, pages, captured, TAIL, question, Recompute(0.3, 2)
    )
    tight, _ = read_head(model, capacity=roomy.length)
    read = read_relocated(model, tight, start, pages, captured, TAIL, question, Recompute(0.3, 2))
    assert tight.length == roomy.length == tight.capacity
    assert torch.equal(read.logits, expected.logits)


def test_the_same_call_gives_the_same_bits() -> None:
    _, model = tiny_pair("three_heads")
    pages = segments(model)
    captured = capture(model, pages)
    arena, read = relocate(model, pages, captured, Recompute(0.3, 2))
    other, again = relocate(model, pages, capture(model, pages), Recompute(0.3, 2))
    assert torch.equal(read.logits, again.logits)
    assert len(changed(arena, other, torch.arange(arena.length))) == 0


@pytest.mark.parametrize("recompute", [NOTHING, Recompute(0.0, 3), EVERYTHING])
def test_no_token_sees_what_comes_after_it(recompute: Recompute) -> None:
    _, model = tiny_pair("tied")
    pages = segments(model)
    captured = capture(model, pages)
    arena, read = relocate(model, pages, captured, recompute)
    last = pages[-1]
    pages[-1] = PageSegment(last.token_ids, last.embeddings.flip(0), last.grid)
    other, changed_read = relocate(
        model, pages, [*captured[:-1], *capture(model, pages[-1:])], recompute
    )
    before = int(image_rows(model, pages)[-1][0])
    assert len(changed(arena, other, torch.arange(before))) == 0
    assert (read.logits - changed_read.logits).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("share", "first_tokens"),
    [(-0.1, 0), (1.1, 0), (float("nan"), 0), (True, 0), (0.1, -1), (0.1, True)],
)
def test_amounts_out_of_range(share: float, first_tokens: int) -> None:
    with pytest.raises(RequestError, match="cannot be computed again|can be computed again"):
        Recompute(share, first_tokens)


def test_what_does_not_fit_together_is_refused_and_changes_nothing() -> None:
    _, model = tiny_pair("tied")
    pages = segments(model, GRIDS[:3])
    captured = capture(model, pages)
    arena, start = read_head(model)
    before = arena.k[:, :, : arena.length].clone()
    prompt = sum(len(page.token_ids) for page in pages) + len(TAIL)
    swapped = [captured[0], *captured[:0:-1]]
    turned = RelocatablePage(captured[2].k, captured[2].v, (1, 14, 10))
    halved = RelocatablePage(captured[2].k.half(), captured[2].v.half(), captured[2].grid)

    def read(
        sources: Sequence[RelocatablePage],
        tail: Sequence[int] = tuple(TAIL),
        question: Sequence[int] = tuple(QUESTION),
        where: KVArena = arena,
    ) -> RelocatedRead:
        return read_relocated(
            model, where, start, pages, sources, tail, question, Recompute(0.2, 2)
        )

    for sources in (swapped, [*captured[:2], turned], [*captured[:2], halved]):
        with pytest.raises(RequestError, match=r"relocated page [23] of grid .* capture it again"):
            read(sources)
    with pytest.raises(RequestError, match="3 pages come with 2 captured"):
        read(captured[:2])
    with pytest.raises(RequestError, match="without a tail"):
        read(captured, tail=[])
    with pytest.raises(RequestError, match="the question has no tokens"):
        read(captured, question=[])
    with pytest.raises(RequestError, match="outside the vocabulary"):
        read(captured, question=[100_000])
    small, _ = read_head(model, capacity=60)
    with pytest.raises(ContextOverflowError):
        read(captured, where=small)
    full, _ = read_head(model, capacity=len(HEAD) + prompt - 1)
    with pytest.raises(ContextOverflowError):
        read(captured, where=full)
    assert full.length == len(HEAD)
    assert small.length == arena.length == len(HEAD)
    assert torch.equal(arena.k[:, :, : arena.length], before)
    assert read(captured).logits.isfinite().all()


def test_capturing_refuses_pages_that_do_not_fill_their_tokens() -> None:
    _, model = tiny_pair("tied")
    [page] = segments(model, GRIDS[1:2])
    short = PageSegment(page.token_ids, page.embeddings[1:], page.grid)
    with pytest.raises(RequestError, match="1 pages gave 15 embeddings"):
        list(capture_pages(model, NEUTRAL, [short]))
    wrong = PageSegment(page.token_ids, page.embeddings, GRIDS[2])
    with pytest.raises(RequestError, match="its 1 pages have 35"):
        list(capture_pages(model, NEUTRAL, [wrong]))


def test_without_pages_nothing_is_captured() -> None:
    _, model = tiny_pair("tied")
    assert list(capture_pages(model, NEUTRAL, [])) == []


def test_pages_are_captured_alike_alone_and_together() -> None:
    _, model = tiny_pair("small_patches")
    pages = segments(model)
    together = capture(model, pages)
    for page, found in zip(pages, together, strict=True):
        [alone] = capture(model, [page])
        assert torch.equal(alone.k, found.k) and torch.equal(alone.v, found.v)
        assert found.num_tokens == len(page.embeddings) and found.grid == page.grid
