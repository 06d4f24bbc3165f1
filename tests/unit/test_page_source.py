"""Pages are known again by their bytes, and told apart by what they show."""

from __future__ import annotations

import base64
import io
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers.pictures import BLUE, RED, noise, quadrants
from mmr5_runtime.pages import EncodedPage, Page, PdfFiles, open_page, read_page
from mmr5_runtime.reuse.page_source import PageReader, PageSource, pixel_digest
from mmr5_runtime.types import PageError, RequestError

LIMIT = 1_000_000


def png(image: Image.Image) -> bytes:
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return stream.getvalue()


def test_every_way_to_hand_over_a_page_has_the_same_identity(tmp_path: Path) -> None:
    image, reader = noise(40, 24), PageReader(LIMIT)
    for suffix in ("png", "bmp", "tif"):
        image.save(tmp_path / f"page.{suffix}")
    text = base64.b64encode(png(image)).decode()
    pages: list[Page] = [
        image,
        image.convert("RGBA"),
        np.asarray(image),
        png(image),
        text,
        f"data:image/png;base64,{text}",
        *(str(tmp_path / f"page.{suffix}") for suffix in ("png", "bmp", "tif")),
        tmp_path / "page.png",
    ]
    for index, page in enumerate(pages):
        source = reader.open(page, index)
        assert (source.size, source.pixels) == ((40, 24), pixel_digest(image))
        assert (source.page is page, source.index) == (True, index)
        assert source.image().tobytes() == image.tobytes()


def test_a_known_page_is_not_decoded_again_until_its_pixels_are_asked_for(tmp_path: Path) -> None:
    image, reader = noise(40, 24), PageReader(LIMIT)
    image.save(tmp_path / "page.png")
    first = reader.open(tmp_path / "page.png", 0)
    assert first.decoded
    data = (tmp_path / "page.png").read_bytes()
    text = base64.b64encode(data).decode()
    pages: list[Page] = [tmp_path / "page.png", data, text, f"data:image/png;base64,{text}"]
    for page in pages:
        again = reader.open(page, 1)
        assert not again.decoded
        assert (again.pixels, again.size) == (first.pixels, first.size)
        assert again.image().tobytes() == image.tobytes() and again.decoded
        assert again.image() is again.image()


def test_pages_of_a_pdf_are_known_one_by_one(tmp_path: Path) -> None:
    pytest.importorskip("pypdfium2", reason="the extra mmr5-runtime[pdf] is not installed")
    path, reader = tmp_path / "report.pdf", PageReader(LIMIT)
    quadrants().save(path, save_all=True, append_images=[Image.new("RGB", (40, 24), BLUE)])
    first, second = (reader.open((path, number), number) for number in (1, 2))
    assert first.decoded and second.decoded and first.pixels != second.pixels
    for number, before in ((1, first), (2, second)):
        again = reader.open((str(path), number), 0)
        assert not again.decoded and again.pixels == before.pixels
        assert again.image().tobytes() == open_page((path, number)).tobytes()
    with pytest.raises(PageError, match="is no whole number"):
        reader.open((path, 1.0), 0)  # type: ignore[arg-type]  # equals 1, which is known


def test_waiting_pages_of_one_file_share_its_bytes(tmp_path: Path) -> None:
    reader = PageReader(LIMIT)
    noise(200, 100).save(tmp_path / "page.png")
    reader.open(tmp_path / "page.png", 0)
    waiting = [reader.open(tmp_path / "page.png", index) for index in range(5)]
    contents = [source._content for source in waiting]
    files = [content.file for content in contents if isinstance(content, EncodedPage)]
    assert len(files) == 5 and len({id(file.data) for file in files}) == 1


def _pdf(path: Path, *images: Image.Image, size: int = 0) -> None:
    """One page per image, in a file of at least ``size`` bytes."""
    images[0].save(path, "PDF", save_all=True, append_images=images[1:])
    path.write_bytes(path.read_bytes().ljust(size, b"\n"))


def _replace_between(path: Path, data: bytes, *, same_time: bool) -> Iterator[Page]:
    """Pages 1 and 2 of a PDF file whose bytes change in between."""
    yield (path, 1)
    before = path.stat()
    path.write_bytes(data)
    later = 0 if same_time else 10**9
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns + later))
    yield (path, 2)


