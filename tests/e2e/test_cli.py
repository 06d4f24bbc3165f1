"""``mmr5-rerank`` as a user types it: output forms, exit codes, one-line errors."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from mmr5_runtime.cli import main

EngineFactory = Callable[[str], Path]
Call = Callable[..., int]
BACKENDS = ("native", "onnxruntime")
QUESTION = "Which page shows the rainfall?"


@pytest.fixture
def pages(tmp_path: Path) -> list[str]:
    names = []
    for index in range(3):
        path = tmp_path / f"page-{index}.png"
        Image.new("RGB", (60, 84), (80 * index, 90, 120)).save(path)
        names.append(str(path))
    return names


@pytest.fixture
def call(tiny_engine: EngineFactory, backend: str) -> Call:
    """The command with the tiny engine of a quantization; its exit code."""

    def run(quant: str, *arguments: str) -> int:
        options = ["--device", "cpu", "--backend", backend, "--max-new-tokens", "12"]
        return main(["--engine", str(tiny_engine(quant)), *options, *arguments])

    return run


def test_text_output(
    call: Call, backend: str, pages: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("int4", QUESTION, *pages) == 0
    out = capsys.readouterr().out
    for word in ("Reasoning", "Ranking", "Status", "Stop reason", "Timings ms"):
        assert word in out
    assert all(f"page-{index}.png" in out for index in range(3))
    assert f"Backend      {backend}\n" in out


def test_options_may_stand_between_the_question_and_the_pages(
    tiny_engine: EngineFactory, backend: str, pages: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--engine", str(tiny_engine("int4")), "--device", "cpu", "--max-new-tokens", "3"]
    options += ["--backend", backend]
    assert main([QUESTION, *options, "--json", *pages]) == 0
    assert json.loads(capsys.readouterr().out)["usage"]["pages"] == 3


def test_json_is_one_document(
    call: Call, pages: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("int8", QUESTION, *pages, "--json", "--top-k", "2") == 0
    out = capsys.readouterr().out
    document = json.loads(out)
    assert out.count("\n") == 1
    assert sorted(document["order"]) == [0, 1, 2] and document["top"] == document["order"][:2]
    assert {"status", "stop_reason", "reasoning", "text", "usage", "timings_ms"} <= set(document)
    assert document["score_type"] == "rank"


def test_stream_shows_the_reasoning_once(
    call: Call, pages: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert call("bf16", QUESTION, *pages, "--json") == 0
    reasoning = json.loads(capsys.readouterr().out)["reasoning"]
    assert call("bf16", QUESTION, *pages, "--stream") == 0
    out = capsys.readouterr().out
    assert out.startswith(reasoning + "\n\n") and "Reasoning" not in out
    assert call("bf16", QUESTION, *pages, "--stream", "--json") == 0
    captured = capsys.readouterr()
    assert captured.err.startswith(reasoning)
    assert json.loads(captured.out)["reasoning"] == reasoning


def test_pdf_pages_are_candidates(
    call: Call, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sheets = [Image.new("RGB", (60, 84), (90 * i, 0, 0)) for i in range(2)]
    sheets[0].save(tmp_path / "report.pdf", save_all=True, append_images=sheets[1:])
    arguments = (QUESTION, "--pdf", str(tmp_path / "report.pdf"), "--max-pixels", "7840", "--json")
    assert call("bf16", *arguments) == 0
    assert json.loads(capsys.readouterr().out)["usage"]["pages"] == 2


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([QUESTION], "no pages were given"),
        ([" ", "{page}"], "blank"),
        ([QUESTION, "{page}.missing"], "page 1"),
        ([QUESTION, "--pdf", "nowhere.pdf"], "nowhere.pdf"),
        ([QUESTION, "{page}", "--temperature", "-2"], "temperature=-2"),
        ([QUESTION, "{page}", "--device", "tpu"], "device='tpu'"),
    ],
)
def test_errors_are_one_line(
    call: Call,
    pages: list[str],
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    filled = [argument.format(page=pages[0]) for argument in arguments]
    assert call("bf16", *filled) == 1
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert captured.err.startswith("mmr5-rerank: error: ") and message in captured.err


def test_missing_engine_and_process_exit_code(pages: list[str], tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-c",
        "import sys; from mmr5_runtime.cli import main; sys.exit(main())",
    ]
    arguments = ["--engine", str(tmp_path / "none"), QUESTION, *pages]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert str(tmp_path / "none") in done.stderr and done.stderr.count("\n") == 1
