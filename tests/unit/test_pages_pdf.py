"""Pages of PDF files: rendering, page numbers, and every way a PDF can be unusable."""

from __future__ import annotations

import base64
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from helpers.pictures import BLUE, GREEN, RED, WHITE, corners, quadrants
from mmr5_runtime.pages import open_page
from mmr5_runtime.pdf import count_pdf_pages
from mmr5_runtime.types import PageError, RequestError

pytest.importorskip("pypdfium2", reason="the extra mmr5-runtime[pdf] is not installed")


@pytest.fixture
def report(tmp_path: Path) -> Path:
    """Two pages of 200x120 points: the quadrants, then all blue."""
    path = tmp_path / "report.pdf"
    second = Image.new("RGB", (200, 120), BLUE)
    quadrants(200, 120).save(path, save_all=True, append_images=[second], resolution=72)
    return path


def assemble(*objects: bytes, trailer: bytes = b"") -> bytes:
    """A PDF of ``objects`` numbered from 1, the first one being the catalog."""
    data, offsets = b"%PDF-1.7\n", []
    for number, content in enumerate(objects, 1):
        offsets.append(len(data))
        data += b"%d 0 obj\n%s\nendobj\n" % (number, content)
    start, count = len(data), len(objects) + 1
    data += b"xref\n0 %d\n0000000000 65535 f \n" % count
    data += b"".join(b"%010d 00000 n \n" % offset for offset in offsets)
    data += b"trailer\n<< /Size %d /Root 1 0 R %s >>\n" % (count, trailer)
    return data + b"startxref\n%d\n%%%%EOF\n" % start


CATALOG = b"<< /Type /Catalog /Pages 2 0 R >>"
PAGES = b"<< /Type /Pages /Kids [3 0 R] /Count 1 >>"


def blank_page(width: int, height: int, extra: bytes = b"") -> bytes:
    return b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 %d %d] %s >>" % (width, height, extra)


def reason(page: Any, **options: Any) -> str:
    with pytest.raises(PageError) as caught:
        open_page(page, index=0, **options)
    assert str(caught.value).startswith("page 1 (")
    return str(caught.value)


def test_a_page_is_rendered_at_144_dpi(report: Path) -> None:
    for path in (report, str(report)):
        opened = open_page((path, 1))
        assert (opened.mode, opened.size) == ("RGB", (400, 240))
        assert np.abs(np.array(corners(opened)) - [RED, GREEN, BLUE, WHITE]).max() <= 12


def test_page_numbers_count_from_one(report: Path) -> None:
    assert np.abs(np.array(corners(open_page((report, 2)))) - BLUE).max() <= 12


def test_the_resolution_can_be_chosen(report: Path) -> None:
    assert open_page((report, 1), pdf_dpi=72).size == (200, 120)
    assert open_page((report, 1), pdf_dpi=100).size == (278, 167)  # sides round up


def test_an_unpainted_page_is_white(tmp_path: Path) -> None:
    path = tmp_path / "blank.pdf"
    path.write_bytes(assemble(CATALOG, PAGES, blank_page(20, 10)))
    assert open_page((path, 1)).getcolors() == [(40 * 20, WHITE)]


def test_form_fields_are_drawn(tmp_path: Path) -> None:
    field = (
        b"<< /Type /Annot /Subtype /Widget /FT /Tx /T (name) /F 4 /P 3 0 R /Rect [0 0 20 10] "
        b"/AP << /N 5 0 R >> >>"
    )
    paint = b"1 0 0 rg 0 0 20 10 re f"
    path = tmp_path / "form.pdf"
    path.write_bytes(
        assemble(
            b"<< /Type /Catalog /Pages 2 0 R /AcroForm << /Fields [4 0 R] >> >>",
            PAGES,
            blank_page(20, 10, b"/Annots [4 0 R]"),
            field,
            b"<< /Type /XObject /Subtype /Form /BBox [0 0 20 10] /Length %d >>\nstream\n%s\n"
            b"endstream" % (len(paint), paint),
        )
    )
    red, green, blue = open_page((path, 1)).getpixel((20, 10))  # type: ignore[misc]
    # PDFium may shade fields for the screen; unpainted would be white.
    assert red > 150 and green < 100 and blue < 100


