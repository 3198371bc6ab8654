"""One training loop: a stage brings a state, a step and its batches; the loop brings resuming, metrics and time left.

Batches and random keys are functions of the step's number alone, so a run that was killed and started again
takes the very same steps as one that was not.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import jax
import numpy as np
from jaxtyping import PyTree
from tqdm import tqdm

from turbojax.train.state import restore_state, save_state


class Stage(Protocol):
    """What the loop needs of a stage."""

    def init(self) -> PyTree:
        """The state at step 0."""
        ...

    def step(self, state: PyTree, batch: PyTree, key: jax.Array) -> tuple[PyTree, Mapping[str, jax.Array]]:
        """One update; jitted by the loop, the state donated."""
        ...

    def batch(self, step: int) -> PyTree:
        """The data of that step, on the host."""
        ...


@dataclass(frozen=True)
class LoopConfig:
    """steps: how many in all; checkpoint_every in seconds, log_every and sample_every in steps."""

    steps: int
    out: str
    seed: int = 0
    log_every: int = 20
    checkpoint_every: float = 180.0
    sample_every: int = 1000


def run(
    stage: Stage,
    config: LoopConfig,
    sample: Callable[[PyTree, int], Mapping[str, Any]] | None = None,
) -> PyTree:
    """Train to `config.steps`, from the newest checkpoint in `config.out` if there is one; returns the state.

    Writes `metrics.jsonl` (one line every `log_every` steps) and `state.safetensors`; `sample(state, step)` may write
    pictures and returns metrics of its own.
    """
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    state, start = stage.init(), 0
    if (out / "state.safetensors").exists():
        state, start = restore_state(out / "state.safetensors", state)
    step_fn = jax.jit(stage.step, donate_argnums=0)
    key = jax.random.key(config.seed)
    window: list[Mapping[str, jax.Array]] = []
    saved = clock = time.monotonic()
    with (out / "metrics.jsonl").open("a") as log:
        for step in tqdm(range(start, config.steps), initial=start, total=config.steps, mininterval=2.0):
            state, metrics = step_fn(state, stage.batch(step), jax.random.fold_in(key, step))
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
                save_state(out / "state.safetensors", state, done)
                saved = time.monotonic()
    return state


def average(window: Sequence[Mapping[str, jax.Array]]) -> dict[str, float]:
    """The mean of each metric over the steps that reported it (the updates of rCM take turns)."""
    names = dict.fromkeys(name for metrics in window for name in metrics)
    return {k: float(np.mean([jax.device_get(m[k]) for m in window if k in m])) for k in names}
