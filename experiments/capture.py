"""What the attention of a model really sees: its q, k and v in every layer, at states of a real sampling run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from flax import nnx
from jaxtyping import Array, Float, PyTree

import pallas_kernels as kernels
from turbojax.attention import AttentionConfig
from turbojax.errors import UserError
from turbojax.models.dit import patchify
from turbojax.models.layers import rope_table
from turbojax.pipeline import Pipeline, draw_noise
from turbojax.samplers import flow, rcm
from turbojax.settings import Settings, resolve

Heads = Float[Array, "B L H d"]
Measure = Callable[[Heads, Heads, Heads], PyTree]


class State(NamedTuple):
    """A state of a sampling run: noise level s, noisy latents, and the DiT that is asked there."""

    s: float
    latents: Float[Array, "B t h w C"]
    dit: Any


class Run(NamedTuple):
    """Some states of a run, and what all of them share."""

    states: list[State]
    context: Float[Array, "B L D"]
    settings: Settings


def sample(pipeline: Pipeline, prompts: Sequence[str], seeds: Sequence[int], states: int, **options: Any) -> Run:
    """Run the model's sampler and keep `states` of its states, evenly spaced from the first to the last.

    options: as of `Pipeline.generate`. Raises UserError for a model that needs a picture.
    """
    spec = pipeline.spec
    if spec.takes_image:
        raise UserError(f"{spec.name} needs a picture: this looks at text to video alone")
    settings = resolve(spec, batch_size=len(prompts), **options)
    texts = [*prompts, *([settings.negative_prompt] * len(prompts) if settings.guided else [])]
    contexts = {text: pipeline.text_encoder(*pipeline.tokenizer(text)) for text in dict.fromkeys(texts)}
    rows = jnp.concatenate([contexts[text] for text in texts])
    (width, height), vae = settings.size, spec.vae
    frames = (settings.frames - 1) // vae.temporal_stride + 1
    shape = frames, height // vae.spatial_stride, width // vae.spatial_stride, vae.z_dim
    noise, step_noise = draw_noise(list(seeds), shape, settings)
    seen: list[State] = []

    def velocity(x: Array, s: Any) -> Array:
        is_high = settings.boundary is None or float(s) >= settings.boundary
        dit, guidance = (pipeline.dit, settings.guidance[1]) if is_high else (pipeline.dit_low, settings.guidance[0])
        seen.append(State(float(s), x, dit))

        def ask(x: Array, s: Any, context: Array = rows) -> Array:
            timestep = jnp.full(len(x), 1000.0 * float(s), jnp.float32)
            return dit(x, timestep, context, attention=settings.attention, round_timestep=settings.round_timestep)

        return flow.guided(ask, guidance)(x, s) if settings.guided else ask(x, s)

    if settings.sampler.startswith("rcm"):
        grid = {"num_steps": settings.steps, "sigma_max": settings.sigma_max, "mid_times": settings.mid_times}
        rcm.sample(velocity, noise, step_noise, **grid, mode=settings.sampler.removeprefix("rcm-"))
    else:
        make = {"unipc": flow.unipc_solver, "euler": flow.euler_solver}[settings.sampler]
        solver = make(settings.steps, settings.shift)
        state = solver.start(jnp.asarray(noise))
        for s, row in zip(solver.times, solver.table, strict=True):
            state = solver.step(state, velocity(state.x, s), row)
    kept = np.unique(np.linspace(0, len(seen) - 1, states).round().astype(int))
    return Run([seen[i] for i in kept], rows[: len(prompts)], settings)


def map_layers(run: Run, measure: Measure) -> list[PyTree]:
    """`measure(q, k, v)` in every layer, for every state; what it returns comes back with a leading axis of layers.

    q, k, v: [B, L, heads, head_dim] after norm and rotary embedding, as the model's self-attention takes them. Only
    what `measure` returns is kept, so that a long clip's q, k and v need to be held for one layer at a time. `measure`
    is traced once a model and shape: hand in the same function for all states.
    """
    settings = run.settings
    static = {"attention": settings.attention, "round_timestep": settings.round_timestep, "measure": measure}
    out = []
    for state in run.states:
        graph, params = nnx.split(state.dit)
        timestep = jnp.full(len(state.latents), 1000.0 * state.s, jnp.float32)
        out.append(_layers(params, state.latents, timestep, run.context, graph=graph, **static))
    return jax.device_get(out)


@partial(jax.jit, static_argnames=("graph", "attention", "round_timestep", "measure"))
def _layers(
    params: PyTree,
    latents: Float[Array, "B t h w C"],
    timestep: Float[Array, "B"],
    context: Float[Array, "B S text_dim"],
    *,
    graph: Any,
    attention: AttentionConfig,
    round_timestep: bool,
    measure: Measure,
) -> PyTree:
    """The model's forward pass (`WanDiT`) with a look at each block's q, k and v; the head is left out."""
    dit = nnx.merge(graph, params)
    grid = tuple(n // p for n, p in zip(latents.shape[1:4], dit.config.patch_size, strict=True))
    tokens = dit.patch_embedding(patchify(latents.astype(dit.dtype), dit.config.patch_size))
    _, time6 = dit.embed_time(timestep.astype(jnp.bfloat16) if round_timestep else timestep)
    text = dit.embed_text(context)
    cos, sin = rope_table(grid, dit.config.head_dim)
    rope = jnp.asarray(cos), jnp.asarray(sin)
    block_graph, layers = nnx.split(dit.blocks)

    def layer(x: Array, layer_state: PyTree) -> tuple[Array, PyTree]:
        block = nnx.merge(block_graph, layer_state)
        measured = measure(*query_key_value(block, x, time6, rope))
        return block(x, time6, block.cross_attn.keys(text), rope, attention), measured

    return jax.lax.scan(layer, tokens, layers)[1]


def query_key_value(
    block: Any, x: Float[Array, "B L D"], time: Float[Array, "B 6 D"], rope: Any
) -> tuple[Heads, Heads, Heads]:
    """What a block's self-attention is asked."""
    attn = block.self_attn
    shift, scale = jnp.split(block.modulation[...] + time, 6, axis=1)[:2]
    h = attn.q.modulated(x, shift, scale, block.eps)
    q, k, v = (rearrange(layer(h), "b l (n d) -> b l n d", n=attn.num_heads) for layer in (attn.q, attn.k, attn.v))
    q = kernels.rms_norm_rope(q, attn.norm_q.scale[...], *rope, eps=attn.norm_q.eps)
    k = kernels.rms_norm_rope(k, attn.norm_k.scale[...], *rope, eps=attn.norm_k.eps)
    return q, k, v
