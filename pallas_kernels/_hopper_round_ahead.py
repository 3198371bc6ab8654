"""Rows of bfloat16 to INT8 by warps that would stand idle, ahead of the product that reads them.

The warpgroup that loads for a product needs one warp for that. The other three round rows meanwhile, all blocks each
their share, in the order in which the products take them; a count for each tile of rows says how far they are. So the
memory is read and written while the tensor cores multiply, and not before. A block waits for rows of all others, so
the grid must not have more of them than the card holds at once.

In PTX: Mosaic GPU has no arrays that belong to a warp.
"""

from __future__ import annotations

import struct

from pallas_kernels._ptx import run_ptx
from pallas_kernels.rounding import AMAX_FLOOR, INT8_MAX_TOKEN

UNIT = 4
"""Rows a warp takes at a time: what it wrote is waited for, and told of, once for them."""
WARPS = 3
LANES = 32
CHUNK = 8  # bf16 of 16 bytes, the widest load
BATCH = 9  # most chunks of a lane that are loaded at a time: two batches are 72 registers


def supports_rounding_ahead(k: int) -> str | None:
    """Why rows of k cannot be rounded so, or None if they can."""
    if k % (CHUNK * LANES):
        return f"rows of {k} do not divide over a warp in pieces of {CHUNK}"
    return None


def round_rows(x, amax, integers, finished, *, tile: int):
    """What each of the WARPS does. x [m, k] bf16, amax [m] float32, integers [m, k] int8, m a multiple of UNIT.

    finished [ceil(m / tile)]: semaphores, one more for every UNIT rows of a tile.
    """
    m, k = x.shape
    run_ptx(program(m, k, tile), x, amax, integers, finished)


def fence_before_tma():
    """Between semaphores that tell of rounded rows and TMA that reads them: it goes another way to the memory."""

    run_ptx("fence.proxy.async.global;")


def program(m: int, k: int, tile: int) -> str:
    """What each thread does. $0 x, $1 amax, $2 integers, $3 finished, as of `round_rows`.

    A unit's rows lie behind each other, so it is one run of batches. While one is rounded the next is on its way:
    two sets of registers take turns, a and b. Past the end of a unit its last batch is loaded again.
    Lane i knows the maximum of row i of the unit, modulo UNIT, and tells the others."""
    lane_chunks = k // (CHUNK * LANES)
    batch = max(n for n in range(1, BATCH + 1) if lane_chunks % n == 0)
    row_batches = lane_chunks // batch
    batches = UNIT * row_batches
    step = batch * LANES

    def load(name):
        """Batch `ahead` of the unit into registers `name`, and ahead + 1."""
        lines = [
            f"min.u32 r, ahead, {batches - 1};",
            f"mul.wide.u32 wide, r, {step * 16};",
            "add.s64 at, from, wide;",
            *(
                f"ld.volatile.global.v4.b32 {{{name}{4 * t}, {name}{4 * t + 1}, {name}{4 * t + 2}, "
                f"{name}{4 * t + 3}}}, [at + {LANES * t * 16}];"
                for t in range(batch)
            ),
            "add.u32 ahead, ahead, 1;",
            # Never taken. Without a branch ptxas waits for the other set before it sends for this one, so that it
            # needs fewer registers; nor is volatile enough.
            "setp.eq.u32 never, ahead, limit;",
            "@never bra DONE;",
        ]
        return "\n".join(lines)

    def store(name):
        """What registers `name` hold, batch `done`, rounded, to `to`; both move on."""
        lines = [
            f"div.u32 r, done, {row_batches};",
            "shfl.sync.idx.b32 factor, own_factor, r, 31, 0xffffffff;",
        ]
        for t in range(batch):
            for pair in range(2):
                for word in range(2):
                    source = f"{name}{4 * t + 2 * pair + word}"
                    for half, take in enumerate((f"shl.b32 r, {source}, 16;", f"and.b32 r, {source}, 0xffff0000;")):
                        # The sum has no place for a fraction: its low byte is the product, half to even.
                        lines += [
                            take,
                            "mov.b32 value, r;",
                            "mul.rn.f32 value, value, factor;",
                            "add.rn.f32 value, value, 0f4B400000;",
                            f"mov.b32 y{2 * word + half}, value;",
                        ]
                lines += [
                    "prmt.b32 y0, y0, y1, 0x0040;",
                    "prmt.b32 y2, y2, y3, 0x0040;",
                    f"prmt.b32 q{pair}, y0, y2, 0x5410;",
                ]
            lines.append(f"st.volatile.global.v2.b32 [to + {LANES * t * 8}], {{q0, q1}};")
        return "\n".join([*lines, f"add.s64 to, to, {step * 8};", "add.u32 done, done, 1;"])

    words = ", ".join(f"{name}{i}" for name in "ab" for i in range(4 * batch))
    # An even number of batches lets the sets take turns; UNIT is even.
    return f"""{{
.reg .pred more, first, never;
.reg .b32 r, limit, lane, unit, units, ahead, done, q0, q1, y0, y1, y2, y3, {words};
.reg .b64 from, to, at, wide;
.reg .f32 amax, own_factor, factor, value;
mov.u32 lane, %laneid;
setp.eq.u32 first, lane, 0;
mov.u32 r, %tid.x;
shr.u32 r, r, 5;
and.b32 r, r, 3;
sub.u32 r, r, 1;
mov.u32 unit, %ctaid.x;
mad.lo.u32 unit, unit, {WARPS}, r;
mov.u32 units, %nctaid.x;
mul.lo.u32 units, units, {WARPS};
add.u32 limit, units, {2**30};
UNITS:
setp.lt.u32 more, unit, {m // UNIT};
@!more bra DONE;
mul.wide.u32 wide, unit, {UNIT * k * 2};
add.s64 from, $0, wide;
mul.wide.u32 wide, lane, 16;
add.s64 from, from, wide;
and.b32 r, lane, {UNIT - 1};
mad.lo.u32 r, unit, {UNIT}, r;
mul.wide.u32 wide, r, 4;
add.s64 at, $1, wide;
ld.volatile.global.f32 amax, [at];
mul.wide.u32 wide, unit, {UNIT * k};
add.s64 to, $2, wide;
mul.wide.u32 wide, lane, 8;
add.s64 to, to, wide;
mov.u32 ahead, 0;
mov.u32 done, 0;
{load("a")}
BATCHES:
{load("b")}
max.f32 own_factor, amax, {_bits(AMAX_FLOOR)};
div.rn.f32 own_factor, {_bits(INT8_MAX_TOKEN)}, own_factor;
{store("a")}
{load("a")}
{store("b")}
setp.lt.u32 more, done, {batches};
@more bra BATCHES;
fence.proxy.async.global;
bar.warp.sync 0xffffffff;
div.u32 r, unit, {tile // UNIT};
mul.wide.u32 wide, r, 4;
add.s64 at, $3, wide;
@first red.release.gpu.global.add.u32 [at], 1;
add.u32 unit, unit, units;
bra UNITS;
DONE:
}}"""


def _bits(value: float) -> str:
    """A float32 as PTX writes it."""
    return "0f" + struct.pack(">f", value).hex().upper()
