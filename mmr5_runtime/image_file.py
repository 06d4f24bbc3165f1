"""An encoded image file to an upright RGB image, its size checked before its pixels are decoded."""

from __future__ import annotations

from typing import IO

from PIL import Image

from mmr5_runtime.pdf import PDF_HEADER
from mmr5_runtime.rgb import check_size, to_rgb
from mmr5_runtime.types import PageError

# What a page can be stored in. Pillow reads more, but through plugins that start other programs
# (EPS) or that nobody keeps documents in; every plugin left out is one parser less to attack.
_FORMATS = ("PNG", "JPEG", "WEBP", "TIFF", "GIF", "BMP", "PPM", "PCX", "JPEG2000", "AVIF")
_MAGIC_BYTES = 16  # as many as Pillow shows its plugins


def decode(stream: IO[bytes], max_image_pixels: int) -> Image.Image:
    """The first frame of the image file in ``stream``, as :func:`finish` returns it.

    Raises:
        PageError: no known format, damaged, empty or over the limit.
    """
    return finish(_identify(stream, max_image_pixels), max_image_pixels)


def check_header(stream: IO[bytes], max_image_pixels: int) -> None:
    """Refuse what :func:`decode` would refuse for what the first bytes of ``stream`` say.

    Raises:
        PageError: no known format, a damaged header, empty or over the limit.
    """
    image = _identify(stream, max_image_pixels)
    check_size(image.width, image.height, max_image_pixels)


def finish(image: Image.Image, max_image_pixels: int) -> Image.Image:
    """Check the size of a perhaps undecoded ``image``, decode it and make it upright RGB on white.

    Raises:
        PageError: damaged, empty or over the limit.
    """
    check_size(image.width, image.height, max_image_pixels)
    try:
        image.load()
        return to_rgb(image)
    except (PageError, MemoryError):
        raise
    except Exception as error:
        raise _unreadable(error, max_image_pixels) from error


def _identify(stream: IO[bytes], max_image_pixels: int) -> Image.Image:
    """An image whose header is read and whose pixels are not.

    Walks Pillow's plugin registry because ``Image.open`` compares the size with a module-wide
    limit, warns or raises without naming the size, and can only be silenced for all threads.
    """
    prefix = stream.read(_MAGIC_BYTES)
    if prefix.startswith(PDF_HEADER):
        raise PageError("a PDF needs a page number; pass (path, page_number), counted from 1")
    Image.init()  # registers the plugins; does nothing the second time
    for name in _FORMATS:
        factory, accepts = Image.OPEN.get(name, (None, None))
        # Padded, as some plugins index without looking at the length. A plugin whose codec is
        # missing answers with a sentence instead of True.
        padded = prefix.ljust(_MAGIC_BYTES, b"\xff")
        if factory is None or accepts is None or accepts(padded) is not True:
            continue
        stream.seek(0)
        try:
            return factory(stream, "")
        except Exception as error:
            raise _unreadable(error, max_image_pixels) from error
    raise PageError(f"no known image format (starts with {prefix[:8]!r}); pass PNG, JPEG or WebP")


def _unreadable(error: Exception, max_image_pixels: int) -> PageError:
    cause = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    if isinstance(error, Image.DecompressionBombError):
        # A few plugins compare with Pillow's limit on their own before they tell us the size.
        return PageError(
            f"the image exceeds the limit of {max_image_pixels / 1e6:.1f} MP, or the one of "
            f"Pillow's {cause!r}; scale the page down"
        )
    # Pillow's plugins answer a damaged file with a dozen exception types, KeyError to struct.error.
    return PageError(f"the image is damaged or truncated ({cause}); export it again")
