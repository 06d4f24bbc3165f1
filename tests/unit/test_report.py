"""Report and model card: what they say, that they repeat, and the threshold."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from mmr5_export.agreement import (
    RankedSample,
    Ranking,
    RankMetrics,
    TokenMetrics,
    TokenSums,
    VerificationFailed,
)
from mmr5_export.card import model_card
from mmr5_export.evaluate import Evaluation
from mmr5_export.report import (
    Facts,
    Threshold,
    manifest_report,
    report_document,
    worst_layers,
    write_report,
)
from mmr5_kernels.layout import INT4
from mmr5_runtime.manifest import Quant, Source
from mmr5_runtime.types import ExportError

DOWN = "model.layers.0.mlp.down_proj"


def _layer(sqnr: float | None, error: float | None) -> dict[str, object]:
    return {
        "method": "gptq",
        "format": INT4.name,
        "sqnr_db": sqnr,
        "error": error,
        "damp": 0.01,
    }


def _facts(name: str = "i2vec/MM-R5") -> Facts:
    calibration = {"samples": 128, "sha256": "ab" * 32, "tokens": {"visual": 5000, "text": 80}}
    return Facts(
        command=["mmr5-export", "--model", name, "--quant", "int4", "--output", "engine"],
        source=Source(name, "0123abc", {"model.safetensors": "f" * 64}),
        versions={"mmr5-runtime": "0.2.0", "torch": "2.13.0"},
        seed=7,
        quant=Quant("int4", "gptq", {DOWN: INT4}, calibration=calibration),
        layers={DOWN: _layer(19.25, 0.0125)},
        calibration=calibration,
        bytes=5_000_000_000,
        bf16_bytes=16_600_000_000,
    )


def _evaluation(reference_by: str = "bf16") -> Evaluation:
    good, bad = Ranking((1, 0), "ok"), Ranking((0, 1), "repaired")
    ranked = tuple(RankedSample(good, each, (1,), reference_by) for each in (good, bad))
    sums = (TokenSums(10, 0.25, 1.0, 2.0, 9), TokenSums(30, 0.15, 3.0, 4.0, 30))
    return Evaluation(TokenMetrics(sums), RankMetrics(ranked))


def test_the_card_shows_what_was_measured() -> None:
    card = model_card(report_document(_facts(), _evaluation(), Threshold(0.4)))
    assert card.startswith("---\nbase_model: i2vec/MM-R5\nbase_model_relation: quantized\n")
    assert "\n- int4\n- gptq\n---\n" in card and "license" not in card.partition("\n---\n")[0]
    for line in (
        "| Perplexity | 1.1052 | 1.1618 |",
        "| KL per token, nats |  | 0.01 |",
        "| Same next token |  | 97.50 % |",
        "| Same first page |  | 1 of 2 |",
        "| Recall@1 | 1.000 | 0.500 |",
        "| Well-formed answers | 2 of 2 | 1 of 2 |",
        f"| `{DOWN}` | w4a16-g128 | 19.2 | 1.25e-02 |",
        "| tokens | visual 5,000, text 80 |",
    ):
        assert line in card
    assert "mmr5-export --model i2vec/MM-R5 --quant int4 --output engine\n```" in card
    assert (
        "5.00 GB of weights instead of 16.60 GB" in card and "agreement of 0.4 is reached" in card
    )
    assert "revision `0123abc`" in card and "torch 2.13.0" in card and "Seed: 7." in card


def test_a_copy_that_answered_for_the_original_is_named() -> None:
    copy = "a copy of the original stored as int8-weight-only"
    document = report_document(_facts(), _evaluation("int8-weight-only"), Threshold(0.98))
    card = model_card(document)
    tokens, ranks = (f"| on held-out lists | {name} | this engine |" for name in ("original", copy))
    first, second = card.index(tokens), card.index(ranks)
    assert first < card.index("| Perplexity |") < second < card.index("| Same first page |")
    assert f"answered by {copy}, because the memory" in card and "own answers" not in card
    with pytest.raises(VerificationFailed, match=f"agrees with {copy} on the first page"):
        Threshold(0.98).check(_evaluation("int8-weight-only").ranks)
    with pytest.raises(VerificationFailed, match="agrees with the original on the first page"):
        Threshold(0.98).check(_evaluation().ranks)
    assert manifest_report(document)["verification"]["ranks"]["reference_by"] == "int8-weight-only"


def test_a_local_source_is_not_called_a_hub_repository() -> None:
    card = model_card(report_document(_facts("mini"), None))
    assert "base_model" not in card and "Not measured: the export ran without" in card
    assert "say nothing about MM-R5" in card


def test_the_card_says_why_nothing_was_measured() -> None:
    document = {**report_document(_facts(), None), "unverified": "there was no data."}
    assert "Not measured: there was no data.\n" in model_card(document)


def test_a_dense_export_has_no_layers_to_rank() -> None:
    facts = replace(
        _facts(), quant=Quant("bf16", "none", {}), layers={}, calibration=None, seed=None
    )
    card = model_card(report_document(facts, _evaluation()))
    assert "SQNR" not in card and "calibration |" not in card and "Seed: none." in card
    assert "base_model_relation" not in card and "- none" not in card


def test_equal_exports_are_described_equally(tmp_path: Path) -> None:
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        write_report(tmp_path / place, report_document(_facts(), _evaluation()))
    for name in ("report.json", "README.md"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
    report = json.loads((tmp_path / "one" / "report.json").read_text())
    assert report == json.loads(json.dumps(report_document(_facts(), _evaluation())))


def test_the_sensitivity_is_in_the_report_once(tmp_path: Path) -> None:
    facts = replace(_facts(), sensitivity={"model.layers.0.qkv": {"int4": 0.0123456789}})
    document = report_document(facts, _evaluation())
    write_report(tmp_path, document)
    assert (tmp_path / "report.json").read_text().count("0.0123456789") == 1
    assert "0.0123456789" not in (tmp_path / "README.md").read_text()
    assert "0.0123456789" not in json.dumps(manifest_report(document))
    assert document["calibration"]["samples"] == 128 and "calibration" not in document["quant"]


def test_the_report_holds_every_sample_and_the_manifest_only_means() -> None:
    document = report_document(_facts(), _evaluation())
    verification = document["verification"]
    assert verification["tokens"]["samples"][1]["tokens"] == 30
    assert verification["ranks"]["samples"][1]["engine"]["order"] == (0, 1)
    kept = manifest_report(document)
    assert kept["sqnr_db"] == {DOWN: 19.25} and kept["output_error"] == {DOWN: 0.0125}
    assert kept["verification"]["ranks"]["first_choice_agreement"] == 0.5
    assert "samples" not in kept["verification"]["tokens"]
    json.dumps([document, kept], allow_nan=False)


def test_an_infinite_perplexity_can_be_written(tmp_path: Path) -> None:
    far = TokenMetrics((TokenSums(1, 900.0, 0.0, 900.0, 0),))
    evaluation = replace(_evaluation(), tokens=far)
    write_report(tmp_path, report_document(_facts(), evaluation))
    assert "| Perplexity | 1 | infinite |" in (tmp_path / "README.md").read_text()


def test_the_command_is_what_repeats_the_export() -> None:
    command = ["mmr5-export", "--model", "a b", "--quant", "/home/me/mine.toml", "--output", "e"]
    document = report_document(replace(_facts(), command=command), None)
    assert document["command"] == "mmr5-export --model 'a b' --quant mine.toml --output e"


def test_worst_layers_are_ranked_by_output_error_where_there_is_one() -> None:
    layers = {f"l{i:02}": _layer(float(i), float(i)) for i in range(12)}
    layers["head"] = _layer(-5.0, None)
    assert worst_layers(layers) == [f"l{i:02}" for i in range(11, 1, -1)]
    rounded = {name: {**layer, "error": None} for name, layer in layers.items()}
    assert worst_layers(rounded) == ["head", *(f"l{i:02}" for i in range(9))]
    rounded["l00"] = _layer(None, None)  # nothing lost
    assert worst_layers(rounded)[1] == "l01"


def test_the_threshold_names_both_shares_and_a_remedy() -> None:
    ranks = _evaluation().ranks
    Threshold(0.5).check(ranks)
    with pytest.raises(VerificationFailed, match=r"1 of 2 held-out lists \(0.500\).*asks for 0.98"):
        Threshold(0.98).check(ranks)
    document = report_document(_facts(), _evaluation(), Threshold(0.98))
    assert document["verification"]["passed"] is False
    assert "0.98 **is not reached**" in model_card(document)
    assert issubclass(VerificationFailed, ExportError)


@pytest.mark.parametrize("share", [-0.1, 1.01, 98.0, float("nan")])
def test_a_threshold_is_a_share(share: float) -> None:
    with pytest.raises(ExportError, match="pass 0 to 1"):
        Threshold(share)
