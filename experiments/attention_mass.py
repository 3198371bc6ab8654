"""Where attention goes: how much of its mass do the routed key blocks hold, and how much could the best choice hold?

    python -m experiments.attention_mass                                   (3 minutes on one busy core)
    python -m experiments.attention_mass --blocks 128x64,64x128 --topk 0.1 --model DIR

SLA keeps, for a block of queries, the key blocks whose pooled keys score highest with the pooled query. In every
layer, head and at four states of a sampling run this measures the share of the exact softmax mass inside the kept
blocks, the share that the best choice of as many blocks would hold, and what a random choice holds on average.

What came out (the shipped student): routing by pooled scores is close to the best there is: it holds 94% or more of
the mass that the best choice of as many blocks would, at every block size and share. At the model's own 16 x 8 blocks
and top-k 0.25 it holds 61.3% of the mass, the best choice 62.7%; more noise makes it a little easier (62.5% at 0.99,
59.6% at 0.51). What costs is coarseness: a tenth of the keys holds 37.5% in blocks of 16 x 8, 29.9% in 32 x 16 and
22.0% in 64 x 32, and a better router could win almost none of that back. Heads differ far more than layers: at top-k
0.25 from 31% (layer 0, head 3) to 92% (layer 1, head 0). One head is routed badly, layer 3's last: 8.7 points short of
the best choice. 320 tokens have few blocks of the published sizes, so that several top-k keep the same number there.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

import pallas_kernels as kernels
from experiments.capture import Heads, map_layers, sample
from experiments.command import Command, run
from experiments.records import Results, Row
from experiments.report import figure, heat_map, save, write_table
from experiments.sparse import own_attention, tokens
from turbojax.pipeline import Pipeline
from turbojax.pipeline_config import find_pipeline
from turbojax.train.evaluate import pairs, prompt_of

PUBLISHED = ("128x64", "64x64", "64x128")
SMALL = ("64x32", "32x16", "16x16", "16x8")


def key_mass(q: Heads, k: Heads, block_k: int) -> Float[Array, "B H L blocks"]:
    """The softmax mass that each query gives to each block of keys, float32."""
    b, length, heads, d = q.shape
    blocks = -(-length // block_k)
    q, k = (x.astype(jnp.float32) for x in (q, k))

    def row(q: Float[Array, "B H d"]) -> Float[Array, "B H blocks"]:
        p = jax.nn.softmax(jnp.einsum("bhd,blhd->bhl", q, k, precision="highest") * d**-0.5)
        padded = jnp.pad(p, ((0, 0), (0, 0), (0, blocks * block_k - length)))
        return padded.reshape(b, heads, blocks, block_k).sum(-1)

    return jnp.moveaxis(jax.lax.map(row, jnp.moveaxis(q, 1, 0), batch_size=256), 0, 2)


def captured_mass(
    q: Heads, k: Heads, v: Heads, *, block_q: int, block_k: int, topk: Sequence[float]
) -> dict[float, Float[Array, "4 heads"]]:
    """topk -> mass of the routed, the best and a random choice, and the share of the routed that is among the best."""
    del v
    mass = key_mass(q, k, block_k)
    b, heads, length, count = mass.shape
    rows = -(-length // block_q)
    padded = jnp.pad(mass, ((0, 0), (0, 0), (0, rows * block_q - length), (0, 0)))
    # Every query weighs the same, so that a ragged last block counts for its own rows alone.
    mass = padded.reshape(b, heads, rows, block_q, count).sum(3) / length
    out = {}
    for share in topk:
        index = kernels.sla_block_map(q, k, topk=share, block_q=block_q, block_k=block_k)
        kept = index.shape[-1]
        best, best_index = jax.lax.top_k(mass, kept)
        routed = jnp.take_along_axis(mass, index, axis=-1)
        common = (index[..., :, None] == best_index[..., None, :]).any(-1)
        chance = jnp.full(heads, kept / count)
        parts = routed.sum((2, 3)).mean(0), best.sum((2, 3)).mean(0), chance, common.mean((0, 2, 3))
        out[share] = jnp.stack(parts)
    return out


def main(argv: Sequence[str] | None = None) -> None:
    command = Command(str(__doc__), "attention_mass")
    command.option("clips", 8, 2, "clips whose attention is looked at")
    command.option("states", 4, 2, "states of the sampling run")
    command.option("blocks", ("own",), ("own",), f"BQxBK routing blocks; own: the model's and {PUBLISHED} {SMALL}")
    command.option("topk", (0.05, 0.1, 0.15, 0.25, 0.5), (0.1, 0.25), "shares of key blocks")
    args = command.parse(argv)
    spec = find_pipeline(args.model).spec
    own = own_attention(spec)
    blocks = args.blocks
    if blocks == ("own",):
        more = () if args.quick else PUBLISHED + (SMALL if tokens(spec) <= 4096 else ())
        blocks = tuple(dict.fromkeys([f"{own.block_q}x{own.block_k}", *more]))
    results = Results(args.out / "results.jsonl")
    key = {"model": args.model, "clips": args.clips, "states": args.states}
    missing = {b: [t for t in args.topk if not results.where(**key, blocks=b, topk=t)] for b in blocks}
    if any(missing.values()):
        requests = [(prompt_of(combination), seed) for combination, seed in pairs(args.clips)]
        captured = sample(Pipeline.load(args.model), *zip(*requests, strict=True), states=args.states)
        for name, topk in missing.items():
            if topk:
                block_q, block_k = map(int, name.split("x"))
                measured = map_layers(captured, partial(captured_mass, block_q=block_q, block_k=block_k, topk=topk))
                results.add(rows_of(measured, [s.s for s in captured.states], {**key, "blocks": name}))
    rows = [r for r in results.where(**key) if r["blocks"] in blocks and r["topk"] in args.topk]
    report(args.out, rows, blocks, own.topk, args)


def rows_of(measured: Sequence[Any], levels: Sequence[float], key: Row) -> list[Row]:
    """One row a state, top-k and layer; a list over the heads in each field."""
    rows = []
    for s, cells in zip(levels, measured, strict=True):
        for share, values in cells.items():
            for layer, parts in enumerate(np.asarray(values, float)):
                routed, best, chance, common = ([round(x, 5) for x in part.tolist()] for part in parts)
                place = {**key, "topk": share, "s": round(s, 4), "layer": layer}
                rows.append({**place, "routed": routed, "best": best, "random": chance[0], "common": common})
    return rows


def report(out: Any, rows: Sequence[Row], blocks: Sequence[str], own_topk: float, args: Any) -> None:
    def mean(field: str, **where: Any) -> float:
        return float(np.mean([r[field] for r in rows if all(r[k] == v for k, v in where.items())]))

    table = []
    for name in blocks:
        seen = set()
        for share in args.topk:
            here = {"blocks": name, "topk": share}
            if (kept := mean("random", **here)) in seen:
                continue  # few blocks: as many of them as at the top-k before
            seen.add(kept)
            routed, best = mean("routed", **here), mean("best", **here)
            parts = {
                "kept": kept,
                "routed": routed,
                "best choice": best,
                "routed / best": routed / best,
            }
            shares = {k: f"{100 * v:.1f}%" for k, v in (parts | {"in common": mean("common", **here)}).items()}
            table.append({"blocks": name, "top-k": share, **shares})
    layers, levels = sorted({r["layer"] for r in rows}), sorted({r["s"] for r in rows}, reverse=True)
    write_table(
        out / "table.md",
        table,
        f"{args.model}: mean over {len(layers)} layers, their heads, {args.clips} clips and the noise levels "
        f"{', '.join(f'{s:g}' for s in levels)}. Kept: share of the key blocks, which is what a random choice holds. "
        "In common: how many of the routed blocks are among the best. Top-k that keep as many blocks share a row.",
    )
    fig, (axes,) = figure(1, 3, 4.2, 3.4)
    for i, name in enumerate(blocks):
        kept = [mean("random", blocks=name, topk=share) for share in args.topk]
        order = np.argsort(kept)
        for field, line in (("routed", "o-"), ("best", "--")):
            values = [100 * mean(field, blocks=name, topk=share) for share in args.topk]
            label = name if field == "routed" else None
            axes[0].plot(np.array(kept)[order], np.array(values)[order], line, color=f"C{i}", label=label, markersize=3)
    axes[0].plot([0, 0.5], [0, 50], ":", color="grey", linewidth=1, label="chance")
    axes[0].set(title="mass held: routed (line), best (dashes)", xlabel="share of the key blocks kept", ylabel="%")
    axes[0].set_ylim(0, 125)
    axes[0].set_yticks(range(0, 101, 20))
    axes[0].legend(
        frameon=False, fontsize=7, ncols=3, title="blocks, queries x keys", title_fontsize=7, loc="upper left"
    )
    share = own_topk if own_topk in args.topk else args.topk[len(args.topk) // 2]
    for axis, field, title in ((axes[1], "routed", "routed mass, %"), (axes[2], "gap", "best minus routed, %")):
        heads = len(rows[0]["routed"])
        values = np.zeros((len(layers), heads))
        for n in layers:
            picked = [r for r in rows if r["layer"] == n and r["blocks"] == blocks[0] and r["topk"] == share]
            routed, best = (np.mean([r[f] for r in picked], axis=0) for f in ("routed", "best"))
            values[n] = 100 * (routed if field == "routed" else best - routed)
        title = f"{title} ({blocks[0]}, top-k {share:g})"
        heat_map(axis, values, layers, range(heads), title=title, digits=1, xlabel="head", ylabel="layer")
    save(fig, out / "mass.png")


if __name__ == "__main__":
    run(main)
