"""Options of a load: what they become, and which mean nothing here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmr5_kernels import tuning
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
@pytest.mark.parametrize("kernels", ["triton", "cuda"])
def test_triton_kernels_run_fused_steps_in_graphs(kernels: str) -> None:
    found = resolve("cuda", "auto", FORMATS, kernels=kernels)
    assert found.dtype == torch.bfloat16 and found.fused_steps and found.graphs
    eager = resolve("cuda", "auto", FORMATS, kernels=kernels, graphs=False)
    assert eager.fused_steps and not eager.graphs
    portable = resolve("cuda", "auto", FORMATS)
    assert not portable.fused_steps and not portable.graphs


@pytest.mark.usefixtures("gpu")
def test_fp32_is_plain_torch_on_a_gpu_too() -> None:
    assert resolve("cuda", "float32", FORMATS).target.kernels == "portable"
    for kernels in ("triton", "cuda"):
        with pytest.raises(RequestError, match="computes in bfloat16 only"):
            resolve("cuda", "float32", FORMATS, kernels=kernels)


@pytest.mark.usefixtures("gpu")
@pytest.mark.parametrize(
    ("dtype", "remedy"),
    [
        ("bfloat16", {"kernels": "triton"}),
        ("float32", {"dtype": "bfloat16", "kernels": "triton"}),
    ],
)
def test_what_graphs_need_on_a_gpu(dtype: str, remedy: dict[str, str]) -> None:
    with pytest.raises(RequestError) as caught:
        resolve("cuda", dtype, FORMATS, graphs=True)
    named = " and ".join(f"{name}={value!r}" for name, value in remedy.items())
    assert str(caught.value).endswith(f"; leave graphs out, or pass {named}.")
    options: dict[str, Any] = {"dtype": dtype, **remedy}
    assert resolve("cuda", formats=FORMATS, graphs=True, **options).graphs


@pytest.mark.parametrize("kernels", ["triton", "cuda"])
def test_on_a_cpu_the_dtype_is_not_what_is_wrong(kernels: str) -> None:
    with pytest.raises(RequestError, match=f"kernels='{kernels}' needs a GPU"):
        cpu("float32", kernels=kernels)


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
        ({"graphs": True}, "leave graphs out, or pass device='cuda'."),
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


@pytest.mark.parametrize("prefill", ["int8", "fp8"])
def test_an_8_bit_prefill_needs_its_kernel_on_a_gpu(prefill: str) -> None:
    portable = Target("cuda", (9, 0))
    with pytest.raises(EngineError, match="would run on the reference here.*kernels='triton'"):
        cpu(prefill=prefill, target=portable)
    assert cpu(prefill=prefill).prefill == prefill  # on a CPU it is for trying


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


@pytest.mark.parametrize("kernels", ["triton", "cuda"])
def test_what_decides_the_order_of_sums_is_in_the_json(
    kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, ours = cpu(), cpu(target=Target("cuda", (9, 0), kernels))
    before = plain.to_json(), ours.to_json()
    monkeypatch.setattr(module, "triton_version", lambda: "4.0.1")
    assert plain.to_json() == before[0] and ours.to_json() != before[1]
    monkeypatch.undo()
    monkeypatch.setattr(tuning, "digest", lambda: "other tiles")
    assert plain.to_json() == before[0] and ours.to_json() != before[1]
    monkeypatch.undo()
    assert ours.to_json() == before[1]


def test_the_digest_is_that_of_every_tuning_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in Path(tuning.__file__).parent.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    found = [tuning.digest()]
    monkeypatch.setattr("mmr5_kernels.tuning.resources.files", lambda package: tmp_path)
    for name in ("", "default.json", "prefill.json", "sm_86.json"):
        if name:
            with (tmp_path / name).open("ab") as stream:
                stream.write(b" ")
        tuning.digest.cache_clear()
        found.append(tuning.digest())
    monkeypatch.undo()
    tuning.digest.cache_clear()
    assert found[0] == found[1] and len(set(found)) == 4
