"""Will it fit? The pipeline's own programs, compiled for a named card that is not here, and what they hold there.

jaxlib's compile-only topology takes each program of `programs.py` down to machine code without a GPU, and XLA's
memory analysis of it is exact but for what libraries (cuDNN, cuBLAS) take as workspace. Needs the `aot` extra.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from turbojax.errors import UserError

DEVICES = ("h100", "rtx4090", "rtx5090", "a100")
CONTEXT_BYTES = 2**30
"""What CUDA's context, the kernels' code and the libraries' workspaces take of a card, roughly."""
JAX_SHARE = 0.75
"""The share of a card that JAX takes unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise."""
FEW_STEP = {"sampler": "rcm-sde", "steps": 4, "guidance": (1.0, 1.0), "attention": "sagesla"}
"""How a preset is planned where nothing else is asked for: as the distilled checkpoints are sampled."""


@dataclass(frozen=True)
class Part:
    """One program. Bytes: its model's weights, its other arguments, temporaries, results. seconds: to compile."""

    name: str
    weights: int
    inputs: int
    temporaries: int
    outputs: int
    seconds: float

    @property
    def working(self) -> int:
        """What it needs beside the weights."""
        return self.inputs + self.temporaries + self.outputs


@dataclass(frozen=True)
class Plan:
    """What a request takes on a card. settings: as a clip's metadata has them. saved_by_int8: of the DiT's weights, in
    bytes; None where they are int8 already. cards: memory of every card known."""

    model: str
    device: str
    card_bytes: int
    settings: dict[str, Any]
    parts: tuple[Part, ...]
    saved_by_int8: int | None
    cards: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def resident(self) -> int:
        """Peak of a pipeline, which keeps all its weights on the card and runs its programs one after the other."""
        return sum(self._weights.values()) + max(part.working for part in self.parts)

    @property
    def alone(self) -> int:
        """Peak if only the weights of the program that runs were on the card."""
        return max(part.weights + part.working for part in self.parts)

    @property
    def usable(self) -> int:
        return self.card_bytes - CONTEXT_BYTES

    @property
    def fits(self) -> bool:
        return self.resident <= self.usable

    @property
    def _weights(self) -> dict[str, int]:
        """By model: encoding the picture and decoding share the VAE's."""
        return {part.name.split()[0]: part.weights for part in self.parts}

    def verdict(self) -> str:
        need, card = gib(self.resident), f"{self.device} ({gib(self.card_bytes)})"
        if not self.fits:
            return f"does not fit: needs {need}, and {card} has {gib(self.usable)} beside CUDA's own"
        if self.resident <= JAX_SHARE * self.card_bytes:
            return f"fits: needs {need} of {card}"
        share = min(0.97, (self.resident + self.usable) / 2 / self.card_bytes)
        return f"fits: needs {need} of {card}; set XLA_PYTHON_CLIENT_MEM_FRACTION={share:.2f}, as JAX takes 0.75 of it"

    def advice(self) -> list[str]:
        """What would make it fit, most telling first; nothing if it does."""
        if self.fits:
            return []
        lines = []
        if self.saved_by_int8:
            rest = self.resident - self.saved_by_int8
            lines.append(f"--quant w8a8 saves {gib(self.saved_by_int8)} of weights: {gib(rest)}{_ok(rest, self)}")
        if self.alone < self.resident:
            lines.append(f"one model at a time on the card needs {gib(self.alone)}{_ok(self.alone, self)}")
        largest = max(self.parts, key=lambda part: part.working)
        over = self.resident - self.usable
        if over < largest.working:
            share = 1 - over / largest.working
            lines.append(
                f"the {largest.name} works in {gib(largest.working)}, roughly in proportion to pixels and frames: "
                f"about {share:.0%} of them fit (--size, --frames)"
            )
        room = [name for name, size in self.cards.items() if self.resident <= size - CONTEXT_BYTES]
        lines.append(
            f"it fits on: {', '.join(room)}" if room else f"no card known here fits it ({', '.join(self.cards)})"
        )
        return lines

    def to_json(self) -> str:
        fields = dataclasses.asdict(self)
        found = {"resident_bytes": self.resident, "alone_bytes": self.alone, "fits": self.fits}
        return json.dumps({**fields, **found, "verdict": self.verdict(), "advice": self.advice()}, indent=1) + "\n"


def gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def _ok(size: int, plan: Plan) -> str:
    return ", which fits" if size <= plan.usable else ", still too much"


def plan(model: str, device: str, **options: Any) -> Plan:
    """Compiles the programs of a request for a card and adds up what they hold there.

    model: a preset, a shipped model or a converted folder. device: one of DEVICES. options: as `Pipeline.generate`
        takes them (size, frames, steps, quant, attention, topk, ...). A preset is planned as FEW_STEP says.
    The prompt is the longest: a shorter one, whose padding counts as one row, takes no more.
    Raises UserError for a request that cannot be met, a device that is unknown, or a missing `aot` extra.
    """
    if device not in DEVICES:
        raise UserError(f"unknown device {device!r}; known: {', '.join(DEVICES)}")
    find_request(model, options)
    from pallas_kernels import aot

    try:
        aot.require_extra()
    except ModuleNotFoundError as error:
        raise UserError(str(error)) from error
    with tempfile.TemporaryDirectory(prefix="plan-") as folder:
        out = Path(folder) / "plan.json"
        command = [sys.executable, "-m", "turbojax.plan", model, device, json.dumps(options), str(out)]
        done = subprocess.run(command, env=os.environ | aot.environment(), capture_output=True, text=True, check=False)
        if not out.exists():
            why = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise UserError(f"{model} could not be compiled for {device} ({done.returncode}): {why[:300]}")
        fields = json.loads(out.read_text())
    return Plan(**{**fields, "parts": tuple(Part(**part) for part in fields["parts"])})


