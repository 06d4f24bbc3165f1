"""What one pytest run measured: entries, what was skipped, the machine, and where it is kept."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import pytest

from mmr5_bench.plugin.journal import Journal
from mmr5_bench.plugin.settings import Settings

if TYPE_CHECKING:
    from mmr5_bench.evidence.document import Entry, Evidence, Skipped


@dataclass(frozen=True)
class Compared:
    """A recording that ``--benchmark-compare`` compares with: its time, and its machine, if any."""

    when: str
    machine: Any


@dataclass
class Recording:
    """One per run, in ``config.stash[RECORDING]``; measures nothing before :meth:`begin`."""

    settings: Settings
    entries: list[Entry] = field(default_factory=list)
    skipped: list[Skipped] = field(default_factory=list)
    compared: list[Compared] = field(default_factory=list)
    sources: set[str] = field(default_factory=set)
    """What the engines that were loaded were exported from."""
    synthetic: bool = False
    """Whether any of the pages were drawn."""
    ceilings: Mapping[str, Any] | None = None
    begun: bool = False
    _journal: Journal | None = None
    _threads: int | None = None

    @cached_property
    def device(self) -> str:
        """``auto`` resolved as Reranker.load does it."""
        import torch

        if self.settings.device != "auto":
            return self.settings.device
        return "cuda" if torch.cuda.is_available() else "cpu"

    @cached_property
    def machine(self) -> dict[str, Any]:
        """This machine, with the threads that were asked for."""
        from mmr5_bench.evidence.machine import describe_machine

        self.set_threads()
        return describe_machine(self.device)

    def set_threads(self) -> None:
        """Once, before anything is computed; :meth:`end` sets them back."""
        import torch

        if self.settings.threads is not None and self._threads is None:
            self._threads = torch.get_num_threads()
            torch.set_num_threads(self.settings.threads)

    def begin(self) -> None:
        """Before the first measurement: sets threads, describes the machine, finds its ceilings."""
        if self.begun:
            return
        self.begun = bool(self.machine)
        if self.settings.ceilings_s > 0:
            from mmr5_bench.evidence.ceilings import measure_ceilings

            dtypes = ["float32", "bfloat16", "int8", "fp8"]
            if self.device == "cpu":  # others take seconds where the processor has no such product
                dtypes = [{"auto": "float32"}.get(self.settings.dtype, self.settings.dtype)]
            seconds = self.settings.ceilings_s
            self.ceilings = measure_ceilings(self.device, dtypes, seconds=seconds)

    def end(self) -> None:
        """Gives torch back the threads it had."""
        if self._threads is not None:
            import torch

            torch.set_num_threads(self._threads)
            self._threads = None

    def check_new(self, name: str, subject: str) -> None:
        """ValueError when the run has this entry: two of one name could not be told apart."""
        from mmr5_bench.evidence.document import entry_key

        if (name, subject) in map(entry_key, self.entries):
            raise ValueError(
                f"{name} of {subject} was measured before in this run; pass another base, name or "
                "subject."
            )

    def add(self, entry: Entry) -> None:
        self.entries.append(entry)
        self._write({"entry": entry})

    def skip(self, subject: str, reason: str) -> None:
        skipped: Skipped = {"subject": subject, "reason": reason}
        self.skipped.append(skipped)
        self._write({"skipped": skipped})

    def head(self) -> Evidence:
        """The evidence without its entries."""
        from mmr5_bench.evidence.document import new_evidence

        title, note = self.description()
        evidence = new_evidence(title, note, self.machine)
        evidence["skipped"] = list(self.skipped)
        if self.ceilings is not None:
            evidence["ceilings"] = dict(self.ceilings)
        return evidence

    def evidence(self) -> Evidence:
        """All that was measured so far."""
        return {**self.head(), "entries": list(self.entries)}

    def refuse_comparison(self) -> str | None:
        """Why recordings to compare with are none of this machine; None when they are, or may be.

        Times of two machines differ for reasons that no change of the code has.
        """
        if self.settings.allow_machine_diff or not self.compared:
            return None
        from mmr5_bench.evidence.machine import machine_differences

        remedy = "Measure it again here, or pass --mmr5-allow-machine-diff."
        for one in self.compared:
            what = f"the recording of {one.when}"
            if not isinstance(one.machine, dict):
                return f"{what} does not say which machine it is of. {remedy}"
            if found := machine_differences(one.machine, self.machine):
                return f"{what} is of another machine ({'; '.join(found)}). {remedy}"
        return None

    def _write(self, line: Mapping[str, Any]) -> None:
        if self.settings.journal is None:
            return
        if self._journal is None:
            self._journal = Journal(self.settings.journal)
            self._journal.begin(self.head())
        self._journal.append(line)

    def description(self) -> tuple[str, str]:
        """Title and note: a reader must not take figures of mini for those of MM-R5."""
        title, notes = "Rerank benchmark", []
        if self.sources:
            title += f" of {', '.join(sorted(self.sources))}"
        if self.synthetic:
            notes.append("Synthetic pages (MiniDocs) in held-out lists.")
        if "mini" in self.sources:
            notes.append("mini has 4.5 M parameters: its figures say nothing about MM-R5.")
        return self.settings.title or title, self.settings.note or " ".join(notes)


RECORDING = pytest.StashKey[Recording]()
