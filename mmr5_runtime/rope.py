"""Rotary positions: which position each token has, and the rotation that carries it.

Text tokens count 0, 1, 2, ... on three axes at once (time, row, column). An image token instead
keeps the time axis still and takes its row and column, all offset by where the image begins. After
an image of h x w merged tokens the count goes on at ``begin + max(h, w)``, not at the number of
tokens, so positions are derived from the token ids and the grids of a prompt whenever they are
needed; nothing about them is stored between requests.

In the decoder the D/2 rotation frequencies are dealt out to the axes in three contiguous sections.
In the vision tower half of them follow the row of a patch and half its column.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from mmr5_runtime.spec import ModelSpec, TextSpec, VisionSpec
from mmr5_runtime.types import RequestError

Grid = tuple[int, int, int]  # frames, patch rows, patch columns of one page


def mrope_positions(
    token_ids: Tensor | Sequence[int],
    grids: Sequence[Grid],
    spec: ModelSpec,
    start: int = 0,
) -> tuple[Tensor, int]:
    """Positions of a prompt, or of a segment of one that begins at position ``start``.

    ``token_ids`` [T] integers; ``grids`` one ``(t, h, w)`` in patches per image, in order. Returns
    positions [3, T] int64 on the CPU and the position of the token that comes next. Raises
    :class:`RequestError` when image tokens and grids do not match.
    """
    ids = torch.as_tensor(token_ids, dtype=torch.int64, device="cpu")
    is_image = ids == spec.image_token_id
    merge = spec.vision.spatial_merge_size
    sizes = [(t, h // merge, w // merge) for t, h, w in grids]
    expected, found = sum(t * h * w for t, h, w in sizes), int(is_image.sum())
    if expected != found:
        raise RequestError(
            f"the prompt holds {found} image tokens but its {len(grids)} pages have {expected}; "
            "write every page's placeholder once per merged patch."
        )

    parts: list[Tensor] = []
    image_starts = is_image.nonzero().flatten().tolist()
    done, seen, position = 0, 0, start  # tokens placed, image tokens placed, next position
    for t, h, w in sizes:
        begin, count = image_starts[seen], t * h * w
        if not bool(is_image[begin : begin + count].all()):
            raise RequestError(
                f"the image tokens of page {len(parts) // 2 + 1} are interrupted by text; keep the "
                f"{count} placeholders of one page together."
            )
        parts.append(_text_positions(position, begin - done))
        position += begin - done
        axes = torch.meshgrid(torch.arange(t), torch.arange(h), torch.arange(w), indexing="ij")
        parts.append(torch.stack(axes).reshape(3, -1) + position)
        position += max(h, w)
        done, seen = begin + count, seen + count
    parts.append(_text_positions(position, len(ids) - done))
    return torch.cat(parts, dim=1), position + len(ids) - done


def _text_positions(start: int, count: int) -> Tensor:
    """[3, count] int64: the same counting position on all three axes."""
    return torch.arange(start, start + count).expand(3, -1)


class TextRotary(nn.Module):
    """Turns positions into the rotation of every frequency pair of a decoder head.

    Buffers: ``inv_freq`` [D/2] fp32; ``axis`` [D/2] int64, which of the three axes a frequency
    follows.
    """

    inv_freq: Tensor
    axis: Tensor

    def __init__(self, spec: TextSpec, device: torch.device | str = "cpu") -> None:
        super().__init__()
        sections = torch.tensor(spec.mrope_section)
        self.register_buffer("inv_freq", _frequencies(spec.head_dim, spec.rope_theta).to(device))
        self.register_buffer("axis", torch.arange(3).repeat_interleave(sections).to(device))

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions [3, T] int64 on the model's device -> cos, sin, each [T, D/2] fp32."""
        angles = self.angles(positions)
        return angles.cos(), angles.sin()

    def angles(self, positions: Tensor) -> Tensor:
        """positions [3, T] int64 on the model's device -> radians [T, D/2] fp32."""
        return positions[self.axis].T.float() * self.inv_freq


def vision_rotary(grid: Grid, spec: VisionSpec) -> tuple[Tensor, Tensor]:
    """cos and sin of one page's patches, [P, D/2] fp32 on the CPU, of :func:`vision_angles`."""
    angles = vision_angles(grid, spec)
    return angles.cos(), angles.sin()


def vision_angles(grid: Grid, spec: VisionSpec) -> Tensor:
    """By how much one page's patches are turned: radians [P, D/2] fp32 on the CPU.

    Patches come in merge order (the order of the pixel values): the merge x merge patches of one
    token are neighbours. The first D/4 frequencies turn with the row, the others with the column.
    """
    _, rows, columns = grid
    merge = spec.spatial_merge_size
    cells = torch.arange(rows * columns).view(rows // merge, merge, columns // merge, merge)
    patches = cells.transpose(1, 2).flatten()  # raster number of the i-th patch in merge order
    inv_freq = _frequencies(spec.head_dim // 2, spec.rope_theta)
    row_angles = (patches // columns).float()[:, None] * inv_freq
    column_angles = (patches % columns).float()[:, None] * inv_freq
    return torch.cat((row_angles, column_angles), dim=1)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates x [T, H, D] by the angles behind cos, sin [T, D/2]; result has the dtype of x.

    Value d of a head is paired with value d + D/2. The dtype of the tables decides the arithmetic:
    fp32 tables rotate in fp32 (vision), tables in the dtype of x rotate in it (decoder), the cast
    points the checkpoint was trained with.
    """
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    turned = torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)
    return turned.to(x.dtype)


def _frequencies(size: int, theta: float) -> Tensor:
    """[size/2] fp32: theta^(-2i/size)."""
    return 1.0 / theta ** (torch.arange(0, size, 2, dtype=torch.float32) / size)
