"""Writes a quantized model as an ordinary Hugging Face folder, in compressed-tensors form.

transformers, vLLM and SGLang read the folder with their own loaders; so does
:mod:`mmr5_export.prequantized`, which gives back the very codes and scales. Quantized are the
linears of the decoder layers. The vision tower, the embeddings and the head are bf16: readers take
a quantized head or tower in few of their versions, and some of them name its linears otherwise.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmr5_export.checkpoint import Checkpoint, read_json
from mmr5_export.convert import exact_scale, from_engine, to_pack_quantized
from mmr5_export.plan import MAX_FILE_BYTES, Stored
from mmr5_export.prequantized import QuantizedCheckpoint
from mmr5_export.write import TensorWriter, partial_folder
from mmr5_kernels.layout import Format
from mmr5_runtime.spec import ModelSpec, decoder_linear_shapes, tensor_shapes
from mmr5_runtime.types import CheckpointError, ExportError

TARGETS = ("transformers", "vllm", "sglang", "tensorrt-llm")

# Never quantized here. A regular expression for the tower, since readers nest and name it in
# different ways, and an exact name that misses makes them take bf16 weights for packed ones.
_IGNORE = ("lm_head", "re:.*visual.*")
_COPIED = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
    "chat_template.jinja",
)


@dataclass(frozen=True)
class _Scheme:
    """What compressed-tensors calls a format: where it stores weights, and its two arguments."""

    layout: str
    weights: Mapping[str, Any]
    activations: Mapping[str, Any] | None


def check_target(formats: Mapping[str, Format], target: str) -> None:
    """Refuses a written checkpoint for a reader that is known to fail on it or to misread it.

    Raises :class:`ExportError` with the reason; ``target`` is one of ``TARGETS``.
    """
    if target not in TARGETS:
        raise ExportError(f"target {target!r} is unknown; choose one of {', '.join(TARGETS)}.")
    if target != "tensorrt-llm":
        return
    for linear, format in _written(formats).items():
        if format.weights == "int8" and format.activations:
            raise ExportError(
                f"{linear} is {format.name}, and TensorRT-LLM takes 8-bit compressed-tensors "
                "weights for fp8 without looking at their type; export with --quant fp8 for it."
            )
        if format.weights != "fp8":
            raise ExportError(
                f"{linear} is {format.name}, which TensorRT-LLM does not read from "
                "compressed-tensors; export with --quant fp8 for it."
            )


def write_checkpoint(
    folder: Path,
    source: Checkpoint | QuantizedCheckpoint,
    formats: Mapping[str, Format],
    parts: Callable[[str], dict[str, Tensor]],
    dense: Callable[[str], Tensor],
    max_file_bytes: int = MAX_FILE_BYTES,
) -> None:
    """Writes ``folder``, which appears complete or not at all; one linear is in memory at a time.

    ``formats`` may hold the head and the tower, but they are written dense. ``parts(linear)`` are
    the stored tensors of a decoder linear as ``Format.tensors`` lists them; ``dense(name)`` is any
    other tensor of the model by canonical name, [shape of the dense checkpoint], any float dtype,
    written as bf16. Config, tokenizer and processor come from ``source``.

    Raises :class:`ExportError` when the folder is there already, and :class:`CheckpointError` for
    scales that bf16, the dtype readers give them, does not hold, and for a source whose head or
    tower is quantized already.
    """
    if folder.exists():
        raise ExportError(f"{folder} exists already; choose another folder for the checkpoint.")
    if isinstance(source, QuantizedCheckpoint) and (
        lost := source.formats.keys() - _written(source.formats).keys()
    ):
        raise CheckpointError(
            f"{min(lost)} of the source is quantized, but head and tower are written as bf16, "
            "which it no longer has; export without --checkpoint-out."
        )
    formats = _written(formats)
    stored = _plan(source.spec, formats, max_file_bytes)
    with partial_folder(folder) as made:
        for name in _COPIED:
            if (source.folder / name).is_file():
                shutil.copyfile(source.folder / name, made / name)
        config = _config(read_json(source.folder / "config.json"), source.spec, formats)
        _write_json(made / "config.json", config)
        if len({tensor.file for tensor in stored}) > 1:
            _write_json(made / "model.safetensors.index.json", _index(stored))
        with TensorWriter(made, stored) as writer:
            for name in tensor_shapes(source.spec):
                linear, _, suffix = name.rpartition(".")
                if suffix == "weight" and linear in formats:
                    for part, tensor in _file_parts(linear, formats[linear], parts).items():
                        writer.write(f"{linear}.{part}", tensor)
                else:
                    writer.write(name, dense(name).to(device="cpu", dtype=torch.bfloat16))
            writer.finish()


def quantization_config(spec: ModelSpec, formats: Mapping[str, Format]) -> dict[str, Any]:
    """The ``quantization_config`` that describes decoder linears stored as ``formats`` says.

    When all of them have one format its group targets every Linear, which every reader knows.
    Otherwise there is a group per format that names its linears by regular expressions, which fit
    the names of all readers, and linears left dense are ignored by such expressions too.
    """
    formats = _written(formats)
    linears = decoder_linear_shapes(spec)
    chosen = list(dict.fromkeys(formats.values()))
    schemes = [_scheme(format) for format in chosen]
    layouts = {scheme.layout for scheme in schemes}
    uniform = len(chosen) == 1 and len(formats) == len(linears)
    groups = {}
    for number, (format, scheme) in enumerate(zip(chosen, schemes, strict=True)):
        members = [name for name in linears if formats.get(name) == format]
        groups[f"group_{number}"] = {
            "targets": ["Linear"] if uniform else _patterns(members, spec.text.num_layers),
            "weights": scheme.weights,
            "input_activations": scheme.activations,
            "output_activations": None,
            "format": scheme.layout,
        }
    left_dense = [name for name in linears if name not in formats]
    return {
        "quant_method": "compressed-tensors",
        "format": layouts.pop() if len(layouts) == 1 else "mixed-precision",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [*_IGNORE, *_patterns(left_dense, spec.text.num_layers)],
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
    }


def _written(formats: Mapping[str, Format]) -> dict[str, Format]:
    return {name: format for name, format in formats.items() if name.startswith("model.layers.")}


def _scheme(format: Format) -> _Scheme:
    kind = "float" if format.weights == "fp8" else "int"
    weights = {
        "num_bits": 4 if format.weights == "int4" else 8,
        "type": kind,
        "symmetric": format.symmetric,
        "strategy": "group" if format.group_size else "channel",
        "group_size": format.group_size,
        "dynamic": False,
    }
    if not format.activations:
        return _Scheme("pack-quantized", weights, None)
    activations = {
        "num_bits": 8,
        "type": kind,
        "symmetric": True,
        "strategy": "token",
        "dynamic": True,
    }
    return _Scheme(f"{kind}-quantized", weights, activations)


def _patterns(linears: list[str], num_layers: int) -> list[str]:
    """Regular expressions that match just ``linears``, under any prefix: one per projection."""
    layers: dict[str, list[str]] = {}
    for name in linears:
        _, _, layer, projection = name.split(".", 3)
        layers.setdefault(projection, []).append(layer)
    return [
        rf"re:.*layers\.{_numbers(found, num_layers)}\.{projection.replace('.', chr(92) + '.')}$"
        for projection, found in layers.items()
    ]


def _numbers(layers: list[str], num_layers: int) -> str:
    return r"\d+" if len(layers) == num_layers else f"({'|'.join(layers)})"


def _plan(spec: ModelSpec, formats: Mapping[str, Format], max_file_bytes: int) -> list[Stored]:
    """Every tensor to write, in order, with files named as readers expect them."""
    linears = decoder_linear_shapes(spec)
    tensors: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for name, shape in tensor_shapes(spec).items():
        linear, _, suffix = name.rpartition(".")
        if suffix == "weight" and linear in formats:
            listed = _file_shapes(formats[linear], *linears[linear])
            tensors |= {f"{linear}.{part}": found for part, found in listed.items()}
        else:
            tensors[name] = shape, torch.bfloat16
    sized = [Stored(name, dtype, shape, "") for name, (shape, dtype) in tensors.items()]
    numbers, filled = [0], 0
    for tensor in sized:
        full = filled and filled + tensor.num_bytes > max_file_bytes
        filled = tensor.num_bytes + (0 if full else filled)
        numbers.append(numbers[-1] + bool(full))
    count = numbers[-1] + 1
    files = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
    files = files if count > 1 else ["model.safetensors"]
    return [
        Stored(tensor.name, tensor.dtype, tensor.shape, files[number])
        for tensor, number in zip(sized, numbers[1:], strict=True)
    ]


def _file_shapes(
    format: Format, rows: int, columns: int
) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Shape and dtype of the tensors a linear [N, K] has in the files."""
    grid = (rows, format.groups(columns))
    if format.activations:
        dtype = torch.int8 if format.weights == "int8" else torch.float8_e4m3fn
        return {"weight": ((rows, columns), dtype), "weight_scale": (grid, torch.bfloat16)}
    per_word = 8 if format.weights == "int4" else 4
    zero = {"weight_zero_point": ((-(-rows // per_word), grid[1]), torch.int32)}
    return {
        "weight_packed": ((rows, -(-columns // per_word)), torch.int32),
        "weight_scale": (grid, torch.bfloat16),
        "weight_shape": ((2,), torch.int64),
        **({} if format.symmetric else zero),
    }


def _file_parts(
    linear: str, format: Format, parts: Callable[[str], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """An engine's tensors of a linear as the files have them."""
    found = {suffix: part.cpu() for suffix, part in parts(linear).items()}
    try:
        scale = exact_scale(found["weight_scale"], torch.bfloat16)
    except ValueError as error:
        reason = str(error).rstrip(".")
        raise CheckpointError(
            f"{linear} cannot be written for other readers, which keep scales as bf16 ({reason}); "
            "export without --checkpoint-out, or from the original bf16 checkpoint."
        ) from error
    if format.activations:
        return {"weight": found["weight"], "weight_scale": scale}
    return to_pack_quantized(from_engine(format, {**found, "weight_scale": scale}))


def _config(
    config: dict[str, Any], spec: ModelSpec, formats: Mapping[str, Format]
) -> dict[str, Any]:
    """``config.json`` of the source, with the dtype and the quantization that are written."""
    made = {key: value for key, value in config.items() if key != "quantization_config"}
    for block in (made, *(made.get(key) for key in ("text_config", "vision_config"))):
        for key in ("dtype", "torch_dtype"):
            if isinstance(block, dict) and key in block:
                block[key] = "bfloat16"
    if "dtype" not in made:
        made["torch_dtype"] = "bfloat16"
    if formats:
        made["quantization_config"] = quantization_config(spec, formats)
    return made


def _index(stored: list[Stored]) -> dict[str, Any]:
    return {
        "metadata": {"total_size": sum(tensor.num_bytes for tensor in stored)},
        "weight_map": {tensor.name: tensor.file for tensor in stored},
    }


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
