"""What cannot become an engine unchanged is refused, with the tensor or the key and the reason."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.foreign import (
    awq_config,
    coarse,
    compressed_config,
    decoder,
    gptq_config,
    packed_config,
    rtn,
    w8a8_config,
    write_quantized,
)
from mmr5_export.prequantized import open_quantized
from mmr5_export.quant_config import read_schemes
from mmr5_kernels.layout import INT8, Format
from mmr5_runtime.types import CheckpointError

Q = "model.layers.0.self_attn.q_proj"
O = "model.layers.0.self_attn.o_proj"  # noqa: E741
GPTQ, PACKED = gptq_config(4, 32, True), packed_config(4, 32)
MODELOPT = {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ", "group_size": 32}
TAKEN = "cannot be taken over as it is quantized"
MakeFolder = Callable[..., Path]


@pytest.fixture
def made(tiny_checkpoint: Path, tmp_path: Path) -> MakeFolder:
    """Writes the tiny checkpoint in a layout, with tensors changed."""

    def make(
        layout: str,
        config: Mapping[str, Any],
        change: Mapping[str, Tensor | None] | None = None,
        format: Format | None = None,
        only: Callable[[str], bool] = lambda linear: True,
    ) -> Path:
        format = format or Format("int4", 32)
        formats = decoder(tiny_checkpoint, format)
        parts = {name: part for name, part in rtn(tiny_checkpoint, formats).items() if only(name)}
        folder = tmp_path / "quantized"
        return write_quantized(tiny_checkpoint, folder, layout, config, formats, parts, change)

    return make


def with_weights(**other: Any) -> dict[str, Any]:
    base = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
    return compressed_config("pack-quantized", {**base, **other}, None)


def with_activations(**other: Any) -> dict[str, Any]:
    config = w8a8_config("int")
    config["config_groups"]["group_0"]["input_activations"].update(other)
    return config


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"quant_method": "bitsandbytes"}, "quant_method 'bitsandbytes', which is none of"),
        ({}, "quant_method '', which"),
        (gptq_config(4, 32, True, desc_act=True), "desc_act .act-order., whose g_idx"),
        (gptq_config(3, 32, True), "GPTQ with bits 3, where an engine needs 4 or 8"),
        (gptq_config(4, 32, True, checkpoint_format="marlin"), "checkpoint_format marlin"),
        (gptq_config(4, 32, True, is_marlin_format=True), "is_marlin_format True"),
        (gptq_config(4, 32, True, dynamic={"-:.*": {}}), "dynamic"),
        (gptq_config(4, 0, True), "groups of 0 columns"),
        (awq_config(64, version="gemv"), "AWQ with version gemv, where an engine needs gemm"),
        (awq_config(64, bits=8), "AWQ with bits 8"),
        (awq_config(64, zero_point=False), "AWQ with zero_point False"),
        ({**MODELOPT, "quant_algo": "NVFP4"}, "ModelOpt with quant_algo NVFP4"),
        ({**MODELOPT, "kv_cache_quant_algo": "FP8"}, "kv_cache_quant_algo FP8"),
        (packed_config(4, 32, kv_cache_scheme={"num_bits": 8}), "kv_cache_scheme"),
        (packed_config(4, 32, transform_config={"u": 1}), "transform_config"),
        (packed_config(4, 32, sparsity_config={"format": "sparse-24"}), "sparsity sparse-24"),
        ({**PACKED, "format": "marlin-24"}, "format marlin-24, where an engine needs"),
        (packed_config(4, 32, config_groups={"W4A16": ["Linear"]}), "W4A16 .* is a preset name"),
        (with_weights(num_bits=3), "weights.num_bits 3, where an engine needs 4 or 8"),
        (with_weights(type="float"), "weights.type float"),
        (with_weights(actorder="group"), "reorders its columns by activation"),
        (with_weights(strategy="block"), "weights.strategy block"),
        (with_weights(dynamic=True), "weights.dynamic True"),
        (with_activations(dynamic=False), "input_activations.dynamic False"),
        (with_activations(strategy="tensor"), "input_activations.strategy tensor"),
        (with_activations(symmetric=False), "input_activations.symmetric False"),
        (with_activations(num_bits=4), "input_activations.num_bits 4"),
    ],
)
def test_a_config_that_no_engine_can_follow_is_refused(config: dict[str, Any], reason: str) -> None:
    with pytest.raises(CheckpointError, match=reason):
        read_schemes(config)


def test_a_scale_for_the_whole_fp8_tensor_is_refused() -> None:
    weights = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True}
    with pytest.raises(CheckpointError, match="weights.strategy tensor, where .* needs channel"):
        read_schemes(compressed_config("float-quantized", weights, None))


@pytest.mark.parametrize(
    ("layout", "config", "format", "reason"),
    [
        ("gptq", gptq_config(8, 64, False), Format("int8", 64), "int8 weights are symmetric"),
        ("gptq", gptq_config(4, 16, True), None, "groups of 16 columns are not made of"),
        (
            "gptq",
            gptq_config(4, 96, True),
            None,
            "no multiple of the group size 96",
        ),
        ("gptq", gptq_config(4, 64, True), None, r"qzeros has shape .* config.json says"),
        ("gptq", gptq_config(8, 32, True), None, r"qweight has shape"),
        ("awq", awq_config(64), None, "qzeros has shape|scales has shape"),
        ("pack-quantized", packed_config(4, 64), None, "weight_scale has shape"),
        ("pack-quantized", packed_config(4, 32, False), None, "lack .*weight_zero_point"),
        ("gptq", packed_config(4, 32), None, "lack .*weight_packed"),
        ("pack-quantized", GPTQ, None, "lack .*qweight"),
        ("plain", w8a8_config("float"), INT8, "weight is stored as I8 .* keeps F8_E4M3"),
        ("modelopt", {**MODELOPT, "group_size": 64}, None, "weight_scale has shape"),
    ],
)
def test_tensors_that_are_not_what_the_config_says_are_refused(
    made: MakeFolder, layout: str, config: dict[str, Any], format: Format | None, reason: str
) -> None:
    with pytest.raises(CheckpointError, match=reason):
        open_quantized(made(layout, config, format=format))


def test_a_missing_a_left_over_and_a_misshapen_tensor_are_named(
    made: MakeFolder, tmp_path: Path
) -> None:
    cases: list[tuple[dict[str, Tensor | None], str]] = [
        ({f"{O}.scales": None}, f"lack {O}.scales .1 tensors"),
        ({"model.norm.weight": None}, "lack model.norm.weight"),
        ({f"{O}.weight": torch.zeros(128, 128)}, f"hold {O}.weight"),
        ({f"{O}.scales": torch.zeros(3, 128)}, rf"{O}.scales has shape \[3, 128\]"),
        ({f"{O}.qweight": torch.zeros(16, 128)}, f"{O}.qweight is stored as F32"),
    ]
    for number, (change, reason) in enumerate(cases):
        folder = made("gptq", GPTQ, change)
        with pytest.raises(CheckpointError, match=reason):
            open_quantized(folder)
        folder.rename(tmp_path / str(number))


def test_a_truncated_file_is_refused(made: MakeFolder) -> None:
    folder = made("gptq", GPTQ)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match="truncated"):
        open_quantized(folder)


def test_columns_in_another_order_are_refused(made: MakeFolder) -> None:
    shuffled = (torch.arange(128, dtype=torch.int32) // 32).flip(0).contiguous()
    opened = open_quantized(made("gptq", GPTQ, {f"{O}.g_idx": shuffled}))
    with pytest.raises(CheckpointError, match=f"{O} {TAKEN} .g_idx reorders"):
        opened.parts(O)
    assert opened.parts(Q)


def test_zero_points_of_symmetric_weights_are_refused(made: MakeFolder) -> None:
    eights = torch.full((4, 16), -0x77777778, dtype=torch.int32)  # words of 8, so 9 in v1
    opened = open_quantized(made("gptq", GPTQ, {f"{O}.qzeros": eights}))
    with pytest.raises(
        CheckpointError,
        match=f"{O} {TAKEN} .w4a16-g32-fp16 .* zero",
    ):
        opened.parts(O)


def test_a_layer_that_scales_its_input_is_refused(made: MakeFolder) -> None:
    change: dict[str, Tensor | None] = {f"{O}.pre_quant_scale": torch.full((128,), 1.5)}
    opened = open_quantized(made("modelopt", MODELOPT, change))
    with pytest.raises(CheckpointError, match=f"{O} {TAKEN} .pre_quant_scale"):
        opened.parts(O)


def test_another_weight_shape_is_refused(made: MakeFolder) -> None:
    opened = open_quantized(
        made("pack-quantized", PACKED, {f"{O}.weight_shape": torch.zeros(2).long()})
    )
    with pytest.raises(CheckpointError, match=r"weight_shape is \[0, 0\]"):
        opened.parts(O)


def test_fused_linears_quantized_in_part_are_refused(made: MakeFolder) -> None:
    folder = made("gptq", GPTQ, only=lambda linear: not linear.endswith("k_proj"))
    with pytest.raises(CheckpointError, match="q_proj, k_proj, v_proj of model.layers.0.self_attn"):
        open_quantized(folder)


def test_a_vision_mlp_quantized_in_part_is_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    for number, part in enumerate(("gate_proj", "down_proj")):
        formats = {f"visual.blocks.1.mlp.{part}": INT8}
        parts = rtn(tiny_checkpoint, formats)
        config = {**w8a8_config("int"), "ignore": []}
        folder = tmp_path / str(number)
        write_quantized(tiny_checkpoint, folder, "plain", config, formats, parts)
        with pytest.raises(CheckpointError, match=r"visual\.blocks\.1\.mlp"):
            open_quantized(folder)


def test_a_config_without_quantized_weights_is_refused(made: MakeFolder) -> None:
    with pytest.raises(CheckpointError, match="holds no quantized linear"):
        open_quantized(made("gptq", GPTQ, only=lambda linear: False))


def test_a_linear_that_no_group_targets_is_refused(made: MakeFolder) -> None:
    config = packed_config(4, 32)
    config["config_groups"]["group_0"]["targets"] = ["re:.*mlp.*"]
    with pytest.raises(CheckpointError, match="q_proj is stored quantized but no config group"):
        open_quantized(made("pack-quantized", config))


def test_a_bias_that_the_architecture_lacks_must_be_zero(made: MakeFolder, tmp_path: Path) -> None:
    # AutoGPTQ gives every linear a bias.
    folder = made("gptq", GPTQ, {f"{O}.bias": torch.zeros(128, dtype=torch.float16)})
    opened = open_quantized(folder)
    assert f"{O}.bias" not in opened.tensors and f"{Q}.bias" in opened.tensors
    folder.rename(tmp_path / "zeros")
    folder = made("gptq", GPTQ, {f"{O}.bias": torch.ones(128, dtype=torch.float16)})
    with pytest.raises(CheckpointError, match=f"hold {O}.bias"):
        open_quantized(folder)


def test_modelopts_own_file_is_read(made: MakeFolder) -> None:
    folder = made("modelopt", {})
    inner = {"quant_algo": "W4A16_AWQ", "group_size": 32, "exclude_modules": ["lm_head"]}
    (folder / "hf_quant_config.json").write_text(json.dumps({"quantization": inner}))
    assert set(open_quantized(folder).formats.values()) == {Format("int4", 32, scale="fp32")}


def test_coarse_scales_stay_as_fine_as_they_are(made: MakeFolder, tiny_checkpoint: Path) -> None:
    known = coarse(rtn(tiny_checkpoint, {O: Format("int4", 32)}), zeros=False)[O]["weight_scale"]
    opened = open_quantized(made("gptq", GPTQ, {f"{O}.scales": known.T.contiguous()}))
    found = opened.parts(O)["weight_scale"]
    assert found.dtype == torch.float16 and torch.equal(found, known)
    assert not torch.equal(found.to(torch.bfloat16).half(), found)
