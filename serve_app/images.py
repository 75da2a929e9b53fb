"""Bytes from outside to pixel arrays, and back: format, size and pixel limits in one place.

Everything a request brings as a picture passes ``decode_image`` or ``decode_mask``. Only PNG, JPEG and WEBP are read,
told by their content; sizes are checked before pixels are decoded; of an animation the first frame counts; EXIF turns
the picture upright and is dropped with all other metadata (a colour profile too: pixels are taken as sRGB).

Decoding is CPU work: callers on an event loop run it in a thread. No torch, no OpenCV here.
"""

import base64
import binascii
import io
from typing import Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from serve_app.config import ImageLimits
from serve_app.errors import ImageRejected

Pixels = NDArray[np.uint8]
"""RGB, (h, w, 3), or one channel, (h, w)."""

Format = Literal["PNG", "JPEG", "WEBP"]

MIN_SIDE = 64
"""Pixels; the smallest width and height of an output."""

_WHITE = (255, 255, 255)
_BLACK = (0, 0, 0)
_URL_SAFE = str.maketrans("-_", "+/")


def sniff(data: bytes) -> Format | None:
    """The format that ``data`` starts like, whatever a file name or a header says."""
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WEBP"
    return None


def decode_image(data: bytes, limits: ImageLimits) -> Pixels:
    """RGB pixels, (h, w, 3) uint8.

    What is transparent becomes white: drawings and cut-outs on a transparent ground are meant as ink on paper. 16 bits
    a channel are scaled to 8 by dropping the low byte.

    Raises:
        ImageRejected: not a picture in one of the three formats, damaged, cut off, or over a limit.
    """
    return np.array(_decode(data, limits, _WHITE))  # a copy: Pillow's own memory is read-only


def decode_mask(data: bytes, limits: ImageLimits) -> Pixels:
    """A mask, (h, w) uint8: luminance (ITU-R 601), white = repaint.

    What is transparent becomes black, so that strokes on a transparent ground repaint where the strokes are.

    Raises:
        ImageRejected: as in ``decode_image``.
    """
    return np.array(_decode(data, limits, _BLACK).convert("L"))


def encode_png(array: Pixels) -> bytes:
    """PNG bytes of (H, W, 3) or (H, W) uint8 pixels, without metadata: equal pixels give equal bytes.

    Raises:
        ValueError: another shape or type.
    """
    if array.dtype != np.uint8 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] == 3)):  # noqa: PLR2004
        raise ValueError(f"expected (H, W, 3) or (H, W) uint8 pixels, got {array.shape} {array.dtype}")
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG", compress_level=4)
    return buffer.getvalue()


def resize_image(array: Pixels, width: int, height: int) -> Pixels:
    """A photo or a mask at another size, aspect not kept: Lanczos over the area behind each pixel, as in diffusers."""
    return _resized(array, width, height, Image.Resampling.LANCZOS)


def resize_map(array: Pixels, width: int, height: int, *, lines: bool) -> Pixels:
    """A control map at another size, aspect not kept.

    With ``lines`` (edges, poses, flat class colours) each axis that grows repeats pixels and each that shrinks
    averages them: growing invents no grey seams, shrinking drops no thin line. Otherwise (depth, normals, soft
    edges) as ``resize_image``.
    """
    return _resized(array, width, height, Image.Resampling.BOX if lines else Image.Resampling.LANCZOS)


def fitting_size(
    shape: tuple[int, ...], width: int | None, height: int | None, max_width: int, max_height: int
) -> tuple[int, int]:
    """Width and height in which a picture of ``shape`` (h, w, ...) is worked on: multiples of 8, ``MIN_SIDE`` or more.

    A side that is given stays. One that is not follows the picture's aspect; with none given the picture keeps its
    size, or shrinks until both sides are within their limits. Very narrow pictures keep their aspect only as far as the
    limits allow.
    """
    own_height, own_width = shape[:2]
    if width is not None:
        scale = width / own_width
    elif height is not None:
        scale = height / own_height
    else:
        scale = min(1.0, max_width / own_width, max_height / own_height)
    return (
        width if width is not None else _side(own_width * scale, max_width),
        height if height is not None else _side(own_height * scale, max_height),
    )


