"""The runners themselves, over packages that only note what they are asked."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib import resources
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor

from helpers.tensorrt_stand_in import install_tensorrt
from helpers.trtllm_loaded import BUDGET, write_bundle
from helpers.trtllm_stand_in import bind
from helpers.trtllm_tiny import tiny_spec
from mmr5_runtime.image import REFERENCE_BUDGET
from mmr5_runtime.prompt import PromptTokenizer
from mmr5_runtime.rope import Grid
from mmr5_runtime.sampler import SamplingParams
from mmr5_runtime.trtllm.bundle import Bundle, find_bundle
from mmr5_runtime.trtllm.inputs import vision_inputs
from mmr5_runtime.trtllm.prompt import OpenPrompt, RunnerPrompt, ShownPage
from mmr5_runtime.trtllm.runner import (
    EngineRunner,
    LlmApiRunner,
    VisionSession,
    gpu_index,
    open_runner,
)
from mmr5_runtime.types import EngineError

CPU = torch.device("cpu")
VISION = tiny_spec(2).vision


class Package:
    """What a test's ``tensorrt_llm`` was asked, and how it says that calls have ended."""

    def __init__(self) -> None:
        self.from_dir: list[dict[str, Any]] = []
        self.generated: list[dict[str, Any]] = []
        self.reason = "stop"
        self.closed = 0


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Package:
    noted = Package()

    class LLM:
        def __init__(self, **keywords: Any) -> None:
            bind("LLM", keywords)

        def generate(self, **keywords: Any) -> SimpleNamespace:
            noted.generated.append(keywords)
            output = SimpleNamespace(token_ids=[7, 8], finish_reason=noted.reason)
            return SimpleNamespace(outputs=[output])

        def shutdown(self) -> None:
            noted.closed += 1

    def from_dir(**keywords: Any) -> object:
        bind("ModelRunnerCpp.from_dir", keywords)
        noted.from_dir.append(keywords)
        return object()

    contents: dict[str, dict[str, Any]] = {
        "tensorrt_llm": {"__version__": "1.2.1", "LLM": LLM, "SamplingParams": dict},
        "tensorrt_llm.runtime": {"ModelRunnerCpp": SimpleNamespace(from_dir=from_dir)},
        "tensorrt_llm.layers": {"MropeParams": dict},
        "tensorrt_llm.llmapi": {"KvCacheConfig": dict},
    }
    for name, values in contents.items():
        module = ModuleType(name)
        for key, value in values.items():
            setattr(module, key, value)
        monkeypatch.setitem(sys.modules, name, module)
    return noted


@pytest.fixture
def tokenizer() -> PromptTokenizer:
    file = resources.files("mmr5_runtime") / "assets" / "mini" / "tokenizer.json"
    return PromptTokenizer(Tokenizer.from_str(file.read_text(encoding="utf-8")))


def bundle_of(folder: Path, target: str) -> Bundle:
    write_bundle(folder, target, tiny_spec(2), BUDGET)
    return find_bundle(folder)


def summed(pixels: Tensor, grid: Grid) -> Tensor:
    """Page embeddings that tell patches and shapes of pages apart."""
    tokens = pixels.view(-1, VISION.merge_unit * VISION.patch_dim).sum(1, keepdim=True)
    return tokens * grid[1] + torch.arange(VISION.out_hidden_size)


def patches(grid: Grid) -> Tensor:
    count = grid[1] * grid[2]
    generator = torch.Generator().manual_seed(count)
    return torch.randn(count, VISION.patch_dim, generator=generator)


def profile(most: int) -> dict[str, list[list[int]]]:
    """Shapes of pages up to ``most`` patches."""
    columns = {"pixels": VISION.patch_dim, "cos": 8, "sin": 8, "windows": 64, "window_mask": 64}
    shapes = {name: [[1, 1], [1, 1], [most, width]] for name, width in columns.items()}
    return {**shapes, "places": [[1], [1], [most]]}


@pytest.mark.parametrize("grid", [(1, 4, 8), (1, 8, 4), (1, 2, 6)])
def test_the_vision_engine_is_fed_what_its_page_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, grid: Grid
) -> None:
    install_tensorrt(monkeypatch, summed, VISION, "BF16", [profile(16), profile(32)])
    session = VisionSession(bundle_of(tmp_path, "engine"), CPU)
    found = session.run(vision_inputs(patches(grid), grid, VISION))
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, summed(patches(grid), grid).bfloat16())
    assert session._context.profile == (0 if grid == (1, 2, 6) else 1)


def test_a_page_that_no_profile_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install_tensorrt(monkeypatch, summed, VISION, "BF16", [profile(16)])
    session = VisionSession(bundle_of(tmp_path, "engine"), CPU)
    with pytest.raises(EngineError, match="no profile.*max_pixels"):
        session.run(vision_inputs(patches((1, 4, 8)), (1, 4, 8), VISION))


def test_a_vision_engine_of_another_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install_tensorrt(monkeypatch, summed, VISION)
    bundle = bundle_of(tmp_path, "engine")
    (bundle.folder / "vision" / "model.engine").write_bytes(b"elsewhere")
    with pytest.raises(EngineError, match=r"does not load in TensorRT 10\.14\.1"):
        VisionSession(bundle, CPU)


