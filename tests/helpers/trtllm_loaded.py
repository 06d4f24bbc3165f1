"""Rerankers over the TensorRT-LLM adapter, loaded from a folder as users load them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.tensorrt_stand_in import install_tensorrt
from helpers.trtllm_stand_in import Played, install
from mmr5_runtime import Reranker
from mmr5_runtime.loading import LoadedEngine
from mmr5_runtime.spec import ModelSpec
from mmr5_runtime.trtllm import runner

BUDGET = {"max_input_len": 2048, "max_seq_len": 4096, "max_prompt_embedding_table_size": 1024}


def load_played(
    monkeypatch: pytest.MonkeyPatch,
    native: LoadedEngine,
    folder: Path,
    target: str = "engine",
    version: str = "1.2.1",
    **limits: int,
) -> tuple[Reranker, Played]:
    """``folder``, an engine folder, with a bundle for ``target``, and what plays TensorRT-LLM.

    That computes with ``native``. ``limits`` are those of the build. Only the question whether
    there is a GPU is not asked.
    """
    write_bundle(folder, target, native.engine.spec, BUDGET | limits)
    package = Played(native.engine)
    install(monkeypatch, package, native.tokenizer, native.image_settings, version)
    install_tensorrt(monkeypatch, native.engine.encode_page, native.engine.spec.vision)
    monkeypatch.setattr(runner, "gpu_index", lambda device: 0)
    return Reranker.load(folder, "cpu", backend="tensorrt-llm"), package


def write_bundle(folder: Path, target: str, spec: ModelSpec, build: dict[str, int]) -> None:
    """A bundle that lists no files, with what a build makes or LLM arguments."""
    bundle = folder / "tensorrt-llm" / target
    bundle.mkdir(parents=True, exist_ok=True)
    (bundle / "bundle.json").write_text(json.dumps({"target": target, "files": {}}))
    if target == "llm-api":
        arguments: dict[str, Any] = {key: build[key] for key in ("max_input_len", "max_seq_len")}
        arguments |= {"dtype": "bfloat16", "kv_cache_config": {"enable_block_reuse": True}}
        for version in ("1.2.1", "1.4.0rc1"):
            # JSON is YAML.
            (bundle / f"llm_args-{version}.yaml").write_text(json.dumps(arguments))
        return
    config = {
        "build_config": build | {"plugin_config": {"use_paged_context_fmha": True}},
        "pretrained_config": {
            "max_position_embeddings": spec.text.max_position_embeddings,
            "vocab_size": spec.text.vocab_size,
            "dtype": "bfloat16",
        },
    }
    for name, content in (
        ("llm/config.json", json.dumps(config).encode()),
        ("llm/rank0.engine", b"engine"),
        ("vision/model.engine", b"engine"),
    ):
        (bundle / name).parent.mkdir(exist_ok=True)
        (bundle / name).write_bytes(content)
