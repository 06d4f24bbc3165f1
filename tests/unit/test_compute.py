"""Options of a load: what they become, and which mean nothing here."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mmr5_kernels.layout import INT4, INT8
from mmr5_kernels.target import INTERPRETED, Target
from mmr5_runtime import compute as module
from mmr5_runtime.compute import Compute, resolve
from mmr5_runtime.types import EngineError, RequestError

FORMATS = {"lm_head": INT8, "model.layers.0.mlp.down_proj": INT4}
GPU = torch.device("cuda", 0)


def cpu(dtype: str = "bfloat16", **options: Any) -> Compute:
    return resolve("cpu", dtype, FORMATS, **options)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if an H200 was there, on which everything has been proven or asked for."""
    monkeypatch.setattr(module, "resolve_device", lambda name: GPU)

    def of(device: torch.device, kernels: str) -> Target:
        return Target("cuda", (9, 0), "portable" if kernels == "auto" else kernels)

    monkeypatch.setattr(Target, "of", staticmethod(of))


def test_a_cpu_runs_plain_torch() -> None:
    found = cpu("auto")
    assert (found.dtype, found.target) == (torch.float32, Target("cpu"))
    assert not found.fused_steps and not found.graphs
    assert cpu(kv="int8", prefill="int8").kv == "int8"
    assert cpu(graphs=False) == cpu()


@pytest.mark.usefixtures("gpu")
def test_triton_kernels_run_fused_steps_in_graphs() -> None:
    found = resolve("cuda", "auto", FORMATS, kernels="triton")
    assert found.dtype == torch.bfloat16 and found.fused_steps and found.graphs
    eager = resolve("cuda", "auto", FORMATS, kernels="triton", graphs=False)
    assert eager.fused_steps and not eager.graphs
    portable = resolve("cuda", "auto", FORMATS)
    assert not portable.fused_steps and not portable.graphs


@pytest.mark.usefixtures("gpu")
def test_fp32_is_plain_torch_on_a_gpu_too() -> None:
    assert resolve("cuda", "float32", FORMATS).target.kernels == "portable"
    with pytest.raises(RequestError, match="computes in bfloat16 only"):
        resolve("cuda", "float32", FORMATS, kernels="triton")


def test_the_interpreter_runs_fused_steps_on_cpu_tensors() -> None:
    found = cpu(target=INTERPRETED)
    assert found.fused_steps and not found.graphs and found.device.type == "cpu"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kernels": "rocm"}, "kernels='rocm' is unknown; pass auto, portable, triton, cuda."),
        ({"kernels": "cuda"}, "kernels='cuda' needs a GPU"),
        ({"kernels": "triton"}, "kernels='triton' needs a GPU"),
        ({"prefill": "int4"}, "prefill='int4' is unknown; pass exact, int8, fp8."),
        ({"kv": "fp8"}, "kv='fp8' is unknown; pass bf16, int8."),
        ({"graphs": True}, "graphs=True records decode steps"),
    ],
)
def test_options_that_are_unknown_or_mean_nothing_on_a_cpu(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(RequestError) as caught:
        cpu(**options)
    assert message in str(caught.value)


def test_an_8_bit_prefill_needs_int4_weights() -> None:
    with pytest.raises(RequestError, match="this engine has none; leave prefill out"):
        resolve("cpu", "auto", {"lm_head": INT8}, prefill="int8")


def test_8_bit_floats_need_a_gpu_that_multiplies_them() -> None:
    old = Target("cuda", (8, 6), "triton", interpreted=True)
    with pytest.raises(EngineError, match="has 8.6; pass prefill='int8'"):
        cpu(prefill="fp8", target=old)
    assert cpu(prefill="fp8", target=INTERPRETED).prefill == "fp8"


def test_a_gpu_or_driver_that_does_not_serve_is_an_engine_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def of(device: torch.device, kernels: str) -> Target:
        raise ValueError("this GPU has compute capability 7.5 and the Triton kernels need 8.0.")

    monkeypatch.setattr(module, "resolve_device", lambda name: GPU)
    monkeypatch.setattr(Target, "of", staticmethod(of))
    with pytest.raises(EngineError, match="cannot run on cuda:0: this GPU has compute capability"):
        resolve("cuda", "auto", FORMATS, kernels="triton")


def test_whatever_may_change_a_bit_is_in_the_json() -> None:
    options: list[dict[str, Any]] = [
        {},
        {"kv": "int8"},
        {"prefill": "int8"},
        {"target": INTERPRETED},
        {"target": Target("cuda", (9, 0), "triton")},
    ]
    found = [str(cpu(**option).to_json()) for option in options]
    assert len(set(found)) == len(options)
