"""The TensorRT-LLM checkpoint against ModelOpt's, from golden files; see their README."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers.trtllm_checkpoint import EngineCheckpoint
from helpers.trtllm_oracle import CASES, DTYPES, describe
from helpers.trtllm_tiny import all_linears, dense_decoder, given_engine, tiny_spec
from mmr5_export.options import OptionError
from mmr5_export.quantize import quantize_linear
from mmr5_export.trtllm.engine_checkpoint import (
    WEIGHTS_NAME,
    plan_engine_checkpoint,
    write_engine_checkpoint,
)
from mmr5_export.trtllm.modelopt_formats import NONE
from mmr5_kernels.layout import INT8_WEIGHT_ONLY
from mmr5_kernels.reference import dequantize
from mmr5_runtime.spec import decoder_linear_shapes

GOLDEN = Path(__file__).parents[1] / "golden" / "modelopt"
CELLS = [(case, dtype) for case in CASES for dtype in DTYPES]

# Every key that is not ModelOpt's on purpose, and why: see mmr5_export.trtllm.engine_config.
CHANGED = {"producer", "architecture", "position_embedding_type"}
ADDED = {
    "qwen_type",
    "attn_bias",
    "mlp_bias",
    "rotary_embedding_dim",
    "rotary_scaling",
    "seq_length",
}


def golden(case: str, dtype: str, file: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((GOLDEN / case / dtype / file).read_text())
    return found


def values(case: str) -> tuple[dict[str, Tensor], dict[str, float]]:
    """ModelOpt's stored tensors by our names, and its largest inputs."""
    path = GOLDEN / case / "values.safetensors"
    tensors = load_file(path) if path.exists() else {}
    suffix = ".input_absmax"
    absmax = {name.removesuffix(suffix): float(tensors[name]) for name in tensors if suffix in name}
    return {name: tensor for name, tensor in tensors.items() if suffix not in name}, absmax


def written(case: str, dtype: str, folder: Path) -> dict[str, Any]:
    """Writes what our packer makes of ModelOpt's values."""
    spec, format = CASES[case].spec, CASES[case].format
    dense = dense_decoder(spec)
    given, absmax = values(case)
    formats = {} if format is None else all_linears(spec, format)
    engine = given_engine(spec, formats, dense | given, dense.__getitem__, absmax)
    return write_engine_checkpoint(engine, folder, dtype)


@pytest.mark.parametrize(("case", "dtype"), CELLS)
def test_names_dtypes_and_shapes_are_those_of_modelopt(
    case: str, dtype: str, tmp_path: Path
) -> None:
    written(case, dtype, tmp_path)
    ours, theirs = describe(tmp_path / WEIGHTS_NAME), golden(case, dtype, "tensors.json")
    assert list(ours) == list(theirs)
    for name, found in ours.items():
        expected = theirs[name]
        assert (found["dtype"], found["shape"]) == (expected["dtype"], expected["shape"]), name


@pytest.mark.parametrize(("case", "dtype"), CELLS)
def test_bytes_are_those_of_modelopt_for_its_codes_and_scales(
    case: str, dtype: str, tmp_path: Path
) -> None:
    """All but the factors on inputs, which smoothing of ours has folded in and are one."""
    written(case, dtype, tmp_path)
    theirs = golden(case, dtype, "tensors.json")
    tensors = load_file(tmp_path / WEIGHTS_NAME)
    compared = 0
    for name, found in describe(tmp_path / WEIGHTS_NAME).items():
        if name.endswith("prequant_scaling_factor"):
            assert torch.equal(tensors[name], torch.ones_like(tensors[name])), name
        else:
            assert found["sha256"] == theirs[name]["sha256"], name
            compared += 1
    assert compared >= 8 * CASES[case].layers + 3  # 5 weights, a bias and 2 norms to a layer


@pytest.mark.parametrize(("case", "dtype"), CELLS)
def test_config_keys_are_those_of_modelopt_but_for_the_named_ones(
    case: str, dtype: str, tmp_path: Path
) -> None:
    written(case, dtype, tmp_path)
    ours = json.loads((tmp_path / "config.json").read_text())
    theirs = golden(case, dtype, "config.json")
    assert set(ours) - set(theirs) == ADDED and set(theirs) <= set(ours)
    assert {key for key in theirs if ours[key] != theirs[key]} == CHANGED
    assert ours["architecture"] == "Qwen2VLForConditionalGeneration"
    assert ours["position_embedding_type"] == ours["rotary_scaling"]["type"] == "mrope"
    assert ours["rotary_scaling"]["mrope_section"] == [8, 12, 12]
    assert (ours["qwen_type"], ours["rotary_embedding_dim"]) == ("qwen2_vl", 64)
    assert (ours["attn_bias"], ours["mlp_bias"]) == (True, False)


