"""What stands around the DiT, on the GPU that is here: text encoder, VAE, and a whole clip of the 1.3B model.

    python -m experiments.h100_ends --json ends.json [--torch] [--only TEXT]     a minute and a half, mostly compiling

Random full-size weights in bf16, 81 frames. A whole clip is `Pipeline.generate`, prompt to frames on the host, twice:
the second finds its programs compiled and is what counts. --torch: transformers' text encoder and diffusers' VAE too,
of the same shapes, where torch and both packages are installed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from turbojax import programs
from turbojax.bench_rows import draw, latent_shape, timed
from turbojax.config import PRESETS, UMT5Config
from turbojax.models.dit import WanDiT
from turbojax.models.umt5 import UMT5Encoder
from turbojax.models.vae import WanVAE
from turbojax.pipeline import Pipeline
from turbojax.pipeline_config import PipelineConfig
from turbojax.tokenizer import Tokenizer

PRESET = PRESETS["wan2.1-t2v-1.3b"]
SIZES = {"480p": (832, 480), "720p": (1280, 720)}
REPEATS = 3


def random_module(make: Callable[[], Any]) -> Any:
    graphdef, abstract = nnx.split(nnx.eval_shape(make))
    return nnx.merge(graphdef, draw(abstract))


def text_encoder() -> UMT5Encoder:
    return random_module(lambda: UMT5Encoder(PRESET.text_encoder, rngs=nnx.Rngs(0)))


def vae() -> WanVAE:
    return random_module(lambda: WanVAE(PRESET.vae, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))


def measure(program: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    begun = time.perf_counter()
    compiled = jax.jit(program).lower(*arguments).compile()
    compile_seconds = time.perf_counter() - begun
    analysis: Any = compiled.memory_analysis()
    seconds, _ = timed(compiled, arguments, REPEATS, warm_up=True)
    return {
        "seconds": round(min(seconds), 4),
        "compile_seconds": round(compile_seconds, 1),
        "temporary_bytes": analysis.temp_size_in_bytes,
        "argument_bytes": analysis.argument_size_in_bytes,
    }


def encode() -> dict[str, Any]:
    graphdef, state = nnx.split(text_encoder())
    ids, mask = jnp.ones((1, PRESET.text_len), jnp.int32), jnp.ones((1, PRESET.text_len), jnp.int32)
    return measure(partial(programs.encode_text, graphdef=graphdef), state, ids, mask)


def decode(size: tuple[int, int]) -> dict[str, Any]:
    graphdef, state = nnx.split(vae())
    return measure(
        partial(programs.decode, graphdef=graphdef),
        state,
        jax.random.normal(jax.random.key(1), latent_shape(PRESET, size)),
    )


def clip() -> dict[str, Any]:
    """Seconds by stage of 4 steps, SLA at top-k 0.1 and W8A8, at 480p."""
    config = PipelineConfig.from_preset("wan2.1-t2v-1.3b", sampler="rcm-sde", steps=4, guidance=(1.0, 1.0))
    sla = dataclasses.replace(PRESET.dit, linear_branch=True)
    # The shipped tokenizer: what the words are does not matter to the time.
    words = Path(__file__).parent.parent / "turbojax/tiny/tokenizer/tokenizer.json"
    pipeline = Pipeline(
        config,
        dit=random_module(lambda: WanDiT(sla, rngs=nnx.Rngs(0))),
        vae=vae(),
        text_encoder=text_encoder(),
        tokenizer=Tokenizer.load(words, PRESET.text_len),
    )
    runs = []
    for seed in range(REPEATS):
        video = pipeline.generate("a red circle moving right", seed=seed, attention="sla", quant="w8a8", progress=False)
        runs.append({stage: round(seconds, 4) for stage, seconds in video.timings.items()})
    found = min(runs[1:], key=lambda run: run["total"])
    return {"seconds": found["total"], "stages": found, "compile_seconds": round(runs[0]["compile"], 1)}


def torch_seconds(run: Callable[[], Any]) -> dict[str, Any]:
    import torch  # pyright: ignore[reportMissingImports]

    seconds = []
    with torch.inference_mode():
        for _ in range(1 + REPEATS):
            torch.cuda.synchronize()
            begun = time.perf_counter()
            run()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begun)
    return {"seconds": round(min(seconds[1:]), 4), "peak_bytes": torch.cuda.max_memory_allocated()}


def encode_torch() -> dict[str, Any]:
    import torch  # pyright: ignore[reportMissingImports]
    import transformers  # pyright: ignore[reportMissingImports]

    ours: UMT5Config = PRESET.text_encoder
    config = transformers.UMT5Config(
        vocab_size=ours.vocab_size, d_model=ours.dim, d_kv=ours.dim_attn // ours.num_heads, d_ff=ours.dim_ffn,
        num_layers=ours.num_layers, num_heads=ours.num_heads, feed_forward_proj="gated-gelu",
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = transformers.UMT5EncoderModel(config).eval()
        ids = torch.ones((1, PRESET.text_len), dtype=torch.int64)
    return torch_seconds(lambda: model(ids, attention_mask=ids))


def decode_torch(size: tuple[int, int]) -> dict[str, Any]:
    import diffusers  # pyright: ignore[reportMissingImports]
    import torch  # pyright: ignore[reportMissingImports]

    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = diffusers.AutoencoderKLWan().eval()
        batch, t, h, w, channels = latent_shape(PRESET, size)
        latents = torch.randn((batch, channels, t, h, w))
    return torch_seconds(lambda: model.decode(latents))


def cases(torch: bool) -> dict[str, Callable[[], dict[str, Any]]]:
    found: dict[str, Callable[[], dict[str, Any]]] = {"umT5 512 tokens": encode}
    found |= {f"VAE decode {name}, 81 frames": partial(decode, size) for name, size in SIZES.items()}
    found["1.3b-480p clip, prompt to frames"] = clip
    if torch:
        found["umT5 512 tokens, transformers"] = encode_torch
        found |= {
            f"VAE decode {name}, 81 frames, diffusers": partial(decode_torch, size) for name, size in SIZES.items()
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--torch", action="store_true")
    parser.add_argument("--only", default="", help="cases whose name contains this")
    options = parser.parse_args()
    packages = ("torch", "transformers", "diffusers") if options.torch else ()
    versions = {name: version(name) for name in packages}
    rows: list[dict[str, Any]] = []
    for name, run in cases(options.torch).items():
        if options.only not in name:
            continue
        try:
            row = run()
        except Exception as error:
            row = {"error": f"{type(error).__name__}: {error}"[:500]}
        rows.append({"name": name} | row)
        print(rows[-1], flush=True)
        device = jax.devices()[0].device_kind
        found = {"device": device, "jax": jax.__version__, "versions": versions, "rows": rows}
        options.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
