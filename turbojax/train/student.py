"""What the SLA and rCM stages share: a frozen teacher, a student grafted from it, captioned latents, an optimiser."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, PyTree

from turbojax.attention import DENSE, AttentionConfig
from turbojax.checkpoint import load_component, save_component
from turbojax.config import PRESETS
from turbojax.errors import UserError
from turbojax.models.dit import Remat, WanDiT
from turbojax.pipeline_config import PipelineConfig
from turbojax.sharding import component_sharding, make_mesh
from turbojax.tokenizer import Tokenizer
from turbojax.train import data, loop
from turbojax.train.encoded import encode_scenes
from turbojax.train.pca import PCALatents
from turbojax.train.teacher import SHIPPED_TOKENIZER, TEXT_ENCODER, Captions

# NumPy where a batch is made, traced inside the step that takes it.
HostArray = Any

# 320 tokens of the small model: 20 query blocks (a quarter of a frame each), 40 key blocks (a row each), 10 kept.
SLA = AttentionConfig(kind="sla", topk=0.25, block_q=16, block_k=8)


@dataclass(frozen=True)
class AdamConfig:
    """AdamW on float32 master weights: linear warm-up, constant, and from `hold` of the steps on a cosine to zero.

    The published runs hold to the end (hold = 1) and do not clip.
    """

    learning_rate: float
    b1: float = 0.9
    b2: float = 0.999
    weight_decay: float = 0.01
    warmup: int = 100
    hold: float = 1.0
    clip: float | None = None

    def make(self, steps: int, trained: PyTree | None = None) -> optax.GradientTransformation:
        """A step whose gradients are not finite is skipped and counted. trained: True where a leaf may move."""
        hold = max(self.warmup, int(self.hold * steps))
        rate = optax.join_schedules(
            [
                optax.linear_schedule(0.0, self.learning_rate, self.warmup),
                optax.constant_schedule(self.learning_rate),
                optax.cosine_decay_schedule(self.learning_rate, max(1, steps - hold)),
            ],
            [self.warmup, hold],
        )
        parts = [] if self.clip is None else [optax.clip_by_global_norm(self.clip)]
        optimizer = optax.chain(*parts, optax.adamw(rate, self.b1, self.b2, weight_decay=self.weight_decay))
        if trained is not None:
            frozen = jax.tree.map(lambda moves: not moves, trained)
            optimizer = optax.chain(optax.masked(optimizer, trained), optax.masked(optax.set_to_zero(), frozen))
        return optax.apply_if_finite(optimizer, max_consecutive_errors=100)


def skipped(opt_state: Any) -> Array:
    """How many steps `AdamConfig.make`'s optimiser left out because a gradient was not finite."""
    return opt_state.total_notfinite


