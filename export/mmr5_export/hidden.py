"""Hidden states between two decoder layers, kept on disk so that memory holds one sample at a time.

A stage is a folder of one safetensors file per sample, which appears under its name only when it is
complete and on the disk: a killed export leaves the stage before, or the stage after, never half of
one. A state is read only as the one whose sha256 the journal has.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mmr5_export.write import save_tensors, sync
from mmr5_runtime.artifact import file_sha256
from mmr5_runtime.types import ExportError

_KEY = "hidden"


class HiddenStates:
    """Stages of hidden states under ``folder``, by name; a stage holds tensors [T, hidden]."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._expected: dict[str, list[str]] = {}

    def has(self, stage: str) -> bool:
        """Whether ``stage`` is there, complete."""
        return (self._folder / stage).is_dir()

    def write(self, stage: str, states: Iterable[Tensor]) -> list[str]:
        """Writes a stage, one sample after the other, and returns the sha256 of each state.

        Replaces an unfinished or finished stage. Raises ``OSError`` when the disk refuses.
        """
        unfinished = self._folder / f"{stage}.unfinished"
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        hashes = [
            save_tensors(_file(unfinished, index), {_KEY: state})
            for index, state in enumerate(states)
        ]
        sync(unfinished)
        shutil.rmtree(self._folder / stage, ignore_errors=True)
        unfinished.rename(self._folder / stage)
        sync(self._folder)
        self.expect(stage, hashes)
        return hashes

    def expect(self, stage: str, hashes: Sequence[str]) -> None:
        """Says what the states of a stage, written by an earlier process, must still be."""
        self._expected[stage] = list(hashes)

    def advance(
        self, stage: str, after: str, count: int, step: Callable[[int, Tensor], Tensor]
    ) -> list[str]:
        """Writes stage ``after``: ``step`` of every one of the ``count`` states of ``stage``.

        Returns the sha256 of each new state.
        """
        return self.write(after, (step(index, self.read(stage, index)) for index in range(count)))

    def read(self, stage: str, index: int) -> Tensor:
        """One state [T, hidden], on the CPU, as it was written.

        Raises :class:`ExportError` when the disk lost or altered it.
        """
        path = _file(self._folder / stage, index)
        remedy = "the unfinished export is damaged, start it over with --force instead of --resume"
        try:
            if file_sha256(path) != self._expected[stage][index]:
                raise ExportError(f"{path} was altered; {remedy}.")
            state: Tensor = load_file(path)[_KEY]
        except (OSError, SafetensorError, KeyError) as error:
            raise ExportError(f"{path} cannot be read back ({error}); {remedy}.") from error
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
