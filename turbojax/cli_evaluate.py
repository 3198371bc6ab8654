"""`turbojax evaluate`: what the clips of a small model show, read back by the oracle."""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any


def add_arguments(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "evaluate",
        help="measure what a small model's clips show",
        description="Make clips of every colour, shape and motion with several seeds, and read them back.",
    )
    add = parser.add_argument
    add("--model", default="tiny", help="a shipped model or a folder of the same kind (default: tiny)")
    add("--out", type=Path, required=True, metavar="DIR", help="results.jsonl, summary.json and sheet.png go here")
    add("--seeds", type=int, default=7, metavar="N", help="clips of each of the 48 prompts (default: 7)")
    add("--steps", type=int, metavar="N")
    add("--sampler", metavar="NAME", help="rcm-sde, rcm-ode, unipc or euler")
    add("--attention", metavar="KIND", help="dense, sage, sla or sagesla")
    add("--topk", type=float, metavar="F")
    add("--quant", metavar="KIND", help="w8a8 or none")
    add("--guidance", type=float, metavar="G")
    add("--batch-size", type=int, default=8, metavar="N")


def run(args: argparse.Namespace) -> int:
    """Generate, read, write; prints the summary."""
    from turbojax.errors import UserError
    from turbojax.host_memory import keep_freed_memory

    if args.seeds < 1:
        raise UserError(f"--seeds must be at least 1, got {args.seeds}")
    keep_freed_memory()
    from dataclasses import asdict

    from turbojax.pipeline import Pipeline
    from turbojax.train.data import COMBINATIONS
    from turbojax.train.evaluate import prompt_of, score, summarise
    from turbojax.video import Video, contact_sheet

    names = ("steps", "sampler", "attention", "topk", "quant", "guidance", "batch_size")
    options = {name: getattr(args, name) for name in names}
    pipeline = Pipeline.load(args.model)
    wanted = {prompt_of(c): c for c in COMBINATIONS}
    begun = time.perf_counter()
    args.out.mkdir(parents=True, exist_ok=True)
    scores, shown = [], []
    with (args.out / "results.jsonl.partial").open("w") as log:
        for video in pipeline.generate_each(list(wanted), seed=range(args.seeds), **options):
            prompt, seed = video.metadata["prompt"], video.metadata["seed"]
            scores.append(score(video.frames, wanted[prompt], seed))
            print(json.dumps(asdict(scores[-1])), file=log, flush=True)
            if seed == 0:
                shown.append(video.frames)
    os.replace(args.out / "results.jsonl.partial", args.out / "results.jsonl")
    summary = {"model": args.model, "settings": {k: v for k, v in options.items() if v is not None}}
    summary |= summarise(scores) | {"seconds": round(time.perf_counter() - begun, 1)}
    (args.out / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    Video(contact_sheet(shown, columns=5)[None], fps=1).save(args.out / "sheet.png")
    print(json.dumps(summary, indent=2))
    return 0
