"""Reads a clip back: which shape, of which colour, moves where; and how well the ideal clip of that kind fits it.

Works on any clip of one bright shape on a plain background, generated or drawn. The reading is exact on drawn clips.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

from turbojax.train.data import COLOURS, MOTIONS, SHAPES, Scene, coverage, render

BORDER = 3  # pixels of the frame's edge that show the background
MIN_AREA = 80.0  # pixels: less than a circle of radius 5 is nothing
MIN_TRAVEL = 8.0  # pixels over the clip: less is standing still
MIN_OVERLAP = 0.7  # of the best template; a circle and a triangle of equal area overlap by 0.70


@dataclass(frozen=True)
class Reading:
    """What a clip shows; "none" where nothing can be read.

    overlap: intersection over union with the shape of that kind, area and place, averaged over frames.
    fit: PSNR in dB of the clip against the ideal clip of what was read: its blur, halo, wobble and flicker.
    scene: that ideal clip, or None if there is no shape at all.
    """

    colour: str
    shape: str
    motion: str
    overlap: float
    fit: float
    scene: Scene | None


def read(frames: UInt8[np.ndarray, "T H W 3"]) -> Reading:
    """Read a clip of square frames."""
    video = frames.astype(np.float32)
    count, size = video.shape[:2]
    background, foreground = _two_colours(video)
    axis = foreground - background
    # How far each pixel lies on the way from the background's colour to the shape's.
    level = np.clip((video - background) @ axis / max(float(axis @ axis), 1e-6), 0.0, 1.0)
    # Pale noise far from the shape would pull its centroid.
    level = np.where(level > 0.2, level, 0.0)
    area = level.sum((1, 2))
    if np.linalg.norm(axis) < 40.0 or np.median(area) < MIN_AREA:
        return Reading("none", "none", "none", 0.0, 0.0, None)

    grid = np.arange(size, dtype=np.float32) + 0.5
    weight = np.maximum(area, 1e-6)
    centroid = np.stack([(level.sum(1) @ grid) / weight, (level.sum(2) @ grid) / weight], axis=1)
    time = np.arange(count) - (count - 1) / 2
    velocity = time @ (centroid - centroid.mean(0)) / (time @ time)
    motion = _motion(velocity, count)

    radius = float(np.sqrt(np.median(area) / np.pi))
    colour = min(COLOURS, key=lambda name: float(np.linalg.norm(np.asarray(COLOURS[name]) - foreground)))
    masks = level > 0.5
    overlaps = {shape: _overlap(masks, shape, np.sqrt(area / np.pi), centroid) for shape in SHAPES}
    shape = max(overlaps, key=lambda name: overlaps[name])

    along = np.asarray(MOTIONS.get(motion, (0, 0)), np.float32)
    x, y = centroid.mean(0)
    red, green, blue = (int(c) for c in np.clip(np.rint(foreground), 0, 255))
    scene = Scene(
        colour, shape, motion if motion in MOTIONS else "right", radius, (float(x), float(y)),
        float(velocity @ along), int(np.rint(background.mean())), (red, green, blue),
    )  # fmt: skip
    ideal = render(scene, frames=count, size=size).astype(np.float32)
    error = float(np.mean(np.square(ideal - video)))
    return Reading(
        colour,
        shape if overlaps[shape] >= MIN_OVERLAP else "none",
        motion,
        overlaps[shape],
        10.0 * float(np.log10(255.0**2 / max(error, 0.1))),
        scene,
    )


def _two_colours(video: Float[np.ndarray, "T H W 3"]) -> tuple[Float[np.ndarray, "3"], Float[np.ndarray, "3"]]:
    """The background's colour, from the frame's edge, and the shape's, from the pixels farthest from it."""
    edge = np.ones(video.shape[1:3], bool)
    edge[BORDER:-BORDER, BORDER:-BORDER] = False
    background = np.median(video[:, edge].reshape(-1, 3), axis=0)
    distance = np.linalg.norm(video - background, axis=-1)
    # Half of the way to a robust maximum: the inside of the shape, without its soft edge.
    inside = distance >= 0.75 * np.quantile(distance, 0.98)
    return background, np.median(video[inside].reshape(-1, 3), axis=0)


def _motion(velocity: Float[np.ndarray, "2"], frames: int) -> str:
    travel = velocity * (frames - 1)
    if np.abs(travel).max() < MIN_TRAVEL:
        return "still"
    return max(MOTIONS, key=lambda name: float(np.dot(MOTIONS[name], travel)))


def _overlap(
    masks: np.ndarray, shape: str, radius: Float[np.ndarray, "T"], centroid: Float[np.ndarray, "T 2"]
) -> float:
    """Mean intersection over union with the shape of each frame's area and centroid."""
    size = masks.shape[1]
    scores = []
    for mask, r, centre in zip(masks, radius, centroid, strict=True):
        ideal = coverage(shape, float(r), centre[None], (0, size), (0, size))[0] > 0.5
        union = np.count_nonzero(mask | ideal)
        scores.append(np.count_nonzero(mask & ideal) / union if union else 0.0)
    return float(np.mean(scores))
