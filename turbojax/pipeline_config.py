"""What a pipeline folder says about itself, and which pipelines ship: read without JAX, checked before any load.

FOLDER/pipeline.json      how the model samples by default, and where its parts are (below)
FOLDER/dit/               config.json + params (the high-noise expert where there are two)
FOLDER/dit_low/           the low-noise expert; present exactly when `boundary` is set
FOLDER/vae/  FOLDER/text_encoder/  FOLDER/tokenizer/tokenizer.json
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbojax import config as configs
from turbojax.config import PRESETS, DiTConfig, UMT5Config, VAEConfig
from turbojax.errors import UserError

# Pipelines that ship with the library: name -> folder inside turbojax/tiny.
SHIPPED: Mapping[str, str] = {"tiny": "student", "tiny-teacher": "teacher", "tiny-i2v": "i2v"}
_SHIPPED_ROOT = Path(__file__).parent / "tiny"

_KINDS: Mapping[str, type] = {
    "dit": DiTConfig, "dit_low": DiTConfig, "vae": VAEConfig, "text_encoder": UMT5Config,
}  # fmt: skip


@dataclass(frozen=True)
class SamplerSpec:
    """The range of steps that a sampler takes, and whether it wants guidance unless told otherwise."""

    max_steps: int
    distilled: bool


SAMPLERS: Mapping[str, SamplerSpec] = {
    "rcm-sde": SamplerSpec(max_steps=4, distilled=True),
    "rcm-ode": SamplerSpec(max_steps=4, distilled=True),
    "unipc": SamplerSpec(max_steps=1000, distilled=False),
    "euler": SamplerSpec(max_steps=1000, distilled=False),
}


@dataclass(frozen=True)
class PipelineConfig:
    """Contents of `pipeline.json`. Everything but `preset` may be left out there: the preset then decides.

    steps and guidance belong to `sampler`; guidance is (low-noise expert, high-noise expert), 1 = none.
    sigma_max: start of the rCM samplers, in EDM's sigma; mid_times: TrigFlow angles of their later steps, of which
    n steps take the first n - 1. size: (width, height) in pixels.
    quant: "w8a8" where the stored weights are int8 already.
    round_timestep: the model learned from timesteps rounded to bfloat16, as TurboDiffusion's did.
    parts: where each part lies, relative to the folder.
    """

    preset: str
    text_len: int
    boundary: float | None
    sampler: str
    steps: int
    guidance: tuple[float, float]
    shift: float
    sigma_max: float
    mid_times: tuple[float, ...]
    size: tuple[int, int]
    frames: int
    fps: int
    negative_prompt: str
    attention: str = "dense"
    topk: float = 0.1
    block_q: int = 128
    block_k: int = 64
    quant: str = "none"
    round_timestep: bool = False
    parts: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def from_preset(cls, name: str, **changes: Any) -> PipelineConfig:
        """The preset's own way of sampling (UniPC with guidance), with `changes`.

        Raises UserError for an unknown preset or field.
        """
        if name not in PRESETS:
            raise UserError(f"unknown preset {name!r}; known: {', '.join(PRESETS)}")
        preset = PRESETS[name]
        fields = {f.name for f in dataclasses.fields(cls)}
        if unknown := sorted(set(changes) - fields):
            raise UserError(f"pipeline.json has no field {', '.join(unknown)}; known: {', '.join(sorted(fields))}")
        shared = {f.name: getattr(preset, f.name) for f in dataclasses.fields(preset) if f.name in fields}
        return cls(**{"preset": name, "sampler": "unipc", **shared, **changes})

    @classmethod
    def from_json(cls, text: str) -> PipelineConfig:
        """Read the text of a `pipeline.json`. Raises UserError for an unknown preset or field, or an odd value."""
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise UserError(f"pipeline.json is not JSON: {error}") from error
        if not isinstance(fields, dict) or not isinstance(fields.get("preset"), str):
            raise UserError(f"pipeline.json names no preset; known: {', '.join(PRESETS)}")
        name = fields.pop("preset")
        config = cls.from_preset(name, **{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
        usual = {**dataclasses.asdict(cls.from_preset(name)), "boundary": 0.5, "parts": {"": ""}}
        for field, value in dataclasses.asdict(config).items():
            if not _alike(value, usual[field]) and (field, value) != ("boundary", None):
                example = json.dumps(getattr(cls.from_preset(name), field), ensure_ascii=False)[:60]
                raise UserError(f"pipeline.json: {field} cannot be {value!r:.60}; it is a value like {example}")
        return config

    def to_json(self) -> str:
        """The text of a `pipeline.json` with every field written out."""
        return json.dumps(dataclasses.asdict(self), indent=2, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class PipelineSpec:
    """The shapes of a pipeline's models and how it samples: all that is needed to check a request."""

    name: str
    config: PipelineConfig
    dit: DiTConfig
    vae: VAEConfig
    text_encoder: UMT5Config

    def __post_init__(self) -> None:
        name, dit, vae = self.name, self.dit, self.vae
        if dit.text_dim != self.text_encoder.dim:
            raise UserError(
                f"model {name}: dit reads text of width {dit.text_dim}, text_encoder gives {self.text_encoder.dim}"
            )
        if dit.out_channels != vae.z_dim or dit.in_channels not in (vae.z_dim, 2 * vae.z_dim + 4):
            raise UserError(
                f"model {name}: dit takes {dit.in_channels} and gives {dit.out_channels} latent channels, "
                f"vae has {vae.z_dim}"
            )

    @property
    def size_unit(self) -> int:
        """Width and height are multiples of this: one patch of latents, in pixels."""
        return self.vae.spatial_stride * math.lcm(*self.dit.patch_size[1:])

    @property
    def takes_image(self) -> bool:
        """True for image to video: 4 mask and z_dim picture channels behind the noisy latents."""
        return self.dit.in_channels == 2 * self.vae.z_dim + 4


