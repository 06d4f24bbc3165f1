"""CUDA sources through NVRTC: every variant compiles, nothing spills, the cache, and its errors."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from mmr5_kernels.cuda import nvrtc
from mmr5_kernels.cuda.w4_linear import source
from mmr5_kernels.cuda.w4_plan import Variant

SMALL = 'extern "C" __global__ void twice(int* p) { p[threadIdx.x] *= FACTOR; }'


@pytest.fixture(autouse=True)
def _needs_nvrtc() -> None:
    try:
        nvrtc.version()
    except RuntimeError as error:
        pytest.skip(str(error))


# One tile must leave room for a second block on an SM: 65536 registers for 896 threads.
@pytest.mark.parametrize(
    ("capability", "variant", "registers"),
    [
        ((8, 0), Variant(14, 3, 1, True, True), 72),
        ((8, 0), Variant(14, 3, 2, True, True), 144),
        ((9, 0), Variant(14, 3, 1, False, False), 72),
        ((9, 0), Variant(14, 3, 1, False, True), 72),
        ((9, 0), Variant(14, 3, 2, True, False), 144),
    ],
)
def test_w4_linear_compiles_without_spilling(
    capability: tuple[int, int], variant: Variant, registers: int, tmp_path: Path
) -> None:
    triton = pytest.importorskip("triton", reason="its package has the disassembler")
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    cubin = tmp_path / "w4.cubin"
    cubin.write_bytes(nvrtc.cubin(source(), capability, variant.defines, tmp_path))

    def dump(what: str) -> str:
        command = [str(tool), what, str(cubin)]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    usage = dump("-res-usage")
    found = re.search(r"w4_linear_kernel:\s+REG:(\d+) STACK:(\d+) .*LOCAL:(\d+)", usage)
    assert found, usage
    assert int(found[1]) <= registers and (found[2], found[3]) == ("0", "0")
    code = dump("-sass")
    copies = re.findall(r"LDGSTS\S*", code)
    assert copies and all("BYPASS" in c and c.endswith(".128") for c in copies)
    assert code.count("HMMA.16816.F32.BF16") == 16 * variant.tiles
    assert code.count("HFMA2") + code.count("HADD2") >= 64  # 128 codes of a lane, two at a time
    assert ("ACQBULK" in code) == (capability >= (9, 0))


def test_the_cache_serves_the_same_source_and_options_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = nvrtc.cubin(SMALL, (8, 0), [("FACTOR", 2)], tmp_path)
    assert made.startswith(b"\x7fELF")
    nvrtc.cubin(SMALL, (9, 0), [("FACTOR", 2)], tmp_path)
    nvrtc.cubin(SMALL, (8, 0), [("FACTOR", 3)], tmp_path)
    files = sorted(tmp_path.iterdir())
    assert len(files) == 3 and all(file.suffix == ".cubin" for file in files)
    with monkeypatch.context() as patch:
        patch.setattr(nvrtc, "compile_source", None)
        assert nvrtc.cubin(SMALL, (8, 0), [("FACTOR", 2)], tmp_path) == made
    for file in files:
        file.write_bytes(b"")  # what a full disk leaves
    assert nvrtc.cubin(SMALL, (8, 0), [("FACTOR", 2)], tmp_path).startswith(b"\x7fELF")


def test_the_cache_folder_follows_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert nvrtc.default_cache() == tmp_path / "mmr5-runtime"


def test_a_folder_that_cannot_be_written_warns_and_compiles(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.warns(UserWarning, match="compiled kernels are not kept"):
        made = nvrtc.cubin(SMALL, (8, 0), [("FACTOR", 4)], tmp_path / "file")
    assert made.startswith(b"\x7fELF")


def test_errors_carry_the_log_and_name_the_gpu(tmp_path: Path) -> None:
    with pytest.raises(nvrtc.CompileError, match=r'sm_80[\s\S]*identifier "FACTOR" is undefined'):
        nvrtc.cubin(SMALL, (8, 0), folder=tmp_path)
    with pytest.raises(RuntimeError, match="compiles for compute capabilities .* not 3.0"):
        nvrtc.cubin(SMALL, (3, 0), [("FACTOR", 2)], tmp_path)
    assert not list(tmp_path.iterdir())
