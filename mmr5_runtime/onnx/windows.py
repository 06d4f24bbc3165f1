"""How one page is cut into windows, as the vision graph takes it: filled up to one size."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from mmr5_runtime.rope import Grid
from mmr5_runtime.spec import VisionSpec
from mmr5_runtime.vision import plan_windows


def window_inputs(grid: Grid, spec: VisionSpec) -> tuple[Tensor, Tensor, Tensor]:
    """The windows of a page of ``grid`` patches, in the order of :func:`plan_windows`.

    Returns windows [W, L] int64, the patches (in merge order) of every window and 0 behind them up
    to the longest, L; mask [W, L] int32, 1 for a patch; places [P] int64, where each patch is in
    the flattened windows. All on the CPU.
    """
    plan = plan_windows(grid, spec)
    unit = spec.merge_unit
    patches = (plan.order[:, None] * unit + torch.arange(unit)).flatten()
    lengths = plan.table[:, 1].tolist()
    windows = pad_sequence(list(patches.split(lengths)), batch_first=True)
    mask = torch.arange(windows.shape[1]) < plan.table[:, 1:]
    places = torch.empty_like(patches)
    places[patches] = mask.flatten().nonzero().flatten()
    return windows, mask.to(torch.int32), places
