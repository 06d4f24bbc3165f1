"""What an export of the 7B is said to need, by stage, on a CPU and on a GPU."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.synthetic7b import config_7b
from mmr5_export.estimate import (
    Loaded,
    Needs,
    ResourceError,
    Workload,
    check_disk,
    check_memory,
    estimate,
    gigabytes,
)
from mmr5_export.machine import Speed
from mmr5_export.recipe import load_recipe
from mmr5_runtime.spec import ModelSpec, decoder_linear_shapes

SPEC = ModelSpec.from_hf_config(config_7b(layers=28, blocks=32))
WORK = Workload(
    prompts=160, tokens=700_000, longest=6_000, answer=2048, to_answer=0, gptq=True, awq=False,
    verify=True,
)  # fmt: skip
GB = 1e9
VOCABULARY, HIDDEN = 152064, 3584
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def needs(
    device: torch.device = CPU,
    dtype: torch.dtype = torch.bfloat16,
    quant: str = "int4",
    **work: Any,
) -> Needs:
    engine = Loaded(6_400_000_000, load_recipe(quant).formats(SPEC))
    answering = Loaded(16_600_000_000, {})
    speed = Speed(1e12, 1e11)
    return estimate(SPEC, replace(WORK, **work), engine, answering, dtype, device, speed)


def test_stages_are_those_that_will_run() -> None:
    assert set(needs().memory) == {"writing", "embedding", "layer", "verifying"}
    assert set(needs(to_answer=5).memory) == {*needs().memory, "answering"}
    nothing = needs(prompts=0, verify=False)
    assert set(nothing.memory) == {"writing"} and nothing.host == {}
    assert set(needs(CUDA, prompts=0, verify=False).host) == {"writing"}


def test_verification_counts_the_head_and_the_logits_of_both() -> None:
    short, long = (needs(answer=answer).memory["verifying"] for answer in (100, 2100))
    assert long - short >= 2 * 2000 * VOCABULARY * 4
    assert short > 6.4 * GB + VOCABULARY * HIDDEN * 2


@pytest.mark.parametrize(
    ("quant", "widened"),
    # gate and up run as one weight: 37888 x 3584 in fp64, fp32, or fp32 and then bf16.
    [("int8", 8 * 37888 * HIDDEN), ("fp8", 4 * 37888 * HIDDEN), ("int4", 6 * 37888 * HIDDEN)],
)
def test_cuda_kernels_that_widen_a_weight_are_counted(quant: str, widened: int) -> None:
    stages = ("verifying", "layer")
    on_gpu, on_cpu = needs(CUDA, quant=quant), needs(quant=quant)
    assert on_gpu.memory["verifying"] - on_cpu.memory["verifying"] > 0.8 * widened
    assert all(on_gpu.memory[stage] > 0 for stage in stages)
    if quant == "int8":  # and results of 37888 columns in fp64 for every token
        assert on_gpu.memory["verifying"] - on_cpu.memory["verifying"] > 8 * 6000 * 37888


def test_an_int8_copy_that_answers_on_a_gpu_is_widened_too() -> None:
    decoder = decoder_linear_shapes(SPEC)
    formats = load_recipe("int8-weight-only").formats(SPEC)
    models = [Loaded(9_000_000_000, {}), Loaded(9_000_000_000, {n: formats[n] for n in decoder})]
    work = replace(WORK, to_answer=9)
    found = [
        estimate(SPEC, work, models[0], model, torch.bfloat16, CUDA, Speed(1e12, 1e11))
        for model in models
    ]
    added = found[1].memory["answering"] - found[0].memory["answering"]
    assert added == 6 * 37888 * HIDDEN


def test_fp32_attention_on_a_gpu_has_scores_of_tokens_by_tokens() -> None:
    half, full = (needs(CUDA, dtype) for dtype in (torch.bfloat16, torch.float32))
    scores = 28 * 6_000**2 * 4
    for stage in ("verifying", "layer", "embedding"):
        assert full.memory[stage] - half.memory[stage] > 2 * scores
    assert needs(dtype=torch.float32).memory["layer"] < full.memory["layer"]


def test_a_gpu_still_needs_main_memory() -> None:
    found = needs(CUDA, to_answer=5)
    assert "writing" in found.host and "writing" not in found.memory  # the CPU writes
    assert set(found.memory) < set(found.host)
    # The layer as the checkpoint has it, maybe in fp32; the widest tensor while it is moved.
    assert found.host["layer"] > 4 * 233e6
    assert found.host["answering"] > 4 * VOCABULARY * HIDDEN


def test_awq_keeps_the_statistics_before_and_after_scaling() -> None:
    squares = 4 * (3 * HIDDEN**2 + 18944**2)
    assert needs(awq=True).memory["layer"] - needs().memory["layer"] == squares


def test_too_little_of_either_memory_is_refused() -> None:
    found = needs(CUDA)
    plenty = 10**12
    check_memory(found, CUDA, plenty, plenty)
    stage = max(found.memory, key=lambda name: found.memory[name])
    with pytest.raises(ResourceError, match=rf"the {stage} stage needs .* on cuda but 1\.00 GB"):
        check_memory(found, CUDA, 10**9, plenty)
    with pytest.raises(ResourceError, match=r"GB of main memory but 1\.00 GB are free"):
        check_memory(found, CUDA, plenty, 10**9)
    with pytest.raises(ResourceError, match="0.00 MB are free"):
        check_memory(needs(), CPU, 0)


def test_too_little_disk_names_the_option_that_chose_it(tmp_path: Path) -> None:
    check_disk(tmp_path, 1000, free=1000)
    with pytest.raises(ResourceError, match="needs 6.35 GB .* has 6.34 GB .* another --output"):
        check_disk(tmp_path, 6_350_000_000, free=6_340_000_000)
    with pytest.raises(ResourceError, match="choose another --checkpoint-out"):
        check_disk(tmp_path, 2, free=1, option="--checkpoint-out")
    with pytest.raises(ResourceError):
        check_disk(tmp_path / "not" / "yet", 1 << 60)


def test_sizes_for_people() -> None:
    assert gigabytes(99_999_999) == "100.00 MB" and gigabytes(123_456_789) == "0.12 GB"
