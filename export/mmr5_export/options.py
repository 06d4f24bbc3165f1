"""Everything an export can be asked for, checked as far as it can be without a checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from mmr5_export.plan import MAX_FILE_BYTES
from mmr5_runtime.options import DEFAULT_MAX_NEW_TOKENS
from mmr5_runtime.prompt import DEFAULT_PROFILE, load_template, profile_names
from mmr5_runtime.types import ExportError


class OptionError(ExportError):
    """An option is out of its range, or contradicts another."""


CALIBRATION_SAMPLES, HELD_OUT_SAMPLES = 128, 32
BACKENDS = ("native", "onnxruntime", "tensorrt-llm")
TRT_TARGETS = ("engine", "llm-api", "onnx")
AOT = ("rtx",)


@dataclass(frozen=True)
class ExportOptions:
    """Options of one export; the names are those of the command line.

    What is stored: ``method``, ``group_size``, ``symmetric``, ``lm_head``, ``quantize_vision``,
    ``damp`` (what GPTQ adds to a Hessian, relative to its mean diagonal) and ``bits`` (mean bits of
    a decoder weight, for mixed recipes) replace what the recipe says, where given.
    ``profile`` is the prompt of the engine's rankings, and so of calibration and verification.
    ``visual_weight`` is how much a visual token counts in the statistics, next to a text token.

    Calibration: ``calib_samples`` and ``held_out`` samples are drawn from ``calib_data`` by
    ``seed``; answers the data does not have are decoded up to ``max_new_tokens`` (as many as the
    reranker's own default) and kept in ``response_cache``.

    Verification: ``verify`` compares the engine with the checkpoint on the held-out samples;
    ``min_top1_agreement`` (share of held-out lists whose first page must stay the same) makes the
    export fail below it.

    ``checkpoint_out`` is a folder for an ordinary quantized checkpoint beside the engine, and
    ``checkpoint_for`` who will read it: a format that reader is known to misread is refused.

    ``backend`` are engines that the folder is written for besides the native one; ``trt_target``
    says what of TensorRT is written (the default is ``engine``) and ``trt_version`` for which
    TensorRT-LLM. ``max_batch_size`` prompts at a time, of at most ``max_input_len`` tokens and
    ``max_seq_len`` with the answer, of which ``max_multimodal_len`` are of pages in all prompts
    together, is what TensorRT reserves for; ``aot`` compiles the ONNX files ahead of time.

    ``free_bytes`` and ``free_memory`` replace what is found on the disk and on the device.
    Raises :class:`OptionError` for a value out of range and for options that contradict.
    """

    revision: str | None = None
    method: str | None = None
    group_size: int | None = None
    symmetric: bool | None = None
    lm_head: str | None = None
    quantize_vision: str | None = None
    bits: float | None = None
    damp: float | None = None
    profile: str = DEFAULT_PROFILE
    visual_weight: float = 1.0
    min_pixels: int | None = None
    max_pixels: int | None = None
    max_file_bytes: int = MAX_FILE_BYTES
    calib_data: Path | None = None
    calib_samples: int = CALIBRATION_SAMPLES
    held_out: int = HELD_OUT_SAMPLES
    seed: int = 0
    max_new_tokens: int = DEFAULT_MAX_NEW_TOKENS
    response_cache: Path | None = None
    verify: bool = True
    min_top1_agreement: float | None = None
    device: str = "auto"
    dtype: str = "auto"
    checkpoint_out: Path | None = None
    checkpoint_for: str = "vllm"
    backend: tuple[str, ...] = ()
    trt_target: tuple[str, ...] = ()
    trt_version: str | None = None
    max_batch_size: int | None = None
    max_input_len: int | None = None
    max_seq_len: int | None = None
    max_multimodal_len: int | None = None
    aot: str | None = None
    resume: bool = False
    force: bool = False
    free_bytes: int | None = None
    free_memory: int | None = None

    def __post_init__(self) -> None:
        if self.profile not in listwise_profiles():
            raise OptionError(
                f"--profile {self.profile} is no prompt that ranks a list; give one of "
                f"{', '.join(listwise_profiles())}."
            )
        _in_range("damp", self.damp, above=0.0, most=1.0)
        _in_range("visual_weight", self.visual_weight, above=0.0)
        _in_range("bits", self.bits, above=0.0, most=16.0)
        _in_range("calib_samples", self.calib_samples, above=0)
        _in_range("held_out", self.held_out, above=0)
        _in_range("max_new_tokens", self.max_new_tokens, above=0)
        _in_range("min_top1_agreement", self.min_top1_agreement, above=0.0, most=1.0)
        if self.min_top1_agreement is not None and not self.verify:
            raise OptionError(
                "--min-top1-agreement needs the verification that --no-verify leaves out; drop one "
                "of the two."
            )
        for name in _SIZES:
            _in_range(name, getattr(self, name), above=0)
        self._check_backends()

    def _check_backends(self) -> None:
        for name, known in (("backend", BACKENDS), ("trt_target", TRT_TARGETS)):
            asked = tuple(getattr(self, name))
            for value in asked:
                _choice(name, value, known)
            # The order of the table, so that equal wishes give equal engines; native is implied.
            chosen = tuple(value for value in known if value in asked and value != "native")
            object.__setattr__(self, name, chosen)
        if self.aot is not None:
            _choice("aot", self.aot, AOT)
        if "tensorrt-llm" not in self.backend:
            names = ("trt_target", "trt_version", *_SIZES, "aot")
            if given := [name for name in names if getattr(self, name) not in (None, ())]:
                raise OptionError(
                    f"{_flag(given[0])} is about TensorRT, which nothing is written for; add "
                    "--backend tensorrt-llm or leave it out."
                )
        for name, targets in _FOR_TARGETS.items():
            if getattr(self, name) is not None and not set(targets) & set(self.targets):
                raise OptionError(
                    f"{_flag(name)} means nothing to --trt-target {' and '.join(self.targets)}; "
                    f"add --trt-target {' or '.join(targets)}, or leave it out."
                )

    @property
    def targets(self) -> tuple[str, ...]:
        """What is written for TensorRT, in order; nothing without the backend."""
        if "tensorrt-llm" not in self.backend:
            return ()
        return self.trt_target or ("engine",)

    def arguments(self) -> list[str]:
        """Command-line arguments that repeat the export, without those that only say where.

        Left out are defaults, what is written besides the engine, and how this run was begun
        (resume, force). Files are named without their folder: where data lies changes nothing.
        """
        given: list[str] = []
        for field in fields(self):
            value: Any = getattr(self, field.name)
            if field.name in _UNREPEATED or value == field.default:
                continue
            flag = _flag(field.name)
            if isinstance(value, tuple):
                given += [word for item in value for word in (flag, item)]
            elif field.name == "symmetric":
                given.append("--sym" if value else "--asym")
            elif field.name == "verify":
                given.append("--no-verify")
            else:
                given += [flag, value.resolve().name if isinstance(value, Path) else str(value)]
        return given


def listwise_profiles() -> tuple[str, ...]:
    """Profiles an engine can rank with; one that judges single pages is beside each of them."""
    return tuple(name for name in profile_names() if not load_template(name).pointwise)


_UNREPEATED = {
    "revision",
    "max_file_bytes",
    "response_cache",
    "checkpoint_out",
    "checkpoint_for",
    "resume",
    "force",
    "free_bytes",
    "free_memory",
}


# What TensorRT reserves memory for.
_SIZES = ("max_batch_size", "max_input_len", "max_seq_len", "max_multimodal_len")


_FOR_TARGETS = {
    "trt_version": ("engine", "llm-api"),
    "max_batch_size": ("engine", "llm-api"),
    "max_multimodal_len": ("engine",),
    "aot": ("onnx",),
}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _choice(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise OptionError(f"{_flag(name)} {value} is unknown; give one of {', '.join(known)}.")


def _in_range(
    name: str, value: float | None, *, above: float = -math.inf, most: float = math.inf
) -> None:
    if value is None:
        return
    if not (math.isfinite(value) and above < value <= most):
        limit = f" and at most {most:g}" if math.isfinite(most) else ""
        raise OptionError(f"{_flag(name)} is {value:g}; give a number above {above:g}{limit}.")
