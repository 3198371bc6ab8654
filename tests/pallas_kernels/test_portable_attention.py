"""The attention of GPUs other than Hopper: exact up to its number formats, and the same kernel in the interpreter."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_reference import attention, cosine, inputs, random_blocks, relative
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental.mosaic.gpu import fragmented_array as fa
from jax.experimental.mosaic.gpu.mma import MMALayouts
from register_layouts import held_by_each_thread

from pallas_kernels import _portable_attention as portable
from pallas_kernels import block_sparse_attention, sage_attention
from pallas_kernels._heads import heads_first
from pallas_kernels._hopper import FP8_ORDER
from pallas_kernels._portable_mma import in_operand_order
from pallas_kernels._quantize_qkv import quantize_query_key
from pallas_kernels.dispatch import compiling_for

SLOW = pytest.mark.slow


def attend(kind, q, k, v, index, blocks):
    """kind: "e4m3" as from sm_89, "16-bit values" as on sm_80, or "bf16", unquantised."""
    sizes = {"scale": q.shape[-1] ** -0.5, "block_q": blocks[0], "block_k": blocks[1], "interpret": True}
    if kind == "bf16":
        return portable.sparse_forward(q, k, v, index, **sizes)
    return portable.sage_forward(q, k, v, index, smooth_k=True, fp8=kind == "e4m3", **sizes)


@pytest.mark.parametrize(
    ("kind", "batch", "lq", "lk", "heads", "dim", "blocks", "count"),
    [
        ("e4m3", 1, 70, 130, 1, 64, (64, 128), 1),
        ("bf16", 1, 70, 100, 1, 64, (64, 64), 2),
        pytest.param("16-bit values", 1, 70, 100, 2, 64, (64, 64), 2, marks=SLOW),
        pytest.param("e4m3", 2, 130, 200, 1, 128, (128, 64), 2, marks=SLOW),
        pytest.param("e4m3", 1, 130, 333, 1, 128, (64, 128), 2, marks=SLOW),
        pytest.param("bf16", 2, 130, 333, 1, 128, (128, 64), 3, marks=SLOW),
        pytest.param("bf16", 1, 130, 200, 2, 64, (64, 128), 2, marks=SLOW),
        pytest.param("e4m3", 1, 77, 260, 1, 128, (64, 128), None, marks=SLOW),
        pytest.param("16-bit values", 2, 1, 130, 2, 64, (64, 128), None, marks=SLOW),
    ],
)
def test_agrees_in_the_interpreter(kind, batch, lq, lk, heads, dim, blocks, count):
    """Ragged ends, batches, lists for 128 rows, blocks of two steps, dense (count None): no races."""
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in inputs("outliers", batch, lq, lk, heads, dim))
    index = None
    if count is not None:
        index = jnp.asarray(random_blocks(batch, lq, lk, heads, blocks[0], blocks[1], count))
    got, lse = jax.block_until_ready(attend(kind, q, k, v, index, blocks))
    assert not interpret_pallas_call.get_races().races_found
    want, _ = attention(q, k, v, index, *blocks)
    quantized = kind != "bf16"
    # Rounding to INT8, e4m3 and bfloat16: see test_sage_attention and test_block_sparse_attention.
    assert relative(got, want) <= (5e-2 if quantized else 1e-2)
    assert cosine(got, want) >= 0.9985
    if index is not None:
        sizes = {"block_q": blocks[0], "block_k": blocks[1], "quantized": quantized}
        _, same_lse = block_sparse_attention(q, k, v, index, return_lse=True, implementation="xla", **sizes)
        np.testing.assert_allclose(lse, same_lse, atol=1e-4 if quantized else 1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("length", "dim", "block"), [(600, 64, 128), (130, 128, 64), (50, 64, 64)])
def test_rows_are_quantised_as_in_xla(length, dim, block):
    """Whole blocks in the kernel, the ragged last one outside; equal but for ties that a last bit decides."""
    _, x, _ = (jnp.asarray(x, jnp.bfloat16) for x in inputs("large mean", 2, 1, length, 2, dim))
    mean = portable.quantize.rotated_mean(x)
    got, scale = jax.block_until_ready(portable.quantize.quantize_rows(x, mean, block, cp_async=False, interpret=True))
    assert not interpret_pallas_call.get_races().races_found
    _, _, want, want_scale = quantize_query_key(heads_first(x), heads_first(x), block, block)
    np.testing.assert_allclose(scale, want_scale, rtol=1e-5)
    steps = np.abs(np.asarray(got, np.int32) - np.asarray(want))
    assert steps.max() <= 1
    assert (steps > 0).mean() <= 1e-3


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float8_e4m3fn])
def test_registers_of_a_product_are_those_of_the_next_operand(dtype):
    """The hardware's half of `left_operand`, which the interpreter cannot run, read from the layouts' own tables: every
    thread holds already, and in this order, what mma.sync wants of it."""
    shape = (64, 64)
    layouts = MMALayouts(dtype)
    have = held_by_each_thread(layouts.acc, shape)
    row, column = np.divmod(held_by_each_thread(layouts.lhs, shape), shape[1])
    if dtype == jnp.float8_e4m3fn:
        column = column // 16 * 16 + np.array(FP8_ORDER)[column % 16]
        # `_repack` joins the pairs of columns c and c + 8 of a row: [.., half, row, two] -> [.., row, half, two].
        have = have.reshape(128, -1, 2, 2, 2).swapaxes(2, 3).reshape(128, -1)
    np.testing.assert_array_equal(row * shape[1] + column, have)
    assert layouts.acc == fa.WGMMA_LAYOUT, "_repack is written for this layout"


def test_values_are_stored_in_the_order_of_the_registers():
    keys = jnp.arange(16, dtype=jnp.float8_e4m3fn)[None, :, None]
    np.testing.assert_array_equal(in_operand_order(keys).ravel(), FP8_ORDER)


@pytest.mark.parametrize(("arch", "reason"), [((8, 0), None), ((8, 9), None), ((12, 0), None), ((7, 5), "sm_75")])
@pytest.mark.parametrize("op", ["sage", "sparse"])
def test_the_gpu_decides(monkeypatch, arch, reason, op):
    """From sm_80 on, other GPUs than Hopper get this kernel; older ones are told why they get none."""
    q = jnp.ones((1, 64, 1, 64), jnp.bfloat16)
    called = []

    def forward(q, *_, **__):
        called.append(op)
        return q, jnp.zeros(q.shape[:1] + q.shape[2:0:-1][:2])

    for name in ("sage_forward", "sparse_forward"):
        monkeypatch.setattr(portable, name, forward)
    if op == "sage":
        run = functools.partial(inspect.unwrap(sage_attention), q, q, q, implementation="mosaic_gpu")
    else:
        index = jnp.zeros((1, 1, 1, 1), jnp.int32)
        run = functools.partial(
            inspect.unwrap(block_sparse_attention), q, q, q, index, block_q=64, block_k=64, implementation="mosaic_gpu"
        )
    with compiling_for(arch):
        if reason is None:
            run()
            assert called == [op]
        else:
            with pytest.raises(NotImplementedError, match=reason):
                run()
