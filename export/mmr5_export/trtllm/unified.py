"""A finished engine as a ModelOpt checkpoint in the Hugging Face layout, for the LLM API.

TensorRT-LLM's PyTorch backend reads this form of quantized weights, and not those of GPTQ or AWQ.
What was read off a checkpoint that ModelOpt 0.47.0 wrote of a small Qwen2.5-VL, and is written
here the same way (names are the classic ones, ``visual.*`` and ``model.layers.*``):

========================= ================= ======= ==============================================
W4A16_AWQ, per linear     shape             dtype
========================= ================= ======= ==============================================
``weight``                [N/2, K]          U8      codes of rows 2i (low nibble) and 2i + 1
``weight_scale``          [N, K/128]        F32     w = code * scale, codes -8..7
``pre_quant_scale``       [K]               BF16    of o_proj and down_proj: what their input is
                                                    multiplied by; here ones
FP8_PER_CHANNEL_PER_TOKEN
``weight``                [N, K]            F8_E4M3
``weight_scale``          [N]               F32
========================= ================= ======= ==============================================

The backend wants ``pre_quant_scale`` of every linear it does not fuse with others, which are those
two. GPTQ's codes are valid AWQ codes then: both are symmetric groups, AWQ with scaled columns.

Everything else is bf16: embeddings and norms as the engine has them, head and tower from the source
where the engine has them quantized.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmr5_export.checkpoint import read_json
from mmr5_export.finished import FinishedEngine
from mmr5_export.plan import MAX_FILE_BYTES, Stored
from mmr5_export.trtllm.bundle import write_json
from mmr5_export.trtllm.modelopt_formats import refuse_for_api
from mmr5_export.trtllm.pack import pack_rows
from mmr5_export.trtllm.refusals import refuse_lost
from mmr5_export.write import TensorWriter
from mmr5_kernels.layout import GROUP_SIZE, Format, unpack_int4
from mmr5_runtime.manifest import PixelRange
from mmr5_runtime.spec import ModelSpec, decoder_linear_shapes, tensor_shapes

QUANT_CONFIG_NAME = "hf_quant_config.json"
MODELOPT = {"name": "modelopt", "version": "0.47.0"}  # whose layout this is; readers look at it
# Never quantized. A pattern per way in which readers nest the tower.
EXCLUDED = ("lm_head", "model.embed_tokens", "model.visual*", "visual*")
_ALGORITHMS = {"int4": "W4A16_AWQ", "fp8": "FP8_PER_CHANNEL_PER_TOKEN"}
_WITH_INPUT_SCALE = ("o_proj", "down_proj")  # run alone: their input scale is not a norm's
_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.json",
    "chat_template.jinja",
)
_PROCESSORS = ("preprocessor_config.json", "processor_config.json")

Shapes = dict[str, tuple[tuple[int, ...], torch.dtype]]


def write_unified(
    engine: FinishedEngine, folder: Path, max_file_bytes: int = MAX_FILE_BYTES
) -> str:
    """Writes the checkpoint into ``folder``, which is made; one linear is in memory at a time.

    Returns ModelOpt's name of the quantization. Raises :class:`OptionError` for an engine that
    TensorRT-LLM cannot read in this form (see :func:`refuse_for_api`).
    """
    spec = engine.spec
    format = refuse_for_api(spec, engine.formats)
    refuse_lost(engine.formats, engine.original is not None, "llm-api")
    folder.mkdir(parents=True, exist_ok=True)
    for name in _COPIED:
        if (engine.folder / name).is_file():
            shutil.copyfile(engine.folder / name, folder / name)
    for name in _PROCESSORS:
        if (engine.folder / name).is_file():
            processor = read_json(engine.folder / name)
            write_json(folder / name, limited(processor, engine.manifest.pixel_budget))
    quantization = quant_config(format)
    write_json(folder / QUANT_CONFIG_NAME, quantization)
    config = read_json(engine.folder / "config.json")
    write_json(folder / "config.json", _config(config, quantization))
    stored = planned_tensors(spec, format, max_file_bytes)
    if len({tensor.file for tensor in stored}) > 1:
        write_json(folder / "model.safetensors.index.json", _index(stored))
    with TensorWriter(folder, stored) as writer:
        for name, tensor in _tensors(engine, format):
            writer.write(name, tensor)
        writer.finish()
    return _ALGORITHMS[format.weights]


def limited(config: Mapping[str, Any], budget: PixelRange) -> dict[str, Any]:
    """A processor's config, and the block of one that is nested in it, with this pixel budget.

    The checkpoint's own may let through larger pages than what memory is reserved for.
    ``config`` is that of either file that :func:`mmr5_export.processor.read_processor` reads.
    """
    made = dict(config)
    nested = made.get("image_processor")
    if isinstance(nested, dict):
        made["image_processor"] = limited(nested, budget)
        return made
    if isinstance(made.get("size"), dict):
        edges = {"shortest_edge": budget.min_pixels, "longest_edge": budget.max_pixels}
        made["size"] = {**made["size"], **edges}
    if any(key in made for key in ("image_mean", "min_pixels", "max_pixels")):
        made |= {"min_pixels": budget.min_pixels, "max_pixels": budget.max_pixels}
    return made


def quant_config(format: Format) -> dict[str, Any]:
    """``hf_quant_config.json`` for decoder linears of ``format``."""
    grouped = {"group_size": GROUP_SIZE, "has_zero_point": False, "pre_quant_scale": True}
    return {
        "producer": dict(MODELOPT),
        "quantization": {
            "quant_algo": _ALGORITHMS[format.weights],
            "kv_cache_quant_algo": None,
            **(grouped if format.weights == "int4" else {}),
            "exclude_modules": list(EXCLUDED),
        },
    }


def planned_tensors(
    spec: ModelSpec, format: Format, max_file_bytes: int = MAX_FILE_BYTES
) -> list[Stored]:
    """Every tensor of the checkpoint in order of writing, with files named as readers expect."""
    shapes = _shapes(spec, format)
    sized = [Stored(name, dtype, shape, "") for name, (shape, dtype) in shapes.items()]
    numbers, number, filled = [], 1, 0
    for tensor in sized:
        if filled and filled + tensor.num_bytes > max_file_bytes:
            number, filled = number + 1, 0
        filled += tensor.num_bytes
        numbers.append(number)

    def file(place: int) -> str:
        return f"model-{place:05}-of-{number:05}.safetensors" if number > 1 else "model.safetensors"

    return [
        Stored(tensor.name, tensor.dtype, tensor.shape, file(place))
        for tensor, place in zip(sized, numbers, strict=True)
    ]


def linear_shapes_in_file(linear: str, format: Format, rows: int, columns: int) -> Shapes:
    """Shape and dtype by suffix of what the checkpoint holds of a decoder linear [N, K]."""
    if format.weights == "fp8":
        return {
            "weight": ((rows, columns), torch.float8_e4m3fn),
            "weight_scale": ((rows,), torch.float32),
        }
    shapes: Shapes = {
        "weight": ((rows // 2, columns), torch.uint8),
        "weight_scale": ((rows, format.groups(columns)), torch.float32),
    }
    if linear.endswith(_WITH_INPUT_SCALE):
        shapes["pre_quant_scale"] = ((columns,), torch.bfloat16)
    return shapes


def linear_parts(linear: str, format: Format, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The checkpoint's tensors of a linear from the engine's, both by suffix.

    The codes stay what they are, and so do the scales: float32 holds every bf16 and fp16.
    """
    scale = stored["weight_scale"].to(torch.float32)
    if format.weights == "fp8":
        return {"weight": stored["weight"], "weight_scale": scale.flatten()}
    codes = unpack_int4(stored["weight_packed"])
    parts = {"weight": pack_rows(codes).view(torch.uint8), "weight_scale": scale}
    if linear.endswith(_WITH_INPUT_SCALE):
        parts["pre_quant_scale"] = torch.ones(codes.shape[1], dtype=torch.bfloat16)
    return parts


