"""Which of our storage formats becomes which quantization of a TensorRT-LLM checkpoint.

For target ``engine``; target ``llm-api`` has int4 and fp8 (:mod:`mmr5_export.trtllm.unified`):

========================== =================== ==================================================
ours, all decoder linears  ``quant_algo``      what lies beside ``weight`` and, for qkv, ``bias``
========================== =================== ==================================================
int4, symmetric, group 128 W4A16_AWQ           ``weights_scaling_factor`` [N, K/128] fp32,
                                               ``prequant_scaling_factor`` [K], all ones
int8 with int8 activations W8A8_SQ_PER_CHANNEL ``weights_scaling_factor`` [N] fp32,
                                               ``activation_scaling_factor`` [1] fp32,
                                               ``prequant_scaling_factor`` [K], all ones
fp8                        FP8                 ``weights_scaling_factor`` and
                                               ``activation_scaling_factor``, [1] fp32
dense                      null                nothing
========================== =================== ==================================================

A factor on the inputs is one because our smoothing (AWQ, SmoothQuant) is folded into the norms and
linears before; GPTQ has none. W4A16_AWQ is so the name of a layout here, whatever found the codes.

W8A8_SQ_PER_CHANNEL and FP8 multiply activations by one scale per linear, fixed by calibration,
where our own kernels scale every token: the largest input that calibration met is what it reaches.

Everything else is refused, and so is what ModelOpt can write but nobody compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from mmr5_export.options import OptionError
from mmr5_export.trtllm.naming import TrtLinear, trt_linears
from mmr5_kernels.layout import FP8, GROUP_SIZE, INT8, Format
from mmr5_runtime.spec import ModelSpec, decoder_linear_shapes

_ENGINE, _API = "engine", "llm-api"
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}
# ModelOpt fills the vocabulary of an int4 model up to a multiple of this, with rows of zeros.
_VOCABULARY_MULTIPLE = 64

Layout = dict[str, tuple[tuple[int, ...], torch.dtype]]


@dataclass(frozen=True)
class QuantAlgo:
    """One quantization of TensorRT-LLM; ``name`` None leaves the model in 16 bits.

    ``codes`` is the dtype of the stored weight, None for the model's own; ``group_size`` columns
    share a scale. ``per_row`` says that every row has scales of its own; ``prequant`` that inputs
    have a factor by column; ``static_inputs`` that activations have one fixed scale.
    """

    name: str | None
    codes: torch.dtype | None = None
    group_size: int | None = None
    per_row: bool = False
    prequant: bool = False
    static_inputs: bool = False

    def tensors(self, linear: TrtLinear, dtype: torch.dtype) -> Layout:
        """Shape and dtype of every tensor of a linear by suffix; ``dtype`` is the model's."""
        rows, columns = linear.shape
        found: Layout = {"weight": ((rows, columns), self.codes or dtype)}
        if self.group_size:
            found["weight"] = ((rows // 2, columns), torch.int8)
            scales: tuple[int, ...] = (rows, columns // self.group_size)
        else:
            scales = (rows,) if self.per_row else (1,)
        if self.name is not None:
            found["weights_scaling_factor"] = (scales, torch.float32)
        if self.static_inputs:
            found["activation_scaling_factor"] = ((1,), torch.float32)
        if self.prequant:
            found["prequant_scaling_factor"] = ((columns,), dtype)
        if linear.has_bias:
            found["bias"] = ((rows,), dtype)
        return found

    def to_json(self) -> dict[str, Any]:
        """The ``quantization`` of ``config.json``."""
        found: dict[str, Any] = {"quant_algo": self.name, "kv_cache_quant_algo": None}
        if self.group_size:
            found |= {"group_size": self.group_size, "has_zero_point": False}
            found["pre_quant_scale"] = True
        return found | ({} if self.name is None else {"exclude_modules": ["lm_head"]})


NONE = QuantAlgo(None)
W4A16_AWQ = QuantAlgo("W4A16_AWQ", torch.int8, group_size=GROUP_SIZE, per_row=True, prequant=True)
W8A8_SQ = QuantAlgo(
    "W8A8_SQ_PER_CHANNEL", torch.int8, per_row=True, prequant=True, static_inputs=True
)
FP8_TENSOR = QuantAlgo("FP8", torch.float8_e4m3fn, static_inputs=True)


def require_supported(
    spec: ModelSpec,
    formats: Mapping[str, Format],
    *,
    calibrated: bool,
    original: bool,
    dtype: str = "float16",
) -> QuantAlgo:
    """The quantization that an engine with ``formats`` becomes.

    ``calibrated`` says that the largest inputs are (or will be) known, ``original`` that the dense
    checkpoint is at hand, ``dtype`` what the 16-bit parts are to be.

    Raises :class:`OptionError` with the reason for everything that cannot become a TensorRT-LLM
    checkpoint, or of which nobody checked that it can.
    """
    if dtype not in DTYPES:
        raise _refused(
            _ENGINE, f"the dtype {dtype!r} is unknown to it", f"pass {' or '.join(DTYPES)}"
        )
    if spec.text.tie_word_embeddings:
        raise _refused(
            _ENGINE,
            "this model uses one table as embedding and head, and only models with two were "
            "checked",
            "use --trt-target llm-api or onnx",
        )
    algo = _algo(_only_format(spec, formats, _ENGINE))
    if algo.group_size:
        _check_int4_shapes({each.name: each.shape for each in trt_linears(spec)}, _ENGINE)
        _check_vocabulary(spec)
    if algo.static_inputs and not calibrated:
        raise _refused(
            _ENGINE,
            f"{algo.name} needs the largest input of every linear, and nothing was calibrated",
            "pass --calib-data, or use int4 or bf16",
        )
    if algo is FP8_TENSOR and not original:
        raise _refused(
            _ENGINE,
            "FP8 has one scale per weight, which can only be found in the unquantized checkpoint, "
            "and this one came quantized",
            "export from the original checkpoint",
        )
    return algo


def refuse_for_api(spec: ModelSpec, formats: Mapping[str, Format]) -> Format:
    """The one format of all decoder linears of an engine that the LLM API can have.

    Raises :class:`OptionError` for linears that are dense, stored in several ways, with zero
    points, in groups of another size than 128, of a shape that pairs of rows do not fit, or that
    its PyTorch backend has no kernel for.
    """
    format = _only_format(spec, formats, _API)
    if format is None:
        raise _refused(
            _API,
            "it is for quantized weights, and bf16 is what TensorRT-LLM reads from the checkpoint "
            "itself",
            "pass --quant int4 or fp8, or leave the target out",
        )
    if format.weights == "int8":
        raise _refused(
            _API,
            f"the PyTorch backend has no kernel for {format.name}",
            "pass --quant int4 or fp8, or --trt-target engine",
        )
    if format.weights == "int4":
        _check_int4(format, _API)
        _check_int4_shapes(decoder_linear_shapes(spec), _API)
    return format


def _only_format(spec: ModelSpec, formats: Mapping[str, Format], target: str) -> Format | None:
    """The format of all decoder linears."""
    kinds: dict[Format | None, str] = {}
    for name in decoder_linear_shapes(spec):
        kinds.setdefault(formats.get(name), name)
    if len(kinds) > 1:
        named = " and ".join(f"{_name(kind)} ({name})" for kind, name in kinds.items())
        raise _refused(
            target,
            f"all linears of the decoder have to be stored alike, and they are {named}",
            "pass --quant int4 or fp8 without rules for single layers",
        )
    return next(iter(kinds))


def _algo(format: Format | None) -> QuantAlgo:
    if format is None:
        return NONE
    if format.weights == "int4":
        _check_int4(format, _ENGINE)
        return W4A16_AWQ
    if format.activations is None:
        raise _refused(
            _ENGINE,
            "weight-only int8 was not compared with what ModelOpt writes",
            "use --quant int8, int4 or bf16",
        )
    return {INT8.weights: W8A8_SQ, FP8.weights: FP8_TENSOR}[format.weights]


def _check_int4(format: Format, target: str) -> None:
    if not format.symmetric:
        raise _refused(
            target,
            "W4A16_AWQ has no zero points, and this int4 is asymmetric",
            "leave --asym out, or export from the original bf16 checkpoint",
        )
    if format.group_size != GROUP_SIZE:
        raise _refused(
            target,
            f"only groups of {GROUP_SIZE} columns were checked, and this int4 has groups of "
            f"{format.group_size}",
            f"pass --group-size {GROUP_SIZE}",
        )


def _check_int4_shapes(shapes: Mapping[str, tuple[int, int]], target: str) -> None:
    for name, (rows, columns) in shapes.items():
        if columns % GROUP_SIZE or rows % 2:
            raise _refused(
                target,
                f"{name} is {rows} x {columns}, which groups of {GROUP_SIZE} columns and pairs of "
                "rows do not fit",
                "use --quant fp8",
            )


def _check_vocabulary(spec: ModelSpec) -> None:
    if spec.text.vocab_size % _VOCABULARY_MULTIPLE:
        raise _refused(
            _ENGINE,
            f"W4A16_AWQ wants a vocabulary in multiples of {_VOCABULARY_MULTIPLE}, and tokens "
            f"added to the {spec.text.vocab_size} of this model could be chosen",
            "use --quant int8, fp8 or bf16",
        )


def _name(format: Format | None) -> str:
    return "bf16" if format is None else format.name


def _refused(target: str, reason: str, remedy: str) -> OptionError:
    return OptionError(f"--trt-target {target} cannot take this: {reason}; {remedy}.")
