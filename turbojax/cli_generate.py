"""`turbojax generate`: prompts in, files out."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from turbojax.errors import UserError

if TYPE_CHECKING:
    from turbojax.video import Video

_EXAMPLE = """\
Every prompt is made with every seed; several clips are numbered: out-000.mp4, out-001.mp4, ...
What is not given comes from the model's own pipeline.json.

example: turbojax generate "a red circle moving right" --seed 0,1,2 --out circle.mp4
"""


def add_arguments(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "generate",
        help="turn a prompt into a video",
        description="Turn prompts into videos.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("prompt", nargs="+", metavar="PROMPT", help="what the clip shows; several prompts give several clips")
    add("--model", default="tiny", help="a shipped model or a folder that `turbojax convert` made (default: tiny)")
    add("--out", type=Path, default=Path("out.mp4"), metavar="FILE", help=".mp4, .gif or .png sheet (out.mp4)")
    add("--seed", type=_seeds, default=[0], metavar="N,...", help="one clip a seed (default: 0)")
    add("--steps", type=int, metavar="N", help="denoising steps: 1 to 4 for rcm-*, 1 to 1000 for unipc and euler")
    add("--sampler", metavar="NAME", help="rcm-sde, rcm-ode, unipc or euler")
    add("--attention", metavar="KIND", help="dense, sage, sla or sagesla")
    add("--topk", type=float, metavar="F", help="share of the key blocks that SLA keeps, in (0, 1]")
    add("--quant", metavar="KIND", help="w8a8: INT8 weights and activations in the linear layers; none")
    add("--guidance", type=_numbers, metavar="G", help="1 = none; LOW,HIGH for the experts of Wan 2.2")
    add("--negative-prompt", metavar="TEXT", help="what guidance steers away from")
    add("--image", type=Path, metavar="FILE", help="first frame, for image-to-video models")
    add("--size", type=_size, metavar="WxH", help="pixels, multiples of 16; adaptive: the shape of --image")
    add("--frames", type=int, metavar="N", help="4n + 1")
    add("--shift", type=float, metavar="F", help="noise schedule of unipc and euler: above 1 dwells on high noise")
    add("--sigma-max", type=float, metavar="F", help="where rcm-* starts, in EDM's sigma")
    add("--offload", action="store_true", help="keep the DiTs in host memory, each on the device only for its steps")
    add("--mid-times", type=_angles, metavar="T,...", help="angles of the later steps of rcm-*: pi/2 is noise, 0 none")
    add("--batch-size", type=int, default=1, metavar="N", help="clips made at once (default: 1)")
    add("--no-progress", action="store_true", help="no progress bar")


def run(args: argparse.Namespace) -> int:
    """Check everything, then load, generate and write one clip after the other."""
    started = time.perf_counter()
    from turbojax.image import open_image
    from turbojax.pipeline_config import find_pipeline
    from turbojax.settings import check_image, check_prompts, check_seeds, resolve
    from turbojax.video import check_output

    prompts, seeds = check_prompts(args.prompt), check_seeds(args.seed)
    outputs = _numbered(args.out, len(prompts) * len(seeds))
    check_output(outputs[-1])  # the longest name of them
    names = ("steps", "sampler", "guidance", "negative_prompt", "shift", "sigma_max", "attention", "topk", "quant")
    options = {name: getattr(args, name) for name in (*names, "mid_times", "size", "frames", "batch_size")}
    folder = find_pipeline(args.model)
    check_image(folder.spec, args.image is not None)
    image = None if args.image is None else open_image(args.image)
    resolve(folder.spec, **options, picture=None if image is None else (image.shape[1], image.shape[0]))

    import jax

    from turbojax.compilation_cache import use_compilation_cache
    from turbojax.host_memory import keep_freed_memory
    from turbojax.pipeline import Pipeline

    use_compilation_cache()
    if jax.default_backend() == "cpu":
        keep_freed_memory()
    pipeline = Pipeline.load(folder, offload=args.offload)
    clips = pipeline.generate_each(prompts, seed=seeds, image=image, progress=not args.no_progress, **options)
    try:
        for path, clip in zip(outputs, clips, strict=True):
            begun = time.perf_counter()
            clip.save(path)
            _report(path, clip, time.perf_counter() - begun)
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise UserError(
            "not enough memory for this clip: ask for a smaller --size or fewer --frames, or try --offload; "
            "`turbojax plan` tells what fits on a card"
        ) from error
    print(f"load {pipeline.load_seconds:.1f} s; end to end {time.perf_counter() - started:.1f} s")
    return 0


def _report(path: Path, clip: Video, file_seconds: float) -> None:
    seconds = {**clip.timings, "file": file_seconds}
    stages = ", ".join(f"{label} {seconds[stage]:.1f} s" for stage, label in _STAGES.items() if stage in seconds)
    print(f"{path}: {clip.metadata['prompt']!r}, seed {clip.metadata['seed']}: {stages}", flush=True)


_STAGES = {"compile": "compile", "text": "text", "image": "image", "dit": "DiT", "vae": "VAE", "file": "file"}


def _numbered(out: Path, count: int) -> Sequence[Path]:
    return [out] if count == 1 else [out.with_stem(f"{out.stem}-{index:03d}") for index in range(count)]


def _size(text: str) -> tuple[int, int] | str:
    if text == "adaptive":
        return text
    width, cross, height = text.lower().partition("x")
    if not (cross and width.isdigit() and height.isdigit()):
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT such as 832x480, or adaptive; got {text!r}")
    return int(width), int(height)


def _seeds(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected whole numbers such as 0 or 0,1,2; got {text!r}") from error


def _angles(text: str) -> tuple[float, ...]:
    try:
        return tuple(map(float, text.split(",")))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected numbers such as 1.5,1.4,1.0; got {text!r}") from error


def _numbers(text: str) -> tuple[float, float]:
    try:
        numbers = [float(part) for part in text.split(",")]
        low, high = numbers * 2 if len(numbers) == 1 else numbers
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"expected a number, or LOW,HIGH; got {text!r}") from error
    return low, high
