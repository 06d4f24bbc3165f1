"""Pages by what they show: a page seen before is known by its bytes and not decoded again.

Two keys. The first, of the stored bytes, only saves decoding: it leads to the second in a table of
this process. The second, of the decoded pixels, is what results are stored under, so the same page
as PNG, as array or in another file name is the same page.
"""

from __future__ import annotations

import copy
import hashlib
import struct
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from weakref import WeakValueDictionary

from PIL import Image

from mmr5_runtime.pages import (
    EncodedPage,
    Page,
    PdfFiles,
    StoredFile,
    check_limit,
    naming,
    read_page,
)
from mmr5_runtime.types import PageError

Size = tuple[int, int]
# SHA-256 of the stored bytes, and which page of a PDF at which resolution.
_RawKey = tuple[bytes, tuple[int, float] | None]


class PageSource:
    """One page of a request, identified and perhaps not decoded yet; for one thread at a time.

    ``size`` is (width, height) of the upright page; ``pixels`` is :func:`pixel_digest` of it;
    ``page`` and ``index`` (0-based) are what messages name. The stored bytes are kept, so a file
    that changes meanwhile does not matter.
    """

    def __init__(
        self,
        page: Page,
        index: int,
        size: Size,
        pixels: bytes,
        content: Image.Image | EncodedPage,
        max_image_pixels: int,
        encoded: EncodedPage | None = None,
    ) -> None:
        self.page = page
        self.index = index
        self.size = size
        self.pixels = pixels
        self._content = content
        self._encoded = encoded
        self._max_image_pixels = max_image_pixels

    @property
    def decoded(self) -> bool:
        """Whether the page had to be decoded so far."""
        return isinstance(self._content, Image.Image)

    def at(self, index: int) -> PageSource:
        """The same page as candidate ``index`` of another request."""
        source = copy.copy(self)
        source.index = index
        return source

    def let_go(self) -> None:
        """Keep only the stored bytes, where there are any, of a page that has been decoded."""
        self._content = self._encoded or self._content

    def image(self) -> Image.Image:
        """The upright RGB image, decoded now if it was not; not to be changed.

        Raises:
            PageError: the bytes gave other pixels when they were decoded before.
        """
        if not isinstance(self._content, Image.Image):
            with naming(self.page, self.index):
                image = self._content.decode(self._max_image_pixels)
                # A PDF renderer may see other fonts than before. Results of these pixels must not
                # be stored under the key of those.
                if pixel_digest(image) != self.pixels:
                    raise PageError("it looks different each time it is decoded; pass it as PNG")
            self._encoded, self._content = self._content, image
        return self._content


