"""Everything one report shows, gathered out of its files: entries with short names, and a baseline.

files -> entries (of the same name, subject and machine the last) -> names by what differs
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mmr5_bench.evidence.document import Entry, Evidence, entry_key
from mmr5_bench.report.compare import compare

# What tells the rows of one list apart.
_ABOUT = ("subject", "reason", "dataset", "axes", "op", "kernel", "format", "dtype", "shape")
# How an answer ends; named only where it is not as with most.
_ENDING = ("stop", "think")
# Of these a number alone says nothing; what they count is said with it.
_COUNTED = {"pages": "pages", "candidates": "pages", "batch": "requests", "budget": "tokens"}


@dataclass(frozen=True)
class Source:
    """One file: its name, the SHA-256 of its bytes in hex, and what it holds."""

    name: str
    sha256: str
    evidence: Evidence


@dataclass(frozen=True)
class View:
    """One entry as it is shown: ``label`` is ``subject, setting``, told from all others."""

    entry: Entry
    label: str
    setting: str
    machine: str

    @property
    def group(self) -> tuple[str, str]:
        """What entries have to share for their times to be held against each other."""
        return self.entry["work"], self.machine


@dataclass(frozen=True)
class Material:
    """What a report is made of; ``machines`` has a letter per machine id, in order of the files.

    ``comparison`` is that of :func:`~mmr5_bench.report.compare.compare` and ``comparison_note`` why
    there is none although there are two runs.
    """

    sources: tuple[Source, ...]
    baseline: Source | None
    views: tuple[View, ...]
    common: str
    machines: dict[str, str]
    comparison: dict[str, Any] | None
    comparison_note: str

    def rows(self, key: str) -> list[dict[str, Any]]:
        """The objects of a list that evidence may have (kernels, skipped, qualities), of all files.

        What is about the same thing is there once, as the last file has it.
        """
        found: dict[str, dict[str, Any]] = {}
        for source in self.sources:
            machine = source.evidence["machine"].get("id")
            rows: Any = source.evidence.get(key)
            for row in rows if isinstance(rows, list) else ():
                if isinstance(row, dict):
                    about = [machine, *(row.get(field) for field in _ABOUT)]
                    found[repr(about)] = row
        return list(found.values())

    @property
    def notes(self) -> list[str]:
        """What the figures are and are not, of files with requests; of all when none has any."""
        told = [s for s in self.sources if not _only_kernels(s)] or list(self.sources)
        return list(dict.fromkeys(source.evidence["note"] for source in told))

    @property
    def kernel_notes(self) -> list[str]:
        """The notes of files of nothing but kernels."""
        told = (s.evidence["note"] for s in self.sources if _only_kernels(s))
        return list(dict.fromkeys(told))


def gather(sources: Sequence[Source], baseline: Source | None = None) -> Material:
    """Material of one or more files; without ``baseline`` the first of several is that.

    ValueError for no file.
    """
    if not sources:
        raise ValueError("a report needs at least one result file; name one")
    machines: dict[str, str] = {}
    newest: dict[tuple[str, str, str], tuple[Entry, str]] = {}
    for source in sources:
        machine = str(source.evidence["machine"].get("id", ""))
        letter = machines.setdefault(machine, _letter(len(machines)))
        for entry in source.evidence["entries"]:
            newest[(*entry_key(entry), letter)] = (entry, letter)
    entries = [entry for entry, _ in newest.values()]
    labels, common = name_entries(entries)
    views = []
    for (entry, letter), label in zip(newest.values(), labels, strict=True):
        shown = f"{label} · {letter}" if len(machines) > 1 else label
        setting = shown.removeprefix(entry["subject"]).removeprefix(",").strip()
        views.append(View(entry, shown, setting, letter))
    before = baseline or (sources[0] if len(sources) > 1 else None)
    later = list(sources) if baseline else list(sources[1:])
    comparison, note = _compared(before, later) if before else (None, "")
    return Material(
        sources=tuple(sources),
        baseline=before if comparison or note else None,
        views=tuple(views),
        common=common,
        machines=machines,
        comparison=comparison,
        comparison_note=note,
    )


def name_entries(entries: Sequence[Entry]) -> tuple[list[str], str]:
    """A short name per entry (subject, and the axes in which entries differ), and what all share.

    How an answer ends is named only where it is not as with most. Entries that would have the same
    name are called by their full one.
    """
    axes = list(dict.fromkeys(key for entry in entries for key in entry["axes"]))
    differing = [
        key for key in axes if len({repr(entry["axes"].get(key)) for entry in entries}) > 1
    ]
    usual = {key: _usual(entries, key) for key in _ENDING if key in differing}
    labels = []
    for entry in entries:
        values = [
            _worded(key, entry["axes"][key])
            for key in differing
            if key in entry["axes"]
            and str(entry["axes"][key]) not in entry["subject"].split()
            and not (key in usual and entry["axes"][key] == usual[key])
        ]
        labels.append(", ".join([entry["subject"], *values]))
    labels = _told_apart(labels, [f"{a}, {_base(e)}" for a, e in zip(labels, entries, strict=True)])
    labels = _told_apart(labels, [f"{entry['subject']} {entry['name']}" for entry in entries])
    shared = [key for key in axes if key not in differing] if entries else []
    told = [_worded(key, entries[0]["axes"][key], full=True) for key in shared]
    told += [f"{key} {value} unless said" for key, value in usual.items() if value is not None]
    return labels, ", ".join(told)


def _told_apart(labels: Sequence[str], longer: Sequence[str]) -> list[str]:
    """Labels, and the longer one where a label stands twice."""
    seen = Counter(labels)
    return [a if seen[a] == 1 else b for a, b in zip(labels, longer, strict=True)]


def _usual(entries: Sequence[Entry], key: str) -> Any:
    """What more than half of the entries have; None when no value is."""
    value, count = Counter(entry["axes"].get(key) for entry in entries).most_common(1)[0]
    return value if 2 * count > len(entries) else None


def _base(entry: Entry) -> str:
    """What was called: the name without its axes."""
    return entry["name"].partition("[")[0]


def _worded(key: str, value: Any, *, full: bool = False) -> str:
    if key in _COUNTED and isinstance(value, int):
        return f"{value} {_COUNTED[key]}"
    if full or isinstance(value, bool | int | float) or value is None:
        return f"{key} {value}"
    if key == "think":
        return f"think {value}"
    return f"{value} {key}" if key in ("cache", "stop") else str(value)


def _compared(before: Source, later: Sequence[Source]) -> tuple[dict[str, Any] | None, str]:
    """The last recording of every entry that ``before`` has too, by the default rules."""
    from mmr5_bench.evidence.machine import machine_differences  # torch only when it is needed

    known = {entry_key(entry) for entry in before.evidence["entries"]}
    found: dict[tuple[str, str], Entry] = {}
    differences: list[str] = []
    for source in later:
        shared = {entry_key(e): e for e in source.evidence["entries"] if entry_key(e) in known}
        differing = machine_differences(before.evidence["machine"], source.evidence["machine"])
        if not differing:
            found |= shared
        elif shared:
            differences += [f"{source.name}: {'; '.join(differing)}"]
    if not found:
        reason = "; ".join(differences)
        return None, f"Not compared, the machines differ. {reason}" if reason else ""
    after: Evidence = {**before.evidence, "entries": list(found.values()), "qualities": []}
    try:
        return compare(before.evidence, after), ""
    except ValueError as error:
        return None, f"Not compared: {error}."


def _only_kernels(source: Source) -> bool:
    evidence = source.evidence
    return bool(evidence.get("kernels")) and not (evidence["entries"] or evidence.get("qualities"))


def _letter(index: int) -> str:
    return chr(ord("A") + index) if index < 26 else f"M{index + 1}"
