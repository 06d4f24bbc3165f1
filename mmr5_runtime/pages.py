"""A page in any form a caller may hold it, opened as an upright RGB image."""

from __future__ import annotations

import base64
import binascii
import contextlib
import functools
import hashlib
import io
import operator
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from PIL import Image

from mmr5_runtime.image_file import check_header, decode, finish
from mmr5_runtime.pdf import PDF_HEADER, render_pdf_page
from mmr5_runtime.rgb import array_to_image, to_rgb
from mmr5_runtime.types import PageError, RequestError

PathName: TypeAlias = str | os.PathLike[str]
Page: TypeAlias = (
    Image.Image | str | os.PathLike[str] | bytes | npt.NDArray[Any] | tuple[PathName, int]
)

DEFAULT_MAX_IMAGE_PIXELS = 40_000_000
DEFAULT_PDF_DPI = 144.0

_ACCEPTED = (
    "pass a PIL image, a path, bytes, a numpy array, base64 text, a data URI, "
    "or (PDF path, page number)"
)
# Characters that a message repeats of a string, which may be megabytes of base64, and of a path.
_QUOTED, _QUOTED_PATH = 40, 160


def open_page(
    page: Page,
    *,
    max_image_pixels: int = DEFAULT_MAX_IMAGE_PIXELS,
    index: int | None = None,
    pdf_dpi: float = DEFAULT_PDF_DPI,
) -> Image.Image:
    """``page`` as an upright RGB image, transparent parts on white.

    A string is a data URI when it starts with ``data:``, else a path when something exists there,
    else base64. Of an animation or a multi-page TIFF the first frame is taken; of a PIL image the
    current one, and the image itself is returned when nothing had to change. The number of pixels
    is checked before any are decoded. PDF pages count from 1. EXIF rotation is applied, which the
    reference does not do. No file stays open.

    Args:
        page: see ``Page``.
        max_image_pixels: width x height allowed; takes the place of Pillow's own global limit.
        index: 0-based position among the candidates; messages show it from 1 as the prompt does.
        pdf_dpi: resolution PDF pages are rendered at.

    Raises:
        PageError: the page cannot be read; the message names it and the remedy.
        RequestError: ``max_image_pixels`` or ``pdf_dpi`` is not above zero.
    """
    check_limit(max_image_pixels)
    with naming(page, index):
        given = read_page(page, max_image_pixels, pdf_dpi=pdf_dpi)
        return given if isinstance(given, Image.Image) else given.decode(max_image_pixels)


def check_limit(max_image_pixels: int) -> None:
    """Raises RequestError for a limit that no page can keep."""
    if max_image_pixels < 1:
        raise RequestError(f"max_image_pixels={max_image_pixels} is not above zero; raise it")


@dataclass(frozen=True, eq=False)
class StoredFile:
    """A whole file in memory, hashed at most once."""

    data: bytes

    @functools.cached_property
    def sha256(self) -> bytes:
        """Its hash, 32 bytes."""
        return hashlib.sha256(self.data).digest()


# PDF files by resolved path, inode, size in bytes and time of the last change in ns.
PdfFiles: TypeAlias = dict[tuple[str, int, int, int], StoredFile]


@dataclass(frozen=True, eq=False)
class EncodedPage:
    """A page as it was stored: an image file or, with ``pdf``, one page of a PDF file.

    ``pdf`` is (page number from 1, resolution in dots per inch). ``from_text`` says that the file
    came as plain base64, which may have been meant as a path.
    """

    file: StoredFile
    pdf: tuple[int, float] | None = None
    from_text: bool = False

    def decode(self, max_image_pixels: int) -> Image.Image:
        """The page as an upright RGB image; PageError as :func:`open_page`, without its name."""
        data = self.file.data
        if self.pdf is not None:
            number, dpi = self.pdf
            return render_pdf_page(data, number, dpi=dpi, max_image_pixels=max_image_pixels)
        try:
            return decode(io.BytesIO(data), max_image_pixels)
        except PageError as error:
            if not self.from_text:
                raise
            raise PageError(
                f"no file of that name exists, and read as base64 it holds {len(data)} "
                f"bytes: {error}"
            ) from error


def read_page(
    page: Page,
    max_image_pixels: int,
    *,
    pdf_dpi: float = DEFAULT_PDF_DPI,
    pdf_files: PdfFiles | None = None,
) -> EncodedPage | Image.Image:
    """The stored bytes of ``page``, or its pixels (upright RGB) where it came as pixels.

    A file is read once, as a whole, after its header was checked. The image shares memory with a
    ``page`` that needed no change. With ``pdf_files`` a PDF file that is among them is not read
    again, and one that is not enters them. Raises PageError as :func:`open_page`, without the
    page's name.
    """
    if isinstance(page, tuple):
        return _read_pdf_page(page, pdf_dpi, {} if pdf_files is None else pdf_files)
    if isinstance(page, Image.Image):
        return finish(page, max_image_pixels)
    if isinstance(page, np.ndarray):
        return to_rgb(array_to_image(page, max_image_pixels))
    if isinstance(page, bytes):
        return _read_bytes(page)
    if isinstance(page, str):
        return _read_text(page, max_image_pixels)
    if isinstance(page, os.PathLike):
        return _read_path(Path(page), max_image_pixels)
    raise PageError(f"a page cannot be a {type(page).__name__}; {_ACCEPTED}")


@contextlib.contextmanager
def naming(page: object, index: int | None) -> Iterator[None]:
    """Put ``describe(page, index)`` in front of every PageError raised inside.

    For steps that see pixels only, such as ``preprocess``.
    """
    try:
        yield
    except PageError as error:
        raise PageError(f"{describe(page, index)}: {error}") from error


