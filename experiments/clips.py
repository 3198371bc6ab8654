"""Clips of one setting after another, always of the same prompts and seeds, read back by the oracle and kept as rows.

The small model's clips can be read (`turbojax/train/oracle.py`): colour, shape and motion, and how well an ideal clip
fits. Of any other model only what needs no oracle is measured: times, and how far a setting drifts from a reference.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8
from PIL import Image
from tqdm import tqdm

from experiments.records import Results, Row, name_of
from experiments.report import with_bootstrap, with_wilson, write_sheet
from turbojax.errors import UserError
from turbojax.image import resize_image
from turbojax.pipeline import Pipeline
from turbojax.pipeline_config import PipelineSpec, find_pipeline
from turbojax.train import evaluate, i2v_evaluate
from turbojax.video import contact_sheet

Frames = UInt8[np.ndarray, "T H W 3"]
TITLE = "the same two clips in every row, four frames each"


class Request(NamedTuple):
    """What a clip is asked to show. image: the first frame, for models that start from a picture."""

    prompt: str
    seed: int
    combination: evaluate.Combination
    image: UInt8[np.ndarray, "H W 3"] | None = None


# A batch of requests -> a clip of each, and the seconds a clip in the DiT and in the VAE.
Maker = Callable[[Sequence[Request]], tuple[Sequence[Frames], float, float]]


class Clips:
    """The clips of a grid: `measure` makes what is missing of a cell and returns its rows, one a clip."""

    def __init__(self, out: Path, model: str, *, clips: int, batch_size: int, shown: int = 2):
        """clips: of each cell, see `requests`. shown: how many of them are kept for contact sheets."""
        self.out, self.model, self.batch_size, self.shown = out, model, batch_size, shown
        self.results = Results(out / "results.jsonl")
        self.spec = find_pipeline(model).spec
        self.wanted = requests(self.spec, clips)
        self.readable = self.spec.config.preset in ("tiny", "tiny-i2v")

    @cached_property
    def pipeline(self) -> Pipeline:
        return Pipeline.load(self.model)

    def generate(self, pipeline: Pipeline | None = None, **options: Any) -> Maker:
        """A maker by `Pipeline.generate` with these options: a batch at once, or one by one from their pictures."""

        def make(batch: Sequence[Request]) -> tuple[list[Frames], float, float]:
            pipe = self.pipeline if pipeline is None else pipeline
            common = {"paired": True, "progress": False, **options}
            if self.spec.takes_image:
                made = [pipe.generate([r.prompt], seed=[r.seed], image=r.image, **common)[0] for r in batch]
                dit, vae = (float(np.mean([v.timings[part] for v in made])) for part in ("dit", "vae"))
            else:
                prompts, seeds = [r.prompt for r in batch], [r.seed for r in batch]
                made = pipe.generate(prompts, seed=seeds, batch_size=self.batch_size, **common)
                dit, vae = (made[0].timings[part] / self.batch_size for part in ("dit", "vae"))
            return [v.frames for v in made], dit, vae

        return make

    def measure(
        self, cell: Mapping[str, Any], make: Callable[[], Maker], reference: Mapping[str, Any] | None = None
    ) -> list[Row]:
        """One row a clip of the cell: what it shows (0 or 1), fit in dB, place, seconds; made once and kept.

        make: called only if clips are missing. reference: a cell measured before; psnr is the agreement with its clip.
        """
        key = {"model": self.model, **cell}
        rows = self.results.where(**key)
        if len(rows) >= len(self.wanted):
            return rows[: len(self.wanted)]
        self.results.drop(**key)
        compared = None if reference is None else self._frames(reference)
        frames, rows = [], []
        for clip, dit, vae in self._make(make(), name_of(cell)):
            index = len(frames)
            row: Row = {**key, "clip": index, "dit": round(dit, 4), "vae": round(vae, 4)}
            if self.readable:
                row |= read(clip, self.wanted[index])
            if compared is not None:
                row["psnr"] = round(evaluate.agreement(clip, compared[index]), 2)
            rows.append(row)
            frames.append(clip)
        strips = contact_sheet(frames[: self.shown], columns=4)
        self._write(cell, "png", lambda path: Image.fromarray(strips).save(path, format="png"))
        self._write(cell, "npz", lambda path: np.savez_compressed(path, frames=np.stack(frames)))
        self.results.add(rows)
        return rows

    def sheet(self, cells: Mapping[tuple[str, str], Mapping[str, Any]], title: str = TITLE) -> None:
        """Write clips.png: four frames each of the first clips of every cell, by (row, column) label.

        Leaves the file alone if a cell's clips are not there, as in a clone, where only the rows came along.
        """
        strips = {}
        for label, cell in cells.items():
            if not self._path(cell, "png").exists():
                return
            with Image.open(self._path(cell, "png")) as image:
                strips[label] = np.asarray(image.convert("RGB"))
        write_sheet(self.out / "clips.png", strips, title)

    def _make(self, make: Maker, name: str) -> Iterator[tuple[Frames, float, float]]:
        for start in tqdm(range(0, len(self.wanted), self.batch_size), desc=name, mininterval=2.0):
            batch = self.wanted[start : start + self.batch_size]
            clips, dit, vae = make(batch)
            for clip in clips[: len(batch)]:
                yield clip, dit, vae

    def _path(self, cell: Mapping[str, Any], suffix: str) -> Path:
        return self.out / "clips" / f"{name_of(cell)}.{suffix}"

    def _write(self, cell: Mapping[str, Any], suffix: str, write: Callable[[Path], Any]) -> None:
        path = self._path(cell, suffix)
        path.parent.mkdir(exist_ok=True)
        partial = path.with_name(f".{path.name}")
        write(partial)
        os.replace(partial, path)

    def _frames(self, cell: Mapping[str, Any]) -> UInt8[np.ndarray, "B T H W 3"]:
        path = self._path(cell, "npz")
        if not path.exists():
            raise UserError(f"no clips to compare with at {path}: give another --out, or delete {self.results.path}")
        with np.load(path) as stored:
            return stored["frames"]


def requests(spec: PipelineSpec, count: int) -> list[Request]:
    """`count` clips to ask of a model: balanced over the 48 prompts, or two prompts a drawn picture if it takes one."""
    if spec.takes_image:
        drawn = enumerate(i2v_evaluate.wanted(count))
        asked = [(seed, w.picture.render(), prompt, scene) for seed, w in drawn for prompt, scene in w.clips]
        return [Request(text, seed, (s.colour, s.shape, s.motion), image) for seed, image, text, s in asked]
    return [Request(evaluate.prompt_of(c), seed, c) for c, seed in evaluate.pairs(count)]


def read(frames: Frames, request: Request) -> Row:
    """What the oracle says of a clip, in few digits."""
    score = evaluate.score(frames, request.combination, request.seed, request.prompt)
    place = None if score.place is None else [round(x, 2) for x in score.place]
    shown = {name: int(getattr(score, name)) for name in evaluate.ACCURACIES}
    prompt = {"prompt": score.prompt, "seed": score.seed}
    row = {**prompt, **shown, "fit": round(score.fit, 2), "overlap": round(score.overlap, 3), "place": place}
    if request.image is not None:
        picture = resize_image(request.image, (frames.shape[2], frames.shape[1]))
        row["first frame"] = round(evaluate.agreement(frames[:1], picture[None]), 2)
    return row


def right(row: Row) -> bool:
    """Colour, shape and motion, all three."""
    return all(row[name] for name in evaluate.ACCURACIES)


def diversity(rows: Sequence[Row]) -> float:
    """Spread over seeds of place, size, speed and background, relative to that of drawn clips (1: as varied)."""
    places = [r["place"] and tuple(r["place"]) for r in rows]
    scores = [
        evaluate.Score(r["prompt"], r["seed"], False, True, True, True, 0.0, 0.0, place)
        for r, place in zip(rows, places, strict=True)
    ]
    return evaluate.diversity(scores)


def seconds(rows: Sequence[Row], part: str = "dit") -> float:
    """Seconds a clip in the fastest batch: what else the machine does can only add."""
    return float(np.min([row[part] for row in rows]))


def describe(rows: Sequence[Row], reference: Sequence[Row] | None = None) -> dict[str, Any]:
    """The columns of a table, with 95% intervals: Wilson's for shares, bootstrap for means.

    reference: rows of the same clips under another setting; fit is then also compared clip by clip.
    """
    columns: dict[str, Any] = {}
    if "fit" in rows[0]:
        columns["all right"] = with_wilson(sum(map(right, rows)), len(rows))
        columns["fit, dB"] = with_bootstrap([r["fit"] for r in rows])
        if reference is not None:
            changes = [r["fit"] - other["fit"] for r, other in zip(rows, reference, strict=True)]
            columns["change of fit"] = with_bootstrap(changes)
        if "first frame" in rows[0]:
            columns["first frame, dB"] = with_bootstrap([r["first frame"] for r in rows])
        else:
            columns["diversity"] = f"{diversity(rows):.2f}"
    if reference is not None:
        columns["agreement, dB"] = with_bootstrap([r["psnr"] for r in rows]) if "psnr" in rows[0] else "-"
    return columns | {"DiT s/clip": round(seconds(rows), 4), "VAE s/clip": round(seconds(rows, "vae"), 3)}