def test_engines_are_loaded_on_the_gpu_that_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: Package
) -> None:
    install_tensorrt(monkeypatch, summed, VISION)
    runner = EngineRunner(bundle_of(tmp_path, "engine"), tiny_spec(2), CPU, 1)
    assert package.from_dir[0]["device_ids"] == [1]
    assert runner.dtype == torch.bfloat16 and runner.ignores == frozenset()
    assert gpu_index(torch.device("cuda:1")) == 1
    with pytest.raises(EngineError, match="cpu is none"):
        gpu_index(CPU)


def test_the_llm_api_takes_the_first_gpu_only(
    tmp_path: Path, package: Package, tokenizer: PromptTokenizer
) -> None:
    bundle = bundle_of(tmp_path, "llm-api")
    with pytest.raises(EngineError, match="not cuda:1.*CUDA_VISIBLE_DEVICES=1"):
        open_runner(bundle, tiny_spec(2), torch.device("cuda:1"), tokenizer)
    opened = open_runner(bundle, tiny_spec(2), torch.device("cuda:0"), tokenizer)
    assert opened.encodes_pages and opened.dtype == torch.bfloat16


def opened(
    folder: Path, tokenizer: PromptTokenizer, text: str = "So:"
) -> tuple[LlmApiRunner, OpenPrompt]:
    """A prompt of ``text`` and one page of four tokens, for the LLM API."""
    spec = tiny_spec(2)
    text_spec = replace(spec.text, vocab_size=tokenizer.image_pad_id + 1)
    spec = replace(spec, text=text_spec, image_token_id=tokenizer.image_pad_id)
    runner = LlmApiRunner(bundle_of(folder, "llm-api"), spec, "1.2.1", tokenizer)
    page = ShownPage(
        bytes(32), (1, 4, 4), lambda: torch.zeros(4, 8), lambda: Image.new("RGB", (56, 56))
    )
    ids = [*tokenizer.text_ids(text), *[tokenizer.image_pad_id] * 4]
    return runner, runner.open(RunnerPrompt(ids, [page], REFERENCE_BUDGET))


def test_calls_go_on_behind_what_was_written(
    tmp_path: Path, package: Package, tokenizer: PromptTokenizer
) -> None:
    _, prompt = opened(tmp_path, tokenizer)
    behind = tokenizer.text_ids("<think>")
    for written in ([], behind):
        prompt.generate(written, 5, SamplingParams(), None)
        [*_, call] = package.generated
        ids = [*tokenizer.text_ids("So:"), tokenizer.image_pad_id, *written]
        assert call["inputs"]["prompt_token_ids"] == ids
    images = [call["inputs"]["multi_modal_data"]["image"][0] for call in package.generated]
    assert images[0] is images[1]


def test_tokens_that_would_be_read_as_others_are_refused(
    tmp_path: Path, package: Package, tokenizer: PromptTokenizer
) -> None:
    """The API tokenizes the text of a prompt: two tokens that have one in their place."""
    _, prompt = opened(tmp_path, tokenizer)
    whole = tokenizer.text_ids("</think>")
    pieces = [token for letter in "</think>" for token in tokenizer.text_ids(letter)]
    assert pieces != whole and tokenizer.decode(pieces) == tokenizer.decode(whole)
    prompt.generate(whole, 5, SamplingParams(), None)
    with pytest.raises(EngineError, match="other tokens.*think='full'"):
        prompt.generate(pieces, 5, SamplingParams(), None)
    assert len(package.generated) == 1


def test_an_image_token_that_the_model_wrote_is_no_page(
    tmp_path: Path, package: Package, tokenizer: PromptTokenizer
) -> None:
    _, prompt = opened(tmp_path, tokenizer)
    with pytest.raises(EngineError, match="the model wrote an image token"):
        prompt.generate([tokenizer.image_pad_id], 5, SamplingParams(), None)


def test_why_a_call_ended_is_what_the_api_says(
    tmp_path: Path, package: Package, tokenizer: PromptTokenizer
) -> None:
    _, prompt = opened(tmp_path, tokenizer)
    for reason, ended in (("stop", True), ("length", False)):
        package.reason = reason
        assert prompt.generate([], 5, SamplingParams(), None) == ([7, 8], ended)
    package.reason = "cancelled"
    with pytest.raises(EngineError, match="cancelled"):
        prompt.generate([], 5, SamplingParams(), None)


def test_closing_shuts_the_api_down_once(
    tmp_path: Path, package: Package, tokenizer: PromptTokenizer
) -> None:
    runner, _ = opened(tmp_path, tokenizer)
    runner.close()
    runner.close()
    assert package.closed == 1


def test_what_is_missing_is_what_the_message_names(
    tmp_path: Path, package: Package, tokenizer: PromptTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setitem(sys.modules, "yaml", None)
        with pytest.raises(EngineError, match=r"PyYAML is not installed, and .*llm_args-1\.2\.1"):
            opened(tmp_path, tokenizer)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(EngineError, match=r"tensorrt is not installed.*tensorrt_llm 1\.2\.1"):
        open_runner(bundle_of(tmp_path, "engine"), tiny_spec(2), CPU, tokenizer)
