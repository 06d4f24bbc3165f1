"""Which kernels a device may use, and what is said where it may not."""

from __future__ import annotations

import json
import subprocess
import sys
import warnings

import pytest
import torch

from mmr5_kernels import proven, target
from mmr5_kernels.target import INTERPRETED, Target


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine that claims to have one H200."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr(target, "_triton_version", lambda: (3, 6))
    monkeypatch.setattr(target, "_driver_version", lambda: 12_080)
    target._warn.cache_clear()
    return monkeypatch


def test_a_cpu_has_portable_kernels() -> None:
    assert Target.of("cpu") == Target("cpu") == Target.of(torch.device("cpu"), "portable")
    with pytest.raises(ValueError, match="need a CUDA device, not cpu"):
        Target.of("cpu", "triton")


def test_unknown_kernels_are_refused() -> None:
    with pytest.raises(ValueError, match="auto, portable, triton, cuda, not 'fast'"):
        Target.of("cpu", "fast")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_gpu_is_an_error() -> None:
    with pytest.raises(ValueError, match="cuda cannot be used: .*; ?.*use device='cpu'|driver"):
        Target.of("cuda")


def test_a_gpu_has_what_is_asked_for(gpu: pytest.MonkeyPatch) -> None:
    assert Target.of("cuda", "triton") == Target("cuda", (9, 0), "triton")
    assert Target.of("cuda", "portable") == Target("cuda", (9, 0))
    cuda = Target.of("cuda", "cuda")
    assert cuda.allows("int4_w4_cuda") and cuda.allows("int4_skinny")
    assert not Target.of("cuda", "triton").allows("int4_w4_cuda")
    gpu.setattr(proven, "records", lambda: {})
    assert Target.of("cuda") == Target("cuda", (9, 0), "portable")
    gpu.setattr(proven, "records", lambda: {"sm_90": {"kernels": ["greedy"]}})
    auto = Target.of("cuda")
    assert auto == Target("cuda", (9, 0), "auto")
    assert auto.allows("greedy") and not auto.allows("int4_skinny")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("_triton_version", None, "Triton is missing and the kernels need 3.6: pip install"),
        ("_triton_version", (3, 5), "Triton is 3.5 and the kernels need 3.6"),
        ("_driver_version", 11_080, "serves CUDA 11.8 and Triton's programs need 12.0: update it"),
    ],
)
def test_what_is_too_old_is_named(
    gpu: pytest.MonkeyPatch, name: str, value: object, message: str
) -> None:
    gpu.setattr(target, name, lambda: value)
    with pytest.raises(ValueError, match=message):
        Target.of("cuda", "triton")
    with pytest.warns(UserWarning, match=message):
        assert Target.of("cuda").kernels == "portable"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # said once, and not where nothing was hoped for
        assert Target.of("cuda").kernels == "portable"
        assert Target.of("cuda", "portable").kernels == "portable"


def test_an_old_gpu_gets_portable_kernels(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    with pytest.warns(UserWarning, match="compute capability 7.5 and the Triton kernels need 8.0"):
        assert Target.of("cuda") == Target("cuda", (7, 5))


def test_portable_allows_no_triton_kernel() -> None:
    assert not Target("cuda", (9, 0)).allows("int4_skinny")
    assert INTERPRETED.allows("int4_skinny")


def test_choosing_imports_no_triton() -> None:
    code = (
        "from mmr5_kernels import dispatch, fused, skinny_layout, target, tuning\n"
        "target.Target.of('cpu')\n"
        "import json, sys; print(json.dumps('triton' in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) is False
