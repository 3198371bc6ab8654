"""Captioned clips of moving coloured shapes, drawn from a seed: what the small model learns from.

A `Scene` is everything a clip shows; `render` draws it, `caption` describes it.  Nothing is stored:
the same seed gives the same clips on every machine.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

SIZE, FRAMES = 128, 17

# Far apart in hue, all brighter than any background.
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (228, 42, 42),
    "green": (44, 186, 68),
    "blue": (48, 92, 236),
    "yellow": (242, 214, 48),
}
SHAPES: tuple[str, ...] = ("circle", "square", "triangle")
MOTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}

# Never trained on: every colour, motion and shape occurs in it, no two together in more than one row.
HELD_OUT = frozenset(
    {
        ("red", "square", "up"),
        ("red", "triangle", "left"),
        ("green", "circle", "down"),
        ("green", "triangle", "right"),
        ("blue", "circle", "left"),
        ("blue", "square", "right"),
        ("yellow", "circle", "up"),
        ("yellow", "square", "down"),
    }
)
COMBINATIONS = tuple(itertools.product(COLOURS, SHAPES, MOTIONS))
TRAINED = tuple(c for c in COMBINATIONS if c not in HELD_OUT)

# The first is what people type; the others teach that words may be missing, as they are beside a picture.
TEMPLATES = (
    ("a {colour} {shape} moving {motion}", 0.60),
    ("the {colour} {shape} moves {motion}", 0.14),
    ("{colour} {shape} moving {motion}", 0.06),
    ("a {shape} moving {motion}", 0.05),
    ("the {shape} moves {motion}", 0.05),
    ("a {colour} shape moving {motion}", 0.05),
    ("a {colour} {shape}", 0.05),
)


@dataclass(frozen=True)
class Scene:
    """One clip. Lengths in pixels of a `SIZE` x `SIZE` frame; `radius` is the equal-area circle's."""

    colour: str
    shape: str
    motion: str
    radius: float
    centre: tuple[float, float]  # x, y of the shape's centroid half-way through the clip
    speed: float  # pixels a frame
    background: int  # grey level, 0-255
    rgb: tuple[int, int, int]

    def positions(self, frames: int = FRAMES) -> Float[np.ndarray, "frames 2"]:
        """Centroid (x, y) in every frame."""
        steps = (np.arange(frames) - (frames - 1) / 2)[:, None]
        return np.asarray(self.centre) + steps * self.speed * np.asarray(MOTIONS[self.motion])


# Outlines around the centroid, as corner directions, in units of the equal-area circle's radius.
_SQUARE = np.sqrt(np.pi) / 2 * np.array([[-1, -1], [1, -1], [1, 1], [-1, 1]])
_TRIANGLE = np.sqrt(4 * np.pi / np.sqrt(27)) * np.array([[0, -1], [np.sqrt(0.75), 0.5], [-np.sqrt(0.75), 0.5]])
OUTLINES = {"square": _SQUARE, "triangle": _TRIANGLE}


def extent(shape: str, radius: float) -> tuple[float, float, float, float]:
    """How far a shape reaches from its centroid: left, right, up, down, in pixels."""
    if shape == "circle":
        return radius, radius, radius, radius
    corners = OUTLINES[shape] * radius
    (left, up), (right, down) = -corners.min(0), corners.max(0)
    return left, right, up, down


def sample_scene(
    rng: np.random.Generator,
    combination: tuple[str, str, str],
    *,
    radius: tuple[float, float] = (18.0, 28.0),
    travel: tuple[float, float] = (30.0, 52.0),
    size: int = SIZE,
    frames: int = FRAMES,
) -> Scene:
    """Draw size, place, speed and shades for (colour, shape, motion); the shape never leaves the frame."""
    colour, shape, motion = combination
    # A triangle of equal area reaches 1.56 radii: keep all shapes about as tall as each other.
    r = rng.uniform(*radius) * (0.85 if shape == "triangle" else 1.0)
    distance = rng.uniform(*travel)
    left, right, up, down = extent(shape, r)
    dx, dy = np.abs(MOTIONS[motion]) * distance / 2
    margin = 2.0
    x = rng.uniform(left + dx + margin, size - right - dx - margin)
    y = rng.uniform(up + dy + margin, size - down - dy - margin)
    shade = np.clip(np.asarray(COLOURS[colour]) + rng.integers(-10, 11, 3), 0, 255)
    return Scene(
        colour,
        shape,
        motion,
        float(r),
        (float(x), float(y)),
        float(distance / (frames - 1)),
        int(rng.integers(12, 56)),
        (int(shade[0]), int(shade[1]), int(shade[2])),
    )