class Networks:
    """The teacher, and the shape of a student that computes its self-attention as `attention` says.

    A student with SLA has a `proj_l` in each block, zero at first: it starts as the teacher with sparse attention.
    Both compute in the teacher's dtype; what trains is float32. remat: what backward passes recompute.
    """

    def __init__(self, teacher: WanDiT, attention: AttentionConfig, remat: Remat = "none"):
        self.attention = attention
        self.remat: Remat = remat
        self.teacher_config = teacher.config
        self._teacher, state = nnx.split(teacher)
        self.teacher_params = nnx.to_pure_dict(state)
        linear = attention.kind in ("sla", "sagesla")
        self.config = dataclasses.replace(teacher.config, linear_branch=linear)
        shape = nnx.eval_shape(lambda: WanDiT(self.config, rngs=nnx.Rngs(0), dtype=teacher.dtype))
        self._student, state = nnx.split(shape)
        self._shapes = nnx.to_pure_dict(state)

    def graft(self) -> PyTree:
        """The student at the start, in float32: the teacher's weights, and zero where it has none."""
        return _graft(self._shapes, self.teacher_params)

    def teacher_copy(self) -> PyTree:
        """The teacher's weights in float32: where the critic starts."""
        # Copies, also of what is float32 already: the critic's buffers are donated to each step, the teacher's are not.
        return jax.tree.map(lambda x: jnp.array(x, jnp.float32, copy=True), self.teacher_params)

    def teacher(self, latents: Array, timestep: Array, context: Array) -> Array:
        """The teacher's velocity. Inside a step take the teacher from the batch: here it is a constant, compiled in."""
        return self.like_teacher(self.teacher_params, latents, timestep, context)

    def like_teacher(self, params: PyTree, latents: Array, timestep: Array, context: Array) -> Array:
        """Velocity of a dense network with the teacher's shape: a critic's, or its own."""
        dit = nnx.merge(self._teacher, params)
        return dit(latents, timestep, context, attention=DENSE, remat=self.remat)

    def student(
        self, params: PyTree, latents: Array, timestep: Array, context: Array, *, forward_mode: bool = False
    ) -> Array:
        """Velocity of the student. forward_mode: by attention that `jax.jvp` can pass through on every platform."""
        attention = dataclasses.replace(self.attention, implementation="xla") if forward_mode else self.attention
        dit = nnx.merge(self._student, params)
        return dit(latents, timestep, context, attention=attention, remat=self.remat)

    def load(self, folder: Path) -> PyTree:
        """An exported student's weights, in float32."""
        student = load_component(folder)
        if student.config != self.config:
            raise UserError(f"{folder}: a student of another shape than the teacher's")
        return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), nnx.to_pure_dict(nnx.split(student)[1]))

    def export(self, params: PyTree, folder: Path) -> None:
        """Write a student as a component, in the dtypes that the model keeps (bfloat16 but for what stays float32)."""
        params = jax.tree.map(lambda x, like: x.astype(like.dtype), params, self._shapes)
        save_component(folder, (self.config, params), format="safetensors", overwrite=True)


def _graft(shapes: Mapping[Any, Any], teacher: Mapping[Any, Any]) -> dict[Any, Any]:
    grafted = {}
    for name, value in shapes.items():
        if isinstance(value, Mapping):
            grafted[name] = _graft(value, teacher.get(name, {}))
        elif name in teacher:
            grafted[name] = jnp.asarray(teacher[name], jnp.float32)
        else:
            grafted[name] = jnp.zeros(value.shape, jnp.float32)
    return grafted


class Drawn(NamedTuple):
    """latents [B,t,h,w,C] and the text encoder's rows for their captions [B,L,D]."""

    latents: HostArray
    context: HostArray


@runtime_checkable
class ClipSource(Protocol):
    """What a stage needs of its clips, wherever they come from."""

    @property
    def empty(self) -> HostArray:
        """The empty prompt's features [1, L, D], for guidance."""
        ...

    def draw(self, step: int, count: int) -> Any:
        """Step `step`'s clips, a tuple of arrays that the stage knows."""
        ...


class Clips:
    """Latents and encoded captions; what step n sees is a function of the seed and n alone."""

    def __init__(
        self,
        latents: np.ndarray,
        combinations: Sequence[tuple[str, str, str]],
        tokenizer: Tokenizer,
        encode: Callable[[Any, Any], Array],
        seed: int,
    ):
        self.latents, self.combinations, self.seed = latents, combinations, seed
        self.captions = Captions(tokenizer)
        # Frozen, so every caption is encoded once: a few hundred of them.
        self.contexts = np.asarray(encode(self.captions.ids, self.captions.mask), np.float32)

    @property
    def empty(self) -> HostArray:
        """The empty prompt's rows [1, L, D], for guidance."""
        return self.contexts[-1:]

    def draw(self, step: int, count: int, dropout: float = 0.0) -> Drawn:
        """Step `step`'s clips: each epoch is a permutation of them all."""
        rng = np.random.default_rng((self.seed, step))
        total = len(self.latents)
        epoch, offset = divmod(step * count, total - total % count)
        order = np.random.default_rng((self.seed, 1 << 40, epoch)).permutation(total)
        rows = order[offset : offset + count]
        texts = [self.captions.draw(rng, self.combinations[r], dropout) for r in rows]
        return Drawn(self.latents[rows], self.contexts[texts])


