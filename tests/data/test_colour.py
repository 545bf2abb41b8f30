"""Images of every mode as a person sees them, against files whose bytes are written here."""

from __future__ import annotations

import contextlib
import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from espalier.data.decode import upright_rgb
from espalier.data.folder import read_folder
from espalier.errors import EspalierError

RNG = np.random.default_rng(0)


def png(pixels: np.ndarray, kind: int, bits: int, *extra: tuple[bytes, bytes]) -> bytes:
    """Return a PNG of colour type ``kind``; pixels have big-endian words, rows are not filtered."""
    height, width = pixels.shape[:2]
    rows = pixels.astype(">u2" if bits == 16 else np.uint8)
    packed = [np.packbits(row).tobytes() if bits == 1 else row.tobytes() for row in rows]
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in packed))
    chunks = [(b"IHDR", header), *extra, (b"IDAT", body), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def tiff(pixels: np.ndarray, order: str, bits: int = 16, deflated: bool = False, **changes: int) -> bytes:
    """Return a TIFF of grey or RGB in byte order ``<`` or ``>``; ``changes`` are fields by their tag, as ``t262=0``."""
    height, width = pixels.shape[:2]
    samples = pixels.size // (height * width)
    lines = ["".join(f"{value:0{bits}b}" for value in row.ravel()) for row in pixels]
    length = -(-bits * samples * width // 8)  # bytes of a row
    data = b"".join(int(line.ljust(8 * length, "0"), 2).to_bytes(length, "big") for line in lines)
    if bits == 16:
        data = pixels.astype(f"{order}u2").tobytes()
    if deflated:
        data = zlib.compress(data)
    if changes.get("t266") == 2:
        data = bytes(int(f"{byte:08b}"[::-1], 2) for byte in data)
    numbers = {
        256: width, 257: height, 258: bits, 259: 8 if deflated else 1, 262: 2 if samples > 1 else 1, 273: 0,
        277: samples, 278: height, 279: len(data),
    }  # fmt: skip
    numbers |= {int(tag[1:]): value for tag, value in changes.items()}
    fields = sorted((tag, value) for tag, value in numbers.items() if value >= 0)
    start = 8 + 2 + 12 * len(fields) + 4
    depths = struct.pack(f"{order}{samples}H", *[bits] * samples)
    out = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(f"{order}IH", 8, len(fields))
    for tag, value in fields:
        if tag == 258 and samples > 1:
            out += struct.pack(f"{order}HHII", tag, 3, samples, start)
        elif tag in (256, 257, 273, 278, 279):
            out += struct.pack(f"{order}HHII", tag, 4, 1, start + len(depths) if tag == 273 else value)
        else:
            out += struct.pack(f"{order}HHIHH", tag, 3, 1, value, 0)
    return out + struct.pack(f"{order}I", 0) + depths + data


def over_white(colour: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    share = alpha[..., None] / 255
    return colour * share + 255 * (1 - share)


def jpeg_2000(values: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(values.astype(np.uint16)).save(file, "JPEG2000", num_resolutions=1)
    return file.getvalue()


GREY16, RGB16 = RNG.integers(0, 65536, (5, 7)), RNG.integers(0, 65536, (5, 7, 3))
ALPHA16 = np.concatenate([RGB16, RNG.integers(0, 65536, (5, 7, 1))], axis=2)
RGBA8 = RNG.integers(0, 256, (5, 7, 4))
PALETTE, INDEX = RNG.integers(0, 256, (4, 3)), RNG.integers(0, 4, (5, 7))
PLTE, TRNS = (b"PLTE", PALETTE.astype(np.uint8).tobytes()), np.array([0, 255, 100, 255])
WHITE_AND_BLACK = RNG.integers(0, 2, (5, 8))


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, axis=2)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (png(GREY16, 0, 16), grey(GREY16 / 257)),
        (png(RGB16, 2, 16), RGB16 / 257),
        (png(ALPHA16, 6, 16), over_white(RGB16 / 257, ALPHA16[..., 3] / 257)),
        (png(ALPHA16[..., 2:], 4, 16), over_white(grey(ALPHA16[..., 2] / 257), ALPHA16[..., 3] / 257)),
        (tiff(GREY16, "<"), grey(GREY16 / 257)),
        (tiff(GREY16, ">"), grey(GREY16 / 257)),
        (tiff(RGB16, "<"), RGB16 / 257),
        (jpeg_2000(GREY16), grey(GREY16 / 257)),
        (b"P5 7 5 65535\n" + GREY16.astype(">u2").tobytes(), grey(GREY16 / 257)),
        (b"P5 7 5 1023\n" + (GREY16 // 64).astype(">u2").tobytes(), grey((GREY16 // 64) * 255 / 1023)),
        (png(RGBA8, 6, 8), over_white(RGBA8[..., :3], RGBA8[..., 3])),
        (png(RGBA8[..., 2:], 4, 8), over_white(grey(RGBA8[..., 2]), RGBA8[..., 3])),
        (png(INDEX, 3, 8, PLTE), PALETTE[INDEX]),
        (png(INDEX, 3, 8, PLTE, (b"tRNS", TRNS.astype(np.uint8).tobytes())), over_white(PALETTE[INDEX], TRNS[INDEX])),
        (png(WHITE_AND_BLACK, 0, 1), grey(255 * WHITE_AND_BLACK)),
    ],
    ids=[
        "grey 16 png", "rgb 16 png", "rgba 16 png", "grey with alpha 16 png", "grey 16 tiff", "grey 16 tiff big-endian",
        "rgb 16 tiff", "grey 16 jpeg 2000", "pgm 16", "pgm 10", "rgba png",
        "grey with alpha png", "palette", "palette with transparency",
        "1 bit",
    ],
)  # fmt: skip
def test_every_depth_and_mode_of_a_file(content: bytes, expected: np.ndarray) -> None:
    image = upright_rgb(content)
    assert image.mode == "RGB"
    # Pillow cuts 16-bit colour where we round, and blends in steps of its own.
    assert np.abs(np.asarray(image).astype(float) - expected).max() < 2


# What Pillow knows of 12 and 16 bits, by byte order and whether zero is black; of fewer it knows all. Bits that lie the
# other way round in every byte (FillOrder 2) it knows in part.
READ = {12: {("<", 1)}, 16: {("<", 1), (">", 1), ("<", 0)}}


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("zero_is_black", [0, 1])
@pytest.mark.parametrize("fill", [1, 2])
@pytest.mark.parametrize("deflated", [False, True])
def test_grey_of_a_tiff_is_what_its_header_states(
    bits: int, order: str, zero_is_black: int, fill: int, deflated: bool
) -> None:
    most = 2**bits - 1
    shown = np.concatenate([[0, most], RNG.integers(0, most + 1, 33)]).reshape(5, 7)
    content = tiff(shown if zero_is_black else most - shown, order, bits, deflated, t262=zero_is_black, t266=fill)
    known = fill == 1 and (bits <= 8 or (order, zero_is_black) in READ[bits])
    with contextlib.nullcontext() if known else contextlib.suppress(ValueError):
        assert np.abs(np.asarray(upright_rgb(content)) - grey(shown * 255 / most)).max() <= 0.5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"t262": -1}, "does not say whether zero is black or white"),
        ({"t339": 2}, "signed or 32-bit pixels have no known white"),
    ],
)
@pytest.mark.parametrize("bits", [8, 16])
def test_a_tiff_whose_black_and_white_are_not_stated_is_refused(bits: int, changes: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        upright_rgb(tiff(np.arange(35).reshape(5, 7), "<", bits, **changes))


def test_grey_of_a_format_with_no_known_white_is_refused() -> None:
    cards = ("SIMPLE  = T", "BITPIX  = 16", "NAXIS   = 2", "NAXIS1  = 7", "NAXIS2  = 5", "END")
    fits = "".join(f"{card[:8]}{card[8:9]}{card[9:].rjust(21)}".ljust(80) for card in cards).ljust(2880)
    with pytest.raises(ValueError, match="have no known white"):
        upright_rgb(fits.encode() + GREY16.astype(">i2").tobytes().ljust(2880, b"\0"))


@pytest.mark.parametrize("mode", ["CMYK", "YCbCr", "LAB", "L"])
def test_colours_of_other_modes_are_recognised(mode: str) -> None:
    file = io.BytesIO()
    colour = {"CMYK": (0, 255, 255, 0), "YCbCr": (76, 85, 255), "LAB": (138, 208, 195), "L": 128}[mode]
    Image.new(mode, (2, 2), colour).save(file, "JPEG" if mode == "YCbCr" else "TIFF")
    found = upright_rgb(file.getvalue()).getpixel((0, 0))
    assert np.allclose(found, (128, 128, 128) if mode == "L" else (255, 0, 0), atol=16)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP", "PNG16"])
def test_every_orientation_is_turned_upright(turn: int, kind: str) -> None:
    # What EXIF calls row 0 and column 0 of the stored image, as a map from the upright one.
    stored = {
        1: lambda a: a, 2: np.fliplr, 3: lambda a: np.rot90(a, 2), 4: np.flipud,
        5: lambda a: a.T, 6: lambda a: np.rot90(a, 1), 7: lambda a: np.rot90(a, 2).T, 8: lambda a: np.rot90(a, -1),
    }[turn]  # fmt: skip
    upright = np.kron([[0, 85], [170, 255], [40, 200]], np.ones((8, 8)))
    exif = Image.Exif()
    exif[0x0112] = turn
    pixels = np.ascontiguousarray(stored(upright))
    array = (pixels * 257).astype(np.uint16) if kind == "PNG16" else pixels.astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(array).save(file, kind.removesuffix("16"), exif=exif)
    found = np.asarray(upright_rgb(file.getvalue()))
    assert found.shape == (24, 16, 3)
    assert np.abs(found[4::8, 4::8, 0].astype(float) - upright[4::8, 4::8]).max() < 12


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_numbers_without_a_known_white_are_refused(kind: type, tmp_path: Path) -> None:
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        for file in ("a.tif", "b.tif"):
            Image.fromarray(np.ones((4, 4), kind)).save(tmp_path / name / file)
    with pytest.raises(EspalierError, match=r"cannot decode 2 of 2 images.*[ab]\.tif"):
        read_folder(tmp_path, size=4, test_share=0.5)
    with pytest.raises(ValueError, match="32-bit pixels have no known white"):
        upright_rgb((tmp_path / "cat" / "a.tif").read_bytes())


SAMPLES = [png(GREY16, 0, 16), png(INDEX, 3, 8, PLTE), tiff(RGB16, ">"), b"GIF89a", b"\xff\xd8\xff\xe1", b"RIFF", b""]


@settings(max_examples=300, deadline=None)
@given(start=st.sampled_from(SAMPLES), noise=st.binary(max_size=60), place=st.integers(0, 400), cut=st.integers(0, 400))
def test_bytes_that_are_no_image_raise_one_kind_of_error(start: bytes, noise: bytes, place: int, cut: int) -> None:
    content = (start[:place] + noise + start[place + len(noise) :])[: len(start) + len(noise) - cut]
    with contextlib.suppress(ValueError):
        assert upright_rgb(content).mode == "RGB"
        return
    with pytest.raises(ValueError) as caught:
        upright_rgb(content)
    assert str(caught.value)
    assert "\n" not in str(caught.value)
