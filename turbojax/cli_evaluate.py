"""`turbojax evaluate`: what the clips of small models show, read back by the oracle, side by side."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from turbojax.errors import UserError
from turbojax.pipeline_config import find_pipeline

_OPTIONS: Mapping[str, type] = {
    "steps": int, "sampler": str, "attention": str, "topk": float, "quant": str, "guidance": float,
}  # fmt: skip
_MODELS = """\
A model may bring settings of its own, which go before the flags:
  turbojax evaluate --out DIR --model tiny --model tiny:steps=2 --model tiny-teacher:steps=4,guidance=1
"""


@dataclass(eq=False)
class Subject:
    """A model under a set of settings, and what was seen of it so far."""

    name: str
    model: str
    options: dict[str, Any]
    scores: list[Any] = field(default_factory=list)
    agreements: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    shown: list[Any] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)


def add_arguments(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "evaluate",
        help="measure what a small model's clips show",
        description="Make clips of every colour, shape and motion with several seeds, and read them back.",
        epilog=_MODELS,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--model", action="append", metavar="NAME[:SETTINGS]",
        help="a shipped model or a folder of the same kind; may be repeated (default: tiny)",
    )  # fmt: skip
    add(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="results.jsonl, summary.json, table.md and sheets go here",
    )
    add("--seeds", type=int, default=7, metavar="N", help="clips of each prompt (default: 7)")
    add("--prompts", type=Path, metavar="FILE", help="one a line, each a colour, shape and motion (default: all 48)")
    add(
        "--reference", default="tiny-teacher", metavar="NAME[:SETTINGS]",
        help="what every model is compared with, from the same noise; 'none': nothing (default: tiny-teacher)",
    )  # fmt: skip
    add("--steps", type=int, metavar="N")
    add("--sampler", metavar="NAME", help="rcm-sde, rcm-ode, unipc or euler")
    add("--attention", metavar="KIND", help="dense, sage, sla or sagesla")
    add("--topk", type=float, metavar="F")
    add("--quant", metavar="KIND", help="w8a8 or none")
    add("--guidance", type=float, metavar="G")
    add("--batch-size", type=int, default=8, metavar="N")


def run(args: argparse.Namespace) -> int:
    """Generate, read, write; prints the table. Raises UserError."""
    from turbojax.host_memory import keep_freed_memory

    if args.seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {args.seeds}")
    keep_freed_memory()
    flags = {name: getattr(args, name) for name in _OPTIONS if getattr(args, name) is not None}
    subjects = [subject(text, flags) for text in args.model or ["tiny"]]
    if any(find_pipeline(who.model).spec.takes_image for who in subjects):
        return _run_pictures(args, subjects)
    reference = None
    if args.reference != "none":
        wanted = subject(args.reference, {})
        same = [s for s in subjects if (s.model, s.options) == (wanted.model, wanted.options)]
        reference = same[0] if same else wanted
        if reference.name in [s.name for s in subjects if s is not reference]:
            reference.name += " (reference)"
    every = subjects if reference is None or reference in subjects else [reference, *subjects]
    prompts = read_prompts(args.prompts)
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "results.jsonl.partial").open("w") as log:
        for rows in measured(every, reference, prompts, args.seeds, args.batch_size):
            for row in rows:
                print(json.dumps(row), file=log, flush=True)
    os.replace(args.out / "results.jsonl.partial", args.out / "results.jsonl")
    write(args.out, every, reference)
    return 0


def _run_pictures(args: argparse.Namespace, subjects: Sequence[Subject]) -> int:
    """Image to video: freshly drawn pictures, as many pairs of picture and prompt as there would be clips."""
    from turbojax.train.data import COMBINATIONS
    from turbojax.train.i2v_evaluate import measure

    if len(subjects) > 1 or args.prompts:
        raise UserError("a model that takes a picture is measured alone, on prompts that fit its pictures")
    (who,) = subjects
    print(json.dumps(measure(who.model, args.out, len(COMBINATIONS) * args.seeds, 0, who.options), indent=2))
    return 0


def subject(text: str, flags: Mapping[str, Any]) -> Subject:
    """Parse NAME[:key=value,...]; the flags hold where it is silent. Raises UserError."""
    model, colon, listed = text.partition(":") if not Path(text).exists() else (text, "", "")
    options = dict(flags)
    for pair in listed.split(",") if colon else []:
        name, equals, value = pair.partition("=")
        if not equals or name not in _OPTIONS:
            raise UserError(f"--model {text}: {pair!r} is no setting; known: {', '.join(f'{n}=...' for n in _OPTIONS)}")
        try:
            options[name] = _OPTIONS[name](value)
        except ValueError as error:
            raise UserError(f"--model {text}: {name} cannot be {value!r}") from error
    return Subject(text, model, options)


def read_prompts(file: Path | None) -> dict[str, tuple[str, str, str]]:
    """Prompts and the (colour, shape, motion) that each asks for. Raises UserError for one that leaves a part open."""
    from turbojax.train.data import COLOURS, COMBINATIONS, MOTIONS, SHAPES
    from turbojax.train.evaluate import prompt_of

    if file is None:
        return {prompt_of(c): c for c in COMBINATIONS}
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except OSError as error:
        raise UserError(f"--prompts {file}: {error.strerror}") from error
    wanted = {}
    for prompt in filter(None, lines):
        words = re.findall(r"\w+", prompt.lower())
        named = [[word for word in words if word in known] for known in (COLOURS, SHAPES, MOTIONS)]
        if any(len(found) != 1 for found in named):
            raise UserError(f"--prompts {file}: {prompt!r} must name one colour, one shape and one motion")
        wanted[prompt] = (named[0][0], named[1][0], named[2][0])
    if not wanted:
        raise UserError(f"--prompts {file}: holds no prompt")
    return wanted


def measured(
    subjects: Sequence[Subject], reference: Subject | None, prompts: Mapping[str, Any], seeds: int, batch_size: int
) -> Iterator[list[dict[str, Any]]]:
    """Each prompt and seed by all subjects at once, so that no clip need be kept; yields what was seen of each."""
    from turbojax.pipeline import Pipeline
    from turbojax.train.evaluate import agreement, score

    pipelines = {model: Pipeline.load(model) for model in {s.model for s in subjects}}
    clips = [
        pipelines[s.model].generate_each(list(prompts), seed=range(seeds), batch_size=batch_size, **s.options)
        for s in subjects
    ]
    for videos in zip(*clips, strict=True):
        asked = None if reference is None else videos[subjects.index(reference)]
        rows = []
        for who, video in zip(subjects, videos, strict=True):
            prompt, seed = video.metadata["prompt"], video.metadata["seed"]
            who.settings = video.metadata["settings"]
            who.scores.append(score(video.frames, prompts[prompt], seed, prompt))
            who.seconds.append(video.timings["dit"] / batch_size)
            row = {"model": who.name, **asdict(who.scores[-1])}
            if asked is not None and who is not reference:
                who.agreements.append(agreement(video.frames, asked.frames))
                row["agreement"] = round(who.agreements[-1], 3)
            if seed == 0:
                who.shown.append(video.frames)
            rows.append(row)
        yield rows


def write(out: Path, subjects: Sequence[Subject], reference: Subject | None) -> None:
    """summary.json, table.md and a sheet of each subject into `out`; prints the table."""
    from turbojax.train.evaluate import compare, summarise
    from turbojax.video import Video, contact_sheet

    entries = []
    for number, who in enumerate(subjects):
        entry = {"model": who.name, "settings": who.settings, **summarise(who.scores, who.agreements or None)}
        entry["dit_seconds"] = round(sum(who.seconds) / len(who.seconds), 4)
        if reference is not None and who is not reference:
            entry["compared"] = compare(who.scores, reference.scores)
        entries.append(entry)
        Video(contact_sheet(who.shown, columns=5)[None], fps=1).save(out / f"sheet-{number}.png")
    summary = {"reference": None if reference is None else reference.name, "models": entries}
    (out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    text = table(entries)
    (out / "table.md").write_text(text)
    print(text, end="")


def table(entries: Sequence[Mapping[str, Any]]) -> str:
    """The entries of a summary as Markdown, 95% intervals in brackets."""
    head = ("model", "steps", "colour", "shape", "motion", "fit, dB", "agreement, dB", "diversity", "DiT, s a clip")

    def cell(entry: Mapping[str, Any], name: str, form: str) -> str:
        if name not in entry:
            return "-"
        low, high = entry[name + "_interval"]
        return f"{format(entry[name], form)} [{format(low, form)}, {format(high, form)}]"

    rows = [
        (
            entry["model"], str(entry["settings"]["steps"]),
            *(cell(entry, name, ".1%") for name in ("colour", "shape", "motion")),
            cell(entry, "fit", ".2f"), cell(entry, "agreement", ".2f"), cell(entry, "diversity", ".2f"),
            f"{entry['dit_seconds']:.3f}",
        )
        for entry in entries
    ]  # fmt: skip
    lines = ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(lines) + "\n"
