"""Attention over block lists equals exact attention with everything else masked, and so do its derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_reference import DATA, attention, cosine, inputs, random_blocks, relative
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

from pallas_kernels import block_sparse_attention

BLOCKS = [(128, 64), (64, 64), (64, 128), (32, 16)]


def case(kind, batch, lq, lk, dim, block_q, block_k, count, dtype):
    q, k, v = inputs(kind, batch, lq, lk, 2, dim)
    index = random_blocks(batch, lq, lk, 2, block_q, block_k, count)
    q, k, v = (jnp.asarray(x, dtype) for x in (q, k, v))
    return (q, k, v, jnp.asarray(index)), attention(q, k, v, index, block_q, block_k)


@pytest.mark.parametrize("kind", DATA)
@pytest.mark.parametrize(
    # float32: sums of a few hundred products. bfloat16: P and the output are rounded to 8 bits.
    ("dtype", "quantized", "bound"),
    [("float32", False, 1e-5), ("bfloat16", False, 1e-2), ("bfloat16", True, 5e-2)],
)
@pytest.mark.parametrize(("block_q", "block_k"), BLOCKS)
def test_equals_masked_attention(kind, dtype, quantized, bound, block_q, block_k):
    """Ragged ends, two batches. Bound of the quantised op: see test_sage_attention."""
    args, (want, lse) = case(kind, 2, 200, 300, 64, block_q, block_k, 2, dtype)
    got, got_lse = block_sparse_attention(
        *args, block_q=block_q, block_k=block_k, quantized=quantized, return_lse=True, implementation="xla"
    )
    assert relative(got, want) <= bound
    if quantized and np.any(want):
        assert cosine(got, want) >= 0.9985
    if not quantized:
        np.testing.assert_allclose(got_lse, lse, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantized", [False, True])
def test_one_token(quantized):
    args, (want, _) = case("gaussian", 1, 1, 1, 64, 64, 64, 1, "float32")
    got = block_sparse_attention(*args, block_q=64, block_k=64, quantized=quantized)
    assert relative(got, want) <= (5e-2 if quantized else 1e-6)


def test_huge_logits_are_exact_unquantised():
    """Logits of 1e4: float32 scores are off by 1e-3, so the weights by 0.1%."""
    args, (want, _) = case("huge logits", 1, 100, 200, 64, 64, 64, 2, "float32")
    assert relative(block_sparse_attention(*args, block_q=64, block_k=64), want) <= 1e-2


def test_derivatives_are_those_of_finite_differences():
    """Both modes in float64: central differences of step 1e-5 err by 1e-10 times the third derivative."""
    with jax.enable_x64(True):
        args, _ = case("gaussian", 1, 40, 56, 16, 16, 16, 2, "float64")
        rng = np.random.default_rng(1)
        point, index = args[:3], args[3]
        direction = tuple(jnp.asarray(rng.standard_normal(x.shape)) for x in point)
        weights = jnp.asarray(rng.standard_normal(point[0].shape))
        op = functools.partial(block_sparse_attention, block_q=16, block_k=16, return_lse=True)

        @jax.jit
        def loss(q, k, v):
            o, lse = op(q, k, v, index)
            return jnp.sum(o * weights) + jnp.sum(jnp.sin(lse))

        def along(step):
            return loss(*(x + step * d for x, d in zip(point, direction, strict=True)))

        difference = (along(1e-5) - along(-1e-5)) / 2e-5
        forward = jax.jvp(loss, point, direction)[1]
        reverse = sum(jnp.vdot(g, d) for g, d in zip(jax.grad(loss, (0, 1, 2))(*point), direction, strict=True))
        assert float(forward) == pytest.approx(float(difference), rel=1e-6)
        assert float(reverse) == pytest.approx(float(difference), rel=1e-6)


def test_the_quantised_op_has_no_derivative():
    args, _ = case("gaussian", 1, 64, 64, 64, 64, 64, 1, "float32")
    op = functools.partial(block_sparse_attention, block_q=64, block_k=64, quantized=True)
    with pytest.raises(NotImplementedError, match="quantised"):
        jax.jvp(lambda q: op(q, *args[1:]), args[:1], args[:1])


@pytest.mark.parametrize("quantized", [False, True])
def test_memory_is_bounded_at_the_real_length(quantized):
    """32,760 tokens, one head: every score at once would be 4.3 GB. Temporaries: block copies of q, k, v (INT8 ones
    pass through float32), the lists, and one chunk."""
    x = jax.ShapeDtypeStruct((1, 32_760, 1, 128), jnp.bfloat16)
    index = jax.ShapeDtypeStruct((1, 1, 256, 51), jnp.int32)
    op = functools.partial(block_sparse_attention, block_q=128, block_k=64, quantized=quantized, implementation="xla")
    memory = jax.jit(op).lower(x, x, x, index).compile().memory_analysis()
    assert memory.temp_size_in_bytes <= 128 * 2**20


@pytest.mark.parametrize(
    ("quantized", "block_q", "block_k"),
    [
        (True, 64, 64),
        (False, 128, 64),
        pytest.param(True, 128, 64, marks=pytest.mark.slow),
        pytest.param(True, 64, 128, marks=pytest.mark.slow),
        pytest.param(False, 64, 64, marks=pytest.mark.slow),
        pytest.param(False, 64, 128, marks=pytest.mark.slow),
    ],
)
def test_the_hopper_kernel_agrees_in_the_interpreter(quantized, block_q, block_k):
    """Private (64 rows) and shared (128 rows) lists, ragged ends, log-sum-exp, no races."""
    args, (want, _) = case("outliers", 1, 130, 200, 64, block_q, block_k, 2, "bfloat16")
    op = functools.partial(
        block_sparse_attention, block_q=block_q, block_k=block_k, quantized=quantized, return_lse=True
    )
    got, lse = jax.block_until_ready(op(*args, implementation="interpret"))
    assert not interpret_pallas_call.get_races().races_found
    assert relative(got, want) <= (5e-2 if quantized else 1e-2)
    same, same_lse = op(*args, implementation="xla")
    # P is rounded against the running maximum here, against the final one there.
    assert relative(got, same) <= (3e-2 if quantized else 5e-3)
    # In INT8 the kernel sums the P that it multiplies, which e4m3 rounds by 1/16 at most.
    np.testing.assert_allclose(lse, same_lse, atol=1 / 16 if quantized else 1e-3)


@pytest.mark.parametrize("implementation", [None, pytest.param("interpret", marks=pytest.mark.slow)])
def test_the_kernel_has_the_derivatives_of_the_xla_path(implementation):
    """In both modes, also behind the choice by platform and under jax.checkpoint: equal to the bit. What runs backwards
    on Hopper is in test_hopper_backward; that it is taken there, in cases_backward."""
    args, _ = case("gaussian", 1, 64, 64, 64, 64, 64, 1, "bfloat16")
    point, index = args[:3], args[3]

    def loss(implementation, *point):
        op = functools.partial(block_sparse_attention, block_q=64, block_k=64, implementation=implementation)
        return op(*point, index).astype(jnp.float32).sum()

    chosen, xla = (functools.partial(loss, name) for name in (implementation, "xla"))
    forward = jax.block_until_ready(jax.jvp(chosen, point, point)[1])
    assert forward == jax.jvp(xla, point, point)[1]
    again = chosen if implementation else jax.checkpoint(chosen)  # which takes no effects, as the interpreter has
    reverse = jax.block_until_ready(jax.grad(again, (0, 1, 2))(*point))
    for got, want in zip(reverse, jax.grad(xla, (0, 1, 2))(*point), strict=True):
        np.testing.assert_array_equal(got, want)


def test_a_forced_kernel_says_why_it_cannot_run():
    args, _ = case("gaussian", 1, 64, 64, 64, 32, 64, 1, "bfloat16")
    with pytest.raises(NotImplementedError, match="blocks are 32x64"):
        block_sparse_attention(*args, block_q=32, block_k=64, quantized=True, implementation="mosaic_gpu")


@pytest.mark.usefixtures("unchecked")
def test_a_list_of_the_wrong_shape_is_named():
    args, _ = case("gaussian", 1, 64, 64, 64, 64, 64, 1, "float32")
    with pytest.raises(ValueError, match="block_index has shape"):
        block_sparse_attention(*args[:3], args[3][:, :1], block_q=64, block_k=64)
