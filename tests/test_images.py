"""Decoding what requests bring: every mode comes out as the same kind of array, hostile bytes as ImageRejected."""

import base64
import io
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from serve_app.config import ImageLimits
from serve_app.errors import ImageRejected
from serve_app.images import (
    classify,
    decode_base64,
    decode_image,
    decode_mask,
    encode_png,
    resize_image,
    resize_map,
    sniff,
)
from serve_app.tasks import ImageArray

LIMITS = ImageLimits(max_bytes=1_000_000, max_pixels=100_000, max_side=1000)
ORIENTATION = 0x0112


def photo(height: int = 20, width: int = 30) -> ImageArray:
    """A smooth picture that no two corners of share a colour, so that a turn shows."""
    y, x = np.mgrid[0:height, 0:width]
    channels = (255 * x / (width - 1), 255 * y / (height - 1), 255 * (1 - x / (width - 1)))
    return np.stack(channels, axis=2).astype(np.uint8)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, extra: bytes = b"") -> bytes:
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = chunk(b"IHDR", head) + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def grey16(*levels: int, transparent: int | None = None) -> bytes:
    extra = b"" if transparent is None else chunk(b"tRNS", struct.pack(">H", transparent))
    return png(len(levels), 1, 16, 0, b"\0" + struct.pack(f">{len(levels)}H", *levels), extra)


class TestFormats:
    @pytest.mark.parametrize("kind", ["PNG", "WEBP"])
    def test_lossless_formats_keep_every_pixel(self, kind: str) -> None:
        data = saved(Image.fromarray(photo()), kind, lossless=True)
        assert sniff(data) == kind
        assert np.array_equal(decode_image(data, LIMITS), photo())

    @pytest.mark.parametrize(("kind", "options"), [("JPEG", {"quality": 95}), ("WEBP", {"quality": 95})])
    def test_lossy_formats_come_close(self, kind: str, options: dict[str, int]) -> None:
        data = saved(Image.fromarray(photo()), kind, **options)
        assert sniff(data) == kind
        assert np.abs(decode_image(data, LIMITS).astype(int) - photo()).mean() < 4

    @pytest.mark.parametrize("kind", ["GIF", "BMP", "TIFF", "PPM", "ICO", "PDF"])
    def test_other_formats_are_refused_by_content(self, kind: str) -> None:
        data = saved(Image.fromarray(photo()), kind)
        assert sniff(data) is None
        with pytest.raises(ImageRejected, match="PNG, JPEG or WEBP"):
            decode_image(data, LIMITS)

    def test_the_result_can_be_written_to(self) -> None:
        data = saved(Image.fromarray(photo()), "PNG")
        assert decode_image(data, LIMITS).flags.writeable
        assert decode_mask(data, LIMITS).flags.writeable

    def test_the_first_frame_counts(self) -> None:
        red, blue = Image.new("RGB", (8, 8), "red"), Image.new("RGB", (8, 8), "blue")
        for kind, options in (("PNG", {}), ("WEBP", {"lossless": True})):
            data = saved(red, kind, save_all=True, append_images=[blue], **options)
            assert (decode_image(data, LIMITS) == (255, 0, 0)).all(), kind


