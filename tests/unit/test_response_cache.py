"""The file of answers when several exports write it, and when the disk is full."""

from __future__ import annotations

import fcntl
import multiprocessing
import threading
from pathlib import Path

import pytest

from helpers.answers import put_many, response
from mmr5_export.estimate import ResourceError
from mmr5_export.response_cache import ResponseCache

TORN = b'{"key":"torn","token_ids":[1,'


def test_two_caches_that_met_the_same_torn_line_keep_each_others_answers(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    ResponseCache(path).put("old", response("old"))
    path.write_bytes(path.read_bytes() + TORN)
    one, other = ResponseCache(path), ResponseCache(path)
    for number, cache in enumerate((one, other, one)):
        cache.put(str(number), response("new"))
    found = ResponseCache(path)
    assert all(found.get(key) for key in ("old", "0", "1", "2"))
    assert len(path.read_bytes().splitlines()) == 4


@pytest.mark.parametrize("torn", [TORN, TORN + b"1," * 100_000])
def test_a_line_torn_by_another_writer_is_not_continued(tmp_path: Path, torn: bytes) -> None:
    path = tmp_path / "answers.jsonl"
    cache = ResponseCache(path)
    cache.put("a", response("a"))
    with path.open("ab") as file:  # dies while this cache is open
        file.write(torn)
    cache.put("b", response("b"))
    assert ResponseCache(path).get("a") and ResponseCache(path).get("b")
    path.write_bytes(torn)  # and nothing but half a line
    cache.put("c", response("c"))
    assert ResponseCache(path).get("c")


def test_the_line_a_living_writer_is_at_is_not_taken_for_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    ResponseCache(path).put("slow", response("slow"))
    whole = path.read_bytes()
    path.write_bytes(whole[:20])
    with path.open("ab") as writer:
        fcntl.flock(writer, fcntl.LOCK_EX)
        cache = ResponseCache(path)
        other = threading.Thread(target=cache.put, args=("other", response("other")))
        other.start()
        other.join(0.3)  # long enough to do harm, if it did not wait for the lock
        writer.write(whole[20:])
    other.join()
    assert ResponseCache(path).get("slow") and ResponseCache(path).get("other")


def test_two_processes_lose_no_line(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    context = multiprocessing.get_context("spawn")
    writers = [context.Process(target=put_many, args=(path, name)) for name in "ab"]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    found = ResponseCache(path)
    assert all(found.get(f"{name}-{number}") for name in "ab" for number in range(40))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="the system has no disk that is full")
def test_a_full_disk_is_named_as_such(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    cache = ResponseCache(path)
    path.symlink_to("/dev/full")
    with pytest.raises(ResourceError, match="No space left"):
        cache.put("a", response("a"))
