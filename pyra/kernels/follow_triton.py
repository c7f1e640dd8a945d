"""Following tokens on a GPU, one program a sample: the row of each token is noted, then every map is read through it.

Letters: ``B`` batch, ``N`` tokens, ``N0`` tokens at the first layer, ``M`` tokens left, ``r`` tokens removed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ENTRIES_A_TILE = 256
WARPS = 4


@triton.jit
def follow_kernel(
    total,
    old_map,
    old_places,
    kept,
    source,
    target,
    row_after,
    size,
    new_map,
    new_places,
    original,
    left,
    pairs,
    stride_tb,
    stride_t,
    stride_mb,
    stride_m,
    stride_pb,
    stride_p,
    TILE: tl.constexpr,
    HAS_MAP: tl.constexpr,
    HAS_PLACES: tl.constexpr,
):
    """Follow the tokens of one sample."""
    sample = tl.program_id(0).to(tl.int64)
    total += sample * stride_tb
    old_map += sample * stride_mb
    old_places += sample * stride_pb
    kept += sample * left
    source += sample * pairs
    target += sample * pairs
    row_after += sample * (left + pairs)
    size += sample * left
    new_map += sample * original
    new_places += sample * left
    for start in range(0, left, TILE):
        row = start + tl.arange(0, TILE)
        inside = row < left
        token = tl.load(kept + row, mask=inside, other=0)
        tl.store(row_after + token, row.to(tl.int64), mask=inside)
        whole = tl.load(total + row.to(tl.int64) * stride_t, mask=inside, other=0)
        tl.store(size + row, whole.to(tl.int32), mask=inside)
        place = token
        if HAS_PLACES:
            place = tl.load(old_places + token * stride_p, mask=inside, other=0)
        tl.store(new_places + row, place, mask=inside)
    for start in range(0, pairs, TILE):
        pair = start + tl.arange(0, TILE)
        inside = pair < pairs
        token = tl.load(source + pair, mask=inside, other=0)
        tl.store(row_after + token, tl.load(target + pair, mask=inside, other=0), mask=inside)
    tl.debug_barrier()
    for start in range(0, original, TILE):
        entry = start + tl.arange(0, TILE)
        inside = entry < original
        token = entry.to(tl.int64)
        if HAS_MAP:
            token = tl.load(old_map + entry.to(tl.int64) * stride_m, mask=inside, other=0)
        tl.store(new_map + entry, tl.load(row_after + token, mask=inside, other=0), mask=inside)


def follow_tokens(
    total: Tensor, source_map: Tensor | None, positions: Tensor | None, kept: Tensor, source: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Follow as :func:`pyra.kernels.follow.reference` does; sizes, map and positions of any strides."""
    batch, left = kept.shape
    pairs = source.shape[1]
    original = left + pairs if source_map is None else source_map.shape[1]
    size = total.new_empty(batch, left, 1, dtype=torch.int32)
    rows, places = kept.new_empty(batch, original), kept.new_empty(batch, left)
    if batch:
        follow_kernel[(batch,)](
            total,
            kept if source_map is None else source_map,
            kept if positions is None else positions,
            kept.contiguous(),
            source.contiguous(),
            target.contiguous(),
            kept.new_empty(batch, left + pairs),
            size,
            rows,
            places,
            original,
            left,
            pairs,
            *total.stride()[:2],
            *((0, 0) if source_map is None else source_map.stride()),
            *((0, 0) if positions is None else positions.stride()),
            TILE=ENTRIES_A_TILE,
            HAS_MAP=source_map is not None,
            HAS_PLACES=positions is not None,
            num_warps=WARPS,
        )
    return size, rows, places