class TestModes:
    @pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "RGBA", "LA", "I;16", "CMYK", "YCbCr"])
    def test_every_mode_becomes_rgb(self, mode: str) -> None:
        grey = Image.fromarray(photo()).convert("L")
        if mode == "I;16":
            source = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
        elif mode == "P":
            source = grey.quantize()
        else:
            source = grey.convert("RGB").convert(mode)
        data = saved(source, "JPEG" if mode in {"CMYK", "YCbCr"} else "PNG")
        pixels = decode_image(data, LIMITS)
        assert pixels.shape == (20, 30, 3)
        assert pixels.dtype == np.uint8
        if mode != "1":
            expected = np.asarray(grey, dtype=int)[:, :, None]
            assert np.abs(pixels.astype(int) - expected).mean() < 6
        mask = decode_mask(data, LIMITS)
        assert mask.shape == (20, 30)
        assert mask.dtype == np.uint8

    def test_16_bit_grey_is_scaled_like_16_bit_colour(self) -> None:
        levels = (0x0000, 0x00FF, 0x1234, 0x8000, 0xFFFF)
        colour = png(5, 1, 16, 2, b"\0" + b"".join(struct.pack(">3H", v, v, v) for v in levels))
        grey = decode_image(grey16(*levels), LIMITS)
        assert grey[0, :, 0].tolist() == [0, 0, 0x12, 0x80, 0xFF]
        assert np.array_equal(grey, decode_image(colour, LIMITS))
        assert decode_mask(grey16(*levels), LIMITS).tolist() == [[0, 0, 0x12, 0x80, 0xFF]]

    def test_transparency_is_white_in_pictures_and_black_in_masks(self) -> None:
        alpha = np.array([[0, 128, 255]], dtype=np.uint8)
        ink = np.dstack([np.full((1, 3, 3), 100, np.uint8), alpha])
        data = saved(Image.fromarray(ink), "PNG")
        assert decode_image(data, LIMITS)[0, :, 0].tolist() == [255, 177, 100]
        assert decode_mask(data, LIMITS)[0].tolist() == [0, 50, 100]

    @pytest.mark.parametrize(
        "data",
        [
            grey16(0x1234, 0x1235, transparent=0x1234),
            png(2, 1, 8, 0, b"\0\x05\x12", chunk(b"tRNS", b"\0\x05")),
            png(2, 1, 8, 2, b"\0\1\2\3\x12\x12\x12", chunk(b"tRNS", b"\0\1\0\2\0\3")),
            png(2, 1, 8, 3, b"\0\0\1", chunk(b"PLTE", b"\1\2\3\x12\x12\x12") + chunk(b"tRNS", b"\0")),
            png(2, 1, 8, 3, b"\0\0\1", chunk(b"PLTE", b"\1\2\3\x12\x12\x12") + chunk(b"tRNS", b"\0\xff")),
        ],
        ids=["grey16", "grey8", "rgb", "palette, one entry", "palette, table"],
    )
    def test_a_transparent_colour_key_counts_as_transparency(self, data: bytes) -> None:
        assert decode_image(data, LIMITS).tolist() == [[[255] * 3, [0x12] * 3]]
        assert decode_mask(data, LIMITS).tolist() == [[0, 0x12]]

    @pytest.mark.parametrize("orientation", range(1, 9))
    def test_exif_turns_the_picture_upright(self, orientation: int) -> None:
        upright = Image.fromarray(photo())
        inverse = {
            2: Image.Transpose.FLIP_LEFT_RIGHT,
            3: Image.Transpose.ROTATE_180,
            4: Image.Transpose.FLIP_TOP_BOTTOM,
            5: Image.Transpose.TRANSPOSE,
            6: Image.Transpose.ROTATE_90,
            7: Image.Transpose.TRANSVERSE,
            8: Image.Transpose.ROTATE_270,
        }
        stored = upright.transpose(inverse[orientation]) if orientation in inverse else upright
        exif = Image.Exif()
        exif[ORIENTATION] = orientation
        for kind in ("PNG", "WEBP"):
            data = saved(stored, kind, exif=exif.tobytes(), lossless=True)
            assert np.array_equal(decode_image(data, LIMITS), photo()), kind


class TestLimits:
    def test_bytes(self) -> None:
        data = saved(Image.fromarray(photo()), "PNG")
        assert decode_image(data, ImageLimits(max_bytes=len(data))).shape == (20, 30, 3)
        with pytest.raises(ImageRejected, match=f"larger than {len(data) - 1} bytes"):
            decode_image(data, ImageLimits(max_bytes=len(data) - 1))

    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
    def test_sides_and_pixels(self, kind: str) -> None:
        data = saved(Image.fromarray(photo()), kind)
        assert decode_image(data, ImageLimits(max_side=30, max_pixels=600)).shape == (20, 30, 3)
        with pytest.raises(ImageRejected, match=r"30 x 20, at most 29 pixels a side"):
            decode_image(data, ImageLimits(max_side=29))
        with pytest.raises(ImageRejected, match=r"30 x 20, at most 599 pixels are"):
            decode_mask(data, ImageLimits(max_pixels=599))

    @pytest.mark.parametrize("lossless", [True, False])
    @pytest.mark.parametrize("alpha", [True, False])
    def test_every_webp_header_is_measured_before_the_canvas_is_allocated(self, lossless: bool, alpha: bool) -> None:
        source = Image.new("RGBA" if alpha else "RGB", (900, 400), (1, 2, 3, 4) if alpha else (1, 2, 3))
        data = saved(source, "WEBP", lossless=lossless)
        with pytest.raises(ImageRejected, match="900 x 400"):
            decode_image(data[:30], LIMITS)

    def test_a_bomb_is_refused_without_a_warning_or_a_changed_filter(self) -> None:
        bomb = png(30_000, 30_000, 8, 2, b"")
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            filters = list(warnings.filters)
            with pytest.raises(ImageRejected, match="30000 x 30000"):
                decode_image(bomb, ImageLimits())
            assert warnings.filters == filters
        assert caught == []

    def test_threads_decode_side_by_side(self) -> None:
        data = saved(Image.fromarray(photo()), "PNG")
        results: list[bool] = []
        work = [
            threading.Thread(target=lambda: results.append(np.array_equal(decode_image(data, LIMITS), photo())))
            for _ in range(8)
        ]
        for thread in work:
            thread.start()
        for thread in work:
            thread.join()
        assert results == [True] * 8


