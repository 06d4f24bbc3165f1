"""Image settings of a checkpoint, from any of the files its image processor is saved in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmr5_export.checkpoint import read_json
from mmr5_runtime.artifact import ImageSettings, PixelRange
from mmr5_runtime.spec import VisionSpec
from mmr5_runtime.types import CheckpointError, ExportError

# Steps the runtime always takes, in the reference's way; a checkpoint that wants another is
# refused, since its pages would silently come out different. 3 is Pillow's bicubic filter.
_FIXED_STEPS = {"do_resize": True, "do_rescale": True, "do_normalize": True, "resample": 3}
_RESCALE = 1 / 255
_ANY_PIXELS = 28 * 28  # one visual token, the least a page can have


def read_processor(folder: Path) -> dict[str, Any]:
    """The image processor's settings, from either file a checkpoint may keep them in.

    ``preprocessor_config.json`` has them at the top level; newer saves put them into the
    ``image_processor`` block of ``processor_config.json``.
    """
    nested = folder / "processor_config.json"
    if not (folder / "preprocessor_config.json").exists() and nested.exists():
        block = read_json(nested).get("image_processor")
        if isinstance(block, dict):
            return block
    return read_json(folder / "preprocessor_config.json")


def image_settings(config: Mapping[str, Any], vision: VisionSpec) -> ImageSettings:
    """Normalisation and patch sizes; raises :class:`CheckpointError` where they cannot be used."""
    for key, expected in _FIXED_STEPS.items():
        if config.get(key, expected) != expected:
            raise _refused(key, config[key], expected)
    if not math.isclose(config.get("rescale_factor", _RESCALE), _RESCALE, rel_tol=1e-6):
        raise _refused("rescale_factor", config["rescale_factor"], _RESCALE)
    sizes = {
        "patch_size": vision.patch_size,
        "merge_size": vision.spatial_merge_size,
        "temporal_patch_size": vision.temporal_patch_size,
    }
    for key, expected in sizes.items():
        if config.get(key, expected) != expected:
            raise _refused(key, config[key], expected)
    return ImageSettings(
        mean=_three(config, "image_mean"), std=_three(config, "image_std"), **sizes
    )


def pixel_budget(
    config: Mapping[str, Any], min_pixels: int | None = None, max_pixels: int | None = None
) -> PixelRange:
    """The pixel budget to record: the arguments where given, the checkpoint's where not.

    A checkpoint has it as ``min_pixels`` / ``max_pixels`` or as ``size`` with ``shortest_edge`` /
    ``longest_edge``, which are pixel counts too despite their names.
    """
    size = config.get("size") or {}
    low = _first(min_pixels, config.get("min_pixels"), size.get("shortest_edge"))
    high = _first(max_pixels, config.get("max_pixels"), size.get("longest_edge"))
    if low is None or high is None:
        raise CheckpointError(
            "the image processor's config gives no min_pixels and max_pixels; pass both, for "
            "example --min-pixels 3136 --max-pixels 12845056."
        )
    if not (isinstance(low, int) and isinstance(high, int) and _ANY_PIXELS <= low <= high):
        raise ExportError(
            f"min_pixels {low} and max_pixels {high} are no pixel budget; pass whole numbers with "
            f"{_ANY_PIXELS} <= min_pixels <= max_pixels."
        )
    return PixelRange(low, high)


def _first(*values: Any) -> Any:
    return next((value for value in values if value is not None), None)


def _three(config: Mapping[str, Any], key: str) -> tuple[float, float, float]:
    values = config.get(key)
    if not isinstance(values, list) or len(values) != 3:
        raise _refused(key, values, "three numbers")
    red, green, blue = values
    return float(red), float(green), float(blue)


def _refused(key: str, found: object, expected: object) -> CheckpointError:
    return CheckpointError(
        f"the image processor's config has {key} = {found!r} where this model needs {expected}; "
        "restore the checkpoint's own preprocessor_config.json."
    )
