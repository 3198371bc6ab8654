"""Sparse-linear attention is its two branches, each as the reference defines it, and so are its derivatives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_reference import attention, inputs, relative
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call

from pallas_kernels import Rotary, block_sparse_attention, sla_block_map, sparse_linear_attention, turned
from pallas_kernels._hopper_attention import whole_rows
from pallas_kernels._hopper_rotate_queries import rotate_queries

FEATURES = {
    "softmax": lambda x: (
        np.exp(x - x.max(-1, keepdims=True)) / np.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)
    ),
    "elu": lambda x: np.where(x > 0, x + 1, np.exp(np.minimum(x, 0))),
    "relu": lambda x: np.maximum(x, 0),
}
SIZES = {"topk": 0.4, "block_q": 32, "block_k": 16}


def projection(dim, seed=3):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((dim, dim)) / np.sqrt(dim), rng.standard_normal(dim)


def expected(q, k, v, w, b, feature_map):
    """Both branches in float64, the linear one over all keys, token by token."""
    index = sla_block_map(jnp.asarray(q), jnp.asarray(k), **SIZES)
    sparse, _ = attention(q, k, v, index, SIZES["block_q"], SIZES["block_k"])
    fq, fk = (FEATURES[feature_map](np.asarray(x, np.float64)) for x in (q, k))
    weights = np.einsum("blhd,bshd->bhls", fq, fk)
    linear = np.einsum("bhls,bshd->blhd", weights / (1e-5 + weights.sum(-1, keepdims=True)), np.asarray(v, np.float64))
    return sparse + linear @ w.T + b


@pytest.mark.parametrize("feature_map", FEATURES)
@pytest.mark.parametrize(
    # As in test_block_sparse_attention; bfloat16 also rounds the linear branch's features and state.
    ("dtype", "quantized", "bound"),
    [("float32", False, 1e-5), ("bfloat16", False, 1e-2), ("bfloat16", True, 5e-2)],
)
def test_equals_both_branches(feature_map, dtype, quantized, bound):
    q, k, v = (jnp.asarray(x, dtype) for x in inputs("gaussian", 2, 150, 150, 3, 32))
    w, b = (jnp.asarray(x, dtype) for x in projection(32))
    got = sparse_linear_attention(q, k, v, w, b, quantized=quantized, feature_map=feature_map, **SIZES)
    wide = (np.asarray(x, np.float64) for x in (w, b))
    assert relative(got, expected(q, k, v, *wide, feature_map)) <= bound


def test_a_zero_projection_leaves_the_sparse_branch():
    q, k, v = inputs("gaussian", 1, 100, 100, 2, 32)
    got = sparse_linear_attention(q, k, v, jnp.zeros((32, 32)), jnp.zeros(32), **SIZES)
    index = sla_block_map(q, k, **SIZES)
    want = block_sparse_attention(q, k, v, index, block_q=SIZES["block_q"], block_k=SIZES["block_k"])
    np.testing.assert_array_equal(got, want)


def test_derivatives_are_those_of_finite_differences():
    """Both modes, all five inputs, in float64. The point is generic: no choice of blocks changes within the step."""
    with jax.enable_x64(True):
        arrays = [np.asarray(x, np.float64) for x in inputs("gaussian", 1, 40, 40, 2, 16)]
        point = tuple(jnp.asarray(x) for x in [*arrays, *projection(16)])
        rng = np.random.default_rng(1)
        direction = tuple(jnp.asarray(rng.standard_normal(x.shape)) for x in point)
        weights = jnp.asarray(rng.standard_normal(point[0].shape))
        op = functools.partial(sparse_linear_attention, topk=0.4, block_q=16, block_k=8)
        loss = jax.jit(lambda *args: jnp.sum(op(*args) * weights))

        def along(step):
            return loss(*(x + step * d for x, d in zip(point, direction, strict=True)))

        difference = (along(1e-5) - along(-1e-5)) / 2e-5
        gradients = jax.grad(loss, argnums=tuple(range(5)))(*point)
        reverse = sum(jnp.vdot(g, d) for g, d in zip(gradients, direction, strict=True))
        assert float(jax.jvp(loss, point, direction)[1]) == pytest.approx(float(difference), rel=1e-6)
        assert float(reverse) == pytest.approx(float(difference), rel=1e-6)


def test_a_gradient_along_some_arguments_is_that_part_of_the_whole():
    """As where q and k are frozen: what does not move is a constant to the kernels' derivatives too."""
    rng = np.random.default_rng(0)
    x = [jnp.asarray(rng.normal(size=(1, 64, 1, 64)), jnp.bfloat16) for _ in range(3)]
    w, b = (jnp.asarray(rng.normal(size=size) / 8, jnp.bfloat16) for size in ((64, 64), (64,)))

    def loss(*args):
        o = sparse_linear_attention(*args, topk=0.5, block_q=64, block_k=64)
        return jnp.sum(jnp.square(o.astype(jnp.float32)))

    whole = jax.grad(loss, argnums=(0, 1, 2, 3, 4))(*x, w, b)
    for moving in ((2,), (0, 4)):
        for i, got in zip(moving, jax.grad(loss, argnums=moving)(*x, w, b), strict=True):
            assert np.any(np.asarray(got, np.float32))
            np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(whole[i], np.float32))


