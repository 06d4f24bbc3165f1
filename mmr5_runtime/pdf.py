"""One page of a PDF file as an RGB image, through the optional pypdfium2."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from PIL import Image

from mmr5_runtime.rgb import check_size
from mmr5_runtime.types import PageError, RequestError

PDF_HEADER = b"%PDF-"
_POINTS_PER_INCH = 72
_WRONG_PASSWORD = 4  # FPDF_ERR_PASSWORD of PDFium's public header
# PDFium keeps library-wide state: one call at a time in this process, whatever the document.
_PDFIUM = threading.Lock()


def render_pdf_page(data: bytes, number: int, *, dpi: float, max_image_pixels: int) -> Image.Image:
    """Page ``number`` (from 1) of the PDF file ``data``, rendered with its form fields at ``dpi``.

    The pixel size is checked before anything is rendered.

    Raises:
        PageError: pypdfium2 is not installed, the file is damaged, encrypted or no PDF, it has no
            such page, or the page is over the limit.
        RequestError: ``dpi`` is not above zero.
    """
    if not (math.isfinite(dpi) and dpi > 0):
        raise RequestError(f"pdf_dpi={dpi!r} is not above zero; 144 suits most pages")
    with _opened(data) as document:
        document.init_forms()  # or filled-in fields would stay blank
        if not 1 <= number <= len(document):
            raise PageError(
                f"the PDF has {len(document)} page(s), counted from 1; "
                f"page {number} does not exist, pass one that does"
            )
        with contextlib.closing(document[number - 1]) as page:
            scale = dpi / _POINTS_PER_INCH
            width, height = (math.ceil(side * scale) for side in page.get_size())
            check_size(width, height, max_image_pixels)
            with contextlib.closing(page.render(scale=scale)) as bitmap:
                # Converting also detaches the image from the bitmap's memory.
                image: Image.Image = bitmap.to_pil().convert("RGB")
                return image


def count_pdf_pages(path: Path) -> int:
    """Number of pages of the PDF at ``path``; PageError as for :func:`render_pdf_page`."""
    if not path.is_file():
        raise PageError("there is no such file; check the path")
    with _opened(path) as document:
        return len(document)


@contextlib.contextmanager
def _opened(source: Path | bytes) -> Iterator[Any]:
    """The ``pypdfium2.PdfDocument`` of ``source``, alone in the library until the block ends."""
    try:
        import pypdfium2
    except ImportError as error:
        raise PageError(
            "reading PDF pages needs pypdfium2; pip install 'mmr5-runtime[pdf]'"
        ) from error

    with _PDFIUM:
        try:
            with pypdfium2.PdfDocument(source) as document:
                yield document
        except pypdfium2.PdfiumError as error:
            if error.err_code == _WRONG_PASSWORD:
                raise PageError(
                    "the PDF is encrypted; save a copy without password and pass that"
                ) from error
            raise PageError(
                f"the PDF cannot be read ({error}); check that the file is complete"
            ) from error
