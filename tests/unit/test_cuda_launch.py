"""The launcher against a driver built from the real cuda.h that runs nothing."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mmr5_kernels.cuda import launch

SOURCE = Path(__file__).parents[1] / "helpers" / "cuda_emulator" / "driver.cpp"
CUBIN = b"\x7fELF and the rest"


class Argument(ctypes.Structure):
    _fields_ = [("number", ctypes.c_int)]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ to compile the driver with")
    triton = pytest.importorskip("triton", reason="its package has cuda.h")
    include = Path(triton.__file__).parent / "backends" / "nvidia" / "include"
    made = tmp_path_factory.mktemp("driver") / "libcuda.so.1"
    flags = ["-std=c++17", "-shared", "-fPIC", "-I", str(include), "-o", str(made)]
    subprocess.run([compiler, *flags, str(SOURCE)], check=True)
    library = ctypes.CDLL(str(made))
    library.driver_calls.restype = library.driver_launch.restype = ctypes.c_char_p
    return library


@pytest.fixture
def driver(library: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> ctypes.CDLL:
    monkeypatch.setattr(launch, "_driver", lambda: library)
    monkeypatch.setattr(torch.cuda, "init", lambda: None)
    stream = SimpleNamespace(cuda_stream=0x7F0011223344)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    library.driver_reset(b"")
    return library


def test_structures_have_the_size_that_the_driver_expects(library: ctypes.CDLL) -> None:
    assert library.driver_sizes(0) == ctypes.sizeof(launch.LaunchConfig)
    assert library.driver_sizes(1) == ctypes.sizeof(launch.LaunchAttribute)


@pytest.mark.parametrize("dependent", [True, False])
def test_the_driver_gets_what_was_asked_for(driver: ctypes.CDLL, dependent: bool) -> None:
    kernel = launch.Kernel(CUBIN, "kernel", 1, 98304)
    kernel.launch((132, 2), 448, 98000, Argument(7), dependent=dependent)
    attribute = " pdl=1" if dependent else ""
    shape = f"132 2 1 448 1 1 98000 {int(dependent)} {0x7F0011223344}"
    assert driver.driver_launch().decode() == f"{shape}{attribute} 7"
    calls = driver.driver_calls().decode().split()
    # The context is made current once, and asked for at every call.
    assert calls.count("cuCtxSetCurrent") == 1 and calls.count("cuCtxGetCurrent") == 2


@pytest.mark.parametrize(
    "function",
    [
        "cuDeviceGet",
        "cuCtxGetCurrent",
        "cuDevicePrimaryCtxRetain",
        "cuCtxSetCurrent",
        "cuModuleLoadData",
        "cuModuleGetFunction",
        "cuFuncSetAttribute",
        "cuLaunchKernelEx",
    ],
)
def test_every_error_of_the_driver_is_raised(driver: ctypes.CDLL, function: str) -> None:
    driver.driver_reset(function.encode())
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_VALUE, invalid argument") as caught:
        kernel = launch.Kernel(CUBIN, "kernel", 0, 98304)
        kernel.launch((1, 1), 32, 0, Argument(1), dependent=False)
    if function == "cuModuleLoadData":
        assert "serves CUDA 12.4" in str(caught.value)


def test_shared_memory_is_asked_of_the_right_device(driver: ctypes.CDLL) -> None:
    assert launch.most_shared_bytes(3) == 1043  # the driver adds 40 to ordinals, and then 1000
    driver.driver_reset(b"cuDeviceGetAttribute")
    with pytest.raises(RuntimeError, match="asking for the shared memory"):
        launch.most_shared_bytes(0)


def test_a_missing_driver_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> ctypes.CDLL:
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    with pytest.raises(RuntimeError, match="need the NVIDIA driver"):
        launch._driver.__wrapped__()