def _side(pixels: float, maximum: int) -> int:
    return min(max(MIN_SIDE, round(pixels / 8) * 8), maximum // 8 * 8)


def classify(text: str) -> Literal["url", "inline"]:
    """Whether an image field holds a link or the picture itself (base64 or a data URI). Judges the form only."""
    head = text.lstrip()[:64].lower()
    return "url" if ":" in head and not head.startswith("data:") else "inline"


def decode_base64(text: str, max_bytes: int) -> bytes:
    """The bytes of raw base64 or of a base64 data URI; either alphabet, padded or not, white space ignored.

    The size is judged before anything is decoded.

    Raises:
        ImageRejected: over ``max_bytes``, or not base64.
    """
    too_large = ImageRejected(f"The image is larger than {max_bytes} bytes.")
    if len(text) > 2 * max_bytes + 1024:  # base64 is a third longer than its bytes, line breaks and a prefix apart
        raise too_large
    payload = text.strip()
    if payload[:5].lower() == "data:":
        declared, comma, payload = payload.partition(",")
        if not comma or not declared.lower().endswith(";base64"):
            raise ImageRejected("The image is a data URI without base64 data.")
    payload = "".join(payload.split()).rstrip("=").translate(_URL_SAFE)
    if len(payload) * 3 // 4 > max_bytes:
        raise too_large
    try:
        data = base64.b64decode(payload + "=" * (-len(payload) % 4), validate=True)
    except (binascii.Error, ValueError) as error:
        raise ImageRejected("The image is neither an http(s) link nor valid base64.") from error
    if not data:
        raise ImageRejected("The image is empty.")
    return data


def _decode(data: bytes, limits: ImageLimits, background: tuple[int, int, int]) -> Image.Image:
    """An upright RGB picture."""
    if len(data) > limits.max_bytes:
        raise ImageRejected(f"The image is larger than {limits.max_bytes} bytes.")
    kind = sniff(data)
    if kind is None:
        raise ImageRejected("The image is not a PNG, JPEG or WEBP file.")
    try:
        declared = _declared_size(data, kind)
        if declared is not None:
            _check_size(declared, limits)
        with Image.open(io.BytesIO(data), formats=(kind,)) as image:
            _check_size(image.size, limits)
            return _flatten(ImageOps.exif_transpose(image), background)
    except ImageRejected:
        raise
    except Exception as error:  # on hostile bytes decoders raise anything, and the bytes are at fault
        raise ImageRejected(f"The image is damaged or incomplete and can't be read as {kind}.") from error


def _check_size(size: tuple[int, int], limits: ImageLimits) -> None:
    width, height = size
    if max(width, height) > limits.max_side:
        raise ImageRejected(f"The image is {width} x {height}, at most {limits.max_side} pixels a side are allowed.")
    if width * height > limits.max_pixels:
        raise ImageRejected(f"The image is {width} x {height}, at most {limits.max_pixels} pixels are allowed.")


def _declared_size(data: bytes, kind: Format) -> tuple[int, int] | None:
    """Width and height from the first header; None where opening the file reads them without allocating (JPEG).

    Opening a WEBP file allocates its canvas, and Pillow warns about large PNG files when it opens them: both want
    the size known before. Layouts: PNG (ISO 15948) 11.2.2; WebP container specification (RFC 9649) 2.5 to 2.7.
    """
    if kind == "PNG" and data[12:16] == b"IHDR":
        return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    if kind == "WEBP" and data[12:16] == b"VP8X":
        return 1 + int.from_bytes(data[24:27], "little"), 1 + int.from_bytes(data[27:30], "little")
    if kind == "WEBP" and data[12:16] == b"VP8L":
        bits = int.from_bytes(data[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == "WEBP" and data[12:16] == b"VP8 ":
        return int.from_bytes(data[26:28], "little") & 0x3FFF, int.from_bytes(data[28:30], "little") & 0x3FFF
    return None


def _flatten(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """RGB, with what is transparent composited on ``background``."""
    if image.mode.startswith("I"):
        image = _from_16_bit_grey(image)
    if not image.has_transparency_data:
        return image.convert("RGB")
    ground = Image.new("RGBA", image.size, (*background, 255))
    return Image.alpha_composite(ground, image.convert("RGBA")).convert("RGB")


def _from_16_bit_grey(image: Image.Image) -> Image.Image:
    """8-bit grey, with alpha where a level was declared transparent.

    Pillow's own conversion clips at 255 instead of scaling. The high byte is what it keeps of 16-bit colour, so a grey
    picture and its colour twin come out equal.
    """
    levels = np.asarray(image)
    grey = Image.fromarray((levels >> 8).astype(np.uint8))
    transparent = image.info.get("transparency")
    if transparent is not None:
        grey.putalpha(Image.fromarray(np.where(levels == transparent, 0, 255).astype(np.uint8)))
    return grey


def _resized(array: Pixels, width: int, height: int, resample: Image.Resampling) -> Pixels:
    if array.shape[:2] == (height, width):
        return array
    return np.array(Image.fromarray(array).resize((width, height), resample))
