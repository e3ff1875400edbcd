"""Pictures of every kind become what they show, and what is no picture is refused in one sentence."""
import io
import math
import os
import struct
import tracemalloc
import warnings
import zlib

import numpy as np
import pytest
import torch
from conftest import colors
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from gs2d.ground_truth import GroundTruth
from gs2d.io.pictures import MAX_PIXELS, PICTURE_SUFFIXES, load_picture, pictures_in, save_picture, to_pil


def file_of(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer


# ── arrays ────────────────────────────────────────────────────────────────────

@given(hnp.arrays(np.uint8, st.tuples(st.integers(1, 6), st.integers(1, 6), st.just(3))))
def test_eight_bits_survive_the_round_trip(picture):
    image = load_picture(picture)
    assert image.dtype == torch.float32 and image.is_contiguous()
    assert np.array_equal(np.asarray(to_pil(image)), picture)


@pytest.mark.parametrize("kind", [lambda a: a, torch.from_numpy], ids=["numpy", "torch"])
def test_arrays_of_every_type_mean_the_same(kind):
    levels = np.array([[0, 51], [204, 255]], np.uint8)
    expected = torch.tensor([[0.0, 0.2], [0.8, 1.0]])[..., None].expand(2, 2, 3)
    for array in (levels, levels[..., None], levels.astype(np.uint16) * 257, levels / 255, (levels / 255).astype(np.float32),
                  np.repeat(levels[..., None], 3, 2)):
        torch.testing.assert_close(load_picture(kind(array)), expected, rtol=0, atol=1e-7)
    torch.testing.assert_close(load_picture(kind(levels > 100)), (expected > 0.4).float())


def test_tensors_with_gradients_or_half_precision_are_taken_as_values():
    image = torch.full((2, 2, 3), 0.5, requires_grad=True)
    assert not load_picture(image).requires_grad
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        assert torch.equal(load_picture(image.to(dtype)), torch.full((2, 2, 3), 0.5))


def test_loading_copies_and_does_not_change_its_input():
    array = np.full((2, 2, 3), 0.5, np.float32)
    load_picture(array)[0, 0, 0] = 9
    tensor = torch.full((2, 2, 3), 0.5)
    load_picture(tensor)[0, 0, 0] = 9
    assert (array == 0.5).all() and (tensor == 0.5).all()


def test_read_only_and_strided_arrays_load_without_a_warning():
    array = colors()[:, ::-1]
    array.flags.writeable = False
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.array_equal(np.asarray(to_pil(load_picture(array))), array)


@pytest.mark.parametrize("array, error, words", [
    (np.zeros((3, 8, 8), np.uint8), ValueError, "channels come last"),
    (np.zeros((2, 8, 8, 3), np.uint8), ValueError, "batch"),
    (np.zeros((8, 8, 2), np.uint8), ValueError, "shape"),
    (np.zeros((8,), np.uint8), ValueError, "shape"),
    (np.zeros((0, 8, 3), np.uint8), ValueError, "shape"),
    (np.zeros((8, 8), np.int64), TypeError, "uint8"),
    (np.zeros((8, 8), complex), TypeError, "uint8"),
    (np.full((8, 8), np.nan), ValueError, "64 that are NaN"),
    (np.full((8, 8), np.inf), ValueError, "finite"),
    (np.full((8, 8), 255.0), ValueError, "255"),
    (np.full((8, 8), -0.1), ValueError, r"-0\.1"),
])
def test_arrays_that_are_no_pictures_are_refused(array, error, words):
    with pytest.raises(error, match=words):
        load_picture(array)
    with pytest.raises(error, match=words):
        load_picture(torch.from_numpy(array))


@pytest.mark.parametrize("thing", [None, 3, [[0.0]], b"bytes"])
def test_things_that_are_no_pictures_are_refused(thing):
    with pytest.raises(TypeError, match="expected a path"):
        load_picture(thing)


# ── files and modes ───────────────────────────────────────────────────────────

def test_path_string_open_file_and_pillow_image_agree(tmp_path):
    path, picture = tmp_path / "a.png", colors()
    Image.fromarray(picture).save(path)
    expected = load_picture(picture)
    with open(path, "rb") as file:
        for way in (path, str(path), file, Image.open(path)):
            assert torch.equal(load_picture(way), expected)


def test_modes_of_opaque_pictures():
    picture = Image.fromarray(colors())
    grey = picture.convert("L")
    for mode in ("CMYK", "YCbCr", "HSV", "RGBX"):
        converted = picture.convert(mode)
        expected = np.asarray(converted.convert("RGB"))
        assert np.array_equal(np.asarray(to_pil(load_picture(converted))), expected)
    assert np.array_equal(np.asarray(to_pil(load_picture(grey)))[..., 1], np.asarray(grey))
    bits = picture.convert("1")
    assert torch.equal(load_picture(bits)[..., 0].bool(), torch.from_numpy(np.array(bits)))
    palette = picture.quantize(5)
    assert np.array_equal(np.asarray(to_pil(load_picture(palette))), np.asarray(palette.convert("RGB")))
    values = np.random.default_rng(0).random((4, 5), np.float32)
    assert np.array_equal(load_picture(Image.fromarray(values))[..., 2].numpy(), values)


@pytest.mark.parametrize("make", [
    lambda v: Image.fromarray(v),  # I;16
    lambda v: Image.frombytes("I;16B", v.shape[::-1], v.astype(">u2").tobytes()),
    lambda v: Image.fromarray(v.astype(np.int32)),  # I
    lambda v: Image.open(file_of(Image.fromarray(v))),
    lambda v: Image.open(file_of(Image.fromarray(v), "TIFF")),
], ids=["I;16", "I;16B", "I", "png", "tiff"])
def test_sixteen_bits_keep_their_precision(make):
    values = np.array([[0, 1, 255, 256], [32768, 40000, 65534, 65535]], np.uint16)
    image = load_picture(make(values))
    torch.testing.assert_close(image[..., 0].double() * 65535, torch.from_numpy(values.astype(float)), rtol=0, atol=0.01)


def test_thirty_two_bits_beyond_sixteen_are_refused():
    with pytest.raises(ValueError, match="65535"):
        load_picture(Image.fromarray(np.full((2, 2), 70_000, np.int32)))


@pytest.mark.parametrize("background", [(0, 0, 0), (1, 1, 1), (0.2, 0.5, 0.9)])
def test_transparency_is_laid_on_the_background(background):
    pixels = colors(channels=4)
    color, alpha = pixels[..., :3] / 255, pixels[..., 3:] / 255
    expected = alpha * color + (1 - alpha) * np.array(background)
    for picture in (pixels, Image.fromarray(pixels), file_of(Image.fromarray(pixels)), pixels / 255, torch.from_numpy(pixels)):
        np.testing.assert_allclose(load_picture(picture, background=background).numpy(), expected, rtol=0, atol=1e-6)


def test_transparency_of_grey_and_of_a_palette():
    grey = Image.new("LA", (1, 1), (102, 51))
    np.testing.assert_allclose(load_picture(grey, background=(1, 1, 0)).numpy(), [[[0.88, 0.88, 0.08]]], atol=1e-6)
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 255, 0])
    palette.putdata([0, 1])
    gif = file_of(palette, "GIF", transparency=1)
    assert load_picture(gif, background=(0, 0, 1)).tolist() == [[[1, 0, 0], [0, 0, 1]]]
    keyed = file_of(Image.fromarray(np.array([[[9, 9, 9], [255, 0, 0]]], np.uint8)), "PNG", transparency=(9, 9, 9))
    assert load_picture(keyed, background=(0, 0, 1)).tolist() == [[[0, 0, 1], [1, 0, 0]]]


