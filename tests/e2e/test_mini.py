"""The embedded checkpoint through the product: it ranks, in every format, as published."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

import pytest
from PIL import Image

from helpers.exporting import quick_export
from helpers.reading import open_reranker
from mmr5_bench.minidocs.lists import held_out_cases
from mmr5_bench.minidocs.pages import render_page
from mmr5_export.onnx.ort import add_graphs
from mmr5_runtime.backends import BackendName
from mmr5_runtime.cli import main

BACKENDS = ("native", "onnxruntime")
ASSETS = Path(str(resources.files("mmr5_runtime") / "assets"))
SAMPLES = ASSETS / "samples"


@pytest.fixture(scope="module", params=["bf16", "int8", "int4"])
def engine(
    request: pytest.FixtureRequest, backend: str, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    quant: str = request.param
    folder = tmp_path_factory.mktemp("mini") / quant
    quick_export("mini", quant, folder)
    if backend == "onnxruntime":
        add_graphs(folder)
    return folder


def test_size_in_the_repository() -> None:
    assert sum(file.stat().st_size for file in ASSETS.rglob("*") if file.is_file()) < 20e6


def test_ranks_held_out_lists(engine: Path, backend: BackendName) -> None:
    cases = held_out_cases(24, 5, seed=77)
    hits = well_formed = 0
    with open_reranker(engine, backend) as reranker:
        for case in cases:
            pages = [render_page(p.topic, p.kind, p.seed) for p in case.pages]
            result = reranker.rerank(case.question, pages)
            hits += result.order[0] in case.gold
            well_formed += result.status == "ok" and result.stop_reason == "determined"
    # A ranker at chance gets 5 of 24; 17 or more happens to it once in a hundred million runs.
    assert hits >= 17
    assert well_formed >= 23


def test_reasoning_is_about_the_pages(engine: Path, backend: BackendName) -> None:
    [case] = held_out_cases(1, 3, seed=9)
    pages = [render_page(p.topic, p.kind, p.seed) for p in case.pages]
    with open_reranker(engine, backend) as reranker:
        result = reranker.rerank(case.question, pages)
    assert result.reasoning.startswith("The question asks for a ")
    assert all(f"Image {number} shows a " in result.reasoning for number in (1, 2, 3))


def test_any_page_size_fits_the_context(engine: Path, backend: BackendName) -> None:
    pages = [Image.new("RGB", size, "white") for size in ((1, 1), (14, 792), (2480, 3508))]
    with open_reranker(engine, backend) as reranker:
        result = reranker.rerank("rainfall table", pages, max_new_tokens=4)
    assert result.usage.image_tokens <= 3 * 48


def test_demo_samples(
    engine: Path, backend: BackendName, capsys: pytest.CaptureFixture[str]
) -> None:
    question = (SAMPLES / "question.txt").read_text().strip()
    pages = sorted(str(path) for path in SAMPLES.glob("*.png"))
    options = ["--engine", str(engine), "--device", "cpu", "--backend", backend]
    assert main([*options, question, *pages]) == 0
    out = capsys.readouterr().out
    assert "Status       ok" in out and "Stop reason  determined" in out
    assert f"Backend      {backend}\n" in out
    best = out.partition("Ranking\n")[2].splitlines()[0]
    assert "rainfall-bar-chart" in best
