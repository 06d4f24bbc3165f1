"""The folder of page embeddings: nothing altered is served, nothing foreign is touched."""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmr5_runtime.reuse.disk import PageFolder
from mmr5_runtime.types import EngineError

ENGINE = b"e" * 32
GRID = (1, 2, 6)


def embeddings(seed: int, tokens: int = 3, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(tokens, 4, generator=torch.Generator().manual_seed(seed)).to(dtype)


def key(number: int) -> bytes:
    return bytes([number]) * 32


def name(number: int) -> str:
    return f"{key(number).hex()}.page"


def same_bits(found: Tensor | None, expected: Tensor) -> bool:
    return (
        found is not None
        and (found.dtype, found.shape) == (expected.dtype, expected.shape)
        and torch.equal(found.view(torch.uint8), expected.view(torch.uint8))
    )


@pytest.fixture
def folder(tmp_path: Path) -> PageFolder:
    return PageFolder(tmp_path, 1 << 20, ENGINE)


def stored_size(tmp_path: Path) -> int:
    """Bytes of one file; all pages of these tests take as many."""
    PageFolder(tmp_path / "size", 1 << 20, ENGINE).save(key(0), embeddings(0), GRID)
    size = (tmp_path / "size" / name(0)).stat().st_size
    shutil.rmtree(tmp_path / "size")
    return size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_restart_finds_the_same_bits(tmp_path: Path, dtype: torch.dtype) -> None:
    page = embeddings(0, dtype=dtype)
    page[0] = torch.tensor([float("nan"), float("-inf"), -0.0, 1e-40]).to(dtype)
    first = PageFolder(tmp_path / "new" / "folder", 1 << 20, ENGINE)
    assert first.save(key(0), page.T.contiguous().T, GRID) == []
    second = PageFolder(tmp_path / "new" / "folder", 1 << 20, ENGINE)
    assert same_bits(second.load(key(0), GRID, 3), page)
    assert (second.hits, second.rejected, second.write_failures) == (1, 0, 0)
    assert second.load(key(1), GRID, 3) is None and second.rejected == 0
    assert [file.name for file in (tmp_path / "new" / "folder").iterdir()] == [name(0)]


def test_a_flipped_bit_anywhere_is_never_served(tmp_path: Path, folder: PageFolder) -> None:
    folder.save(key(0), embeddings(0), GRID)
    path = tmp_path / name(0)
    content = path.read_bytes()
    for position in range(len(content)):
        for bit in (position % 8, (3 * position + 5) % 8):  # all eight take a dozen seconds
            changed = bytearray(content)
            changed[position] ^= 1 << bit
            path.write_bytes(changed)
            assert folder.load(key(0), GRID, 3) is None, (position, bit)
    assert folder.rejected == 2 * len(content) and folder.hits == 0
    path.write_bytes(content)
    assert same_bits(folder.load(key(0), GRID, 3), embeddings(0))


def test_no_truncated_or_longer_file_is_ever_served(tmp_path: Path, folder: PageFolder) -> None:
    folder.save(key(0), embeddings(0), GRID)
    path = tmp_path / name(0)
    content = path.read_bytes()
    for end in range(len(content)):
        path.write_bytes(content[:end])
        assert folder.load(key(0), GRID, 3) is None, end
    for more in (b"\0", b" ", content):
        path.write_bytes(content + more)
        assert folder.load(key(0), GRID, 3) is None
    assert folder.rejected == len(content) + 3


def test_a_damaged_file_is_replaced_by_the_next_page_of_that_name(
    tmp_path: Path, folder: PageFolder
) -> None:
    (tmp_path / name(0)).write_bytes(b"half a page")
    assert folder.load(key(0), GRID, 3) is None and folder.rejected == 1
    folder.save(key(0), embeddings(0), GRID)
    assert same_bits(folder.load(key(0), GRID, 3), embeddings(0))


def test_a_page_under_another_name_grid_length_or_engine_is_not_served(
    tmp_path: Path, folder: PageFolder
) -> None:
    folder.save(key(0), embeddings(0), GRID)
    shutil.copy(tmp_path / name(0), tmp_path / name(1))
    assert folder.load(key(1), GRID, 3) is None
    assert folder.load(key(0), (1, 6, 2), 3) is None
    assert folder.load(key(0), (1, 2, 62), 3) is None
    assert folder.load(key(0), GRID, 4) is None
    other = PageFolder(tmp_path, 1 << 20, b"f" * 32)
    assert other.load(key(0), GRID, 3) is None
    assert (folder.rejected, other.rejected, folder.hits) == (4, 1, 0)
    assert (tmp_path / name(1)).is_file()


@pytest.mark.parametrize("forged", ["payload", "shape", "dtype", "grid", "extra", "none"])
def test_a_well_formed_file_of_other_content_is_not_served(
    tmp_path: Path, folder: PageFolder, forged: str
) -> None:
    """safetensors files whose hash was copied from the right one."""
    folder.save(key(0), embeddings(0), GRID)
    path = tmp_path / name(0)
    content = path.read_bytes()
    size = int.from_bytes(content[:8], "little")
    metadata = json.loads(content[8 : 8 + size])["__metadata__"]
    page = load_file(path)["embeddings"]
    if forged == "payload":
        page[2, 3] += 1
    elif forged == "shape":
        page = page.reshape(6, 2)[:3].repeat(1, 2)
    elif forged == "dtype":
        page = page.view(torch.float16)
    elif forged == "grid":
        metadata["grid"] = "1x6x2"
    elif forged == "extra":
        metadata["note"] = "mine"
    save_file({"embeddings": page}, path, metadata)
    served = folder.load(key(0), GRID, 3)
    assert same_bits(served, embeddings(0)) if forged == "none" else served is None


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    limit = 2 * stored_size(tmp_path)
    others = {
        "notes.txt": b"mine",
        name(100): b"no safetensors file, but so named",
        name(101): b"\xff" * 64,
        "abc.page": b"x" * limit,
        f"{name(102)}-old": b"x",
    }
    for other, content in others.items():
        (tmp_path / other).write_bytes(content)
        os.utime(tmp_path / other, (0, 0))
    save_file({"weights": embeddings(0)}, tmp_path / name(103), {"schema": "somebody's"})
    (tmp_path / name(104)).mkdir()
    (tmp_path / name(105)).symlink_to(tmp_path / "notes.txt")
    before = sorted(path.name for path in tmp_path.iterdir())
    folder = PageFolder(tmp_path, limit, ENGINE)
    for number in range(6):
        folder.save(key(number), embeddings(number), GRID)
    assert folder.usage() == (2, limit)
    assert folder.load(key(100), GRID, 3) is None
    assert all((tmp_path / other).read_bytes() == content for other, content in others.items())
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*before, name(4), name(5)])


