"""Pages of a request opened by several threads: the same sources, counts and errors as by one."""

from __future__ import annotations

import io
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers.pictures import noise
from mmr5_runtime.pages import EncodedPage
from mmr5_runtime.reuse.page_source import PageReader
from mmr5_runtime.types import PageError

LIMIT = 1_000_000


def png(seed: int) -> bytes:
    stream = io.BytesIO()
    noise(40, 24, seed).save(stream, "PNG")
    return stream.getvalue()


def many(folder: Path) -> list[Any]:
    """Bytes, files, arrays and images, some of them twice."""
    (folder / "page.png").write_bytes(png(1))
    pages = [png(0), folder / "page.png", noise(30, 30), np.asarray(noise(20, 30)), png(1), png(0)]
    return [*pages, *(png(seed) for seed in range(2, 9)), noise(30, 30)]


def test_threads_open_what_one_opens(tmp_path: Path) -> None:
    pages = many(tmp_path)
    for _ in range(3):
        plain, threaded = PageReader(LIMIT), PageReader(LIMIT, threads=3)
        for _ in range(2):  # the second time everything stored is known
            wanted, found = plain.open_all(pages), threaded.open_all(pages)
            assert [s.index for s in found] == list(range(len(pages)))
            for one, other in zip(wanted, found, strict=True):
                assert (one.pixels, one.size) == (other.pixels, other.size)
                assert one.decoded == other.decoded and one.page is other.page
                assert one.image().tobytes() == other.image().tobytes()
    assert not [t for t in threading.enumerate() if t.name.startswith("mmr5-open")]


@pytest.mark.parametrize("bad", [(2, 5), (5, 2), (0,), (11,)])
@pytest.mark.parametrize("kind", ["undecodable", "unreadable"])
def test_the_first_bad_page_is_named(tmp_path: Path, bad: tuple[int, ...], kind: str) -> None:
    pages: list[Any] = [png(seed) for seed in range(12)]
    for number, index in enumerate(bad):
        # Cut off: found out while decoding. No such file: while reading, before any later page.
        broken = number == 0 if kind == "undecodable" else number == 1
        pages[index] = png(index)[:-40] if broken else tmp_path / "missing.png"
    errors = []
    for reader in (PageReader(LIMIT), PageReader(LIMIT, threads=4)):
        with pytest.raises(PageError) as caught:
            reader.open_all(pages)
        errors.append(str(caught.value))
    assert errors[0] == errors[1] and f"page {min(bad) + 1}" in errors[0]
    assert not [t for t in threading.enumerate() if t.name.startswith("mmr5-open")]


def test_no_more_are_decoded_at_a_time_than_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    decode, lock = EncodedPage.decode, threading.Lock()
    now = most = 0

    def counted(self: EncodedPage, limit: int) -> Any:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        try:
            return decode(self, limit)
        finally:
            with lock:
                now -= 1

    monkeypatch.setattr(EncodedPage, "decode", counted)
    assert len(PageReader(LIMIT, threads=2).open_all([png(seed) for seed in range(8)])) == 8
    assert 1 <= most <= 2
