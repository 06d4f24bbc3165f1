"""The whole pipeline against transformers: reference prompt, PIL processor, ``generate``.

The source checkpoint is bf16, so a bf16 export loses nothing and both sides compute in fp32 with
the same weights.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from helpers.exporting import quick_export
from mmr5_runtime import Reranker
from mmr5_runtime.image import smart_resize
from mmr5_runtime.prompt import PromptTokenizer, render

QUESTION = "Where is the table {on} exports?"
SIZES = [(61, 90), (200, 57), (131, 131)]


def _pages() -> list[Image.Image]:
    rng = np.random.default_rng(5)
    return [
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        for width, height in SIZES
    ]


def _reference(checkpoint: Path, pages: list[Image.Image], penalty: float) -> list[int]:
    """Token ids that transformers generates for the reference prompt."""
    processor = Qwen2VLImageProcessorPil.from_pretrained(checkpoint)
    loaded = []  # the reference's page loader resizes before the processor does
    for page in pages:
        height, width = smart_resize(page.height, page.width)
        loaded.append(page.resize((width, height), Image.Resampling.BICUBIC))
    images = processor(loaded, return_tensors="pt")
    text = render(QUESTION, len(pages))
    for grid in images["image_grid_thw"]:
        count = int(grid.prod()) // 4
        text = text.replace("<|image_pad|>", "<pad>" * count, 1)
    text = text.replace("<pad>", "<|image_pad|>")
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
    model = Qwen2_5_VLForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32)
    out = model.eval().generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == model.config.image_token_id).long(),
        pixel_values=images["pixel_values"],
        image_grid_thw=images["image_grid_thw"],
        do_sample=False,
        max_new_tokens=64,
        repetition_penalty=penalty,
    )
    generated: list[int] = out[0, ids.shape[1] :].tolist()
    return generated


@pytest.mark.parametrize("penalty", [1.0, 1.05])
def test_same_text_as_generate(tiny_checkpoint: Path, tmp_path: Path, penalty: float) -> None:
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint, checkpoint)
    settings = json.loads((checkpoint / "generation_config.json").read_text())
    settings["repetition_penalty"] = penalty  # the published checkpoint has 1.05
    (checkpoint / "generation_config.json").write_text(json.dumps(settings))
    quick_export(str(checkpoint), "bf16", tmp_path / "engine")

    with Reranker.load(tmp_path / "engine", "cpu", dtype="float32") as reranker:
        result = reranker.rerank(QUESTION, _pages(), max_new_tokens=64, stop="eos", constrain=False)
    tokenizer = PromptTokenizer.from_file(tmp_path / "engine" / "tokenizer.json")
    expected = _reference(checkpoint, _pages(), penalty)
    assert result.text == tokenizer.decode(expected)
    assert result.usage.completion_tokens == len(expected)
    assert len(expected) == 64 or result.stop_reason == "eos"