@dataclass(frozen=True)
class RunConfig:
    """Where a run reads and writes, and how it is spread: what `turbojax train` adds to a stage's own settings.

    start: exported weights to go on from. pca: the codec of the procedural clips; clips: how many are drawn, from
    data_seed; cache: folder of their latents (None: `out`). compute: dtype of the networks (None: as stored; what
    trains is float32 always). remat: what backward passes recompute. data, fsdp: the mesh (`turbojax.sharding`).
    checkpoint_every: seconds. keep: checkpoints.
    """

    out: Path | None = None
    export: Path | None = None
    start: Path | None = None
    pca: Path | None = None
    cache: Path | None = None
    clips: int = 16_384
    data_seed: int = 0
    compute: Literal["bfloat16", "float32"] | None = None
    remat: Remat = "none"
    data: int = 1
    fsdp: int = 1
    log_every: int = 20
    sample_every: int = 500
    checkpoint_every: float = 180.0
    keep: int = 2

    def loop(self, steps: int, seed: int) -> loop.LoopConfig:
        return loop.LoopConfig(
            steps, str(self.out), seed, self.log_every, self.checkpoint_every, self.sample_every, self.keep
        )

    @property
    def encoded(self) -> Path:
        """Where the latents of the procedural clips are kept; runs on the same clips may share them."""
        folder = self.cache or self.out
        assert folder is not None
        return folder / f"latents-{self.data_seed}-{self.clips}.npy"

    def mesh(self) -> Mesh | None:
        return None if self.data == self.fsdp == 1 else make_mesh(self.data, self.fsdp)


@dataclass(frozen=True)
class StudentRun(RunConfig):
    """A run that learns from a teacher.

    teacher: what the teacher stage exports (dit/ and text_encoder/), or a pipeline folder that says where they lie.
    shards: pattern of tar files that replace the procedural clips, with `negative`, the features of the negative prompt
    (a .pt file), and of their latents the first `latent_frames`. sheet_*: how sample sheets are drawn.
    """

    teacher: Path | None = None
    shards: str | None = None
    negative: Path | None = None
    latent_frames: int | None = None
    sheet_guidance: float = 2.0
    sheet_shift: float = 3.0
    sheet_sigma_max: float = 80.0


def prepare_networks(run: StudentRun, attention: AttentionConfig) -> Networks:
    """The teacher, spread over the run's mesh, and the shape of its student."""
    assert run.teacher is not None
    mesh = run.mesh()
    sharding = None if mesh is None else component_sharding(mesh)
    teacher = load_component(part_folder(run.teacher, "dit"), run.compute, sharding=sharding)
    return Networks(teacher, attention, run.remat)


def prepare_clips(run: StudentRun, seed: int) -> Clips:
    """The procedural clips, encoded once."""
    assert run.teacher is not None
    assert run.pca is not None
    encoder = load_component(part_folder(run.teacher, "text_encoder"), dtype="float32")
    if encoder.config != TEXT_ENCODER:
        raise UserError(f"{run.teacher}: its text encoder is not the small model's; other models train on --shards")
    scenes = data.clips(run.data_seed + 1000, run.clips)
    latents = encode_scenes(scenes, PCALatents.load(run.pca), run.encoded)
    combinations = [(s.colour, s.shape, s.motion) for s in scenes]
    tokenizer = Tokenizer.load(SHIPPED_TOKENIZER, PRESETS["tiny"].text_len)
    graph, state = nnx.split(encoder)
    encode = jax.jit(lambda ids, mask: nnx.merge(graph, state)(ids, mask))
    return Clips(latents, combinations, tokenizer, encode, seed)


def train(stage: loop.Stage, *, steps: int, out: Path, seed: int, checkpoint_every: float = 120.0) -> PyTree:
    """Run, or resume, a stage in `out` with the loop's own settings."""
    return loop.run(stage, loop.LoopConfig(steps, str(out), seed, checkpoint_every=checkpoint_every))


def part_folder(folder: Path, part: str) -> Path:
    """Where a part of a pipeline, or of an exported teacher, lies."""
    described = folder / "pipeline.json"
    parts = PipelineConfig.from_json(described.read_text()).parts if described.exists() else {}
    return folder / parts.get(part, part)
