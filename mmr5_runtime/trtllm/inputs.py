"""A prompt as the decoder engine takes it: ids, prompt table, block identities, rotary table.

TensorRT-LLM 1.2.1 feeds page embeddings through its prompt table: an id of V or more stands for row
``id - V`` of that table. So the image tokens of a prompt, page after page, get the ids V, V + 1,
..., which say nothing of the pages they stand for. Cached blocks of keys and values are looked up
by token ids, and two prompts over different pages of one size have the same; hence the second
number per token, the *extra id*, which is compared as well.

Rotary positions of image tokens come as a table of cosines and sines over the whole prompt, in the
layout of the Qwen2-VL engine: per position the pairs (cos, sin) of all frequencies, position 0
where the prompt has ended, since the engine has a fixed input [positions * D]. A token behind the
prompt turns by its number plus the *delta*, which is negative wherever pages have many tokens.

All of that is made once per prompt. A call that goes on behind a part of the answer adds the tokens
of that part, all of them text: an image token that a model wrote has no page and means nothing but
its own embedding, in our own engine as well.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mmr5_runtime.onnx.windows import window_inputs
from mmr5_runtime.rope import Grid, TextRotary, mrope_positions, vision_rotary
from mmr5_runtime.spec import ModelSpec, VisionSpec
from mmr5_runtime.trtllm.prompt import RunnerPrompt

NO_PAGE = 0  # extra id of text
VISION_OUTPUT = "embeddings"


@dataclass(frozen=True, eq=False)
class EngineInputs:
    """Inputs of one request, on the CPU but for ``prompt_table``.

    ``input_ids`` [T] int32; ``extra_ids`` one per token, 0 or a number of 64 bits; ``prompt_table``
    [1, image tokens, hidden]; ``rotary_cos_sin`` [1, positions * D] float32; ``position_deltas``
    [1, 1] int32.
    """

    input_ids: Tensor
    extra_ids: list[int]
    prompt_table: Tensor
    rotary_cos_sin: Tensor
    position_deltas: Tensor


def engine_inputs(prompt: RunnerPrompt, spec: ModelSpec, positions: int) -> EngineInputs:
    """``prompt`` for an engine whose rotary table has room for ``positions`` tokens.

    Raises :class:`RequestError` when image tokens and pages do not match.
    """
    grids = [page.grid for page in prompt.pages]
    places, behind = mrope_positions(prompt.token_ids, grids, spec)
    tables = [page.embeddings() for page in prompt.pages]
    table = torch.cat(tables) if tables else torch.empty(0, spec.text.hidden_size)
    return EngineInputs(
        input_ids=fake_ids(prompt.token_ids, spec),
        extra_ids=extra_ids(prompt, spec),
        prompt_table=table[None],
        rotary_cos_sin=rotary_table(places, spec, positions),
        position_deltas=torch.tensor([[behind - len(prompt.token_ids)]], dtype=torch.int32),
    )


def followed_by(inputs: EngineInputs, behind: Sequence[int], spec: ModelSpec) -> EngineInputs:
    """The inputs of a prompt with tokens of an answer ``behind`` it.

    Table and rotations are shared with ``inputs``: rows that the answer needs are written into the
    rotary table itself. What another answer left there does no harm, since a row is the same for
    every text token in its place and none is read behind the last token.
    """
    if not behind:
        return inputs
    count = len(inputs.input_ids)
    start = count + int(inputs.position_deltas)
    places = torch.arange(start, start + len(behind)).expand(3, -1)
    rows = inputs.rotary_cos_sin.view(-1, spec.text.head_dim)
    rows[count : count + len(behind)] = _rotations(places, spec)
    return replace(
        inputs,
        input_ids=torch.cat((inputs.input_ids, torch.tensor(behind, dtype=torch.int32))),
        extra_ids=[*inputs.extra_ids, *[NO_PAGE] * len(behind)],
    )


def fake_ids(token_ids: Sequence[int], spec: ModelSpec) -> Tensor:
    """[T] int32: text as it is, image tokens numbered from the size of the vocabulary on."""
    ids = torch.as_tensor(token_ids, dtype=torch.int32).clone()
    images = ids == spec.image_token_id
    count = int(images.sum())
    ids[images] = torch.arange(spec.text.vocab_size, spec.text.vocab_size + count).to(ids.dtype)
    return ids


def page_extra_ids(key: bytes, count: int) -> list[int]:
    """``count`` numbers from 1 to 2^64 - 1 that stand for a page's image tokens, in order.

    A function of the page's key alone, in every process. Each token has a number of its own, so
    that a block of a page is mistaken for another's only if all of their 64 bits collide, and not
    those of one shortened hash.
    """
    stream = hashlib.shake_256(b"mmr5 extra ids\0" + key).digest(8 * count)
    return [number or 1 for number in struct.unpack(f"<{count}Q", stream)]


def extra_ids(prompt: RunnerPrompt, spec: ModelSpec) -> list[int]:
    """One number per token of ``prompt``: 0 for text, :func:`page_extra_ids` for image tokens."""
    merge = spec.vision.merge_unit
    numbers = (
        number
        for page in prompt.pages
        for number in page_extra_ids(page.key, page.patches // merge)
    )
    image = spec.image_token_id
    return [next(numbers) if token == image else NO_PAGE for token in prompt.token_ids]


def rotary_table(places: Tensor, spec: ModelSpec, positions: int) -> Tensor:
    """[1, positions * D] float32 for tokens at ``places`` [3, T] int64, T <= ``positions``.

    Read as [positions, D/2, 2] it holds (cos, sin) of every frequency, each turning with the axis
    that the checkpoint's ``mrope_section`` gives it, and (1, 0) behind the tokens.
    """
    table = torch.tensor([1.0, 0.0]).repeat(positions, spec.text.head_dim // 2)
    table[: places.shape[1]] = _rotations(places, spec)
    return table.view(1, -1)


def _rotations(places: Tensor, spec: ModelSpec) -> Tensor:
    """[T, D] float32, (cos, sin) by (cos, sin), for ``places`` [3, T]."""
    return torch.stack(TextRotary(spec.text)(places), dim=-1).flatten(1)


def one_pad_per_page(token_ids: Sequence[int], image_token_id: int) -> list[int]:
    """``token_ids`` with every run of image tokens shortened to one.

    The LLM API writes as many as a page has tokens in its place, as the checkpoint's processor
    does.
    """
    return [
        token
        for before, token in zip([None, *token_ids], token_ids, strict=False)
        if not (token == before == image_token_id)
    ]


def vision_inputs(pixel_values: Tensor, grid: Grid, spec: VisionSpec) -> dict[str, Tensor]:
    """Inputs of the vision graph by name, for patches [P, patch_dim] of one page of ``grid``.

    ``pixels`` [P, patch_dim], ``cos`` and ``sin`` [P, D/2], ``windows`` and ``window_mask`` [W, L],
    ``places`` [P]; the graph was exported with these.
    """
    cos, sin = vision_rotary(grid, spec)
    windows, mask, places = window_inputs(grid, spec)
    return {
        "pixels": pixel_values,
        "cos": cos,
        "sin": sin,
        "windows": windows,
        "window_mask": mask,
        "places": places,
    }