def test_the_page_used_longest_ago_makes_room_across_restarts(tmp_path: Path) -> None:
    limit = 2 * stored_size(tmp_path)
    first = PageFolder(tmp_path, limit, ENGINE)
    for number in (0, 1):
        first.save(key(number), embeddings(number), GRID)
    assert first.load(key(0), GRID, 3) is not None
    second = PageFolder(tmp_path, limit, ENGINE)
    assert second.save(key(2), embeddings(2), GRID) == [key(1)]
    assert second.evictions == 1
    assert [first.load(key(n), GRID, 3) is not None for n in range(3)] == [True, False, True]


def test_pages_of_other_engines_count_and_make_room_too(tmp_path: Path) -> None:
    limit = 2 * stored_size(tmp_path)
    first, second = (PageFolder(tmp_path, limit, engine * 32) for engine in (b"e", b"f"))
    for number in (0, 1):
        first.save(key(number), embeddings(number), GRID)
    for number in (2, 3, 4):
        second.save(key(number), embeddings(number), GRID)
        assert first.usage() == second.usage() == (2, limit)
    assert first.load(key(0), GRID, 3) is None
    assert same_bits(second.load(key(4), GRID, 3), embeddings(4))


def test_a_page_larger_than_the_limit_is_not_written(tmp_path: Path) -> None:
    limit = stored_size(tmp_path)
    folder = PageFolder(tmp_path, limit, ENGINE)
    folder.save(key(0), embeddings(0), GRID)
    assert folder.save(key(1), embeddings(1, tokens=64), (1, 2, 128)) == []
    assert folder.usage() == (1, limit) and folder.write_failures == 0


