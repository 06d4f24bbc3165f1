"""CUDA C++ to a cubin through NVRTC, without a compiler on the machine and without a GPU.

NVRTC is a library of some wheels (``nvidia-cuda-nvrtc``; every CUDA build of torch brings it), and
is called through ctypes. Cubins are kept on disk, in ``mmr5-runtime`` under ``$XDG_CACHE_HOME`` or
``~/.cache``, by everything that they depend on.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import torch

_REMEDY = "pip install nvidia-cuda-nvrtc, or a CUDA build of torch, which brings it along"
_ELF = b"\x7fELF"


class CompileError(RuntimeError):
    """A source that NVRTC did not accept, with what it said."""


def default_cache() -> Path:
    """The folder of cubins; it need not exist."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "mmr5-runtime"


def cubin(
    source: str,
    capability: tuple[int, int],
    defines: Sequence[tuple[str, int]] = (),
    folder: Path | None = None,
) -> bytes:
    """``source`` compiled for GPUs of this compute capability, from the cache where it is there.

    ``defines`` are macros; ``folder`` is the cache, by default :func:`default_cache`. A cache that
    cannot be written warns once. Raises ``CompileError`` with the compiler's log, and
    ``RuntimeError`` when there is no NVRTC or it does not know the GPU.
    """
    folder = default_cache() if folder is None else folder
    options = [
        "--gpu-architecture=sm_{}{}".format(*capability),
        "--std=c++17",
        *(f"-D{name}={value}" for name, value in defines),
    ]
    key = hashlib.sha256("\0".join([source, *options, str(version())]).encode()).hexdigest()
    path = folder / f"{key[:32]}.cubin"
    try:
        kept = path.read_bytes()
    except OSError:
        kept = b""
    if kept.startswith(_ELF):
        return kept
    made = compile_source(source, options, capability)
    try:
        _write(path, made)
    except OSError as error:
        _warn(f"compiled kernels are not kept: {error}. Make {folder} writable to start faster.")
    return made


@cache
def version() -> tuple[int, int]:
    """Of the NVRTC that is used, as (13, 0)."""
    major, minor = ctypes.c_int(), ctypes.c_int()
    _check(_library().nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return major.value, minor.value


def compile_source(source: str, options: Sequence[str], capability: tuple[int, int]) -> bytes:
    """Runs NVRTC on ``source``; see :func:`cubin` for the errors."""
    known = _architectures()
    number = capability[0] * 10 + capability[1]
    if number not in known:
        raise RuntimeError(
            f"NVRTC {'{}.{}'.format(*version())} compiles for compute capabilities "
            f"{min(known) / 10} to {max(known) / 10}, not {number / 10}; install a newer "
            "nvidia-cuda-nvrtc, or use kernels='triton'."
        )
    library, program = _library(), ctypes.c_void_p()
    text = source.encode()
    _check(library.nvrtcCreateProgram(ctypes.byref(program), text, b"kernel.cu", 0, None, None))
    try:
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        if library.nvrtcCompileProgram(program, len(options), given):
            log = _read(program, library.nvrtcGetProgramLogSize, library.nvrtcGetProgramLog)
            raise CompileError(
                f"NVRTC {'{}.{}'.format(*version())} with {' '.join(options)}:\n"
                f"{log.rstrip(bytes(1)).decode(errors='replace')}"
            )
        return _read(program, library.nvrtcGetCUBINSize, library.nvrtcGetCUBIN)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


@cache
def _library() -> ctypes.CDLL:
    for name in _candidates():
        try:
            # NVRTC opens its builtins by name alone and does not look beside itself.
            beside = Path(name).parent.glob("libnvrtc-builtins.so.*") if "/" in name else ()
            for builtins in sorted(beside):
                ctypes.CDLL(str(builtins))
            library = ctypes.CDLL(name)
        except OSError:
            continue
        library.nvrtcGetErrorString.restype = ctypes.c_char_p
        return library
    raise RuntimeError(f"CUDA kernels are compiled by NVRTC, which was not found: {_REMEDY}.")


def _candidates() -> list[str]:
    """Paths and names to try, first those of the CUDA version that torch was built for."""
    spec = importlib.util.find_spec("nvidia")
    folders = spec.submodule_search_locations if spec else None
    found = [
        path
        for folder in folders or ()
        for path in Path(folder).glob("*/lib/libnvrtc.so.*")
        if path.name.count(".") == 2
    ]
    major = (torch.version.cuda or "").partition(".")[0]
    found.sort(key=lambda path: (path.suffix != f".{major}", path.name, str(path)))
    names = [f"libnvrtc.so.{major}"] if major else []
    return [*map(str, found), *names, "libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so"]


@cache
def _architectures() -> frozenset[int]:
    count = ctypes.c_int()
    _check(_library().nvrtcGetNumSupportedArchs(ctypes.byref(count)))
    numbers = (ctypes.c_int * count.value)()
    _check(_library().nvrtcGetSupportedArchs(numbers))
    return frozenset(numbers)


def _read(
    program: ctypes.c_void_p, size_of: Callable[..., int], contents_of: Callable[..., int]
) -> bytes:
    size = ctypes.c_size_t()
    _check(size_of(program, ctypes.byref(size)))
    contents = ctypes.create_string_buffer(size.value)
    _check(contents_of(program, contents))
    return contents.raw


def _check(code: int) -> None:
    if code:
        raise RuntimeError(f"NVRTC: {_library().nvrtcGetErrorString(code).decode()}.")


def _write(path: Path, contents: bytes) -> None:
    """Whole or not at all, also when several processes write the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(contents)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


@cache  # once per sentence
def _warn(sentence: str) -> None:
    warnings.warn(sentence, stacklevel=3)
