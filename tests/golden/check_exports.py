"""Check that the references' own modules load what `turbojax export` writes, strictly, and compute the same from it.

Needs torch, diffusers, transformers and the checkouts (see references.py); turbojax stays in its own environment:
    python tests/golden/check_exports.py WAN21_CHECKOUT WAN22_CHECKOUT TURBODIFFUSION_CHECKOUT uv run turbojax

Each reference is saved by torch with every parameter random, and exported to every format of its kind; the module of
that format loads the file and must give, in float32, the output of the module that was saved.
"""

import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import seeded
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from references import load_file, turbo_model, wan_model, wan_umt5
from safetensors.torch import load_file as load_safetensors
from transformers import UMT5Config, UMT5EncoderModel

WAN21, WAN22, TURBO = (Path(p) for p in sys.argv[1:4])
COMMAND = sys.argv[4:]
BOUND = 1e-5  # relative, in float32: the same sums in another order
TEXT, TEXT_DIM, TIMESTEP, TOKENS = 24, 32, 640.5, 72


class Reference(NamedTuple):
    """A module, and what it computes of inputs that all modules of its kind share."""

    module: torch.nn.Module
    run: Callable[[torch.nn.Module], torch.Tensor]


def drawn(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.from_numpy(seeded.uniform(name, shape))


def dits(channels: int) -> dict[str, Reference]:
    """Text to video with 16 channels, image to video with 36."""
    kind = "t2v" if channels == 16 else "i2v"
    config = {
        "model_type": kind, "text_len": TEXT, "in_dim": channels, "dim": 256, "ffn_dim": 160, "freq_dim": 64,
        "text_dim": TEXT_DIM, "out_dim": 16, "num_heads": 2, "num_layers": 2,
    }  # fmt: skip
    x, context = drawn("latents", (1, channels, 3, 8, 12)), drawn("context", (1, TEXT, TEXT_DIM))
    noise, picture = x[:, :16], x[:, 16:] if channels > 16 else None

    def wan(model: torch.nn.Module) -> torch.Tensor:
        t = torch.full((1,) if picture is None else (1, TOKENS), TIMESTEP)  # Wan 2.2 takes one for each token
        return model(list(noise), t, list(context), seq_len=TOKENS, y=None if picture is None else list(picture))[0]

    def turbo(model: torch.nn.Module) -> torch.Tensor:
        return model(noise, torch.tensor([[TIMESTEP]]), context, y_B_C_T_H_W=picture)[0]

    other = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=128, in_channels=channels, out_channels=16,
        text_dim=TEXT_DIM, freq_dim=64, ffn_dim=160, num_layers=2, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", eps=1e-6, rope_max_seq_len=64,
    )  # fmt: skip
    network = "wan2pt1" if channels == 16 else "wan2pt2"
    return {
        "wan": Reference(wan_model(WAN21 if channels == 16 else WAN22, **config), wan),
        "diffusers": Reference(other, lambda model: model(x, torch.tensor([TIMESTEP]), context).sample[0]),
        "turbodiffusion": Reference(turbo_model(TURBO, network=network, **config), turbo),
    }


def vaes() -> dict[str, Reference]:
    video, z = drawn("video", (1, 3, 5, 16, 24)), drawn("z", (1, 16, 2, 2, 3))
    make = load_file(WAN21 / "wan/modules/vae.py", "wan_vae").WanVAE_

    def both(model: torch.nn.Module) -> torch.Tensor:  # diffusers clamps, Wan leaves it to its wrapper
        return torch.cat([model.encode(video, [0, 1]).flatten(), model.decode(z, [0, 1]).clamp(-1, 1).flatten()])

    wan = make(dim=8, z_dim=16, dim_mult=[1, 2, 4, 4], temperal_downsample=[False, True, True])
    return {
        "wan": Reference(wan, both),
        "diffusers": Reference(
            AutoencoderKLWan(base_dim=8, z_dim=16),
            lambda m: torch.cat([m.encode(video).latent_dist.mode().flatten(), m.decode(z).sample.flatten()]),
        ),
    }


def text_encoders() -> dict[str, Reference]:
    ids = torch.from_numpy(np.random.RandomState(0).randint(2, 100, (1, 40)))
    mask = torch.ones_like(ids)
    other = UMT5Config(
        vocab_size=100, d_model=48, d_kv=12, d_ff=96, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu", dropout_rate=0.0,
    )  # fmt: skip
    return {
        "wan": Reference(wan_umt5(WAN21, 100, 48, 48, 96, 4, 2), lambda m: m(ids, mask)),
        "diffusers": Reference(UMT5EncoderModel(other), lambda m: m(ids, attention_mask=mask).last_hidden_state),
    }


def own_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The state dict, less the second name that transformers gives to umT5's embedding."""
    return {k: v for k, v in module.state_dict().items() if k != "encoder.embed_tokens.weight"}


def load_strictly(module: torch.nn.Module, state: dict[str, torch.Tensor]) -> None:
    if isinstance(module, UMT5EncoderModel):
        state = state | {"encoder.embed_tokens.weight": state["shared.weight"]}
    module.load_state_dict(state, strict=True)


def exports(kind: str, references: dict[str, Reference], folder: Path) -> Iterator[tuple[str, float]]:
    """(what went where, relative error) for each reference and each format."""
    for name, (module, run) in references.items():
        shapes = {k: tuple(v.shape) for k, v in own_tensors(module).items()}
        state = {k: torch.from_numpy(v) for k, v in seeded.weights(shapes).items()}
        load_strictly(module.eval(), state)
        expected, source = run(module), folder / f"{kind}-{name}.pth"
        torch.save({"state_dict": state}, source)
        for format, (target, run_target) in references.items():
            out = folder / f"{kind}-{name}-{format}.safetensors"
            subprocess.run(
                [*COMMAND, "export", str(source), "--format", format, "--out", str(out)],
                check=True,
                capture_output=True,
            )
            load_strictly(target.eval(), load_safetensors(out))
            got = run_target(target)
            yield f"{kind}: {name} -> {format}", float((got - expected).norm() / expected.norm())


@torch.no_grad()
def main() -> None:
    kinds = {"t2v": dits(16), "i2v": dits(36), "vae": vaes(), "umt5": text_encoders()}
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for kind, references in kinds.items():
            for what, error in exports(kind, references, Path(folder)):
                print(f"{what}: {error:.1e}", flush=True)
                failed += not error <= BOUND
    sys.exit(f"{failed} above {BOUND}" if failed else 0)


main()
