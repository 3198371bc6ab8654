"""Text to video: a tokenizer, a text encoder, one or two DiT experts and a VAE, run one after the other.

pipe = Pipeline.load("tiny")
video = pipe.generate("a red circle moving right", seed=0)
video.save("circle.mp4")
"""

from __future__ import annotations

import hashlib
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Float, UInt8

from turbojax.attention import AttentionConfig
from turbojax.checkpoint import load_component
from turbojax.errors import UserError
from turbojax.image import Picture, open_image, resize_image
from turbojax.pipeline_config import PipelineConfig, PipelineFolder, PipelineSpec, find_pipeline
from turbojax.programs import Program, Programs, decode, denoise, encode_image, encode_text, text_rows_for
from turbojax.progress import StepBar
from turbojax.quant import block_linears, quantize_dit
from turbojax.settings import Settings, check_image, check_prompts, check_seeds, pair_up, resolve
from turbojax.tokenizer import Tokenizer
from turbojax.video import Video

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


class Pipeline:
    """The parts of one model, and what was compiled for them so far.

    dit (the high-noise expert where there are two), dit_low, vae, text_encoder, tokenizer: replace or change them
    freely; the next clip uses what is there.
    """

    def __init__(
        self,
        config: PipelineConfig,
        *,
        dit: Any,
        vae: Any,
        text_encoder: Any,
        tokenizer: Tokenizer,
        dit_low: Any = None,
        name: str = "unnamed",
        offload: bool = False,
    ):
        """Put a pipeline together from modules; offload: see `load`. Raises UserError if they do not fit together."""
        _check_experts(name, config, dit, dit_low)
        tokenizer.check_fits(text_encoder.config)
        self.spec = PipelineSpec(name, config, dit.config, vae.config, text_encoder.config)
        self.dit, self.dit_low, self.vae = dit, dit_low, vae
        self.text_encoder, self.tokenizer = text_encoder, tokenizer
        self.load_seconds = 0.0
        self._programs = Programs()
        self._bar = StepBar()
        self.offload = offload
        self._int8: tuple[list[Any], list[Any]] = [], []

    @classmethod
    def load(
        cls, model: str | Path | PipelineFolder = "tiny", *, dtype: DTypeLike | None = None, offload: bool = False
    ) -> Pipeline:
        """Read a shipped model by name, or a folder that `turbojax convert` made.

        dtype: compute dtype of every part; None: as each was saved.
        offload: keep the DiTs in host memory, each on the device only while its steps run: of two experts a small
            device holds one at a time, and pays one transfer of each a clip.
        Raises UserError for an unknown model, or a folder that lacks a part.
        """
        begun = time.perf_counter()
        folder = model if isinstance(model, PipelineFolder) else find_pipeline(model)
        spec, paths = folder.spec, folder.paths
        tokenizer = Tokenizer.load(paths["tokenizer"], spec.config.text_len)
        parts = {}
        for part, path in paths.items():
            if part != "tokenizer":
                module = load_component(path, dtype)
                parts[part] = moved(module, HOST) if offload and part in ("dit", "dit_low") else module
        pipeline = cls(spec.config, tokenizer=tokenizer, name=spec.name, offload=offload, **parts)
        pipeline.load_seconds = time.perf_counter() - begun
        return pipeline

    @overload
    def generate(self, prompt: str, *, seed: int = 0, **options: Any) -> Video: ...

    @overload
    def generate(
        self, prompt: str | Sequence[str], *, seed: int | Iterable[int] = 0, **options: Any
    ) -> list[Video]: ...

    def generate(self, prompt: Any, *, seed: Any = 0, **options: Any) -> Video | list[Video]:
        """Prompts to clips: one Video for one prompt and seed, else a list; options as in `generate_each`."""
        videos = list(self.generate_each(prompt, seed=seed, **options))
        return videos[0] if isinstance(prompt, str) and not isinstance(seed, Iterable) else videos

    def generate_each(
        self,
        prompt: str | Sequence[str],
        *,
        seed: int | Iterable[int] = 0,
        paired: bool = False,
        steps: int | None = None,
        sampler: str | None = None,
        guidance: float | tuple[float, float] | None = None,
        negative_prompt: str | None = None,
        shift: float | None = None,
        sigma_max: float | None = None,
        mid_times: Sequence[float] | None = None,
        attention: str | AttentionConfig | None = None,
        topk: float | None = None,
        quant: str | None = None,
        image: Any = None,
        size: tuple[int, int] | str | None = None,
        frames: int | None = None,
        fps: int | None = None,
        batch_size: int = 1,
        progress: bool | None = None,
    ) -> Iterator[Video]:
        """Every prompt with every seed, each clip as soon as it is done; what is None comes from `spec.config`.

        paired: the first prompt with the first seed, the second with the second, instead of all with all.
        sampler: "rcm-sde" or "rcm-ode" (few steps: at most one more than mid_times), "unipc" or "euler" (1-1000).
        guidance: 1 = none; two numbers are for the low-noise and the high-noise expert. shift: of unipc and euler.
        sigma_max: of rcm; mid_times: of its later steps, angles between pi/2 (noise) and 0; n steps take n - 1.
        attention: "dense", "sage", "sla", "sagesla" (topk: share of key blocks kept) or an AttentionConfig.
        quant: "w8a8" or "none". frames: 4n + 1.
        size: (width, height), multiples of 16; "adaptive": the image's shape, with as many pixels as the default.
        image: first frame for the models that take one: a file, a PIL image or uint8 [h, w, 3]; stretched to size.
        batch_size: clips made at once. A clip made alone depends on nothing but its prompt, seed and settings: the
            same bits every time on one machine. Another batch size may round differently.
        progress: a bar of the denoising steps; None: in terminals and notebooks.
        Raises UserError before anything is compiled for a request that cannot be met.
        """
        prompts, seeds = check_prompts(prompt), check_seeds(seed)
        check_image(self.spec, image is not None)
        original = None if image is None else open_image(image)
        settings = resolve(
            self.spec, steps=steps, sampler=sampler, guidance=guidance, negative_prompt=negative_prompt, shift=shift,
            sigma_max=sigma_max, mid_times=mid_times, attention=attention, topk=topk, quant=quant, size=size,
            frames=frames, fps=fps, batch_size=batch_size,
            picture=None if original is None else (original.shape[1], original.shape[0]),
        )  # fmt: skip
        picture = None if original is None else resize_image(original, settings.size)
        for text in prompts:
            if unknown := self.tokenizer.unknown(text):
                warnings.warn(f"{self.spec.name} never learned the words {', '.join(unknown)}", stacklevel=2)
        return self._run(pair_up(prompts, seeds, paired), settings, picture, progress)

    def _run(
        self, requests: list[tuple[str, int]], settings: Settings, picture: Picture | None, progress: bool | None
    ) -> Iterator[Video]:
        size = settings.batch_size
        batches = [requests[i : i + size] for i in range(0, len(requests), size)]
        contexts: dict[str, Any] = {}
        with self._bar.show(len(batches) * settings.steps, progress):
            for batch in batches:
                clock = _Clock()
                filled = batch + [batch[-1]] * (size - len(batch))  # one shape, one program
                pixels = self._make(filled, settings, picture, contexts, clock)
                timings = clock.stop()
                for (prompt, seed), frames in zip(batch, pixels, strict=False):
                    yield Video(frames, settings.fps, self._metadata(prompt, seed, settings, picture), timings)

    def _make(
        self,
        batch: list[tuple[str, int]],
        settings: Settings,
        picture: Picture | None,
        contexts: dict[str, Any],
        clock: _Clock,
    ) -> UInt8[np.ndarray, "B T H W 3"]:
        """One batch of clips; `contexts` remembers the features of the texts met so far."""
        text, vae = nnx.split(self.text_encoder), nnx.split(self.vae)
        experts = tuple(map(nnx.split, self._experts(settings.quant)))
        states = tuple(state for _, state in experts)
        noises = draw_noise([seed for _, seed in batch], self._latent_shape(settings), settings)
        negatives = [settings.negative_prompt] * len(batch) if settings.guided else []
        tokens = {prompt: self.tokenizer(prompt) for prompt in {*(prompt for prompt, _ in batch), *negatives}}
        rows = text_rows_for(max(int(mask.sum()) for _, mask in tokens.values()), self.tokenizer.text_len)
        with clock.stage("compile"):
            programs = self._prepare(text, experts, vae, settings, picture, noises, rows)
        with clock.stage("text"):
            for prompt in tokens.keys() - contexts.keys():
                contexts[prompt] = programs["text"](text[1], *tokens[prompt])
            context = jnp.concatenate([contexts[prompt] for prompt, _ in batch])
            negative = jnp.concatenate([contexts[prompt] for prompt in negatives]) if negatives else None
            jax.block_until_ready((context, negative))
        condition = None
        if picture is not None:
            with clock.stage("image"):
                condition = jax.block_until_ready(programs["image"](vae[1], picture))
        self._bar.resume()
        with clock.stage("dit"):
            latents = jax.block_until_ready(programs["dit"](states, context, negative, condition, *noises))
            jax.effects_barrier()  # the bar's last steps
        with clock.stage("vae"):
            return np.asarray(programs["vae"](vae[1], latents))

    def _prepare(
        self, text: Any, experts: Any, vae: Any, settings: Settings, picture: Picture | None, noises: Any, rows: int
    ) -> dict[str, Program]:
        """The programs of one batch, compiled; each module comes as (graphdef, state). rows: of text that matter."""
        batch, programs = settings.batch_size, {}
        encoded = programs["text"] = self._programs.get(encode_text, text[1], *self.tokenizer(""), graphdef=text[0])
        context = jax.ShapeDtypeStruct((batch, *encoded.out_info.shape[1:]), encoded.out_info.dtype)
        condition = None
        if picture is not None:
            static = {"graphdef": vae[0], "frames": settings.frames, "batch": batch}
            programs["image"] = self._programs.get(encode_image, vae[1], picture, **static)
            condition = programs["image"].out_info
        programs["dit"] = self._programs.get(
            denoise,
            tuple(state for _, state in experts),
            context,
            context if settings.guided else None,
            condition,
            *noises,
            graphdefs=tuple(graphdef for graphdef, _ in experts),
            settings=settings,
            # A call back to Python costs a small model a tenth of a step.
            tick=self._bar.tick if self._bar.shown else None,
            offload=self.offload,
            text_rows=rows,
        )
        programs["vae"] = self._programs.get(decode, vae[1], programs["dit"].out_info, graphdef=vae[0])
        for program in programs.values():
            program.executable.result()
        return programs

    def _experts(self, quant: str) -> list[Any]:
        """The DiTs as they will run: int8 weights are made once, and again only if the weights changed."""
        modules = [self.dit] if self.dit_low is None else [self.dit, self.dit_low]
        if quant == "none":
            if not all(map(block_linears, modules)):
                raise UserError(f"the weights of model {self.spec.name} are int8: quant must be 'w8a8'")
            return modules
        leaves = jax.tree.leaves([nnx.state(module) for module in modules])
        known, quantized = self._int8
        if len(known) != len(leaves) or any(a is not b for a, b in zip(known, leaves, strict=True)):
            if self.offload:  # one expert after the other on the device
                quantized = [moved(quantize_dit(moved(module, DEVICE)), HOST) for module in modules]
            else:
                quantized = [quantize_dit(module) for module in modules]
            self._int8 = leaves, quantized
        return quantized

    def _latent_shape(self, settings: Settings) -> tuple[int, int, int, int]:
        vae, (width, height) = self.spec.vae, settings.size
        t = (settings.frames - 1) // vae.temporal_stride + 1
        return t, height // vae.spatial_stride, width // vae.spatial_stride, vae.z_dim

    def _metadata(self, prompt: str, seed: int, settings: Settings, picture: Picture | None) -> dict[str, Any]:
        image = {} if picture is None else {"image": f"sha256:{hashlib.sha256(picture.tobytes()).hexdigest()}"}
        return {
            "prompt": prompt,
            "seed": seed,
            **image,
            "model": self.spec.name,
            "settings": settings.describe(),
            "versions": {name: version(name) for name in ("turbojax", "jax", "jaxlib")},
            "device": jax.devices()[0].device_kind,
        }


