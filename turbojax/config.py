"""Every model's shape, as frozen dataclasses, and the one table of presets.

Sources: the configs of Wan 2.1 and 2.2 (`wan/configs/*.py` and the checkpoints' own `config.json`).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

WAN_LATENTS_MEAN = (
    -0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
    0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921,
)  # fmt: skip
WAN_LATENTS_STD = (
    2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
    3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160,
)  # fmt: skip

# The prompt that the Wan release pairs with every generation (`wan/configs/shared_config.py`).
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，"
    "JPEG压缩残留，丑陋的，残缺的，多余的手指，画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，"
    "手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


# TrigFlow angles of the rCM sampler's later steps (`turbodiffusion/inference/wan2.1_t2v_infer.py`).
MID_TIMES = (1.5, 1.4, 1.0)


@dataclass(frozen=True)
class DiTConfig:
    """Shape of a Wan diffusion transformer; head_dim = dim / num_heads (128 in every released model)."""

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    in_channels: int = 16
    out_channels: int = 16
    text_dim: int = 4096
    freq_dim: int = 256
    patch_size: tuple[int, int, int] = (1, 2, 2)
    eps: float = 1e-6
    # True when the self-attention carries SLA's `proj_l` (a TurboDiffusion checkpoint).
    linear_branch: bool = False

    def __post_init__(self) -> None:
        if self.dim % self.num_heads:
            raise ValueError(f"dim {self.dim} is not a multiple of num_heads {self.num_heads}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim} must be even: rotary embedding turns pairs")

    @property
    def head_dim(self) -> int:
        return self.dim // self.num_heads

    @property
    def patch_volume(self) -> int:
        return math.prod(self.patch_size)


@dataclass(frozen=True)
class VAEConfig:
    """Shape of the Wan 2.1 VAE: 4x in time, 8x in space, and the statistics that normalise its latents."""

    base_dim: int = 96
    z_dim: int = 16
    dim_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    temporal_downsample: tuple[bool, ...] = (False, True, True)
    latents_mean: tuple[float, ...] = WAN_LATENTS_MEAN
    latents_std: tuple[float, ...] = WAN_LATENTS_STD

    def __post_init__(self) -> None:
        if not len(self.latents_mean) == len(self.latents_std) == self.z_dim:
            raise ValueError(f"latents_mean and latents_std need z_dim = {self.z_dim} values each")

    @property
    def spatial_stride(self) -> int:
        return 2 ** (len(self.dim_mult) - 1)

    @property
    def temporal_stride(self) -> int:
        return 2 ** sum(self.temporal_downsample)


@dataclass(frozen=True)
class UMT5Config:
    """Shape of the umT5 encoder (every layer owns its relative position bias)."""

    vocab_size: int = 256384
    dim: int = 4096
    dim_attn: int = 4096
    dim_ffn: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6


@dataclass(frozen=True)
class Preset:
    """A whole model: its parts, and how its authors sample from it."""

    dit: DiTConfig
    vae: VAEConfig = VAEConfig()
    text_encoder: UMT5Config = UMT5Config()
    text_len: int = 512
    # Below this noise level s (timestep / 1000) the low-noise expert takes over; None: one expert.
    boundary: float | None = None
    # Guidance of the many-step baseline: (low-noise expert, high-noise expert) or one number twice.
    guidance: tuple[float, float] = (5.0, 5.0)
    shift: float = 5.0
    steps: int = 50
    sigma_max: float = 80.0  # start of the rCM sampler, in EDM's sigma = s / (1 - s)
    mid_times: tuple[float, ...] = MID_TIMES
    size: tuple[int, int] = (832, 480)  # width, height
    frames: int = 81
    fps: int = 16
    negative_prompt: str = NEGATIVE_PROMPT


_DIT_14B = DiTConfig(dim=5120, ffn_dim=13824, num_heads=40, num_layers=40)

# tiny: 128 x 128 pixels, 17 frames -> 5 x 16 x 16 latents -> 320 tokens.
_TINY = Preset(
    dit=DiTConfig(dim=128, ffn_dim=512, num_heads=4, num_layers=4, text_dim=64),
    vae=VAEConfig(base_dim=8, latents_mean=(0.0,) * 16, latents_std=(1.0,) * 16),
    text_encoder=UMT5Config(vocab_size=128, dim=64, dim_attn=64, dim_ffn=128, num_heads=4, num_layers=2),
    text_len=32,
    guidance=(2.0, 2.0),
    shift=3.0,
    size=(128, 128),
    frames=17,
    fps=8,
    negative_prompt="",
)

PRESETS: Mapping[str, Preset] = {
    "tiny": _TINY,
    "tiny-i2v": dataclasses.replace(
        _TINY, dit=dataclasses.replace(_TINY.dit, in_channels=36), boundary=0.9, sigma_max=200.0
    ),
    "wan2.1-t2v-1.3b": Preset(DiTConfig(dim=1536, ffn_dim=8960, num_heads=12, num_layers=30)),
    "wan2.1-t2v-14b": Preset(_DIT_14B),
    "wan2.2-t2v-a14b": Preset(_DIT_14B, boundary=0.875, guidance=(3.0, 4.0), shift=12.0, steps=40),
    "wan2.2-i2v-a14b": Preset(
        dataclasses.replace(_DIT_14B, in_channels=36),
        boundary=0.9,
        guidance=(3.5, 3.5),
        shift=5.0,
        steps=40,
        sigma_max=200.0,
        size=(1280, 720),
    ),
}

ComponentConfig = DiTConfig | VAEConfig | UMT5Config
ComponentKind = Literal["dit", "vae", "umt5"]
_KINDS: dict[str, type] = {"dit": DiTConfig, "vae": VAEConfig, "umt5": UMT5Config}


def to_json(config: ComponentConfig) -> str:
    """The text of a component's `config.json`: its kind and every field."""
    kind = next(name for name, cls in _KINDS.items() if type(config) is cls)
    return json.dumps({"kind": kind, **dataclasses.asdict(config)}, indent=2) + "\n"


def from_json(text: str) -> ComponentConfig:
    """Read `to_json`'s text back. Raises ValueError for an unknown kind or field.

    "storage", which checkpoint.py writes beside the shape, says how the parameters are kept; it is left out here.
    """
    fields: Any = json.loads(text)
    if not isinstance(fields, dict):
        raise ValueError("config.json: not a table of fields")
    fields.pop("storage", None)
    kind = fields.pop("kind", None)
    if kind not in _KINDS:
        raise ValueError(f"config.json: unknown kind {kind!r}; expected one of {sorted(_KINDS)}")
    known = {f.name for f in dataclasses.fields(_KINDS[kind])}
    if unknown := sorted(set(fields) - known):
        raise ValueError(f"config.json: a {kind} has no field {', '.join(unknown)}")
    return _KINDS[kind](**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})


def preset(name: str) -> Preset:
    """The preset of that name; KeyError lists the known ones."""
    if name not in PRESETS:
        raise KeyError(f"unknown model {name!r}; known: {', '.join(PRESETS)}")
    return PRESETS[name]


def nested(dotted: Mapping[str, Any]) -> dict[str, Any]:
    """{"optimizer.learning_rate": x} as {"optimizer": {"learning_rate": x}}."""
    tree: dict[str, Any] = {}
    for name, value in dotted.items():
        *parents, last = name.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = value
    return tree
