"""Bundles: which one, whether it is whole and built, and one clear error for everything else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from mmr5_runtime.artifact import file_sha256
from mmr5_runtime.options import RerankOptions
from mmr5_runtime.trtllm.bundle import Bundle, check_bundle, find_bundle
from mmr5_runtime.trtllm.options import check_load, check_options
from mmr5_runtime.trtllm.prompt import Limits
from mmr5_runtime.trtllm.runner import installed_versions
from mmr5_runtime.types import EngineError, RequestError

CONFIG: dict[str, Any] = {
    "pretrained_config": {"max_position_embeddings": 512, "vocab_size": 64, "dtype": "float16"},
    "build_config": {
        "max_input_len": 300,
        "max_seq_len": 400,
        "max_prompt_embedding_table_size": 200,
        "plugin_config": {"use_paged_context_fmha": True},
    },
}


def make(
    folder: Path, target: str = "engine", files: tuple[str, ...] = ("ckpt/config.json",)
) -> Path:
    """An engine folder with a bundle whose files hold their own names."""
    bundle = folder / "tensorrt-llm" / target
    entries = {}
    for name in files:
        path = bundle / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
        entries[name] = {"sha256": file_sha256(path), "size": path.stat().st_size}
    bundle.mkdir(parents=True, exist_ok=True)
    (bundle / "bundle.json").write_text(json.dumps({"target": target, "files": entries}))
    return bundle


def build(bundle: Path, config: dict[str, Any] | None = None) -> None:
    for name in ("llm/rank0.engine", "vision/model.engine"):
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        (bundle / name).write_bytes(b"engine")
    (bundle / "llm/config.json").write_text(json.dumps(CONFIG if config is None else config))


def test_a_bundle_is_found_and_checked(tmp_path: Path) -> None:
    folder = make(tmp_path)
    bundle = find_bundle(tmp_path)
    assert bundle == Bundle(folder, "engine")
    check_bundle(bundle, hashes=True)


def test_without_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="--backend tensorrt-llm"):
        find_bundle(tmp_path)


def test_of_two_bundles_the_built_one_is_taken(tmp_path: Path) -> None:
    engine, api = make(tmp_path, "engine"), make(tmp_path, "llm-api")
    assert find_bundle(tmp_path) == Bundle(api, "llm-api")
    build(engine)
    assert find_bundle(tmp_path) == Bundle(engine, "engine")


@pytest.mark.parametrize("hashes", [False, True])
def test_missing_cut_and_altered_files(tmp_path: Path, hashes: bool) -> None:
    folder = make(tmp_path, files=("a", "b/c"))
    bundle = find_bundle(tmp_path)
    (folder / "b/c").write_text("b/C")  # as long as it was
    if hashes:
        with pytest.raises(EngineError, match="b/c was altered"):
            check_bundle(bundle, hashes)
    else:
        check_bundle(bundle, hashes)
    (folder / "b/c").write_text("longer than it was")
    with pytest.raises(EngineError, match="b/c was altered"):
        check_bundle(bundle, hashes)
    (folder / "b/c").unlink()
    with pytest.raises(EngineError, match="b/c is missing"):
        check_bundle(bundle, hashes)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"target": "engine", "files": {"a": 1}}'])
def test_what_describes_no_bundle(tmp_path: Path, text: str) -> None:
    (make(tmp_path) / "bundle.json").write_text(text)
    with pytest.raises(EngineError, match=r"bundle\.json.*export the engine again"):
        check_bundle(find_bundle(tmp_path), hashes=False)


@pytest.mark.parametrize("name", ["../outside", "/etc/hosts", "a//b"])
def test_a_bundle_that_lists_files_of_others(tmp_path: Path, name: str) -> None:
    folder = make(tmp_path, files=())
    (folder.parent / "outside").write_text("")
    entry = {name: {"sha256": "", "size": 0}}
    (folder / "bundle.json").write_text(json.dumps({"target": "engine", "files": entry}))
    with pytest.raises(EngineError, match="outside its folder"):
        check_bundle(find_bundle(tmp_path), hashes=False)


def test_engines_may_be_built_again(tmp_path: Path) -> None:
    folder = make(tmp_path)
    build(folder)
    bundle = find_bundle(tmp_path)
    before = bundle.stamps()
    (folder / "llm/rank0.engine").write_bytes(b"another engine")
    check_bundle(bundle, hashes=True)
    assert set(before) == set(bundle.stamps()) and before != bundle.stamps()


def test_a_bundle_in_the_folder_of_the_other(tmp_path: Path) -> None:
    folder = make(tmp_path)
    (folder / "bundle.json").write_text('{"target": "llm-api", "files": {}}')
    with pytest.raises(EngineError, match="'llm-api'.*'engine'"):
        check_bundle(find_bundle(tmp_path), hashes=False)


def test_engines_that_were_not_built(tmp_path: Path) -> None:
    folder = make(tmp_path)
    bundle = find_bundle(tmp_path)
    with pytest.raises(EngineError, match=r"have not been built; run .*build\.sh on the machine"):
        bundle.built()
    build(folder)
    (folder / "vision/model.engine").unlink()
    with pytest.raises(EngineError, match=r"vision/model\.engine is missing"):
        bundle.built()


def test_what_an_engine_was_built_for(tmp_path: Path) -> None:
    build(make(tmp_path))
    built = find_bundle(tmp_path).built()
    assert built.limits == Limits(sequence=400, prompt=300, images=200)
    assert (built.positions, built.vocab_size, built.reuse) == (512, 64, True)
    assert built.dtype == torch.float16


@pytest.mark.parametrize(("name", "dtype"), [("bfloat16", torch.bfloat16), ("float32", None)])
def test_page_embeddings_have_the_dtype_of_the_build(
    tmp_path: Path, name: str, dtype: torch.dtype | None
) -> None:
    model = {**CONFIG["pretrained_config"], "dtype": name}
    build(make(tmp_path), CONFIG | {"pretrained_config": model})
    bundle = find_bundle(tmp_path)
    if dtype is not None:
        assert bundle.built().dtype == dtype
        return
    with pytest.raises(EngineError, match="float32"):
        bundle.built()


@pytest.mark.parametrize("missing", ["build_config", "pretrained_config"])
def test_an_engine_without_its_description(tmp_path: Path, missing: str) -> None:
    build(make(tmp_path), {key: value for key, value in CONFIG.items() if key != missing})
    with pytest.raises(EngineError, match=r"build\.sh again"):
        find_bundle(tmp_path).built()


def test_arguments_are_those_of_the_installed_version_or_its_minor_release(tmp_path: Path) -> None:
    names = ("llm_args-1.2.1.yaml", "llm_args-1.3.0rc22.yaml", "llm_args-1.4.0rc1.yaml")
    make(tmp_path, "llm-api", (*names, "llm_args-1.3.0rc9.yaml"))  # which is older than rc22
    bundle = find_bundle(tmp_path)
    for version, name in (
        ("1.2.1", names[0]),
        ("1.3.0rc22", names[1]),
        ("1.3.0rc29", names[1]),
        ("1.4.2", names[2]),
    ):
        assert bundle.arguments_file(version).name == name
    with pytest.raises(
        EngineError, match=r"1\.2\.1, 1\.3\.0rc9, 1\.3\.0rc22, 1\.4\.0rc1 but 2\.0 is installed"
    ):
        bundle.arguments_file("2.0")


@pytest.mark.parametrize(
    ("target", "versions"), [("engine", "1.2.1"), ("llm-api", "1.3.0rc22 or 1.4.0rc1")]
)
def test_without_the_package(tmp_path: Path, target: str, versions: str) -> None:
    make(tmp_path, target, ("llm_args-1.3.0rc22.yaml", "llm_args-1.4.0rc1.yaml"))
    said = f"tensorrt_llm is not installed.*install tensorrt_llm {versions} from.*'native'"
    with pytest.raises(EngineError, match=said):
        installed_versions(find_bundle(tmp_path))


@pytest.mark.parametrize(
    "options",
    [
        {"deadline_ms": 5.0},
        {"think": "auto"},
        {"draft": True},
        {"image_kv": "relocate"},
        {"plan": "cascade"},
    ],
    ids=str,
)
def test_options_of_a_request_that_are_refused(options: dict[str, Any]) -> None:
    [name] = options
    with pytest.raises(RequestError, match=rf"{name}=.*TensorRT-LLM backend"):
        check_options(RerankOptions(**options))


def test_a_seed_is_refused_where_it_would_be_ignored() -> None:
    options = RerankOptions(temperature=0.3, seed=5)
    check_options(options)
    with pytest.raises(RequestError, match="seed=5 does not work"):
        check_options(options, frozenset({"seed"}))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"think": "off"},
        {"think": 40},
        {"stop": "eos"},
        {"constrain": False},
        {"temperature": 0.3, "samples": 3, "seed": 1},
        {"plan": "tournament", "window": 4},
        {"layout": "images_first"},
    ],
    ids=str,
)
def test_options_of_a_request_that_hold(options: dict[str, Any]) -> None:
    check_options(RerankOptions(**options))


PLAIN: dict[str, object] = {
    "dtype": "auto", "kernels": "auto", "prefill": "exact", "kv": "bf16", "graphs": None
}  # fmt: skip


@pytest.mark.parametrize(
    "asked",
    [
        {"dtype": "float32"},
        {"kernels": "triton"},
        {"prefill": "int8"},
        {"kv": "int8"},
        {"graphs": False},
    ],
    ids=str,
)
def test_options_of_a_load_that_the_export_has_settled(asked: dict[str, object]) -> None:
    check_load(PLAIN)
    [name] = asked
    with pytest.raises(RequestError, match=f"{name}=.*leave {name} out"):
        check_load(PLAIN | asked)
