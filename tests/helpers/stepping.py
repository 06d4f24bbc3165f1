"""Small decoders whose steps run on the Triton kernels, in the interpreter or on a GPU."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mmr5_bench.random_weights.tensors import RandomTensors
from mmr5_kernels.layout import INT4, INT8, INT8_WEIGHT_ONLY, Format
from mmr5_kernels.target import INTERPRETED, Target
from mmr5_runtime.capacity import KVFormat
from mmr5_runtime.compute import Compute
from mmr5_runtime.engine import Engine
from mmr5_runtime.kvcache import KVArena
from mmr5_runtime.model import Model, embed_prompt, native_model, prefill
from mmr5_runtime.spec import ModelSpec, TextSpec, VisionSpec, linear_shapes

CPU = torch.device("cpu")
VISION = VisionSpec(1, 32, 2, 32, 128, 4, 2, 2, 16, (0,))
SMALL = TextSpec(64, 128, 2, 2, 1, 64, 128, 1e-6, 1e4, (8, 12, 12), 1024, False)
ONE_LAYER = replace(SMALL, num_layers=1)
WIDE_7B = TextSpec(64, 3584, 2, 28, 4, 128, 18944, 1e-6, 1e6, (16, 24, 24), 1024, False)
FORMATS: Mapping[str, Format | None] = {
    "bf16": None, "int4": INT4, "int4-asym": replace(INT4, symmetric=False),
    "int8": INT8, "int8-weight-only": INT8_WEIGHT_ONLY,
    "int4-fp16": replace(INT4, scale="fp16"),
}  # fmt: skip


def spec_of(text: TextSpec) -> ModelSpec:
    """A model around ``text`` with the smallest of vision towers."""
    vision = replace(VISION, out_hidden_size=text.hidden_size)
    return ModelSpec(vision, text, 60, 61, 62, (63,), 63)


def formats_of(spec: ModelSpec, quant: str) -> dict[str, Format]:
    """Every linear of the decoder as ``quant`` has it; the head of int4 in 8 bits."""
    format = FORMATS[quant]
    if format is None:
        return {}
    names = [name for name in linear_shapes(spec, {}) if name.startswith("model.layers.")]
    head = INT8_WEIGHT_ONLY if format.weights == "int4" else format
    return dict.fromkeys(names, format) | {"lm_head": head}


class Pair:
    """The same random model twice: ``fused`` steps on the kernels, ``plain`` steps in torch.

    Without ``linears`` the linears of the former are plain torch as well, which the interpreter
    takes a tenth of the time for.
    """

    def __init__(
        self,
        text: TextSpec,
        quant: str,
        kv: KVFormat = "bf16",
        target: Target = INTERPRETED,
        device: torch.device = CPU,
        graphs: bool = False,
        linears: bool = True,
    ) -> None:
        spec = spec_of(text)
        formats = formats_of(spec, quant)

        def model(target: Target) -> Model:
            tensors = RandomTensors(spec, formats, CPU)
            return Model.from_tensors(
                spec, tensors.get, formats, torch.bfloat16, device, target=target, kv=kv
            )

        def engine(model: Model, target: Target, graphs: bool) -> Engine:
            compute = Compute(device, torch.bfloat16, target, kv=kv, graphs=graphs)
            return Engine(model, device, compute)

        plain = Target(device.type)
        self.plain = engine(model(plain), plain, False)
        self.fused = engine(
            model(target) if linears else native_model(self.plain.model), target, graphs
        )


def read(engine: Engine, tokens: int, seed: int = 0, room: int = 16) -> KVArena:
    """An arena that holds a random prompt of text."""
    model = engine.model
    ids = random_ids(tokens, seed)
    arena = model.new_arena(tokens + room)
    with torch.inference_mode():
        embeds = embed_prompt(model, ids, [])
        prefill(model, embeds, torch.arange(tokens).expand(3, -1), arena)
    return arena


def random_ids(count: int, seed: int) -> Tensor:
    """Ids [count] int64 of text."""
    return torch.randint(0, 60, (count,), generator=torch.Generator().manual_seed(seed))


def copy(arena: KVArena, engine: Engine) -> KVArena:
    """Another arena with the same bits."""
    other = engine.model.new_arena(arena.capacity)
    other.load(*arena.view(0, arena.length))
    return other


def step(engine: Engine, ids: Tensor, arenas: Sequence[KVArena]) -> Tensor:
    """One step of ids [B, T] at the positions that come next; logits [B, T, V]."""
    starts = torch.tensor([arena.length for arena in arenas])[:, None]
    return engine.step(ids, starts + torch.arange(ids.shape[1]), arenas)
