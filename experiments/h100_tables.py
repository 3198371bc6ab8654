"""The tables of docs/h100.md, made from what the benchmarks wrote on one H100.

    python -m experiments.h100_tables > docs/h100.md        # a second; reads experiments/h100/*.json

The data come from, each on one GPU and in one run a rung or a row (backward.json, linear.json and what is new in
rows.json and ends.json with XLA_FLAGS=--xla_gpu_enable_triton_gemm=false; of the others that is not recorded):
    python -m turbojax.bench_rows --rungs sla+w8a8 --profile --json rows.json     kernel times go to profile.json
    python -m pallas_kernels.hardware_check --bench --json attention.json
    python -m pallas_kernels.hardware_check --json checks.json                    with hardware_check_backward
        --only gradients and hardware_check_linear, as "gradients" and "linear"
    python -m pallas_kernels.hardware_check_backward --only backward --json backward.json
    python -m experiments.h100_ends --torch --json ends.json
    python -m pallas_kernels.hardware_check_linear --bench --json linear.json
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

DATA = Path(__file__).parent / "h100"

INTRO = """\
# Measured on one H100

{device}, JAX {jax}. Random full-size weights, 81 frames. Made by `experiments/h100_tables.py` from
`experiments/h100/*.json`; the commands that wrote those stand at the head of that file. What was tried, and what it
gave: [h100_attempts.md](h100_attempts.md).
"""
ROWS = """
## The article's rows

Seconds of the DiT alone, 4 steps at top-k 0.1, whole sampler in one program; image to video with two distinct experts
on the card. "sagesla" is in blocks of 64x128, as TurboDiffusion has it on this GPU. The baseline is ours: dense bf16
(cuDNN attention), 50 UniPC steps with guidance, condition and unconditional in one batch; 2 steps were timed, and
scaled to 50. "Memory" is arguments plus temporaries of the fastest program, as the compiler counts them.{text}

| row | baseline, 50 steps | {rungs} | best speed-up | memory |
|---|---|{rules}|---|---|
"""
FOLDED = """ Prompts of up to {tokens} tokens: their padding to 512 rows is folded into one, exactly,
but for the baseline and where a mark says so."""
BACKWARD = """
## Backward

Milliseconds of the pullback alone, same shape. "sparse" is the block-sparse branch, "sla" all of it.

| op | ms | against cuDNN dense |
|---|---|---|
"""
ENDS = """
## Text encoder and VAE

bf16, one prompt of 512 tokens, one clip of 81 frames. "Memory" is arguments plus temporaries; of torch (eager;
{versions}) its peak. A clip is `Pipeline.generate`, prompt to frames on the host, compiled before.

| program | seconds | compile, s | memory |
|---|---|---|---|
"""
PROFILE = """
## Where the time of a row went

{row}, {rung}: {gpu_ms:.0f} ms on the GPU in {launches} launches, {seconds:.3f} s by the clock{note}.

| kernel | launches | ms |
|---|---|---|
"""
CHECKS = """
## Checked

On the card, against float32 references: {attention} cases of attention and sparse-linear attention (every block size,
lengths from 1 to 200,000, outliers, zeros, logits of 1e4, and the portable kernels as built for sm_80, sm_89 and
sm_90), {text} of attention to a text, {queries} of queries normed, turned and rounded in one pass, {routing} of lists
of blocks, {gradients} of gradients, {linear} of the linear kernels. {failed} Largest relative error of INT8 attention
{int8:.3f}, of 16-bit attention {bf16:.4f}, of a gradient {gradient:.4f}.
"""
ATTENTION = """
## Attention

Milliseconds at 32,760 tokens, 12 heads of 128, bf16 in and out, top-k 0.1. "kernel" is the kernel alone; "sage", "sla"
and "sagesla" include quantisation, routing and the linear branch.

| op | ms | against cuDNN |
|---|---|---|
"""
TEXT = """
## Text attention

Milliseconds of cross-attention, same shape. Padding to 512 rows is one key that counts often; q's norm and the largest
output of each token are included, which cuDNN's attention to all of the padding lacks.

| op | ms | against cuDNN |
|---|---|---|
"""
QUERIES = """
## Queries

