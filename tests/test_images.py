"""Images and DICOM of every kind and damage: each opens as viewers show it, or is refused."""

import base64
import io
import os
import struct
import subprocess
import sys
import time
import zlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile
from pydicom import dcmread, dcmwrite
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.pixels import apply_modality_lut, apply_voi_lut, convert_color_space
from pydicom.uid import (
    MPEG2MPML,
    UID,
    DeflatedExplicitVRLittleEndian,
    ExplicitVRBigEndian,
    ExplicitVRLittleEndian,
    ImplicitVRLittleEndian,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLosslessSV1,
    JPEGLSLossless,
    RLELossless,
)

from cvt2distilgpt2 import images
from cvt2distilgpt2.images import (
    BadImage,
    is_blank,
    open_image,
    open_visible,
    read_image,
    read_size,
    scale_to_8_bit,
    to_8_bit,
    view_name,
    view_of,
)
from cvt2distilgpt2.tasks import DataError

# (32, 64), from black to almost white
RAMP = np.tile(np.arange(0, 256, 4, dtype=np.uint8), (32, 1))


def save(path, image, **options):
    image.save(path, **options)
    return path


def palette():  # grey levels in an order that shows when indices are taken for grey
    image = Image.fromarray(255 - RAMP)
    image = image.convert("P")
    image.putdata((255 - RAMP).ravel().tolist())
    image.putpalette([v for i in range(256) for v in [255 - i] * 3])
    return image


NOISE = np.random.default_rng(0).integers(0, 256, (32, 64), dtype=np.uint8)

KINDS = {  # how the ramp is written; all must open as the ramp, within the loss of the format
    "grey.png": lambda p: save(p, Image.fromarray(RAMP)),
    "rgb.png": lambda p: save(p, Image.fromarray(RAMP).convert("RGB")),
    "grey.jpg": lambda p: save(p, Image.fromarray(RAMP), quality=100),
    "rgb.webp": lambda p: save(p, Image.fromarray(RAMP).convert("RGB"), lossless=True),
    "grey.bmp": lambda p: save(p, Image.fromarray(RAMP)),
    "grey.gif": lambda p: save(p, Image.fromarray(RAMP)),
    "16 bit.png": lambda p: save(p, Image.fromarray(RAMP.astype(np.uint16) * 257)),
    "12 of 16 bit.png": lambda p: save(p, Image.fromarray(RAMP.astype(np.uint16) * 16)),
    "16 bit.tif": lambda p: save(p, Image.fromarray(RAMP.astype(np.uint16) * 257)),
    "32 bit.tif": lambda p: save(p, Image.fromarray(RAMP.astype(np.int32) * 1000 - 7)),
    "float.tif": lambda p: save(p, Image.fromarray(RAMP.astype(np.float32) / 255)),
    "palette.png": lambda p: save(p, palette()),
    "alpha.png": lambda p: save(
        p, Image.merge("LA", (Image.fromarray(RAMP), Image.new("L", (64, 32), 255)))
    ),
    "rgba.png": lambda p: save(p, Image.fromarray(RAMP).convert("RGBA")),
    "cmyk.tif": lambda p: save(p, Image.fromarray(RAMP).convert("RGB").convert("CMYK")),
    "cmyk.jpg": lambda p: save(
        p, Image.fromarray(RAMP).convert("RGB").convert("CMYK"), quality=100
    ),
    "ycbcr.tif": lambda p: save(p, Image.fromarray(RAMP).convert("RGB").convert("YCbCr")),
}


@pytest.mark.parametrize("kind", KINDS)
def test_kinds_of_images(tmp_path, kind):
    image = open_image(KINDS[kind](tmp_path / kind))
    assert image.mode in ("L", "RGB") and image.size == (64, 32) == read_size(tmp_path / kind)
    # ranges are stretched to 0..255, so those of more bits are compared to a stretched ramp
    is_stretched = kind.split(".")[0].endswith("bit") or kind.startswith("float")
    wanted = np.round(RAMP * (255 / 252)) if is_stretched else RAMP
    error = np.abs(np.asarray(image.convert("L")).astype(float) - wanted).max()
    assert error <= (3 if "jp" in kind or "ycbcr" in kind else 0)


def test_one_bit(tmp_path):
    image = open_image(save(tmp_path / "a.png", Image.fromarray(RAMP > 128)))
    assert image.mode == "L" and set(np.unique(image)) == {0, 255}


@pytest.mark.parametrize("mode, transparent", [("L", 0), ("RGB", (0, 0, 0)), ("P", 0)])
def test_declared_transparent_colour_is_black(tmp_path, mode, transparent):
    "A single colour may be declared transparent, without an alpha channel."
    image = Image.fromarray(np.where(RAMP < 128, 0, 200).astype(np.uint8)).convert(mode)
    if mode == "P":
        image.putpalette([255, 255, 255] + [200] * 765)  # index 0 is white, and transparent
    path = save(tmp_path / "a.png", image, transparency=transparent)
    grey = np.asarray(open_image(path).convert("L"))
    assert grey[0, 0] == 0 and grey[0, -1] == 200


def test_transparent_is_black_whatever_its_colour(tmp_path):
    pixels = np.full((20, 20, 4), 255, np.uint8)
    pixels[:10, :, 3] = 0
    grey = np.asarray(open_image(save(tmp_path / "a.png", Image.fromarray(pixels))).convert("L"))
    assert grey[:10].max() == 0 and grey[10:].min() == 255


def test_orientation_of_a_camera_is_applied(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to view
    image = open_image(save(tmp_path / "a.jpg", Image.fromarray(RAMP), exif=exif, quality=100))
    assert image.size == (32, 64)
    assert np.asarray(image)[0].max() < 4 < 240 < np.asarray(image)[-1].min()


def test_not_a_number_is_black(tmp_path):
    pixels = RAMP.astype(np.float32)
    pixels[:16], pixels[16, 0] = np.nan, np.inf
    opened = np.asarray(open_image(save(tmp_path / "a.tif", Image.fromarray(pixels))))
    assert opened[:16].max() == 0 and opened[17].max() == 255


def bomb(path, width=100_000, height=100_000):
    "Write a PNG of a few bytes that claims to be large."

    def chunk(kind, data):
        check = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", check)

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(100)))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + head + pixels + chunk(b"IEND", b""))


def cut(kind, share):
    def write(path):
        write = KINDS.get(kind, lambda p: save(p, Image.fromarray(NOISE)))
        whole = write(path.with_name(f"whole {kind}")).read_bytes()
        path.write_bytes(whole[: int(len(whole) * share)])

    return write


BROKEN = {  # how the file is written, what must be said, and whether its header tells
    "missing.png": (lambda p: None, "missing", True),
    "empty.png": (lambda p: p.touch(), "empty file", True),
    "folder.png": (lambda p: p.mkdir(), "not a file", True),
    "text.png": (lambda p: p.write_text("clear lungs"), "not an image", True),
    "page.jpg": (lambda p: p.write_text("<html>404</html>"), "not an image", True),
    "noise.jpg": (
        lambda p: p.write_bytes(np.random.default_rng(0).bytes(5000)),
        "not an image",
        True,
    ),
    "cut.png": (cut("noise.png", 0.7), "damaged", False),
    "cut.jpg": (cut("grey.jpg", 0.7), "damaged", False),
    "cut.tif": (cut("16 bit.tif", 0.5), "damaged", False),
    "one pixel wide.png": (lambda p: save(p, Image.new("L", (1, 300))), "1 x 300 pixels", True),
    "one pixel high.png": (lambda p: save(p, Image.new("L", (300, 1))), "300 x 1 pixels", True),
    "large.png": (lambda p: bomb(p, 9_200, 9_200), "9200 x 9200 pixels", True),
    "bomb.png": (bomb, "far too many pixels", True),
    "half a bomb.png": (lambda p: bomb(p, 12_000, 12_000), "12000 x 12000 pixels", True),
}


