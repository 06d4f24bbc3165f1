"""Prompts read with as much from memory as there is: the same bits as without any."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers.reading import (
    QUESTION,
    AfterChecks,
    Read,
    forgetful,
    limited,
    load,
    png_pages,
    read,
    remember,
    skip_unless_native,
)
from mmr5_runtime.cursor import Cursor
from mmr5_runtime.deadline import Deadline
from mmr5_runtime.loading import LoadedEngine
from mmr5_runtime.options import Layout, RerankOptions
from mmr5_runtime.pages import Page
from mmr5_runtime.reading import UseCounts, read_prompt
from mmr5_runtime.request import open_request
from mmr5_runtime.timing import Timings
from mmr5_runtime.types import PageError

BACKENDS = ("native", "onnxruntime")
PROMPTS = 34  # for each of 6 engines: 204 in all
QUESTIONS = (QUESTION, "Where is the budget table?", "Who signed?")
LAYOUTS: tuple[Layout, ...] = ("reference", "images_first")

EngineFactory = Callable[[str], Path]


@pytest.fixture(scope="module")
def loaded(tiny_engine: EngineFactory, backend: str) -> LoadedEngine:
    return load(tiny_engine("int4"), backend=backend)


def _next_list(rng: random.Random, pool: list[Page], last: list[Page]) -> list[Page]:
    """The last list as it is, with another end, in another order, or other pages altogether."""
    kind = rng.randrange(5)
    if kind == 0 and last:
        return list(last)
    if kind == 1 and len(last) > 2:
        kept = last[: rng.randint(1, len(last) - 1)]
        others = [page for page in pool if page not in kept]
        return kept + rng.sample(others, len(last) - len(kept))  # the same number of pages
    if kind == 2 and last:
        return rng.sample(last, len(last))
    if kind == 3 and last:
        return [*last, rng.choice(pool)]  # perhaps one that is there already
    return rng.sample(pool, rng.randint(2, 5))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("quant", ["bf16", "int8", "int4"])
def test_warm_equals_cold(tiny_engine: EngineFactory, backend: str, quant: str, dtype: str) -> None:
    if dtype == "bfloat16":
        skip_unless_native(backend, "dtype='bfloat16'")
    loaded = load(tiny_engine(quant), dtype, backend=backend)
    rng = random.Random(f"{quant} {dtype}")
    text = loaded.engine.spec.text
    item = loaded.engine.model.dtype.itemsize
    token = 2 * text.num_layers * text.num_kv_heads * text.head_dim * item
    # Two or three prompts of 400 tokens, and two or three of the pages.
    memory = remember(loaded, limited(1000 * token, 24 * text.hidden_size * item))
    pool: list[Page] = list(png_pages(9))
    last: list[Page] = []
    query, layout = QUESTIONS[0], LAYOUTS[0]
    reused = []
    for number in range(PROMPTS):
        if number % 3 == 0:
            query, layout = rng.choice(QUESTIONS), rng.choice(LAYOUTS)
        if number % 5 == 4:  # another request begins and does not get to its end
            given_up = read(
                loaded, memory, _next_list(rng, pool, last), query, layout,
                deadline=AfterChecks(rng.randint(0, 3)),
            )  # fmt: skip
            assert given_up.logits is None or given_up.counts.segments_remembered
        last = _next_list(rng, pool, last)[:6]
        warm = read(loaded, memory, last, query, layout, max_new_tokens=rng.randint(4, 99))
        cold = read(loaded, forgetful(loaded), last, query, layout, max_new_tokens=4)
        assert warm.equals(cold), (number, query, layout)
        assert torch.equal(warm.cursor.step([7, 8]), cold.cursor.step([7, 8]))
        assert cold.counts.segments_remembered == 0
        assert warm.counts.segments_read == sum(warm.counts.misses.values())
        reused.append(warm.counts.segments_remembered / (1 + len(last)))
    stats = memory.stats()
    # The run was worth it: full hits, partial hits, misses, and evictions in both caches.
    assert reused.count(1.0) >= 2 and reused.count(0.0) >= 2
    assert sum(0 < share < 1 for share in reused) >= 5
    assert stats.segments.evictions > 5 and stats.encoder.host.evictions > 2
    assert stats.segments.bytes <= stats.segments.limit_bytes == 1000 * token


def test_segments_of_a_chain_are_reused_up_to_the_first_difference(loaded: LoadedEngine) -> None:
    memory, pages = remember(loaded), png_pages(6)
    first = read(loaded, memory, pages[:4])
    assert (first.counts.segments_read, first.counts.segments_remembered) == (5, 0)
    other_end = read(loaded, memory, [*pages[:2], pages[4], pages[3]])
    assert (other_end.counts.segments_read, other_end.counts.segments_remembered) == (2, 3)
    again = read(loaded, memory, pages[:4])
    assert (again.counts.segments_read, again.counts.segments_remembered) == (0, 5)
    assert again.counts.tokens_remembered + again.counts.tokens_read == again.cursor.mark.length
    assert first.counts.tokens_read == first.cursor.mark.length
    assert (again.counts.page_prefills, again.counts.page_prefills_remembered) == (4, 4)
    assert (other_end.counts.page_prefills, other_end.counts.page_prefills_remembered) == (4, 2)
    assert again.equals(first)


def test_pages_of_one_size_in_one_place_are_kept_apart(loaded: LoadedEngine) -> None:
    memory, (first, *others) = remember(loaded), png_pages(12)[::4]  # all of one size
    for page in others:
        warm = read(loaded, memory, [first, page])
        assert warm.equals(read(loaded, forgetful(loaded), [first, page]))
    assert warm.counts.misses == {"page": 1}


def test_nothing_is_encoded_for_a_prompt_that_is_remembered(loaded: LoadedEngine) -> None:
    memory, pages = remember(loaded), png_pages(3)
    read(loaded, memory, pages)
    memory.encoder.clear()
    assert read(loaded, memory, pages).counts.pages_encoded == 0
    # One page behind the chain is new, and only that one needs its embeddings.
    changed = read(loaded, memory, [*pages[:2], png_pages(1, seed=50)[0]])
    assert changed.counts.pages_encoded == 1


def test_the_same_pages_twice_in_a_list(loaded: LoadedEngine) -> None:
    memory, (one, two) = remember(loaded), png_pages(2)
    pages = [one, two, one, one]
    warm = [read(loaded, memory, pages) for _ in range(2)]
    assert warm[0].counts.pages_encoded == 2
    assert warm[1].counts.segments_remembered == 5
    assert warm[1].equals(read(loaded, forgetful(loaded), pages))


def test_images_first_reuses_every_page_for_another_question(loaded: LoadedEngine) -> None:
    memory, pages = remember(loaded), png_pages(4)
    read(loaded, memory, pages, layout="images_first")
    other = read(loaded, memory, pages, QUESTIONS[1], layout="images_first")
    assert (other.counts.segments_read, other.counts.segments_remembered) == (0, 5)
    assert not other.counts.misses
    fewer = read(loaded, memory, pages[:3], QUESTIONS[2], layout="images_first")
    assert (fewer.counts.segments_read, fewer.counts.segments_remembered) == (0, 4)
    for warm, count, query in ((other, 4, QUESTIONS[1]), (fewer, 3, QUESTIONS[2])):
        cold = read(loaded, forgetful(loaded), pages[:count], query, layout="images_first")
        assert warm.equals(cold)


def test_layouts_share_nothing(loaded: LoadedEngine) -> None:
    memory, pages = remember(loaded), png_pages(3)
    reference = read(loaded, memory, pages)
    other = read(loaded, memory, pages, layout="images_first")
    assert other.counts.segments_remembered == 0
    assert other.logits is not None and reference.logits is not None
    assert not torch.equal(other.logits, reference.logits)


@pytest.mark.parametrize("segments", range(5))
def test_what_was_read_when_time_ran_out_is_remembered(loaded: LoadedEngine, segments: int) -> None:
    memory, pages = remember(loaded), png_pages(3)
    late = read(loaded, memory, pages, deadline=AfterChecks(2 * segments))
    assert late.logits is None
    assert late.counts.segments_read == segments
    again = read(loaded, memory, pages)
    assert (again.counts.segments_remembered, again.counts.segments_read) == (
        segments,
        4 - segments,
    )
    assert again.equals(read(loaded, forgetful(loaded), pages))


@pytest.mark.parametrize("segments", range(5))
def test_what_time_left_unread_is_new_the_next_time(loaded: LoadedEngine, segments: int) -> None:
    memory, pages = remember(loaded), png_pages(3)
    read(loaded, memory, pages, deadline=AfterChecks(2 * segments))
    misses = read(loaded, memory, pages).counts.misses
    assert dict(misses) == ({"query": 4}, {"page": 3}, {"page": 2}, {"page": 1}, {})[segments]
    assert read(loaded, memory, pages).counts.misses == {}


@pytest.mark.parametrize("segments", range(5))
def test_time_that_passes_while_others_have_the_model(loaded: LoadedEngine, segments: int) -> None:
    """No page is read, and none encoded, once the turn has come too late."""
    memory, pages = remember(loaded), png_pages(3)
    late = read(loaded, memory, pages, deadline=AfterChecks(2 * segments + 1))
    assert late.logits is None and late.counts.segments_read == segments
    assert late.counts.pages_encoded == max(0, min(segments - 1, 3))


def test_what_an_error_left_unread_is_new_the_next_time(
    loaded: LoadedEngine, tmp_path: Path
) -> None:
    """A page whose pixels cannot be had any more ends the reading of its prompt."""
    memory, pages = remember(loaded), png_pages(3)
    request = open_request(loaded, memory, QUESTION, pages, RerankOptions())
    prompt = request.prompt(request.plan_prompt(range(3)), range(3))
    timings = Timings(loaded.engine.device)

    def unreadable() -> torch.Tensor:
        raise PageError("page 2: it looks different each time it is decoded")

    second = dataclasses.replace(prompt.pages[1], embeddings=unreadable)
    broken = dataclasses.replace(prompt, pages=(prompt.pages[0], second, prompt.pages[2]))
    with pytest.raises(PageError, match="page 2"):
        read_prompt(
            broken, broken.keys(), Cursor(loaded.engine, 2048), memory.segments, memory.ledger,
            UseCounts(), timings, Deadline(None),
        )  # fmt: skip
    assert dict(read(loaded, memory, pages).counts.misses) == {"page": 2}
    assert memory.stats().misses.segments["evicted"] == 0


def test_a_store_too_small_for_the_prompt_keeps_its_beginning(loaded: LoadedEngine) -> None:
    text = loaded.engine.spec.text
    token = 2 * text.num_layers * text.num_kv_heads * text.head_dim * 4
    pages = png_pages(4)
    head = read(loaded, forgetful(loaded), pages[:2]).cursor
    memory = remember(loaded, limited((head.mark.length - 8) * token))  # two pages, hardly more
    for _ in range(2):
        last = read(loaded, memory, pages)
        assert last.equals(read(loaded, forgetful(loaded), pages))
    assert 1 <= last.counts.segments_remembered < 5
    assert memory.stats().segments.refused > 0


def test_interleaved_reads_of_different_prompts(loaded: LoadedEngine) -> None:
    """Each read is of another list, layout or question, and none disturbs another's arena."""
    memory, pages = remember(loaded), png_pages(5)
    cases = [
        (pages[:3], QUESTIONS[0], LAYOUTS[0]),
        (pages[::-1], QUESTIONS[0], LAYOUTS[1]),
        (pages[:3], QUESTIONS[1], LAYOUTS[0]),
        (pages[1:4], QUESTIONS[0], LAYOUTS[0]),
    ]
    kept: list[Read] = []
    for _ in range(2):
        kept += [read(loaded, memory, *case) for case in cases]
    for index, warm in enumerate(kept):
        assert warm.equals(read(loaded, forgetful(loaded), *cases[index % len(cases)]))