def coverage(
    shape: str,
    radius: float,
    centres: Float[np.ndarray, "T 2"],
    rows: tuple[int, int] = (0, SIZE),
    columns: tuple[int, int] = (0, SIZE),
) -> Float[np.ndarray, "T rows columns"]:
    """How much of each pixel the shape covers, 0-1: signed distance, clipped to a pixel around the edge."""
    dx = np.arange(*columns, dtype=np.float32)[None, None, :] + 0.5 - centres[:, 0, None, None].astype(np.float32)
    dy = np.arange(*rows, dtype=np.float32)[None, :, None] + 0.5 - centres[:, 1, None, None].astype(np.float32)
    if shape == "circle":
        distance = np.sqrt(dx * dx + dy * dy) - np.float32(radius)
    else:
        corners = OUTLINES[shape]
        edges = np.roll(corners, -1, 0) - corners
        # Corners run clockwise on screen, so the outward normal of (ex, ey) is (ey, -ex).
        normals = np.stack([edges[:, 1], -edges[:, 0]], 1) / np.linalg.norm(edges, axis=1, keepdims=True)
        offsets = (normals * corners).sum(1) * radius  # radius 0, of a frame without a shape, covers nothing
        distance = np.full(np.broadcast_shapes(dx.shape, dy.shape), -np.inf, np.float32)
        for (nx, ny), offset in zip(normals.astype(np.float32), offsets.astype(np.float32), strict=True):
            np.maximum(distance, nx * dx + (ny * dy - offset), out=distance)
    return np.clip(0.5 - distance, 0.0, 1.0)


def render(scene: Scene, *, frames: int = FRAMES, size: int = SIZE) -> UInt8[np.ndarray, "frames size size 3"]:
    """Draw a scene, edges antialiased."""
    centres = scene.positions(frames)
    left, right, up, down = extent(scene.shape, scene.radius)
    # Only the part of the frame that the shape ever touches is worked on.
    low = np.floor(centres.min(0) - np.array([left, up])).astype(int) - 1
    high = np.ceil(centres.max(0) + np.array([right, down])).astype(int) + 1
    (x0, y0), (x1, y1) = np.clip(low, 0, size).tolist(), np.clip(high, 0, size).tolist()
    cover = coverage(scene.shape, scene.radius, centres, (y0, y1), (x0, x1))[..., None]
    colour = np.asarray(scene.rgb, np.float32) - np.float32(scene.background)
    video = np.full((frames, size, size, 3), scene.background, np.uint8)
    video[:, y0:y1, x0:x1] = np.rint(np.float32(scene.background) + cover * colour)
    return video


def caption(scene: Scene, template: str = TEMPLATES[0][0]) -> str:
    return template.format(colour=scene.colour, shape=scene.shape, motion=scene.motion)


def sample_caption(rng: np.random.Generator, scene: Scene) -> str:
    """One of `TEMPLATES`, drawn by weight."""
    weights = np.asarray([w for _, w in TEMPLATES])
    return caption(scene, TEMPLATES[rng.choice(len(TEMPLATES), p=weights / weights.sum())][0])


def clips(
    seed: int,
    count: int,
    combinations: Sequence[tuple[str, str, str]] = TRAINED,
    **ranges: Any,
) -> list[Scene]:
    """`count` scenes of the given combinations, each as often as the others; ranges: `sample_scene`'s."""
    rng = np.random.default_rng(seed)
    order = [combinations[i % len(combinations)] for i in range(count)]
    rng.shuffle(order)
    return [sample_scene(rng, c, **ranges) for c in order]


def to_float(video: UInt8[np.ndarray, "... 3"]) -> Float[np.ndarray, "... 3"]:
    """uint8 to [-1, 1]."""
    return video.astype(np.float32) / 127.5 - 1.0


def to_uint8(video: Float[np.ndarray, "... 3"]) -> UInt8[np.ndarray, "... 3"]:
    """[-1, 1] to uint8, rounded and clipped."""
    return np.clip(np.rint((np.asarray(video, np.float32) + 1.0) * 127.5), 0, 255).astype(np.uint8)
