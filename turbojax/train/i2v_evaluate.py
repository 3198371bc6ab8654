"""How good are the clips of a small image-to-video model: they start from the picture, and do what the prompt says.

Pictures are drawn fresh. Half of them are of the kinds that training saw, a quarter have the shape where no training
picture had it, and a quarter have it larger or smaller than any.

    turbojax evaluate --model FOLDER --out DIR, or with a count of its own:
    python -m turbojax.train.i2v_evaluate --model FOLDER --pairs 240 --out DIR
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from turbojax.train import data
from turbojax.train.evaluate import wilson
from turbojax.train.i2v_data import NEW_RADII, RADIUS, Pictured, pictures
from turbojax.train.oracle import read

KINDS = ("known", "new place", "known", "new size")
# What people type beside a picture, leaning on it more or less.
PROMPTS = ("the {shape} moves {motion}", "a {colour} {shape} moving {motion}", "the {colour} {shape} moves {motion}")


@dataclass(frozen=True)
class Wanted:
    """A picture, the prompts to try on it (each with the scene that it asks for), and how unlike training it is."""

    picture: Pictured
    clips: tuple[tuple[str, data.Scene], ...]
    kind: str


@dataclass(frozen=True)
class Score:
    """One clip. first_frame: PSNR in dB of the first frame against the picture; fit: render-fit, in dB."""

    prompt: str
    seed: int
    kind: str
    held_out: bool
    first_frame: float
    colour: bool
    shape: bool
    motion: bool
    fit: float
    overlap: float


def wanted(count: int, seed: int = 0) -> list[Wanted]:
    """Pictures with two prompts each (one, where only one motion has room), `count` pairs in all."""
    rng = np.random.default_rng(seed)
    made: list[Wanted] = []
    pairs = 0
    while pairs < count:
        kind = KINDS[len(made) % len(KINDS)]
        radius = NEW_RADII[len(made) // len(KINDS) % 2] if kind == "new size" else RADIUS
        ranges: dict[str, Any] = {"combinations": data.COMBINATIONS, "new_places": kind == "new place"}
        (picture,) = pictures(int(rng.integers(2**31)), 1, **{**ranges, "radius": radius})
        chosen = [picture.clips[i] for i in rng.permutation(len(picture.clips))[: min(2, count - pairs)]]
        clips = [(data.caption(clip, PROMPTS[(pairs + i) % len(PROMPTS)]), clip) for i, clip in enumerate(chosen)]
        made.append(Wanted(picture, tuple(clips), kind))
        pairs += len(clips)
    return made


def evaluate(pipeline: Any, requests: Sequence[Wanted], **options: Any) -> Iterator[tuple[Score, Any]]:
    """Generate each pair with the pipeline and score it; yields (Score, Video). options: `Pipeline.generate`'s."""
    options = {"batch_size": 2, "progress": False, **options}
    for seed, request in enumerate(requests):
        image = request.picture.render()
        prompts = [prompt for prompt, _ in request.clips]
        videos = pipeline.generate_each(prompts, seed=seed, image=image, **options)
        for (prompt, scene), video in zip(request.clips, videos, strict=True):
            yield score(video.frames, image, scene, prompt, seed, request.kind), video


def score(
    frames: UInt8[np.ndarray, "T H W 3"],
    image: UInt8[np.ndarray, "H W 3"],
    scene: data.Scene,
    prompt: str,
    seed: int,
    kind: str,
) -> Score:
    """Read a clip and compare it with the picture and with what was asked for."""
    seen = read(frames)
    error = np.mean(np.square(frames[0].astype(np.float32) - image.astype(np.float32)))
    return Score(
        prompt, seed, kind, (scene.colour, scene.shape, scene.motion) in data.HELD_OUT,
        10.0 * math.log10(255.0**2 / max(float(error), 0.1)),
        seen.colour == scene.colour, seen.shape == scene.shape, seen.motion == scene.motion, seen.fit, seen.overlap,
    )  # fmt: skip


def summarise(scores: Sequence[Score]) -> dict[str, Any]:
    """First-frame PSNR (mean, worst), accuracies with 95% intervals, render-fit; then the accuracies by kind."""
    if not scores:
        raise ValueError("no clips to summarise")
    first = [s.first_frame for s in scores]
    out: dict[str, Any] = {"clips": len(scores), "first_frame": round(float(np.mean(first)), 2)}
    out["first_frame_worst"] = round(min(first), 2)
    parts = {"": scores, **{k.replace(" ", "_") + "_": [s for s in scores if s.kind == k] for k in set(KINDS)}}
    parts["held_out_"] = [s for s in scores if s.held_out]
    for name, chosen in sorted(parts.items()):
        if name and chosen:
            out[name + "clips"] = len(chosen)
        for what in ("colour", "shape", "motion"):
            if chosen:
                hits = sum(getattr(s, what) for s in chosen)
                out[name + what] = round(hits / len(chosen), 4)
                out[name + what + "_interval"] = [round(x, 4) for x in wilson(hits, len(chosen))]
    out["fit"] = round(float(np.mean([s.fit for s in scores])), 3)
    out["overlap"] = round(float(np.mean([s.overlap for s in scores])), 4)
    return out


_OPTIONS: Mapping[str, type] = {
    "steps": int,
    "sampler": str,
    "attention": str,
    "topk": float,
    "quant": str,
    "guidance": float,
}


def measure(model: str, out: Path, pairs: int, seed: int, options: Mapping[str, Any]) -> dict[str, Any]:
    """Make and score the clips; writes results.jsonl, summary.json and sheet.png to `out` and returns the summary."""
    from turbojax.errors import UserError
    from turbojax.host_memory import keep_freed_memory

    keep_freed_memory()
    from turbojax.pipeline import Pipeline
    from turbojax.video import Video, contact_sheet

    pipeline = Pipeline.load(model)
    if not pipeline.spec.takes_image:
        raise UserError(f"model {model} takes no picture: measure it with `turbojax evaluate`")
    begun = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    scores, shown = [], []
    with (out / "results.jsonl.partial").open("w") as log:
        for scored, video in evaluate(pipeline, wanted(pairs, seed), **options):
            scores.append(scored)
            print(json.dumps(asdict(scored)), file=log, flush=True)
            shown += [video.frames] if len(shown) < 48 else []
    os.replace(out / "results.jsonl.partial", out / "results.jsonl")
    summary = {"model": model, "settings": dict(options), **summarise(scores)}
    summary["seconds"] = round(time.perf_counter() - begun, 1)
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    Video(contact_sheet(shown, columns=5)[None], fps=1).save(out / "sheet.png")
    return summary


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure a small image-to-video model on freshly drawn pictures.")
    parser.add_argument("--model", required=True, help="an image-to-video pipeline's name or folder")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="results, summary and sheet go here")
    parser.add_argument("--pairs", type=int, default=240, metavar="N", help="pictures and prompts (default: 240)")
    parser.add_argument("--seed", type=int, default=0, help="of the pictures")
    for name, kind in _OPTIONS.items():
        parser.add_argument(f"--{name}", type=kind)
    args = parser.parse_args(argv)
    options = {name: getattr(args, name) for name in _OPTIONS if getattr(args, name) is not None}
    print(json.dumps(measure(args.model, args.out, args.pairs, args.seed, options), indent=2))


if __name__ == "__main__":
    main()