@pytest.mark.parametrize("kind", BROKEN)
@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_broken_image(tmp_path, kind):
    write, said, in_header = BROKEN[kind]
    write(tmp_path / kind)
    with pytest.raises(DataError) as e:
        open_image(tmp_path / kind)
    assert said in str(e.value) and str(tmp_path / kind) in str(e.value)
    assert e.value.problems[0].mend
    if in_header:
        with pytest.raises(DataError):
            read_size(tmp_path / kind)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF", "ignore:Truncated File Read")
@pytest.mark.parametrize(
    "kind", ["grey.png", "grey.jpg", "palette.png", "16 bit.tif", "rgb.webp", "grey.gif"]
)
def test_any_damage_is_a_data_error(tmp_path, kind):
    "Cut or altered anywhere, a file either opens as a picture or is refused in our words."
    whole, rng = KINDS[kind](tmp_path / kind).read_bytes(), np.random.default_rng(0)
    refused = 0
    for i in range(150):
        content = bytearray(whole)
        if i % 3:
            content[rng.integers(len(whole))] ^= int(rng.integers(1, 256))
        else:
            content = content[: rng.integers(len(whole))]
        (tmp_path / kind).write_bytes(content)
        try:
            assert open_image(tmp_path / kind).mode in ("L", "RGB")
        except DataError:
            refused += 1
    assert refused > 20


def problem(path, look=open_image):
    "Return the one problem of a file that is refused."
    with pytest.raises(DataError) as e:
        look(path)
    (found,) = e.value.problems
    assert found.path == str(path) and found.mend
    return found


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    for look in (open_image, read_size):
        assert problem(tmp_path / "pipe.png", look).what == "not a file"


def test_truncated_images_are_never_accepted():
    "Pillow can be told, for the whole process, to fill what is missing with grey."
    assert not ImageFile.LOAD_TRUNCATED_IMAGES
    package = Path(images.__file__).parent
    assert not [p for p in package.glob("*.py") if "LOAD_TRUNCATED" in p.read_text()]


# grey, blank, reduced


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "P", "LA", "CMYK", "YCbCr"])
def test_grey_in_colour_becomes_grey(mode):
    grey = Image.fromarray(RAMP)
    image = (grey.convert("RGB") if mode in ("CMYK", "YCbCr") else grey).convert(mode)
    opened = to_8_bit(image)
    assert opened.mode == "L" and np.abs(np.asarray(opened).astype(int) - RAMP).max() <= 1


def test_colour_stays_colour():
    for channel in range(3):
        pixels = np.stack([RAMP] * 3, -1)
        pixels[5, 7, channel] ^= 1  # the least that a pixel can differ by
        opened = to_8_bit(Image.fromarray(pixels))
        assert opened.mode == "RGB" and np.array_equal(opened, pixels)


def test_scaling_is_the_formula():
    rng = np.random.default_rng(0)
    for low, high in ((0, 255), (-5.5, 1e6), (4000, 100), (7, 7)):
        pixels = rng.normal(2000, 3000, (40, 30))
        wanted = np.clip((pixels - low) / ((high - low) or 1) * 255, 0, 255)
        assert np.abs(scale_to_8_bit(pixels, low, high) - wanted).max() <= 0.5 + 1e-9


def test_blank(tmp_path):
    for mode in ("L", "RGB"):
        image = Image.new(mode, (40, 30), "gray")
        assert is_blank(image)
        image.putpixel((39, 29), 129 if mode == "L" else (128, 128, 129))
        assert not is_blank(image)
    deep = Image.fromarray(np.full((20, 20), 700, np.uint16))
    assert is_blank(open_image(save(tmp_path / "a.tif", deep)))


