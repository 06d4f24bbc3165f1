"""Hidden states between two decoder layers, kept on disk so that memory holds one sample at a time.

A stage is a folder of one safetensors file per sample, which appears under its name only when it is
complete: a killed export leaves the stage before, or the stage after, never half of one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmr5_runtime.types import ExportError

_KEY = "hidden"


class HiddenStates:
    """Stages of hidden states under ``folder``, by name; a stage holds tensors [T, hidden]."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def has(self, stage: str) -> bool:
        """Whether ``stage`` is there, complete."""
        return (self._folder / stage).is_dir()

    def write(self, stage: str, states: Iterable[Tensor]) -> None:
        """Writes a stage, one sample after the other; replaces an unfinished one."""
        unfinished = self._folder / f"{stage}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        for index, state in enumerate(states):
            save_file({_KEY: state.contiguous().cpu()}, _file(unfinished, index))
        shutil.rmtree(self._folder / stage, ignore_errors=True)
        unfinished.rename(self._folder / stage)

    def advance(
        self, stage: str, after: str, count: int, step: Callable[[int, Tensor], Tensor]
    ) -> None:
        """Writes stage ``after``: ``step`` of every one of the ``count`` states of ``stage``."""
        self.write(after, (step(index, self.read(stage, index)) for index in range(count)))

    def read(self, stage: str, index: int) -> Tensor:
        """One state [T, hidden], on the CPU, as it was written.

        Raises :class:`ExportError` when the disk lost or damaged it.
        """
        path = _file(self._folder / stage, index)
        try:
            state: Tensor = load_file(path)[_KEY]
        except (OSError, SafetensorError, KeyError) as error:
            raise ExportError(
                f"{path} cannot be read back ({error}); the unfinished export is damaged, start it "
                "over with --force instead of --resume."
            ) from error
        return state

    def keep_only(self, *stages: str) -> None:
        """Removes every other stage, finished or not."""
        if not self._folder.is_dir():
            return
        for path in self._folder.iterdir():
            if path.name not in stages:
                shutil.rmtree(path)


def _file(folder: Path, index: int) -> Path:
    return folder / f"{index:05}.safetensors"
