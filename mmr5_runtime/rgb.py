"""Any decoded image or array to 8-bit RGB on white, without clipping deeper samples."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from mmr5_runtime.types import PageError

_ORIENTATION_TAG = 0x0112
# EXIF orientation -> the transposition that makes the page upright; 1 is upright already.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def check_size(width: int, height: int, max_image_pixels: int) -> None:
    """Refuse an image of no pixels or of more than ``max_image_pixels``.

    Raises:
        PageError: naming the size and the limit.
    """
    if width < 1 or height < 1:
        raise PageError(f"the image is empty ({width}x{height} pixels); pass one that has pixels")
    if width * height > max_image_pixels:
        raise PageError(
            f"{width}x{height} pixels ({width * height / 1e6:.1f} MP) exceed the limit of "
            f"{max_image_pixels / 1e6:.1f} MP; scale the page down or raise max_image_pixels"
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """A decoded ``image`` upright in mode RGB, transparent parts on white.

    Returns ``image`` itself when there is nothing to do; never changes it. The reference handles
    mode RGBA alone like this; for the other modes it leaves to Pillow's plain conversion, which
    drops transparency and clips deep samples, this one keeps what a person sees.

    Raises:
        PageError: samples of mode I or F in no known range.
    """
    image = _upright(image)
    if image.mode.startswith("I;16"):
        image = _from_sixteen_bits(np.asarray(image), image.info.get("transparency"))
    elif image.mode in ("I", "F"):
        image = _from_deep_samples(np.asarray(image))
    if image.has_transparency_data:
        # Pillow has no direct way from premultiplied grey to RGBA.
        rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        page = Image.new("RGB", rgba.size, (255, 255, 255))
        page.paste(rgba, mask=rgba.getchannel("A"))
        return page
    return image if image.mode == "RGB" else image.convert("RGB")


def array_to_image(array: npt.NDArray[Any], max_image_pixels: int) -> Image.Image:
    """``array`` [height, width] or [height, width, 1|3|4], uint8 or float in 0..1, to an image.

    The result has mode L, RGB or RGBA.

    Raises:
        PageError: another shape, dtype or range, or over the limit.
    """
    channels = array.shape[2] if array.ndim == 3 else 1
    if array.ndim not in (2, 3) or channels not in (1, 3, 4):
        raise PageError(
            f"an array of shape {'x'.join(map(str, array.shape)) or 'scalar'} is no page; "
            "pass height x width, or height x width x 1, 3 or 4 (channels last)"
        )
    check_size(array.shape[1], array.shape[0], max_image_pixels)
    if np.issubdtype(array.dtype, np.floating):
        # A NaN fails the comparison too.
        if not (array.min() >= 0 and array.max() <= 1):
            raise PageError("a float array has values outside 0..1; scale it, or pass uint8 0..255")
        array = np.rint(array * 255).astype(np.uint8)
    elif array.dtype != np.uint8:
        raise PageError(f"an array of dtype {array.dtype} is no page; convert it to uint8 0..255")
    return Image.fromarray(array[:, :, 0] if array.ndim == 3 and channels == 1 else array)


def _upright(image: Image.Image) -> Image.Image:
    """``image`` with its EXIF orientation applied (TIFF files are upright once loaded)."""
    try:
        orientation = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:
        # The block is free-form metadata and often damaged by editors; pixels are not concerned,
        # and a viewer shows such a file as stored.
        return image
    step = _UPRIGHT.get(orientation)
    return image if step is None else image.transpose(step)


def _from_sixteen_bits(samples: npt.NDArray[Any], transparent: object = None) -> Image.Image:
    """[height, width] of 0..65535 to mode L; the ``transparent`` grey level becomes white."""
    scaled = (samples.astype(np.uint32) + 128) // 257  # 257 = 65535 / 255, rounded to nearest
    if isinstance(transparent, int):
        scaled[samples == transparent] = 255
    return Image.fromarray(scaled.astype(np.uint8))


def _from_deep_samples(samples: npt.NDArray[Any]) -> Image.Image:
    """[height, width] int32 or float32 to mode L.

    Neither mode says what white is, so it follows from the largest sample: 1 (floats), 255 or
    65535. Anything else has no safe reading.
    """
    low, high = samples.min(), samples.max()
    if not (low >= 0 and high <= 65535):  # a NaN fails the comparison too
        raise PageError(
            f"samples from {low:g} to {high:g} have no known white; convert the page to 8 bits"
        )
    if high > 255:
        return _from_sixteen_bits(np.rint(samples))
    if high <= 1 and np.issubdtype(samples.dtype, np.floating):
        samples = samples * 255
    return Image.fromarray(np.rint(samples).astype(np.uint8))