def test_reduced_scale_is_jpegs_alone_and_keeps_the_side(tmp_path):
    rng = np.random.default_rng(0)
    for width, height in ((900, 1300), (448, 448), (447, 900), (1800, 460)):
        coarse = rng.integers(0, 256, (height // 20 + 1, width // 20 + 1, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((width, height))
        for suffix in ("jpg",) if width > 500 else ("jpg", "png", "bmp"):
            path = save(tmp_path / f"a.{suffix}", image)
            full = open_image(path)
            reduced = open_image(path, least_side=448)
            scale = 2 if suffix == "jpg" and min(width, height) >= 896 else 1
            assert full.size == (width, height)
            assert reduced.size == (-(-width // scale), -(-height // scale))
            assert reduced.mode == full.mode
            if scale == 1:
                assert np.array_equal(full, reduced)
    exif = Image.Exif()
    exif[0x0112] = 6
    path = save(tmp_path / "turned.jpg", Image.new("RGB", (2000, 1000), "red"), exif=exif)
    assert open_image(path, least_side=100).size == (125, 250)


def test_read_image_takes_what_holds_an_image(tmp_path):
    path = KINDS["grey.png"](tmp_path / "a.png")
    for image in (RAMP, Image.fromarray(RAMP), path, str(path), np.stack([RAMP] * 3, -1)):
        assert np.array_equal(read_image(image), RAMP)
    assert np.array_equal(read_image(RAMP.astype(np.uint16) * 16), scale_to_8_bit(RAMP))
    with pytest.raises(TypeError, match="list"):
        read_image([RAMP])


ARRAY_TYPES = [
    "bool",
    "int8",
    "int16",
    "int32",
    "int64",
    "uint8",
    "uint16",
    "uint32",
    "uint64",
    "float16",
    "float32",
    "float64",
    ">i2",
    ">u2",
    ">f4",
]


def full_range(dtype, shape):
    "Make an array whose values span all that `dtype` has (floats: what they hold exactly)."
    dtype = np.dtype(dtype)
    share = np.linspace(0, 1, np.prod(shape)).reshape(shape)
    if dtype.kind == "b":
        return share > 0.5
    if dtype.kind == "f":
        return (share * 2000 - 1000).astype(dtype)
    limits = np.iinfo(dtype)
    steps = (share * 255).astype(np.uint64).astype(object)
    return (steps * (limits.max - limits.min) // 255 + limits.min).astype(dtype)


@pytest.mark.parametrize("shape", [(32, 40), (32, 40, 1), (32, 40, 3)])
@pytest.mark.parametrize("dtype", ARRAY_TYPES)
def test_array_of_any_numbers_is_scaled_by_its_range(dtype, shape):
    array = full_range(dtype, shape)
    opened = read_image(array)
    exact = array.astype(object) if array.dtype.kind in "iu" else array.astype(float)
    wanted = (exact - exact.min()) / (exact.max() - exact.min()) * 255
    if shape[2:] == (3,):
        opened = opened.convert("RGB")  # truth values that are alike in all colours become grey
    assert opened.mode == ("RGB" if shape[2:] == (3,) else "L")
    assert np.abs(np.asarray(opened).reshape(shape) - wanted.astype(float)).max() <= 0.501


@pytest.mark.parametrize("dtype", ["int64", "uint64"])
def test_array_of_large_integers_keeps_small_differences(dtype):
    large = RAMP.astype(dtype) + np.array(2**62, dtype)
    assert np.array_equal(read_image(large), scale_to_8_bit(RAMP))


def test_array_of_bytes_is_shown_as_it_is():
    assert np.array_equal(read_image(RAMP[..., None]), RAMP)
    colour = np.stack([RAMP, RAMP // 2, RAMP // 3], -1)
    assert np.array_equal(read_image(colour), colour)


@pytest.mark.parametrize("dtype", ["complex64", "object", "datetime64[s]", "S1", "V4"])
def test_array_that_holds_no_numbers_is_refused(dtype):
    with pytest.raises(TypeError, match="no image: give bool, integers or floats"):
        read_image(np.zeros((32, 32), dtype))


@pytest.mark.parametrize(
    "shape",
    [
        (),
        (32,),
        (32, 40, 0),
        (32, 40, 2),
        (32, 40, 4),
        (1, 32, 40),
        (3, 32, 40),
        (1, 32, 40, 3),
    ],
)
def test_array_of_another_shape_is_refused(shape):
    with pytest.raises(BadImage, match=r"shape \(.*Give one image as \(H, W\)"):
        read_image(np.zeros(shape, np.uint8))


@pytest.mark.parametrize("height, width", [(0, 0), (0, 40), (15, 40), (40, 15), (9_000, 9_000)])
@pytest.mark.parametrize("holds", ["array", "picture"])
def test_sizes_that_no_radiograph_has_are_refused(height, width, holds):
    array = np.broadcast_to(np.uint8(0), (height, width))
    image = array if holds == "array" else Image.new("L", (width, height))
    with pytest.raises(BadImage, match=f"{width} x {height} pixels. Sides must be"):
        read_image(image)


# several images in a file

SEVERAL = {"tif": {}, "gif": {}, "png": {}, "webp": dict(lossless=True)}


def several(path, **options):
    "Write two images into one file."
    image, other = (Image.fromarray(a).convert("RGB") for a in (RAMP, 255 - RAMP))
    return save(path, image, save_all=True, append_images=[other], **options)


@pytest.mark.parametrize("suffix", SEVERAL)
def test_file_of_several_images_is_refused(tmp_path, suffix):
    path = several(tmp_path / f"a.{suffix}", **SEVERAL[suffix])
    for look in (open_image, read_size):
        assert "of several images" in problem(path, look).what
    with Image.open(path) as image, pytest.raises(BadImage, match="of several images.*copy()"):
        read_image(image)


@pytest.mark.parametrize("suffix", SEVERAL)
def test_frame_that_was_chosen_is_read(tmp_path, suffix):
    with Image.open(several(tmp_path / f"a.{suffix}", **SEVERAL[suffix])) as image:
        image.seek(1)
        error = np.asarray(read_image(image.copy()).convert("L")).astype(int) - (255 - RAMP)
    assert np.abs(error).max() <= 2


@pytest.mark.parametrize("suffix", SEVERAL)
def test_file_that_could_hold_several_images_but_holds_one_is_read(tmp_path, suffix):
    path = save(tmp_path / f"a.{suffix}", Image.fromarray(RAMP), save_all=True, **SEVERAL[suffix])
    assert np.array_equal(open_image(path).convert("L"), RAMP) and read_size(path) == (64, 32)


def test_what_a_camera_puts_beside_a_photograph_is_not_another(tmp_path):
    path = tmp_path / "a.jpg"
    several(tmp_path / "a.mpo", quality=100).rename(path)
    assert np.abs(np.asarray(open_image(path).convert("L")).astype(int) - RAMP).max() <= 2


# TIFF that is inverted or signed

UNSIGNED, SIGNED, FLOAT = 1, 2, 3  # SampleFormat
WHITE_IS_ZERO, BLACK_IS_ZERO = 0, 1  # PhotometricInterpretation


def tiff(path, order, bits, sample_format, photometric, width=64, height=32):
    "Write a TIFF whose stored values rise from left to right over their whole range; return them."
    low = -(2 ** (bits - 1)) if sample_format == SIGNED else 0
    high = low + 2**bits - 1
    row = [low + (high - low) * x // (width - 1) for x in range(width)]
    if sample_format == FLOAT:
        row = [x / (width - 1) - 0.25 for x in range(width)]
    mark = "<" if order == "II" else ">"
    if bits == 12:  # two values in three bytes
        pixels = int("".join(f"{value:012b}" for value in row), 2).to_bytes(width * 3 // 2, "big")
    else:
        letter = "f" if sample_format == FLOAT else {8: "b", 16: "h", 32: "i"}[bits]
        if sample_format == UNSIGNED:
            letter = letter.upper()
        pixels = struct.pack(f"{mark}{width}{letter}", *row)
    pixels *= height
    tags = {
        256: width,
        257: height,
        258: bits,
        259: 1,
        262: photometric,
        273: 8,
        277: 1,
        278: height,
        279: len(pixels),
        339: sample_format,
    }
    tags = {tag: value for tag, value in tags.items() if value is not None}
    entries = b"".join(struct.pack(f"{mark}HHII", tag, 4, 1, value) for tag, value in tags.items())
    head = order.encode() + struct.pack(f"{mark}HI", 42, 8 + len(pixels))
    path.write_bytes(head + pixels + struct.pack(f"{mark}H", len(tags)) + entries + bytes(4))
    return np.tile(np.array(row, float), (height, 1))


# what Pillow reads; the rest of the table is refused until it does
READ_TIFFS = {
    *((order, 8, UNSIGNED, white) for order in ("II", "MM") for white in (0, 1)),
    *((order, 32, FLOAT, white) for order in ("II", "MM") for white in (0, 1)),
    *((order, bits, SIGNED, 1) for order in ("II", "MM") for bits in (8, 16, 32)),
    ("II", 12, UNSIGNED, 1),
    ("II", 16, UNSIGNED, 0),
    ("II", 16, UNSIGNED, 1),
    ("MM", 16, UNSIGNED, 1),
    ("II", 32, UNSIGNED, 1),
}


@pytest.mark.parametrize("photometric", [WHITE_IS_ZERO, BLACK_IS_ZERO])
@pytest.mark.parametrize(
    "bits, sample_format",
    [
        (8, UNSIGNED),
        (8, SIGNED),
        (12, UNSIGNED),
        (16, UNSIGNED),
        (16, SIGNED),
        (32, UNSIGNED),
        (32, SIGNED),
        (32, FLOAT),
    ],
)
@pytest.mark.parametrize("order", ["II", "MM"])
def test_tiff_is_never_a_negative(tmp_path, order, bits, sample_format, photometric):
    path = tmp_path / "a.tif"
    stored = tiff(path, order, bits, sample_format, photometric)
    bright = (stored - stored.min()) / np.ptp(stored) * 255
    wanted = 255 - bright if photometric == WHITE_IS_ZERO else bright
    try:
        opened = np.asarray(open_image(path))
    except DataError:
        assert (order, bits, sample_format, photometric) not in READ_TIFFS
    else:
        assert np.abs(opened - wanted).max() <= 0.5 + 1e-6


def test_tiff_in_hand_is_read_as_its_file_is(tmp_path):
    tiff(tmp_path / "a.tif", "II", 16, UNSIGNED, WHITE_IS_ZERO)
    with Image.open(tmp_path / "a.tif") as image:
        assert read_image(image) == open_image(tmp_path / "a.tif")


@pytest.mark.parametrize("compression", ["tiff_lzw", "tiff_adobe_deflate", "packbits"])
def test_compressed_tiff_whose_white_is_zero(tmp_path, compression):
    path = tmp_path / "a.tif"
    Image.fromarray(RAMP.astype(np.uint16) * 257).save(path, compression=compression)
    content = path.read_bytes()
    entry = struct.pack("<HHI", 262, 3, 1)  # PhotometricInterpretation, one short number
    assert content.count(entry + b"\1\0") == 1
    wanted = 255 - np.asarray(open_image(path))
    path.write_bytes(content.replace(entry + b"\1\0", entry + b"\0\0"))
    assert np.array_equal(open_image(path), wanted)


@pytest.mark.parametrize("bits", [8, 16])
def test_tiff_that_does_not_say_what_zero_is_is_refused(tmp_path, bits):
    tiff(tmp_path / "a.tif", "II", bits, UNSIGNED, None)
    for look in (open_image, read_size):
        found = problem(tmp_path / "a.tif", look)
        assert "whether zero is black or white" in found.what and "262" in found.mend


# DICOM

DEEP = RAMP.astype(np.uint16) * 16 + 9  # the ramp in 12 bits
EXTRA = pytest.mark.skipif(
    find_spec("libjpeg") is None, reason="pylibjpeg-libjpeg is not installed"
)


def dicom(pixels=DEEP, photometric="MONOCHROME2", bits=None, **fields):
    "Make a DICOM data set of made-up pixels."
    meta = FileMetaDataset()
    meta.TransferSyntaxUID = ExplicitVRLittleEndian
    meta.MediaStorageSOPClassUID = UID("1.2.840.10008.5.1.4.1.1.1.1")
    meta.MediaStorageSOPInstanceUID = "1.2.3"
    file = FileDataset("", {}, file_meta=meta, preamble=bytes(128))
    file.SOPClassUID = meta.MediaStorageSOPClassUID
    file.SOPInstanceUID = "1.2.3"
    file.PatientName = "Made^Up"
    file.PhotometricInterpretation = photometric
    file.Rows, file.Columns = pixels.shape[:2]
    file.SamplesPerPixel = 1 if pixels.ndim == 2 else 3
    if pixels.ndim == 3:
        file.PlanarConfiguration = 0
    allocated = 8 * pixels.itemsize
    bits = bits or (12 if allocated == 16 else allocated)
    file.BitsAllocated, file.BitsStored, file.HighBit = allocated, bits, bits - 1
    file.PixelRepresentation = int(pixels.dtype.kind == "i")
    file.PixelData = pixels.tobytes()
    for name, value in fields.items():
        setattr(file, name, value)
    return file


def write(path, file=None, **fields):
    "Write a DICOM file, given or made of `fields`."
    dcmwrite(path, file or dicom(**fields), enforce_file_format=True)
    return path


def shown(path, *args, **fields):
    return np.asarray(open_image(write(path, *args, **fields))).astype(int)


def by_hand(values, center, width, function):
    "What a window makes of values, as PS3.3 C.11.2.1.2 and C.11.2.1.3 say, from 0 to 255."
    x, c, w = values.astype(float), center, width
    if function == "SIGMOID":
        return 255 / (1 + np.exp(-4 * (x - c) / w))
    if function == "LINEAR":
        c, w = c - 0.5, w - 1
    with np.errstate(divide="ignore", invalid="ignore"):
        inside = ((x - c) / w + 0.5) * 255
    return np.where(x <= c - w / 2, 0, np.where(x > c + w / 2, 255, inside))


STORED = [
    (np.uint8, 8),
    (np.uint16, 10),
    (np.uint16, 12),
    (np.uint16, 16),
    (np.int16, 12),
    (np.int16, 16),
]


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("dtype, bits", STORED)
def test_windows_are_the_standards(tmp_path, dtype, bits, function):
    rng = np.random.default_rng(bits)
    low = -(2 ** (bits - 1)) if dtype == np.int16 else 0
    high = low + 2**bits
    for slope, intercept in ((None, None), (1, 0), (2.5, -1024), (-1, 4095)):
        pixels = rng.integers(low, high, (20, 30)).astype(dtype)
        rescale = {} if slope is None else dict(RescaleSlope=slope, RescaleIntercept=intercept)
        values = pixels * float(slope or 1) + (intercept or 0)
        center, width = float(np.median(values).round()), float((np.ptp(values) / 3).round())
        wanted = by_hand(values, center, width, function)
        fields = dict(
            pixels=pixels,
            bits=bits,
            WindowCenter=[center, 1],
            WindowWidth=[width, 2],
            VOILUTFunction=function,
            **rescale,
        )
        assert np.abs(shown(tmp_path / "a", **fields) - wanted).max() <= 0.5 + 1e-6
        inverted = shown(tmp_path / "b", photometric="MONOCHROME1", **fields)
        assert np.array_equal(inverted, 255 - shown(tmp_path / "a", **fields))


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize(
    "width", [1e-6, 0.01, 0.5, 0.999, 1, 1.001, 1.5, 2, 3, 300.25, 4096, 1e6, 1e12]
)
def test_windows_of_any_width(tmp_path, width, function):
    "Below 1, where LINEAR is not defined, it can only be LINEAR_EXACT."
    formula = "LINEAR_EXACT" if function == "LINEAR" and width < 1 else function
    for slope, intercept in ((1, 0), (1e-6, 0), (-1e-6, 0.002), (0.001, -7.5), (1e6, -1e9)):
        values = DEEP * float(slope) + intercept
        for center in (values[0, 20], values.mean(), float(values.max())):
            center = float(f"{center:.8g}")  # as a field of 16 characters holds it
            seen = shown(
                tmp_path / "a",
                WindowCenter=center,
                WindowWidth=width,
                VOILUTFunction=function,
                RescaleSlope=slope,
                RescaleIntercept=intercept,
            )
            with np.errstate(over="ignore"):
                wanted = by_hand(values, center, width, formula)
            distance = np.abs(values - center + 0.5 * (formula == "LINEAR"))
            near_a_step = distance < 1e-9 * np.abs(values).max()
            case = slope, intercept, center
            assert (np.abs(seen - wanted)[~near_a_step] <= 0.5 + 1e-3).all(), case


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
@pytest.mark.parametrize("photometric", ["MONOCHROME1", "MONOCHROME2"])
@pytest.mark.parametrize("center", [-30_000, 30_000])
def test_window_that_shows_nothing_is_blank(tmp_path, center, photometric, function):
    fields = dict(
        photometric=photometric, WindowCenter=center, WindowWidth=100, VOILUTFunction=function
    )
    bordered = np.pad(DEEP.astype(np.int16), 4, constant_values=np.sign(center) * 32_000)
    for more in ({}, dict(pixels=bordered, bits=16, PixelPaddingValue=int(bordered[0, 0]))):
        path = write(tmp_path / "a", **fields, **more)
        assert is_blank(open_image(path))
        assert "blank" in problem(path, open_visible).what


@pytest.mark.parametrize(
    "fields",
    [
        dict(pixels=DEEP * 0 + 7),
        dict(RescaleSlope=0, RescaleIntercept=5),
        dict(pixels=np.pad(DEEP * 0 + 7, 4, constant_values=4095), PixelPaddingValue=4095),
        dict(pixels=np.pad(RAMP * 0 + 7, 4), PixelPaddingValue=0),
    ],
    ids=["constant", "no slope", "constant with a border", "constant bytes with a border"],
)
def test_dicom_that_shows_nothing_is_blank(tmp_path, fields):
    assert "blank" in problem(write(tmp_path / "a", **fields), open_visible).what


def test_missing_half_of_the_modality_step_changes_nothing(tmp_path):
    window = dict(WindowCenter=1000, WindowWidth=900)
    for half, whole in (
        (dict(RescaleSlope=0.5), dict(RescaleSlope=0.5, RescaleIntercept=0)),
        (dict(RescaleIntercept=-900), dict(RescaleSlope=1, RescaleIntercept=-900)),
    ):
        seen = shown(tmp_path / "a", **window, **half)
        assert np.array_equal(seen, shown(tmp_path / "b", **window, **whole))
        assert not np.array_equal(seen, shown(tmp_path / "c", **window))


@pytest.mark.parametrize("dtype, bits", [(np.int8, 8), *STORED, (np.int16, 10)])
def test_dicom_is_never_a_negative(tmp_path, dtype, bits):
    "All that can turn black into white, alone and together."
    low = -(2 ** (bits - 1)) if np.dtype(dtype).kind == "i" else 0
    stored = np.tile(np.linspace(low, low + 2**bits - 1, 64).round(), (32, 1)).astype(dtype)
    span = 2.0**bits - 1
    ramp = (stored.astype(float) - low) / span * 255
    rising = table([round(i * 65535 / 255) for i in range(256)], low, 16)  # the first 256 values
    for photometric, shape in (
        ("MONOCHROME2", None),
        ("MONOCHROME2", "IDENTITY"),
        ("MONOCHROME1", None),
        ("MONOCHROME1", "INVERSE"),
    ):
        for slope in (1, -1, 0.001, -0.001):
            fields = dict(
                pixels=stored,
                bits=bits,
                photometric=photometric,
                RescaleSlope=slope,
                RescaleIntercept=0,
            )
            if shape:
                fields["PresentationLUTShape"] = shape
            wanted = ramp if (slope > 0) == (photometric == "MONOCHROME2") else 255 - ramp
            window = dict(
                WindowCenter=slope * (low + span / 2),
                WindowWidth=abs(slope) * span,
                VOILUTFunction="LINEAR_EXACT",
            )
            for voi in ({}, window):
                assert np.abs(shown(tmp_path / "a", **fields, **voi) - wanted).max() <= 0.5 + 1e-3
        fields = dict(pixels=stored, bits=bits, photometric=photometric)
        seen = shown(tmp_path / "a", **fields, VOILUTSequence=rising)[0]
        assert (seen[0], seen[-1]) == ((0, 255) if photometric == "MONOCHROME2" else (255, 0))


def test_window_is_pydicoms(tmp_path):
    "Their output, in the units of the stored values, is ours in 8 bits."
    rng = np.random.default_rng(0)
    file = dicom(
        rng.integers(0, 4096, (50, 60)).astype(np.uint16),
        WindowCenter=1800,
        WindowWidth=900,
        RescaleSlope=1,
        RescaleIntercept=0,
    )
    wanted = apply_voi_lut(apply_modality_lut(file.pixel_array, file), file) / 4095 * 255
    assert np.abs(shown(tmp_path / "a", file) - wanted).max() <= 0.5 + 1e-6


def test_without_a_window_the_own_range_counts(tmp_path):
    wanted = np.round((DEEP - 9.0) / (DEEP.max() - 9) * 255)
    assert np.abs(shown(tmp_path / "a") - wanted).max() <= 1
    for fields in (
        dict(RescaleSlope=3, RescaleIntercept=-7),
        dict(NumberOfFrames=None),
        dict(
            WindowCenter=None,
            WindowWidth=None,
            RescaleSlope=None,
            RescaleIntercept=None,
            VOILUTFunction="",
        ),
        dict(WindowCenter=0, WindowWidth=0),
        dict(WindowCenter=[5, 5], WindowWidth=[0, 3]),
        dict(WindowWidth=50),
        dict(RescaleSlope=2),
    ):
        assert np.array_equal(shown(tmp_path / "b", **fields), shown(tmp_path / "a")), fields
    inverted = shown(tmp_path / "c", RescaleSlope=-1, RescaleIntercept=0)
    assert np.array_equal(inverted, 255 - shown(tmp_path / "a"))
    assert is_blank(open_image(write(tmp_path / "blank", pixels=np.full((20, 20), 700, np.uint16))))


def table(values, first, bits, vr="US", order="<"):
    item = Dataset()
    item.LUTDescriptor = [len(values) % 65536, first, bits]
    if vr == "US":
        data = [int(value) for value in values]
    else:
        data = np.asarray(values).astype(f"{order}u2").tobytes()
    item.add_new("LUTData", vr, data)
    return [item]


@pytest.mark.parametrize("vr", ["US", "OW"])
@pytest.mark.parametrize(
    "entries, first, bits",
    [(4096, 0, 12), (1024, 1500, 16), (4096, 0, 8), (300, 0, 10), (65536, 0, 16)],
)
def test_voi_tables(tmp_path, entries, first, bits, vr):
    rng = np.random.default_rng(entries)
    values = np.sort(rng.integers(0, 2**bits, entries))
    values[[0, -1]] = 0, 2**bits - 1
    if vr == "US" and entries == 65536:
        pytest.skip("a field of 128 KiB has no such form")
    pixels = rng.integers(0, 4096, (30, 40)).astype(np.uint16)
    wanted = values[np.clip(pixels.astype(int) - first, 0, entries - 1)] / (2**bits - 1) * 255
    rescale = dict(RescaleSlope=1, RescaleIntercept=0)
    window = dict(WindowCenter=9, WindowWidth=9)  # the table goes before the window
    fields = dict(pixels=pixels, VOILUTSequence=table(values, first, bits, vr))
    for more in ({}, rescale, window):
        assert np.abs(shown(tmp_path / "a", **fields, **more) - wanted).max() <= 0.5 + 1e-6


def test_voi_table_of_bytes_and_of_negative_values(tmp_path):
    item = table(np.arange(256)[::-1], -100, 8)[0]
    del item.LUTData
    item.add_new("LUTData", "OW", bytes(range(255, -1, -1)))
    pixels = np.arange(-200, 400).reshape(20, 30).astype(np.int16)
    seen = shown(tmp_path / "a", pixels=pixels, VOILUTSequence=[item])
    assert np.array_equal(seen, 255 - np.clip(pixels + 100, 0, 255))


def test_modality_table(tmp_path):
    values = np.square(np.arange(4096)) // 256
    file = dicom(ModalityLUTSequence=table(values, 0, 16))
    looked_up = values[DEEP]
    wanted = (looked_up - looked_up.min()) / np.ptp(looked_up) * 255
    assert np.abs(shown(tmp_path / "a", file) - wanted).max() <= 0.5 + 1e-6
    file.WindowCenter, file.WindowWidth = 30000, 20001
    wanted = by_hand(looked_up, 30000, 20001, "LINEAR")
    assert np.abs(shown(tmp_path / "a", file) - wanted).max() <= 0.5 + 1e-6


def test_padding_does_not_count(tmp_path):
    inner = shown(tmp_path / "inner", pixels=DEEP)
    between = dict(PixelPaddingValue=-1980, PixelPaddingRangeLimit=-2000)
    for fill, dtype, photometric, padding in (
        (0, np.uint16, "MONOCHROME2", dict(PixelPaddingValue=0)),
        (-2000, np.int16, "MONOCHROME2", dict(PixelPaddingValue=-2000)),
        (4095, np.uint16, "MONOCHROME1", dict(PixelPaddingValue=4095)),
        (-1990, np.int16, "MONOCHROME2", between),
    ):
        seen = shown(
            tmp_path / "a",
            pixels=np.pad(DEEP.astype(dtype), 4, constant_values=fill),
            photometric=photometric,
            bits=16 if dtype == np.int16 else 12,
            **padding,
        )
        wanted = inner if photometric == "MONOCHROME2" else 255 - inner
        assert np.array_equal(seen[4:-4, 4:-4], wanted)
        assert seen[:4].max() == 0  # black, in either
    nothing_else = shown(tmp_path / "a", pixels=DEEP * 0 + 7, PixelPaddingValue=7)
    assert (nothing_else == 0).all()


def test_bits_above_those_stored_are_ignored(tmp_path):
    "Old files keep overlays there."
    assert np.array_equal(shown(tmp_path / "a", pixels=DEEP | 0x8000), shown(tmp_path / "b"))


COLOUR = np.stack([RAMP, RAMP[:, ::-1], 255 - RAMP // 2], -1)


def test_colour(tmp_path):
    assert np.array_equal(shown(tmp_path / "a", pixels=COLOUR, photometric="RGB"), COLOUR)
    window = dict(WindowCenter=9, WindowWidth=9)  # it means nothing there
    planes = dicom(COLOUR, "RGB", PlanarConfiguration=1, **window)
    planes.PixelData = np.ascontiguousarray(COLOUR.transpose(2, 0, 1)).tobytes()
    assert np.array_equal(shown(tmp_path / "a", planes), COLOUR)
    deep = COLOUR.astype(np.uint16) * 16 + 3
    assert np.array_equal(shown(tmp_path / "a", pixels=deep, photometric="RGB"), COLOUR)
    luma = convert_color_space(COLOUR, "RGB", "YBR_FULL")
    assert np.abs(shown(tmp_path / "a", pixels=luma, photometric="YBR_FULL") - COLOUR).max() <= 3
    write(tmp_path / "a", pixels=np.stack([RAMP] * 3, -1), photometric="RGB")
    assert open_image(tmp_path / "a").mode == "L"


@pytest.mark.parametrize("bits", [8, 16])
def test_palette_colour(tmp_path, bits):
    file = dicom(RAMP, "PALETTE COLOR")
    rng = np.random.default_rng(bits)
    colours = rng.integers(0, 2**bits, (3, 256)).astype(f"u{bits // 8}")
    for name, entries in zip(("Red", "Green", "Blue"), colours, strict=True):
        setattr(file, f"{name}PaletteColorLookupTableDescriptor", [256, 0, bits])
        setattr(file, f"{name}PaletteColorLookupTableData", entries.tobytes())
    wanted = np.moveaxis(colours[:, RAMP] >> (bits - 8), 0, -1)
    assert np.array_equal(shown(tmp_path / "a", file), wanted)


# DICOM compressed


def lossless_jpeg(pixels, bits):
    "Encode as lossless JPEG (ITU T.81 process 14, first-order prediction)."
    x = pixels.astype(int)
    first_column = np.concatenate([[2 ** (bits - 1)], x[:-1, 0]])  # from above
    left = np.concatenate([first_column[:, None], x[:, :-1]], 1)
    code = ""  # the Huffman code has 5 bits for each of 17 lengths
    for difference in (x - left).ravel():
        length = abs(int(difference)).bit_length()
        code += f"{length:05b}"
        if length:
            value = difference if difference > 0 else difference + 2**length - 1
            code += f"{value:0{length}b}"
    code += "1" * (-len(code) % 8)
    scan = int(code, 2).to_bytes(len(code) // 8, "big").replace(b"\xff", b"\xff\0")

    def segment(marker, data):
        return b"\xff" + bytes([marker]) + struct.pack(">H", len(data) + 2) + data

    frame = struct.pack(">BHHB", bits, *pixels.shape, 1) + b"\1\x11\0"
    huffman = bytes([0, 0, 0, 0, 0, 17] + [0] * 11) + bytes(range(17))
    head = segment(0xC4, huffman) + segment(0xC3, frame) + segment(0xDA, b"\1\1\0\1\0\0")
    return b"\xff\xd8" + head + scan + b"\xff\xd9"


def by_pillow(pixels, kind, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, kind, **options)
    return buffer.getvalue()


# 16 x 16 pixels, (i*i) % 4096 for i = 0 ... 255, as pyjpegls 1.5.1 (MIT) writes them
SQUARES = (np.arange(256).reshape(16, 16) ** 2 % 4096).astype(np.uint16)
JPEG_LS = base64.b64decode(
    "/9j/9wALDAAQABABAREA/9oACAEBAAAAAKDFj011a/PeXPpVrV4BAQkZISkxOUFJiZmhqbG56AAAAgPD0+PxAIRE"
    "IxIJRMJxQKR4AAAAABn/CEIzIZTMZzQaTUazYbTcbw9AAAAAA7/oH7568dunLguWKlCZAAAAAAB3+KgqisK4sCyL"
    "Qti4LovEiJB+MA/edccbbaaf3PT+EAwQuF+9MsssMMMLrrrrPoAgX5QP3z147IH5AIB+CAXx+AIABAJ0RAiRFCLE"
    "YI0RwjwAzADUWwtyAgAAAAQC+J+UAoJQihlEKKUYo79/AAAAABk/U4bgPkVIqZVCqlWLK+evoj8sBYSxFjH2A87x"
    "26cvY74uZdC6l2Lu4Lln5wKwRgzCGFMMVKEyTytDZMyhlXwEmokH3dGC0ppnnXHG3Xn92m/u2mmmXPDtx2WWGGGH"
    "oP/Z"
)


def compressed(syntax, stream, **fields):
    file = dicom(**fields)
    file.file_meta.TransferSyntaxUID, file.PixelData = syntax, encapsulate([stream])
    return file


def run_lengths():
    file = dicom()
    file.compress(RLELossless, encoding_plugin="pydicom")
    return file


COMPRESSED = {
    "run lengths": run_lengths,
    "JPEG": lambda: compressed(JPEGBaseline8Bit, by_pillow(RAMP, "JPEG", quality=100), pixels=RAMP),
    "JPEG in colour": lambda: compressed(
        JPEGBaseline8Bit,
        by_pillow(COLOUR, "JPEG", quality=100, subsampling=0),
        pixels=COLOUR,
        photometric="YBR_FULL_422",
    ),
    "JPEG 2000": lambda: compressed(
        JPEG2000Lossless, by_pillow(DEEP, "JPEG2000", no_jp2=True), bits=16
    ),
    "JPEG 2000 in a box": lambda: compressed(
        JPEG2000Lossless, by_pillow(DEEP, "JPEG2000"), bits=16
    ),
    "lossless JPEG": lambda: compressed(JPEGLosslessSV1, lossless_jpeg(DEEP, 12)),
    "JPEG-LS": lambda: compressed(JPEGLSLossless, JPEG_LS, pixels=SQUARES),
}
FREE = [k for k in COMPRESSED if k not in ("lossless JPEG", "JPEG-LS")]


@pytest.mark.parametrize(
    "kind", [*FREE, *(pytest.param(k, marks=EXTRA) for k in COMPRESSED if k not in FREE)]
)
def test_compressed_dicom(tmp_path, kind):
    file = COMPRESSED[kind]()
    plain = {"JPEG-LS": SQUARES, "JPEG": RAMP, "JPEG in colour": COLOUR}.get(kind, DEEP)
    wanted = scale_to_8_bit(plain) if plain.itemsize > 1 else plain  # 8 bits without a window stay
    loss = {"JPEG": 1, "JPEG in colour": 3}.get(kind, 0)
    assert np.abs(shown(tmp_path / "a", file) - wanted).max() <= loss
    assert read_size(tmp_path / "a") == wanted.shape[1::-1]


@pytest.mark.parametrize(
    "syntax",
    [
        ImplicitVRLittleEndian,
        ExplicitVRLittleEndian,
        DeflatedExplicitVRLittleEndian,
        ExplicitVRBigEndian,
    ],
)
def test_plain_transfer_syntaxes(tmp_path, syntax):
    order = ">" if syntax == ExplicitVRBigEndian else "<"
    file = dicom(DEEP, VOILUTSequence=table(np.arange(4096), 0, 12, "OW", order))
    file.PixelData, file["PixelData"].VR = DEEP.astype(f"{order}u2").tobytes(), "OW"
    file.file_meta.TransferSyntaxUID = syntax
    assert np.abs(shown(tmp_path / "a", file) - DEEP / 4095 * 255).max() <= 0.5 + 1e-6


@pytest.mark.parametrize("syntax", [ImplicitVRLittleEndian, ExplicitVRLittleEndian])
@pytest.mark.parametrize("how", ["no preamble", "neither", "no syntax"])
def test_dicom_of_old_writers(tmp_path, syntax, how):
    file, path = dicom(), tmp_path / "a.jpg"  # the name does not matter
    file.file_meta.TransferSyntaxUID = syntax
    whole = write(tmp_path / "whole", file).read_bytes()
    path.write_bytes(whole[132:])
    if how == "neither":
        length = dcmread(tmp_path / "whole").file_meta.FileMetaInformationGroupLength
        path.write_bytes(whole[132 + length + 12 :])
    if how == "no syntax":
        del file.file_meta.TransferSyntaxUID
        file.save_as(path, implicit_vr=syntax == ImplicitVRLittleEndian, little_endian=True)
    assert open_image(path) == open_image(tmp_path / "whole")
    assert read_size(path) == (64, 32)


# DICOM that is refused


def without(*names):
    def make():
        file = dicom()
        for name in names:
            delattr(file, name)
        return file

    return make


def other_kind(uid):
    def make():
        file = without("Rows", "Columns", "PixelData")()
        file.SOPClassUID = file.file_meta.MediaStorageSOPClassUID = UID(uid)
        return file

    return make


def claims(stream, old, new):
    assert old in stream
    return stream.replace(old, new, 1)


def wide():
    file = dicom()
    file.BitsAllocated, file.BitsStored, file.HighBit = 32, 32, 31
    file.PixelData = DEEP.astype(np.uint32).tobytes()
    return file


REFUSED = {  # how it is made, what must be said, and whether its header tells
    "film": (lambda: dicom(NumberOfFrames=12), "12 frames", True),
    "report": (
        other_kind("1.2.840.10008.5.1.4.1.1.88.11"),
        "without an image (Basic Text SR Storage)",
        True,
    ),
    "pdf": (
        other_kind("1.2.840.10008.5.1.4.1.1.104.1"),
        "without an image (Encapsulated PDF Storage)",
        True,
    ),
    "header alone": (without("PixelData"), "pixels are missing", False),
    "no rows": (lambda: dicom(Rows=0), "without an image", True),
    "other rows": (lambda: dicom(Rows=33), "damaged", False),
    "one row": (lambda: dicom(DEEP[:1]), "64 x 1 pixels", True),
    "gigapixels": (lambda: dicom(Rows=65535, Columns=65535), "65535 x 65535 pixels", True),
    "no interpretation": (
        without("PhotometricInterpretation"),
        "without PhotometricInterpretation",
        True,
    ),
    "32 bits": (wide, "32 bits a pixel", False),
    "unknown window": (
        lambda: dicom(WindowCenter=9, WindowWidth=9, VOILUTFunction="ROUND"),
        "ROUND",
        False,
    ),
    "video": (
        lambda: compressed(MPEG2MPML, bytes(100)),
        "compressed as MPEG2 Main Profile / Main Level",
        True,
    ),
    "no stream": (lambda: compressed(JPEGBaseline8Bit, bytes(100), pixels=RAMP), "damaged", False),
    "large stream": (
        lambda: compressed(
            JPEGLosslessSV1,
            claims(lossless_jpeg(DEEP, 12), struct.pack(">HH", 32, 64), b"\xff\xff\xff\xff"),
        ),
        "65535, 65535, 1",
        False,
    ),
    "large JPEG 2000": (
        lambda: compressed(
            JPEG2000Lossless,
            claims(
                by_pillow(DEEP, "JPEG2000", no_jp2=True),
                struct.pack(">4I", 64, 32, 0, 0),
                struct.pack(">4I", 60000, 60000, 0, 0),
            ),
            bits=16,
        ),
        "60000, 60000, 1",
        False,
    ),
}


@pytest.mark.parametrize(
    "kind", [k if k != "large stream" else pytest.param(k, marks=EXTRA) for k in REFUSED]
)
def test_dicom_that_is_refused(tmp_path, kind):
    make, said, in_header = REFUSED[kind]
    write(tmp_path / "a.dcm", make())
    assert said in problem(tmp_path / "a.dcm").what
    if in_header:
        assert said in problem(tmp_path / "a.dcm", read_size).what
    else:
        read_size(tmp_path / "a.dcm")


NEEDED = [
    "SamplesPerPixel",
    "PhotometricInterpretation",
    "BitsAllocated",
    "BitsStored",
    "PixelRepresentation",
]


def says_what_is_missing(path, *names):
    for look in (open_image, read_size):
        found = problem(path, look)
        assert found.what == f"DICOM without {', '.join(names)}"
        assert "Export the file again" in found.mend


@pytest.mark.parametrize("value", ["absent", None])
@pytest.mark.parametrize("name", NEEDED)
def test_missing_element_is_named(tmp_path, name, value):
    file = dicom()
    if value == "absent":
        delattr(file, name)
    else:
        setattr(file, name, value)
    says_what_is_missing(write(tmp_path / "a", file), name)


def test_all_missing_elements_are_named_at_once(tmp_path):
    says_what_is_missing(write(tmp_path / "a", without(*NEEDED)()), *NEEDED)


def test_missing_element_of_colour_is_named(tmp_path):
    file = dicom(COLOUR, "RGB")
    del file.PlanarConfiguration
    says_what_is_missing(write(tmp_path / "a", file), "PlanarConfiguration")
    names = [f"{colour}PaletteColorLookupTableDescriptor" for colour in ("Red", "Green", "Blue")]
    says_what_is_missing(write(tmp_path / "b", dicom(RAMP, "PALETTE COLOR")), *names)


@pytest.mark.parametrize("name", ["Rows", "BitsStored", "PixelRepresentation"])
def test_element_of_two_values_is_named(tmp_path, name):
    path = write(tmp_path / "a", **{name: [1, 1]})
    assert problem(path).what == f"DICOM with too many or too few values of {name}"


@pytest.mark.parametrize(
    "fields, words",
    [
        (dict(photometric="RGB"), "RGB with SamplesPerPixel 1"),
        (dict(photometric="GREY"), "GREY with SamplesPerPixel 1"),
        (dict(pixels=np.stack([RAMP] * 3, -1)), "MONOCHROME2 with SamplesPerPixel 3"),
    ],
)
def test_interpretation_that_does_not_fit_is_refused(tmp_path, fields, words):
    assert words in problem(write(tmp_path / "a", **fields)).what


@pytest.mark.parametrize("sequence", ["VOILUTSequence", "ModalityLUTSequence"])
@pytest.mark.parametrize("name", ["LUTDescriptor", "LUTData"])
@pytest.mark.parametrize("value", ["absent", None])
def test_missing_element_of_a_table_is_named(tmp_path, sequence, name, value):
    item = table(np.arange(4096), 0, 12)[0]
    if value == "absent":
        delattr(item, name)
    else:
        setattr(item, name, value)
    path = write(tmp_path / "a", **{sequence: [item]})
    assert f"look-up table has no whole {name}" in problem(path).what


@pytest.mark.parametrize(
    "name", ["WindowCenter", "WindowWidth", "RescaleSlope", "RescaleIntercept"]
)
@pytest.mark.parametrize("text", ["abc", "1,5", "inf", "nan", "-"])
@pytest.mark.filterwarnings("ignore:Invalid value for VR")
def test_element_that_is_no_number_is_named(tmp_path, name, text):
    numbers = dict(WindowCenter="1000", WindowWidth="900", RescaleSlope="1", RescaleIntercept="0")
    path = write(tmp_path / "a", **{**numbers, name: "77.777777"})
    path.write_bytes(path.read_bytes().replace(b"77.777777 ", text.encode().ljust(10)))
    found = problem(path)
    assert found.what == f"DICOM whose {name} is '{text}', which is no number"
    assert "pydicom" in found.mend


@pytest.mark.parametrize(
    "syntax, name",
    [
        (JPEGLosslessSV1, "JPEG Lossless"),
        (JPEGLSLossless, "JPEG-LS Lossless"),
        (JPEGExtended12Bit, "JPEG Extended"),
    ],
)
def test_missing_decoder_is_named(tmp_path, monkeypatch, syntax, name):
    # as where the extra is not installed
    monkeypatch.setattr(images, "DECODERS", ("pydicom", "pillow"))
    write(tmp_path / "a.dcm", compressed(syntax, lossless_jpeg(DEEP, 12)))
    for look in (open_image, read_size):
        found = problem(tmp_path / "a.dcm", look)
        assert f"compressed as {name}" in found.what and "pylibjpeg-libjpeg" in found.mend


def test_cut_dicom_is_refused(tmp_path):
    for kind, make in {"plain": dicom, **COMPRESSED}.items():
        if kind not in ("plain", *FREE) and find_spec("libjpeg") is None:
            continue
        whole = write(tmp_path / "whole", make()).read_bytes()
        for share in np.linspace(0.02, 0.98, 25):
            (tmp_path / "cut").write_bytes(whole[: int(len(whole) * share)])
            problem(tmp_path / "cut")


@pytest.mark.timeout(30)
def test_damaged_box_is_not_waited_for(tmp_path):
    "A box of no length, in which pydicom looks for the next box for ever."
    stream = by_pillow(DEEP, "JPEG2000")
    stream = stream[:12] + bytes(4) + stream[16:]
    write(tmp_path / "a", compressed(JPEG2000Lossless, stream, bits=16))
    assert np.array_equal(np.asarray(open_image(tmp_path / "a")), scale_to_8_bit(DEEP))


def test_claimed_length_takes_no_memory(tmp_path):
    "A field that claims 4 GB in a file of 5 KB."
    whole = write(tmp_path / "a.dcm").read_bytes()
    place = whole.index(b"\xe0\x7f\x10\x00OW") + 8
    (tmp_path / "a.dcm").write_bytes(whole[:place] + b"\xf0\xff\xff\xff" + whole[place + 4 :])
    # not getrusage, which begins at the parent's peak
    code = (
        "from cvt2distilgpt2.images import open_image\n"
        f"try: open_image({str(tmp_path / 'a.dcm')!r})\n"
        "except ValueError as e: print(e)\n"
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    command = [sys.executable, "-W", "ignore", "-c", code]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert int(said[-1]) < 1_000_000  # kB


# views


@pytest.mark.parametrize(
    "view, positions",
    [
        (
            "frontal",
            [
                "AP",
                "PA",
                "pa",
                " AP ",
                "AP AXIAL",
                "AP LLD",
                "AP RLD",
                "PA LLD",
                "PA RLD",
                "Frontal",
                "antero-posterior",
                "postero-anterior",
                "PORTABLE AP",
            ],
        ),
        (
            "lateral",
            [
                "LATERAL",
                "LL",
                "RL",
                "lateral",
                "XTABLE LATERAL",
                "left lateral",
                "Lateral view",
                "LAT",
            ],
        ),
        (
            "",
            [
                "",
                "LAO",
                "RAO",
                "LPO",
                "RPO",
                "SWIMMERS",
                "LLD",
                "RLD",
                "AP OBLIQUE",
                "oblique",
                "PA and lateral",
                "LEFT LATERAL DECUBITUS",
                "UNKNOWN",
                "?",
                "PAL",
            ],
        ),
    ],
)
def test_view_names(view, positions):
    assert {p: view_name(p) for p in positions} == dict.fromkeys(positions, view)


def test_views_of_dicom(tmp_path):
    code = Dataset()
    code.CodeMeaning = "postero-anterior"
    for fields, view in (
        (dict(ViewPosition="LL"), "lateral"),
        (dict(ViewPosition="", ViewCodeSequence=[code]), "frontal"),
        ({}, ""),
        (dict(ViewPosition="LL", ViewCodeSequence=[code]), "lateral"),
        (dict(ViewCodeSequence=[]), ""),
        (dict(ViewPosition=None), ""),
    ):
        assert view_of(write(tmp_path / "a.dcm", **fields)) == view_of(dicom(**fields)) == view
    (tmp_path / "b.dcm").write_text("no dicom at all")
    problem(tmp_path / "b.dcm", view_of)


# real radiographs


def test_real_radiographs_as_dicom(tmp_path, test_data):
    files = sorted((test_data / "cxr_pairs").rglob("*"))
    paths = [p for p in files if p.suffix in (".png", ".jpg")]
    assert paths
    for path in paths[::12]:
        grey = np.asarray(open_image(path).convert("L"))
        for photometric, pixels in (
            ("MONOCHROME2", grey.astype(np.uint16) * 16),
            ("MONOCHROME1", 4080 - grey.astype(np.uint16) * 16),
        ):
            window = dict(WindowCenter=2040.5, WindowWidth=4081)
            seen = shown(tmp_path / "a", pixels=pixels, photometric=photometric, **window)
            assert np.array_equal(seen, grey)


# damage of every kind


def damage(content, rng):
    "Alter a file as disks, networks and bad writers do."
    content, n = bytearray(content), len(content)
    place, way = int(rng.integers(n)), rng.integers(7)
    if way == 0:
        return content[:place]
    if way == 1:  # flipped bits
        for p in rng.integers(n, size=rng.integers(1, 30)):
            content[p] ^= 1 << int(rng.integers(8))
    if way == 2:
        content[place : place + 200] = bytes(len(content[place : place + 200]))  # a hole
    if way == 3:
        content[: rng.integers(1, 12)] = rng.bytes(4)  # another beginning
    if way == 4:  # huge claims, in the header
        for p in rng.integers(min(n, 600), size=2):
            content[p : p + 4] = b"\xff" * len(content[p : p + 4])
    if way == 5:
        content[place:place] = rng.bytes(50)  # something slipped in
    if way == 6:
        content[place:] = content[: n - place]  # the beginning over again
    return content


def any_kind(rng, folder):
    "Write an image of any kind; return its path."
    kinds = {
        **KINDS,
        "noise.jpg": lambda p: save(p, Image.fromarray(NOISE)),
        "colour.jpg": lambda p: save(p, Image.fromarray(COLOUR)),
        "narrow.png": lambda p: save(p, Image.new("L", (1, 300))),
        "wide.bmp": lambda p: save(p, Image.new("L", (300, 1))),
    }
    scans = {
        "plain": dicom,
        "window": lambda: dicom(WindowCenter=2000, WindowWidth=900),
        **COMPRESSED,
    }
    for name, make in scans.items():
        if name in ("plain", "window", *FREE) or find_spec("libjpeg"):
            kinds[f"{name}.dcm"] = lambda p, make=make: write(p, make())
    name = list(kinds)[rng.integers(len(kinds))]
    return kinds[name](folder / name)


@pytest.mark.timeout(30)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "case", [*range(60), *(pytest.param(n, marks=pytest.mark.full) for n in range(60, 1000))]
)
def test_damage(tmp_path, case):
    "Whatever was done to it, a file opens or is refused, soon, and stays as it was."
    rng = np.random.default_rng(case)
    path = any_kind(rng, tmp_path)
    content = bytes(damage(path.read_bytes(), rng))
    path.write_bytes(content)
    before, start = path.stat(), time.perf_counter()
    for look in (open_image, read_size):
        try:
            seen = look(path)
        except DataError as e:
            (found,) = e.problems
            assert found.what and found.mend and found.path == str(path)
        else:
            if look is open_image:
                assert seen.mode in ("L", "RGB") and min(seen.size) >= 16
            else:
                assert len(seen) == 2
    assert time.perf_counter() - start < 10
    assert path.read_bytes() == content and path.stat().st_mtime_ns == before.st_mtime_ns
    assert os.listdir(tmp_path) == [path.name]