def test_hidden_colours_do_not_bleed_when_shrunk():
    pixels = np.zeros((32, 32, 4), np.uint8)
    pixels[:, :16] = (0, 0, 255, 255)
    pixels[:, 16:] = (255, 0, 0, 0)  # clear, but red underneath
    image = load_picture(pixels, max_side=7)
    assert image[..., 0].max() == 0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_turns_the_picture_upright(orientation):
    upright = Image.fromarray(colors(4, 7))
    stored = {1: None, 2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}[orientation]  # the Transpose that undoes each tag
    stored = upright if stored is None else upright.transpose(Image.Transpose(stored))
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert np.array_equal(np.asarray(to_pil(load_picture(file_of(stored, exif=exif)))), np.asarray(upright))


def test_the_first_frame_of_an_animation(tmp_path):
    frames = [Image.new("RGB", (4, 3), color) for color in ("red", "lime", "blue")]
    for name in ("a.gif", "a.webp", "a.png", "a.tiff"):
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        image = load_picture(tmp_path / name)
        assert image.shape == (3, 4, 3)
        assert image[0, 0].argmax() == 0 and image[0, 0, 1] < 0.05, name
    later = Image.open(tmp_path / "a.tiff")
    later.seek(1)
    assert load_picture(later)[0, 0].tolist() == [0, 1, 0]


