"""From what a user asked to what will be run: defaults filled in, every mistake found before any weight is read."""

from __future__ import annotations

import dataclasses
import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from turbojax.attention import AttentionConfig
from turbojax.config import PRESETS
from turbojax.errors import UserError
from turbojax.image import adaptive_size
from turbojax.pipeline_config import SAMPLERS, PipelineSpec
from turbojax.samplers import rcm

QUANTS = ("none", "w8a8")


@dataclass(frozen=True)
class Settings:
    """Everything that shapes a clip besides its prompt and seed; hashable, one compiled program for each.

    guidance: (low-noise expert, high-noise expert); 1 = none, and then the negative prompt plays no part.
    size: (width, height) in pixels. batch_size: clips made at once.
    """

    sampler: str
    steps: int
    guidance: tuple[float, float]
    negative_prompt: str
    shift: float
    sigma_max: float
    mid_times: tuple[float, ...]
    boundary: float | None
    round_timestep: bool
    attention: AttentionConfig
    quant: str
    size: tuple[int, int]
    frames: int
    fps: int
    batch_size: int

    @property
    def guided(self) -> bool:
        return self.guidance != (1.0, 1.0)

    def describe(self) -> dict[str, Any]:
        """JSON-ready settings for a clip's metadata; `batch_size` is left out, as it is not part of the recipe."""
        fields = dataclasses.asdict(self)
        del fields["batch_size"], fields["fps"]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in fields.items()}


def resolve(
    spec: PipelineSpec,
    *,
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
    size: tuple[int, int] | str | None = None,
    frames: int | None = None,
    fps: int | None = None,
    batch_size: int = 1,
    picture: tuple[int, int] | None = None,
) -> Settings:
    """Fill in the pipeline's defaults. Raises UserError for a value that the model or the sampler cannot take.

    picture: (width, height) of the first frame's source, whose shape size "adaptive" keeps.
    """
    defaults = spec.config
    sampler = sampler or defaults.sampler
    if sampler not in SAMPLERS:
        raise UserError(f"unknown sampler {sampler!r}; known: {', '.join(SAMPLERS)}")
    angles = _mid_times(defaults.mid_times if mid_times is None else mid_times)
    own_steps, own_guidance = _sampler_defaults(spec, sampler, angles)
    pair = own_guidance if guidance is None else _guidance(guidance)
    if defaults.boundary is None and pair[0] != pair[1]:
        raise UserError(f"model {spec.name} has one expert: give one guidance, not {pair[0]:g} and {pair[1]:g}")
    negative = defaults.negative_prompt if negative_prompt is None else negative_prompt
    _check_text("negative prompt", negative)
    if negative_prompt and pair == (1.0, 1.0):
        raise UserError("a negative prompt needs guidance: give a guidance above 1, or leave the negative prompt out")
    settings = Settings(
        sampler=sampler,
        steps=_steps(own_steps if steps is None else steps, sampler, angles),
        guidance=pair,
        negative_prompt="" if pair == (1.0, 1.0) else negative,
        shift=_positive("shift", defaults.shift if shift is None else shift),
        sigma_max=_positive("sigma_max", defaults.sigma_max if sigma_max is None else sigma_max),
        mid_times=angles,
        boundary=defaults.boundary,
        round_timestep=defaults.round_timestep,
        attention=_attention(spec, attention, topk),
        quant=_quant(quant or defaults.quant),
        size=_adaptive(spec, picture) if size == "adaptive" else _size(size or defaults.size, spec.size_unit),
        frames=_frames(defaults.frames if frames is None else frames, spec.vae.temporal_stride),
        fps=_whole("fps", defaults.fps if fps is None else fps, least=1),
        batch_size=_whole("batch_size", batch_size, least=1),
    )
    if SAMPLERS[sampler].distilled:
        rcm.time_grid(settings.steps, settings.sigma_max, angles)
    return settings


def check_prompts(prompts: str | Sequence[str]) -> list[str]:
    """One prompt or several as a list. Raises UserError for none, or one without a letter in it."""
    prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    if not prompts:
        raise UserError("no prompt: say what the clip should show")
    for prompt in prompts:
        if not isinstance(prompt, str) or not prompt.strip():
            raise UserError(f"empty prompt {prompt!r}: say what the clip should show")
        _check_text("prompt", prompt)
    return prompts


