"""Exports whose graphs for ONNX Runtime are run on the held-out lists, or cannot be."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from helpers.exporting import tree_hashes, write_samples
from helpers.for_tensorrt import calibrated, for_tensorrt, run, write_untied
from mmr5_export.agreement import RankMetrics, VerificationFailed
from mmr5_export.evaluate import Evaluation, evaluate_engine
from mmr5_runtime.artifact import read_manifest, verify_hashes
from mmr5_runtime.loading import LoadedEngine

ALL = ("onnxruntime", "tensorrt-llm")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_untied(tmp_path_factory.mktemp("untied"))


@pytest.fixture(scope="module")
def data(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_samples(tmp_path_factory.mktemp("data"), 6, own_of=checkpoint)


def judge(monkeypatch: pytest.MonkeyPatch, rejected: str) -> None:
    """Has every engine answer like the original, but for the one that runs in ``rejected``."""

    def judged(loaded: LoadedEngine, *rest: Any) -> Evaluation:
        found, step = evaluate_engine(loaded, *rest), -1 if loaded.backend == rejected else 1
        ranked = [
            replace(sample, engine=replace(sample.reference, order=sample.reference.order[::step]))
            for sample in found.ranks.samples
        ]
        return replace(found, ranks=RankMetrics(tuple(ranked)))

    monkeypatch.setattr("mmr5_export.publish.evaluate_engine", judged)


def test_graphs_that_lose_too_much_are_told_from_the_engine(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge(monkeypatch, "onnxruntime")
    options = calibrated(data, method="rtn", min_top1_agreement=0.9, **for_tensorrt(backend=ALL))
    with pytest.raises(VerificationFailed) as caught:
        run(checkpoint, tmp_path / "engine", **options)
    words = r"^ONNX Runtime, .* agrees with the original .* 0 of 2 .*; leave out --backend onnxr"
    assert re.search(words, str(caught.value)) and "smaller groups" not in str(caught.value)
    put_aside = tmp_path / "engine.rejected"
    manifest = read_manifest(put_aside)
    assert list(manifest.backends) == ["onnxruntime"]
    assert not [name for name in tree_hashes(put_aside) if "tensorrt" in name]
    graphs = manifest.backends["onnxruntime"]
    assert "first page that of the original on 0.0%" in graphs.verified
    report = json.loads((put_aside / "report.json").read_text())
    assert report["verification"]["passed"]
    ranks = report["backends"]["onnxruntime"]["verification"]["ranks"]
    assert (ranks["first_choice_agreement"], ranks["lists"]) == (0.0, 2)


def test_graphs_that_agree_are_published_with_what_they_gave(
    checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judge(monkeypatch, "none")
    asked = {"min_top1_agreement": 0.9, "backend": ("onnxruntime",)}
    manifest = run(checkpoint, tmp_path / "e", **calibrated(data, method="rtn", **asked))
    graphs = manifest.backends["onnxruntime"]
    assert graphs.verified.startswith("checked by onnx and run by onnxruntime ")
    assert "on the 2 held-out lists: first page that of the original on 100.0%" in graphs.verified
    verify_hashes(tmp_path / "e", manifest)


@pytest.mark.parametrize(
    ("package", "words"),
    [
        (None, "onnxruntime cannot be imported"),
        (SimpleNamespace(__version__="1.20.0"), "onnxruntime 1.20.0 is too old for the graphs"),
    ],
)
def test_graphs_that_cannot_be_run_here_are_written_and_said_to_be_unrun(
    checkpoint: Path,
    data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    package: object,
    words: str,
) -> None:
    judge(monkeypatch, "onnxruntime")
    monkeypatch.setitem(sys.modules, "onnxruntime", package)
    asked = {"min_top1_agreement": 0.9, "backend": ("onnxruntime",)}
    manifest = run(checkpoint, tmp_path / "e", **calibrated(data, method="rtn", **asked))
    graphs = manifest.backends["onnxruntime"]
    assert graphs.verified.startswith(f"checked by onnx; not executed in this export ({words}")
    assert graphs.files == ("decoder.onnx", "head.onnx", "vision.onnx")
