"""Make vae.npz: the original WanVAE_ and diffusers' AutoencoderKLWan on the same seeded weights, in float32.

Needs torch, diffusers and the checkout (see references.py):
    python tests/golden/make_vae.py WAN21_CHECKOUT
Every parameter is random, gammas and biases too, and so are the latents' statistics. The original decoder is not
clamped, diffusers' is.
"""

import re
import sys
from pathlib import Path

import numpy as np
import seeded
import torch
from diffusers import AutoencoderKLWan
from references import load_file

BASE_DIM, Z_DIM = 8, 4
MEAN, STD = [0.3, -0.2, 0.1, -0.4], [1.5, 0.8, 2.0, 1.2]
# name: (batch, frames, height, width); 40 x 24 has an odd number of latents each way.
CASES = {"one": (2, 1, 16, 24), "five": (1, 5, 24, 40), "nine": (1, 9, 16, 24)}
RESIDUAL = {
    "norm1": "residual.0",
    "conv1": "residual.2",
    "norm2": "residual.3",
    "conv2": "residual.6",
    "conv_shortcut": "shortcut",
}


def wan_name(name: str) -> str:
    """diffusers' name -> the original's."""
    for theirs, original in {"quant_conv": "conv1", "post_quant_conv": "conv2"}.items():
        if name.startswith(f"{theirs}."):
            return name.replace(theirs, original)
    name = re.sub(r"up_blocks\.(\d)\.resnets\.(\d)", lambda m: f"upsamples.{4 * int(m[1]) + int(m[2])}", name)
    name = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"upsamples.{4 * int(m[1]) + 3}", name)
    name = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"middle.{2 * int(m[1])}", name)
    for theirs, original in {
        "down_blocks": "downsamples", "mid_block.attentions.0": "middle.1",
        "conv_in": "conv1", "norm_out": "head.0", "conv_out": "head.2",
    }.items():  # fmt: skip
        name = name.replace(theirs, original)
    if re.search(r"(downsamples|upsamples|middle)\.\d+\.(norm\d|conv)", name):
        for theirs, original in RESIDUAL.items():
            name = name.replace(f".{theirs}.", f".{original}.")
    return name


theirs = AutoencoderKLWan(base_dim=BASE_DIM, z_dim=Z_DIM, latents_mean=MEAN, latents_std=STD).eval()
shapes = {name: tuple(p.shape) for name, p in theirs.state_dict().items()}
weights = {name: torch.from_numpy(w) for name, w in seeded.weights(shapes).items()}
theirs.load_state_dict(weights)
wan = load_file(Path(sys.argv[1]) / "wan/modules/vae.py", "wan_vae").WanVAE_(
    dim=BASE_DIM, z_dim=Z_DIM, dim_mult=[1, 2, 4, 4], temperal_downsample=[False, True, True]
)
wan.load_state_dict({wan_name(name): w for name, w in weights.items()})
wan.eval()

mean, std = (torch.tensor(x).view(1, -1, 1, 1, 1) for x in (MEAN, STD))
scale = [mean, 1.0 / std]
arrays = {}
with torch.no_grad():
    for case, (batch, frames, height, width) in CASES.items():
        video = torch.from_numpy(seeded.uniform(f"{case}/video", (batch, 3, frames, height, width), scale=0.5))
        z_shape = (batch, Z_DIM, 1 + (frames - 1) // 4, height // 8, width // 8)
        z = torch.from_numpy(seeded.uniform(f"{case}/z", z_shape))
        arrays[f"{case}/encoded_wan"] = wan.encode(video, scale).numpy()
        arrays[f"{case}/encoded_diffusers"] = ((theirs.encode(video).latent_dist.mode() - mean) / std).numpy()
        arrays[f"{case}/decoded_wan"] = wan.decode(z, scale).numpy()
        arrays[f"{case}/decoded_diffusers"] = theirs.decode(z * std + mean).sample.numpy()
for name, value in arrays.items():
    print(name, value.shape, float(np.abs(value).mean()), float((np.abs(value) >= 1).mean()))
seeded.save("vae", shapes, **arrays)