def test_the_quantised_op_has_no_derivative():
    q, k, v = inputs("gaussian", 1, 32, 32, 1, 16)
    w, b = jnp.zeros((16, 16)), jnp.zeros(16)
    with pytest.raises(NotImplementedError, match="quantised"):
        jax.grad(lambda q: sparse_linear_attention(q, k, v, w, b, quantized=True, **SIZES).sum())(q)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("w", "feature_map", "message"), [((16, 8), "softmax", "proj_w"), ((16, 16), "hedgehog", "feature_map 'hedgehog'")]
)
def test_what_does_not_fit_is_named(w, feature_map, message):
    q, k, v = inputs("gaussian", 1, 32, 32, 1, 16)
    with pytest.raises(ValueError, match=message):
        sparse_linear_attention(q, k, v, jnp.zeros(w), jnp.zeros(16), feature_map=feature_map, **SIZES)


def largest(o):
    return np.abs(np.asarray(o, np.float32)).max(axis=(2, 3))


@pytest.mark.parametrize(("dtype", "quantized"), [("float32", False), ("bfloat16", False), ("bfloat16", True)])
def test_the_largest_output_of_each_token(dtype, quantized):
    """That of what is returned, exactly, and what is returned stays what it is."""
    q, k, v = (jnp.asarray(x, dtype) for x in inputs("gaussian", 2, 70, 70, 3, 32))
    w, b = (jnp.asarray(x, dtype) for x in projection(32))
    o, amax = sparse_linear_attention(q, k, v, w, b, quantized=quantized, return_amax=True, **SIZES)
    assert o.dtype == q.dtype
    assert amax.dtype == jnp.float32
    np.testing.assert_array_equal(amax, largest(o))
    np.testing.assert_array_equal(o, sparse_linear_attention(q, k, v, w, b, quantized=quantized, **SIZES))


@pytest.mark.parametrize(("implementation", "dtype"), [("xla", "float32"), ("interpret", "bfloat16")])
def test_the_largest_output_has_the_derivative_of_its_formula(implementation, dtype):
    """In both modes, beside the output's own; the kernel's op has XLA's, to bfloat16."""
    q, k, v = (jnp.asarray(x, dtype) for x in inputs("gaussian", 1, 72, 72, 1, 64))
    w, b = (jnp.asarray(x, dtype) for x in projection(64))
    op = functools.partial(sparse_linear_attention, topk=0.5, block_q=64, block_k=64)

    def both(v):
        o, amax = op(q, k, v, w, b, return_amax=True, implementation=implementation)
        return jnp.sum(o.astype(jnp.float32)) + jnp.sum(amax)

    def formula(v):
        o = op(q, k, v, w, b, implementation="xla").astype(jnp.float32)
        return jnp.sum(o) + jnp.sum(jnp.max(jnp.abs(o), axis=(2, 3)))

    bound = 1e-5 if dtype == "float32" else 3e-2
    assert relative(jax.grad(both)(v), jax.grad(formula)(v)) <= bound
    found, want = (jax.jvp(loss, (v,), (v,))[1] for loss in (both, formula))
    assert float(found) == pytest.approx(float(want), rel=bound)