class PageReader:
    """Opens pages and remembers the identity of the last ``remembered`` ones; thread-safe.

    ``threads``: how many pages of a request are decoded at a time.

    Raises:
        RequestError: ``max_image_pixels`` is not above zero.
    """

    def __init__(
        self, max_image_pixels: int, remembered: int = 100_000, *, threads: int = 1
    ) -> None:
        check_limit(max_image_pixels)
        self._max_image_pixels = max_image_pixels
        self._threads = threads
        self._remembered = remembered
        self._lock = threading.Lock()
        self._known: OrderedDict[_RawKey, tuple[bytes, Size]] = OrderedDict()
        # Files of pages that still wait, by their hash: the pages of one PDF share its bytes.
        self._waiting: WeakValueDictionary[bytes, StoredFile] = WeakValueDictionary()

    def open(self, page: Page, index: int) -> PageSource:
        """Identify ``page``, which is decoded only if its bytes were never seen.

        Pixels handed over (PIL image, array) are copied, so that what is computed from them belongs
        to the key even if the caller goes on drawing. Accepts and refuses what
        :func:`mmr5_runtime.pages.open_page` does, with its messages: only pages within the size
        limit are ever remembered.

        Raises:
            PageError: the page cannot be read; the message names it and the remedy.
        """
        return self._open(page, index, {})

    def open_all(self, pages: Iterable[Page]) -> list[PageSource]:
        """:meth:`open` all pages of a request, in order, and read and hash each PDF file only once.

        A PDF file that changes between two of its pages is read again. Raises like :meth:`open`,
        for the first page that cannot be read.
        """
        pdf_files: PdfFiles = {}
        if self._threads > 1:
            return self._open_in_threads(pages, pdf_files)
        return [self._open(page, index, pdf_files) for index, page in enumerate(pages)]

    def forget(self) -> None:
        """Forget which files were seen: the next request decodes its pages again."""
        with self._lock:
            self._known.clear()

    def _open(self, page: Page, index: int, pdf_files: PdfFiles) -> PageSource:
        return self._identify(page, index, self._read(page, index, pdf_files))

    def _open_in_threads(self, pages: Iterable[Page], pdf_files: PdfFiles) -> list[PageSource]:
        """Reads files in order, here, and decodes what was read meanwhile."""
        opened: list[Callable[[], PageSource]] = []  # each waits, or finds the page known by then
        decoding: set[_RawKey] = set()
        pool = ThreadPoolExecutor(self._threads, thread_name_prefix="mmr5-open")
        try:
            for index, page in enumerate(pages):
                try:
                    content = self._read(page, index, pdf_files)
                except Exception:
                    # A page before it may be bad as well, and is then the one to be named.
                    for source in opened:
                        source()
                    raise
                identify = partial(self._identify, page, index, content)
                if isinstance(content, EncodedPage):
                    key = (content.file.sha256, content.pdf)
                    if key in decoding or self._recall(key) is not None:
                        opened.append(identify)
                        continue
                    decoding.add(key)
                opened.append(pool.submit(identify).result)
            return [source() for source in opened]
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _read(self, page: Page, index: int, pdf_files: PdfFiles) -> EncodedPage | Image.Image:
        with naming(page, index):
            return read_page(page, self._max_image_pixels, pdf_files=pdf_files)

    def _identify(self, page: Page, index: int, content: EncodedPage | Image.Image) -> PageSource:
        """A page that has been read, decoded unless its bytes are known."""
        with naming(page, index):
            if isinstance(content, Image.Image):
                content = content.copy()
                return self._source(page, index, content, pixel_digest(content), content.size)
            key = (content.file.sha256, content.pdf)
            if (known := self._recall(key)) is not None:
                return self._source(page, index, self._share(content), *known)
            image = content.decode(self._max_image_pixels)
            pixels = pixel_digest(image)
            self._remember(key, (pixels, image.size))
            return self._source(page, index, image, pixels, image.size, self._share(content))

    def _source(
        self,
        page: Page,
        index: int,
        content: Image.Image | EncodedPage,
        pixels: bytes,
        size: Size,
        encoded: EncodedPage | None = None,
    ) -> PageSource:
        return PageSource(page, index, size, pixels, content, self._max_image_pixels, encoded)

    def _recall(self, key: _RawKey) -> tuple[bytes, Size] | None:
        with self._lock:
            if key in self._known:
                self._known.move_to_end(key)
            return self._known.get(key)

    def _remember(self, key: _RawKey, identity: tuple[bytes, Size]) -> None:
        with self._lock:
            self._known[key] = identity
            while len(self._known) > self._remembered:
                self._known.popitem(last=False)

    def _share(self, content: EncodedPage) -> EncodedPage:
        """``content`` over the same bytes object as other pages of the file that still wait."""
        with self._lock:
            file = self._waiting.setdefault(content.file.sha256, content.file)
        return content if file is content.file else replace(content, file=file)


def pixel_digest(image: Image.Image) -> bytes:
    """SHA-256 (32 bytes) over mode, width, height and pixels of an RGB image.

    The size belongs to it: 30x150 and 150x30 pixels may be the same bytes.
    """
    sha256 = hashlib.sha256(struct.pack("<3sQQ", b"RGB", image.width, image.height))
    sha256.update(image.tobytes())
    return sha256.digest()
