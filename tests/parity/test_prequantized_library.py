"""Checkpoints that llmcompressor itself saves are read as transformers unpacks them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from helpers.inputs import hf_inputs, random_prompt
from mmr5_export.prequantized import open_quantized
from mmr5_kernels.layout import FP8, INT4, INT8, Format
from mmr5_kernels.reference import dequantize
from mmr5_runtime.spec import decoder_linear_shapes
from mmr5_runtime.types import CheckpointError

_REASON = "llmcompressor comes with the export extra"


def saved(source: Path, folder: Path, scheme: str) -> Path:
    """Rounds and saves the checkpoint with the library alone, which is imported only now."""
    llmcompressor = pytest.importorskip("llmcompressor", reason=_REASON)
    modifiers = pytest.importorskip("llmcompressor.modifiers.quantization", reason=_REASON)
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(source, dtype=torch.bfloat16)
    recipe = modifiers.QuantizationModifier(
        targets="Linear", scheme=scheme, ignore=["lm_head", "re:.*visual.*"]
    )
    llmcompressor.oneshot(model=hf, recipe=recipe, output_dir=str(folder))
    return folder


@pytest.mark.parametrize(
    ("scheme", "format"),
    [
        ("W4A16", INT4),
        ("W4A16_ASYM", Format("int4", 128, symmetric=False)),
        ("W8A16", Format("int8", 128)),
        ("W8A8", INT8),
        ("FP8_DYNAMIC", FP8),
    ],
)
@torch.no_grad()
def test_its_checkpoints_are_read_as_transformers_reads_them(
    tiny_checkpoint: Path, tmp_path: Path, scheme: str, format: Format
) -> None:
    folder = saved(tiny_checkpoint, tmp_path / scheme, scheme)
    opened = open_quantized(folder)
    assert opened.formats == dict.fromkeys(decoder_linear_shapes(opened.spec), format)
    # Its list of ignored modules is in the naming of the checkpoint, which its own loader does not
    # match; the expression does.
    config = folder / "config.json"
    text = config.read_text()
    start = text.index('"ignore": [') + len('"ignore": [')
    config.write_text(text[:start] + '"lm_head", "re:.*visual.*"' + text[text.index("]", start) :])
    hf = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.bfloat16)
    hf = torch.nn.Module.float(hf)  # the first pass then unpacks to fp32, where nothing is rounded
    hf(**hf_inputs(opened.spec, random_prompt(opened.spec, ()), [], ()))
    for linear in opened.formats:
        module = hf.get_submodule(linear.replace("model.layers", "model.language_model.layers"))
        found = dequantize(format, opened.parts(linear), torch.float32)
        assert torch.equal(found, module.weight), linear
    assert torch.equal(opened.read("lm_head.weight").float(), hf.lm_head.weight)


def test_scales_of_square_blocks_are_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    folder = saved(tiny_checkpoint, tmp_path / "block", "FP8_BLOCK")
    with pytest.raises(CheckpointError, match="weights.strategy block, where"):
        open_quantized(folder)