def test_reasons(loaded: LoadedEngine) -> None:
    memory, pages = remember(loaded), png_pages(5)

    def reasons(*args: object) -> dict[str, int]:
        return dict(read(loaded, memory, *args).counts.misses)  # type: ignore[arg-type]

    assert reasons(pages[:3]) == {"query": 4}
    assert reasons(pages[:3]) == {}
    assert reasons(pages[:3], QUESTIONS[1]) == {"query": 4}
    assert reasons(pages[:2]) == {"count": 3}
    assert reasons([pages[0], pages[2], pages[1]]) == {"order": 2}
    assert reasons([pages[0], pages[3], pages[1]]) == {"page": 1, "order": 1}
    assert dict(memory.stats().misses.segments) == {
        "query": 8, "count": 3, "order": 3, "page": 1, "parameters": 0, "evicted": 0,
    }  # fmt: skip


def test_a_page_resized_otherwise_misses_for_its_parameters(loaded: LoadedEngine) -> None:
    memory = remember(loaded)
    small, large = png_pages(4)[0], png_pages(4)[3]
    read(loaded, memory, [small, large])
    budget = loaded.budget.replaced(None, 6 * 784)  # the small page is resized as before
    other = type(loaded)(**{**vars(loaded), "budget": budget})
    changed = read(other, memory, [small, large])
    assert dict(changed.counts.misses) == {"parameters": 1}
    assert dict(changed.counts.page_misses) == {"parameters": 1}
    assert changed.counts.segments_remembered == 2
    assert changed.equals(read(other, forgetful(other), [small, large]))


def test_what_was_evicted_is_said_to_be(loaded: LoadedEngine) -> None:
    text = loaded.engine.spec.text
    token = 2 * text.num_layers * text.num_kv_heads * text.head_dim * 4
    pages = png_pages(2)
    length = read(loaded, forgetful(loaded), pages).cursor.mark.length
    memory = remember(loaded, limited((length + 20) * token))  # one prompt
    read(loaded, memory, pages, "One?")
    read(loaded, memory, pages, "Two?")
    again = read(loaded, memory, pages, "One?")
    assert dict(again.counts.misses) == {"evicted": 3}
    assert memory.stats().misses.segments["evicted"] == 3
