"""Make dit_*.npz: the original WanModel and diffusers' WanTransformer3DModel on the same seeded weights, in float32,
and rcm_dit.npz: TurboDiffusion's rCM loop around its own network.

Needs torch, diffusers and the checkouts (see references.py):
    python tests/golden/make_dit.py WAN21_CHECKOUT WAN22_CHECKOUT TURBODIFFUSION_CHECKOUT
Every parameter is random, those that start at zero or one too.  Timesteps are not whole numbers.
"""

import sys
from pathlib import Path

import numpy as np
import seeded
import torch
from diffusers import WanTransformer3DModel
from references import turbo_model, turbo_rcm, wan_model

WAN21, WAN22, TURBO = (Path(p) for p in sys.argv[1:4])
TEXT, TEXT_DIM = 24, 32
TIMESTEPS = np.array([987.65, 12.5], np.float32)
# head_dim 48 splits into 16, 16, 16 reals for time, height, width; 128, as every real model, into 44, 42, 42.
CASES = {
    "t2v_48": {"checkout": WAN21, "model_type": "t2v", "in_dim": 16, "dim": 96},
    "t2v_128": {"checkout": WAN21, "model_type": "t2v", "in_dim": 16, "dim": 256},
    "i2v_48": {"checkout": WAN22, "model_type": "i2v", "in_dim": 36, "dim": 96},
}
DIFFUSERS = {
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
    "modulation": "scale_shift_table",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "norm3": "norm2",  # the norm before cross-attention
    "self_attn.o": "attn1.to_out.0",
    "cross_attn.o": "attn2.to_out.0",
    **{f"self_attn.{x}": f"attn1.to_{x}" for x in "qkv"},
    **{f"cross_attn.{x}": f"attn2.to_{x}" for x in "qkv"},
    "self_attn": "attn1",
    "cross_attn": "attn2",
}


def diffusers_name(name: str) -> str:
    for ours, theirs in DIFFUSERS.items():
        if f".{ours}." in f".{name}.":
            return f".{name}.".replace(f".{ours}.", f".{theirs}.").strip(".")
    return name


def wan_config(model_type: str, in_dim: int, dim: int) -> dict:
    return {
        "model_type": model_type, "text_len": TEXT, "in_dim": in_dim, "dim": dim, "ffn_dim": 160, "freq_dim": 256,
        "text_dim": TEXT_DIM, "out_dim": 16, "num_heads": 2, "num_layers": 2,
    }  # fmt: skip


def inputs(case: str, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Channels first, as the references take them."""
    latents = seeded.uniform(f"{case}/latents", (2, channels, 3, 8, 12))
    return torch.from_numpy(latents), torch.from_numpy(seeded.uniform(f"{case}/context", (2, TEXT, TEXT_DIM)))


def run_wan(model: torch.nn.Module, x: torch.Tensor, context: torch.Tensor) -> np.ndarray:
    noise, condition = x[:, :16], x[:, 16:]
    y = list(condition) if condition.shape[1] else None
    tokens = 3 * 4 * 6
    t = torch.from_numpy(TIMESTEPS)
    if y is not None:  # Wan 2.2 takes a timestep for each token
        t = t[:, None].expand(-1, tokens)
    out = model(list(noise), t, list(context), seq_len=tokens, y=y)
    return torch.stack(out).numpy()


def run_diffusers(dim: int, x: torch.Tensor, context: torch.Tensor, state: dict) -> np.ndarray:
    model = WanTransformer3DModel(
        patch_size=(1, 2, 2), num_attention_heads=2, attention_head_dim=dim // 2, in_channels=x.shape[1],
        out_channels=16, text_dim=TEXT_DIM, freq_dim=256, ffn_dim=160, num_layers=2, cross_attn_norm=True,
        qk_norm="rms_norm_across_heads", eps=1e-6, rope_max_seq_len=1024,
    ).eval()  # fmt: skip
    model.load_state_dict({diffusers_name(k): v for k, v in state.items()}, strict=True)
    return model(x, torch.from_numpy(TIMESTEPS), context).sample.numpy()


@torch.no_grad()
def main() -> None:
    for case, config in CASES.items():
        config = dict(config)
        model = wan_model(config.pop("checkout"), **wan_config(**config))
        shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
        state = {k: torch.from_numpy(v) for k, v in seeded.weights(shapes).items()}
        model.load_state_dict(state, strict=True)
        x, context = inputs(case, config["in_dim"])
        wan = run_wan(model, x, context)
        other = run_diffusers(config["dim"], x, context, state)
        print(case, "size", np.std(wan), "Wan against diffusers", np.linalg.norm(wan - other) / np.linalg.norm(wan))
        seeded.save(f"dit_{case}", shapes, timesteps=TIMESTEPS, wan=wan, diffusers=other)
        if case == "t2v_128":
            save_rcm(config, shapes, state)


def save_rcm(config: dict, shapes: dict, state: dict) -> None:
    net = turbo_model(TURBO, **wan_config(**config))
    state = {**state, "patch_embedding.weight": state["patch_embedding.weight"].flatten(1)}
    net.load_state_dict(state, strict=True)
    noise = torch.from_numpy(seeded.uniform("rcm/noise", (1, 16, 3, 8, 8)))
    condition = {"crossattn_emb": torch.from_numpy(seeded.uniform("rcm/context", (1, TEXT, TEXT_DIM)))}
    sde, step_noise = turbo_rcm(TURBO, net, noise, condition, steps=4, sigma_max=80.0, mode="sde")
    ode, _ = turbo_rcm(TURBO, net, noise, condition, steps=4, sigma_max=80.0, mode="ode")
    seeded.save("rcm_dit", shapes, step_noise=step_noise, sde=sde, ode=ode[-1])


main()