def describe(page: object, index: int | None) -> str:
    """How messages call a page: ``page 3 (scan.png)``; ``index`` is 0-based or unknown."""
    position = "page" if index is None else f"page {index + 1}"
    return f"{position} ({_origin(page)})"


def _origin(page: object) -> str:
    if isinstance(page, Image.Image):
        name = os.path.basename(str(getattr(page, "filename", "")))
        return _shorten(name) or f"PIL image {page.width}x{page.height} {page.mode}"
    if isinstance(page, np.ndarray):
        return f"array {'x'.join(map(str, page.shape))} {page.dtype}"
    if isinstance(page, bytes):
        return f"{len(page)} bytes"
    if isinstance(page, str):
        return _shorten(os.path.basename(page)) if os.path.isfile(page) else _quote(page)
    if isinstance(page, os.PathLike):
        return _shorten(os.path.basename(page) or str(page))
    if isinstance(page, tuple) and len(page) == 2:
        return f"{_origin(page[0])} page {page[1]!r:.20}"
    return type(page).__name__


def _shorten(text: str, length: int = _QUOTED) -> str:
    # Line breaks would split the sentence; undecodable file names could not be printed.
    shown = "".join(letter if letter.isprintable() else "?" for letter in text[:length])
    return shown if len(text) <= length else shown + "..."


def _quote(text: str | os.PathLike[str], length: int = _QUOTED) -> str:
    return f"'{_shorten(os.fspath(text), length)}'"


def _read_text(text: str, max_image_pixels: int) -> EncodedPage:
    if text[:5].lower() == "data:":
        return _read_data_uri(text)
    local = text.removeprefix("file://")
    if os.path.exists(local):  # False, not an error, for text no file system takes as a name
        return _read_path(Path(local), max_image_pixels)
    if "://" in text[:_QUOTED]:
        raise PageError("pages are not downloaded; fetch it and pass the path or the bytes")
    try:
        data = _from_base64(text)
    except PageError as error:
        raise PageError(
            f"neither a data URI, nor an existing file, nor base64 ({error}); check the path"
        ) from error
    if not data:
        raise PageError(f"the text is empty; {_ACCEPTED}")
    return EncodedPage(StoredFile(data), from_text=True)


def _read_data_uri(text: str) -> EncodedPage:
    header, comma, payload = text[5:].partition(",")
    media_type, *parameters = (part.strip().lower() for part in header.split(";"))
    if not comma or "base64" not in parameters:
        raise PageError("the data URI holds no base64; pass data:image/png;base64,... or a path")
    if media_type.partition("/")[0] != "image":
        raise PageError(
            f"the data URI is of type {_quote(media_type)}, not an image; "
            "pass data:image/png;base64,... or another image type"
        )
    try:
        data = _from_base64(payload)
    except PageError as error:
        raise PageError(f"the data URI is not base64 ({error}); encode the file again") from error
    return _read_bytes(data)


def _from_base64(text: str) -> bytes:
    try:
        # Line breaks are legal in MIME base64; any other foreign character is not.
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise PageError(str(error)) from error


def _read_path(path: Path, max_image_pixels: int) -> EncodedPage:
    with _open_file(path) as stream:
        if path.suffix.lower() == ".pdf":
            raise PageError("a PDF needs a page number; pass (path, page_number) from 1")
        # Before all of it is read, as a path may be that of anything.
        check_header(stream, max_image_pixels)
        return EncodedPage(StoredFile(_read_all(stream)))


def _read_bytes(data: bytes) -> EncodedPage:
    if not data:
        raise PageError("there are 0 bytes; pass the whole file")
    return EncodedPage(StoredFile(data))


def _read_pdf_page(page: tuple[PathName, int], pdf_dpi: float, files: PdfFiles) -> EncodedPage:
    if len(page) != 2 or not isinstance(page[0], str | os.PathLike):
        raise PageError(f"a tuple has to be (PDF path, page number); {_ACCEPTED}")
    with _open_file(Path(page[0])) as stream:
        # PDF allows the header to follow some leading bytes; readers look at the first kilobyte.
        if PDF_HEADER not in stream.read(1024):
            raise PageError("only PDF files have page numbers and this is none; pass the path only")
        try:
            number = operator.index(page[1])
        except TypeError:
            raise PageError(
                f"page number {page[1]!r} is no whole number; pages count from 1"
            ) from None
        # Of the opened file, whatever has taken its name since.
        status = os.fstat(stream.fileno())
        key = (os.path.realpath(page[0]), status.st_ino, status.st_size, status.st_mtime_ns)
        if key not in files:
            files[key] = StoredFile(_read_all(stream))
        return EncodedPage(files[key], pdf=(number, pdf_dpi))


def _open_file(path: Path) -> IO[bytes]:
    name = _quote(path, _QUOTED_PATH)
    # os.path, not Path: it answers False for names that the file system cannot take at all.
    if os.path.isdir(path):
        raise PageError(f"{name} is a folder; pass one file of it per page")
    if not os.path.exists(path):
        raise PageError(f"no file at {name}; check the path")
    if not os.path.isfile(path):  # opening a pipe would wait for a writer
        raise PageError(f"{name} is no regular file; pass its bytes")
    if os.path.getsize(path) == 0:
        raise PageError("the file has 0 bytes; export the page again")
    try:
        return path.open("rb")
    except OSError as error:
        raise PageError(
            f"the file cannot be opened ({error.strerror}); check its permissions"
        ) from error


def _read_all(stream: IO[bytes]) -> bytes:
    try:
        stream.seek(0)
        return stream.read()
    except OSError as error:
        raise PageError(f"the file cannot be read ({error.strerror}); copy it again") from error
