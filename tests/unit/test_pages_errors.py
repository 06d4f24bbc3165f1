"""What cannot be a page: each error names the page and the remedy."""

from __future__ import annotations

import base64
import io
import os
import struct
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from helpers.pictures import noise
from mmr5_runtime.pages import naming, open_page
from mmr5_runtime.types import PageError, RequestError


def encoded(image: Image.Image, file_format: str = "PNG") -> bytes:
    stream = io.BytesIO()
    image.save(stream, file_format)
    return stream.getvalue()


def png_header(width: int, height: int) -> bytes:
    """A PNG that ends where its pixels would start, though it announces a megabyte of them."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    checksum = struct.pack(">I", zlib.crc32(head))
    pixels = struct.pack(">I", 1_000_000) + b"IDAT"
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + head + checksum + pixels


def reason(page: Any, **options: Any) -> str:
    with pytest.raises(PageError) as caught:
        open_page(page, index=2, **options)
    message = str(caught.value)
    assert message.startswith("page 3 (")
    assert "\n" not in message and len(message) < 400
    return message


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "AVIF"])
@pytest.mark.parametrize("kept", [0.1, 0.5, 0.9])
def test_a_truncated_file(tmp_path: Path, file_format: str, kept: float) -> None:
    data = encoded(noise(120, 90), file_format)
    path = tmp_path / "scan.img"
    path.write_bytes(data[: int(len(data) * kept)])
    assert "(scan.img): the image is damaged or truncated (" in (message := reason(path))
    assert message.endswith("export it again")


@given(st.data())
@settings(max_examples=150)
def test_a_damaged_file_opens_or_is_a_page_error(data: st.DataObject) -> None:
    file_format = data.draw(st.sampled_from(["PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM"]))
    content = bytearray(encoded(noise(24, 18), file_format))
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks about broken metadata
        try:
            assert open_page(bytes(content), max_image_pixels=100_000).mode == "RGB"
        except PageError as error:
            assert ";" in str(error)


def test_zero_bytes(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    expected = "(empty.png): the file has 0 bytes; export the page again"
    assert reason(tmp_path / "empty.png").endswith(expected)
    assert reason(b"").endswith("there are 0 bytes; pass the whole file")


def test_paths_that_are_no_file(tmp_path: Path) -> None:
    assert reason(tmp_path).endswith("is a folder; pass one file of it per page")
    assert reason(str(tmp_path)).endswith("is a folder; pass one file of it per page")
    assert "gone.png'; check the path" in reason(tmp_path / "gone.png")
    assert "; check the path" in reason(tmp_path / ("x" * 5000))
    assert "(two?lines.png): no file at" in reason(Path("two\nlines.png"))
    assert "; check the path" in reason(Path("nul\0byte"))


@pytest.mark.skipif(sys.platform == "win32", reason="no named pipes in the file system")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    assert reason(tmp_path / "pipe.png").endswith("is no regular file; pass its bytes")


@pytest.mark.skipif(
    not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything"
)
def test_a_file_without_read_permission(tmp_path: Path) -> None:
    path = tmp_path / "page.png"
    path.write_bytes(encoded(noise(8, 8)))
    path.chmod(0)
    assert reason(path).endswith("check its permissions")


def test_bytes_in_no_image_format(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("meeting notes")
    expected = "no known image format (starts with b'meeting '); pass PNG, JPEG or WebP"
    assert reason(tmp_path / "notes.txt").endswith(expected)
    for start in (b"P", b"\n", b"<svg", b"%!PS-Adobe"):  # a plugin may expect more of a prefix
        assert "no known image format" in reason(start)


@pytest.mark.parametrize("text", ["scans/page 3.png", "~/page.png", "p" * 13, "\u00fcber"])
def test_text_that_is_neither_path_nor_base64(text: str) -> None:
    message = reason(text)
    assert repr(text) in message
    assert "neither a data URI, nor an existing file, nor base64" in message
    assert message.endswith("check the path")


def test_text_that_happens_to_be_base64() -> None:
    message = reason("scans/page01")
    assert "no file of that name exists, and read as base64 it holds 9 bytes" in message


def test_only_a_short_prefix_of_text_is_quoted() -> None:
    text = "iVBOR" + "w0KGgo" * 4000 + "!"
    assert f"'{text[:40]}...'" in (message := reason(text)) and text[:50] not in message


def test_empty_text() -> None:
    assert "the text is empty; pass a PIL image, a path" in reason("")
    assert "the text is empty" in reason(" \n")


def test_web_addresses_are_not_downloaded() -> None:
    message = reason("https://example.org/page.png")
    assert "pages are not downloaded; fetch it and pass the path or the bytes" in message


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("data:text/plain;base64,aGVsbG8=", "of type 'text/plain', not an image; pass data:image"),
        ("data:application/pdf;base64,JVBERi0=", "of type 'application/pdf', not an image"),
        ("data:;base64,aGVsbG8=", "of type '', not an image"),
        ("data:image/png,rawbytes", "holds no base64; pass data:image/png;base64"),
        ("data:image/png;base64", "holds no base64"),
        ("data:image/png;base64,a*b=", "is not base64 .*; encode the file again"),
        ("data:image/png;base64,abc", "is not base64 .*; encode the file again"),
        ("data:image/png;base64,", "there are 0 bytes; pass the whole file"),
        ("data:image/png;base64,aGVsbG8=", "no known image format"),
    ],
)
def test_data_uris(uri: str, expected: str) -> None:
    with pytest.raises(PageError, match=expected):
        open_page(uri)


def test_the_limit_is_checked_before_decoding_and_names_the_size(tmp_path: Path) -> None:
    pillow_limit = Image.MAX_IMAGE_PIXELS
    expected = "MP) exceed the limit of 40.0 MP; scale the page down or raise max_image_pixels"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow warns from 89 MP and refuses from 179 MP
        for width, height in ((8001, 5000), (10000, 10000), (30000, 20000)):
            message = reason(png_header(width, height))
            assert f"{width}x{height} pixels" in message and message.endswith(expected)
    assert pillow_limit == Image.MAX_IMAGE_PIXELS
    # Just inside, decoding starts, and fails for want of pixels.
    assert "damaged or truncated" in reason(png_header(8000, 5000))
    assert "damaged or truncated" in reason(png_header(8001, 5000), max_image_pixels=41_000_000)
    path = tmp_path / "page.png"
    noise(20, 30).save(path)
    with Image.open(path) as lazy:
        assert "20x30 pixels (0.0 MP) exceed" in reason(lazy, max_image_pixels=599)
    assert open_page(path, max_image_pixels=600).size == (20, 30)


def test_a_format_that_pillow_itself_limits_is_refused_as_well() -> None:
    canvas = b"VP8X" + struct.pack("<I", 10) + bytes(4) + b"\xff\x3f\x00" * 2  # 16384 x 16384
    data = b"RIFF" + struct.pack("<I", 4 + len(canvas)) + b"WEBP" + canvas
    assert "the image exceeds the limit of 40.0 MP" in (message := reason(data))
    assert message.endswith("scale the page down")


def test_an_image_without_pixels() -> None:
    assert "the image is empty (0x5 pixels); pass one" in reason(Image.new("RGB", (0, 5)))
    assert "the image is empty (5x0 pixels)" in reason(np.zeros((0, 5, 3), np.uint8))


def test_a_closed_pil_image(tmp_path: Path) -> None:
    noise(8, 8).save(tmp_path / "page.png")
    with Image.open(tmp_path / "page.png") as image:
        pass
    image.close()
    assert "(page.png): the image is damaged or truncated (" in reason(image)


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.zeros((3, 24, 24), np.uint8), "shape 3x24x24 is no page; .*channels last"),
        (np.zeros((24, 24, 2), np.uint8), "shape 24x24x2 is no page; pass height x width"),
        (np.zeros(24, np.uint8), "shape 24 is no page"),
        (np.array(3, np.uint8), "shape scalar is no page"),
        (np.zeros((1, 4, 4, 3), np.uint8), "shape 1x4x4x3 is no page"),
        (np.zeros((4, 4), np.uint16), "dtype uint16 is no page; convert it to uint8"),
        (np.zeros((4, 4), np.int64), "dtype int64 is no page"),
        (np.zeros((4, 4), bool), "dtype bool is no page"),
        (np.full((4, 4), 2.0), "values outside 0..1; scale it, or pass uint8"),
        (np.full((4, 4), -0.1), "values outside 0..1"),
        (np.full((4, 4), np.nan), "values outside 0..1"),
    ],
)
def test_arrays_that_are_no_page(array: np.ndarray, expected: str) -> None:
    with pytest.raises(PageError, match=rf"^page 1 \(array .*{expected}"):
        open_page(array, index=0)


def test_an_array_over_the_limit() -> None:
    assert "30x20 pixels" in reason(np.zeros((20, 30), np.uint8), max_image_pixels=599)


@pytest.mark.parametrize("page", [None, 7, ["a.png"], {"image": "a.png"}, io.BytesIO(b"x")])
def test_other_types(page: object) -> None:
    message = reason(page)
    assert f"a page cannot be a {type(page).__name__}; pass a PIL image, a path" in message


@pytest.mark.parametrize("limit", [0, -1])
def test_a_limit_below_one_pixel(limit: int) -> None:
    with pytest.raises(RequestError, match=f"max_image_pixels={limit} is not above zero"):
        open_page(noise(4, 4), max_image_pixels=limit)


def test_later_steps_can_name_the_page_too() -> None:
    with pytest.raises(PageError, match=r"^page 2 \(scan.png\): too thin; crop it$"):
        with naming(Path("a/scan.png"), 1):
            raise PageError("too thin; crop it")


def test_base64_of_a_truncated_image_says_so() -> None:
    data = encoded(noise(60, 60))
    assert "damaged or truncated" in reason(base64.b64encode(data[:300]).decode())