class TestDamage:
    @pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
    def test_a_cut_off_file_is_refused_wherever_its_pixels_end(self, kind: str) -> None:
        data = saved(Image.fromarray(photo(64, 64)), kind)
        checksums = 30  # a PNG file that lacks only these still holds every pixel
        for end in range(1, len(data) - checksums, 7):
            with pytest.raises(ImageRejected):
                decode_image(data[:end], LIMITS)

    @settings(deadline=None)
    @given(st.sampled_from(["PNG", "JPEG", "WEBP"]), st.data())
    def test_flipped_bytes_never_raise_anything_else(self, kind: str, draw: st.DataObject) -> None:
        data = bytearray(saved(Image.fromarray(photo()), kind))
        for _ in range(draw.draw(st.integers(1, 4))):
            data[draw.draw(st.integers(0, len(data) - 1))] = draw.draw(st.integers(0, 255))
        try:
            pixels = decode_image(bytes(data), LIMITS)
        except ImageRejected:
            return
        assert pixels.ndim == 3

    @pytest.mark.parametrize("data", [b"", b"x", b"<svg/>", b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBP"])
    def test_mere_beginnings_are_refused(self, data: bytes) -> None:
        with pytest.raises(ImageRejected):
            decode_image(data, LIMITS)


class TestPng:
    @pytest.mark.parametrize("pixels", [photo(), photo()[:, :, 0]])
    def test_pixels_survive_and_bytes_repeat(self, pixels: ImageArray) -> None:
        data = encode_png(pixels)
        assert data == encode_png(pixels.copy())
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(data))), pixels)

    @pytest.mark.parametrize("shape", [(4,), (4, 4, 1), (4, 4, 4)])
    def test_other_shapes_are_a_bug_of_the_caller(self, shape: tuple[int, ...]) -> None:
        with pytest.raises(ValueError, match="uint8"):
            encode_png(np.zeros(shape, np.uint8))
        with pytest.raises(ValueError, match="float32"):
            encode_png(np.zeros((4, 4, 3), np.float32))


class TestBase64:
    BYTES = bytes(range(256)) * 3 + b"\xfb\xff\xfe?"

    @pytest.mark.parametrize("encode", [base64.b64encode, base64.urlsafe_b64encode, base64.encodebytes])
    @pytest.mark.parametrize("prefix", ["", "data:image/png;base64,", "DATA:;charset=x;BASE64,", "  \n"])
    @pytest.mark.parametrize("padded", [True, False])
    def test_every_usual_form_is_read(self, encode: object, prefix: str, padded: bool) -> None:
        assert callable(encode)
        text = encode(self.BYTES).decode()
        assert decode_base64(prefix + (text if padded else text.rstrip("=\n")), 10_000) == self.BYTES

    @settings(deadline=None)
    @given(st.binary(min_size=1, max_size=100))
    def test_the_cap_is_exact(self, data: bytes) -> None:
        text = base64.b64encode(data).decode()
        assert decode_base64(text, len(data)) == data
        if len(data) > 1:
            with pytest.raises(ImageRejected, match="larger than"):
                decode_base64(text, len(data) - 1)

    def test_endless_white_space_is_capped_too(self) -> None:
        with pytest.raises(ImageRejected, match="larger than"):
            decode_base64("QUJD" + " " * 10_000, 1000)

    @pytest.mark.parametrize(
        "text",
        ["", "   ", "====", "A", "AAAAA", "x.png", "AA=A", "é", "\ud800", "data:,x", "data:image/png,QUJD", "data:"],
    )
    def test_what_is_no_base64_is_refused(self, text: str) -> None:
        with pytest.raises(ImageRejected):
            decode_base64(text, 1000)

    @pytest.mark.parametrize("text", ["http://x/y.png", " HTTPS://x", "file:///etc/passwd", "ftp://x", "http:x"])
    def test_links_of_any_scheme_are_links(self, text: str) -> None:
        assert classify(text) == "url"

    @pytest.mark.parametrize("text", ["iVBORw0KGgo=", "data:image/png;base64,AAAA", " Data:x", "", "//x/y", "x.png"])
    def test_everything_else_is_inline(self, text: str) -> None:
        assert classify(text) == "inline"


class TestResizing:
    def test_the_size_is_exact_and_equal_sizes_pass_through(self) -> None:
        assert resize_image(photo(), 7, 13).shape == (13, 7, 3)
        assert resize_map(photo()[:, :, 0], 64, 8, lines=True).shape == (8, 64)
        same = photo()
        assert resize_image(same, 30, 20) is same

    def test_growing_lines_invents_no_level_and_shrinking_drops_no_line(self) -> None:
        edges = np.zeros((40, 40), np.uint8)
        edges[:, 17] = 255
        grown = resize_map(edges, 97, 61, lines=True)
        assert set(np.unique(grown)) == {0, 255}
        shrunk = resize_map(edges, 9, 80, lines=True)
        assert (shrunk.max(axis=1) > 0).all()
        assert set(np.unique(resize_map(edges, 97, 61, lines=False))) > {0, 255}
