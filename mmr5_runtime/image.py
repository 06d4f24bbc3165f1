"""From an RGB page to normalised patches, with the bits of the reference pipeline.

The reference resizes twice. Its page loader first brings every page to multiples of 28 pixels
within a fixed 3,136 to 12,845,056 pixels; the model's image processor then does the same again
with the budget it was loaded with. Merging both into one resize would change pixels whenever the
second budget is the smaller one, so both steps are kept and a step that would not change the size
is skipped (Pillow would only copy the page then).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from mmr5_runtime.types import PageError, RequestError

REFERENCE_FACTOR = 28  # the reference's page loader knows no other patch size
CELL_PIXELS = REFERENCE_FACTOR**2  # pixels behind one visual token
DEFAULT_MIN_PIXELS = 4 * CELL_PIXELS
DEFAULT_MAX_PIXELS = 16384 * CELL_PIXELS
MAX_ASPECT_RATIO = 200  # the reference refuses longer strips

# preprocessor_config.json of Qwen2.5-VL: the statistics CLIP was trained with.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class PixelBudget:
    """Least and most pixels a page may have after the second resize.

    Raises:
        RequestError: a value is no whole number, below one 28x28 cell, or min exceeds max.
    """

    min_pixels: int = DEFAULT_MIN_PIXELS
    max_pixels: int = DEFAULT_MAX_PIXELS

    def __post_init__(self) -> None:
        for name in ("min_pixels", "max_pixels"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool):
                raise RequestError(f"{name}={value!r} is not a whole number; pass a pixel count")
            if value < CELL_PIXELS:
                raise RequestError(
                    f"{name}={value} is less than one 28x28 cell; pass {CELL_PIXELS} or more"
                )
        if self.min_pixels > self.max_pixels:
            raise RequestError(
                f"min_pixels={self.min_pixels} exceeds max_pixels={self.max_pixels}; "
                "raise max_pixels or lower min_pixels"
            )

    def replaced(self, min_pixels: int | None, max_pixels: int | None) -> PixelBudget:
        """The same budget with the limits that are not None; RequestError as above."""
        return PixelBudget(
            self.min_pixels if min_pixels is None else min_pixels,
            self.max_pixels if max_pixels is None else max_pixels,
        )


REFERENCE_BUDGET = PixelBudget()


@dataclass(frozen=True, eq=False)
class PatchedPage:
    """One page as the vision tower reads it.

    ``pixel_values`` is [P, patch_dim] float32 on the CPU, contiguous, patches in merge-block order
    (the patches of one token are neighbours) and patch_dim ordered channel, time, row, column.
    ``grid`` is (1, rows, columns) in patches; sizes are (width, height) in pixels.
    """

    pixel_values: torch.Tensor
    grid: tuple[int, int, int]
    resized: tuple[int, int]
    source: tuple[int, int]
    merge_size: int

    @property
    def num_tokens(self) -> int:
        """Visual tokens of this page in the prompt."""
        return math.prod(self.grid) // self.merge_size**2


@dataclass(frozen=True, eq=False)
class BytePage:
    """The same page an eighth the size, for a device that turns bytes into values by itself.

    ``patches`` [P, 3 * patch * patch] uint8 on the CPU, in merge-block order, a patch ordered
    channel, row, column; ``tables`` [3, 256] float32, what each byte stands for; ``frames``, how
    often a still image repeats in time.
    """

    patches: torch.Tensor
    tables: torch.Tensor
    frames: int
    grid: tuple[int, int, int]

    def pixel_values(self, device: torch.device) -> torch.Tensor:
        """[P, patch_dim] float32 on ``device``: ``PatchedPage.pixel_values``, bit for bit."""
        return expand_pixels(self.patches.to(device), self.tables.to(device), self.frames)


def smart_resize(
    height: int,
    width: int,
    factor: int = REFERENCE_FACTOR,
    min_pixels: int = DEFAULT_MIN_PIXELS,
    max_pixels: int = DEFAULT_MAX_PIXELS,
    *,
    least_cells: int = 1,
) -> tuple[int, int]:
    """Height and width as multiples of ``factor``, near the aspect ratio and within the budget.

    Every operation is in the reference's order, on floats, because its floor and ceil see the
    rounding errors: 7172x7172 becomes 3556x3556, not 3584x3584. A half cell rounds to even.
    ``least_cells`` is where the reference's two copies differ: its page loader rounds a side to at
    least one cell, the image processor may round to none (and then enlarges).

    Raises:
        PageError: a side is empty, or one is more than 200 times the other.
    """
    if min(height, width) < 1:
        raise PageError(f"an image of {width}x{height} pixels is empty; pass one that has pixels")
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise PageError(
            f"an image of {width}x{height} pixels has one side more than {MAX_ASPECT_RATIO} times "
            "the other; crop it or split it into several pages"
        )
    new_height = max(least_cells, round(height / factor)) * factor
    new_width = max(least_cells, round(width / factor)) * factor
    if new_height * new_width > max_pixels:
        shrink = math.sqrt((height * width) / max_pixels)
        new_height = max(factor, math.floor(height / shrink / factor) * factor)
        new_width = max(factor, math.floor(width / shrink / factor) * factor)
    elif new_height * new_width < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        new_height = math.ceil(height * grow / factor) * factor
        new_width = math.ceil(width * grow / factor) * factor
    return new_height, new_width


def planned_sizes(
    width: int, height: int, budget: PixelBudget, *, patch_size: int = 14, merge_size: int = 2
) -> tuple[tuple[int, int], tuple[int, int]]:
    """(width, height) after the page loader's resize and after the image processor's.

    Raises:
        PageError: as :func:`smart_resize`; rounding a thin page can also push it over the ratio.
    """
    first_height, first_width = smart_resize(height, width)
    try:
        final_height, final_width = smart_resize(
            first_height,
            first_width,
            patch_size * merge_size,
            budget.min_pixels,
            budget.max_pixels,
            least_cells=0,
        )
    except PageError as error:
        raise PageError(
            f"an image of {width}x{height} pixels becomes {first_width}x{first_height} in whole "
            f"patches, one side more than {MAX_ASPECT_RATIO} times the other; crop it or split it "
            "into several pages"
        ) from error
    return (first_width, first_height), (final_width, final_height)


def planned_tokens(
    width: int, height: int, budget: PixelBudget, *, patch_size: int = 14, merge_size: int = 2
) -> int:
    """Visual tokens of a ``width`` x ``height`` page, without touching pixels.

    Sizes are those of the upright page, as ``open_page`` returns it. Raises like
    :func:`planned_sizes`.
    """
    _, (final_width, final_height) = planned_sizes(
        width, height, budget, patch_size=patch_size, merge_size=merge_size
    )
    return final_width * final_height // (patch_size * merge_size) ** 2


def fitting_max_pixels(
    sizes: Iterable[tuple[int, int]],
    allowance: int,
    budget: PixelBudget,
    *,
    patch_size: int = 14,
    merge_size: int = 2,
) -> int | None:
    """The largest ``max_pixels`` under which pages of ``sizes`` need ``allowance`` tokens at most.

    ``sizes`` are (width, height); the search runs over whole token cells from
    ``budget.min_pixels`` to ``budget.max_pixels``. None means that not even the smallest
    fits: there are too many pages. Raises like :func:`planned_sizes`.
    """
    pages = list(sizes)
    cell = (patch_size * merge_size) ** 2

    def fits(cells: int) -> bool:
        candidate = PixelBudget(budget.min_pixels, cells * cell)
        total = sum(
            planned_tokens(width, height, candidate, patch_size=patch_size, merge_size=merge_size)
            for width, height in pages
        )
        return total <= allowance

    # The smallest candidate has to be a budget too: no less than min_pixels and than one cell.
    low = math.ceil(max(budget.min_pixels, CELL_PIXELS) / cell)
    high = max(low, budget.max_pixels // cell)
    if not fits(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        if fits(middle):
            low = middle
        else:
            high = middle - 1
    return low * cell


def preprocess(
    image: Image.Image,
    budget: PixelBudget,
    *,
    patch_size: int = 14,
    merge_size: int = 2,
    temporal_patch_size: int = 2,
    mean: tuple[float, float, float] = CLIP_MEAN,
    std: tuple[float, float, float] = CLIP_STD,
) -> PatchedPage:
    """Resize twice, normalise and cut an upright RGB ``image`` into patches.

    ``image`` is not changed. The result has the bits of transformers' Qwen2VLImageProcessorPil
    fed by the reference's page loader. Raises like :func:`planned_sizes`, and PageError for an
    image that is not RGB.
    """
    source = (image.width, image.height)
    image = _resized(image, budget, patch_size, merge_size)
    columns, rows = image.width // patch_size, image.height // patch_size
    blocks = _patchify(
        np.asarray(image), _channel_tables(mean, std), patch_size, merge_size, temporal_patch_size
    )
    return PatchedPage(
        pixel_values=torch.from_numpy(blocks.reshape(rows * columns, -1)),
        grid=(1, rows, columns),
        resized=(image.width, image.height),
        source=source,
        merge_size=merge_size,
    )


def preprocess_bytes(
    image: Image.Image,
    budget: PixelBudget,
    *,
    patch_size: int = 14,
    merge_size: int = 2,
    temporal_patch_size: int = 2,
    mean: tuple[float, float, float] = CLIP_MEAN,
    std: tuple[float, float, float] = CLIP_STD,
) -> BytePage:
    """:func:`preprocess` without its last step, which :func:`expand_pixels` does on a device."""
    image = _resized(image, budget, patch_size, merge_size)
    columns, rows = image.width // patch_size, image.height // patch_size
    strips = _strips(np.asarray(image), patch_size, merge_size)
    patches = np.ascontiguousarray(strips.transpose(0, 1, 2, 3, 6, 4, 5))
    return BytePage(
        patches=torch.from_numpy(patches.reshape(rows * columns, -1)),
        tables=torch.from_numpy(_channel_tables(mean, std)),
        frames=temporal_patch_size,
        grid=(1, rows, columns),
    )


def expand_pixels(patches: torch.Tensor, tables: torch.Tensor, frames: int) -> torch.Tensor:
    """Normalised values [P, 3 * frames * patch * patch] float32 of patches as :class:`BytePage` has
    them, on their device. A lookup: no device can round it differently.
    """
    channels = torch.arange(3, dtype=torch.int32, device=patches.device)[:, None]
    places = patches.unflatten(1, (3, -1)).int() + 256 * channels
    values = tables.flatten().index_select(0, places.flatten()).view_as(places)
    return values[:, :, None].expand(-1, -1, frames, -1).flatten(1)


def _resized(
    image: Image.Image, budget: PixelBudget, patch_size: int, merge_size: int
) -> Image.Image:
    """``image`` at the size at which it is cut into patches."""
    if image.mode != "RGB":
        raise PageError(f"an image of mode {image.mode} is not RGB; pass it through open_page")
    sizes = planned_sizes(
        image.width, image.height, budget, patch_size=patch_size, merge_size=merge_size
    )
    for size in sizes:
        if image.size != size:
            image = image.resize(size, Image.Resampling.BICUBIC)
    return image


def _channel_tables(
    mean: tuple[float, float, float], std: tuple[float, float, float]
) -> npt.NDArray[np.float32]:
    """[3, 256] float32: the normalised value of each byte, per channel.

    Rescaling runs in float64 and is cut to float32 before the mean is taken off, as in the
    reference. A page has only 256 values per channel, so looking them up costs a quarter of
    computing them per pixel and is exact.
    """
    scaled = (np.arange(256, dtype=np.float64) * (1 / 255)).astype(np.float32)
    centred = scaled[None, :] - np.array(mean, dtype=np.float32)[:, None]
    tables: npt.NDArray[np.float32] = centred / np.array(std, dtype=np.float32)[:, None]
    return tables


def _patchify(
    pixels: npt.NDArray[np.uint8],
    tables: npt.NDArray[np.float32],
    patch_size: int,
    merge_size: int,
    temporal_patch_size: int,
) -> npt.NDArray[np.float32]:
    """``pixels`` [height, width, 3] to float32 [rows, cols, merge, merge, 3, time, patch, patch].

    rows and cols count merge blocks. One strip of blocks at a time keeps the lookup's index array
    (8 bytes per pixel) in cache; a still image repeats in every time slot.
    """
    strips = _strips(pixels, patch_size, merge_size)
    rows, columns = strips.shape[:2]
    blocks = np.empty(
        (rows, columns, merge_size, merge_size, 3, temporal_patch_size, patch_size, patch_size),
        dtype=np.float32,
    )
    for row in range(rows):
        for channel, table in enumerate(tables):
            values = table.take(strips[row, ..., channel])
            blocks[row, :, :, :, channel] = values[:, :, :, None]
    return blocks


def _strips(
    pixels: npt.NDArray[np.uint8], patch_size: int, merge_size: int
) -> npt.NDArray[np.uint8]:
    """``pixels`` [height, width, 3] seen as [rows, cols, merge, merge, patch, patch, 3]."""
    factor = patch_size * merge_size
    rows, columns = pixels.shape[0] // factor, pixels.shape[1] // factor
    strips = pixels.reshape(rows, merge_size, patch_size, columns, merge_size, patch_size, 3)
    return strips.transpose(0, 3, 1, 4, 2, 5, 6)
