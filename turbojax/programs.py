"""What runs on the device: text encoding, the whole sampling loop and decoding, each one compiled program.

Parameters are arguments, never constants; everything else that shapes a program is static and hashable, so that a
second clip with the same settings finds its programs compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from turbojax.config import VAEConfig
from turbojax.samplers import flow, rcm
from turbojax.settings import Settings

# Above this, the VAE streams the frames instead of seeing the whole sequence at once, with the same result.
_WHOLE_SEQUENCE_BYTES = 2**30

# Rows of context that the DiT is given where they hold the text: few numbers, as each is a program of its own. The
# kernel on Hopper takes 64n columns, at most 256, and the row of padding has one for each power of two in its count.
TEXT_BUCKETS = (120, 248)


def text_rows_for(tokens: int, text_len: int) -> int:
    """The least of TEXT_BUCKETS that holds `tokens` (</s> included) and a row of padding; text_len where none does."""
    return next((rows for rows in TEXT_BUCKETS if tokens < rows < text_len), text_len)


def encode_text(state: Any, ids: Int[Array, "B L"], mask: Int[Array, "B L"], *, graphdef: Any) -> Float[Array, "B L D"]:
    """Text features, zeros where the mask is 0: the DiT attends to those rows, as Wan does."""
    return nnx.merge(graphdef, state)(ids, mask)


def denoise(
    states: tuple[Any, ...],
    context: Float[Array, "B L D"],
    negative: Float[Array, "B L D"] | None,
    condition: Float[Array, "B t h w K"] | None,
    noise: Float[Array, "B t h w C"],
    step_noise: Float[Array, "steps B t h w C"] | None,
    *,
    graphdefs: tuple[Any, ...],
    settings: Settings,
    tick: Callable[[object], None] | None,
    offload: bool = False,
    text_rows: int | None = None,
) -> Float[Array, "B t h w C"]:
    """The sampler's whole loop: noise to clean latents.

    states, graphdefs: of the one expert, or of the high-noise and the low-noise one.
    offload: the states lie in host memory, and each comes to the device when its turn is there, not before.
    negative: context that guidance steers away from; None without guidance.
    condition: mask and picture channels of image to video. tick: called on the host after every step; None: nothing is.
    text_rows: context and negative are zeros from the last of these rows on, which are all that the DiT is given:
        the result is the same. None: it is given all.
    """
    low, high = settings.guidance
    padded, context = context.shape[1], context[:, :text_rows]
    negative = None if negative is None else negative[:, :text_rows]
    last_count = padded - context.shape[1] + 1

    def enter(expert: int, x: Array) -> Callable[[Array, Any], Array]:
        """The velocity of an expert whose first step starts from x."""
        state = _fetch(states[expert], x) if offload else states[expert]
        dit = nnx.merge(graphdefs[expert], state)
        return _velocity(dit, (high, low)[expert], context, negative, condition, settings, last_count)

    def on_step(_: Any, x: Array) -> None:
        if tick is not None:
            jax.debug.callback(tick, x[0, 0, 0, 0, 0])

    boundary, steps = settings.boundary, settings.steps
    if settings.sampler in ("rcm-sde", "rcm-ode"):
        entered: dict[int, Callable[[Array, Any], Array]] = {}

        def velocity(x: Array, s: float) -> Array:
            expert = 0 if boundary is None or s >= boundary else 1
            if expert not in entered:
                entered[expert] = enter(expert, x)
            return entered[expert](x, s)

        mode = settings.sampler.removeprefix("rcm-")
        grid = {"num_steps": steps, "sigma_max": settings.sigma_max, "mid_times": settings.mid_times}
        return rcm.sample(velocity, noise, step_noise, **grid, mode=mode, on_step=on_step)
    solver = {"unipc": flow.unipc_solver, "euler": flow.euler_solver}[settings.sampler](steps, settings.shift)
    high_noise: Any = partial(enter, 0)
    low_noise: Any = None if boundary is None else partial(enter, 1)

    def on_expert(opening: Any, x: Array) -> Callable[[Array, Any], Array]:
        return opening(x)

    experts: dict[str, Any] = {"low_velocity": low_noise, "boundary": boundary, "on_expert": on_expert}
    return flow.integrate(solver, high_noise, noise, **experts, on_step=on_step)


def _fetch(state: Any, x: Array) -> Any:
    """Weights from host to device memory, not before x is known: by then the other expert's have gone."""
    state, _ = jax.lax.optimization_barrier((state, x))
    return jax.device_put(state, jax.memory.Space.Device)


