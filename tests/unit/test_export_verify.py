"""What an export says of itself when it is done."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mmr5_export.verify import summary_lines
from mmr5_runtime.artifact import Manifest, read_manifest

CALIBRATION: dict[str, Any] = {
    "samples": 128,
    "tokens": {"visual": 61_440, "text": 9_000, "response": 7_000},
    "held_out": 32,
    "held_out_tokens": {"visual": 15_360, "text": 2_250, "response": 1_750},
}


@pytest.fixture
def manifest(tiny_engine: Callable[[str], Path]) -> Manifest:
    return read_manifest(tiny_engine("int4"))


def verified(manifest: Manifest, *, perplexity: float | None, by: str = "bf16") -> Manifest:
    tokens = {
        "next_token_agreement": 0.975,
        "kl_nats": 0.0123,
        "reference_perplexity": 1.5,
        "perplexity": perplexity,
    }
    ranks = {
        "reference_by": by,
        "lists": 32,
        "first_choice_agreement": 0.9375,
        "order_agreement": 0.75,
    }
    report = {**manifest.report, "verification": {"tokens": tokens, "ranks": ranks}}
    return replace(manifest, quant=replace(manifest.quant, calibration=CALIBRATION), report=report)


def test_it_says_how_many_tokens_of_each_kind_it_saw(manifest: Manifest) -> None:
    lines = summary_lines(verified(manifest, perplexity=1.6))
    assert lines[:2] == [
        "calibrated on 128 samples: 61,440 tokens of pages, 9,000 of text, 7,000 of answers",
        "held out 32 samples: 15,360 tokens of pages, 2,250 of text, 1,750 of answers",
    ]
    rounded = {**CALIBRATION, "samples": 0, "tokens": {"visual": 0, "text": 0, "response": 0}}
    only_verified = replace(manifest, quant=replace(manifest.quant, calibration=rounded))
    assert [line.split(":")[0] for line in summary_lines(only_verified)][0] == "held out 32 samples"


@pytest.mark.parametrize(("perplexity", "shown"), [(1.6, "1.6000"), (None, "infinite")])
def test_a_perplexity_can_be_infinite(
    manifest: Manifest, perplexity: float | None, shown: str
) -> None:
    lines = summary_lines(verified(manifest, perplexity=perplexity))
    assert lines[-1].endswith(f"97.50% equal, KL 1.23e-02 nats, perplexity 1.5000 -> {shown}")


def test_it_names_who_ranked(manifest: Manifest) -> None:
    first_page = "on 32 held-out lists: first page 93.8%, whole order 75.0% equal"
    own = summary_lines(verified(manifest, perplexity=1.6))
    assert own[-2] == f"against the original {first_page}"
    copied = summary_lines(verified(manifest, perplexity=1.6, by="int8-weight-only"))
    assert copied[-2] == f"against a copy of the original stored as int8-weight-only {first_page}"
    assert copied[-1].startswith("against the original on the tokens of those answers: next token")


def test_without_verification_it_says_why(manifest: Manifest) -> None:
    lines = summary_lines(manifest)
    assert len(lines) == 2 and lines[1] == "not verified: --no-verify"
