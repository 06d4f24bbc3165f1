"""What is free: the machine's figure, and the limits of every cgroup around the process."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmr5_export.machine import available_memory, existing, free_disk, main_memory, measure_speed

GIB = 1 << 30


@pytest.fixture
def meminfo(tmp_path: Path) -> Path:
    path = tmp_path / "meminfo"
    path.write_text("MemTotal: 99999999 kB\nMemFree: 1 kB\nMemAvailable: 8388608 kB\n")  # 8 GiB
    return path


def group(folder: Path, limit: str, used: int, cache: int = 0) -> None:
    """A cgroup of version 2."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "memory.max").write_text(f"{limit}\n")
    (folder / "memory.current").write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\ninactive_file {cache}\nactive_file 7\n")


def found(tmp_path: Path, meminfo: Path, membership: str) -> int | None:
    (tmp_path / "cgroup").write_text(membership)
    return main_memory(meminfo, tmp_path / "groups", tmp_path / "cgroup")


def test_without_a_limit_it_is_what_the_machine_has(tmp_path: Path, meminfo: Path) -> None:
    group(tmp_path / "groups" / "user", "max", 3 * GIB)
    assert found(tmp_path, meminfo, "0::/user\n") == 8 * GIB
    assert main_memory(meminfo, tmp_path / "no", tmp_path / "no") == 8 * GIB
    assert main_memory(tmp_path / "no", tmp_path / "no", tmp_path / "no") is None


def test_the_tightest_group_around_the_process_counts(tmp_path: Path, meminfo: Path) -> None:
    group(tmp_path / "groups" / "job", str(4 * GIB), 3 * GIB)
    group(tmp_path / "groups" / "job" / "step", str(6 * GIB), GIB)
    assert found(tmp_path, meminfo, "0::/job/step\n") == GIB
    assert found(tmp_path, meminfo, "0::/other\n") == 8 * GIB


def test_page_cache_in_a_group_counts_as_free(tmp_path: Path, meminfo: Path) -> None:
    group(tmp_path / "groups", str(4 * GIB), 3 * GIB, cache=2 * GIB)
    assert found(tmp_path, meminfo, "0::/\n") == 3 * GIB


def test_a_container_sees_its_limit_at_the_top(tmp_path: Path, meminfo: Path) -> None:
    """Its path is the host's, which is not there."""
    group(tmp_path / "groups", str(2 * GIB), GIB)
    assert found(tmp_path, meminfo, "0::/../docker/0123abcd\n") == GIB
    assert found(tmp_path, meminfo, "0::/docker/0123abcd\n") == GIB


def test_version_1_is_read_as_well(tmp_path: Path, meminfo: Path) -> None:
    folder = tmp_path / "groups" / "memory" / "batch"
    folder.mkdir(parents=True)
    (folder / "memory.limit_in_bytes").write_text(str(3 * GIB))
    (folder / "memory.usage_in_bytes").write_text(str(2 * GIB))
    (folder / "memory.stat").write_text(f"cache 1\ntotal_inactive_file {GIB // 2}\n")
    (folder.parent / "memory.limit_in_bytes").write_text("9223372036854771712")
    (folder.parent / "memory.usage_in_bytes").write_text(str(GIB))
    (folder.parent / "memory.stat").write_text("")
    assert found(tmp_path, meminfo, "5:cpu,cpuacct:/x\n4:memory:/batch\n") == 3 * GIB // 2


@pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="only Linux says what is free")
def test_this_machine_is_read() -> None:
    free = available_memory(torch.device("cpu"))
    assert free is not None and 0 < free < 1 << 45


def test_the_disk_of_a_folder_that_is_not_there_yet(tmp_path: Path) -> None:
    assert existing(tmp_path / "a" / "b") == tmp_path
    assert free_disk(tmp_path / "a" / "b") > 0


def test_a_speed_is_measured() -> None:
    speed = measure_speed(torch.float32, torch.device("cpu"))
    assert speed.flops > 0 and speed.bytes > 0
