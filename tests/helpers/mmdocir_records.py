"""Results of MMDocIR runs written down record by record, without a run."""

from __future__ import annotations

from typing import Any

from mmr5_bench.mmdocir.annotations import DOMAINS
from mmr5_bench.mmdocir.records import Record

Document = dict[str, Any]


def made_record(question: int, order: list[int], gold: list[int], **changes: Any) -> Record:
    record: Record = {
        "question": question,
        "document": question,
        "domain": DOMAINS[question % 10],
        "gold": gold,
        "candidates": sorted(order),
        "order": order,
        "status": "ok",
        "stop_reason": "determined",
        "error": None,
        "interventions": 0,
        "exactness": "bit_identical",
        "warm": True,
        "tokens": {"prompt": 100 + question, "image": 80, "completion": 10, "decode_steps": 9},
        "ms": 10.0 + question,
        "first_token_ms": 4.0,
        "stages_ms": {"decode": 6.0 + question, "other": 4.0},
        "text_sha256": "00",
    }
    return {**record, **changes}  # type: ignore[typeddict-item]


def made_document(records: list[Record], questions: int | None = None) -> Document:
    return {
        "kind": "mmdocir-results",
        "schema": 2,
        "note": "made up",
        "created": "2026-01-01T00:00:00+00:00",
        "machine": {"id": "0" * 16},
        "provenance": {},
        "run": "0" * 16,
        "identity": {
            "data": {
                "annotations_sha256": "aa",
                "pages_sha256": "bb",
                "published": False,
                "questions": questions or len(records),
            },
            "candidates": {"sha256": "cc", "first_stage": "colqwen", "depth": 20, "k": 3},
            "prompt": {"profile": "mm-r5", "template_sha256": "dd", "tokenizer_sha256": "ee"},
            "pixels": {"min_pixels": 3136, "max_pixels": 37632, "image": {}},
            "engine": {
                "name": "mini-int4",
                "quant": "int4",
                "method": "gptq",
                "dtype": "float32",
                "device": "cpu",
                "source": "mini",
            },
        },
        "options": {
            "top_k": None,
            "cache": "off",
            "stop": "determined",
            "think": "full",
            "plan": "single",
        },
        "records": records,
    }


def ten_records() -> list[Record]:
    """One question of each domain; the first three are right at once, the rest in third place."""
    return [made_record(n, [2, 1, 0] if n < 3 else [0, 1, 2], [2]) for n in range(10)]


def failed_record(question: int) -> Record:
    return made_record(
        question, [0, 1, 2], [0], status="error", ms=None, tokens=None, first_token_ms=None,
        error={"type": "PageError", "message": "page 2 is broken"}, stages_ms={},
        text_sha256=None, stop_reason=None, warm=False,
    )  # fmt: skip