@pytest.mark.parametrize(
    ("length", "dim", "blocks", "quantized", "feature_map"),
    [
        (130, 64, (64, 128), False, "softmax"),
        # Private rings of 128 keys beside the linear branch's matrix: of one slot each.
        (700, 128, (64, 128), False, "softmax"),
        pytest.param(200, 128, (128, 64), False, "softmax", marks=pytest.mark.slow),
        pytest.param(200, 128, (128, 64), True, "softmax", marks=pytest.mark.slow),
        pytest.param(130, 64, (64, 64), True, "elu", marks=pytest.mark.slow),
        pytest.param(130, 64, (64, 64), False, "relu", marks=pytest.mark.slow),
    ],
)
def test_the_fused_hopper_kernels_agree_in_the_interpreter(length, dim, blocks, quantized, feature_map):
    """Both branches in one kernel, on ragged lengths, without races. Bounds: bfloat16 rounds the linear branch once
    here and three times in XLA's path; quantised, as in test_sage_attention."""
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in inputs("gaussian", 1, length, length, 1, dim))
    w, b = (jnp.asarray(x, jnp.bfloat16) for x in projection(dim))
    op = functools.partial(
        sparse_linear_attention,
        topk=0.5,
        block_q=blocks[0],
        block_k=blocks[1],
        quantized=quantized,
        feature_map=feature_map,
    )
    got = jax.block_until_ready(op(q, k, v, w, b, implementation="interpret"))
    assert not interpret_pallas_call.get_races().races_found
    want = op(q, k, v, w, b, implementation="xla")
    assert relative(got, want) <= (3e-2 if quantized else 5e-3)
    assert relative(op(q, k, v, 0 * w, 0 * b, implementation="xla"), want) > 0.1, "the linear branch does not show"


@pytest.mark.parametrize(
    ("batch", "length", "dim", "blocks", "quantized"),
    [
        # Lengths end within the rows that TMA moves, within a warpgroup's, or leave one without any.
        (2, 135, 64, (64, 128), True),
        (1, 61, 64, (128, 64), False),
        pytest.param(1, 200, 128, (64, 64), True, marks=pytest.mark.slow),
        pytest.param(2, 197, 128, (128, 64), True, marks=pytest.mark.slow),
        pytest.param(1, 130, 64, (64, 64), False, marks=pytest.mark.slow),
        pytest.param(1, 300, 128, (64, 128), False, marks=pytest.mark.slow),
    ],
)
def test_the_fused_kernels_give_the_largest_output_of_each_token(batch, length, dim, blocks, quantized):
    """Over two heads, of what they return, exactly; without races."""
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in inputs("outliers", batch, length, length, 2, dim))
    w, b = (jnp.asarray(x, jnp.bfloat16) for x in projection(dim))
    op = functools.partial(sparse_linear_attention, topk=0.5, block_q=blocks[0], block_k=blocks[1], quantized=quantized)
    o, amax = jax.block_until_ready(op(q, k, v, w, b, return_amax=True, implementation="interpret"))
    assert not interpret_pallas_call.get_races().races_found
    assert amax.dtype == jnp.float32
    np.testing.assert_array_equal(amax, largest(o))
    want = op(q, k, v, w, b, implementation="xla")
    assert relative(o, want) <= (3e-2 if quantized else 5e-3)