def test_only_abandoned_unfinished_files_are_swept(tmp_path: Path) -> None:
    old, fresh, foreign = f"{name(0)}-123-1", f"{name(1)}-7-7", "x.page-1-1"
    for file in (old, fresh, foreign):
        (tmp_path / file).write_bytes(b"half")
    for file in (old, foreign):
        os.utime(tmp_path / file, (time.time() - 86400,) * 2)
    PageFolder(tmp_path, 1 << 20, ENGINE)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([fresh, foreign])


@contextmanager
def full_disk() -> Iterator[None]:
    """No file of this process may grow beyond 100 bytes; writing more fails as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)


def test_a_full_disk_is_named_at_the_start(tmp_path: Path) -> None:
    with full_disk():
        with pytest.raises(EngineError) as caught:
            PageFolder(tmp_path, 1 << 20, ENGINE)
    message = rf"the cache folder {tmp_path} cannot be written to (File too large); make room"
    assert message in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_later_fails_no_request(tmp_path: Path, folder: PageFolder) -> None:
    folder.save(key(0), embeddings(0), GRID)
    with full_disk():
        assert folder.save(key(1), embeddings(1), GRID) == []
    assert folder.write_failures == 1
    assert [path.name for path in tmp_path.iterdir()] == [name(0)]  # and no half of a file
    folder.save(key(1), embeddings(1), GRID)
    assert same_bits(folder.load(key(1), GRID, 3), embeddings(1))


def test_files_and_folders_may_vanish(tmp_path: Path, folder: PageFolder) -> None:
    folder.save(key(0), embeddings(0), GRID)
    (tmp_path / name(0)).unlink()
    assert folder.load(key(0), GRID, 3) is None and folder.usage() == (0, 0)
    shutil.rmtree(tmp_path)
    assert folder.load(key(0), GRID, 3) is None and folder.usage() == (0, 0)
    folder.save(key(0), embeddings(0), GRID)
    assert (folder.write_failures, folder.rejected) == (1, 0)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(EngineError, match="cannot be written to"):
        PageFolder(tmp_path, 1 << 20, ENGINE)


class FolderMachine(RuleBasedStateMachine):
    """Two processes' views of one folder against a list of keys in order of use."""

    ROOM = 3

    def __init__(self) -> None:
        super().__init__()
        self.path = Path(tempfile.mkdtemp(prefix="pages-"))
        size = stored_size(self.path)
        self.limit = self.ROOM * size + size // 2
        self.folders = [PageFolder(self.path, self.limit, ENGINE) for _ in range(2)]
        self.model: list[int] = []

    def teardown(self) -> None:
        shutil.rmtree(self.path)

    @rule(number=st.integers(0, 5), who=st.integers(0, 1))
    def ask_and_compute(self, number: int, who: int) -> None:
        found = self.folders[who].load(key(number), GRID, 3)
        assert (found is not None) == (number in self.model)
        if found is None:
            gone = self.folders[who].save(key(number), embeddings(number), GRID)
            too_many = max(0, len(self.model) + 1 - self.ROOM)
            assert gone == [key(other) for other in self.model[:too_many]]
            self.model = self.model[len(gone) :]
        else:
            assert same_bits(found, embeddings(number))
            self.model.remove(number)
        self.model.append(number)

    @rule(number=st.integers(0, 5), who=st.integers(0, 1), at=st.integers(0, 1 << 20))
    def damage(self, number: int, who: int, at: int) -> None:
        if number not in self.model:
            return
        path = self.path / name(number)
        content, status = bytearray(path.read_bytes()), path.stat()
        content[at % len(content)] ^= 1 << at % 8
        path.write_bytes(content)
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
        assert self.folders[who].load(key(number), GRID, 3) is None
        path.unlink()
        self.model.remove(number)

    @rule(who=st.integers(0, 1))
    def restart(self, who: int) -> None:
        self.folders[who] = PageFolder(self.path, self.limit, ENGINE)

    @invariant()
    def bounded(self) -> None:
        files = sorted(path.name for path in self.path.iterdir())
        assert files == sorted(name(number) for number in self.model)
        entries, size = self.folders[0].usage()
        assert entries == len(files) and size <= self.limit


TestFolder = FolderMachine.TestCase
TestFolder.settings = settings(max_examples=25, stateful_step_count=30)
