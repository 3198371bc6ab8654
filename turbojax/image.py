"""The picture that image to video starts from: read, turned upright, and stretched to the clip's size.

Source: `turbodiffusion/inference/wan2.2_i2v_infer.py` of TurboDiffusion (resize and `--adaptive_resolution`).
"""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from turbojax.errors import UserError

MAX_PIXELS = 150_000_000
# What shows through where a picture is transparent.
_PAPER = (255, 255, 255)

Picture = UInt8[np.ndarray, "H W 3"]


def open_image(source: Any) -> Picture:
    """A picture at its own size, upright, uint8 RGB.

    source: a file, a PIL image, or uint8 [h, w, 3]. Grey, CMYK, indexed and 16-bit pictures become 8-bit RGB;
    transparent ones lie on white. Raises UserError for what is none of these, damaged, animated or too large.
    """
    from PIL import Image

    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[-1] != 3 or 0 in source.shape:
            raise UserError(f"an image array must be uint8 [h, w, 3], got {source.dtype} {list(source.shape)}")
        return source
    if isinstance(source, Image.Image):
        return _decode(source, "the image")
    with _open(Path(source)) as image:
        return _decode(image, str(source))


def resize_image(picture: Picture, size: tuple[int, int]) -> Picture:
    """Stretched to `size` (width, height), bilinear with antialiasing, rounded to uint8."""
    from PIL import Image

    if picture.shape[:2] == size[::-1]:
        return picture
    return np.asarray(Image.fromarray(picture).resize(size, Image.Resampling.BILINEAR))


def read_image(source: Any, size: tuple[int, int]) -> Picture:
    """`open_image`, then `resize_image`."""
    return resize_image(open_image(source), size)


def adaptive_size(picture: tuple[int, int], area: int, unit: int) -> tuple[int, int]:
    """The (width, height) of a clip with about `area` pixels and the shape of a picture of that (width, height).

    Each side is the nearest multiple of `unit` to sqrt(area * ratio). Raises UserError for a strip too narrow.
    """
    ratio = picture[1] / picture[0]
    width, height = (round(side / unit) * unit for side in (math.sqrt(area / ratio), math.sqrt(area * ratio)))
    if not (width and height):
        raise UserError(f"a picture of {picture[0]}x{picture[1]} pixels is too narrow to keep its shape: crop it")
    return width, height


def _open(path: Path) -> Any:
    from PIL import Image

    try:
        with warnings.catch_warnings():
            # Size is judged by `_decode`, not by PIL's warning.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            return Image.open(path)
    except FileNotFoundError as error:
        raise UserError(f"no such image: {path}") from error
    except Image.DecompressionBombError as error:
        raise UserError(f"{path} has more than {MAX_PIXELS:,} pixels: make it smaller") from error
    except Exception as error:  # as below
        raise UserError(f"cannot read {path} as an image") from error


def _decode(image: Any, name: str) -> Picture:
    from PIL import ImageOps

    count = getattr(image, "n_frames", 1)
    if count > 1 and image.format != "MPO":  # what cameras write: the picture, then its preview
        raise UserError(f"{name} is animated ({count} frames): give one picture")
    if image.width * image.height > MAX_PIXELS:
        raise UserError(f"{name} has {image.width}x{image.height} pixels, more than {MAX_PIXELS:,}: make it smaller")
    try:
        image.load()
        image = ImageOps.exif_transpose(image)
    except Exception as error:  # a damaged file makes the decoders raise nearly anything
        raise UserError(f"cannot read {name} as an image: it is damaged ({error})") from error
    return np.asarray(_rgb(image, name))


def _rgb(image: Any, name: str) -> Any:
    from PIL import Image

    if image.mode.startswith("I"):  # 16 bits, which PIL would clip at 255
        values = np.asarray(image, np.int64)
        return Image.fromarray((values.clip(0, 65535) / 257).round().astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        raise UserError(f"{name} holds floating-point numbers: save it with 8 or 16 bits a channel")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        paper = Image.new("RGBA", image.size, (*_PAPER, 255))
        return Image.alpha_composite(paper, image).convert("RGB")
    return image.convert("RGB")