@pytest.mark.parametrize(("case", "dtype"), CELLS)
def test_reading_back_gives_what_the_codes_stand_for(case: str, dtype: str, tmp_path: Path) -> None:
    written(case, dtype, tmp_path)
    spec, format = CASES[case].spec, CASES[case].format
    found = dict(EngineCheckpoint(tmp_path, spec).weights())
    dense, (given, _) = dense_decoder(spec), values(case)
    assert set(found) == set(dense)
    for name, expected in dense.items():
        linear, _, suffix = name.rpartition(".")
        if format is None or suffix == "bias" or linear not in decoder_linear_shapes(spec):
            same = found[name].float() == expected.to(DTYPES[dtype]).float()
        elif case == "fp8":
            same = (found[name] - expected.float()).abs() <= expected.float().abs() / 16 + 1e-6
        else:
            codes = "weight_packed" if format.weights == "int4" else "weight"
            parts = {part: given[f"{linear}.{part}"] for part in (codes, "weight_scale")}
            same = found[name] == dequantize(format, parts, torch.float32)
        assert bool(same.all()), name


def test_the_head_comes_from_the_original_and_else_from_the_engine(tmp_path: Path) -> None:
    spec = tiny_spec(1)
    dense = dense_decoder(spec)
    head = dense["lm_head.weight"]
    parts, _ = quantize_linear(head.float(), INT8_WEIGHT_ONLY)
    stored = {name: tensor for name, tensor in dense.items() if name != "lm_head.weight"}
    stored |= {f"lm_head.{suffix}": part for suffix, part in parts.items()}
    formats = {"lm_head": INT8_WEIGHT_ONLY}
    for original, expected, words in (
        (dense.__getitem__, head, "original"),
        (None, dequantize(INT8_WEIGHT_ONLY, parts, torch.float32).half(), "dequantized from w8a16"),
    ):
        engine = given_engine(spec, formats, stored, original)
        facts = write_engine_checkpoint(engine, tmp_path)
        assert words in facts["head"]
        found = EngineCheckpoint(tmp_path, spec).tensor("lm_head.weight")
        assert torch.equal(found, expected.half())
    facts = write_engine_checkpoint(given_engine(spec, {}, dense), tmp_path, "bfloat16")
    assert "bf16" in facts["head"] and facts["dtype"] == "bfloat16"
    assert torch.equal(EngineCheckpoint(tmp_path, spec).tensor("lm_head.weight"), head)


def test_the_plan_says_how_many_bytes_there_will_be(tmp_path: Path) -> None:
    spec = tiny_spec(2)
    write_engine_checkpoint(given_engine(spec, {}, dense_decoder(spec)), tmp_path)
    planned = plan_engine_checkpoint(spec, NONE, "float16")
    header = 1 << 14
    size = (tmp_path / WEIGHTS_NAME).stat().st_size
    assert 0 <= size - sum(tensor.num_bytes for tensor in planned) < header


def test_facts_claim_no_run(tmp_path: Path) -> None:
    facts = written("int8-smoothquant", "float16", tmp_path)
    assert facts["quant_algo"] == "W8A8_SQ_PER_CHANNEL"
    assert "static" in facts["activations"]
    for words in (
        "W8A8_SQ_PER_CHANNEL: layout compared in this project's tests, on a small Qwen2 model",
        "but for the input factors, which are ones",
        "these files were not executed",
    ):
        assert words in facts["verified"]


@pytest.mark.parametrize(
    ("case", "words"),
    [("fp8", "bytes for its own largest inputs)"), ("none", "bytes of what it does not quantize)")],
)
def test_facts_speak_of_the_quantization_that_was_written(
    case: str, words: str, tmp_path: Path
) -> None:
    verified = written(case, "float16", tmp_path)["verified"]
    assert words in verified and "factors" not in verified


def test_an_input_that_was_always_zero_gets_a_scale(tmp_path: Path) -> None:
    case = CASES["int8-smoothquant"]
    dense, (given, absmax) = dense_decoder(case.spec), values("int8-smoothquant")
    absmax["model.layers.0.mlp.down_proj"] = 0.0
    assert case.format is not None
    engine = given_engine(
        case.spec, all_linears(case.spec, case.format), dense | given, dense.__getitem__, absmax
    )
    write_engine_checkpoint(engine, tmp_path)
    found = EngineCheckpoint(tmp_path, case.spec)
    scale = found.tensor("transformer.layers.0.mlp.proj.activation_scaling_factor")
    assert scale.tolist() == [1.0]


def test_fp8_is_not_rounded_anew_behind_another_method(tmp_path: Path) -> None:
    case = CASES["fp8"]
    dense, (_, absmax) = dense_decoder(case.spec), values("fp8")
    assert case.format is not None
    engine = given_engine(
        case.spec, all_linears(case.spec, case.format), dense, dense.__getitem__, absmax
    )
    quant = replace(engine.manifest.quant, method="smoothquant+gptq")
    smoothed = replace(engine, manifest=replace(engine.manifest, quant=quant))
    with pytest.raises(OptionError, match="made by rtn only and not by smoothquant"):
        write_engine_checkpoint(smoothed, tmp_path)
    assert not list(tmp_path.iterdir())
