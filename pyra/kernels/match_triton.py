"""Bipartite matching on a GPU in three kernels: no score matrix in device memory, the same plan on every run.

:func:`unit_kernel` reads every key once and writes its mean over the heads at length 1. :func:`best_kernel` multiplies
even tokens (rows) by odd ones (columns), tile by tile, and keeps each row's best column. :func:`rank_kernel`, one
program a sample, ranks the rows by counting how many are better, which needs no sort and leaves nothing to chance: of
equal rows the one of lower index comes first, and a row that has a similarity that is no number comes before all
others. Ranks give the plan.

One program a sample could do all of it, but would read the keys of every odd token again for each tile of rows, and at
batch 1 leave all but one multiprocessor of a GPU idle.

Letters: ``B`` batch, ``N`` tokens, ``D`` feature channels, ``r`` tokens removed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TOKENS_A_PROGRAM, VALUES_A_PROGRAM = 16, 4096
ROWS_A_TILE, CHANNELS_A_STEP = 64, 64
UNIT_WARPS = 4
BEST_WARPS = 4
BEST_STAGES = 2  # of the pipeline: a third would leave room for one program fewer on a multiprocessor
RANK_WARPS = 8
NOT_A_NUMBER = tl.constexpr(2.0)  # stands for a row's best similarity where one is no number: above every cosine
NOTHING_YET = tl.constexpr(-2.0)  # below every cosine


@triton.jit
def unit_kernel(
    features,
    unit,
    tokens,
    dim,
    stride_b,
    stride_h,
    stride_n,
    stride_d,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    TILE: tl.constexpr,
):
    """Write the mean over heads of some tokens of one sample, at length 1: [TILE, DIM] float32."""
    sample = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * TILE + tl.arange(0, TILE)
    channel = tl.arange(0, DIM)
    inside = (token[:, None] < tokens) & (channel[None, :] < dim)
    at = features + sample * stride_b
    at += token.to(tl.int64)[:, None] * stride_n + channel.to(tl.int64)[None, :] * stride_d
    total = tl.zeros([TILE, DIM], dtype=tl.float32)
    for _ in range(HEADS):
        total += tl.load(at, mask=inside, other=0.0).to(tl.float32)
        at += stride_h
    mean = total / HEADS
    length = tl.sqrt(tl.sum(mean * mean, axis=1))
    out = unit + (sample * tokens + token)[:, None] * dim + channel[None, :]
    tl.store(out, mean / tl.maximum(length, 1e-12)[:, None], mask=inside)


@triton.jit
def best_kernel(
    unit,
    best,
    partner,
    tokens,
    dim,
    first_row,
    first_column,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    LONG: tl.constexpr,
):
    """Find the best columns of some rows of one sample."""
    sample = tl.program_id(0).to(tl.int64)
    rows, columns = (tokens + 1) // 2, tokens // 2
    channel = tl.arange(0, DIM)
    unit += sample * tokens * dim
    row = first_row + tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    at_rows = unit + 2 * row[:, None] * dim + channel[None, :]
    known = channel < dim
    a = tl.load(at_rows, mask=(row[:, None] < rows) & known[None, :], other=0.0)
    top = tl.full([ROWS], NOTHING_YET, tl.float32)
    choice = tl.full([ROWS], 0, tl.int32) + first_column
    for start in range(first_column, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        at_columns = unit + (2 * column[None, :] + 1) * dim + channel[:, None]
        b = tl.load(at_columns, mask=(column[None, :] < columns) & known[:, None], other=0.0)
        scores = tl.dot(a, b, input_precision="tf32x3")
        if LONG:
            for chunk in range(DIM, dim, DIM):
                more = chunk + channel < dim
                left = tl.load(at_rows + chunk, mask=(row[:, None] < rows) & more[None, :], other=0.0)
                right = tl.load(at_columns + chunk, mask=(column[None, :] < columns) & more[:, None], other=0.0)
                scores = tl.dot(left, right, scores, input_precision="tf32x3")
        scores = tl.where(scores == scores, scores, NOT_A_NUMBER)
        scores = tl.where(column[None, :] < columns, scores, NOTHING_YET)
        here, index = tl.max(scores, axis=1, return_indices=True, return_indices_tie_break_left=True)
        better = here > top
        top = tl.where(better, here, top)
        choice = tl.where(better, start + index, choice)
    tl.store(best + sample * rows + row, top, mask=row < rows)
    tl.store(partner + sample * rows + row, choice, mask=row < rows)


@triton.jit
def rank_kernel(
    best,
    partner,
    before,
    source,
    destination,
    kept,
    target,
    similarity,
    tokens,
    prefix,
    removed,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    GROUPED: tl.constexpr,
):
    """Rank the rows of one sample and write its plan."""
    sample = tl.program_id(0).to(tl.int64)
    rows, columns, left = (tokens + 1) // 2, tokens // 2, tokens - removed
    first_row, first_column = (prefix + 1) // 2, prefix // 2
    best += sample * rows
    partner += sample * rows
    before += sample * rows
    source += sample * removed
    destination += sample * removed
    target += sample * removed
    similarity += sample * removed
    kept += sample * left

    # `before` holds how many rows up to each, itself included, are sources.
    gone = tl.zeros([], dtype=tl.int32)
    for start in range(first_row, rows, ROWS):
        row = start + tl.arange(0, ROWS)
        mine = tl.load(best + row, mask=row < rows, other=-3.0)
        rank = tl.zeros([ROWS], dtype=tl.int32)
        for other in range(first_row, rows, COLUMNS):
            rival = other + tl.arange(0, COLUMNS)
            theirs = tl.load(best + rival, mask=rival < rows, other=-3.0)
            ahead = (theirs[None, :] > mine[:, None]) | (
                (theirs[None, :] == mine[:, None]) & (rival[None, :] < row[:, None])
            )
            rank += tl.sum((ahead & (rival[None, :] < rows)).to(tl.int32), axis=1)
        chosen = (rank < removed) & (row < rows)
        column = tl.load(partner + row, mask=row < rows, other=0)
        tl.store(source + rank, 2 * row.to(tl.int64), mask=chosen)
        tl.store(destination + rank, 2 * column.to(tl.int64) + 1, mask=chosen)
        tl.store(similarity + rank, tl.where(mine == NOT_A_NUMBER, float("nan"), mine), mask=chosen)
        so_far = gone + tl.cumsum(chosen.to(tl.int32), axis=0)
        gone += tl.sum(chosen.to(tl.int32), axis=0)
        tl.store(before + row, so_far, mask=row < rows)
        if GROUPED:
            tl.store(target + rank, (left - (columns - first_column) + column - first_column).to(tl.int64), mask=chosen)
            place = prefix + row - first_row - so_far
        else:
            place = 2 * row - so_far
        tl.store(kept + place, 2 * row.to(tl.int64), mask=(row < rows) & (rank >= removed))
    tl.debug_barrier()

    for start in range(0, prefix, ROWS):
        position = start + tl.arange(0, ROWS)
        tl.store(kept + position, position.to(tl.int64), mask=position < prefix)
    for start in range(first_column, columns, COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        if GROUPED:
            place = left - columns + column
        else:
            # Sources at or before row `column` stand before odd position 2 * column + 1; prefix rows have none.
            place = 2 * column + 1 - tl.load(before + column, mask=(column < columns) & (column >= first_row), other=0)
        tl.store(kept + place, 2 * column.to(tl.int64) + 1, mask=column < columns)
    if not GROUPED:
        for start in range(0, removed, ROWS):
            rank = start + tl.arange(0, ROWS)
            position = tl.load(destination + rank, mask=rank < removed, other=1)
            row = position // 2
            gone_before = tl.load(before + row, mask=(rank < removed) & (row >= first_row), other=0)
            tl.store(target + rank, position - gone_before, mask=rank < removed)


def match_bipartite(
    features: Tensor, heads: int | None, r: int, prefix: int, order: str
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Match as :func:`pyra.kernels.match.reference` does with ``"bipartite"``.

    Args:
        features: [B, N, D], [B, H, N, D] or [B, N, H, D], of any strides.
        heads: axis of the heads, None without.
        r: tokens to remove, no more than can be.
        prefix: leading tokens that take no part.
        order: ``"grouped"`` or ``"sequence"``.

    Returns:
        Source, destination, kept, target (int64) and similarity (float32).
    """
    if heads is None:
        features, heads = features.unsqueeze(1), 1
    if heads == 2:
        features = features.transpose(1, 2)
    batch, count, tokens, dim = features.shape
    rows = (tokens + 1) // 2
    new = features.new_empty
    best, partner = new(batch, rows, dtype=torch.float32), new(batch, rows, dtype=torch.int32)
    source, destination, target = (new(batch, r, dtype=torch.int64) for _ in range(3))
    kept, similarity = new(batch, tokens - r, dtype=torch.int64), new(batch, r, dtype=torch.float32)
    if batch:
        width, side = max(triton.next_power_of_2(dim), 16), tile(tokens, dim)
        together = tokens_a_program(width)
        unit = new(batch, tokens, dim, dtype=torch.float32)
        unit_kernel[(batch, triton.cdiv(tokens, together))](
            features,
            unit,
            tokens,
            dim,
            *features.stride(),
            HEADS=count,
            DIM=width,
            TILE=together,
            num_warps=UNIT_WARPS,
        )
        first_row = (prefix + 1) // 2
        if rows > first_row:
            best_kernel[(batch, triton.cdiv(rows - first_row, side))](
                unit,
                best,
                partner,
                tokens,
                dim,
                first_row,
                prefix // 2,
                DIM=min(width, CHANNELS_A_STEP),
                LONG=dim > CHANNELS_A_STEP,
                ROWS=side,
                COLUMNS=side,
                num_warps=BEST_WARPS,
                num_stages=BEST_STAGES,
            )
        rank_kernel[(batch,)](
            best,
            partner,
            torch.empty_like(partner),
            source,
            destination,
            kept,
            target,
            similarity,
            tokens,
            prefix,
            r,
            ROWS=side,
            COLUMNS=side,
            GROUPED=order == "grouped",
            num_warps=RANK_WARPS,
        )
    return source, destination, kept, target, similarity


def tile(tokens: int, dim: int) -> int:
    """Rows of a tile: no larger than registers hold, at least 16 (what a tensor core takes)."""
    most = ROWS_A_TILE if dim <= CHANNELS_A_STEP else ROWS_A_TILE // 2
    return min(max(triton.next_power_of_2((tokens + 1) // 2), 16), most)


def tokens_a_program(width: int) -> int:
    """Tokens that one program normalises: fewer of wide ones."""
    return max(min(VALUES_A_PROGRAM // width, TOKENS_A_PROGRAM), 1)