def test_a_pillow_image_is_left_as_it_was():
    image = Image.fromarray(colors())
    before = image.tobytes()
    load_picture(image, max_side=3)
    assert image.tobytes() == before and image.size == (8, 6)


@pytest.mark.parametrize("background", [(0, 0), (0, 0, 2), (0, 0, math.nan), "white", "010", 0.5])
def test_background_is_three_numbers_in_range(background):
    with pytest.raises(ValueError, match=r"three numbers in \[0, 1\]"):
        load_picture(colors(), background=background)


# ── size ──────────────────────────────────────────────────────────────────────

@pytest.mark.parametrize("shape, max_side, expected", [
    ((60, 100), 50, (30, 50)), ((100, 60), 50, (50, 30)), ((1, 1000), 10, (1, 10)), ((6, 8), 8, (6, 8)),
    ((6, 8), 100, (6, 8)), ((6, 8), None, (6, 8)), ((500, 500), 1, (1, 1))])
def test_shrinking_keeps_the_proportions_and_never_enlarges(shape, max_side, expected):
    assert load_picture(colors(*shape), max_side).shape[:2] == expected


def test_shrinking_averages_and_stays_in_range():
    stripes = (np.arange(120) % 2 * 255).astype(np.uint8)[None].repeat(120, 0)
    small = load_picture(stripes, max_side=20)
    assert (small - 0.5).abs()[:, 2:-2].max() < 0.02
    edge = load_picture((np.arange(120) >= 60)[None].repeat(120, 0), max_side=50)
    assert edge.min() == 0 and edge.max() == 1


@pytest.mark.parametrize("max_side", [0, -5])
def test_max_side_is_at_least_one(max_side):
    with pytest.raises(ValueError, match="max_side"):
        load_picture(colors(), max_side)


# ── what goes wrong ───────────────────────────────────────────────────────────

def png_header(width, height):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match="expected a picture file.*nothing.png"):
        load_picture(tmp_path / "nothing.png")


@pytest.mark.parametrize("data, words", [
    (b"", "not a picture"), (b"Dear diary", "not a picture"), (file_of(Image.fromarray(colors())).getvalue()[:20], "damaged")])
def test_a_file_that_is_no_picture(tmp_path, data, words):
    (tmp_path / "a.png").write_bytes(data)
    with pytest.raises(ValueError, match=words):
        load_picture(tmp_path / "a.png")


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "TIFF", "BMP"])
@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_a_truncated_picture(tmp_path, kind, share):
    data = file_of(Image.fromarray(colors(64, 64)), kind).getvalue()
    (tmp_path / "a").write_bytes(data[: int(share * len(data))])
    with pytest.raises(ValueError, match="damaged|not a picture"):
        load_picture(tmp_path / "a")
    with pytest.raises(ValueError, match="damaged|not a picture"):
        load_picture(io.BytesIO(data[: int(share * len(data))]))


