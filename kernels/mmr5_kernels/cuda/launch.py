"""Loads cubins and launches their kernels through the CUDA driver, on torch's current stream."""

from __future__ import annotations

import ctypes
from functools import cache

import torch

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_MOST_SHARED = 97  # CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
_PROGRAMMATIC_SERIALIZATION = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION


class LaunchAttribute(ctypes.Structure):
    """``CUlaunchAttribute``, whose value is a union of 64 bytes of which one int is used here."""

    _fields_ = [
        ("id", ctypes.c_int),
        ("pad", ctypes.c_char * 4),
        ("value", ctypes.c_int),
        ("rest", ctypes.c_char * 60),
    ]


class LaunchConfig(ctypes.Structure):
    """``CUlaunchConfig``."""

    _fields_ = [
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(LaunchAttribute)),
        ("num_attributes", ctypes.c_uint),
    ]


class Kernel:
    """One function of a cubin, loaded on one device."""

    def __init__(self, cubin: bytes, name: str, device: int, max_shared_bytes: int) -> None:
        """Raises ``RuntimeError`` when the driver is missing, too old, or refuses the cubin."""
        self.name = name
        self.device = device
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        _make_current(device)
        driver = _driver()
        code = driver.cuModuleLoadData(ctypes.byref(self._module), cubin)
        if code:
            served = "{}.{}".format(*divmod(_driver_version() // 10, 100))
            raise RuntimeError(
                f"the driver, which serves CUDA {served}, does not load {name}: {_reason(code)}. "
                "Update the driver, or install an nvidia-cuda-nvrtc of its CUDA version or older."
            )
        _check(
            driver.cuModuleGetFunction(ctypes.byref(self._function), self._module, name.encode()),
            f"finding {name}",
        )
        _check(
            driver.cuFuncSetAttribute(self._function, _MAX_DYNAMIC_SHARED, max_shared_bytes),
            f"giving {name} {max_shared_bytes} bytes of shared memory",
        )

    def launch(
        self,
        grid: tuple[int, int],
        threads: int,
        shared_bytes: int,
        argument: ctypes.Structure,
        *,
        dependent: bool,
    ) -> None:
        """Starts the kernel, which takes one structure by value, on torch's current stream.

        ``dependent``: it may start before the kernel ahead of it has ended, and waits for that
        itself (programmatic dependent launch; for compute capability 9.0 and up).
        Raises ``RuntimeError`` for every error that the driver reports.
        """
        _make_current(self.device)
        attribute = LaunchAttribute(id=_PROGRAMMATIC_SERIALIZATION, value=1)
        config = LaunchConfig(
            grid=(*grid, 1),
            block=(threads, 1, 1),
            shared_bytes=shared_bytes,
            stream=torch.cuda.current_stream(self.device).cuda_stream,
            attributes=ctypes.pointer(attribute),
            num_attributes=int(dependent),
        )
        arguments = (ctypes.c_void_p * 1)(ctypes.addressof(argument))
        code = _driver().cuLaunchKernelEx(
            ctypes.byref(config), self._function, arguments, ctypes.c_void_p()
        )
        _check(code, f"launching {self.name} as {grid} blocks of {threads} with {shared_bytes} B")


def most_shared_bytes(device: int) -> int:
    """Shared memory that a block can have on this device, when it asks for it."""
    torch.cuda.init()
    handle, value = ctypes.c_int(), ctypes.c_int()
    driver = _driver()
    _check(driver.cuDeviceGet(ctypes.byref(handle), device), f"finding cuda:{device}")
    code = driver.cuDeviceGetAttribute(ctypes.byref(value), _MOST_SHARED, handle)
    _check(code, "asking for the shared memory of a block")
    return value.value


def _make_current(device: int) -> None:
    """A thread that has not used torch on the device yet has no context to launch in."""
    torch.cuda.init()
    context = ctypes.c_void_p()
    driver = _driver()
    handle = ctypes.c_int()
    _check(driver.cuDeviceGet(ctypes.byref(handle), device), f"finding cuda:{device}")
    _check(driver.cuCtxGetCurrent(ctypes.byref(context)), "asking for the context")
    if context.value:
        current = ctypes.c_int()
        _check(driver.cuCtxGetDevice(ctypes.byref(current)), "asking for the device")
        if current.value == handle.value:
            return
    _check(_primary_context(handle.value, context), f"the context of cuda:{device}")
    _check(driver.cuCtxSetCurrent(context), f"switching to cuda:{device}")


def _primary_context(handle: int, context: ctypes.c_void_p) -> int:
    code: int = _driver().cuDevicePrimaryCtxRetain(ctypes.byref(context), ctypes.c_int(handle))
    return code


@cache
def _driver() -> ctypes.CDLL:
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise RuntimeError(
            "CUDA kernels need the NVIDIA driver, and libcuda.so.1 was not found: install the "
            "driver, or use device='cpu'."
        ) from error
    if not hasattr(driver, "cuLaunchKernelEx"):
        raise RuntimeError("the NVIDIA driver is older than CUDA 11.8: update it.")
    return driver


def _driver_version() -> int:
    """CUDA version that the driver serves, as 13000."""
    version = ctypes.c_int()
    _check(_driver().cuDriverGetVersion(ctypes.byref(version)), "asking for the driver's version")
    return version.value


def _check(code: int, doing: str) -> None:
    if code:
        raise RuntimeError(f"CUDA driver, {doing}: {_reason(code)}.")


def _reason(code: int) -> str:
    name, text = ctypes.c_char_p(), ctypes.c_char_p()
    _driver().cuGetErrorName(code, ctypes.byref(name))
    _driver().cuGetErrorString(code, ctypes.byref(text))
    said = [part.decode() for part in (name.value, text.value) if part]
    return ", ".join(said) or f"error {code}"
