"""The key blocks with the largest scores, without sorting them: SLA's routing.

A warp takes a row of scores into its registers. The k-th largest is found bit by bit, by counting how many reach a
bound: two instructions a score and one that adds over the warp. What reaches it is written in falling order, each
lane's place in the list counted from a ballot. In PTX: Mosaic GPU has no arrays that belong to a warp, and a reduction
over a warpgroup, 31 of them a row, goes through shared memory each time.

Bound by instructions, about 10 + 2 a bound tried for each 32 scores: 6,144 rows of 256 (1.3B, 480p) are 5 us of an
H100, 23,640 rows of 1,182 (14B, 720p) at most 70.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float32, Int32

from pallas_kernels._ptx import run_ptx

WARPS, LANES = 4, 32
MOST = 128 * LANES
"""Scores of a row, at most: a lane holds a register for each 32 of them."""
SMALLEST = 2**31  # as a signed integer: below all numbers


def top_blocks(
    scores: Float[Array, "rows width"], k: int, scales: Float32[Array, "groups width"] | None = None, *, interpret: bool
) -> tuple[Int32[Array, "rows {k}"], Float32[Array, "rows {k}"] | None]:
    """The columns of the k largest of each float32 row, falling: the set that `lax.top_k` gives.

    Of equal scores the lower column comes first. At most MOST columns. scales: of the columns; as many rows as the
    groups have, one behind the other, share one of these. They are returned as the columns are, else None.
    """
    rows, width = scores.shape
    if interpret:
        # The interpreter has no PTX.
        found = -jnp.sort(-lax.top_k(scores, k)[1].astype(jnp.int32), axis=1)
        return found, None if scales is None else listed(scales, found)
    inputs = (scores,) if scales is None else (scores, scales)
    outputs = [jax.ShapeDtypeStruct((rows, k), dtype) for dtype in (jnp.int32, jnp.float32)[: len(inputs)]]
    text = program(rows, width, k, None if scales is None else rows // scales.shape[0])

    def body(*refs):
        run_ptx(text, *refs)

    body.__name__ = "top_blocks"
    found, *scale = plgpu.kernel(body, out_type=tuple(outputs), grid=(pl.cdiv(rows, WARPS),), grid_names=("rows",))(
        *inputs
    )
    return found, scale[0] if scale else None


def listed(scales: Float32[Array, "groups width"], found: Int32[Array, "*rows k"]) -> Float32[Array, "*rows k"]:
    """The scales of the columns that were found."""
    by_group = found.reshape(len(scales), -1)
    return jnp.take_along_axis(scales, by_group, axis=1, mode="promise_in_bounds").reshape(found.shape)


def program(rows: int, width: int, k: int, group: int | None = None) -> str:
    """What each thread does. $0: scores float32 [rows, width]. $1: the list int32 [rows, k].

    group: rows that share scales, float32 [rows / group, width], which are then $1, the list $2, and those of the
    list, float32 [rows, k], $3.
    """
    words = -(-width // LANES)  # word t of a lane is column 32 t + lane
    keys = ", ".join(f"key{t}" for t in range(words))
    load = []
    for t in range(words):
        inside = ""
        if width < (t + 1) * LANES:
            inside = "@inside "
            load += [f"setp.lt.u32 inside, lane, {width - t * LANES};", f"mov.b32 key{t}, {SMALLEST};"]
        load += [
            f"{inside}ld.global.b32 key{t}, [from + {t * LANES * 4}];",
            # As integers in the order of the numbers.
            f"{inside}shr.s32 r, key{t}, 31;",
            f"{inside}and.b32 r, r, {2**31 - 1};",
            f"{inside}xor.b32 key{t}, key{t}, r;",
        ]
    count = []
    for t in range(words):
        count += [f"setp.ge.s32 p, key{t}, try;", "@p add.u32 r, r, 1;"]

    def scale_of(t):
        if group is None:
            return []
        return [
            "add.s64 at, scales_to, wide;",
            f"@p ld.global.b32 r, [scales_from + {t * LANES * 4}];",
            "@p st.global.b32 [at], r;",
        ]

    write = []
    for t in reversed(range(words)):
        write += [
            f"setp.eq.s32 p, key{t}, bound;",
            "vote.sync.ballot.b32 mask, p, 0xffffffff;",
            "and.b32 r, mask, higher;",
            "popc.b32 r, r;",
            "add.u32 r, r, equal;",
            "setp.ge.and.u32 p, r, skip, p;",
            "popc.b32 r, mask;",
            "add.u32 equal, equal, r;",
            f"setp.gt.or.s32 p, key{t}, bound, p;",
            "vote.sync.ballot.b32 mask, p, 0xffffffff;",
            "and.b32 r, mask, higher;",
            "popc.b32 r, r;",
            "add.u32 r, r, listed;",
            "mul.wide.u32 wide, r, 4;",
            "add.s64 at, to, wide;",
            f"add.u32 r, lane, {t * LANES};",
            "@p st.global.b32 [at], r;",
            *scale_of(t),
            "popc.b32 r, mask;",
            "add.u32 listed, listed, r;",
        ]
    shared = []
    if group is not None:
        shared = [
            "add.s64 scales_to, $3, wide;",
            f"div.u32 r, row, {group};",
            f"mul.wide.u32 wide, r, {width * 4};",
            "add.s64 scales_from, $1, wide;",
            "mul.wide.u32 wide, lane, 4;",
            "add.s64 scales_from, scales_from, wide;",
        ]
    lines = [
        ".reg .pred p, inside;",
        f".reg .b32 r, lane, higher, row, bound, have, step, try, mask, equal, skip, listed, {keys};",
        ".reg .b64 from, to, scales_from, scales_to, at, wide;",
        "mov.u32 lane, %laneid;",
        "mov.u32 higher, %lanemask_gt;",
        "mov.u32 r, %tid.x;",
        "shr.u32 r, r, 5;",
        "mov.u32 row, %ctaid.x;",
        f"mad.lo.u32 row, row, {WARPS}, r;",
        f"setp.ge.u32 p, row, {rows};",
        "@p bra DONE;",
        f"mul.wide.u32 wide, row, {width * 4};",
        "add.s64 from, $0, wide;",
        "mul.wide.u32 wide, lane, 4;",
        "add.s64 from, from, wide;",
        f"mul.wide.u32 wide, row, {k * 4};",
        f"add.s64 to, ${1 if group is None else 2}, wide;",
        *shared,
        *load,
        # The largest bound that k keys reach, or one that just k do. `have` is how many reach it.
        f"mov.b32 bound, {SMALLEST};",
        f"mov.u32 have, {words * LANES};",
        f"mov.b32 step, {2**31};",
        "SEARCH:",
        "add.s32 try, bound, step;",
        "mov.u32 r, 0;",
        *count,
        "redux.sync.add.u32 r, r, 0xffffffff;",
        f"setp.ge.u32 p, r, {k};",
        "@p mov.b32 bound, try;",
        "@p mov.u32 have, r;",
        f"setp.eq.u32 p, have, {k};",
        "@p bra WRITE;",
        "shr.u32 step, step, 1;",
        "setp.ne.u32 p, step, 0;",
        "@p bra SEARCH;",
        "WRITE:",
        # Of those equal to the bound, the highest columns are too many.
        f"sub.u32 skip, have, {k};",
        "mov.u32 equal, 0;",
        "mov.u32 listed, 0;",
        *write,
        "DONE:",
    ]
    return "{\n" + "\n".join(lines) + "\n}"
