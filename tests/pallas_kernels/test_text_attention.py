"""Attention to a few keys, the last of which stands for many equal ones: as if all of them were written out."""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_reference import attention, relative
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

from pallas_kernels import TextColumns, _attention_xla, _hopper_text, text_attention, text_columns
from pallas_kernels._attention_xla import default_scale
from pallas_kernels.dispatch import compiling_for
from pallas_kernels.text_attention import _written_out as written_out_path
from pallas_kernels.text_attention import _xla as xla_path

# batch, length, heads, keys, last_count. Lengths end within a tile of 64 rows or within 8 rows, or have fewer tiles
# than there are warpgroups; last counts have 1, 3, 4 and 5 ones in binary.
SHAPES = [
    (1, 200, 2, 56, 457),
    (2, 72, 2, 120, 393),
    (1, 7, 1, 1, 512),
    *(pytest.param((1, 200, 1, keys, 513 - keys), marks=pytest.mark.slow) for keys in (184, 248)),
]
# P and the output are rounded to bfloat16, 2^-9 each at most; elsewhere float32.
BFLOAT16 = 2.0**-8


def operands(kind, shape, dtype=jnp.bfloat16):
    """q, k, v and q_factor. large: logits to +-60; negative: all near -280, whose exponentials float32 has not."""
    batch, length, heads, keys, _ = shape
    rng = np.random.default_rng(0)
    q = rng.standard_normal((batch, length, heads, 128))
    k, v = rng.standard_normal((2, batch, keys, heads, 128))
    if kind == "large":
        q = q * 20
    elif kind == "negative":
        q, k = 5 + q / 8, -5 + k / 8
    factor = jnp.asarray(rng.uniform(0.5, 1.5, (batch, length)), jnp.float32)
    return *(jnp.asarray(x, dtype) for x in (q, k, v)), factor


