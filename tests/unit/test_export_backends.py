"""What an export for other engines refuses, plans and says before anything is written."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.exporting import quick_export
from helpers.for_tensorrt import MAX_PIXELS, PAGE_TOKENS, TARGETS, for_tensorrt, write_untied
from helpers.tiny import read_spec
from mmr5_export.backends import check_backends
from mmr5_export.cli import OK, USAGE, main, parser
from mmr5_export.estimate import ResourceError
from mmr5_export.job import prepare
from mmr5_export.largest_page import largest_page_tokens
from mmr5_export.options import ExportOptions, OptionError
from mmr5_export.pipeline import export, plan_export
from mmr5_export.source import MINI
from mmr5_export.trtllm.refusals import resolve_limits
from mmr5_runtime.image import PixelBudget, planned_sizes
from mmr5_runtime.manifest import PixelRange
from mmr5_runtime.spec import ModelSpec
from mmr5_runtime.types import PageError

ROUNDED: dict[str, Any] = {"method": "rtn", "verify": False}
LLM_API: dict[str, Any] = {"backend": ("tensorrt-llm",), "trt_target": ("llm-api",)}
ENGINE: dict[str, Any] = {"backend": ("tensorrt-llm",), "trt_target": ("engine",)}
ONNX: dict[str, Any] = {"backend": ("tensorrt-llm",), "trt_target": ("onnx",)}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_untied(tmp_path_factory.mktemp("untied"))


@pytest.fixture(scope="module")
def spec(checkpoint: Path) -> ModelSpec:
    return read_spec(checkpoint)


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
        ("int4", {"group_size": 64}, "groups of 64|not of 64"),
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
    assert "reads from the checkpoint itself" in refusal(checkpoint, tmp_path, "bf16", **wanted)


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
    assert "stored alike but they are w4a16-g128 and w8a16" in found


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
        assert "calibration has not seen that input" in refusal(checkpoint, tmp_path, **wanted)


def test_fp8_has_no_kernel_in_onnx_runtime(checkpoint: Path, tmp_path: Path) -> None:
    found = refusal(checkpoint, tmp_path, "fp8", backend=("onnxruntime",), verify=False)
    assert "ONNX Runtime does not multiply" in found


def test_zero_points_have_no_place_in_tensorrt(checkpoint: Path, tmp_path: Path) -> None:
    wanted = for_tensorrt(trt_target=("onnx",), symmetric=False, **ROUNDED)
    assert "without zero points" in refusal(checkpoint, tmp_path, **wanted)


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


# Sizes.


@given(st.integers(1, 8000), st.integers(1, 8000), st.integers(4, 900), st.integers(0, 900))
def test_no_page_is_larger_than_the_largest(
    spec: ModelSpec, width: int, height: int, low: int, more: int
) -> None:
    budget = PixelRange(low * 784, (low + more) * 784)
    try:
        _, (wide, high) = planned_sizes(width, height, PixelBudget(**asdict(budget)))
    except PageError:
        return
    assert wide * high // 784 <= largest_page_tokens(spec.vision, budget)


def test_the_least_number_that_would_do_is_named_and_does(spec: ModelSpec) -> None:
    budget = PixelRange(3136, MAX_PIXELS)
    too_small = ExportOptions(
        **ENGINE, max_multimodal_len=100, max_batch_size=3, max_new_tokens=1000
    )
    with pytest.raises(OptionError, match="too small for the page budget") as caught:
        resolve_limits(spec, budget, too_small)
    number = int(re.findall(r"; pass (\d+)", str(caught.value))[0])
    assert number == 3 * 20 * PAGE_TOKENS
    limits = resolve_limits(spec, budget, replace(too_small, max_multimodal_len=number))
    assert limits.max_multimodal_len == number
    with pytest.raises(OptionError):
        resolve_limits(spec, budget, replace(too_small, max_multimodal_len=number - 1))


def test_sizes_that_nobody_gave_hold_the_longest_default_request(spec: ModelSpec) -> None:
    options = ExportOptions(**ENGINE, max_new_tokens=1000)
    limits = resolve_limits(spec, PixelRange(3136, MAX_PIXELS), options)
    assert limits.page_tokens == PAGE_TOKENS
    assert limits.max_input_len == 20 * PAGE_TOKENS + 512
    assert limits.max_seq_len == limits.max_input_len + 1000
    assert limits.max_multimodal_len == 20 * PAGE_TOKENS and limits.max_batch_size == 1


def test_large_pages_are_cut_to_the_context(spec: ModelSpec) -> None:
    limits = resolve_limits(spec, PixelRange(3136, 28 * 28 * 700), ExportOptions(**ENGINE))
    assert limits.max_seq_len == spec.text.max_position_embeddings == 4096
    assert limits.max_input_len == 2048 and limits.max_multimodal_len == 2048 - 512


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        (
            {"max_input_len": 600},
            "600 does not hold 2 pages of up to 97 .*pass 706 or more",
        ),
        ({"max_input_len": 3000, "max_seq_len": 3000}, "no room for an answer"),
        ({"max_seq_len": 5000}, "context has 4096; pass --max-seq-len 4096"),
        ({"max_input_len": 4000}, "context has 4096"),
        ({"max_seq_len": 2100}, "a prompt of 52 tokens does not hold"),
    ],
)
def test_sizes_that_cannot_be(spec: ModelSpec, sizes: dict[str, Any], words: str) -> None:
    with pytest.raises(OptionError, match=words):
        resolve_limits(spec, PixelRange(3136, MAX_PIXELS), ExportOptions(**ENGINE, **sizes))


size = st.none() | st.integers(1, 6000)


@given(st.integers(1, 2000), size, size, size, st.none() | st.integers(1, 4))
def test_sizes_either_hold_together_or_are_refused(
    spec: ModelSpec,
    page: int,
    prompt: int | None,
    sequence: int | None,
    multimodal: int | None,
    batch: int | None,
) -> None:
    options = ExportOptions(
        **ENGINE,
        max_input_len=prompt,
        max_seq_len=sequence,
        max_multimodal_len=multimodal,
        max_batch_size=batch,
    )
    try:
        limits = resolve_limits(spec, PixelRange(3136, max(page, 4) * 784), options)
    except OptionError as error:
        assert str(error).endswith(".")
        return
    assert limits.max_input_len < limits.max_seq_len <= spec.text.max_position_embeddings
    assert 2 * limits.page_tokens < limits.max_input_len <= limits.max_num_tokens
    assert limits.max_multimodal_len >= 2 * limits.page_tokens
    for given_size, found in (
        (prompt, limits.max_input_len),
        (sequence, limits.max_seq_len),
        (multimodal, limits.max_multimodal_len),
        (batch, limits.max_batch_size),
    ):
        assert given_size in (None, found)


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
