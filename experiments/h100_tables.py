"""The tables of docs/h100.md, made from what the benchmarks wrote on one H100.

    python -m experiments.h100_tables > docs/h100.md        # a second; reads experiments/h100/*.json

The data come from, each on one GPU and in one run a file:
    python -m turbojax.bench_rows --rungs dense+w8a8 sla+w8a8 sagesla+w8a8 --repeats 2 --json rows.json
    python -m turbojax.bench_rows --no-baseline --rungs sla+w8a8 --json later.json    (replaces that rung where newer)
    python -m pallas_kernels.hardware_check --bench --json attention.json
    pallas_kernels.hardware_check_backward.times(32_760, 12, 128, 0.1)                  -> backward.json
    turbojax.programs.decode and UMT5Encoder, compiled and timed three times, best       -> ends.json
    jax.profiler around one run of the first row, device time summed by kernel           -> profile.json
    python -m pallas_kernels.hardware_check_linear --bench --json linear.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "h100"

INTRO = """\
# Measured on one H100

{device}, JAX {jax}. Random full-size weights, 81 frames, the DiT alone. Made by `experiments/h100_tables.py` from
`experiments/h100/*.json`; the commands that wrote those stand at the head of that file. What was tried, and what it
gave: [h100_attempts.md](h100_attempts.md).
"""
ROWS = """
## The article's rows

Seconds for 4 steps at top-k 0.1, whole sampler in one program. The baseline is ours: dense bf16 (cuDNN attention), 50
UniPC steps with guidance, condition and unconditional in one batch; 2 steps were timed and scaled to 50. "Memory" is
arguments plus temporaries of the fastest program, as the compiler counts them.

| row | baseline, 50 steps | {rungs} | best speed-up | memory |
|---|---|{rules}|---|---|
"""
BACKWARD = """
## Backward

Milliseconds of the pullback alone, same shape. "sparse" is the block-sparse branch, "sla" all of it.

| op | ms | against cuDNN dense |
|---|---|---|
"""
ENDS = """
## Text encoder and VAE

bf16, one prompt of 512 tokens, one clip of 81 frames. "Memory" is arguments plus temporaries.

| program | seconds | compile, s | memory |
|---|---|---|---|
"""
PROFILE = """
## Where the time of a row went

{row}, {rung}, {gpu_ms:.0f} ms on the GPU, measured before the linear branch was fused into the attention kernel
(its parts were the fusions, transposes and cuBLAS products below).

| kernel | launches | ms |
|---|---|---|
"""
ATTENTION = """
## Attention

Milliseconds at 32,760 tokens, 12 heads of 128, bf16 in and out, top-k 0.1. "kernel" is the kernel alone; "sage", "sla"
and "sagesla" include quantisation, routing and the linear branch.

| op | ms | against cuDNN |
|---|---|---|
"""
LINEAR = """
## W8A8 products

TOPS at 32,760 rows. "channels" has int8 activations ready (as the fused norms leave them); "quantising" starts from
bf16.

| K -> N | XLA bf16 | XLA int8 | channels | channels, quantising | blocks of 128 |
|---|---|---|---|---|---|
"""


def read(name: str) -> dict[str, Any]:
    return json.loads((DATA / f"{name}.json").read_text())


def rows_table(data: dict[str, Any]) -> str:
    rungs = [k for k, v in data["rows"][0].items() if isinstance(v, dict) and k != "baseline"]
    lines = [ROWS.format(rungs=" | ".join(rungs), rules="|".join(["---"] * len(rungs)))]
    for row in data["rows"]:
        times = {rung: row[rung]["median"] for rung in rungs if "median" in row.get(rung, {})}
        best = min(times, key=lambda rung: times[rung])
        whole = row.get("baseline", {}).get("scaled_to_50_steps")
        memory = (row[best]["argument_bytes"] + row[best]["temporary_bytes"]) / 2**30
        stars = {rung: " \\*" if "note" in row.get(rung, {}) else "" for rung in rungs}
        cells = " | ".join(f"{times[r]:.2f}{stars[r]}" if r in times else "-" for r in rungs)
        baseline, speedup = (f"{whole:.0f}", f"{whole / times[best]:.0f}x") if whole else ("-", "-")
        lines.append(f"| {row['row']} | {baseline} | {cells} | {speedup} | {memory:.1f} GiB |\n")
    notes = {row[rung]["note"] for row in data["rows"] for rung in rungs if "note" in row.get(rung, {})}
    return "".join(lines) + "".join(f"\n\\* {note}.\n" for note in sorted(notes))


def attention_table(data: dict[str, Any]) -> str:
    cudnn = next(r["ms"] for r in data["rows"] if r["name"].startswith("cudnn"))
    return ATTENTION + "".join(f"| {r['name']} | {r['ms']:.2f} | {cudnn / r['ms']:.1f}x |\n" for r in data["rows"])


def backward_table(data: dict[str, Any]) -> str:
    dense = data["rows"][0]["ms"]
    return BACKWARD + "".join(f"| {r['name']} | {r['ms']:.2f} | {dense / r['ms']:.1f}x |\n" for r in data["rows"])


def ends_table(data: dict[str, Any]) -> str:
    lines = [ENDS]
    for row in data["rows"]:
        memory = (row["argument_bytes"] + row["temporary_bytes"]) / 2**30
        lines.append(f"| {row['name']} | {row['seconds']:.3f} | {row['compile_seconds']:.0f} | {memory:.1f} GiB |\n")
    return "".join(lines)


def profile_table(data: dict[str, Any]) -> str:
    rows = (f"| {k['name'][:60]} | {k['launches']} | {k['ms']:.1f} |\n" for k in data["kernels"][:16])
    return PROFILE.format(**data) + "".join(rows)


def linear_table(data: dict[str, Any]) -> str:
    lines = [LINEAR]
    for name, case in data["cases"].items():
        if not name.startswith("bench product"):
            continue
        _, k, n = (int(x) for x in name.split("(")[1].rstrip(")").split(","))
        columns = ("xla_bf16", "xla_int8", "channels", "channels_quantising", "blocks")
        cells = " | ".join(f"{case[c]['tops']:.0f}" if c in case else "-" for c in columns)
        lines.append(f"| {k} -> {n} | {cells} |\n")
    return "".join(lines)


def main() -> None:
    rows = read("rows")
    parts = [
        INTRO.format(**rows),
        rows_table(rows),
        attention_table(read("attention")),
        backward_table(read("backward")),
    ]
    parts += [linear_table(read("linear")), ends_table(read("ends")), profile_table(read("profile"))]
    print("".join(parts), end="")


if __name__ == "__main__":
    main()
