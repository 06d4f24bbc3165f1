"""What an export leaves for people: ``report.json``, and the model card ``README.md``.

Both are made from one document that holds everything needed to repeat the export and nothing that
differs when it is repeated.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmr5_export.agreement import RankMetrics, VerificationFailed, reference_name
from mmr5_export.card import model_card
from mmr5_export.evaluate import Evaluation
from mmr5_export.options import OptionError
from mmr5_runtime.manifest import Quant, Source

REPORT_NAME, CARD_NAME = "report.json", "README.md"
WORST_LAYERS = 10


@dataclass(frozen=True)
class Judged:
    """What was compared with the original: its name in a sentence, and what to do about it."""

    name: str
    remedy: str


ENGINE = Judged("the engine", "take smaller groups, int4-mixed or int8, or ask for less")
GRAPHS = Judged(
    "ONNX Runtime, on the graphs of an engine that passed,",
    "leave out --backend onnxruntime, or ask for less",
)


@dataclass(frozen=True)
class Threshold:
    """The least share of held-out lists whose first page must be the original's."""

    min_top1_agreement: float

    def __post_init__(self) -> None:
        if not 0.0 <= self.min_top1_agreement <= 1.0:
            raise OptionError(
                f"--min-top1-agreement {self.min_top1_agreement} is no share; pass 0 to 1, such as "
                "0.98."
            )

    def check(self, ranks: RankMetrics, what: Judged = ENGINE) -> None:
        """Raises :class:`VerificationFailed` when the ``ranks`` of ``what`` fall short."""
        found = ranks.first_choice_agreement
        if found < self.min_top1_agreement:
            lists, reference = len(ranks.samples), reference_name(ranks.reference_by)
            raise VerificationFailed(
                f"{what.name} agrees with {reference} on the first page of "
                f"{round(found * lists)} of {lists} held-out lists ({found:.3f}), and "
                f"--min-top1-agreement asks for {self.min_top1_agreement:g}; {what.remedy}."
            )


@dataclass(frozen=True)
class Facts:
    """What one export was made from and with.

    ``command`` is the argument vector, program first; ``versions`` maps tools to versions;
    ``layers`` has per quantized linear ``method``, ``format``, ``sqnr_db``, ``error`` (relative
    squared error of its output) and ``damp``, each None where it does not apply, and of one that
    was calibrated ``input_absmax``, the largest magnitude among its inputs; ``calibration``
    says source, hash, samples and tokens; ``sensitivity`` is what a mixed recipe was chosen by
    (see :mod:`mmr5_export.sensitivity`), None with any other; ``bytes`` of all tensors as stored,
    ``bf16_bytes`` of the same without quantization; ``backends`` is what the manifest says of files
    for other engines, by backend.
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
    sensitivity: Mapping[str, Mapping[str, float]] | None = None
    backends: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def report_document(
    facts: Facts, evaluation: Evaluation | None, threshold: Threshold | None = None
) -> dict[str, Any]:
    """The report as JSON; ``evaluation`` is None when verification was skipped.

    A threshold that is not reached is recorded, not raised: the report is written either way.
    """
    worst = worst_layers(facts.layers)
    quant = {key: part for key, part in facts.quant.to_json().items() if key != "calibration"}
    return {
        "kind": "mmr5-export-report",
        "command": _command_line(facts.command),
        "source": asdict(facts.source),
        "versions": dict(facts.versions),
        "seed": facts.seed,
        "quant": quant,
        "bytes": facts.bytes,
        "bf16_bytes": facts.bf16_bytes,
        "calibration": None if facts.calibration is None else dict(facts.calibration),
        "sensitivity": facts.sensitivity,
        "layers": {name: dict(layer) for name, layer in facts.layers.items()},
        "worst_layers": list(worst),
        "backends": {name: dict(found) for name, found in facts.backends.items()},
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
    """What the manifest keeps of a report: the means, and by linear SQNR, output error and, where
    it was calibrated, the largest input.
    """
    layers, verification = document["layers"], document["verification"]
    return {
        "sqnr_db": {name: layer.get("sqnr_db") for name, layer in layers.items()},
        "output_error": {name: layer.get("error") for name, layer in layers.items()},
        "input_absmax": {
            name: layer["input_absmax"] for name, layer in layers.items() if "input_absmax" in layer
        },
        "verification": None if verification is None else _means(verification),
        "unverified": document.get("unverified"),
    }


def verification_means(evaluation: Evaluation) -> dict[str, Any]:
    """What verification found, without the samples one by one."""
    return _means({"tokens": evaluation.tokens.to_json(), "ranks": evaluation.ranks.to_json()})


def _means(verification: Mapping[str, Any]) -> dict[str, Any]:
    return {
        side: {key: value for key, value in verification[side].items() if key != "samples"}
        for side in ("tokens", "ranks")
    }


def write_report(folder: Path, document: Mapping[str, Any]) -> None:
    """Writes ``report.json`` and ``README.md``."""
    text = json.dumps(document, indent=1, ensure_ascii=False, allow_nan=False)
    (folder / REPORT_NAME).write_text(text + "\n", encoding="utf-8")
    (folder / CARD_NAME).write_text(model_card(document), encoding="utf-8")


def _command_line(arguments: Sequence[str]) -> str:
    """The command to type, quoted for a shell; a recipe file is named without its folder."""
    words = [
        Path(word).name if before == "--quant" else word
        for before, word in zip(["", *arguments], arguments, strict=False)
    ]
    return shlex.join(words)


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
