"""A tiny decoder for comparisons with ModelOpt, and finished engines made of given tensors.

Its weights come from integer arithmetic and not from a random generator, so that they are the same
in every version of torch: golden files hold what ModelOpt made of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from zlib import crc32

import torch
from torch import Tensor

from mmr5_export.finished import FinishedEngine
from mmr5_kernels.layout import Format
from mmr5_runtime.manifest import (
    ImageSettings,
    Manifest,
    PixelRange,
    Quant,
    Source,
    TemplateRef,
)
from mmr5_runtime.spec import ModelSpec, TextSpec, VisionSpec, decoder_linear_shapes, tensor_shapes

VOCABULARY = 64  # the least that int4 takes


def tiny_spec(layers: int, tied: bool = False) -> ModelSpec:
    """128 wide, two heads over one kv head, MLP of 256; the tower is there for form's sake."""
    return ModelSpec(
        vision=VisionSpec(
            depth=1,
            hidden_size=32,
            num_heads=2,
            intermediate_size=48,
            out_hidden_size=128,
            patch_size=14,
            temporal_patch_size=2,
            spatial_merge_size=2,
            window_size=56,
            fullatt_block_indexes=(0,),
        ),
        text=TextSpec(
            vocab_size=VOCABULARY,
            hidden_size=128,
            num_layers=layers,
            num_heads=2,
            num_kv_heads=1,
            head_dim=64,
            intermediate_size=256,
            rms_norm_eps=1e-6,
            rope_theta=1000000.0,
            mrope_section=(8, 12, 12),
            max_position_embeddings=2048,
            tie_word_embeddings=tied,
        ),
        image_token_id=1,
        vision_start_token_id=2,
        vision_end_token_id=3,
        eos_token_ids=(4,),
        pad_token_id=5,
    )


def dense_decoder(spec: ModelSpec) -> dict[str, Tensor]:
    """Every tensor of the decoder by canonical name, bf16: within 1/8, norms around 1.

    Each has a range of its own, since ranges decide scales and some linears share one.
    """
    shapes = tensor_shapes(spec)
    return {name: _values(name, shapes[name]) for name in shapes if not name.startswith("visual.")}


def _values(name: str, shape: tuple[int, ...]) -> Tensor:
    seed = crc32(name.encode())
    bits = torch.arange(torch.Size(shape).numel(), dtype=torch.int64) + seed
    for _ in range(2):
        bits = ((bits ^ (bits >> 16)) * 0x45D9F3B) & 0xFFFFFFFF
    values = ((bits >> 8).double() / 2**24 - 0.5) / (4 + seed % 13)
    return (values + (1 if name.endswith("norm.weight") else 0)).view(shape).to(torch.bfloat16)


@dataclass(frozen=True)
class GivenEngine(FinishedEngine):
    """An engine whose stored tensors are given instead of lying in a folder."""

    tensors: Mapping[str, Tensor] = field(default_factory=dict)

    def get(self, name: str) -> Tensor:
        return self.tensors[name]


def given_engine(
    spec: ModelSpec,
    formats: Mapping[str, Format],
    tensors: Mapping[str, Tensor],
    original: Callable[[str], Tensor] | None = None,
    input_absmax: Mapping[str, float] | None = None,
) -> GivenEngine:
    """The engine with these tensors; everything its manifest says beside is made up."""
    manifest = Manifest(
        created_by={},
        source=Source("tiny", None, {}),
        spec=spec,
        quant=Quant("given", "rtn", dict(formats)),
        template=TemplateRef("none", ""),
        pixel_budget=PixelRange(1, 1),
        image=ImageSettings((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), 14, 2, 2),
        files={},
        tensors={},
        report={},
    )
    return GivenEngine(Path(), manifest, original, dict(input_absmax or {}), dict(tensors))


def all_linears(spec: ModelSpec, format: Format) -> dict[str, Format]:
    """One format for every decoder linear."""
    return dict.fromkeys(decoder_linear_shapes(spec), format)
