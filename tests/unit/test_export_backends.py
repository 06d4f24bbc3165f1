"""What an export for other engines refuses, plans and says before anything is written."""

from __future__ import annotations

import importlib.util
import json
import re
from dataclasses import replace
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.exporting import quick_export, write_samples
from helpers.for_tensorrt import MAX_PIXELS, TARGETS, for_tensorrt, write_untied
from mmr5_export.backends import check_backends
from mmr5_export.cli import OK, USAGE, main, parser
from mmr5_export.estimate import ResourceError
from mmr5_export.job import graphs_unverified, prepare
from mmr5_export.options import ExportOptions, OptionError
from mmr5_export.pipeline import export, plan_export
from mmr5_export.source import MINI

ROUNDED: dict[str, Any] = {"method": "rtn", "verify": False}
LLM_API: dict[str, Any] = {"backend": ("tensorrt-llm",), "trt_target": ("llm-api",)}
ENGINE: dict[str, Any] = {"backend": ("tensorrt-llm",), "trt_target": ("engine",)}
ONNX: dict[str, Any] = {"backend": ("tensorrt-llm",), "trt_target": ("onnx",)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_untied(tmp_path_factory.mktemp("untied"))


def refusal(model: Path | str, folder: Path, quant: str | None = "int4", **options: Any) -> str:
    """What a plan is refused with; nothing was written."""
    with pytest.raises(OptionError) as caught:
        plan_export(model, quant, folder / "engine", ExportOptions(**options))
    message = str(caught.value)
    assert message.endswith(".") and "\n" not in message
    assert not list(folder.iterdir())
    return message


# Contradictions that are seen without a checkpoint.


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"backend": ("tensorflow",)}, "--backend tensorflow is unknown; give one of native, onnx"),
        ({**ENGINE, "trt_target": ("plan",)}, "--trt-target plan is unknown; give one of engine"),
        ({"trt_target": ("onnx",)}, "--trt-target is about TensorRT, which nothing is written"),
        ({"trt_version": "1.2.1", "backend": ("onnxruntime",)}, "--trt-version is about TensorRT"),
        ({"max_seq_len": 100}, "--max-seq-len is about TensorRT"),
        ({"aot": "rtx"}, "--aot is about TensorRT"),
        ({**ONNX, "aot": "all"}, "--aot all is unknown; give one of rtx"),
        ({**ENGINE, "aot": "rtx"}, "--aot means nothing to --trt-target engine; add .*onnx"),
        ({**ONNX, "trt_version": "1.2.1"}, "--trt-version means nothing to --trt-target onnx"),
        ({**ONNX, "max_batch_size": 2}, "--max-batch-size means nothing to --trt-target onnx"),
        ({**LLM_API, "max_multimodal_len": 9}, "--max-multimodal-len means nothing to .*llm-api"),
        ({**ENGINE, "max_input_len": 0}, "--max-input-len is 0; give a number above 0"),
        ({**ENGINE, "max_multimodal_len": -1}, "--max-multimodal-len is -1"),
    ],
)
def test_options_that_contradict(options: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        ExportOptions(**options)


def test_equal_wishes_are_equal_options() -> None:
    asked = ["onnx", "engine", "onnx"]
    one = ExportOptions(backend=("tensorrt-llm", "native", "onnxruntime"), trt_target=tuple(asked))
    assert one == ExportOptions(
        backend=("onnxruntime", "tensorrt-llm"), trt_target=("engine", "onnx")
    )
    assert one.targets == ("engine", "onnx")
    assert ExportOptions(backend=("native",)) == ExportOptions()
    assert ExportOptions(backend=("tensorrt-llm",)).targets == ("engine",)
    assert ExportOptions(backend=("onnxruntime",)).targets == ()


def test_the_command_line_says_the_same() -> None:
    options = ExportOptions(
        **for_tensorrt(max_batch_size=2, max_multimodal_len=900, trt_version="1.2.1", aot="rtx")
    )
    words = options.arguments()
    assert words.count("--trt-target") == 3 and "tensorrt-llm" in words
    parsed = vars(parser().parse_args(["--output", "e", *words]))
    read = {key: value for key, value in parsed.items() if key in vars(options)}
    assert ExportOptions(**read) == options


# Refusals that need the checkpoint: its plan, its context, its pixel budget.


@pytest.mark.parametrize("target", ["engine", "llm-api"])
@pytest.mark.parametrize(
    ("quant", "options", "words"),
    [
        ("int4", {"symmetric": False}, "asymmetric"),
        ("int4", {"group_size": 64}, "groups of 64"),
        ("int4-mixed", {"method": None}, "mixed"),
        ("int8-weight-only", {}, "w8a16|weight-only int8"),
    ],
)
def test_weights_that_tensorrt_llm_cannot_hold(
    checkpoint: Path, tmp_path: Path, target: str, quant: str, options: dict[str, Any], words: str
) -> None:
    wanted = for_tensorrt(trt_target=(target,), **{**ROUNDED, **options})
    assert re.search(words, refusal(checkpoint, tmp_path, quant, **wanted))


def test_the_llm_api_has_nothing_to_gain_from_bf16(checkpoint: Path, tmp_path: Path) -> None:
    wanted = for_tensorrt(trt_target=("llm-api",))
    found = refusal(checkpoint, tmp_path, "bf16", **wanted)
    assert "TensorRT-LLM reads from the checkpoint itself" in found


def test_the_llm_api_has_no_kernel_for_int8(checkpoint: Path, tmp_path: Path) -> None:
    wanted = for_tensorrt(trt_target=("llm-api",), **ROUNDED)
    assert "no kernel for w8a8-int8" in refusal(checkpoint, tmp_path, "int8", **wanted)


def test_a_recipe_with_rules_of_its_own(checkpoint: Path, tmp_path: Path) -> None:
    recipe = tmp_path.parent / "mine.toml"
    recipe.write_text(
        '[quant]\nname = "mine"\nformat = "int4"\nmethod = "rtn"\n'
        '[[layers]]\nmatch = "model.layers.*.mlp.down_proj"\nformat = "int8-weight-only"\n'
    )
    wanted = for_tensorrt(trt_target=("llm-api",), verify=False)
    found = refusal(checkpoint, tmp_path, str(recipe), **wanted)
    assert re.search(r"stored alike, and they are w4a16-g128 \(.*\) and w8a16 \(.*\);", found)


def test_a_tied_model_has_no_engine(tmp_path: Path) -> None:
    assert "one table as embedding and head" in refusal(MINI, tmp_path, **ENGINE, **ROUNDED)


def test_static_scales_of_activations_need_lists_to_calibrate_on(
    checkpoint: Path, tmp_path: Path
) -> None:
    for target in ("engine", "onnx"):
        wanted = for_tensorrt(trt_target=(target,), **ROUNDED)
        found = refusal(checkpoint, tmp_path, "int8", **wanted)
        assert "TensorRT's scale of 8-bit activations needs questions" in found


def test_a_tower_of_8_bits_has_no_scale_for_its_inputs(checkpoint: Path, tmp_path: Path) -> None:
    for target in ("engine", "onnx"):
        wanted = for_tensorrt(trt_target=(target,), quantize_vision="int8", **ROUNDED)
        found = refusal(checkpoint, tmp_path, **wanted)
        assert "calibration, which is of decoder layers, has not seen that input" in found


def test_fp8_has_no_kernel_in_onnx_runtime(checkpoint: Path, tmp_path: Path) -> None:
    found = refusal(checkpoint, tmp_path, "fp8", backend=("onnxruntime",), verify=False)
    assert "ONNX Runtime does not multiply" in found


def test_zero_points_have_no_place_in_tensorrt(checkpoint: Path, tmp_path: Path) -> None:
    wanted = for_tensorrt(trt_target=("onnx",), symmetric=False, **ROUNDED)
    assert "without zero points" in refusal(checkpoint, tmp_path, **wanted)


@pytest.mark.parametrize(
    ("wanted", "option"),
    [
        ({"backend": ("onnxruntime",)}, "--backend onnxruntime"),
        (ENGINE, "--trt-target engine"),
        (ONNX, "--trt-target onnx"),
    ],
)
def test_graphs_without_the_package_that_writes_them(
    checkpoint: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    wanted: dict[str, Any],
    option: str,
) -> None:
    found_by = importlib.util.find_spec

    def without_onnx(name: str, package: str | None = None) -> ModuleSpec | None:
        return None if name == "onnx" else found_by(name, package)

    monkeypatch.setattr("importlib.util.find_spec", without_onnx)
    found = refusal(checkpoint, tmp_path, **wanted, max_pixels=MAX_PIXELS, **ROUNDED)
    assert found.startswith(f"{option} writes graphs with the package onnx")
    assert "install mmr5-runtime[export]" in found


def test_a_build_that_could_not_run_is_refused_before_the_work(
    checkpoint: Path,
    tmp_path_factory: pytest.TempPathFactory,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    site = tmp_path_factory.mktemp("site")
    (site / "tensorrt_llm").mkdir()
    (site / "tensorrt_llm" / "__init__.py").touch()
    (site / "tensorrt_llm-1.4.0rc1.dist-info").mkdir()
    metadata = "Metadata-Version: 2.1\nName: tensorrt_llm\nVersion: 1.4.0rc1\n"
    (site / "tensorrt_llm-1.4.0rc1.dist-info" / "METADATA").write_text(metadata)
    monkeypatch.syspath_prepend(str(site))
    wanted = for_tensorrt(trt_target=("engine",), **ROUNDED)
    found = refusal(checkpoint, tmp_path, **wanted)
    assert "TensorRT-LLM 1.4.0rc1 is installed but the build is for 1.2.1" in found


def test_versions_that_an_export_depends_on_are_those_it_uses(
    checkpoint: Path, tmp_path: Path
) -> None:
    def versions(**wanted: Any) -> set[str]:
        options = ExportOptions(**{**ROUNDED, "max_pixels": MAX_PIXELS, **wanted})
        job = prepare(checkpoint, "int4", tmp_path / "e", options, lambda *_, **__: None)
        return {"onnx", "onnxruntime"} & set(job.environment["versions"])

    assert versions() == versions(**LLM_API) == set()
    assert versions(**ENGINE) == versions(**ONNX) == {"onnx"}
    assert versions(backend=("onnxruntime",)) == {"onnx", "onnxruntime"}


def test_graphs_are_not_run_for_an_export_on_a_gpu(checkpoint: Path, tmp_path: Path) -> None:
    options = ExportOptions(**ROUNDED, backend=("onnxruntime",), device="cpu")
    job = prepare(checkpoint, "int4", tmp_path / "e", options, lambda *_, **__: None)
    assert graphs_unverified(job) is None
    on_gpu = graphs_unverified(replace(job, device=torch.device("cuda")))
    assert on_gpu == "they run on a CPU, and this export on cuda"


def test_running_the_graphs_is_a_stage_of_its_own(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    data = write_samples(tmp_path_factory.mktemp("data"), 2, own_of=checkpoint)
    wanted: dict[str, Any] = {"calib_data": data, "held_out": 2, "method": "rtn", "device": "cpu"}
    asked = {**wanted, "backend": ("onnxruntime",)}
    stage = "verifying with ONNX Runtime"

    def stages(**options: Any) -> dict[str, int]:
        made = plan_export(checkpoint, "int4", tmp_path / "e", ExportOptions(**options))
        return dict(made[1].needs.memory)

    assert stage not in stages(**wanted)
    assert stage not in stages(**{**asked, "verify": False})
    found = stages(**asked)
    assert found[stage] > 0
    # What there is no memory for is left out, and says so; it is no reason to refuse the export.
    largest = max(size for name, size in found.items() if name != stage)
    if largest < found[stage]:
        assert stage not in stages(**asked, free_memory=largest)
    made = plan_export(
        checkpoint, "int4", tmp_path / "e", ExportOptions(**asked, free_memory=found[stage] - 1)
    )
    skipped = made[1].graphs_skipped
    assert skipped is not None and re.search(r"takes about .* were free", skipped)
    assert stage not in made[1].needs.memory


def test_rtx_that_is_not_installed(checkpoint: Path, tmp_path: Path) -> None:
    if any(find_spec(name) for name in ("tensorrt_rtx", "tensorrt_rtx_bindings")):
        pytest.skip("TensorRT-RTX is installed")
    wanted = for_tensorrt(trt_target=("onnx",), aot="rtx", **ROUNDED)
    assert "TensorRT-RTX cannot be used" in refusal(checkpoint, tmp_path, **wanted)


def test_an_unknown_version_names_the_known(checkpoint: Path, tmp_path: Path) -> None:
    for target in ("engine", "llm-api"):
        wanted = for_tensorrt(trt_target=(target,), trt_version="0.20.0", **ROUNDED)
        found = refusal(checkpoint, tmp_path, **wanted)
        assert "give one of 1.2.1, 1.3.0rc22, 1.4.0rc1." in found


def test_a_version_without_a_builder_is_pointed_to_one(checkpoint: Path, tmp_path: Path) -> None:
    wanted = for_tensorrt(trt_target=("engine",), trt_version="1.4.0rc1", **ROUNDED)
    found = refusal(checkpoint, tmp_path, **wanted)
    assert "pass --trt-version 1.2.1" in found and "llm-api" in found


def test_a_quantized_source_keeps_neither_original_nor_ranges(
    checkpoint: Path, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    work = tmp_path_factory.mktemp("fp8")
    quick_export(
        checkpoint, "fp8", work / "engine", method=None, checkpoint_out=work / "hf", lm_head="bf16"
    )
    found = refusal(work / "hf", tmp_path, None, **for_tensorrt(trt_target=("engine",)))
    assert "needs the largest input of every linear" in found


def test_sizes_are_checked_for_every_target(checkpoint: Path, tmp_path: Path) -> None:
    for target in TARGETS:
        wanted = for_tensorrt(trt_target=(target,), max_seq_len=9999, **ROUNDED)
        assert "context has 4096" in refusal(checkpoint, tmp_path, **wanted)


# The command.


def test_a_refusal_is_a_wrong_usage_and_writes_nothing(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(checkpoint), "--method", "rtn", "--no-verify", "--asym"]
    words += ["--output", str(tmp_path / "engine"), "--backend", "tensorrt-llm"]
    for more in ([], ["--dry-run"]):
        assert main([*words, *more]) == USAGE
        assert "asymmetric" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_plan_names_files_bytes_and_memory(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--model", str(checkpoint), "--method", "rtn", "--no-verify", "--dry-run", "--json"]
    words += ["--output", str(tmp_path / "engine"), "--max-pixels", str(MAX_PIXELS)]
    assert main(words) == OK
    plain = json.loads(capsys.readouterr().out.splitlines()[-1])
    words += ["--backend", "onnxruntime", "--backend", "tensorrt-llm"]
    for target in TARGETS:
        words += ["--trt-target", target]
    assert main(words) == OK
    lines = capsys.readouterr().out.splitlines()
    found = json.loads(lines[-1])
    assert list(found["backends"]) == ["onnxruntime", *TARGETS] and plain["backends"] == {}
    added = sum(part["bytes"] for part in found["backends"].values())
    assert found["disk_bytes"] == plain["disk_bytes"] + added
    assert {"writing the ModelOpt checkpoint"} <= set(found["memory_bytes"])
    text = "\n".join(lines)
    assert "tensorrt-llm, target engine: about" in text and "tensorrt-llm/engine/" in text
    assert "onnxruntime: about" in text and "decoder.onnx" in text
    assert "--trt-target llm-api" in text  # the pointer to what is supported today
    assert not list(tmp_path.iterdir())


def test_a_disk_without_room_for_a_backend_is_too_small(checkpoint: Path, tmp_path: Path) -> None:
    words = ["--model", str(checkpoint), "--method", "rtn", "--no-verify"]
    words += ["--output", str(tmp_path / "engine"), "--max-pixels", str(MAX_PIXELS)]
    free = plan_export(
        checkpoint, "int4", tmp_path / "engine", ExportOptions(**ROUNDED, max_pixels=MAX_PIXELS)
    )[1].disk_bytes
    options = ExportOptions(**for_tensorrt(**ROUNDED, free_bytes=free))
    with pytest.raises(ResourceError, match="make room or choose another --output"):
        export(checkpoint, "int4", tmp_path / "engine", options)
    assert not list(tmp_path.iterdir())


def test_what_is_checked_is_what_a_job_wishes(checkpoint: Path, tmp_path: Path) -> None:
    options = ExportOptions(**for_tensorrt(**ROUNDED))
    job = prepare(checkpoint, "int4", tmp_path / "e", options, lambda *_, **__: None)
    assert job.wish.original and not job.wish.ranges and not job.wish.chosen_later
    check_backends(job.wish)
