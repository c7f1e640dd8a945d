"""Merging on a GPU, forward and backward: every token is read once and every output written once, in float32 inside.

Forward, :func:`prepare_kernel` (one program a sample) sorts the pairs by output row, in order of rank, and with
re-activation sums the channel weights over all pairs; :func:`merge_kernel` (one program a few output rows) then gathers
what belongs to its rows. Each row adds its sources in the same order on every run, so no atomics are needed and results
do not vary. Backward, :func:`pairs_backward_kernel` (one program a sample) does what re-activation needs, and
:func:`tokens_backward_kernel` writes the gradient of each input row once.

Letters: ``B`` batch, ``N`` tokens, ``M = N - r`` tokens left, ``C`` channels, ``r`` pairs.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS_A_PROGRAM = 4
PAIRS_A_TILE, VALUES_A_TILE = 8, 8192
INDICES_A_TILE = 64
ROWS_WARPS = 4
PREPARE_WARPS, PAIRS_WARPS = 4, 8


@triton.jit
def load_size(sizes, row, inside, stride, HAS_SIZE: tl.constexpr):
    """Sizes of rows as float32; ones where there are none."""
    if HAS_SIZE:
        return tl.load(sizes + row * stride, mask=inside, other=0).to(tl.float32)
    else:
        return tl.where(inside, 1.0, 0.0).to(tl.float32)


@triton.jit
def load_pair(
    x,
    sizes,
    source,
    destination,
    weight,
    pair,
    pairs,
    channel,
    channels,
    stride_n,
    stride_c,
    stride_s,
    HAS_SIZE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
):
    """Of some pairs: source rows [P, C], size-weighted sums of both rows [P, C], whether they count, and both sizes."""
    inside = pair < pairs
    s = tl.load(source + pair, mask=inside, other=0)
    d = tl.load(destination + pair, mask=inside, other=0)
    counted = tl.where(inside, 1.0, 0.0)
    if HAS_WEIGHT:
        counted = tl.load(weight + pair, mask=inside, other=0.0)
    grid = (counted[:, None] > 0) & (channel[None, :] < channels)
    both = inside[:, None] & (channel[None, :] < channels)
    columns = channel.to(tl.int64)[None, :] * stride_c
    moved = tl.load(x + s[:, None] * stride_n + columns, mask=grid, other=0.0).to(tl.float32)
    received = tl.load(x + d[:, None] * stride_n + columns, mask=both, other=0.0).to(tl.float32)
    source_size = load_size(sizes, s, inside, stride_s, HAS_SIZE) * counted
    received_size = load_size(sizes, d, inside, stride_s, HAS_SIZE)
    return moved, moved * source_size[:, None] + received * received_size[:, None], counted, source_size, received_size


@triton.jit
def normalise(sums, channel, channels, eps):
    """Rows [P, C] with mean 0 and variance 1, and what they were divided by: [P]."""
    inside = channel[None, :] < channels
    mean = tl.sum(sums, axis=1) / channels
    centred = tl.where(inside, sums - mean[:, None], 0.0)
    inverse = 1 / tl.sqrt(tl.sum(centred * centred, axis=1) / channels + eps)
    return centred * inverse[:, None], inverse


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1 / (1 + tl.exp(-x))


@triton.jit
def prepare_kernel(
    x,
    sizes,
    source,
    destination,
    target,
    weight,
    by_row,
    first,
    channel_gate,
    pair_gate,
    pair_weight,
    channel_weight,
    norm_weight,
    norm_bias,
    left,
    pairs,
    weighted_pairs,
    channels,
    eps,
    stride_b,
    stride_n,
    stride_c,
    stride_sb,
    stride_s,
    CHANNELS: tl.constexpr,
    PAIRS: tl.constexpr,
    TILE: tl.constexpr,
    HAS_SIZE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    REACTIVATED: tl.constexpr,
    SCALED: tl.constexpr,
    SHIFTED: tl.constexpr,
):
    """Sort the pairs of one sample by output row, and sum up what gates its channels and pairs."""
    sample = tl.program_id(0).to(tl.int64)
    source += sample * pairs
    destination += sample * pairs
    target += sample * pairs
    weight += sample * pairs
    by_row += sample * pairs
    first += sample * (left + 1)

    # Sorting by counting: a pair comes after all of earlier rows, and after those of its row that rank before it.
    for start in range(0, pairs, TILE):
        pair = start + tl.arange(0, TILE)
        row = tl.load(target + pair, mask=pair < pairs, other=0)
        place = tl.zeros([TILE], dtype=tl.int32)
        for other in range(0, pairs, TILE):
            rival = other + tl.arange(0, TILE)
            theirs = tl.load(target + rival, mask=rival < pairs, other=left)
            ahead = (theirs[None, :] < row[:, None]) | (
                (theirs[None, :] == row[:, None]) & (rival[None, :] < pair[:, None])
            )
            place += tl.sum((ahead & (rival[None, :] < pairs)).to(tl.int32), axis=1)
        tl.store(by_row + place, pair, mask=pair < pairs)
    for start in range(0, left + 1, TILE):
        row = start + tl.arange(0, TILE)
        count = tl.zeros([TILE], dtype=tl.int32)
        for other in range(0, pairs, TILE):
            rival = other + tl.arange(0, TILE)
            theirs = tl.load(target + rival, mask=rival < pairs, other=left)
            count += tl.sum(((theirs[None, :] < row[:, None]) & (rival[None, :] < pairs)).to(tl.int32), axis=1)
        tl.store(first + row, count, mask=row <= left)

    if REACTIVATED:
        x += sample * stride_b
        sizes += sample * stride_sb
        channel = tl.arange(0, CHANNELS)
        seen = channel < channels
        yielding = tl.load(channel_weight + channel, mask=seen, other=0.0).to(tl.float32)
        total = tl.zeros([CHANNELS], dtype=tl.float32)
        for start in range(0, pairs, PAIRS):
            pair = start + tl.arange(0, PAIRS)
            _, sums, counted, _, _ = load_pair(
                x,
                sizes,
                source,
                destination,
                weight,
                pair,
                pairs,
                channel,
                channels,
                stride_n,
                stride_c,
                stride_s,
                HAS_SIZE,
                HAS_WEIGHT,
            )
            info, _ = normalise(sums, channel, channels, eps)
            if SCALED:
                info *= tl.load(norm_weight + channel, mask=seen, other=0.0).to(tl.float32)[None, :]
            if SHIFTED:
                info += tl.load(norm_bias + channel, mask=seen, other=0.0).to(tl.float32)[None, :]
            info *= counted[:, None]
            w = tl.load(pair_weight + pair, mask=(pair < pairs) & (pair < weighted_pairs), other=0.0).to(tl.float32)
            total += tl.sum(info * w[:, None], axis=0)
            token = tl.sum(info * yielding[None, :], axis=1)
            tl.store(pair_gate + sample * pairs + pair, 2 * sigmoid(token) - 1, mask=pair < pairs)
        tl.store(channel_gate + sample * channels + channel, 2 * sigmoid(total), mask=seen)


@triton.jit
def merge_kernel(
    x,
    sizes,
    source,
    kept,
    weight,
    by_row,
    first,
    channel_gate,
    pair_gate,
    merged,
    merged_size,
    left,
    pairs,
    channels,
    stride_b,
    stride_n,
    stride_c,
    stride_sb,
    stride_s,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_SIZE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    REACTIVATED: tl.constexpr,
):
    """Write a few output rows of one sample, and their sizes."""
    sample = tl.program_id(0).to(tl.int64)
    x += sample * stride_b
    sizes += sample * stride_sb
    channel = tl.arange(0, CHANNELS)
    columns, seen = channel.to(tl.int64) * stride_c, channel < channels
    gate = tl.zeros([CHANNELS], dtype=tl.float32)
    if REACTIVATED:
        gate = tl.load(channel_gate + sample * channels + channel, mask=seen, other=0.0)
    begin = tl.program_id(1) * ROWS
    for row in range(begin, tl.minimum(begin + ROWS, left)):
        position = tl.load(kept + sample * left + row)
        own = load_size(sizes, position, True, stride_s, HAS_SIZE)
        start, stop = tl.load(first + sample * (left + 1) + row), tl.load(first + sample * (left + 1) + row + 1)
        total = own
        for place in range(start, stop):
            pair = sample * pairs + tl.load(by_row + sample * pairs + place)
            part = load_size(sizes, tl.load(source + pair), True, stride_s, HAS_SIZE)
            if HAS_WEIGHT:
                part *= tl.load(weight + pair)
            total += part
        divisor = tl.where(total == 0, 1.0, total)  # padding in padding keeps its destination
        value = tl.load(x + position * stride_n + columns, mask=seen, other=0.0).to(tl.float32)
        value *= tl.where(total == 0, 1.0, own / divisor)
        for place in range(start, stop):
            pair = sample * pairs + tl.load(by_row + sample * pairs + place)
            token = tl.load(source + pair)
            part = load_size(sizes, token, True, stride_s, HAS_SIZE)
            taken = seen
            if HAS_WEIGHT:
                counted = tl.load(weight + pair)
                part *= counted
                taken = channel < tl.where(counted > 0.0, channels, 0)
            moved = tl.load(x + token * stride_n + columns, mask=taken, other=0.0).to(tl.float32)
            if REACTIVATED:
                moved += tl.load(pair_gate + pair) * gate * moved
            value += part / divisor * moved
        out = sample * left + row
        tl.store(merged + out * channels + channel, value.to(merged.dtype.element_ty), mask=seen)
        tl.store(merged_size + out, total)


@triton.jit
def pairs_backward_kernel(
    gradient,
    merged_size,
    x,
    sizes,
    source,
    destination,
    target,
    weight,
    channel_gate,
    pair_gate,
    pair_weight,
    channel_weight,
    norm_weight,
    norm_bias,
    sums_gradient,
    pair_weight_gradient,
    channel_weight_gradient,
    norm_weight_gradient,
    norm_bias_gradient,
    token_gradient,
    left,
    pairs,
    weighted_pairs,
    channels,
    eps,
    stride_gb,
    stride_gn,
    stride_gc,
    stride_b,
    stride_n,
    stride_c,
    stride_sb,
    stride_s,
    CHANNELS: tl.constexpr,
    PAIRS: tl.constexpr,
    HAS_SIZE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    SCALED: tl.constexpr,
    SHIFTED: tl.constexpr,
):
    """Of one sample: the gradients of its pairs' sums [r, C], and its share of the weights' gradients."""
    sample = tl.program_id(0).to(tl.int64)
    gradient += sample * stride_gb
    x += sample * stride_b
    sizes += sample * stride_sb
    merged_size += sample * left
    source += sample * pairs
    destination += sample * pairs
    target += sample * pairs
    weight += sample * pairs
    pair_gate += sample * pairs
    token_gradient += sample * pairs
    channel = tl.arange(0, CHANNELS)
    seen = channel < channels
    gate = tl.load(channel_gate + sample * channels + channel, mask=seen, other=0.0)
    yielding = tl.load(channel_weight + channel, mask=seen, other=0.0).to(tl.float32)
    scale = tl.full([CHANNELS], 1.0, tl.float32)
    if SCALED:
        scale = tl.load(norm_weight + channel, mask=seen, other=0.0).to(tl.float32)
    shift = tl.zeros([CHANNELS], dtype=tl.float32)
    if SHIFTED:
        shift = tl.load(norm_bias + channel, mask=seen, other=0.0).to(tl.float32)

    # What reaches the gates: of a channel from all pairs, of a pair from all channels.
    total = tl.zeros([CHANNELS], dtype=tl.float32)
    for start in range(0, pairs, PAIRS):
        pair = start + tl.arange(0, PAIRS)
        inside = pair < pairs
        moved, _, _, source_size, _ = load_pair(
            x,
            sizes,
            source,
            destination,
            weight,
            pair,
            pairs,
            channel,
            channels,
            stride_n,
            stride_c,
            stride_s,
            HAS_SIZE,
            HAS_WEIGHT,
        )
        row = tl.load(target + pair, mask=inside, other=0)
        whole = tl.load(merged_size + row, mask=inside, other=1.0).to(tl.float32)
        share = source_size / tl.where(whole == 0, 1.0, whole)
        arriving = tl.load(
            gradient + row[:, None] * stride_gn + channel.to(tl.int64)[None, :] * stride_gc,
            mask=inside[:, None] & seen[None, :],
            other=0.0,
        ).to(tl.float32)
        product = arriving * share[:, None] * moved
        token = tl.load(pair_gate + pair, mask=inside, other=0.0)  # 2 sigmoid - 1
        total += tl.sum(product * token[:, None], axis=0)
        through = tl.sum(product * gate[None, :], axis=1) * (1 - token * token) / 2
        tl.store(token_gradient + pair, through, mask=inside)
    total *= gate * (1 - gate / 2)  # gate = 2 sigmoid
    tl.debug_barrier()

    to_channel = tl.zeros([CHANNELS], dtype=tl.float32)
    to_scale = tl.zeros([CHANNELS], dtype=tl.float32)
    to_shift = tl.zeros([CHANNELS], dtype=tl.float32)
    for start in range(0, pairs, PAIRS):
        pair = start + tl.arange(0, PAIRS)
        inside = pair < pairs
        _, sums, counted, _, _ = load_pair(
            x,
            sizes,
            source,
            destination,
            weight,
            pair,
            pairs,
            channel,
            channels,
            stride_n,
            stride_c,
            stride_s,
            HAS_SIZE,
            HAS_WEIGHT,
        )
        normal, inverse = normalise(sums, channel, channels, eps)
        info = (normal * scale[None, :] + shift[None, :]) * counted[:, None]
        through = tl.load(token_gradient + pair, mask=inside, other=0.0)
        weighted = inside & (pair < weighted_pairs)
        w = tl.load(pair_weight + pair, mask=weighted, other=0.0).to(tl.float32)
        tl.store(
            pair_weight_gradient + sample * weighted_pairs + pair, tl.sum(info * total[None, :], axis=1), mask=weighted
        )
        to_channel += tl.sum(info * through[:, None], axis=0)
        back = (w[:, None] * total[None, :] + through[:, None] * yielding[None, :]) * counted[:, None]
        to_shift += tl.sum(back, axis=0)
        to_scale += tl.sum(back * normal, axis=0)
        back *= scale[None, :]
        along = tl.sum(back * normal, axis=1) / channels
        level = tl.sum(back, axis=1) / channels
        back = (back - level[:, None] - normal * along[:, None]) * inverse[:, None]
        tl.store(
            sums_gradient + (sample * pairs + pair)[:, None] * channels + channel[None, :],
            back,
            mask=inside[:, None] & seen[None, :],
        )
    tl.store(channel_weight_gradient + sample * channels + channel, to_channel, mask=seen)
    tl.store(norm_weight_gradient + sample * channels + channel, to_scale, mask=seen)
    tl.store(norm_bias_gradient + sample * channels + channel, to_shift, mask=seen)


@triton.jit
def tokens_backward_kernel(
    gradient,
    merged_size,
    sizes,
    source,
    kept,
    target,
    weight,
    by_row,
    first,
    channel_gate,
    pair_gate,
    sums_gradient,
    out,
    tokens,
    left,
    pairs,
    channels,
    stride_gb,
    stride_gn,
    stride_gc,
    stride_sb,
    stride_s,
    CHANNELS: tl.constexpr,
    ROWS: tl.constexpr,
    HAS_SIZE: tl.constexpr,
    HAS_WEIGHT: tl.constexpr,
    REACTIVATED: tl.constexpr,
):
    """Write the gradients of a few input rows of one sample."""
    sample = tl.program_id(0).to(tl.int64)
    gradient += sample * stride_gb
    sizes += sample * stride_sb
    channel = tl.arange(0, CHANNELS)
    columns, seen = channel.to(tl.int64) * stride_gc, channel < channels
    gate = tl.zeros([CHANNELS], dtype=tl.float32)
    if REACTIVATED:
        gate = tl.load(channel_gate + sample * channels + channel, mask=seen, other=0.0)
    begin = tl.program_id(1) * ROWS
    # Rows up to `left` are kept tokens, those after it sources.
    for index in range(begin, tl.minimum(begin + ROWS, tokens)):
        value = tl.zeros([CHANNELS], dtype=tl.float32)
        taken = seen
        if index < left:
            position = tl.load(kept + sample * left + index)
            own = load_size(sizes, position, True, stride_s, HAS_SIZE)
            whole = tl.load(merged_size + sample * left + index).to(tl.float32)
            arriving = tl.load(gradient + (sample * 0 + index) * stride_gn + columns, mask=seen, other=0.0).to(
                tl.float32
            )
            value += arriving * tl.where(whole == 0, 1.0, own / tl.where(whole == 0, 1.0, whole))
            if REACTIVATED:
                start, stop = (
                    tl.load(first + sample * (left + 1) + index),
                    tl.load(first + sample * (left + 1) + index + 1),
                )
                for place in range(start, stop):
                    pair = sample * pairs + tl.load(by_row + sample * pairs + place)
                    value += own * tl.load(sums_gradient + pair * channels + channel, mask=seen, other=0.0)
        else:
            pair = sample * pairs + index - left
            position = tl.load(source + pair)
            part = load_size(sizes, position, True, stride_s, HAS_SIZE)
            if HAS_WEIGHT:
                counted = tl.load(weight + pair)
                part *= counted
                taken = channel < tl.where(counted > 0.0, channels, 0)
            row = tl.load(target + pair)
            whole = tl.load(merged_size + sample * left + row).to(tl.float32)
            arriving = tl.load(gradient + row * stride_gn + columns, mask=taken, other=0.0).to(tl.float32)
            value += arriving * (part / tl.where(whole == 0, 1.0, whole))
            if REACTIVATED:
                value += value * tl.load(pair_gate + pair) * gate
                value += part * tl.load(sums_gradient + pair * channels + channel, mask=taken, other=0.0)
        value = tl.where(taken, value, 0.0)  # what a dropped token receives is 0, whatever arrives
        tl.store(out + (sample * tokens + position) * channels + channel, value.to(out.dtype.element_ty), mask=seen)


class Prepared(NamedTuple):
    """What both directions need.

    Attributes:
        by_row: [B, r] pairs, those of one output row together, in order of rank.
        first: [B, M + 1] where the pairs of each output row start.
        channel_gate: [B, C] ``2 sigmoid(delta_D)``; nothing without re-activation.
        pair_gate: [B, r] ``2 sigmoid(delta_r) - 1``; nothing without re-activation.
    """

    by_row: Tensor
    first: Tensor
    channel_gate: Tensor
    pair_gate: Tensor


def merge_forward(x: Tensor, size: Tensor | None, plan: Any, weights: Any) -> tuple[Tensor, Tensor]:
    """Merge as :func:`pyra.kernels.merge.reference` does; ``x`` and ``size`` of any strides."""
    batch, _, channels = x.shape
    left, pairs = plan.kept.shape[1], plan.source.shape[1]
    plan = type(plan)(*(None if part is None else part.contiguous() for part in plan))
    ready = _prepare(x, size, plan, weights)
    merged, merged_size = x.new_empty(batch, left, channels), x.new_empty(batch, left, 1, dtype=torch.float32)
    sizes, size_strides = _sizes(x, size)
    if batch and left:
        merge_kernel[(batch, triton.cdiv(left, ROWS_A_PROGRAM))](
            x,
            sizes,
            plan.source,
            plan.kept,
            _or(plan.weight, x),
            *ready,
            merged,
            merged_size,
            left,
            pairs,
            channels,
            *x.stride(),
            *size_strides,
            CHANNELS=triton.next_power_of_2(channels),
            ROWS=ROWS_A_PROGRAM,
            HAS_SIZE=size is not None,
            HAS_WEIGHT=plan.weight is not None,
            REACTIVATED=weights is not None,
            num_warps=ROWS_WARPS,
        )
    return merged, merged_size


def merge_backward(
    gradient: Tensor, merged_size: Tensor, x: Tensor, size: Tensor | None, plan: Any, weights: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of :func:`merge_forward` for the tokens and the weights; of no elements where there are none."""
    batch, tokens, channels = x.shape
    left, pairs = plan.kept.shape[1], plan.source.shape[1]
    plan = type(plan)(*(None if part is None else part.contiguous() for part in plan))
    ready = _prepare(x, size, plan, weights)
    sizes, size_strides = _sizes(x, size)
    merged_size = merged_size.contiguous()
    flags = {"HAS_SIZE": size is not None, "HAS_WEIGHT": plan.weight is not None}
    out, sums = x.new_empty(x.shape), x.new_empty(0)
    trained = [x.new_empty(0) for _ in range(4)]
    width = triton.next_power_of_2(channels)
    if weights is not None:
        new = x.new_empty
        sums = new(batch, pairs, channels, dtype=torch.float32)
        by_pair = x.new_zeros(batch, weights.pair.shape[0], dtype=torch.float32)
        by_channel = [x.new_zeros(batch, channels, dtype=torch.float32) for _ in range(3)]
        if batch:
            pairs_backward_kernel[(batch,)](
                gradient,
                merged_size,
                x,
                sizes,
                plan.source,
                plan.destination,
                plan.target,
                _or(plan.weight, x),
                ready.channel_gate,
                ready.pair_gate,
                weights.pair.contiguous(),
                weights.channel.contiguous(),
                _or(weights.norm_weight, x),
                _or(weights.norm_bias, x),
                sums,
                by_pair,
                *by_channel,
                new(batch, pairs, dtype=torch.float32),
                left,
                pairs,
                weights.pair.shape[0],
                channels,
                weights.eps,
                *gradient.stride(),
                *x.stride(),
                *size_strides,
                CHANNELS=width,
                PAIRS=pairs_a_tile(channels),
                SCALED=weights.norm_weight is not None,
                SHIFTED=weights.norm_bias is not None,
                num_warps=PAIRS_WARPS,
                **flags,
            )
        found = (by_pair, *by_channel)
        trained = [
            x.new_empty(0) if leaf is None else part.sum(0).reshape(leaf.shape).to(leaf.dtype)
            for part, leaf in zip(found, weights[:4], strict=True)
        ]
    if batch and tokens:
        tokens_backward_kernel[(batch, triton.cdiv(tokens, ROWS_A_PROGRAM))](
            gradient,
            merged_size,
            sizes,
            plan.source,
            plan.kept,
            plan.target,
            _or(plan.weight, x),
            *ready,
            sums,
            out,
            tokens,
            left,
            pairs,
            channels,
            *gradient.stride(),
            *size_strides,
            CHANNELS=width,
            ROWS=ROWS_A_PROGRAM,
            REACTIVATED=weights is not None,
            num_warps=ROWS_WARPS,
            **flags,
        )
    return out, trained[0], trained[1], trained[2], trained[3]