def _shapes(spec: ModelSpec, format: Format) -> Shapes:
    linears = decoder_linear_shapes(spec)
    shapes: Shapes = {}
    for name, shape in tensor_shapes(spec).items():
        linear, _, suffix = name.rpartition(".")
        if suffix == "weight" and linear in linears:
            found = linear_shapes_in_file(linear, format, *linears[linear])
            shapes |= {f"{linear}.{part}": planned for part, planned in found.items()}
        else:
            shapes[name] = shape, torch.bfloat16
    return shapes


def _tensors(engine: FinishedEngine, format: Format) -> Iterator[tuple[str, Tensor]]:
    linears = decoder_linear_shapes(engine.spec)
    suffixes = {linear: format.tensors(*shape) for linear, shape in linears.items()}
    for name in tensor_shapes(engine.spec):
        linear, _, suffix = name.rpartition(".")
        if suffix == "weight" and linear in linears:
            stored = {part: engine.get(f"{linear}.{part}") for part in suffixes[linear]}
            for part, tensor in linear_parts(linear, format, stored).items():
                yield f"{linear}.{part}", tensor
        else:
            yield name, dense(engine, name)


def dense(engine: FinishedEngine, name: str) -> Tensor:
    """A tensor of the head or the tower, or one that no linear has, in bf16 as the source has it.

    A linear that the engine keeps quantized comes from the source; so does a bias that the engine
    padded with it.
    """
    linear = name.rpartition(".")[0]
    if linear not in engine.formats or linear.startswith("model.layers."):
        return engine.get(name)
    assert engine.original is not None  # refuse_lost has been asked
    return engine.original(name).to(torch.bfloat16)


def _config(config: Mapping[str, Any], quantization: Mapping[str, Any]) -> dict[str, Any]:
    """``config.json`` of the source, with the dtype and the quantization that are written."""
    made = {key: value for key, value in config.items() if key != "quantization_config"}
    for key in ("text_config", "vision_config"):
        if isinstance(made.get(key), dict):
            made[key] = dict(made[key])
    for block in (made, made.get("text_config"), made.get("vision_config")):
        for key in ("dtype", "torch_dtype"):
            if isinstance(block, dict) and key in block:
                block[key] = "bfloat16"
    if "dtype" not in made:
        made["torch_dtype"] = "bfloat16"
    details = quantization["quantization"]
    made["quantization_config"] = {
        "ignore": details["exclude_modules"],
        "quant_algo": details["quant_algo"],
        "producer": dict(quantization["producer"]),
        "quant_method": "modelopt",
    }
    return made


def _index(stored: list[Stored]) -> dict[str, Any]:
    return {
        "metadata": {"total_size": sum(tensor.num_bytes for tensor in stored)},
        "weight_map": {tensor.name: tensor.file for tensor in stored},
    }
