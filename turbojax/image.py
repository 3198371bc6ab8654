"""The picture that image to video starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from turbojax.errors import UserError


def read_image(source: Any, size: tuple[int, int]) -> UInt8[np.ndarray, "H W 3"]:
    """A picture at `size` (width, height): stretched, bilinear with antialiasing, as TurboDiffusion does.

    source: a file, a PIL image, or uint8 [h, w, 3]. Raises UserError for anything that is none of these.
    """
    from PIL import Image, ImageOps, UnidentifiedImageError

    if isinstance(source, np.ndarray):
        if source.dtype != np.uint8 or source.ndim != 3 or source.shape[-1] != 3:
            raise UserError(f"an image array must be uint8 [h, w, 3], got {source.dtype} {list(source.shape)}")
        image = Image.fromarray(source)
    elif isinstance(source, Image.Image):
        image = source
    else:
        path = Path(source)
        try:
            image = Image.open(path)
            image.load()
        except FileNotFoundError as error:
            raise UserError(f"no such image: {path}") from error
        except (UnidentifiedImageError, OSError) as error:
            raise UserError(f"cannot read {path} as an image") from error
    upright = ImageOps.exif_transpose(image).convert("RGB")
    return np.asarray(upright.resize(size, Image.Resampling.BILINEAR))