def reference(q, k, v, factor, last_count):
    """float64, every key that is meant written out."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    if factor is not None:
        q = q * np.asarray(factor, np.float64)[:, :, None, None]
    return attention(q, *(written_out(x, last_count, np) for x in (k, v)))[0]


def written_out(x, last_count, library=jnp):
    return library.concatenate([x[:, :-1], library.repeat(x[:, -1:], last_count, axis=1)], axis=1)


def check_kernel(got, want, v):
    got = np.asarray(got, np.float64)
    assert relative(got, want) <= 5e-3
    assert np.abs(got - want).max() <= BFLOAT16 * np.abs(np.asarray(v, np.float64)).max()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_kernel_is_attention_to_all_keys_written_out(shape):
    """To the rounding of P and o; the largest |o| is that of what is returned, exactly; no race."""
    q, k, v, factor = operands("gaussian", shape)
    count = shape[-1]
    got, amax = text_attention(q, k, v, q_factor=factor, last_count=count, return_amax=True, implementation="interpret")
    jax.block_until_ready(amax)
    assert not interpret_pallas_call.get_races().races_found
    check_kernel(got, reference(q, k, v, factor, count), v)
    assert amax.dtype == jnp.float32
    np.testing.assert_array_equal(amax, np.abs(np.asarray(got, np.float32)).max(axis=(2, 3)))


@pytest.mark.parametrize(("kind", "count"), [("gaussian", 1), ("large", 457), ("negative", 457)])
def test_the_kernel_without_factors_and_with_logits_far_from_zero(kind, count):
    """The maximum is taken off whatever it is, and columns that only fill up never change it."""
    q, k, v, _ = operands(kind, (1, 72, 1, 56, count))
    got = jax.block_until_ready(text_attention(q, k, v, last_count=count, implementation="interpret"))
    assert not interpret_pallas_call.get_races().races_found
    want = reference(q, k, v, None, count)
    check_kernel(got, want, v)


def test_slots_are_filled_again_when_their_output_was_stored(monkeypatch):
    """With two slots the third tile of each warpgroup lies where its first did, whose output was stored from there."""
    monkeypatch.setattr(_hopper_text, "SLOTS", 2)
    q, k, v, factor = operands("gaussian", (1, 456, 1, 8, 3))
    scale = default_scale(128)
    columns = _hopper_text.text_columns(k, v, 3)
    got, amax = _hopper_text.text_forward(q, *columns, factor, scale=scale, amax=False, interpret=True)
    jax.block_until_ready(got)
    assert amax is None
    assert not interpret_pallas_call.get_races().races_found
    check_kernel(got, reference(q, k, v, factor, 3), v)


@pytest.mark.parametrize(("keys", "count"), [(1, 1), (1, 512), (56, 457), (64, 1), (120, 393), (248, 265)])
def test_columns_weigh_what_their_keys_count(keys, count):
    """Weights are powers of two or 0, so that they and V times them are exact in bfloat16."""
    weight = _hopper_text.column_weights(keys, count)
    np.testing.assert_array_equal(weight[: keys - 1], 1)
    assert weight[keys - 1 :].sum() == count
    assert len(weight) % 64 == 0
    assert len(weight) - 64 < keys - 1 + count.bit_count() <= len(weight)
    assert set(np.frexp(weight)[0]) <= {0.0, 0.5}


@pytest.mark.parametrize("columns", [64, 128, 192, 256])
def test_a_block_fits_in_shared_memory(columns):
    """With at least two slots: one is worked on while the other one is filled."""
    slots = _hopper_text.ring_slots(columns, 128)
    assert slots >= 2
    tiles = slots * 2 * 64 * 128 * 2
    assert columns * (128 + 136) * 2 + tiles + 8 * (1 + 2 * slots) <= 232_448


@pytest.mark.parametrize("kind", ["gaussian", "large", "negative"])
@pytest.mark.parametrize("with_factor", [False, True])
def test_xla_in_float32(kind, with_factor):
    """float32 rounds logits of 60 by 4e-6, and P by as much."""
    q, k, v, factor = operands(kind, (2, 9, 2, 5, 457), jnp.float32)
    factor = factor if with_factor else None
    with jax.default_matmul_precision("highest"):
        got, amax = text_attention(q, k, v, q_factor=factor, last_count=457, return_amax=True, implementation="xla")
    np.testing.assert_allclose(got, reference(q, k, v, factor, 457), rtol=1e-4, atol=2e-5)
    np.testing.assert_array_equal(amax, np.abs(np.asarray(got)).max(axis=(2, 3)))


def test_xla_in_chunks(monkeypatch):
    """The same numbers, however few rows of scores are held at once."""
    q, k, v, factor = operands("gaussian", (2, 11, 2, 5, 3), jnp.float32)

    def run():
        return xla_path(q, k, v, factor, last_count=3, amax=True)

    whole = run()
    monkeypatch.setattr(_attention_xla, "chunk_bytes", lambda: 3 * 12 * 2 * 2 * 5)
    for got, want in zip(run(), whole, strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("with_factor", [False, True])
def test_keys_written_out_are_the_same(with_factor):
    """What a GPU without the kernel computes; q times its factor is rounded once more, which float32 makes small."""
    q, k, v, factor = operands("gaussian", (2, 9, 2, 5, 457), jnp.float32)
    got, amax = written_out_path(q, k, v, *((factor,) if with_factor else ()), last_count=457, amax=True)
    want = reference(q, k, v, factor if with_factor else None, 457)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=2e-5)
    np.testing.assert_array_equal(amax, np.abs(np.asarray(got)).max(axis=(2, 3)))


def test_a_gpu_without_the_kernel_writes_the_keys_out_and_a_cpu_does_not(monkeypatch):
    """Staged: what is lowered for an RTX 4090 has attention to 512 keys, what is lowered for the CPU to 56."""
    module = importlib.import_module("pallas_kernels.text_attention")
    monkeypatch.setattr(module, "cudnn_refusal", lambda q, k: None)
    q, k, v, factor = operands("gaussian", (1, 72, 2, 56, 457))

    def run(q, k, v, factor):
        return text_attention(q, k, v, q_factor=factor, last_count=457)

    jax.clear_caches()
    with compiling_for((8, 9)):
        traced = jax.jit(run).trace(q, k, v, factor)
        gpu, cpu = (traced.lower(lowering_platforms=(name,)).as_text() for name in ("cuda", "cpu"))
        got = jax.jit(run)(q, k, v, factor)
    jax.clear_caches()
    assert "x512x" in gpu
    assert "x512x" not in cpu
    assert "x56x" in cpu
    np.testing.assert_array_equal(got, text_attention(q, k, v, q_factor=factor, last_count=457, implementation="xla"))


def test_derivatives_are_those_of_all_keys_written_out():
    """In both modes, with respect to everything: the last key has the sum over the equal ones."""
    q, k, v, factor = operands("gaussian", (1, 6, 2, 4, 5), jnp.float32)
    probe = jnp.asarray(np.random.default_rng(1).standard_normal(q.shape), jnp.float32)

    def folded(q, k, v, factor):
        return jnp.sum(probe * text_attention(q, k, v, q_factor=factor, last_count=5))

    def whole(q, k, v, factor):
        return jnp.sum(probe * text_attention(q * factor[:, :, None, None], written_out(k, 5), written_out(v, 5)))

    args = (q, k, v, factor)
    gradients = jax.grad(folded, argnums=(0, 1, 2, 3))(*args)
    for got, want in zip(gradients, jax.grad(whole, argnums=(0, 1, 2, 3))(*args), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    along = jax.jvp(folded, args, args)[1]
    np.testing.assert_allclose(along, sum(jnp.sum(g * x) for g, x in zip(gradients, args, strict=True)), rtol=1e-4)


@pytest.mark.parametrize("with_factor", [False, True])
def test_the_kernel_has_the_derivatives_of_xla(with_factor):
    q, k, v, factor = operands("gaussian", (1, 8, 1, 4, 5))
    factor = factor if with_factor else None

    def total(implementation, q, k, v):
        return jnp.sum(
            text_attention(q, k, v, q_factor=factor, last_count=5, implementation=implementation).astype(jnp.float32)
        )

    got, want = (jax.grad(total, argnums=(1, 2, 3))(name, q, k, v) for name in ("interpret", "xla"))
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(g, np.float32), np.asarray(w, np.float32))


@pytest.mark.parametrize("implementation", ["interpret", None])
@pytest.mark.parametrize("with_factor", [False, True])
def test_columns_made_ahead_change_nothing(implementation, with_factor):
    """Neither the numbers nor the derivatives, in both modes."""
    q, k, v, factor = operands("gaussian", (2, 72, 1, 56, 457))
    columns = text_columns(k, v, last_count=457)
    assert columns is not None
    assert columns.keys.shape == (2, 64, 1, 128)

    def run(q, k, v, columns):
        options = {"last_count": 457, "return_amax": True, "implementation": implementation}
        return text_attention(q, k, v, q_factor=factor if with_factor else None, columns=columns, **options)

    def total(q, k, v, columns):
        return jnp.sum(run(q, k, v, columns)[0].astype(jnp.float32))

    def along(columns):
        return jax.jvp(lambda q, k, v: total(q, k, v, columns), (q, k, v), (q, k, v))[1]

    gradient = jax.grad(total, argnums=(0, 1, 2))
    same = zip(run(q, k, v, columns), run(q, k, v, None), strict=True)
    same = [*same, *zip(gradient(q, k, v, columns), gradient(q, k, v, None), strict=True)]
    for got, want in [*same, (along(columns), along(None))]:
        np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


def test_columns_have_no_derivative_of_their_own():
    """They may be made inside of what is differentiated: k and v say it all."""
    q, k, v, _ = operands("gaussian", (1, 8, 1, 4, 5))

    def total(k, v, made):
        columns = text_columns(k, v, last_count=5) if made else None
        return jnp.sum(text_attention(q, k, v, last_count=5, columns=columns).astype(jnp.float32))

    got, want = (jax.grad(total, argnums=(0, 1))(k, v, made) for made in (True, False))
    for g, w in zip(got, want, strict=True):
        np.testing.assert_array_equal(np.asarray(g, np.float32), np.asarray(w, np.float32))


def test_there_are_no_columns_without_a_kernel_to_take_them():
    _, k, v, _ = operands("gaussian", (1, 8, 1, 4, 5))
    assert text_columns(k.astype(jnp.float32), v.astype(jnp.float32), last_count=5) is None
    assert text_columns(k[..., :64], v[..., :64], last_count=5) is None
    with compiling_for((8, 9)):
        assert text_columns(k, v, last_count=5) is None


@pytest.mark.usefixtures("unchecked")
def test_columns_of_another_text_are_refused():
    q, k, v, _ = operands("gaussian", (2, 8, 2, 64, 1))
    columns = text_columns(k, v)
    for wrong in (TextColumns(*(x[:1] for x in columns)), TextColumns(*(x[:, :1] for x in columns)), columns[::-1]):
        with pytest.raises(ValueError, match="make them by text_columns"):
            text_attention(q, k, v, columns=TextColumns(*wrong))
    with pytest.raises(ValueError, match="last key 3 times"):
        text_attention(q, k, v, columns=columns, last_count=3)


@pytest.mark.usefixtures("unchecked")
def test_wrong_arguments_are_named():
    q, k, v, factor = operands("gaussian", (1, 8, 2, 4, 1), jnp.float32)
    with pytest.raises(ValueError, match="do not fit"):
        text_attention(q, k, v[:, :3])
    with pytest.raises(ValueError, match="q_factor"):
        text_attention(q, k, v, q_factor=factor[:, :7])
    with pytest.raises(ValueError, match="last_count is 0"):
        text_attention(q, k, v, last_count=0)


@pytest.mark.parametrize(
    ("dim", "dtype", "keys", "count", "message"),
    [
        (64, jnp.bfloat16, 4, 1, "head_dim is 64"),
        (128, jnp.float16, 4, 1, "float16"),
        (128, jnp.bfloat16, 256, 3, "257 columns"),
    ],
)
def test_a_forced_kernel_that_cannot_run_says_why(dim, dtype, keys, count, message):
    q, k = jnp.zeros((1, 8, 1, dim), dtype), jnp.zeros((1, keys, 1, dim), dtype)
    with pytest.raises(NotImplementedError, match=message):
        text_attention(q, k, k, last_count=count, implementation="interpret")


def test_another_gpu_is_refused_by_name():
    q, k = jnp.zeros((1, 8, 1, 128), jnp.bfloat16), jnp.zeros((1, 3, 1, 128), jnp.bfloat16)
    with compiling_for((8, 9)), pytest.raises(NotImplementedError, match="sm_89"):
        text_attention(q, k, k, implementation="mosaic_gpu")