def _check_text(name: str, text: str) -> None:
    """Half a character is what Python makes of an argument in another encoding than the terminal's."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"{name} {text!r:.60} is not Unicode text: write it in UTF-8") from error


def check_seeds(seeds: int | Iterable[int]) -> list[int]:
    """One seed or several as a list. Raises UserError for anything but whole numbers from 0."""
    seeds = list(seeds) if isinstance(seeds, Iterable) else [seeds]
    if not seeds:
        raise UserError("no seed: give at least one whole number")
    return [_whole("seed", seed, least=0) for seed in seeds]


def pair_up(prompts: Sequence[str], seeds: Sequence[int], paired: bool) -> list[tuple[str, int]]:
    """The clips to make: every prompt with every seed, or one with one. Raises UserError if those are not as many."""
    if not paired:
        return [(prompt, seed) for prompt in prompts for seed in seeds]
    if len(prompts) != len(seeds):
        raise UserError(f"paired wants as many seeds as prompts: got {len(prompts)} prompts, {len(seeds)} seeds")
    return list(zip(prompts, seeds, strict=True))


def check_image(spec: PipelineSpec, has_image: bool) -> None:
    """Raise UserError if the model needs a picture that is not there, or takes none that is."""
    if has_image and not spec.takes_image:
        raise UserError(f"model {spec.name} takes text alone: leave the image out, or use an image-to-video model")
    if spec.takes_image and not has_image:
        raise UserError(f"model {spec.name} makes video from a picture: give an image")


def _sampler_defaults(
    spec: PipelineSpec, sampler: str, mid_times: tuple[float, ...]
) -> tuple[int, tuple[float, float]]:
    """Steps and guidance: the pipeline's for its own sampler, else few bare steps or the preset's many guided ones."""
    if sampler == spec.config.sampler:
        return spec.config.steps, spec.config.guidance
    if SAMPLERS[sampler].distilled:
        return _most_steps(sampler, mid_times), (1.0, 1.0)
    preset = PRESETS[spec.config.preset]
    return preset.steps, preset.guidance


def _guidance(guidance: float | Sequence[float]) -> tuple[float, float]:
    pair = (guidance, guidance) if isinstance(guidance, int | float) else tuple(guidance)
    if len(pair) != 2 or not all(isinstance(g, int | float) and math.isfinite(g) and g >= 1 for g in pair):
        raise UserError(f"guidance must be a number from 1 (none), or two: low-noise, high-noise; got {guidance!r}")
    return float(pair[0]), float(pair[1])


def _most_steps(sampler: str, mid_times: tuple[float, ...]) -> int:
    spec = SAMPLERS[sampler]
    return len(mid_times) + 1 if spec.distilled else spec.max_steps


def _mid_times(angles: Any) -> tuple[float, ...]:
    angles = tuple(angles) if isinstance(angles, Sequence | np.ndarray) else (angles,)
    if not all(isinstance(t, int | float | np.floating) and 0 < t < math.pi / 2 for t in angles):
        raise UserError(f"mid_times must be angles between 0 and pi/2, got {angles}")
    return tuple(map(float, angles))


def _steps(steps: int, sampler: str, mid_times: tuple[float, ...]) -> int:
    most = _most_steps(sampler, mid_times)
    if not 1 <= (steps := _whole("steps", steps)) <= most:
        others = "; for more steps use sampler unipc or euler" if SAMPLERS[sampler].distilled else ""
        raise UserError(f"sampler {sampler} takes 1 to {most} steps, got {steps}{others}")
    return steps


def _attention(spec: PipelineSpec, attention: str | AttentionConfig | None, topk: float | None) -> AttentionConfig:
    defaults = spec.config
    if isinstance(attention, AttentionConfig):
        return attention if topk is None else dataclasses.replace(attention, topk=topk)
    try:
        return AttentionConfig(
            kind=attention or defaults.attention,  # pyright: ignore[reportArgumentType] (checked on construction)
            topk=defaults.topk if topk is None else topk,
            block_q=defaults.block_q,
            block_k=defaults.block_k,
        )
    except ValueError as error:
        raise UserError(str(error)) from error


def _quant(quant: str) -> str:
    if quant not in QUANTS:
        raise UserError(f"unknown quant {quant!r}; known: {', '.join(QUANTS)}")
    return quant


def _adaptive(spec: PipelineSpec, picture: tuple[int, int] | None) -> tuple[int, int]:
    """The picture's shape, with about as many pixels as the model's own size."""
    if picture is None:
        raise UserError("size adaptive takes the shape of a picture, and there is none: give an image, or a size")
    width, height = spec.config.size
    return adaptive_size(picture, width * height, spec.size_unit)


def _size(size: Any, unit: int) -> tuple[int, int]:
    if isinstance(size, str):
        raise UserError(f"size must be (width, height) or 'adaptive', got {size!r}")
    size = tuple(_whole("size", n) for n in size)
    if len(size) != 2 or not all(n > 0 and n % unit == 0 for n in size):
        nearest = "x".join(str(max(unit, round(n / unit) * unit)) for n in size)
        given = "x".join(map(str, size))
        raise UserError(f"size must be width x height, both multiples of {unit}: got {given}, nearest {nearest}")
    return size[0], size[1]


def _frames(frames: int, stride: int) -> int:
    if (frames := _whole("frames", frames)) < 1 or frames % stride != 1:
        nearest = max(0, round((frames - 1) / stride)) * stride + 1
        raise UserError(f"frames must be {stride}n + 1 (1, {stride + 1}, ...): got {frames}, nearest {nearest}")
    return frames


def _positive(name: str, value: float) -> float:
    if not (math.isfinite(value) and value > 0):
        raise UserError(f"{name} must be above 0, got {value}")
    return float(value)


def _whole(name: str, value: Any, least: int | None = None) -> int:
    """`value` as an int, NumPy's integers included."""
    try:
        number = operator.index(value)
    except TypeError as error:
        raise UserError(f"{name} must be a whole number, got {value!r}") from error
    if least is not None and number < least:
        raise UserError(f"{name} must be a whole number from {least}, got {number}")
    return number
