"""The Markdown tables of a ``mmr5-bench backends`` result file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mmr5_bench.backends.names import BASELINE, MEASURED, NATIVE, REFERENCE, RERANK, SUBJECTS
from mmr5_bench.evidence.tables import markdown

Entries = Sequence[Mapping[str, Any]]


def is_backends(document: Mapping[str, Any]) -> bool:
    """Whether evidence is of this command."""
    return any(entry["name"].startswith("backends[") for entry in document["entries"])


def backends_table(document: Mapping[str, Any]) -> str:
    """Prompts and steps with a row per case, whole reranks with a row per contender, the source."""
    entries: Entries = document["entries"]
    reranks = [entry for entry in entries if entry["axes"]["case"] == RERANK]
    stages = [entry for entry in entries if entry["axes"]["case"] != RERANK]
    parts = [_stages(stages)] if stages else []
    parts += [_goals(document["verdict"])] if document.get("verdict") else []
    parts += [_reranks(reranks)] if reranks else []
    return "\n\n".join([*parts, _origin(document)])


def _stages(entries: Entries) -> str:
    """A row per shape and case; the ratios are of ONNX Runtime."""
    against = ("bf16, p50", "bf16, p95", "fp32, p50", "torch int4, p50")
    head = ("Model", "Work", *(f"{subject}, ms" for subject in SUBJECTS))
    head += tuple(f"× {name}" for name in against)
    rows = []
    for name in dict.fromkeys(entry["name"] for entry in entries):
        cells = {entry["subject"]: entry for entry in entries if entry["name"] == name}
        axes, speedups = cells[MEASURED]["axes"], cells[MEASURED]["speedups"]
        least = min(entry["quality"]["cosine"]["value"] for entry in cells.values())
        rows.append(
            (
                axes["shape"],
                axes["label"],
                *(_times(cells[subject]) for subject in SUBJECTS),
                _factor(speedups[BASELINE]["p50"]),
                _factor(speedups[BASELINE]["p95"]),
                _factor(speedups[REFERENCE]["p50"]),
                _factor(speedups[NATIVE]["p50"]),
                f"{least:.4f}",
            )
        )
    legend = (
        "Times: p50 / p95; a step is the mean of three calls. ×: how many times as fast ONNX "
        "Runtime int4 is. Cosine: mean over "
        "rounds of the contender whose logits agree least with transformers float32."
    )
    return f"{markdown((*head, 'Cosine'), rows, texts=2)}\n\n{legend}"


def _reranks(entries: Entries) -> str:
    head = ("Pages", "Whole reranks of mini", "p50, ms", "p95, ms", "× bf16, p50", "× bf16, p95")
    rows = []
    for entry in entries:
        speedups, same = entry["speedups"], entry["quality"].get("identical")
        bf16 = speedups.get(BASELINE, {})
        rows.append(
            (
                str(entry["axes"]["pages"]),
                entry["subject"],
                *(f"{entry['latency_ms'][name]['value']:.0f}" for name in ("p50", "p95")),
                _factor(bf16.get("p50")),
                _factor(bf16.get("p95")),
                _factor(speedups.get(REFERENCE, {}).get("p50")),
                _factor(speedups.get(NATIVE, {}).get("p50")),
                "" if same is None else f"{100 * same['value']:.0f} %",
            )
        )
    rest = ("× fp32, p50", "× torch, p50", "Same answers")
    return markdown((*head, *rest), rows, texts=2)


def _goals(goals: Sequence[Mapping[str, Any]]) -> str:
    missed = [
        f"{goal['what']}: found {_factor(goal['found'])}" for goal in goals if not goal["holds"]
    ]
    said = f"Goals met, the whole interval: {len(goals) - len(missed)} of {len(goals)}."
    return said if not missed else f"{said} **Not met:** {'; '.join(missed)}."


def _origin(document: Mapping[str, Any]) -> str:
    machine, made = document["machine"], document["provenance"]
    rounds = sorted({len(entry["samples_ms"]) for entry in document["entries"]})
    flags = machine.get("flags", {})
    has = ", ".join(name for name, there in flags.items() if there) or "none of these"
    lacks = ", ".join(name for name, there in flags.items() if not there)
    return (
        f"{document['note'].rstrip('.')}. {' to '.join(map(str, rounds))} rounds per row; 95 % "
        f"intervals in brackets, paired by round. {machine.get('host_cpu')} with {has}"
        f"{f' and without {lacks}' if lacks else ''}, {machine.get('threads')} threads; torch "
        f"{made['torch']}, transformers {made['transformers']}, onnxruntime {made['onnxruntime']}, "
        f"commit {made['commit']}."
    )


def _times(entry: Mapping[str, Any]) -> str:
    return " / ".join(_ms(entry["latency_ms"][name]["value"]) for name in ("p50", "p95"))


def _ms(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def _factor(interval: Mapping[str, float] | None) -> str:
    if interval is None:
        return ""
    return f"{interval['value']:.2f} [{interval['low']:.2f}, {interval['high']:.2f}]"
