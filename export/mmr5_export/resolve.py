"""What options mean for the checkpoint at hand: recipe, place, pixels; and which mean nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

import torch

from mmr5_export.options import ExportOptions, OptionError
from mmr5_export.processor import pixel_budget
from mmr5_export.recipe import Recipe, load_recipe
from mmr5_runtime.artifact import PixelRange
from mmr5_runtime.compute import resolve_device, resolve_dtype
from mmr5_runtime.types import CheckpointError, ExportError, RequestError

# What a checkpoint that is quantized already leaves nothing to do for.
_QUANTIZING = ("method", "group_size", "symmetric", "lm_head", "quantize_vision", "bits", "damp")
_CALIBRATING = (
    "calib_data", "calib_samples", "seed", "visual_weight", "max_new_tokens", "response_cache",
)  # fmt: skip
_VERIFYING = ("held_out", "min_top1_agreement")


def resolve_recipe(quant: str, options: ExportOptions) -> Recipe:
    """The recipe ``quant`` with what the options replace.

    Raises :class:`OptionError` for a recipe that is not there or means nothing.
    """
    recipe = load_recipe(quant)
    given: dict[str, Any] = {
        "default_method": options.method,
        "group_size": options.group_size,
        "symmetric": options.symmetric,
        "lm_head": options.lm_head,
        "vision": options.quantize_vision,
        "damp": options.damp,
    }
    recipe = replace(recipe, **{key: value for key, value in given.items() if value is not None})
    if options.bits is None:
        return recipe
    if recipe.mixed is None:
        raise OptionError(
            f"--bits is a budget for mixed recipes but {recipe.name} is none; use --quant "
            "int4-mixed or leave it out."
        )
    return replace(recipe, mixed=replace(recipe.mixed, bits_per_weight=options.bits))


def refuse_requantizing(name: str, quant: str | None, options: ExportOptions) -> None:
    """Raises :class:`OptionError` naming the options that a quantized checkpoint ignores."""
    given = [] if quant is None else ["--quant"]
    given += _changed(options, (*_QUANTIZING, *_CALIBRATING, *_VERIFYING))
    if given:
        raise OptionError(
            f"{name} is quantized already: it is taken over as it is, without calibration and "
            f"without its original to verify against; leave out {' and '.join(given)}, or export "
            "from the original bf16 checkpoint."
        )


def refuse_threshold(options: ExportOptions, unverified: str | None) -> None:
    """Raises :class:`OptionError` for a threshold that nothing would be held against."""
    if options.min_top1_agreement is not None and unverified is not None:
        raise OptionError(
            f"--min-top1-agreement has nothing to measure because {unverified}; leave it out."
        )


def resolve_place(options: ExportOptions) -> tuple[torch.device, torch.dtype]:
    """Device and compute dtype; raises :class:`OptionError` for what is unknown or not there."""
    try:
        device = resolve_device(options.device)
        return device, resolve_dtype(options.dtype, device)
    except RequestError as error:
        raise OptionError(f"--{error}") from error


def resolve_pixels(processor: Mapping[str, Any], options: ExportOptions) -> PixelRange:
    """The pixel budget of a checkpoint's image processor with what the options replace.

    Raises :class:`OptionError` when the options make it none, :class:`CheckpointError` when it was
    none before.
    """
    try:
        return pixel_budget(processor, options.min_pixels, options.max_pixels)
    except ExportError as error:
        asked = options.min_pixels is not None or options.max_pixels is not None
        raise (OptionError if asked else CheckpointError)(str(error)) from error


def _changed(options: ExportOptions, names: tuple[str, ...]) -> list[str]:
    """Flags of the options that are not at their default, as a command line has them."""
    defaults = {field.name: field.default for field in fields(options)}
    given = [name for name in names if getattr(options, name) != defaults[name]]
    flags = {"symmetric": "--sym" if options.symmetric else "--asym"}
    return [flags.get(name, f"--{name.replace('_', '-')}") for name in given]
