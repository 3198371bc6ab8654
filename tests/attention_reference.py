"""Attention in float64 and the inputs that break it: what the attention ops are compared with."""

import numpy as np

DATA = ("gaussian", "outliers", "large mean", "constant", "zeros")


def inputs(kind, batch, lq, lk, heads, dim, seed=0):
    """q, k, v float32. Outliers: two channels of K and V 20 times the others; large mean: K shifted by 6 sigma."""
    rng = np.random.default_rng(seed)
    q = rng.standard_normal((batch, lq, heads, dim))
    k, v = rng.standard_normal((2, batch, lk, heads, dim))
    if kind == "outliers":
        for x in (k, v):
            x[..., [3, dim // 2]] *= 20
    elif kind == "large mean":
        k = k + 6 * rng.standard_normal((heads, dim))
    elif kind == "constant":
        q, k, v = np.full_like(q, 0.5), np.full_like(k, -2.0), np.full_like(v, 3.0)
    elif kind == "zeros":
        q, k, v = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    elif kind == "huge logits":
        q, k = 100 * q, 100 * k
    return tuple(x.astype(np.float32) for x in (q, k, v))


def random_blocks(batch, lq, lk, heads, block_q, block_k, count, seed=0):
    """int32 [batch, heads, query blocks, count]: different key blocks in each list, the ragged last one in some."""
    rng = np.random.default_rng(seed)
    blocks_q, blocks_k = -(-lq // block_q), -(-lk // block_k)
    order = rng.random((batch, heads, blocks_q, blocks_k)).argsort(axis=-1)
    return order[..., :count].astype(np.int32)


def attention(q, k, v, blocks=None, block_q=0, block_k=0):
    """(output, natural log-sum-exp [b, h, lq]), float64; keys limited to each query block's list."""
    weights, lse = _softmax(q, k, blocks, block_q, block_k)
    return np.einsum("bhls,bshd->blhd", weights, np.asarray(v, np.float64)), lse


def attention_gradients(q, k, v, do, dlse, blocks, block_q, block_k):
    """(dq, dk, dv), float64, for the cotangents do of the output and dlse of the natural log-sum-exp."""
    weights, _ = _softmax(q, k, blocks, block_q, block_k)
    q, k, v, do = (np.asarray(x, np.float64) for x in (q, k, v, do))
    slope = np.einsum("blhd,bshd->bhls", do, v)
    slope = weights * (slope - (weights * slope).sum(-1, keepdims=True) + dlse[..., None]) / np.sqrt(q.shape[-1])
    dq, dk = np.einsum("bhls,bshd->blhd", slope, k), np.einsum("bhls,blhd->bshd", slope, q)
    return dq, dk, np.einsum("bhls,blhd->bshd", weights, do)


def _softmax(q, k, blocks, block_q, block_k):
    """(weights [b, h, lq, lk], log-sum-exp [b, h, lq])"""
    q, k = (np.asarray(x, np.float64) for x in (q, k))
    scores = np.einsum("blhd,bshd->bhls", q, k) / np.sqrt(q.shape[-1])
    if blocks is not None:
        allowed = np.zeros((*scores.shape[:2], blocks.shape[2], -(-k.shape[1] // block_k)), bool)
        np.put_along_axis(allowed, np.asarray(blocks), True, axis=-1)
        allowed = allowed.repeat(block_q, axis=2)[:, :, : q.shape[1]].repeat(block_k, axis=3)[..., : k.shape[1]]
        scores = np.where(allowed, scores, -np.inf)
    top = scores.max(-1, keepdims=True)
    weights = np.exp(scores - top)
    total = weights.sum(-1, keepdims=True)
    return weights / total, (top + np.log(total))[..., 0]


def relative(got, want):
    """Relative L2 error; of zeros, the error itself."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.linalg.norm(got - want) / (np.linalg.norm(want) or 1.0)


def cosine(got, want):
    got, want = np.asarray(got, np.float64).ravel(), np.asarray(want, np.float64).ravel()
    return got @ want / (np.linalg.norm(got) * np.linalg.norm(want))
