"""The sizes that TensorRT reserves for: their defaults, and the numbers that refusals propose."""

from __future__ import annotations

import re
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.for_tensorrt import MAX_PIXELS, PAGE_TOKENS, write_untied
from helpers.tiny import read_spec
from mmr5_export.largest_page import largest_page_tokens
from mmr5_export.options import ExportOptions, OptionError
from mmr5_export.trtllm.refusals import resolve_limits
from mmr5_runtime.image import PixelBudget, planned_sizes
from mmr5_runtime.manifest import PixelRange
from mmr5_runtime.spec import ModelSpec
from mmr5_runtime.types import PageError

ENGINE: dict[str, Any] = {"backend": ("tensorrt-llm",), "trt_target": ("engine",)}


@pytest.fixture(scope="module")
def spec(tmp_path_factory: pytest.TempPathFactory) -> ModelSpec:
    folder: Path = write_untied(tmp_path_factory.mktemp("untied"))
    return read_spec(folder)


@given(st.integers(1, 8000), st.integers(1, 8000), st.integers(4, 900), st.integers(0, 900))
def test_no_page_is_larger_than_the_largest(
    spec: ModelSpec, width: int, height: int, low: int, more: int
) -> None:
    budget = PixelRange(low * 784, (low + more) * 784)
    try:
        _, (wide, high) = planned_sizes(width, height, PixelBudget(**asdict(budget)))
    except PageError:
        return
    assert wide * high // 784 <= largest_page_tokens(spec.vision, budget)


def test_the_least_number_that_would_do_is_named_and_does(spec: ModelSpec) -> None:
    budget = PixelRange(3136, MAX_PIXELS)
    too_small = ExportOptions(
        **ENGINE, max_multimodal_len=100, max_batch_size=3, max_new_tokens=1000
    )
    with pytest.raises(OptionError, match="too small for the page budget") as caught:
        resolve_limits(spec, budget, too_small)
    number = int(re.findall(r"; pass (\d+)", str(caught.value))[0])
    assert number == 3 * 20 * PAGE_TOKENS
    limits = resolve_limits(spec, budget, replace(too_small, max_multimodal_len=number))
    assert limits.max_multimodal_len == number
    with pytest.raises(OptionError):
        resolve_limits(spec, budget, replace(too_small, max_multimodal_len=number - 1))


def test_sizes_that_nobody_gave_hold_the_longest_default_request(spec: ModelSpec) -> None:
    options = ExportOptions(**ENGINE, max_new_tokens=1000)
    limits = resolve_limits(spec, PixelRange(3136, MAX_PIXELS), options)
    assert limits.page_tokens == PAGE_TOKENS
    assert limits.max_input_len == 20 * PAGE_TOKENS + 512
    assert limits.max_seq_len == limits.max_input_len + 1000
    assert limits.max_multimodal_len == 20 * PAGE_TOKENS and limits.max_batch_size == 1


def test_large_pages_are_cut_to_the_context(spec: ModelSpec) -> None:
    limits = resolve_limits(spec, PixelRange(3136, 28 * 28 * 700), ExportOptions(**ENGINE))
    assert limits.max_seq_len == spec.text.max_position_embeddings == 4096
    assert limits.max_input_len == 2048 and limits.max_multimodal_len == 2048


@pytest.mark.parametrize("batch", [None, 3])
def test_a_prompt_of_a_given_length_may_be_pages_for_the_most_part(
    spec: ModelSpec, batch: int | None
) -> None:
    """More than the twenty that fit by default, and with less text than is allowed for."""
    options = ExportOptions(**ENGINE, max_input_len=3000, max_new_tokens=500, max_batch_size=batch)
    limits = resolve_limits(spec, PixelRange(3136, MAX_PIXELS), options)
    assert limits.max_multimodal_len == 3000 * (batch or 1) > 20 * PAGE_TOKENS


@pytest.mark.parametrize(
    ("sizes", "flag", "number"),
    [
        ({"max_seq_len": 2100}, "--max-seq-len", 706 + 2048),
        ({"max_seq_len": 2100}, "--max-new-tokens", 2100 - 706),
        ({"max_seq_len": 800, "max_new_tokens": 100}, "--max-new-tokens", 94),
        ({"max_input_len": 600}, "--max-input-len", 706),
    ],
)
def test_the_number_that_makes_room_for_two_pages_does(
    spec: ModelSpec, sizes: dict[str, Any], flag: str, number: int
) -> None:
    budget, name = PixelRange(3136, MAX_PIXELS), flag.removeprefix("--").replace("-", "_")
    with pytest.raises(OptionError, match=f"pass {flag} {number} or .*lower --max-pixels"):
        resolve_limits(spec, budget, ExportOptions(**ENGINE, **sizes))
    resolve_limits(spec, budget, ExportOptions(**ENGINE, **{**sizes, name: number}))
    over = number + (1 if name == "max_new_tokens" else -1)
    with pytest.raises(OptionError):
        resolve_limits(spec, budget, ExportOptions(**ENGINE, **{**sizes, name: over}))


def test_nothing_longer_is_proposed_than_the_context_holds(spec: ModelSpec) -> None:
    with pytest.raises(OptionError) as caught:  # two pages of 1,800 tokens and a question
        resolve_limits(spec, PixelRange(3136, 1800 * 784), ExportOptions(**ENGINE))
    assert "question; lower --max-pixels." in str(caught.value)


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (
            {"max_input_len": 600},
            "600 does not hold 2 pages of up to 97 .*pass --max-input-len 706 or more",
        ),
        ({"max_input_len": 3000, "max_seq_len": 3000}, "no room for an answer"),
        ({"max_seq_len": 5000}, "context has 4096; pass --max-seq-len 4096"),
        ({"max_input_len": 4000}, "context has 4096"),
        ({"max_seq_len": 2100}, "a prompt of 52 tokens does not hold"),
    ],
)
def test_sizes_that_cannot_be(spec: ModelSpec, sizes: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        resolve_limits(spec, PixelRange(3136, MAX_PIXELS), ExportOptions(**ENGINE, **sizes))


size = st.none() | st.integers(1, 6000)


@given(st.integers(1, 2000), size, size, size, st.none() | st.integers(1, 4))
def test_sizes_either_hold_together_or_are_refused(
    spec: ModelSpec,
    page: int,
    prompt: int | None,
    sequence: int | None,
    multimodal: int | None,
    batch: int | None,
) -> None:
    options = ExportOptions(
        **ENGINE,
        max_input_len=prompt,
        max_seq_len=sequence,
        max_multimodal_len=multimodal,
        max_batch_size=batch,
    )
    try:
        limits = resolve_limits(spec, PixelRange(3136, max(page, 4) * 784), options)
    except OptionError as error:
        assert str(error).endswith(".")
        return
    assert limits.max_input_len < limits.max_seq_len <= spec.text.max_position_embeddings
    assert 2 * limits.page_tokens < limits.max_input_len <= limits.max_num_tokens
    assert limits.max_multimodal_len >= 2 * limits.page_tokens
    for given_size, found in (
        (prompt, limits.max_input_len),
        (sequence, limits.max_seq_len),
        (multimodal, limits.max_multimodal_len),
        (batch, limits.max_batch_size),
    ):
        assert given_size in (None, found)