Milliseconds of what stands between q's product and attention, same shape: RMSNorm, rotation, sums over blocks and INT8.

| op | ms |
|---|---|
"""
LINEAR = """
## W8A8 products

TOPS at 32,760 rows, and how much faster than XLA's bf16. "INT8 ready": as the fused norms leave activations. "From
bf16": a pass rounds them first. "Maxima known": from bf16 too, but the kernel before told the largest magnitude of each
row, as in front of the 1.3B model's layers of these shapes, and they are rounded while others are multiplied.

| K -> N | XLA bf16 | XLA int8 | INT8 ready | from bf16 | maxima known | blocks of 128 |
|---|---|---|---|---|---|---|
"""


def read(name: str) -> dict[str, Any]:
    return json.loads((DATA / f"{name}.json").read_text())


def footnotes(notes: set[str]) -> tuple[dict[str | None, str], str]:
    """The mark of each note, and the lines below a table that explain them. None, no note, has no mark."""
    marks: dict[str | None, str] = {None: ""}
    marks |= {note: " " + "\\*" * i for i, note in enumerate(sorted(notes), 1)}
    return marks, "".join(f"\n{mark.strip()} {note}.\n" for note, mark in marks.items() if note)


def rows_table(data: dict[str, Any]) -> str:
    rungs = [k for k, v in data["rows"][0].items() if isinstance(v, dict) and k != "baseline"]
    folded = {row["text_rows"] for row in data["rows"] if row.get("text_rows", 512) < 512}
    text = FOLDED.format(tokens=max(folded) - 1) if folded else ""
    lines = [ROWS.format(rungs=" | ".join(rungs), rules="|".join(["---"] * len(rungs)), text=text)]
    columns = ("baseline", *rungs)
    marks, below = footnotes(
        {row[column]["note"] for row in data["rows"] for column in columns if "note" in row.get(column, {})}
    )
    for row in data["rows"]:
        times = {rung: row[rung]["median"] for rung in rungs if "median" in row.get(rung, {})}
        best = min(times, key=lambda rung: times[rung])
        whole = row.get("baseline", {}).get("scaled_to_50_steps")
        memory = (row[best]["argument_bytes"] + row[best]["temporary_bytes"]) / 2**30
        cells = " | ".join(f"{times[r]:.2f}{marks[row[r].get('note')]}" if r in times else "-" for r in rungs)
        baseline, speedup = "-", "-"
        if whole:
            baseline, speedup = f"{whole:.0f}{marks[row['baseline'].get('note')]}", f"{whole / times[best]:.0f}x"
        lines.append(f"| {row['row']} | {baseline} | {cells} | {speedup} | {memory:.1f} GiB |\n")
    return "".join(lines) + below


# Rows of attention.json that have a table of their own.
APART = ("text ", "queries ")


def attention_table(data: dict[str, Any]) -> str:
    cudnn = next(r["ms"] for r in data["rows"] if r["name"].startswith("cudnn"))
    marks, below = footnotes({r["note"] for r in data["rows"] if "note" in r})
    lines = [ATTENTION]
    for row in data["rows"]:
        if row["name"].startswith(APART):
            continue
        # Beside cuDNN of its own run, where that is another one.
        ratio = row.get("cudnn_ms", cudnn) / row["ms"]
        lines.append(f"| {row['name']} | {row['ms']:.2f}{marks[row.get('note')]} | {ratio:.1f}x |\n")
    return "".join(lines) + below


def text_table(data: dict[str, Any]) -> str:
    """Attention to a prompt, beside cuDNN's to all of its padding; nothing where it was not measured."""
    times = {row["name"]: row["ms"] for row in data["rows"] if row["name"].startswith("text ")}
    whole = next((ms for name, ms in times.items() if name.startswith("text cudnn")), None)
    if not times:
        return ""
    ratios = {name: f"{whole / ms:.1f}x" if whole else "-" for name, ms in times.items()}
    return TEXT + "".join(f"| {name} | {ms:.3f} | {ratios[name]} |\n" for name, ms in times.items())