def test_a_file_that_the_system_refuses(tmp_path, monkeypatch):
    (tmp_path / "a.png").write_bytes(file_of(Image.fromarray(colors())).getvalue())

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")
    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(ValueError, match="can be read.*Permission denied"):
        load_picture(tmp_path / "a.png")


def test_a_folder(tmp_path):
    with pytest.raises(ValueError, match="got a folder"):
        load_picture(tmp_path)


def test_a_picture_of_a_billion_pixels_is_refused_before_decoding(tmp_path, monkeypatch):
    path = tmp_path / "huge.png"
    path.write_bytes(png_header(40_000, 25_000))
    with pytest.raises(ValueError, match=f"{MAX_PIXELS:,}"):
        load_picture(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)  # even where somebody has switched Pillow's guard off
    with pytest.raises(ValueError, match="25000×40000"):
        load_picture(path)


def test_no_warning_of_a_large_picture_leaks(tmp_path):
    (tmp_path / "large.png").write_bytes(png_header(10_000, 10_000))  # Pillow warns from 89 million on
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match="damaged"):
            load_picture(tmp_path / "large.png")


def test_a_pillow_image_without_pixels():
    with pytest.raises(ValueError, match="got 5×0"):
        load_picture(Image.new("RGB", (0, 5)))


# ── out again ─────────────────────────────────────────────────────────────────

def test_to_pil_clamps_and_rounds_to_the_nearest():
    image = torch.tensor([[-1.0, 0.0, 0.4 / 255, 0.6 / 255, 254.4 / 255, 254.6 / 255, 1.0, 2.0, math.inf]])
    assert np.asarray(to_pil(image)).tolist() == [[0, 0, 0, 1, 254, 255, 255, 255, 255]]


def test_to_pil_modes():
    modes = [(2, 3), (2, 3, 1), (2, 3, 3), (2, 3, 4)]
    assert [to_pil(torch.rand(shape, requires_grad=True)).mode for shape in modes] == ["L", "L", "RGB", "RGBA"]


@pytest.mark.parametrize("image, words", [
    (torch.zeros(2, 2, 2), "shape"), (torch.zeros(3), "shape"), (torch.zeros(0, 2, 3), "shape"), (torch.full((2, 2), math.nan), "4 that are NaN")])
def test_to_pil_refuses_what_is_no_picture(image, words):
    with pytest.raises(ValueError, match=words):
        to_pil(image)


@pytest.mark.parametrize("name", ["a.png", "a.PNG", "a.bmp", "a.tiff", "a.jpg", "a.jpeg", "a.webp", "a.gif"])
def test_save_writes_the_format_of_the_suffix(tmp_path, name):
    truth = GroundTruth.random(10, 24, 32, seed=0)
    path = truth.save(tmp_path / name)
    assert [p.name for p in tmp_path.iterdir()] == [name]  # and nothing temporary is left
    read = Image.open(path)
    assert read.size == (32, 24)
    lossless = name.lower().endswith(("png", "bmp", "tiff"))
    difference = np.abs(np.asarray(read.convert("RGB"), int) - np.asarray(truth.to_pil(), int))
    assert difference.max() == 0 if lossless else difference.mean() < 8


@pytest.mark.parametrize("name", ["a", "a.doc", "a.", "a.mp4"])
def test_save_refuses_unknown_suffixes_and_writes_nothing(tmp_path, name):
    with pytest.raises(ValueError, match="suffix"):
        save_picture(torch.rand(4, 4, 3), tmp_path / name)
    assert not list(tmp_path.iterdir())