def test_pages_opened_together_are_those_opened_one_by_one(tmp_path: Path) -> None:
    pytest.importorskip("pypdfium2", reason="the extra mmr5-runtime[pdf] is not installed")
    path, other, link = (tmp_path / name for name in ("report.pdf", "other.pdf", "link.pdf"))
    _pdf(path, quadrants(), noise(40, 24), Image.new("RGB", (40, 24), BLUE))
    _pdf(other, noise(24, 40), noise(24, 40, seed=1))
    link.symlink_to(path)
    image = noise(16, 8)
    pages: list[Page] = [
        (path, 1), (other, 2), image, (str(path), 3), png(image), (link, 2), (path, 1), (other, 1),
    ]  # fmt: skip
    together, one_by_one = PageReader(LIMIT), PageReader(LIMIT)
    for _ in range(2):  # decoded, and known
        found = together.open_all(pages)
        expected = [one_by_one.open(page, index) for index, page in enumerate(pages)]
        for a, b in zip(found, expected, strict=True):
            assert (a.page is b.page, a.index, a.size, a.pixels, a.decoded) == (
                True, b.index, b.size, b.pixels, b.decoded,
            )  # fmt: skip
            assert a.image().tobytes() == b.image().tobytes()
    assert together.open_all([]) == []


def test_a_pdf_file_is_read_and_hashed_once_for_all_its_pages(tmp_path: Path) -> None:
    path, link = tmp_path / "report.pdf", tmp_path / "link.pdf"
    path.write_bytes(b"%PDF-1.4 and so on")
    link.symlink_to(path)
    files: PdfFiles = {}
    first, *others = (
        read_page(page, LIMIT, pdf_files=files)
        for page in ((path, 1), (str(path), 2), (link, 3), (tmp_path / "." / "report.pdf", 1))
    )
    assert isinstance(first, EncodedPage) and len(files) == 1
    for number, page in zip((2, 3, 1), others, strict=True):
        assert isinstance(page, EncodedPage) and page.pdf is not None and page.pdf[0] == number
        assert page.file is first.file and page.file.sha256 is first.file.sha256
    path.write_bytes(b"%PDF-1.4 and so forth")
    changed = read_page((path, 1), LIMIT, pdf_files=files)
    assert isinstance(changed, EncodedPage) and changed.file.data.endswith(b"forth")


@pytest.mark.parametrize("same_time", [True, False])
def test_pages_opened_together_are_of_one_reading_unless_the_file_changed(
    tmp_path: Path, same_time: bool
) -> None:
    """Only a file that was not read again can still show its old second page."""
    pytest.importorskip("pypdfium2", reason="the extra mmr5-runtime[pdf] is not installed")
    path, new = tmp_path / "report.pdf", tmp_path / "new.pdf"
    red, blue = (Image.new("RGB", (40, 24), colour) for colour in (RED, BLUE))
    _pdf(path, quadrants(), red, size=8192)
    _pdf(new, quadrants(), blue, size=8192)
    expected = [open_page((file, 2)).tobytes() for file in (new, path)][same_time]
    reader = PageReader(LIMIT)
    second = reader.open_all(_replace_between(path, new.read_bytes(), same_time=same_time))[1]
    assert second.image().tobytes() == expected
    # The next call looks at the file again, whatever its time says.
    assert reader.open_all([(path, 2)])[0].image().tobytes() == open_page((new, 2)).tobytes()


def test_the_first_page_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    path = tmp_path / "report.pdf"
    path.write_bytes(b"%PDF-1.4 damaged")
    good, gone = png(noise(8, 8)), tmp_path / "gone.png"
    lists: list[list[Any]] = [
        [good, gone, (path, 1)],
        [(path, 1), good, gone],
        [good, (path, "2"), gone],
    ]
    for pages in lists:
        together, one_by_one = PageReader(LIMIT), PageReader(LIMIT)
        with pytest.raises(PageError) as expected:
            for index, page in enumerate(pages):
                one_by_one.open(page, index)
        with pytest.raises(PageError) as caught:
            together.open_all(pages)
        assert str(caught.value) == str(expected.value)


def test_a_file_that_changes_meanwhile_is_not_mistaken(tmp_path: Path) -> None:
    path, reader = tmp_path / "page.png", PageReader(LIMIT)
    before, after = noise(40, 24, seed=1), noise(40, 24, seed=2)
    before.save(path)
    reader.open(path, 0)
    waiting = reader.open(path, 0)
    after.save(path)
    assert waiting.image().tobytes() == before.tobytes()
    fresh = reader.open(path, 0)
    assert fresh.decoded and fresh.pixels == pixel_digest(after)


def test_pixels_that_are_drawn_on_later_do_not_change_an_opened_page() -> None:
    reader = PageReader(LIMIT)
    array, image = np.array(quadrants()), quadrants()
    opened = [reader.open(array, 0), reader.open(image, 1)]
    array[:] = 0
    image.paste(BLUE, (0, 0, 40, 24))
    for source in opened:
        assert source.image().tobytes() == quadrants().tobytes()
        assert pixel_digest(source.image()) == source.pixels
    assert len({reader.open(page, 0).pixels for page in (array, image, quadrants())}) == 3


