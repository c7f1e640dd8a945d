"""Attention with sizes on a GPU: no score matrix and no logarithm, every query read once.

One program a tile of queries of one head goes through the keys, tile by tile, and keeps the greatest score so far, the
sum of the weights and the weighed values (online softmax, arXiv 1805.02867, as in FlashAttention, arXiv 2205.14135). A
key's weight is its size times the exponential of its score, in float32.

Letters: ``B`` batch, ``H`` heads, ``M`` queries, ``N`` tokens, ``d`` head channels.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

from pyra.kernels.choice import interpreted

ROWS_A_PROGRAM, KEYS_A_TILE = 64, 32
WARPS, STAGES = 4, 2
LEAST_CHANNELS = 16  # what a tensor core takes


@triton.jit
def attend_kernel(
    query,
    key,
    value,
    sizes,
    out,
    queries,
    tokens,
    heads,
    dim,
    scale,
    stride_qb,
    stride_qh,
    stride_qn,
    stride_qd,
    stride_kb,
    stride_kh,
    stride_kn,
    stride_kd,
    stride_vb,
    stride_vh,
    stride_vn,
    stride_vd,
    stride_sb,
    stride_s,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    WHOLE: tl.constexpr,
    WIDEN: tl.constexpr,
):
    """Attend from some queries of one head; ``scale`` makes scores powers of two, ``WHOLE`` says that d is DIM.

    ``WIDEN`` multiplies in float32: the interpreter cannot multiply bfloat16.
    """
    tiles = tl.cdiv(queries, ROWS)
    of = (tl.program_id(0) // tiles).to(tl.int64)
    sample, head = of // heads, of % heads
    row = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, DIM)
    known = channel < (DIM if WHOLE else dim)
    at = query + sample * stride_qb + head * stride_qh
    at += row.to(tl.int64)[:, None] * stride_qn + channel.to(tl.int64)[None, :] * stride_qd
    asked = (row[:, None] < queries) & known[None, :]
    a = tl.load(at, mask=asked, other=0.0)  # [ROWS, DIM]
    if WIDEN:
        a = a.to(tl.float32)
    key += sample * stride_kb + head * stride_kh
    value += sample * stride_vb + head * stride_vh
    sizes += sample * stride_sb
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    mixed = tl.zeros([ROWS, DIM], dtype=tl.float32)
    for start in range(0, tokens, KEYS):
        token = start + tl.arange(0, KEYS)
        inside = token < tokens
        place = token.to(tl.int64)
        columns = channel.to(tl.int64)
        b = tl.load(
            key + place[None, :] * stride_kn + columns[:, None] * stride_kd,
            mask=inside[None, :] & known[:, None],
            other=0.0,
        )  # [DIM, KEYS]
        v = tl.load(
            value + place[:, None] * stride_vn + columns[None, :] * stride_vd,
            mask=inside[:, None] & known[None, :],
            other=0.0,
        )  # [KEYS, DIM]
        if WIDEN:
            b, v = b.to(tl.float32), v.to(tl.float32)
        count = tl.load(sizes + place * stride_s, mask=inside, other=0).to(tl.float32)
        scores = tl.where(count[None, :] > 0, tl.dot(a, b) * scale, float("-inf"))
        higher = tl.maximum(top, tl.max(scores, axis=1))
        level = tl.where(higher == float("-inf"), 0.0, higher)  # padding alone so far
        weight = tl.exp2(scores - level[:, None]) * count[None, :]
        fade = tl.exp2(top - level)
        total = total * fade + tl.sum(weight, axis=1)
        mixed = tl.dot(weight.to(v.dtype), v, mixed * fade[:, None])
        top = higher
    mixed /= tl.where(total == 0, 1.0, total)[:, None]
    at = out + ((sample * queries + row)[:, None] * heads + head) * dim + channel[None, :]
    tl.store(at, mixed.to(out.dtype.element_ty), mask=asked)


def attend_sizes(query: Tensor, key: Tensor, value: Tensor, size: Tensor, scale: float) -> Tensor:
    """Attend as :func:`pyra.kernels.attend.reference` does; where all keys are padding, the result is 0."""
    batch, heads, queries, dim = query.shape
    width = max(triton.next_power_of_2(dim), LEAST_CHANNELS)
    out = query.new_empty(batch, queries, heads, dim)
    if out.numel():
        attend_kernel[(batch * heads * triton.cdiv(queries, ROWS_A_PROGRAM),)](
            query,
            key,
            value,
            size,
            out,
            queries,
            key.shape[2],
            heads,
            dim,
            scale * math.log2(math.e),
            *query.stride(),
            *key.stride(),
            *value.stride(),
            *size.stride()[:2],
            DIM=width,
            ROWS=ROWS_A_PROGRAM,
            KEYS=KEYS_A_TILE,
            WHOLE=width == dim,
            WIDEN=interpreted(),
            num_warps=WARPS,
            num_stages=STAGES,
        )
    return out.transpose(1, 2)
