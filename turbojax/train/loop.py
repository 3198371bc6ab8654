"""One training loop: a stage brings a state, a step and its batches; the loop brings resuming, metrics and time left.

Batches and random keys are functions of the step's number alone, so a run that was killed and started again
takes the very same steps as one that was not.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh, SingleDeviceSharding
from jaxtyping import PyTree
from tqdm import tqdm

from turbojax.checkpoint import Checkpoints
from turbojax.errors import UserError
from turbojax.sharding import put_batch, state_shardings
from turbojax.train.state import FOLDER, named, restore_newest


@runtime_checkable
class Stage(Protocol):
    """What the loop needs of a stage."""

    def init(self) -> PyTree:
        """The state at step 0."""
        ...

    def step(self, state: PyTree, batch: PyTree, key: jax.Array) -> tuple[PyTree, Mapping[str, jax.Array]]:
        """One update; jitted by the loop, the state donated."""
        ...

    def batch(self, step: int) -> PyTree:
        """What that step reads: data on the host, and frozen weights where they lie."""
        ...


@dataclass(frozen=True)
class LoopConfig:
    """steps: how many in all; checkpoint_every in seconds, log_every and sample_every in steps; keep: checkpoints."""

    steps: int
    out: str
    seed: int = 0
    log_every: int = 20
    checkpoint_every: float = 180.0
    sample_every: int = 1000
    keep: int = 2


def run(
    stage: Stage,
    config: LoopConfig,
    sample: Callable[[PyTree, int], Mapping[str, Any]] | None = None,
    mesh: Mesh | None = None,
) -> PyTree:
    """Train to `config.steps`, from the newest checkpoint in `config.out` if there is one; returns the state.

    Writes `metrics.jsonl` (one line every `log_every` steps) and `checkpoints/STEP`; `sample(state, step)` may write
    pictures and returns metrics of its own. mesh: spread state and batches over its devices (`turbojax.sharding`).
    A run that has its steps already takes none and writes nothing. Raises UserError if it has more than that.
    """
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    state = stage.init()
    # Put in its place once and for all: a step hands back what is placed, and would be compiled again for it.
    place = SingleDeviceSharding(jax.local_devices()[0]) if mesh is None else state_shardings(mesh, state)
    state = jax.device_put(state, place)
    with Checkpoints(out / FOLDER, keep=config.keep) as checkpoints:
        state, start = restore_newest(checkpoints, state)
        if start > config.steps:
            raise UserError(
                f"{out} holds a run of {start} steps already, more than {config.steps}; choose another --out"
            )
        if start < config.steps:
            _forget_after(out / "metrics.jsonl", start)
            state = _train(stage, config, sample, mesh, checkpoints, state, start)
    return state


def _train(
    stage: Stage,
    config: LoopConfig,
    sample: Callable[[PyTree, int], Mapping[str, Any]] | None,
    mesh: Mesh | None,
    checkpoints: Checkpoints,
    state: PyTree,
    start: int,
) -> PyTree:
    if mesh is None:
        step_fn = jax.jit(stage.step, donate_argnums=0)
    else:
        # The state comes back as it went in; left to itself the partitioner may choose otherwise.
        step_fn = jax.jit(stage.step, donate_argnums=0, out_shardings=(state_shardings(mesh, state), None))
    key = jax.random.key(config.seed)
    window: list[Mapping[str, jax.Array]] = []
    saved = clock = time.monotonic()
    spread = contextlib.nullcontext() if mesh is None else jax.set_mesh(mesh)
    with (Path(config.out) / "metrics.jsonl").open("a") as log, spread:
        for step in tqdm(range(start, config.steps), initial=start, total=config.steps, mininterval=2.0):
            batch = stage.batch(step)
            if mesh is not None:
                batch = put_batch(mesh, batch)
            state, metrics = step_fn(state, batch, jax.random.fold_in(key, step))
            window.append(metrics)
            done = step + 1
            if done % config.log_every == 0 or done == config.steps:
                mean = average(window)
                now = time.monotonic()
                line = {"step": done, "seconds_per_step": round((now - clock) / len(window), 4), **mean}
                print(json.dumps(line), file=log, flush=True)
                window, clock = [], now
            if sample is not None and (done % config.sample_every == 0 or done == config.steps):
                print(json.dumps({"step": done, **sample(state, done)}), file=log, flush=True)
                clock = time.monotonic()
            if time.monotonic() - saved > config.checkpoint_every or done == config.steps:
                checkpoints.save(done, named(state))
                saved = time.monotonic()
    return state


def average(window: Sequence[Mapping[str, jax.Array]]) -> dict[str, float]:
    """The mean of each metric over the steps that reported it (the updates of rCM take turns)."""
    names = dict.fromkeys(name for metrics in window for name in metrics)
    return {k: float(np.mean([jax.device_get(m[k]) for m in window if k in m])) for k in names}


def _forget_after(log: Path, step: int) -> None:
    """Drop the lines of steps that are about to be taken again, and one that a killed run had half written."""
    if not log.exists():
        return
    kept = []
    for line in log.read_text().splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except json.JSONDecodeError:
            continue
    partial = log.with_name(log.name + ".partial")
    partial.write_text("".join(line + "\n" for line in kept))
    os.replace(partial, log)