def draw_noise(
    seeds: Sequence[int], shape: tuple[int, ...], settings: Settings
) -> tuple[Float[np.ndarray, "B *shape"], Float[np.ndarray, "steps B *shape"] | None]:
    """Standard normal float32 for the start and, where the sampler adds fresh noise, for each step.

    Every clip has its own stream, the start first: NumPy's Philox, which gives the same numbers on every machine.
    """
    count = 1 + settings.steps if settings.sampler == "rcm-sde" else 1
    draws = [np.random.Generator(np.random.Philox(seed)).standard_normal((count, *shape), np.float32) for seed in seeds]
    stacked = np.stack(draws, axis=1)
    return stacked[0], stacked[1:] if count > 1 else None


def moved(module: Any, memory: Any) -> Any:
    """A copy of a module with its parameters in that memory, HOST or DEVICE."""
    graph, state = nnx.split(module)
    return nnx.merge(graph, jax.device_put(state, memory))


def _check_experts(name: str, config: PipelineConfig, dit: Any, dit_low: Any) -> None:
    if config.boundary is not None and dit_low is None:
        raise UserError(f"model {name} switches experts at s = {config.boundary:g}, but has no low-noise one: dit_low")
    if config.boundary is None and dit_low is not None:
        raise UserError(f"model {name} has two experts, but no boundary between them in its config")
    if dit_low is not None and dit_low.config != dit.config:
        raise UserError(f"model {name}: the experts dit and dit_low differ in shape")


class _Clock:
    """Seconds by stage."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()
        self._stages: dict[str, float] = {}

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self._stages[name] = time.perf_counter() - begun

    def stop(self) -> dict[str, float]:
        return {**self._stages, "total": time.perf_counter() - self._begun}