def find_request(model: str, options: Mapping[str, Any]) -> tuple[Any, Any]:
    """(PipelineSpec, Settings) of a request. Raises UserError as `Pipeline.generate` does."""
    from turbojax.config import PRESETS
    from turbojax.pipeline_config import SHIPPED, PipelineConfig, PipelineSpec, find_pipeline
    from turbojax.settings import resolve

    options = {name: tuple(value) if isinstance(value, list) else value for name, value in options.items()}
    if model in PRESETS and model not in SHIPPED:
        preset = PRESETS[model]
        config = PipelineConfig.from_preset(model, **FEW_STEP)
        settings = resolve(PipelineSpec(model, config, preset.dit, preset.vae, preset.text_encoder), **options)
        branch = settings.attention.kind in ("sla", "sagesla")
        dit = dataclasses.replace(preset.dit, linear_branch=branch)
        return PipelineSpec(model, config, dit, preset.vae, preset.text_encoder), settings
    if not Path(model).is_dir() and model not in SHIPPED:
        raise UserError(f"unknown model {model!r}; known: {', '.join([*PRESETS, *SHIPPED])}, or a converted folder")
    spec = find_pipeline(model).spec
    return spec, resolve(spec, **options)


def compile_parts(spec: Any, settings: Any, target: Any) -> list[Part]:
    """Every program that a clip runs, compiled for this process's one target; a picture's if it takes one."""
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from pallas_kernels.aot import compile_for
    from turbojax import programs
    from turbojax.checkpoint import abstract_module

    def measured(name: str, function: Any, states: Any, *inputs: Any, **static: Any) -> tuple[Part, Any]:
        begun = time.perf_counter()
        compiled = compile_for(target, lambda *arguments: function(*arguments, **static), (states, *inputs))
        memory: Any = compiled.memory_analysis()
        # The weights that a program does not read (the VAE's encoder, say) are no argument of it, but on the card.
        sizes = _bytes(states), _bytes(inputs), memory.temp_size_in_bytes, memory.output_size_in_bytes
        part = Part(name, *sizes, seconds=time.perf_counter() - begun)
        return part, compiled.out_info

    shape, batch = jax.ShapeDtypeStruct, settings.batch_size
    text, vae = nnx.split(abstract_module(spec.text_encoder)), nnx.split(abstract_module(spec.vae))
    graph, state = nnx.split(_dit(spec.dit, settings.quant))
    experts = 1 if spec.config.boundary is None else 2
    width, height = settings.size
    frames = (settings.frames - 1) // spec.vae.temporal_stride + 1
    stride = spec.vae.spatial_stride
    noise = shape((batch, frames, height // stride, width // stride, spec.vae.z_dim), np.float32)
    fresh = settings.sampler == "rcm-sde"
    step_noise = shape((settings.steps, *noise.shape), np.float32) if fresh else None
    ids = shape((1, spec.config.text_len), np.int32)

    parts = []
    part, features = measured("text encoder", programs.encode_text, text[1], ids, ids, graphdef=text[0])
    parts.append(part)
    context = shape((batch, *features.shape[1:]), features.dtype)
    condition = None
    if spec.takes_image:
        picture = shape((height, width, 3), jnp.uint8)
        static = {"graphdef": vae[0], "frames": settings.frames, "batch": batch}
        part, condition = measured("vae encoder", programs.encode_image, vae[1], picture, **static)
        parts.append(part)
    static = {"graphdefs": (graph,) * experts, "settings": settings, "tick": None}
    negative = context if settings.guided else None
    arguments = (context, negative, condition, noise, step_noise)
    part, latents = measured("dit sampler", programs.denoise, (state,) * experts, *arguments, **static)
    parts.append(part)
    part, _ = measured("vae decoder", programs.decode, vae[1], latents, graphdef=vae[0])
    return [*parts, part]


def _dit(config: Any, quant: str) -> Any:
    from turbojax.checkpoint import abstract_module
    from turbojax.quant import block_linears

    module = abstract_module(config)
    return module if quant == "none" else abstract_module(config, None, dict.fromkeys(block_linears(module), "channel"))


def _bytes(tree: Any) -> int:
    import jax

    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _saved_by_int8(spec: Any, settings: Any) -> int | None:
    from flax import nnx

    if settings.quant == "w8a8":
        return None
    full, small = (_bytes(nnx.state(_dit(spec.dit, quant))) for quant in ("none", "w8a8"))
    return (full - small) * (1 if spec.config.boundary is None else 2)


def main(arguments: Sequence[str]) -> None:
    """The child of `plan`: compiles in a process that has met no other architecture, and writes the Plan."""
    from pallas_kernels.aot import TARGETS

    model, device, options, out = arguments
    spec, settings = find_request(model, json.loads(options))
    parts = compile_parts(spec, settings, TARGETS[device])
    cards = {name: int(target.figure("device_memory_size")) for name, target in TARGETS.items()}
    found = Plan(
        spec.name, device, cards[device], settings.describe(), tuple(parts), _saved_by_int8(spec, settings), cards
    )
    Path(out).write_text(json.dumps(dataclasses.asdict(found)))


if __name__ == "__main__":
    main(sys.argv[1:])
