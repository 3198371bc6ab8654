"""How good are the clips of a small model: what they show, how clean it is, and how much they vary.

Every prompt names a colour, a shape and a motion, so that `oracle.read` can say whether the clip shows them.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8

from turbojax.train import data
from turbojax.train.oracle import read

Combination = tuple[str, str, str]
ACCURACIES = ("colour", "shape", "motion")


@dataclass(frozen=True)
class Score:
    """One clip against its prompt. fit: render-fit PSNR in dB; place: what may vary (None: no shape was read)."""

    prompt: str
    seed: int
    held_out: bool
    colour: bool
    shape: bool
    motion: bool
    fit: float
    overlap: float
    place: tuple[float, float, float, float, float] | None  # x, y, radius, speed, background


def pairs(count: int, seed: int = 0) -> list[tuple[Combination, int]]:
    """`count` (combination, seed) pairs: all combinations, held-out ones included, as often as each other."""
    rng = np.random.default_rng(seed)
    order = list(data.COMBINATIONS)
    rng.shuffle(order)
    return [(order[i % len(order)], 1000 + i) for i in range(count)]


def prompt_of(combination: Combination) -> str:
    colour, shape, motion = combination
    return data.TEMPLATES[0][0].format(colour=colour, shape=shape, motion=motion)


def score(
    frames: UInt8[np.ndarray, "T H W 3"], combination: Combination, seed: int, prompt: str | None = None
) -> Score:
    """Read a clip and compare it with what was asked for. prompt: in which words (None: `prompt_of`'s)."""
    seen = read(frames)
    colour, shape, motion = combination
    scene = seen.scene
    place = None if scene is None else (*scene.centre, scene.radius, scene.speed, float(scene.background))
    return Score(
        prompt or prompt_of(combination), seed, combination in data.HELD_OUT,
        seen.colour == colour, seen.shape == shape, seen.motion == motion, seen.fit, seen.overlap, place,
    )  # fmt: skip


def summarise(scores: Sequence[Score], agreements: Sequence[float] | None = None) -> dict[str, Any]:
    """Accuracies with 95% intervals (Wilson); render-fit, overlap, agreement and diversity with theirs (bootstrap).

    agreements: PSNR of each clip with a reference's from the same noise.
    """
    if not scores:
        raise ValueError("no clips to summarise")
    out: dict[str, Any] = {"clips": len(scores)}
    for part, chosen in (("", scores), ("held_out_", [s for s in scores if s.held_out])):
        if not chosen:
            continue
        for name in ACCURACIES:
            hits = sum(getattr(s, name) for s in chosen)
            out[part + name] = round(hits / len(chosen), 4)
            out[part + name + "_interval"] = [round(x, 4) for x in wilson(hits, len(chosen))]
    values = {"fit": [s.fit for s in scores], "overlap": [s.overlap for s in scores]}
    if agreements is not None:
        values["agreement"] = list(agreements)
    for name, column in values.items():
        array = np.asarray(column)
        out[name] = round(float(array.mean()), 4)
        out[name + "_interval"] = bootstrap(len(array), lambda rows, array=array: float(array[rows].mean()))
    varied = _places(scores)
    out["diversity"] = round(_diversity(varied, np.arange(len(scores))), 4)
    out["diversity_interval"] = bootstrap(len(scores), lambda rows: _diversity(varied, rows))
    return out


def compare(scores: Sequence[Score], reference: Sequence[Score]) -> dict[str, Any]:
    """How a model's clips differ from a reference's of the same prompts and seeds, with 95% bootstrapped intervals.

    colour, shape, motion: percentage points above the reference; fit: dB above it; diversity: as a share of its.
    Pairs are drawn together, so that what a prompt and its noise make hard or easy does not widen the intervals.
    """
    if [(s.prompt, s.seed) for s in scores] != [(s.prompt, s.seed) for s in reference]:
        raise ValueError("two models can only be compared on the same prompts and seeds")
    count, out = len(scores), {}
    for name, scale in (*((name, 100.0) for name in ACCURACIES), ("fit", 1.0)):
        change = scale * np.asarray(
            [float(getattr(a, name)) - getattr(b, name) for a, b in zip(scores, reference, strict=True)]
        )
        out[name] = round(float(change.mean()), 4)
        out[name + "_interval"] = bootstrap(count, lambda rows, change=change: float(change[rows].mean()))
    made, theirs = _places(scores), _places(reference)

    def share(rows: np.ndarray) -> float:
        return _diversity(made, rows) / max(_diversity(theirs, rows), 1e-9)

    out["diversity"] = round(share(np.arange(count)), 4)
    out["diversity_interval"] = bootstrap(count, share)
    return out


def bootstrap(count: int, statistic: Callable[[np.ndarray], float], *, draws: int = 1000, seed: int = 0) -> list[float]:
    """95% interval of a statistic of row numbers, from rows drawn with replacement (Efron 1979, percentile method)."""
    rng = np.random.default_rng(seed)
    values = [statistic(rng.integers(count, size=count)) for _ in range(draws)]
    return [round(float(x), 4) for x in np.quantile(values, [0.025, 0.975])]


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95% interval of a proportion: honest at 0 and 1, where the normal one has no width."""
    p = hits / count
    centre, spread = p + z * z / (2 * count), z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return (max(0.0, (centre - spread) / (1 + z * z / count)), min(1.0, (centre + spread) / (1 + z * z / count)))


def diversity(scores: Iterable[Score]) -> float:
    """Spread over seeds of place, size, speed and background for one motion, relative to that of drawn clips.

    1: as varied as the training clips; 0: every seed gives the same clip. Averaged over the five quantities.
    """
    made = _places(list(scores))
    return _diversity(made, np.arange(len(made[0])))


Places = tuple[np.ndarray, np.ndarray]


def _places(scores: Sequence[Score]) -> Places:
    """What each clip shows: its motion's number, -1 where nothing could be read, and the five quantities."""
    motions = list(data.MOTIONS)
    asked = [next(motion for motion in motions if motion in re.findall(r"\w+", s.prompt.lower())) for s in scores]
    which = [-1 if s.place is None else motions.index(motion) for s, motion in zip(scores, asked, strict=True)]
    return np.asarray(which), np.asarray([s.place or (0.0,) * 5 for s in scores], float)


def _diversity(places: Places, rows: np.ndarray) -> float:
    return float(np.mean(_spread(places[0][rows], places[1][rows]) / _drawn_spread()))


@functools.cache
def _drawn_spread() -> np.ndarray:
    scenes = data.clips(99, 960)
    which = np.asarray([list(data.MOTIONS).index(s.motion) for s in scenes])
    return _spread(which, np.asarray([(*s.centre, s.radius, s.speed, float(s.background)) for s in scenes]))


def _spread(which: np.ndarray, quantities: np.ndarray) -> np.ndarray:
    """Standard deviation of each quantity inside a motion, pooled over the motions."""
    groups = [quantities[which == motion] for motion in range(len(data.MOTIONS))]
    variances = [group.var(axis=0) for group in groups if len(group) > 1]
    return np.sqrt(np.mean(variances, axis=0)) if variances else np.zeros(quantities.shape[1])


def agreement(made: UInt8[np.ndarray, "T H W 3"], reference: UInt8[np.ndarray, "T H W 3"]) -> float:
    """PSNR in dB between two clips made from the same noise."""
    error = np.mean(np.square(made.astype(np.float32) - reference.astype(np.float32)))
    return 10.0 * float(np.log10(255.0**2 / max(float(error), 0.1)))
