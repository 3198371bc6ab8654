"""Attention in plain XLA and bounded memory: the path for CPUs and for anything the kernels do not cover.

Work is cut into chunks of queries, run one after the other by `lax.map`; each chunk's temporaries stay under
`chunk_bytes()` (or one chunk of the smallest size, where that alone is larger). The body of the loop is under
`jax.checkpoint`, so the gradient is bounded too. No custom derivative: reverse and forward mode both work.

Arrays here are [n, l, d] with n = batch * heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels._quantize_qkv import E4M3_MAX, quantize_query_key, rounded_value
from pallas_kernels.dispatch import has_cuda
from pallas_kernels.rounding import round_e4m3

MIN_ROWS = 32
"""Fewest query rows in a chunk of dense attention: below it each chunk re-reads K and V for too little work."""


def chunk_bytes() -> int:
    """Bound on the temporaries of one chunk.

    A CPU is fastest when they stay in its caches and yet are large enough for a loop's cost not to show (measured:
    at 8,192 tokens 16 MiB beats 4 and 64 MiB in dense attention, at 320 tokens it saves the loop); a GPU wants
    enough work in each launch.
    """
    return 16 * 2**20 if jax.default_backend() == "cpu" and not has_cuda() else 256 * 2**20


def compute_dtype(dtype: jnp.dtype) -> jnp.dtype:
    """Dtype of scores and softmax: float32, or float64 for float64 inputs (finite differences)."""
    return jnp.promote_types(dtype, jnp.float32)


def map_chunks(body: Callable, arrays: tuple[Array, ...], bytes_each: int):
    """`body(*arrays)` over the leading axis, at most `chunk_bytes()` at a time. `body` returns a tuple of arrays."""
    count = arrays[0].shape[0]
    steps = -(-count // max(1, chunk_bytes() // max(1, bytes_each)))
    if steps == 1:
        return body(*arrays)
    size = -(-count // steps)
    steps = -(-count // size)

    def cut(x):
        x = jnp.pad(x, ((0, steps * size - count),) + ((0, 0),) * (x.ndim - 1))
        return x.reshape(steps, size, *x.shape[1:])

    out = lax.map(jax.checkpoint(lambda chunk: body(*chunk)), tuple(cut(x) for x in arrays))
    return tuple(x.reshape(steps * size, *x.shape[2:])[:count] for x in out)


def _softmax(s: Array) -> tuple[Array, Array, Array]:
    """(exp(s - max), its sum, log-sum-exp) over the last axis. No gradient through the maximum: it cancels."""
    m = lax.stop_gradient(jnp.max(s, axis=-1, keepdims=True))
    p = jnp.exp(s - m)
    total = jnp.sum(p, axis=-1, keepdims=True)
    return p, total, (m + jnp.log(total))[..., 0]


def _fp8_product(p: Array, total: Array, v8: Array, v_scale: Array) -> Array:
    """softmax(s) @ v with e4m3 probabilities (scaled to [0, 448]) and values; the denominator stays float32."""
    p8 = round_e4m3(p * E4M3_MAX).astype(jnp.bfloat16)
    o = jnp.einsum("nqk,nkd->nqd", p8, v8, preferred_element_type=jnp.float32)
    return o * v_scale / (total * E4M3_MAX)


def _over_heads_and_rows(body, per_row: tuple[Array, ...], per_head: tuple[Array, ...], keys: int) -> Array:
    """Map `body(*per_row, *per_head)` over chunks of rows, and over groups of heads where one row block of all
    heads would already exceed the bound. per_row arrays are [n, l, ...], per_head arrays [n, ...]."""
    n, rows = per_row[0].shape[:2]
    bytes_each = 12 * keys  # one row of scores, probabilities and their low-precision copy
    group = max(1, min(n, chunk_bytes() // (bytes_each * min(rows, MIN_ROWS))))
    group = max(g for g in range(1, group + 1) if n % g == 0)

    def one_group(*arrays):
        first, rest = arrays[: len(per_row)], arrays[len(per_row) :]
        turned = tuple(jnp.moveaxis(x, 1, 0) for x in first)
        (o,) = map_chunks(
            lambda *chunk: (jnp.moveaxis(body(*(jnp.moveaxis(x, 0, 1) for x in chunk), *rest), 1, 0),),
            turned,
            bytes_each * group,
        )
        return jnp.moveaxis(o, 0, 1)

    if group == n:
        return one_group(*per_row, *per_head)
    cut = tuple(x.reshape(n // group, group, *x.shape[1:]) for x in per_row + per_head)
    out = lax.map(lambda xs: one_group(*xs), cut)
    return out.reshape(n, *out.shape[2:])


def dense_xla(
    q: Float[Array, "n lq d"], k: Float[Array, "n lk d"], v: Float[Array, "n lk d"], scale: float
) -> Float[Array, "n lq d"]:
    """softmax(scale q k^T) v with float32 scores; P is rounded to v's dtype before PV."""
    dtype = compute_dtype(q.dtype)

    def body(q, k, v):
        s = jnp.einsum("nqd,nkd->nqk", q, k, preferred_element_type=dtype) * scale
        p, total, _ = _softmax(s)
        o = jnp.einsum("nqk,nkd->nqd", p.astype(v.dtype), v, preferred_element_type=dtype)
        return (o / total).astype(q.dtype)

    return _over_heads_and_rows(body, (q,), (k, v), k.shape[1])


