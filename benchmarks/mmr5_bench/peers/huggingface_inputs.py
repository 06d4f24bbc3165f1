"""What ``generate`` is given for a question over pages: the reference's steps, by transformers.

The Pillow image processor is used on purpose, also where torchvision is installed: the checkpoint
was evaluated with it, and its pixels are those of every other contender bit for bit.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mmr5_bench.peers.base import Setting
from mmr5_bench.peers.prompts import message_parts
from mmr5_bench.random_weights.shapes import PREPROCESSOR, config_of, first_special_id
from mmr5_bench.random_weights.tokens import WHOLE_WORDS, padded_tokenizer_json
from mmr5_runtime.image import smart_resize
from mmr5_runtime.prompt import render

Inputs = dict[str, Tensor]
"""``input_ids``, ``attention_mask``, ``mm_token_type_ids`` [1, T] int64, ``pixel_values``
[P, patch_dim] float32, ``image_grid_thw`` [N, 3] int64; on the CPU."""

_PAD = "<|image_pad|>"


@dataclass(frozen=True)
class InputReader:
    """Tokenizer and image processor of a checkpoint; ``chat`` where it has a chat template."""

    tokenizer: Any
    processor: Any
    image_token_id: int
    chat: bool

    def decode(self, pages: Sequence[bytes]) -> list[Image.Image]:
        """RGB images of the files, as the reference's page loader opens them."""
        return [Image.open(io.BytesIO(page)).convert("RGB") for page in pages]

    def prepare(self, question: str, images: Sequence[Image.Image]) -> Inputs:
        """Both resizes, pixel values, and the prompt with a pad per visual token."""
        loaded = []
        for image in images:
            height, width = smart_resize(image.height, image.width)
            loaded.append(image.resize((width, height), Image.Resampling.BICUBIC))
        pixels = self.processor(loaded, return_tensors="pt")
        grids = pixels["image_grid_thw"]
        unit = self.processor.merge_size**2
        pieces = self._text(question, len(images)).split(_PAD)
        counts = [int(grid.prod()) // unit for grid in grids]
        text = pieces[0] + "".join(
            _PAD * count + piece for count, piece in zip(counts, pieces[1:], strict=True)
        )
        ids = self.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": (ids == self.image_token_id).long(),
            "pixel_values": pixels["pixel_values"],
            "image_grid_thw": grids,
        }

    def _text(self, question: str, num_pages: int) -> str:
        """The prompt with one pad per page."""
        if not self.chat:  # a random model has no files, so no template either
            return render(question, num_pages)
        system, texts = message_parts(question, num_pages)
        content: list[dict[str, str]] = []
        for text in texts:
            content += [{"type": "text", "text": text}, {"type": "image"}]
        messages = [
            {"role": "system", "content": [{"type": "text", "text": system}]},
            {"role": "user", "content": content},
        ]
        made: str = self.tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=True
        )
        return made


def open_inputs(setting: Setting) -> InputReader:
    """Of the setting's checkpoint, or of its random model; raises as transformers does."""
    from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
        Qwen2VLImageProcessorPil,
    )

    if setting.random is not None:
        from tokenizers import Tokenizer

        text = padded_tokenizer_json(first_special_id(setting.random), WHOLE_WORDS)
        settings = {k: v for k, v in PREPROCESSOR.items() if k != "image_processor_type"}
        return InputReader(
            PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(text)),
            Qwen2VLImageProcessorPil(**settings),
            config_of(setting.random)["image_token_id"],
            chat=False,
        )
    return InputReader(
        AutoTokenizer.from_pretrained(setting.checkpoint),
        Qwen2VLImageProcessorPil.from_pretrained(setting.checkpoint),
        AutoConfig.from_pretrained(setting.checkpoint).image_token_id,
        chat=True,
    )
