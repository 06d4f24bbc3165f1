"""What an export leaves for people: ``report.json``, and the model card ``README.md``.

Both are made from one document that holds everything needed to repeat the export and nothing that
differs when it is repeated. How long it took is added to ``report.json`` alone, under ``timing``.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mmr5_export.agreement import RankMetrics, VerificationFailed
from mmr5_export.card import model_card
from mmr5_export.evaluate import Evaluation
from mmr5_runtime.manifest import Quant, Source
from mmr5_runtime.types import ExportError

REPORT_NAME, CARD_NAME = "report.json", "README.md"
WORST_LAYERS = 10
_DESTINATIONS = ("--output", "--checkpoint-out")
_STOPGAPS = ("--resume", "--force")


@dataclass(frozen=True)
class Threshold:
    """The least share of held-out lists whose first page must be the original's."""

    min_top1_agreement: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.min_top1_agreement <= 1.0:
            raise ExportError(
                f"--min-top1-agreement {self.min_top1_agreement} is no share; pass 0 to 1, such as "
                "0.98."
            )

    def check(self, ranks: RankMetrics) -> None:
        """Raises :class:`VerificationFailed` when ``ranks`` fall short."""
        found = ranks.first_choice_agreement
        if found < self.min_top1_agreement:
            lists = len(ranks.samples)
            raise VerificationFailed(
                f"the engine agrees with the original on the first page of {round(found * lists)} "
                f"of {lists} held-out lists ({found:.3f}), and --min-top1-agreement asks for "
                f"{self.min_top1_agreement:g}; take smaller groups, int4-mixed or int8, or ask for "
                "less."
            )


@dataclass(frozen=True)
class Facts:
    """What one export was made from and with.

    ``command`` is the argument vector, program first; ``versions`` maps tools to versions;
    ``layers`` has per quantized linear ``method``, ``format``, ``sqnr_db``, ``error`` (relative
    squared error of its output) and ``damp``, each None where it does not apply; ``calibration``
    says source, hash, samples and tokens; ``bytes`` of all tensors as stored, ``bf16_bytes`` of
    the same without quantization.
    """

    command: Sequence[str]
    source: Source
    versions: Mapping[str, str]
    seed: int | None
    quant: Quant
    layers: Mapping[str, Mapping[str, Any]]
    calibration: Mapping[str, Any] | None
    bytes: int
    bf16_bytes: int


def report_document(
    facts: Facts, evaluation: Evaluation | None, threshold: Threshold | None = None
) -> dict[str, Any]:
    """The report as JSON, without times; ``evaluation`` is None when verification was skipped.

    A threshold that is not reached is recorded, not raised: the report is written either way.
    """
    worst = worst_layers(facts.layers)
    return {
        "kind": "mmr5-export-report",
        "command": repeatable_command(facts.command),
        "source": asdict(facts.source),
        "versions": dict(facts.versions),
        "seed": facts.seed,
        "quant": facts.quant.to_json(),
        "bytes": facts.bytes,
        "bf16_bytes": facts.bf16_bytes,
        "calibration": None if facts.calibration is None else dict(facts.calibration),
        "layers": {name: dict(layer) for name, layer in facts.layers.items()},
        "worst_layers": list(worst),
        "verification": None if evaluation is None else _verification(evaluation, threshold),
    }


def _verification(evaluation: Evaluation, threshold: Threshold | None) -> dict[str, Any]:
    least = None if threshold is None else threshold.min_top1_agreement
    found = evaluation.ranks.first_choice_agreement
    return {
        "tokens": evaluation.tokens.to_json(),
        "ranks": evaluation.ranks.to_json(),
        "min_top1_agreement": least,
        "passed": least is None or found >= least,
    }


def manifest_report(document: Mapping[str, Any]) -> dict[str, Any]:
    """What the manifest keeps of a report: SQNR and output error by linear, and the means."""
    layers, verification = document["layers"], document["verification"]
    means = None
    if verification is not None:
        means = {
            side: {key: value for key, value in verification[side].items() if key != "samples"}
            for side in ("tokens", "ranks")
        }
    return {
        "sqnr_db": {name: layer.get("sqnr_db") for name, layer in layers.items()},
        "output_error": {name: layer.get("error") for name, layer in layers.items()},
        "verification": means,
        "unverified": document.get("unverified"),
    }


def write_report(
    folder: Path, document: Mapping[str, Any], timing: Mapping[str, float] | None = None
) -> None:
    """Writes ``report.json`` and ``README.md``; ``timing`` in seconds goes into the first only."""
    whole = {**document, "timing": {k: round(v, 3) for k, v in (timing or {}).items()}}
    text = json.dumps(whole, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / REPORT_NAME).write_text(text + "\n", encoding="utf-8")
    (folder / CARD_NAME).write_text(model_card(document), encoding="utf-8")


def repeatable_command(arguments: Sequence[str]) -> str:
    """The command line to type for the same result, quoted for a shell.

    Left out are options that only concern an earlier run, and the folder that a destination lies
    in: neither changes what is made, and equal exports must describe themselves equally.
    """
    words: list[str] = []
    for word in arguments:
        option, equals, value = word.partition("=")
        if words and words[-1] in _DESTINATIONS:
            words.append(Path(word).name or word)
        elif option in _DESTINATIONS and equals:
            words += [option, Path(value).name or value]
        elif word not in _STOPGAPS:
            words.append(word)
    return shlex.join([Path(words[0]).name, *words[1:]]) if words else ""


def worst_layers(layers: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Up to ten linears that lost most, the worst first.

    By output error among those that have one: GPTQ trades the noise of weights, which SQNR
    measures, for less at the output. By SQNR where no linear was calibrated.
    """
    measured = [name for name in layers if layers[name].get("error") is not None]
    if measured:
        ranked = sorted(measured, key=lambda name: -float(layers[name]["error"]))
    else:
        known = [name for name in layers if layers[name].get("sqnr_db") is not None]
        ranked = sorted(known, key=lambda name: float(layers[name]["sqnr_db"]))
    return ranked[:WORST_LAYERS]