def queries_table(data: dict[str, Any]) -> str:
    """What stands between q's product and attention; nothing where it was not measured."""
    rows = [row for row in data["rows"] if row["name"].startswith("queries ")]
    lines = [f"| {row['name'].removeprefix('queries ')} | {row['ms']:.3f} |\n" for row in rows]
    return QUERIES + "".join(lines) if lines else ""


def backward_table(data: dict[str, Any]) -> str:
    dense = data["rows"][0]["ms"]
    return BACKWARD + "".join(f"| {r['name']} | {r['ms']:.2f} | {dense / r['ms']:.1f}x |\n" for r in data["rows"])


def ends_table(data: dict[str, Any]) -> str:
    lines = [ENDS.format(versions=", ".join(" ".join(item) for item in data["versions"].items()))]
    marks, below = footnotes({row["note"] for row in data["rows"] if "note" in row})
    for row in data["rows"]:
        stages = {name: seconds for name, seconds in row.get("stages", {}).items() if name in ("text", "dit", "vae")}
        parts = ", ".join(f"{name} {seconds:.2f}" for name, seconds in stages.items())
        name = row["name"] + (f" ({parts})" if parts else "")
        whole = row.get("peak_bytes") or row.get("argument_bytes", 0) + row.get("temporary_bytes", 0)
        memory = f"{whole / 2**30:.1f} GiB" if whole else "-"
        compiling = f"{row['compile_seconds']:.0f}" if "compile_seconds" in row else "-"
        lines.append(f"| {name} | {row['seconds']:.3f}{marks[row.get('note')]} | {compiling} | {memory} |\n")
    return "".join(lines) + below


def profile_tables(data: dict[str, Any]) -> str:
    out = []
    for i, profile in enumerate(data["profiles"]):
        note = f" ({profile['note']})" if "note" in profile else ""
        text = PROFILE.format(**profile | {"note": note})
        out.append(text if i == 0 else text.replace("\n## Where the time of a row went\n", ""))
        out += [f"| {k['name'][:60]} | {k['launches']} | {k['ms']:.1f} |\n" for k in profile["kernels"]]
    return "".join(out)


def checks_text(data: dict[str, Any]) -> str:
    parts = {name: data[name] for name in ("attention", "text", "queries", "routing", "gradients", "linear")}
    failed = [row["name"] for rows in parts.values() for row in rows if not row["ok"]]

    def largest(kinds: tuple[str, ...]) -> float:
        # Logits of 1e4 are further apart than INT8 can say.
        found = [r for r in data["attention"] if r["name"].startswith(kinds) and "logits 1e4" not in r["name"]]
        return max(row["relative"] for row in found)

    return CHECKS.format(
        **{name: len(rows) for name, rows in parts.items()},
        failed=f"Failed: {', '.join(failed)}." if failed else "All pass.",
        int8=largest(("int8", "sagesla")),
        bf16=largest(("bf16", "sla")),
        gradient=max(max(row["relative"]) for row in data["gradients"]),
    )


def linear_table(data: dict[str, Any]) -> str:
    lines = [LINEAR]
    for name, case in data["cases"].items():
        if not name.startswith("bench product"):
            continue
        _, k, n = (int(x) for x in name.split("(")[1].rstrip(")").split(","))
        bf16 = case["xla_bf16"]["tops"]
        cells = [f"{bf16:.0f}", f"{case['xla_int8']['tops']:.0f}"]
        for column in ("channels", "channels_quantising", "channels_rounding", "blocks"):
            tops = case[column]["tops"] if column in case else None
            cells.append(f"{tops:.0f}, {tops / bf16:.2f}x" if tops else "-")
        lines.append(f"| {k} -> {n} | {' | '.join(cells)} |\n")
    return "".join(lines)


def main() -> None:
    rows = read("rows")
    parts = [
        INTRO.format(**rows),
        rows_table(rows),
        attention_table(read("attention")),
        text_table(read("attention")),
        queries_table(read("attention")),
        backward_table(read("backward")),
    ]
    parts += [linear_table(read("linear")), ends_table(read("ends")), checks_text(read("checks"))]
    parts.append(profile_tables(read("profile")))
    print("".join(parts), end="")


if __name__ == "__main__":
    main()