@dataclass(frozen=True)
class PipelineFolder:
    """A pipeline whose parts are all there, at `paths`, and fit together; no weight has been read yet."""

    spec: PipelineSpec
    paths: Mapping[str, Path]


def _alike(value: Any, usual: Any) -> bool:
    """True when a JSON value is of the usual one's type; a pair must be one, other lists may be of any length."""
    if isinstance(usual, dict):
        return isinstance(value, dict) and all(isinstance(x, str) for x in (*value, *value.values()))
    if isinstance(usual, tuple):
        if not isinstance(value, tuple) or (len(usual) == 2 and len(value) != 2):
            return False
        return all(_alike(x, usual[0]) for x in value)
    return type(value) is type(usual) or (type(usual) is float and type(value) is int)


def find_pipeline(model: str | Path) -> PipelineFolder:
    """Find and check a pipeline by shipped name or folder.

    Raises UserError for a name that is neither, a missing or unreadable part, or parts that do not fit.
    """
    name = str(model)
    root = _SHIPPED_ROOT / SHIPPED[name] if name in SHIPPED else Path(name)
    if not name or not root.is_dir():  # an empty path is the working folder
        if name in PRESETS:
            raise UserError(f"{name} has no weights here; convert a checkpoint first: turbojax convert --help")
        raise UserError(
            f"unknown model {name!r}; known: {', '.join(SHIPPED)}, or a folder that `turbojax convert` made"
        )
    config = PipelineConfig.from_json(_read(root / "pipeline.json", name))
    names = ["dit", "vae", "text_encoder", "tokenizer"] + (["dit_low"] if config.boundary is not None else [])
    paths = {part: (root / config.parts.get(part, part)).resolve() for part in names}
    parts = {part: _part_config(part, path, name) for part, path in paths.items() if part in _KINDS}
    _read(paths["tokenizer"] / "tokenizer.json", name)
    if "dit_low" in parts and parts["dit_low"] != parts["dit"]:
        raise UserError(f"model {name}: the experts dit and dit_low differ in shape")
    return PipelineFolder(PipelineSpec(name, config, parts["dit"], parts["vae"], parts["text_encoder"]), paths)


def _part_config(part: str, path: Path, model: str) -> Any:
    text = _read(path / "config.json", model)
    if not (path / "params").is_dir() and not (path / "params.safetensors").is_file():
        raise UserError(f"model {model} lacks a part: no params/ or params.safetensors in {path}")
    try:
        config = configs.from_json(text)
    except (ValueError, TypeError) as error:
        raise UserError(f"{path / 'config.json'}: {error}") from error
    if type(config) is not _KINDS[part]:
        raise UserError(f"{path} holds a {type(config).__name__}, but {part} needs a {_KINDS[part].__name__}")
    return config


def _read(path: Path, model: str) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError(f"model {model} lacks a part: no {path}") from error
    except (OSError, UnicodeDecodeError) as error:
        reason = error.reason if isinstance(error, UnicodeDecodeError) else error.strerror
        raise UserError(f"model {model}: cannot read {path}: {reason}") from error