def test_save_refuses_a_missing_folder_and_a_format_that_cannot_hold_it(tmp_path):
    with pytest.raises(FileNotFoundError, match="existing folder"):
        save_picture(torch.rand(4, 4, 3), tmp_path / "no" / "a.png")
    with pytest.raises(ValueError, match="cannot hold"):
        save_picture(torch.rand(4, 4, 4), tmp_path / "a.jpg")


def test_saving_over_a_file_replaces_it(tmp_path):
    save_picture(torch.zeros(4, 4, 3), tmp_path / "a.png")
    save_picture(torch.ones(4, 4, 3), tmp_path / "a.png")
    assert load_picture(tmp_path / "a.png").min() == 1


# ── a folder ──────────────────────────────────────────────────────────────────

def test_the_pictures_of_a_folder(tmp_path):
    for name in ("b.png", "a.JPG", "notes.txt", "c.tiff"):
        (tmp_path / name).touch()
    assert [path.name for path in pictures_in(tmp_path)] == ["a.JPG", "b.png", "c.tiff"] == [path.name for path in pictures_in(str(tmp_path))]


def test_a_folder_without_pictures(tmp_path):
    with pytest.raises(ValueError, match="expected a folder with pictures"):
        pictures_in(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=PICTURE_SUFFIXES[0]):
        pictures_in(tmp_path)


# ── every mode, every type, every byte ────────────────────────────────────────

MODES = ["1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV", "I", "I;16", "I;16B", "I;16L", "I;16N", "F"]


def is_a_picture(image, height, width):
    return (image.shape == (height, width, 3) and image.dtype == torch.float32 and image.is_contiguous() and not image.requires_grad
            and 0 <= image.min() and image.max() <= 1)


@pytest.mark.parametrize("mode", MODES)
def test_a_pillow_image_of_every_mode_is_a_picture(mode):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert is_a_picture(load_picture(Image.new(mode, (5, 4))), 4, 5)
        assert is_a_picture(load_picture(Image.new(mode, (50, 40)), max_side=9, background=(1, 0, 1)), 7, 9)


@pytest.mark.parametrize("dtype", ["?", "u1", "i1", "<u2", ">u2", "i2", "u4", "i4", "u8", "i8", "f2", "<f4", ">f4", "f8", "g", "c8", "c16", "O", "S3", "U3",
                                   "M8[s]", "m8[s]", "V4", [("a", "f4")]], ids=str)
@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 1), (4, 5, 3), (4, 5, 4)])
def test_an_array_of_every_type_is_a_picture_or_said_to_be_none(dtype, shape):
    array = np.zeros(shape, dtype)
    if np.dtype(dtype).kind in "?bf" or np.dtype(dtype).str[1:] in ("u1", "u2"):
        assert is_a_picture(load_picture(array), 4, 5)
    else:
        with pytest.raises(TypeError, match="expected uint8, uint16, bool, or numbers"):
            load_picture(array)


def test_the_byte_order_of_an_array_does_not_matter():
    levels = np.array([[0, 258, 65535]], np.uint16)
    assert torch.equal(load_picture(levels), load_picture(levels.astype(">u2")))
    assert torch.equal(load_picture(levels / 65535), load_picture((levels / 65535).astype(">f8")))


IMAGE = torch.rand(4, 5, 3, generator=torch.Generator().manual_seed(0))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [
    lambda: IMAGE.clone().requires_grad_(), lambda: IMAGE.bfloat16(), lambda: IMAGE.to(torch.float8_e4m3fn), lambda: IMAGE.to_sparse(),
    lambda: IMAGE[..., 0].to_sparse_csr(), lambda: IMAGE.to_mkldnn(), lambda: torch.quantize_per_tensor(IMAGE, 1 / 256, 0, torch.quint8),
    lambda: (IMAGE * 65535).to(torch.uint16), lambda: torch.complex(IMAGE, -IMAGE).conj().imag, lambda: torch.zeros(1).expand(4, 5),
    lambda: IMAGE.permute(1, 0, 2).contiguous().permute(1, 0, 2)])
