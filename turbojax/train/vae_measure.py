"""How good a VAE is: PSNR on clips it has not seen, whole, at the first frame and along the border."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, UInt8

from turbojax.models.vae import WanVAE
from turbojax.train import data
from turbojax.train.pca import PCALatents


def unseen_clips(count: int) -> UInt8[np.ndarray, "n 17 128 128 3"]:
    """Clips for evaluation: every combination, the held-out ones too, from a seed that training never uses."""
    return np.stack([data.render(s) for s in data.clips(2**31, count, data.COMBINATIONS)])


def psnr(made: UInt8[np.ndarray, "n ..."], true: UInt8[np.ndarray, "n ..."]) -> Float[np.ndarray, "n"]:
    """Peak signal to noise of each clip, in dB, on 8-bit pixels."""
    square = np.square(made.astype(np.float32) - true.astype(np.float32))
    return 10 * np.log10(255.0**2 / np.maximum(square.mean(axis=tuple(range(1, square.ndim))), 1e-4))


def measure(made: UInt8[np.ndarray, "n t h w 3"], true: UInt8[np.ndarray, "n t h w 3"]) -> dict[str, float]:
    """Mean PSNR of whole clips and of the worst, of first and last frames, and of a border 4 pixels wide."""
    border = np.ones(true.shape[2:4], bool)
    border[4:-4, 4:-4] = False
    return {
        "psnr": float(psnr(made, true).mean()),
        "psnr_worst": float(psnr(made, true).min()),
        "psnr_first": float(psnr(made[:, 0], true[:, 0]).mean()),
        "psnr_last": float(psnr(made[:, -1], true[:, -1]).mean()),
        "psnr_border": float(psnr(made[:, :, border], true[:, :, border]).mean()),
        "psnr_first_border": float(psnr(made[:, 0, border], true[:, 0, border]).mean()),
    }


def evaluate(
    vae: WanVAE, pca: PCALatents, true: UInt8[np.ndarray, "n t h w 3"]
) -> tuple[dict[str, dict[str, float]], dict[str, UInt8[np.ndarray, "n t h w 3"]]]:
    """Measures and pictures of three ways back: `pca` alone, PCA latents through `decoder`, `round_trip`."""
    made: dict[str, list[np.ndarray]] = {"pca": [], "decoder": [], "round_trip": []}
    latent_mse = []
    for clip in true:
        video = jnp.asarray(data.to_float(clip[None]))
        target, z = pca.encode(video), vae.encode(video)
        latent_mse.append(float(jnp.square(z - target).mean()))
        made["pca"].append(data.to_uint8(np.asarray(pca.decode(target)[0])))
        made["decoder"].append(data.to_uint8(np.asarray(vae.decode(target)[0])))
        made["round_trip"].append(data.to_uint8(np.asarray(vae.decode(z)[0])))
    pictures = {name: np.stack(videos) for name, videos in made.items()}
    report = {name: measure(videos, true) for name, videos in pictures.items()}
    report["encoder"] = {"latent_mse": float(np.mean(latent_mse))}
    return report, pictures


def contact_sheet(
    rows: list[UInt8[np.ndarray, "t h w 3"]], frames: tuple[int, ...] = (0, 1, 4, 8, 12, 16)
) -> UInt8[np.ndarray, "height width 3"]:
    """One clip a row, some of its frames side by side."""
    return np.concatenate([np.concatenate([clip[t] for t in frames], axis=1) for clip in rows], axis=0)
