"""A linear codec with the Wan VAE's shapes: the fixed latent space that the small VAE is trained to.

Training encoder and decoder jointly from scratch is slow to start: neither knows what the other means. So the
latents are fixed first, as principal components of 8x8x4 patches; encoder and decoder then each regress a known
target, independently, and a diffusion model can train on the latents before the VAE exists.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, UInt8

from turbojax.train.data import to_float

SPATIAL, TEMPORAL = 8, 4  # pixels and frames to a latent, as in the Wan 2.1 VAE


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PCALatents:
    """Affine maps between patches and normalised latents; the first frame, which stands alone, has its own.

    `z = (patch - centre) @ encode + offset` and back `patch = centre + (z - offset) @ decode`.
    Patches are (frame, row, column, colour) in [-1, 1], flattened: 192 numbers in the first frame, 768 later.
    """

    first_centre: Float[Array, "192"]
    first_encode: Float[Array, "192 c"]
    first_decode: Float[Array, "c 192"]
    rest_centre: Float[Array, "768"]
    rest_encode: Float[Array, "768 c"]
    rest_decode: Float[Array, "c 768"]
    offset: Float[Array, "c"]

    @property
    def channels(self) -> int:
        return self.offset.shape[0]

    def encode(self, video: Float[Array | np.ndarray, "b t h w 3"]) -> Float[Array, "b t_lat h_lat w_lat c"]:
        """video [B, 1+4n, 8h, 8w, 3] in [-1, 1] -> latents [B, 1+n, h, w, C] of about unit variance."""
        first = (patches(video[:, :1], 1) - self.first_centre) @ self.first_encode
        rest = (patches(video[:, 1:], TEMPORAL) - self.rest_centre) @ self.rest_encode
        return jnp.concatenate([first, rest], axis=1) + self.offset

    def decode(self, z: Float[Array | np.ndarray, "b t_lat h_lat w_lat c"]) -> Float[Array, "b t h w 3"]:
        """The nearest video the basis can draw, not clamped."""
        z = z - self.offset
        first = z[:, :1] @ self.first_decode + self.first_centre
        rest = z[:, 1:] @ self.rest_decode + self.rest_centre
        return jnp.concatenate([_from_patches(first, 1), _from_patches(rest, TEMPORAL)], axis=1)

    def save(self, path: str | Path) -> None:
        """Write one .npz, under a temporary name until it is whole."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(path.name + ".partial.npz")
        arrays: dict[str, Any] = {k: np.asarray(v) for k, v in vars(self).items()}
        np.savez(partial, **arrays)
        os.replace(partial, path)

    @classmethod
    def load(cls, path: str | Path) -> PCALatents:
        """Read `save`'s file. Raises ValueError if an array is missing."""
        with np.load(path) as arrays:
            names = [f.name for f in dataclasses.fields(cls)]
            if missing := sorted(set(names) - set(arrays)):
                raise ValueError(f"{path}: not a PCA codec, it lacks {', '.join(missing)}")
            return cls(**{name: jnp.asarray(arrays[name]) for name in names})


def patches(
    video: Float[Array | np.ndarray, "b t h w 3"], frames: int
) -> Float[Array | np.ndarray, "b t_lat h_lat w_lat p"]:
    """Cut into blocks of `frames` x 8 x 8 pixels, each flattened."""
    return rearrange(
        video, "b (t f) (h p) (w q) c -> b t h w (f p q c)", f=frames, p=SPATIAL, q=SPATIAL
    )  # fmt: skip


def _from_patches(
    flat: Float[Array | np.ndarray, "b t h w p"], frames: int
) -> Float[Array | np.ndarray, "b t_out h_out w_out 3"]:
    return rearrange(
        flat, "b t h w (f p q c) -> b (t f) (h p) (w q) c", f=frames, p=SPATIAL, q=SPATIAL, c=3
    )  # fmt: skip


def fit_pca_latents(
    videos: Iterable[UInt8[np.ndarray, "t h w 3"]], *, channels: int = 16, std_floor: float = 0.2
) -> PCALatents:
    """Fit the codec to clips of 1+4n frames, read once.

    The basis of the first frame is rotated (orthogonal Procrustes) and doubled so that a still scene has the same
    latents in every frame. Each channel is divided by its standard deviation, or by `std_floor` times the largest
    where that is more: faint channels stay faint rather than becoming noise to be learnt.
    """
    first, rest = _Moments(192), _Moments(768)
    for video in videos:
        clip = to_float(video)[None]
        first.add(np.asarray(patches(clip[:, :1], 1)))
        rest.add(np.asarray(patches(clip[:, 1:], TEMPORAL)))

    basis = rest.principal(channels)
    own = first.principal(channels)
    # A still patch, repeated TEMPORAL times, should land where the later frames' basis puts it.
    repeated = basis.reshape(TEMPORAL, 192, channels).sum(0)
    u, _, vt = np.linalg.svd(own.T @ first.covariance @ repeated)
    own = own @ (u @ vt)
    gain = TEMPORAL**0.5

    centre = rest.mean.reshape(TEMPORAL, 192).mean(0)
    first_z = gain * (first.mean - centre) @ own
    # The later frames' coefficients are centred already; pool both for one scale a channel.
    share = first.count / (first.count + rest.count)
    mean = share * first_z
    second = share * (np.diag(gain**2 * own.T @ first.covariance @ own) + first_z**2)
    second = second + (1 - share) * np.diag(basis.T @ rest.covariance @ basis)
    std = np.sqrt(second - mean**2)
    std = np.maximum(std, std_floor * std.max())

    arrays = {
        "first_centre": centre,
        "first_encode": gain * own / std,
        "first_decode": (own * std).T / gain,
        "rest_centre": rest.mean,
        "rest_encode": basis / std,
        "rest_decode": (basis * std).T,
        "offset": -mean / std,
    }
    return PCALatents(**{k: jnp.asarray(v, jnp.float32) for k, v in arrays.items()})


class _Moments:
    """Running mean and covariance of rows."""

    def __init__(self, width: int) -> None:
        self.count, self._sum, self._squares = 0, np.zeros(width), np.zeros((width, width))

    def add(self, rows: Float[np.ndarray, "... width"]) -> None:
        flat = rows.reshape(-1, rows.shape[-1])
        self.count += flat.shape[0]
        self._sum += flat.sum(0, dtype=np.float64)
        self._squares += flat.T @ flat

    @property
    def mean(self) -> Float[np.ndarray, "width"]:
        return self._sum / self.count

    @property
    def covariance(self) -> Float[np.ndarray, "width width"]:
        return self._squares / self.count - np.outer(self.mean, self.mean)

    def principal(self, count: int) -> Float[np.ndarray, "width count"]:
        """The leading eigenvectors of the covariance, largest first, signed so that each sums to above zero."""
        vectors = np.linalg.eigh(self.covariance)[1][:, ::-1][:, :count]
        return vectors * np.where(vectors.sum(0) < 0, -1.0, 1.0)
