"""The shipped checkpoint: transformers loads it unchanged, and every stage agrees on real pages."""

from __future__ import annotations

from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from helpers.tiny import load_model
from mmr5_bench.minidocs.lists import held_out_cases
from mmr5_bench.minidocs.pages import render_page
from mmr5_runtime.image import PatchedPage, PixelBudget, preprocess, smart_resize
from mmr5_runtime.model import Model, decode_step, embed_prompt, prefill
from mmr5_runtime.prompt import PromptTokenizer, render
from mmr5_runtime.rope import mrope_positions

TOLERANCE = 1e-4
NEW_TOKENS = 64
CASE = held_out_cases(1, 4, seed=5)[0]
# Sizes beyond the trained ones: odd, tiny, one that the pixel budget shrinks.
SIZES = (None, (61, 199), (1, 1), (500, 333))


@cache
def folder() -> Path:
    return Path(str(resources.files("mmr5_runtime") / "assets" / "mini"))


@cache
def models() -> tuple[Any, Model]:
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder(), dtype=torch.float32)
    return hf.eval(), load_model(folder())


@cache
def images() -> tuple[Image.Image, ...]:
    drawn = [render_page(p.topic, p.kind, p.seed) for p in CASE.pages]
    return tuple(
        page if size is None else page.resize(size) for page, size in zip(drawn, SIZES, strict=True)
    )


@cache
def reference_pixels() -> Any:
    loaded = []  # the reference's page loader resizes before the processor does
    for page in images():
        height, width = smart_resize(page.height, page.width)
        loaded.append(page.resize((width, height), Image.Resampling.BICUBIC))
    return Qwen2VLImageProcessorPil.from_pretrained(folder())(loaded, return_tensors="pt")


@cache
def patched() -> tuple[PatchedPage, ...]:
    return tuple(preprocess(image, PixelBudget(3136, 37632)) for image in images())


def prompt_ids() -> Tensor:
    tokenizer = PromptTokenizer.from_file(folder() / "tokenizer.json")
    return torch.tensor(tokenizer.encode(CASE.question, [page.num_tokens for page in patched()]))


def reference_inputs() -> dict[str, Tensor]:
    ids = prompt_ids()[None]
    pixels = reference_pixels()
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": (ids == models()[1].spec.image_token_id).long(),
        "pixel_values": pixels["pixel_values"],
        "image_grid_thw": pixels["image_grid_thw"],
    }


def test_prompt_token_ids() -> None:
    text = render(CASE.question, len(images()))
    for page in patched():
        text = text.replace("<|image_pad|>", "\0" * page.num_tokens, 1)
    expected = AutoTokenizer.from_pretrained(folder())(
        text.replace("\0", "<|image_pad|>"), add_special_tokens=False
    )["input_ids"]
    assert prompt_ids().tolist() == expected


def test_chat_template_renders_the_prompt() -> None:
    text = render(CASE.question, 2)
    system, user = text.partition("<|im_start|>user\n")[::2]
    parts: list[dict[str, str]] = []
    for piece in user.partition("<|im_end|>")[0].split(
        "<|vision_start|><|image_pad|><|vision_end|>"
    ):
        parts += [{"type": "text", "text": piece}, {"type": "image"}]
    system_text = system.removeprefix("<|im_start|>system\n").removesuffix("<|im_end|>\n")
    messages = [
        {"role": "system", "content": [{"type": "text", "text": system_text}]},
        {"role": "user", "content": parts[:-2]},
    ]
    tokenizer = AutoTokenizer.from_pretrained(folder())
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == text


@pytest.mark.parametrize("name", ["]</", "><", ">["])
def test_tags_merge_as_in_the_real_tokenizer(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder())
    pieces = tokenizer.tokenize("</think><answer>[2, 10]</answer>")
    assert name in pieces and "10" not in pieces


def test_pixels_and_grids() -> None:
    reference = reference_pixels()
    found = torch.cat([page.pixel_values for page in patched()])
    assert torch.equal(found, reference["pixel_values"])
    assert [list(page.grid) for page in patched()] == reference["image_grid_thw"].tolist()


@torch.no_grad()
def test_vision_embeddings() -> None:
    hf, ours = models()
    reference = reference_pixels()
    expected = hf.model.get_image_features(
        reference["pixel_values"], reference["image_grid_thw"]
    ).pooler_output
    for page, embeddings in zip(patched(), expected, strict=True):
        found = ours.visual(page.pixel_values, page.grid)
        assert (found - embeddings).abs().max() <= TOLERANCE


@torch.no_grad()
def test_logits_and_greedy_tokens() -> None:
    hf, ours = models()
    inputs = reference_inputs()
    ids, grids = prompt_ids(), [page.grid for page in patched()]
    positions, following = mrope_positions(ids, grids, ours.spec)
    embeds = embed_prompt(ours, ids, [ours.visual(p.pixel_values, p.grid) for p in patched()])
    arena = ours.new_arena(len(ids) + NEW_TOKENS)
    logits = prefill(ours, embeds, positions, arena, all_logits=True)
    assert (logits - hf(**inputs).logits[0]).abs().max() <= TOLERANCE

    token, found = logits[-1].argmax(), []
    for position in range(following, following + NEW_TOKENS):
        found.append(int(token))
        step = decode_step(ours, token.view(1, 1), torch.tensor([[position]]), [arena])
        token = step[0, 0].argmax()
    generated = hf.generate(**inputs, do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=-1)
    assert found == generated[0, len(ids) :].tolist()