def _velocity(
    dit: Any,
    guidance: float,
    context: Float[Array, "B L D"],
    negative: Float[Array, "B L D"] | None,
    condition: Float[Array, "B t h w K"] | None,
    settings: Settings,
    last_count: int,
) -> Callable[[Array, Any], Array]:
    """The velocity field of one expert under one guidance, for all prompts of the batch."""
    is_guided, texts, picture = False, context, condition
    if guidance != 1.0 and negative is not None:
        is_guided, texts = True, jnp.concatenate([context, negative])
        picture = None if condition is None else jnp.concatenate([condition, condition])
    # Once for all steps: they depend on the text alone.
    keys = dit.text_keys(texts, last_count=last_count)
    options = {"attention": settings.attention, "round_timestep": settings.round_timestep}

    def velocity(x: Array, s: Any) -> Array:
        inputs = x if picture is None else jnp.concatenate([x, picture], axis=-1)
        timestep = jnp.full(len(inputs), 1000.0 * s, jnp.float32)
        return dit(inputs, timestep, keys, **options)

    return flow.guided(velocity, guidance) if is_guided else velocity


def encode_image(
    state: Any, image: UInt8[Array, "H W 3"], *, graphdef: Any, frames: int, batch: int
) -> Float[Array, "B t h w K"]:
    """The condition of image to video for one picture: `image_condition`, the same for every clip of the batch."""
    condition = image_condition(nnx.merge(graphdef, state), image[None], frames)
    return jnp.repeat(condition, batch, axis=0)


def image_condition(vae: Any, images: UInt8[Array, "N H W 3"], frames: int) -> Float[Array, "N t h w K"]:
    """4 mask channels (1 on the first latent frame), then the latents of each picture.

    The VAE sees the picture followed by mid-grey frames (`wan/image2video.py`).
    """
    video = jnp.zeros((len(images), frames, *images.shape[1:]), jnp.float32).at[:, 0].set(images / 127.5 - 1.0)
    latents = vae.encode(video) if _fits(vae.config, video.size // 3) else vae.encode_streamed(video)
    mask = jnp.zeros((*latents.shape[:-1], 4), latents.dtype).at[:, 0].set(1.0)
    return jnp.concatenate([mask, latents], axis=-1)


def decode(state: Any, latents: Float[Array, "B t h w C"], *, graphdef: Any) -> UInt8[Array, "B T H W 3"]:
    """Latents to pixels."""
    vae = nnx.merge(graphdef, state)
    batch, t, h, w, _ = latents.shape
    pixels = batch * ((t - 1) * vae.config.temporal_stride + 1) * h * w * vae.config.spatial_stride**2
    video = vae.decode(latents) if _fits(vae.config, pixels) else vae.decode_streamed(latents)
    return jnp.rint((video.astype(jnp.float32) + 1.0) * 127.5).astype(jnp.uint8)


def _fits(config: VAEConfig, pixels: int) -> bool:
    """Whether the VAE can hold its widest activation for all pixels at once, in float32."""
    return pixels * config.base_dim * 4 <= _WHOLE_SEQUENCE_BYTES


@dataclass(frozen=True)
class Program:
    """One program, perhaps still compiling; `out_info` has the shapes of its results."""

    out_info: Any
    executable: Future[Any]

    def __call__(self, *arguments: Any) -> Any:
        return self.executable.result()(*arguments)


class Programs:
    """Programs by function, static arguments, and the shapes of the others. They compile side by side."""

    def __init__(self) -> None:
        self._programs: dict[Hashable, Program] = {}
        self._pool = ThreadPoolExecutor(thread_name_prefix="compile")

    def get(self, function: Callable[..., Any], *arguments: Any, **static: Hashable) -> Program:
        """`function` for these arguments (arrays, or their shapes); call it with the arrays alone."""
        leaves, structure = jax.tree.flatten(arguments)
        shapes = tuple((leaf.shape, leaf.dtype, _memory(leaf)) for leaf in leaves)
        key = (function, tuple(sorted(static.items(), key=lambda item: item[0])), structure, shapes)
        if key not in self._programs:
            lowered = jax.jit(partial(function, **static)).lower(*arguments)
            self._programs[key] = Program(lowered.out_info, self._pool.submit(lowered.compile))
        return self._programs[key]


def _memory(leaf: Any) -> str | None:
    """Where an argument lies, if it says so: a program takes it from there alone."""
    return getattr(getattr(leaf, "sharding", None), "memory_kind", None)
