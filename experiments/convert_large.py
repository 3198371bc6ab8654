"""How much memory and time the conversion of a full-size checkpoint takes.

    python experiments/convert_large.py --model wan2.1-t2v-14b --scratch DIR             (60 GB of disk, minutes)
    python experiments/convert_large.py --model wan2.1-t2v-1.3b --scratch DIR --copy     (10 GB of disk)

Makes a bfloat16 checkpoint of the model with its real names and shapes (a file with a hole for data; with --copy
random data instead, since copying a hole takes no time), converts it in a process of its own, and prints one line of
JSON: seconds, bytes a second, the peak of resident memory, pages of the mapped file included. --copy also times
`cp` of the same file on the same disk, and `ratio` is the speed of the conversion over that of the copy, both with
everything flushed to the disk. What was made is deleted.
Expect a peak below 6 GB for 14B and a ratio above 1/3 for 1.3B.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from convert.tables import entries
from convert.transforms import TRANSFORMS
from turbojax.checkpoint import abstract_leaves
from turbojax.config import PRESETS

_CONVERT = """
import sys
from convert import convert_checkpoint
convert_checkpoint(sys.argv[1], sys.argv[2], progress=True)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[name for name in PRESETS if name != "tiny"], required=True)
    parser.add_argument("--scratch", type=Path, required=True, help="folder on the disk to measure")
    parser.add_argument("--copy", action="store_true", help="use random data and compare with cp")
    args = parser.parse_args()
    folder = args.scratch / f"convert-large-{os.getpid()}"
    folder.mkdir(parents=True)
    try:
        source = folder / "model.safetensors"
        write_checkpoint(source, args.model, random=args.copy)
        size = source.stat().st_size
        result: dict[str, object] = {"model": args.model, "gigabytes": round(size / 1e9, 2), "random": args.copy}
        if args.copy:
            copy = timed(["cp", "--reflink=never", "--sparse=never", str(source), str(folder / "copy")])
            (folder / "copy").unlink()
            result |= {"copy_seconds": round(copy, 1), "copy_mb_per_second": round(size / copy / 1e6)}
        seconds = timed([sys.executable, "-c", _CONVERT, str(source), str(folder / "out")])
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
        result |= {"seconds": round(seconds, 1), "mb_per_second": round(size / seconds / 1e6)}
        result["peak_memory_gigabytes"] = round(peak * 1024 / 1e9, 2)
        if args.copy:
            result["ratio"] = round(copy / seconds, 2)
        print(json.dumps(result))
    finally:
        shutil.rmtree(folder)


def timed(command: list[str]) -> float:
    """Seconds until the command is done and the disk has everything."""
    os.sync()
    start = time.perf_counter()
    subprocess.run(command, check=True)
    os.sync()
    return time.perf_counter() - start


def write_checkpoint(path: Path, model: str, *, random: bool) -> None:
    """The original release's tensors in bfloat16, as one safetensors file."""
    config = PRESETS[model].dit
    ours = abstract_leaves(config)
    header, position = {}, 0
    for entry in entries(config, "wan"):
        shape = ours[entry.target].shape if entry.layer is None else ours[entry.target].shape[1:]
        source = TRANSFORMS[entry.transform].source_shapes(shape, config.patch_size)[0]
        end = position + 2 * int(np.prod(source))
        header[entry.source] = {"dtype": "BF16", "shape": list(source), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        if random:
            block = np.random.default_rng(0).integers(0, 1 << 14, 32 << 20, np.uint16).tobytes()
            while (left := 8 + len(text) + position - file.tell()) > 0:
                file.write(block[:left])
        else:
            file.truncate(8 + len(text) + position)


if __name__ == "__main__":
    main()