def sage_xla(
    q: Float[Array, "n lq d"],
    k: Float[Array, "n lk d"],
    v: Float[Array, "n lk d"],
    scale: float,
    block_q: int,
    block_k: int,
    smooth_k: bool,
) -> Float[Array, "n lq d"]:
    """Dense attention with the kernels' number formats: INT8 QK^T in int32, e4m3 PV in float32."""
    lq, lk = q.shape[1], k.shape[1]
    q8, q_scale, k8, k_scale = quantize_query_key(q, k, block_q, block_k, smooth_k)
    v8, v_scale = rounded_value(v)
    row_scale = jnp.repeat(q_scale * scale, block_q, axis=1)[:, :lq]
    column_scale = jnp.repeat(k_scale, block_k, axis=1)[:, :lk]

    def body(q8, row_scale, k8, column_scale, v8, v_scale):
        s = jnp.einsum("nqd,nkd->nqk", q8, k8, preferred_element_type=jnp.int32)
        s = s.astype(jnp.float32) * (row_scale[:, :, None] * column_scale[:, None, :])
        p, total, _ = _softmax(s)
        return _fp8_product(p, total, v8, v_scale[:, None]).astype(q.dtype)

    per_head = (k8[:, :lk], column_scale, v8, v_scale)
    return _over_heads_and_rows(body, (q8[:, :lq], row_scale), per_head, lk)


def block_sparse_xla(
    q: Float[Array, "n lq d"],
    k: Float[Array, "n lk d"],
    v: Float[Array, "n lk d"],
    block_index: Int[Array, "n nq s"],
    scale: float,
    block_q: int,
    block_k: int,
    quantized: bool,
) -> tuple[Float[Array, "n lq d"], Float[Array, "n lq"]]:
    """Attention of each query block over its own list of key blocks: (output, natural log-sum-exp)."""
    n, lq, dim = q.shape
    lk = k.shape[1]
    nq, nk, selected = -(-lq // block_q), -(-lk // block_k), block_index.shape[-1]
    dtype = compute_dtype(q.dtype)

    def blocks(x, block):
        x = jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0)))
        return x.reshape(n * (x.shape[1] // block), block, dim)

    index = block_index.reshape(n * nq, selected).astype(jnp.int32)
    head = jnp.repeat(jnp.arange(n, dtype=jnp.int32), nq)
    keys = selected * block_k

    def gather(x, index, head):
        # Indices are valid by contract: no clamping, no fill.
        return x.at[index + nk * head[:, None]].get(mode="promise_in_bounds").reshape(-1, keys, dim)

    def mask_end(s, index):
        if lk % block_k == 0:
            return s
        position = index[:, :, None] * block_k + jnp.arange(block_k)
        return jnp.where((position < lk).reshape(-1, 1, keys), s, -jnp.inf)

    if quantized:
        q8, q_scale, k8, k_scale = quantize_query_key(q, k, block_q, block_k)
        v8, v_scale = rounded_value(v)
        qb, kb = blocks(q8, block_q), blocks(k8, block_k)
        vb = blocks(v8, block_k)
        k_scale = k_scale.reshape(n * nk)

        def quantized_body(qb, q_scale, index, head):
            s = jnp.einsum("nqd,nkd->nqk", qb, gather(kb, index, head), preferred_element_type=jnp.int32)
            column = jnp.repeat(k_scale[index + nk * head[:, None]], block_k, axis=1)
            s = s.astype(jnp.float32) * (q_scale[:, None, None] * column[:, None, :])
            p, total, lse = _softmax(mask_end(s, index))
            o = _fp8_product(p, total, gather(vb, index, head), v_scale[head][:, None])
            return o.astype(q.dtype), lse

        body, arrays = quantized_body, (qb, q_scale.reshape(n * nq) * scale, index, head)
    else:
        kb, vb = blocks(k, block_k), blocks(v, block_k)

        def exact_body(qb, index, head):
            s = jnp.einsum("nqd,nkd->nqk", qb, gather(kb, index, head), preferred_element_type=dtype)
            p, total, lse = _softmax(mask_end(s * scale, index))
            vs = gather(vb, index, head)
            o = jnp.einsum("nqk,nkd->nqd", p.astype(v.dtype), vs, preferred_element_type=dtype)
            return (o / total).astype(q.dtype), lse

        body, arrays = exact_body, (blocks(q, block_q), index, head)

    # Per query block: scores, probabilities and a low-precision copy; gathered K and V.
    bytes_each = keys * (block_q * 12 + dim * 2 * q.dtype.itemsize)
    o, lse = map_chunks(body, arrays, bytes_each)
    return o.reshape(n, nq * block_q, dim)[:, :lq], lse.reshape(n, nq * block_q)[:, :lq]


def default_scale(head_dim: int) -> float:
    return 1.0 / math.sqrt(head_dim)