def test_threads_may_render_together(report: Path) -> None:
    expected = [open_page((report, number)).tobytes() for number in (1, 2)]
    results: list[bool] = []

    def render(number: int) -> None:
        results.append(open_page((report, number)).tobytes() == expected[number - 1])

    threads = [threading.Thread(target=render, args=(1 + turn % 2,)) for turn in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 6


@pytest.mark.parametrize("number", [0, 3, -1, 10**30])
def test_a_number_out_of_range_names_the_page_count(report: Path, number: int) -> None:
    message = reason((report, number))
    assert f"(report.pdf page {number})"[:30] in message
    assert "the PDF has 2 page(s), counted from 1" in message
    assert f"page {number} does not exist, pass one that does" in message


@pytest.mark.parametrize("number", ["1", 1.0, None])
def test_a_number_that_is_none(report: Path, number: object) -> None:
    assert "is no whole number; pages count from 1" in reason((report, number))


def test_a_pdf_without_number_asks_for_one(report: Path) -> None:
    content = report.read_bytes()
    renamed = report.with_name("report.dat")
    renamed.write_bytes(content)
    for page in (report, str(report), renamed, content, base64.b64encode(content).decode()):
        assert "a PDF needs a page number; pass (path, page_number)" in reason(page)


def test_a_number_for_what_is_no_pdf(tmp_path: Path) -> None:
    quadrants().save(tmp_path / "scan.png")
    expected = "only PDF files have page numbers and this is none; pass the path only"
    assert reason((tmp_path / "scan.png", 1)).endswith(expected)


@pytest.mark.parametrize("page", [(), ("a.pdf",), ("a.pdf", 1, 2), (b"bytes", 1), (3, 1)])
def test_a_tuple_of_something_else(page: Any) -> None:
    assert "a tuple has to be (PDF path, page number); pass" in reason(page)


def test_a_missing_an_empty_and_a_truncated_pdf(tmp_path: Path, report: Path) -> None:
    assert "gone.pdf'; check the path" in reason((tmp_path / "gone.pdf", 1))
    assert "is a folder" in reason((tmp_path, 1))
    (tmp_path / "empty.pdf").touch()
    assert "the file has 0 bytes" in reason((tmp_path / "empty.pdf", 1))
    (tmp_path / "cut.pdf").write_bytes(report.read_bytes()[:60])
    assert "the PDF cannot be read (" in (message := reason((tmp_path / "cut.pdf", 1)))
    assert message.endswith("check that the file is complete")


def test_an_encrypted_pdf(tmp_path: Path) -> None:
    lock = b"<< /Filter /Standard /V 1 /R 2 /P -4 /O <%s> /U <%s> >>" % (b"ab" * 32, b"cd" * 32)
    names = b"/Encrypt 4 0 R /ID [<00> <00>]"
    path = tmp_path / "secret.pdf"
    path.write_bytes(assemble(CATALOG, PAGES, blank_page(20, 10), lock, trailer=names))
    expected = "the PDF is encrypted; save a copy without password and pass that"
    assert reason((path, 1)).endswith(expected)


def test_a_page_over_the_limit_is_not_rendered(tmp_path: Path) -> None:
    path = tmp_path / "poster.pdf"
    path.write_bytes(assemble(CATALOG, PAGES, blank_page(14000, 14000)))
    message = reason((path, 1))  # 784 MP: rendering it would take 2 GB
    assert "28000x28000 pixels (784.0 MP) exceed the limit of 40.0 MP" in message
    assert open_page((path, 1), pdf_dpi=7.2).size == (1400, 1400)


@pytest.mark.parametrize("dpi", [0, -1, float("nan"), float("inf")])
def test_an_impossible_resolution(report: Path, dpi: float) -> None:
    with pytest.raises(RequestError, match="pdf_dpi=.* is not above zero; 144 suits most pages"):
        open_page((report, 1), pdf_dpi=dpi)


def test_without_the_extra_the_message_names_it(
    report: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pypdfium2", None)  # what Python does for a missing module
    message = reason((report, 1))
    assert "needs pypdfium2; pip install 'mmr5-runtime[pdf]'" in message


def test_count_pages(report: Path) -> None:
    assert count_pdf_pages(report) == 2
    with pytest.raises(PageError, match="no such file; check the path"):
        count_pdf_pages(report.with_name("absent.pdf"))
