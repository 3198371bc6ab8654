"""How good are the clips of a small model: what they show, how clean it is, and how much they vary.

Every prompt names a colour, a shape and a motion, so that `oracle.read` can say whether the clip shows them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import UInt8

from turbojax.train import data
from turbojax.train.oracle import read

Combination = tuple[str, str, str]


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


def score(frames: UInt8[np.ndarray, "T H W 3"], combination: Combination, seed: int) -> Score:
    """Read a clip and compare it with what was asked for."""
    seen = read(frames)
    colour, shape, motion = combination
    scene = seen.scene
    place = None if scene is None else (*scene.centre, scene.radius, scene.speed, float(scene.background))
    return Score(
        prompt_of(combination), seed, combination in data.HELD_OUT,
        seen.colour == colour, seen.shape == shape, seen.motion == motion, seen.fit, seen.overlap, place,
    )  # fmt: skip


def evaluate(pipeline: Any, wanted: Sequence[tuple[Combination, int]], **options: Any) -> Iterator[tuple[Score, Any]]:
    """Generate each pair with the pipeline and score it; yields (Score, Video). options: `Pipeline.generate`'s."""
    for combination, seed in wanted:
        video = pipeline.generate(prompt_of(combination), seed=seed, progress=False, **options)
        yield score(video.frames, combination, seed), video


def summarise(scores: Sequence[Score]) -> dict[str, Any]:
    """Accuracies with 95% intervals, render-fit with its standard error, diversity against drawn clips."""
    if not scores:
        raise ValueError("no clips to summarise")
    out: dict[str, Any] = {"clips": len(scores)}
    for part, chosen in (("", scores), ("held_out_", [s for s in scores if s.held_out])):
        if not chosen:
            continue
        for name in ("colour", "shape", "motion"):
            hits = sum(getattr(s, name) for s in chosen)
            out[part + name] = round(hits / len(chosen), 4)
            out[part + name + "_interval"] = [round(x, 4) for x in wilson(hits, len(chosen))]
    fits = np.asarray([s.fit for s in scores])
    out["fit"], out["fit_error"] = round(float(fits.mean()), 3), round(float(fits.std() / math.sqrt(len(fits))), 3)
    out["overlap"] = round(float(np.mean([s.overlap for s in scores])), 4)
    out["diversity"] = round(diversity(scores), 3)
    return out


def wilson(hits: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95% interval of a proportion: honest at 0 and 1, where the normal one has no width."""
    p = hits / count
    centre, spread = p + z * z / (2 * count), z * math.sqrt(p * (1 - p) / count + z * z / (4 * count * count))
    return (max(0.0, (centre - spread) / (1 + z * z / count)), min(1.0, (centre + spread) / (1 + z * z / count)))


def diversity(scores: Iterable[Score]) -> float:
    """Spread over seeds of place, size, speed and background for one motion, relative to that of drawn clips.

    1: as varied as the training clips; 0: every seed gives the same clip. Averaged over the five quantities.
    """
    drawn = [(s.motion, (*s.centre, s.radius, s.speed, float(s.background))) for s in data.clips(99, 960)]
    made = [(s.prompt.rsplit(" ", 1)[1], s.place) for s in scores if s.place is not None]
    ratios = [a / b for a, b in zip(_spread(made), _spread(drawn), strict=True)]
    return float(np.mean(ratios))


def _spread(places: Sequence[tuple[str, Sequence[float]]]) -> list[float]:
    """Standard deviation of each quantity inside a motion, pooled over the motions."""
    groups: dict[str, list[Sequence[float]]] = {}
    for motion, place in places:
        groups.setdefault(motion, []).append(place)
    variances = [np.var(np.asarray(group), axis=0) for group in groups.values() if len(group) > 1]
    if not variances:
        return [0.0] * 5
    return [float(v) for v in np.sqrt(np.mean(variances, axis=0))]


def agreement(made: UInt8[np.ndarray, "T H W 3"], reference: UInt8[np.ndarray, "T H W 3"]) -> float:
    """PSNR in dB between two clips made from the same noise."""
    error = np.mean(np.square(made.astype(np.float32) - reference.astype(np.float32)))
    return 10.0 * float(np.log10(255.0**2 / max(float(error), 0.1)))
