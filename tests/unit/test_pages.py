"""Every way to hand over a page, with files that Pillow writes here."""

from __future__ import annotations

import base64
import io
import os
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.pictures import BLUE, GREEN, RED, WHITE, corners, noise, quadrants
from mmr5_runtime.pages import Page, describe, open_page

QUADRANTS = [RED, GREEN, BLUE, WHITE]


def encoded(image: Image.Image, file_format: str = "PNG", **options: object) -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format, **options)
    return stream.getvalue()


def same(opened: Image.Image, expected: Image.Image) -> bool:
    assert opened.mode == "RGB"
    return opened.size == expected.size and opened.tobytes() == expected.tobytes()


@pytest.mark.parametrize("suffix", ["png", "tif", "bmp", "ppm", "pcx", "gif", "webp", "jp2"])
def test_a_lossless_file_by_path_and_by_bytes(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"page.{suffix}"
    quadrants().save(path, lossless=True)  # an option of WebP that the others ignore
    for page in (path, str(path), path.read_bytes()):
        assert same(open_page(page), quadrants())


@pytest.mark.parametrize("suffix", ["jpg", "avif"])
def test_a_lossy_file(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"page.{suffix}"
    quadrants().save(path, quality=95)
    assert np.abs(np.array(corners(open_page(path))) - QUADRANTS).max() <= 12


def test_the_format_follows_the_content_and_not_the_suffix(tmp_path: Path) -> None:
    path = tmp_path / "page.jpg"
    path.write_bytes(encoded(quadrants()))
    assert same(open_page(path), quadrants())


def test_base64_and_data_uris() -> None:
    text = base64.b64encode(encoded(quadrants())).decode()
    wrapped = "\n".join(text[start : start + 76] for start in range(0, len(text), 76)) + "\n"
    for page in (
        text,
        wrapped,
        f"data:image/png;base64,{text}",
        f"DATA:IMAGE/PNG;charset=x;BASE64,{wrapped}",
        f"data:image;base64,{text}",  # the reference's own spelling
    ):
        assert same(open_page(page), quadrants())


def test_an_existing_file_wins_over_base64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("abcd").write_bytes(encoded(quadrants()))  # four letters are valid base64 too
    assert same(open_page("abcd"), quadrants())


def test_a_file_address_of_the_reference(tmp_path: Path) -> None:
    path = tmp_path / "a page.png"
    quadrants().save(path)
    assert same(open_page(f"file://{path}"), quadrants())


def test_a_pil_image_that_needs_nothing_is_returned_itself() -> None:
    image = quadrants()
    assert open_page(image) is image


def test_a_lazy_pil_image_is_loaded(tmp_path: Path) -> None:
    quadrants().save(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as lazy:
        opened = open_page(lazy)
    assert same(opened, quadrants())


@pytest.mark.parametrize("dtype", [np.uint8, np.float16, np.float32, np.float64])
def test_arrays(dtype: type[np.generic]) -> None:
    rgb = np.asarray(quadrants())
    scale = 1 if dtype is np.uint8 else 255
    assert same(open_page((rgb / scale).astype(dtype)), quadrants())
    grey = np.linspace(0, 255, 12).astype(np.uint8).reshape(3, 4)
    expected = Image.fromarray(grey).convert("RGB")
    assert same(open_page((grey / scale).astype(dtype)), expected)
    assert same(open_page((grey[:, :, None] / scale).astype(dtype)), expected)
    clear = np.dstack([rgb, np.zeros(rgb.shape[:2], np.uint8)])
    assert set(corners(open_page((clear / scale).astype(dtype)))) == {WHITE}


def test_an_array_view_that_is_not_contiguous() -> None:
    flipped = np.asarray(quadrants())[:, ::-1]
    assert corners(open_page(flipped)) == [GREEN, RED, WHITE, BLUE]


@pytest.mark.parametrize("size", [(1, 1), (14, 792)])
def test_tiny_and_thin_pages_open(tmp_path: Path, size: tuple[int, int]) -> None:
    noise(*size).save(tmp_path / "page.png")
    assert same(open_page(tmp_path / "page.png"), noise(*size))


@pytest.mark.parametrize("suffix", ["gif", "webp", "png", "tif"])
def test_the_first_frame_is_taken(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"frames.{suffix}"
    others = [Image.new("RGB", (40, 24), colour) for colour in (BLUE, GREEN)]
    quadrants().save(path, save_all=True, append_images=others, lossless=True)
    with Image.open(path) as check:
        assert getattr(check, "n_frames", 1) == 3
    assert same(open_page(path), quadrants())


def test_a_pil_image_keeps_the_frame_its_owner_chose(tmp_path: Path) -> None:
    path = tmp_path / "frames.tif"
    quadrants().save(path, save_all=True, append_images=[Image.new("RGB", (40, 24), BLUE)])
    with Image.open(path) as image:
        image.seek(1)
        assert set(corners(open_page(image))) == {BLUE}


def test_no_file_stays_open(tmp_path: Path) -> None:
    opened = []
    with warnings.catch_warnings():
        warnings.simplefilter("error", ResourceWarning)
        for suffix in ("png", "jpg", "gif", "webp", "tif"):
            path = tmp_path / f"page.{suffix}"
            quadrants().save(path, save_all=suffix != "jpg", append_images=[noise(40, 24)])
            opened.append(open_page(path))
    held = {os.path.realpath(f"/proc/self/fd/{name}") for name in os.listdir("/proc/self/fd")}
    assert not [name for name in held if name.startswith(os.path.realpath(tmp_path))]
    for image in opened:  # the pixels do not depend on the file
        assert image.resize((20, 12)).size == (20, 12)


def test_threads_may_open_pages_together(tmp_path: Path) -> None:
    path = tmp_path / "page.png"
    noise(200, 100).save(path)
    results: list[bool] = []
    threads = [
        threading.Thread(target=lambda: results.append(same(open_page(path), noise(200, 100))))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 4


@pytest.mark.parametrize(
    ("page", "index", "expected"),
    [
        (Path("some/scan.png"), 2, "page 3 (scan.png)"),
        (Path("scan.png"), None, "page (scan.png)"),
        ("no/such.png", 0, "page 1 ('no/such.png')"),
        ("A" * 5000, 0, f"page 1 ('{'A' * 40}...')"),
        (b"12345", 0, "page 1 (5 bytes)"),
        (np.zeros((3, 4, 1), np.uint8), 0, "page 1 (array 3x4x1 uint8)"),
        (Image.new("L", (5, 6)), 0, "page 1 (PIL image 5x6 L)"),
        ((Path("a/report.pdf"), 7), 0, "page 1 (report.pdf page 7)"),
        (3.5, 0, "page 1 (float)"),
    ],
)
def test_messages_call_pages_by_position_and_origin(
    page: Page, index: int | None, expected: str
) -> None:
    assert describe(page, index) == expected