def test_pages_of_the_same_bytes_and_another_shape_are_told_apart() -> None:
    reader = PageReader(LIMIT)
    pixels = np.random.default_rng(0).integers(0, 256, 30 * 150 * 3, dtype=np.uint8)
    shapes = [(30, 150, 3), (150, 30, 3), (4500, 1, 3), (1, 4500, 3), (45, 100, 3)]
    found = {reader.open(pixels.reshape(shape), 0).pixels for shape in shapes}
    grey = pixels[:4500].reshape(30, 150)  # the start of the same bytes, as another mode
    assert len(found | {reader.open(grey, 0).pixels}) == len(shapes) + 1


def test_a_single_different_value_is_another_page() -> None:
    reader, array = PageReader(LIMIT), np.array(noise(40, 24))
    first = reader.open(array, 0).pixels
    array[23, 39, 2] ^= 1
    assert reader.open(array, 0).pixels != first


def test_the_identity_is_that_of_the_upright_page_on_white() -> None:
    image, reader = quadrants(), PageReader(LIMIT)
    turned = image.transpose(Image.Transpose.ROTATE_90)
    turned.getexif()[0x0112] = 6
    stream = io.BytesIO()
    turned.save(stream, "PNG", exif=turned.getexif())
    assert reader.open(stream.getvalue(), 0).pixels == pixel_digest(image)
    clear = Image.new("RGBA", (40, 24), (9, 9, 9, 0))
    assert reader.open(clear, 0).pixels == pixel_digest(Image.new("RGB", (40, 24), "white"))


def test_only_so_many_pages_are_remembered_and_the_one_used_last_longest() -> None:
    reader = PageReader(LIMIT, remembered=2)
    first, second, third = (png(noise(8, 8, seed)) for seed in range(3))
    reader.open(first, 0)
    reader.open(second, 0)
    assert not reader.open(first, 0).decoded
    reader.open(third, 0)
    assert not reader.open(first, 0).decoded
    assert reader.open(second, 0).decoded


def test_errors_are_those_of_open_page(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("meeting notes")
    (tmp_path / "cut.png").write_bytes(png(noise(60, 60))[:-2000])
    quadrants().save(tmp_path / "named.pdf", "PNG")
    reader = PageReader(LIMIT)
    reader.open((tmp_path / "named.pdf").read_bytes(), 0)  # known, but not by that name
    pages: list[Any] = [
        tmp_path / "notes.txt",
        tmp_path / "cut.png",
        str(tmp_path / "absent.png"),
        tmp_path / "named.pdf",
        (tmp_path / "named.pdf", 1),
        b"",
        base64.b64encode(png(noise(60, 60))[:300]).decode(),
        "data:text/plain;base64,aGVsbG8=",
        np.zeros((4, 4), np.uint16),
        None,
        png(noise(1001, 1000)),
        noise(1001, 1000),
    ]
    for _ in range(2):  # nothing that was refused is taken for known the second time
        for page in pages:
            with pytest.raises(PageError) as expected:
                open_page(page, index=4, max_image_pixels=LIMIT)
            with pytest.raises(PageError) as caught:
                reader.open(page, 4)
            assert str(caught.value) == str(expected.value)
    with pytest.raises(RequestError, match="max_image_pixels=0 is not above zero"):
        PageReader(0)


def test_a_large_file_that_is_no_page_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a hole: reading it would fail for want of memory
    with pytest.raises(PageError, match="no known image format"):
        PageReader(LIMIT).open(path, 0)


def test_pixels_that_differ_from_those_the_key_was_made_of_are_refused() -> None:
    reader, data = PageReader(LIMIT), png(noise(8, 8))
    reader.open(data, 0)
    known = reader.open(data, 0)
    other = PageSource(data, 2, known.size, b"\0" * 32, known._content, LIMIT)
    with pytest.raises(PageError, match=r"^page 3 \(.* bytes\): it looks different each time"):
        other.image()


def test_threads_may_open_the_same_pages() -> None:
    reader, pages = PageReader(LIMIT, remembered=3), [png(noise(16, 8, seed)) for seed in range(6)]
    expected = [open_page(page).tobytes() for page in pages]
    wrong: list[int] = []

    def work(shift: int) -> None:
        for turn in range(30):
            number = (turn * shift) % 6
            source = reader.open(pages[number], number)
            if source.image().tobytes() != expected[number]:
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(shift,)) for shift in (1, 2, 5, 7)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