def _prepare(x: Tensor, size: Tensor | None, plan: Any, weights: Any) -> Prepared:
    batch, _, channels = x.shape
    left, pairs = plan.kept.shape[1], plan.source.shape[1]
    by_row = x.new_empty(batch, pairs, dtype=torch.int32)
    first = x.new_empty(batch, left + 1, dtype=torch.int32)
    reactivated = weights is not None
    channel_gate = x.new_empty((batch, channels) if reactivated else 0, dtype=torch.float32)
    pair_gate = x.new_empty((batch, pairs) if reactivated else 0, dtype=torch.float32)
    sizes, size_strides = _sizes(x, size)
    if batch:
        prepare_kernel[(batch,)](
            x,
            sizes,
            plan.source,
            plan.destination,
            plan.target,
            _or(plan.weight, x),
            by_row,
            first,
            channel_gate,
            pair_gate,
            *((weights.pair.contiguous(), weights.channel.contiguous()) if reactivated else (x, x)),
            *((_or(weights.norm_weight, x), _or(weights.norm_bias, x)) if reactivated else (x, x)),
            left,
            pairs,
            weights.pair.shape[0] if reactivated else 0,
            channels,
            weights.eps if reactivated else 0.0,
            *x.stride(),
            *size_strides,
            CHANNELS=triton.next_power_of_2(channels),
            PAIRS=pairs_a_tile(channels),
            TILE=INDICES_A_TILE,
            HAS_SIZE=size is not None,
            HAS_WEIGHT=plan.weight is not None,
            REACTIVATED=reactivated,
            SCALED=reactivated and weights.norm_weight is not None,
            SHIFTED=reactivated and weights.norm_bias is not None,
            num_warps=PREPARE_WARPS if reactivated else ROWS_WARPS,
        )
    return Prepared(by_row, first, channel_gate, pair_gate)


def pairs_a_tile(channels: int) -> int:
    """Pairs that a program holds at once: fewer of wide tokens, whose rows would not fit into registers."""
    return max(min(VALUES_A_TILE // triton.next_power_of_2(channels), PAIRS_A_TILE), 1)


def _sizes(x: Tensor, size: Tensor | None) -> tuple[Tensor, tuple[int, int]]:
    """Sizes and their strides over samples and tokens; what stands for none is not read."""
    return (x, (0, 0)) if size is None else (size, (size.stride(0), size.stride(1)))


def _or(tensor: Tensor | None, stand_in: Tensor) -> Tensor:
    return stand_in if tensor is None else tensor.contiguous()