def rotary(q, seed=5):
    """Something to multiply q by, near 1 over its rms, and angles."""
    rng = np.random.default_rng(seed)
    b, length, heads, dim = q.shape
    weight = 1 + rng.standard_normal(heads * dim) / 8
    angle = rng.uniform(0, 6.28, (length, dim // 2))
    parts = rng.uniform(0.5, 1.5, (b, length)), weight, np.cos(angle), np.sin(angle)
    return Rotary(*(jnp.asarray(part, jnp.float32) for part in parts))


@pytest.mark.parametrize(("dtype", "quantized"), [("float32", False), ("bfloat16", False), ("bfloat16", True)])
def test_queries_may_come_as_their_product_gave_them(dtype, quantized):
    q, k, v = (jnp.asarray(x, dtype) for x in inputs("gaussian", 2, 70, 70, 3, 32))
    w, b = (jnp.asarray(x, dtype) for x in projection(32))
    op = functools.partial(sparse_linear_attention, quantized=quantized, return_amax=True, **SIZES)
    found = op(q, k, v, w, b, q_rotary=rotary(q))
    want = op(jax.jit(turned)(q, rotary(q)), k, v, w, b)
    jax.tree.map(np.testing.assert_array_equal, found, want)
    assert relative(found[0], op(q, k, v, w, b)[0]) > 0.1, "turning does not show"


@pytest.mark.parametrize(("implementation", "dtype"), [("xla", "float32"), ("interpret", "bfloat16")])
def test_derivatives_through_what_turns_the_queries(implementation, dtype):
    """In both modes, with respect to q and to the factors; the kernel's op has XLA's, to bfloat16."""
    q, k, v = (jnp.asarray(x, dtype) for x in inputs("gaussian", 1, 72, 72, 1, 64))
    w, b = (jnp.asarray(x, dtype) for x in projection(64))
    op = functools.partial(sparse_linear_attention, topk=0.5, block_q=64, block_k=64)
    rest = rotary(q)[1:]

    def found(q, factor):
        o = op(q, k, v, w, b, q_rotary=Rotary(factor, *rest), implementation=implementation)
        return jnp.sum(jnp.sin(o.astype(jnp.float32)))

    def formula(q, factor):
        o = op(turned(q, Rotary(factor, *rest)), k, v, w, b, implementation="xla")
        return jnp.sum(jnp.sin(o.astype(jnp.float32)))

    point = q, rotary(q).factor
    bound = 1e-5 if dtype == "float32" else 3e-2
    for got, want in zip(*(jax.grad(loss, argnums=(0, 1))(*point) for loss in (found, formula)), strict=True):
        assert relative(got, want) <= bound
    forward = [float(jax.jvp(loss, point, point)[1]) for loss in (found, formula)]
    assert forward[0] == pytest.approx(forward[1], rel=bound)


def test_the_quantised_op_has_no_derivative_in_the_factors_either():
    q, k, v = inputs("gaussian", 1, 32, 32, 1, 16)
    w, b = jnp.zeros((16, 16)), jnp.zeros(16)

    def loss(factor):
        turn = Rotary(factor, *rotary(q)[1:])
        return sparse_linear_attention(q, k, v, w, b, quantized=True, q_rotary=turn, **SIZES).sum()

    with pytest.raises(NotImplementedError, match="quantised"):
        jax.grad(loss)(rotary(q).factor)


@pytest.mark.parametrize(
    ("batch", "length", "dim", "blocks", "quantized"),
    [
        (2, 135, 64, (64, 128), True),
        (1, 61, 64, (128, 64), False),
        pytest.param(1, 200, 128, (64, 128), True, marks=pytest.mark.slow),
        pytest.param(1, 300, 64, (128, 64), True, marks=pytest.mark.slow),
    ],
)
def test_the_fused_kernels_turn_the_queries_on_the_way(batch, length, dim, blocks, quantized):
    """Over two heads: the same as from queries turned before, bit for bit where a block has 64 rows. Of 128 rows each
    half has a scale of its own, which leaves an error below that of INT8."""
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in inputs("outliers", batch, length, length, 2, dim))
    w, b = (jnp.asarray(x, jnp.bfloat16) for x in projection(dim))
    op = functools.partial(sparse_linear_attention, topk=0.5, block_q=blocks[0], block_k=blocks[1], quantized=quantized)
    got = jax.block_until_ready(op(q, k, v, w, b, q_rotary=rotary(q), implementation="interpret"))
    assert not interpret_pallas_call.get_races().races_found
    before = rotate_queries(whole_rows(q), rotary(q), interpret=True).q[:, :length]
    want = op(before, k, v, w, b, implementation="interpret")
    if quantized and blocks[0] == 128:
        assert relative(got, want) <= 3e-2
    else:
        np.testing.assert_array_equal(got, want)
    assert relative(got, op(q, k, v, w, b, q_rotary=rotary(q), implementation="xla")) <= (3e-2 if quantized else 5e-3)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(("part", "message"), [("factor", "batch, length"), ("weight", "full width"), ("cos", "cos")])
def test_a_rotary_for_other_queries_is_named(part, message):
    q, k, v = inputs("gaussian", 1, 32, 32, 1, 16)
    turn = rotary(q)
    turn = turn._replace(**{part: getattr(turn, part)[..., :3]})
    with pytest.raises(ValueError, match=message):
        sparse_linear_attention(q, k, v, jnp.zeros((16, 16)), jnp.zeros(16), q_rotary=turn, **SIZES)
