"""`turbojax convert`, `inspect`, `export` and `merge`: argument registration and dispatch."""

from __future__ import annotations

import argparse
from pathlib import Path

from turbojax.errors import UserError

_DTYPES = ("float32", "bfloat16")


def add_arguments(subparsers: argparse._SubParsersAction) -> None:
    """Register the four commands."""
    _convert_arguments(subparsers.add_parser("convert", help="convert PyTorch checkpoints"))
    inspect = subparsers.add_parser("inspect", help="say what a checkpoint is and what it would become")
    inspect.add_argument("path", metavar="FILE_OR_DIR")
    export = subparsers.add_parser("export", help="write a converted component as .safetensors for PyTorch")
    export.add_argument("source", metavar="DIR", help="a converted component, or any checkpoint")
    formats = ("wan", "diffusers", "turbodiffusion")
    export.add_argument("--format", choices=formats, default="wan", help="who is to read it (default: wan)")
    export.add_argument("--out", required=True, metavar="FILE.safetensors")
    export.add_argument("--dtype", choices=(*_DTYPES, "float16"), help="of all float tensors (default: as kept)")
    export.add_argument("--overwrite", action="store_true", help="replace FILE if it is there")
    merge = subparsers.add_parser("merge", help="base + weight * (target - target_base)")
    merge.add_argument("base", metavar="BASE")
    merge.add_argument("target_base", metavar="TARGET_BASE")
    merge.add_argument("target", metavar="TARGET")
    merge.add_argument("--weight", type=float, default=1.0, metavar="W", help="(default: 1.0)")
    _output_arguments(merge)


def _convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.description = "Convert one component (SOURCE), or with --dit a whole pipeline, without torch."
    parser.add_argument(
        "source",
        nargs="?",
        metavar="SOURCE",
        help="a checkpoint file or folder, kind and shape are inferred; or the folder of a whole published model",
    )
    for name, text in {
        "dit": "the DiT; the high-noise expert where there are two, or the folder that holds both",
        "dit-low": "the low-noise expert",
        "vae": "the VAE",
        "text-encoder": "the umT5 encoder",
        "tokenizer": "tokenizer.json or spiece.model, or their folder",
    }.items():
        parser.add_argument(f"--{name}", metavar="PATH", help=text)
    parser.add_argument("--model", metavar="NAME", help="preset that overrides the inferred shape")
    parser.add_argument("--prefix", help="of the wanted model, where one file holds several")
    parser.add_argument(
        "--dtype", choices=_DTYPES, help="cast what does not always stay float32 (default: as in the file)"
    )
    parser.add_argument(
        "--lora", action="append", default=[], metavar="FILE[:STRENGTH]", help="merge a LoRA (may be repeated)"
    )
    parser.add_argument(
        "--lora-low", action="append", default=[], metavar="FILE[:STRENGTH]", help="the same for the low-noise expert"
    )
    _output_arguments(parser)


def _output_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", required=True, metavar="DIR")
    parser.add_argument("--format", choices=("orbax", "safetensors"), default="orbax", help="(default: orbax)")
    parser.add_argument("--overwrite", action="store_true", help="replace DIR if it is there")


def run(args: argparse.Namespace) -> int:
    """Run the command that was parsed; prints what was done. Raises UserError."""
    return {"convert": _convert, "inspect": _inspect, "export": _export, "merge": _merge}[args.command](args)


def _convert(args: argparse.Namespace) -> int:
    from convert import convert_checkpoint, convert_pipeline
    from convert.inspect import inspect
    from convert.release import complete, is_release

    parts = {name: getattr(args, name) for name in ("dit", "dit_low", "vae", "text_encoder", "tokenizer")}
    given = [name for name, value in parts.items() if value is not None]
    common = {"dtype": args.dtype, "format": args.format, "overwrite": args.overwrite, "model": args.model}
    source = None if args.source is None else Path(args.source)
    release = source if source is not None and is_release(source) else None
    parts = complete(parts, release)
    if source is not None and release is None:
        if given or args.lora_low:
            option = (given or ["lora_low"])[0].replace("_", "-")
            raise UserError(
                f"SOURCE converts one component, but --{option} belongs to a pipeline: give one or the other"
            )
        convert_checkpoint(source, args.out, prefix=args.prefix, lora=_loras(args.lora), **common)
    else:
        missing = [name for name in ("dit", "vae", "text_encoder", "tokenizer") if parts[name] is None]
        if missing:
            wanted = ", ".join(f"--{name.replace('_', '-')}" for name in missing)
            raise UserError(
                f"a pipeline also needs {wanted}; {f'{args.source} lacks it' if release else 'or name one SOURCE'}"
            )
        if args.prefix is not None:
            raise UserError("--prefix belongs to a single SOURCE; convert that part alone first")
        loras = {"lora": _loras(args.lora), "lora_low": _loras(args.lora_low)}
        convert_pipeline(**parts, out=args.out, **loras, **common)
    print(inspect(args.out))
    return 0


def _loras(texts: list[str]) -> list[tuple[str, float]]:
    """FILE or FILE:STRENGTH."""
    pairs = []
    for text in texts:
        file, colon, number = text.rpartition(":")
        try:
            pairs.append((file, float(number)) if colon and not Path(text).exists() else (text, 1.0))
        except ValueError:
            pairs.append((text, 1.0))
    return pairs


def _inspect(args: argparse.Namespace) -> int:
    from convert.inspect import inspect

    print(inspect(args.path))
    return 0


def _export(args: argparse.Namespace) -> int:
    from convert import export_checkpoint

    export_checkpoint(args.source, args.out, format=args.format, dtype=args.dtype, overwrite=args.overwrite)
    print(f"{args.out}: {Path(args.out).stat().st_size / 1e6:.1f} MB in the names of {args.format}")
    return 0


def _merge(args: argparse.Namespace) -> int:
    from convert import merge_checkpoints
    from convert.inspect import inspect

    options = {"weight": args.weight, "format": args.format, "overwrite": args.overwrite}
    merge_checkpoints(args.base, args.target_base, args.target, args.out, **options)
    print(inspect(args.out))
    return 0
