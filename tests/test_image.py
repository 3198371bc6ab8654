"""Any picture that people have becomes upright 8-bit RGB at the clip's size, or is refused in one clear line."""

import numpy as np
import pytest
from PIL import Image

from turbojax import image
from turbojax.errors import UserError
from turbojax.image import adaptive_size, open_image, read_image, resize_image

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 7, 3), np.uint8)


def test_files_pil_images_and_arrays_are_the_same_picture(tmp_path):
    Image.fromarray(RGB).save(tmp_path / "a.png")
    for source in (RGB, Image.fromarray(RGB), tmp_path / "a.png", str(tmp_path / "a.png")):
        np.testing.assert_array_equal(open_image(source), RGB)


def test_a_photograph_is_turned_upright(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # taken with the camera turned: rotate by 90 degrees clockwise to see it upright
    Image.fromarray(RGB).save(tmp_path / "a.png", exif=exif)
    np.testing.assert_array_equal(open_image(tmp_path / "a.png"), np.rot90(RGB, -1))


@pytest.mark.parametrize(
    ("mode", "value", "expected"),
    [
        ("L", 77, (77, 77, 77)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 257 * 90, (90, 90, 90)),
        ("LA", (0, 0), (255, 255, 255)),  # transparent: the paper shows
        ("RGBA", (10, 20, 30, 255), (10, 20, 30)),
        ("RGBA", (0, 0, 0, 51), (204, 204, 204)),
    ],
)
def test_modes_become_rgb(mode, value, expected, tmp_path):
    Image.new(mode, (3, 2), value).save(tmp_path / "a.png")
    picture = open_image(tmp_path / "a.png")
    assert picture.dtype == np.uint8
    np.testing.assert_array_equal(picture, np.broadcast_to(np.array(expected, np.uint8), (2, 3, 3)))


def test_sixteen_bits_in_wider_numbers_too():
    np.testing.assert_array_equal(open_image(Image.new("I", (1, 1), 257 * 90)), [[[90, 90, 90]]])


def test_cmyk_and_palettes_become_rgb(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(tmp_path / "a.jpg")
    np.testing.assert_allclose(open_image(tmp_path / "a.jpg")[4, 4], [255, 0, 0], atol=3)  # JPEG loses a little
    palette = Image.fromarray(RGB).quantize(8)
    palette.save(tmp_path / "a.gif")
    np.testing.assert_array_equal(open_image(tmp_path / "a.gif"), np.asarray(palette.convert("RGB")))
    palette.save(tmp_path / "b.png", transparency=palette.getpixel((0, 0)))
    assert tuple(open_image(tmp_path / "b.png")[0, 0]) == (255, 255, 255)


def test_one_pixel_fills_the_frame():
    np.testing.assert_array_equal(read_image(RGB[:1, :1], (32, 16)), np.broadcast_to(RGB[0, 0], (16, 32, 3)))


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG"])
def test_moving_pictures_are_refused(format, tmp_path):
    path = tmp_path / f"a.{format.lower()}"
    frames = [Image.fromarray(RNG.integers(0, 256, (5, 7, 3), np.uint8)) for _ in range(3)]
    frames[0].save(path, format, save_all=True, append_images=frames[1:])
    with pytest.raises(UserError, match=r"is animated \(3 frames\): give one picture"):
        open_image(path)


def test_a_cameras_preview_is_no_second_frame(tmp_path):
    flat = Image.new("RGB", (16, 16), (9, 99, 199))
    flat.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[Image.new("RGB", (8, 8))])
    np.testing.assert_allclose(open_image(tmp_path / "a.jpg"), np.broadcast_to((9, 99, 199), (16, 16, 3)), atol=3)


def test_pictures_too_large_are_refused_before_they_are_decoded(tmp_path, monkeypatch):
    Image.new("L", (60, 50)).save(tmp_path / "a.png")
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 2000)  # PIL warns past this, which is no matter here
        assert open_image(tmp_path / "a.png").shape == (50, 60, 3)
        patch.setattr(image, "MAX_PIXELS", 2000)
        patch.setattr(Image.Image, "load", lambda _: pytest.fail("decoded"))
        with pytest.raises(UserError, match="has 60x50 pixels, more than 2,000: make it smaller"):
            open_image(tmp_path / "a.png")
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)  # and refuses at twice that
        with pytest.raises(UserError, match=r"a\.png has more than 2,000 pixels: make it smaller"):
            open_image(tmp_path / "a.png")


def test_damaged_and_foreign_files_are_refused(tmp_path):
    Image.fromarray(np.repeat(RGB, 20, 0)).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    broken = bytearray(whole)
    broken[60:90] = bytes(30)
    (tmp_path / "broken.png").write_bytes(broken)
    Image.fromarray(RNG.random((3, 3), np.float32)).save(tmp_path / "float.tiff")
    for source, message in (
        (tmp_path / "cut.png", r"cannot read .*cut\.png as an image: it is damaged"),
        (tmp_path / "broken.png", r"cannot read .*broken\.png as an image: it is damaged"),
        (tmp_path / "none.png", r"no such image: .*none\.png"),
        (tmp_path, "cannot read .* as an image"),
        (__file__, "cannot read .* as an image"),
        (tmp_path / "float.tiff", "floating-point numbers: save it with 8 or 16 bits"),
        (RGB[..., 0], r"must be uint8 \[h, w, 3\], got uint8 \[5, 7\]"),
        (RGB.astype(np.float32), r"must be uint8 \[h, w, 3\], got float32 \[5, 7, 3\]"),
        (RGB[:0], r"must be uint8 \[h, w, 3\], got uint8 \[0, 7, 3\]"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            open_image(source)
        assert "\n" not in str(caught.value)


def test_shrinking_averages_what_it_leaves_out():
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255  # sampled without antialiasing, they would turn out black, white, or a beat of both
    assert np.ptp(resize_image(stripes, (10, 10))[2:-2, 2:-2].astype(int)) <= 12
    assert abs(resize_image(stripes, (10, 10)).mean() - 127.5) < 2
    np.testing.assert_array_equal(resize_image(RGB, (7, 5)), RGB)


@pytest.mark.parametrize(
    ("picture", "expected"),
    [((1280, 720), (1280, 720)), ((720, 1280), (720, 1280)), ((500, 500), (960, 960)), ((1000, 1500), (784, 1168))],
)
def test_the_size_follows_the_pictures_shape_and_keeps_the_area(picture, expected):
    # 1280 x 720 pixels; for 2:3, sqrt(921600 / 1.5) = 783.8 and sqrt(921600 * 1.5) = 1175.8, to multiples of 16.
    assert adaptive_size(picture, 1280 * 720, 16) == expected


def test_halves_are_rounded_to_even_as_the_reference_does():
    assert adaptive_size((1, 1), 40 * 40, 16) == (32, 32)  # 2.5 units


def test_a_strip_has_no_size():
    with pytest.raises(UserError, match="9000x2 pixels is too narrow to keep its shape: crop it"):
        adaptive_size((9000, 2), 128 * 128, 16)
