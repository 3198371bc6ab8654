"""`turbojax plan`: a table of what a clip takes on a card, and a verdict."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from turbojax.errors import UserError
from turbojax.plan import DEVICES, Plan, gib, plan

_EXAMPLE = """\
Needs the aot extra and no GPU; takes a minute or so. Weights are counted in the form that they run in: int8 with
--quant w8a8. A preset is planned as its distilled checkpoint is sampled (rcm-sde, 4 steps, sagesla).

example: turbojax plan --model wan2.1-t2v-14b --size 1280x720 --device rtx5090 --quant w8a8
"""

_NOTE = (
    "Not counted: workspace of cuDNN and cuBLAS. Dense attention, of the text too, is planned as XLA's, not cuDNN's."
)


def add_arguments(subparsers: Any) -> None:
    from turbojax.cli_generate import _numbers, _size

    parser = subparsers.add_parser(
        "plan",
        help="say whether a clip fits on a card, without the card",
        description="Will it fit? Compiles the pipeline's programs for a named card and adds up their memory.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--model", required=True, help="a preset (wan2.1-t2v-14b, ...), a shipped model or a converted folder")
    add("--device", required=True, metavar="NAME", help=", ".join(DEVICES))
    add("--size", type=_size, metavar="WxH", help="pixels, multiples of 16")
    add("--frames", type=int, metavar="N", help="4n + 1")
    add("--steps", type=int, metavar="N", help="denoising steps")
    add("--sampler", metavar="NAME", help="rcm-sde, rcm-ode, unipc or euler")
    add("--attention", metavar="KIND", help="dense, sage, sla or sagesla")
    add("--topk", type=float, metavar="F", help="share of the key blocks that SLA keeps, in (0, 1]")
    add("--quant", metavar="KIND", help="w8a8 or none")
    add("--guidance", type=_numbers, metavar="G", help="1 = none; LOW,HIGH for the experts of Wan 2.2")
    add("--batch-size", type=int, default=1, metavar="N", help="clips made at once (default: 1)")
    add("--json", type=Path, metavar="FILE", help="write the plan here too")


def run(args: argparse.Namespace) -> int:
    """Exit code 0 if it fits, 1 if it does not."""
    if args.json is not None and not args.json.resolve().parent.is_dir():
        raise UserError(f"--json {args.json}: the folder {args.json.parent} does not exist; make it first")
    names = ("size", "frames", "steps", "sampler", "attention", "topk", "quant", "guidance", "batch_size")
    options = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    found = plan(args.model, args.device, **options)
    print(table(found))
    if args.json is not None:
        temporary = args.json.with_suffix(".part")
        temporary.write_text(found.to_json())
        temporary.rename(args.json)
    return 0 if found.fits else 1


def table(found: Plan) -> str:
    """The plan in lines: what was asked, each program, the verdict, what to change."""
    settings = found.settings
    width, height = settings["size"]
    attention = settings["attention"]
    asked = f"{width}x{height}, {settings['frames']} frames, {settings['sampler']} {settings['steps']} steps"
    head = f"{found.model} on {found.device}: {asked}, {attention['kind']}, quant {settings['quant']}"
    columns = ("", "weights", "inputs", "temporaries", "results", "alone")
    rows = [
        (
            part.name,
            *map(gib, (part.weights, part.inputs, part.temporaries, part.outputs, part.weights + part.working)),
        )
        for part in found.parts
    ]
    lines = [f"{name:14}" + "".join(f"{cell:>13}" for cell in cells) for name, *cells in (columns, *rows)]
    total = f"all weights on the card, programs one after the other: {gib(found.resident)}"
    return "\n".join([head, *lines, total, found.verdict(), *(f"  - {line}" for line in found.advice()), _NOTE])
