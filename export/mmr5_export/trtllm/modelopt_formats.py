"""Which of our storage formats becomes which quantization of a TensorRT-LLM checkpoint.

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
from mmr5_kernels.layout import FP8, INT4, INT8, Format
from mmr5_runtime.spec import ModelSpec, decoder_linear_shapes

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
W4A16_AWQ = QuantAlgo("W4A16_AWQ", torch.int8, group_size=128, per_row=True, prequant=True)
W8A8_SQ = QuantAlgo(
    "W8A8_SQ_PER_CHANNEL", torch.int8, per_row=True, prequant=True, static_inputs=True
)
FP8_TENSOR = QuantAlgo("FP8", torch.float8_e4m3fn, static_inputs=True)


def needs_input_absmax(formats: Mapping[str, Format]) -> bool:
    """Whether a decoder in ``formats`` needs the largest inputs that calibration records."""
    decoder = [format for name, format in formats.items() if name.startswith("model.layers.")]
    return any(format.activations is not None for format in decoder)


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
        raise _refused(f"the dtype {dtype!r} is unknown to it", f"pass {' or '.join(DTYPES)}")
    if spec.text.tie_word_embeddings:
        raise _refused(
            "this model uses one table as embedding and head, and only models with two were "
            "checked",
            "use --trt-target llm-api or onnx",
        )
    algo = _algo(_only_format(spec, formats))
    if algo.group_size:
        _check_int4_shapes(spec, algo.group_size)
    if algo.static_inputs and not calibrated:
        raise _refused(
            f"{algo.name} needs the largest input of every linear, and nothing was calibrated",
            "pass --calib-data, or use int4 or bf16",
        )
    if algo is FP8_TENSOR and not original:
        raise _refused(
            "FP8 has one scale per weight, which can only be found in the unquantized checkpoint, "
            "and this one came quantized",
            "export from the original checkpoint",
        )
    return algo


def _only_format(spec: ModelSpec, formats: Mapping[str, Format]) -> Format | None:
    """The format of all decoder linears."""
    for linear in trt_linears(spec):
        kinds = {name: formats.get(name) for name in linear.sources}
        if len(set(kinds.values())) > 1:
            named = ", ".join(f"{name} {_name(format)}" for name, format in kinds.items())
            raise _refused(
                f"it makes one linear of {named}, which differ in format",
                "give all of them one format",
            )
    found = {formats.get(name): name for name in decoder_linear_shapes(spec)}
    if len(found) > 1:
        named = " and ".join(sorted(_name(format) for format in found))
        raise _refused(
            f"the decoder holds {named}, and only decoders in one format were checked",
            "use --quant int4, int8, fp8 or bf16 without rules for single layers",
        )
    return next(iter(found))


def _algo(format: Format | None) -> QuantAlgo:
    if format is None:
        return NONE
    if format.weights == "int4":
        if not format.symmetric:
            raise _refused(
                "W4A16_AWQ has no zero points, and this int4 is asymmetric",
                "export with symmetric = true",
            )
        if format.group_size != INT4.group_size:
            raise _refused(
                f"only groups of {INT4.group_size} columns were checked, and this int4 has groups "
                f"of {format.group_size}",
                f"export with --group-size {INT4.group_size}",
            )
        return W4A16_AWQ
    if format.activations is None:
        raise _refused(
            "weight-only int8 was not compared with what ModelOpt writes",
            "use --quant int8, int4 or bf16",
        )
    return {INT8.weights: W8A8_SQ, FP8.weights: FP8_TENSOR}[format.weights]


def _check_int4_shapes(spec: ModelSpec, group_size: int) -> None:
    for linear in trt_linears(spec):
        rows, columns = linear.shape
        if columns % group_size or rows % 2:
            raise _refused(
                f"{linear.name} is {rows} x {columns}, which groups of {group_size} columns and "
                "pairs of rows do not fit",
                "use --quant int8, fp8 or bf16",
            )
    if spec.text.vocab_size % _VOCABULARY_MULTIPLE:
        raise _refused(
            f"W4A16_AWQ wants a vocabulary in multiples of {_VOCABULARY_MULTIPLE}, and tokens "
            f"added to the {spec.text.vocab_size} of this model could be chosen",
            "use --quant int8, fp8 or bf16",
        )


def _name(format: Format | None) -> str:
    return "bf16" if format is None else format.name


def _refused(reason: str, remedy: str) -> OptionError:
    return OptionError(f"--trt-target engine cannot take this: {reason}; {remedy}.")