def test_a_tensor_of_every_kind_is_a_picture(make):
    assert is_a_picture(load_picture(make()), 4, 5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("make", [
    lambda: IMAGE.to("meta"), lambda: IMAGE.to(torch.complex64), lambda: torch.complex(IMAGE, IMAGE).conj(), lambda: IMAGE.to(torch.complex32),
    lambda: torch.nested.nested_tensor([IMAGE, IMAGE]), lambda: IMAGE.long(), lambda: IMAGE.to(torch.uint32)])
def test_a_tensor_that_is_no_picture_is_said_to_be_none(make):
    with pytest.raises(TypeError, match="expected") as caught:
        load_picture(make())
    assert len(str(caught.value)) < 300 and "\n" not in str(caught.value)


def test_a_masked_array_is_its_numbers():
    assert is_a_picture(load_picture(np.ma.masked_array(np.zeros((4, 5, 3)), mask=True)), 4, 5)


@pytest.mark.parametrize("picture", [np.broadcast_to(np.uint8(0), (10**6, 10**6)), torch.zeros(1).expand(10**6, 10**6), np.broadcast_to(0.0, (10**6, 10**6, 3))])
def test_an_array_that_would_fill_the_memory_is_refused_before_it_does(picture):
    tracemalloc.start()
    with pytest.raises(ValueError, match=f"{MAX_PIXELS:,}"):
        load_picture(picture)
    assert tracemalloc.get_traced_memory()[1] < 1e6
    tracemalloc.stop()


@pytest.mark.parametrize("thing, words", [
    (io.StringIO("text"), "damaged|not a picture"), ("a\0b", "none"), ("x" * 5000, "none"), ("/dev/null", "a device"), (Image.new("I", (2, 2), -5), "0 to 65535"),
    (Image.fromarray(np.full((3, 3), np.nan, np.float32)), "picture: expected finite"), (Image.fromarray(np.full((3, 3), 7, np.float32)), "picture: expected")])
def test_odd_things_get_a_clear_line(thing, words):
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        load_picture(thing)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(ValueError, match="a device"):
        load_picture(tmp_path / "pipe.png")


def test_whatever_a_decoder_raises_is_a_damaged_picture(tmp_path, monkeypatch):
    from PIL import ImageFile, ImageOps
    (tmp_path / "a.png").write_bytes(file_of(Image.fromarray(colors())).getvalue())
    for error in (ZeroDivisionError("division by zero"), TypeError("x" * 10**6), AttributeError("None"), RuntimeError("codec"), struct.error("unpack"), KeyError(3)):
        for place, name in ((ImageFile.ImageFile, "load"), (ImageOps, "exif_transpose"), (Image, "open")):
            with monkeypatch.context() as patch:
                def fail(*_, **__):
                    raise error
                patch.setattr(place, name, fail)
                with pytest.raises(ValueError, match="damaged") as caught:
                    load_picture(tmp_path / "a.png")
                assert len(str(caught.value)) < 300 + len(str(tmp_path))


def test_odd_palettes_and_notes_make_no_noise():
    odd = Image.new("P", (2, 1))
    odd.putpalette([255, 0, 0, 0, 255, 0])
    odd.info["transparency"] = b"\x80\x00"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert is_a_picture(load_picture(odd), 1, 2)


def test_a_header_that_announces_gigabytes_gets_no_room_for_them(tmp_path):
    box = struct.pack(">I4sI4s", 2**31 + 5, b"jp2h", 22, b"ihdr")
    (tmp_path / "a.jp2").write_bytes(b"\0\0\0\x0cjP  \x0d\x0a\x87\x0a" + struct.pack(">I4s4sI", 16, b"ftyp", b"jp2 ", 0) + box + bytes(100))
    tracemalloc.start()
    with pytest.raises(ValueError, match="damaged"):
        load_picture(tmp_path / "a.jp2")
    assert tracemalloc.get_traced_memory()[1] < 1e7
    tracemalloc.stop()
