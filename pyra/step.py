"""One merging step, from keys to merged tokens; and the same as one operator, for the compiler.

Every layer has its own number of tokens. Compiled with static shapes, no two layers share a kernel, and a C++ compiler
runs for each: the compile time of a 12-block ViT grows more than fivefold on a CPU. As one operator the step itself
costs nothing to compile; and where the compiler may be left without the length of its output (``fullgraph=True``, or
``torch._dynamo.config.capture_dynamic_output_shape_ops``), all layers look alike and their kernels are made once.

Letters: ``B`` batch, ``N`` tokens, ``N0`` tokens at the first layer, ``C`` channels, ``D`` feature channels, ``r``
tokens removed.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyra.matching import match_tokens
from pyra.merging import compose_source_maps, merge_tokens

Merged = tuple[Tensor, Tensor, Tensor, Tensor]


def merge_step(
    tokens: Tensor,
    size: Tensor | None,
    source_map: Tensor | None,
    positions: Tensor | None,
    keys: Tensor,
    reactivation: nn.Module | None,
    removed: int,
    prefix: int,
    remaining: int,
    *,
    order: str,
    method: str,
    threshold: float | None,
    margin: float,
    grid_width: int | None,
    window: int,
) -> Merged:
    """Match and merge the tokens of one layer, and follow them.

    Args:
        tokens: [B, N, C] after attention.
        size: [B, N, 1] int32 patches each token stands for; None means ones.
        source_map: [B, N0] row that holds each original token; None means its own.
        positions: [B, N] original position of each token; None means in place.
        keys: [B, N, D] similarity features.
        reactivation: module with ``pair_weight``, ``channel_weight`` and ``norm``; None merges plainly.
        removed: tokens to remove (``r``).
        prefix: leading tokens that never merge.
        remaining: tokens left afterwards (``N - r``), which the caller knows without looking at ``tokens``.
        order, method, threshold, margin, grid_width, window: as in :func:`pyra.match_tokens`.

    Returns:
        Tokens [B, N - r, C], size [B, N - r, 1] int32, source map [B, N0], positions [B, N - r].
    """
    state = (tokens, size, source_map, positions, keys)
    how = (removed, prefix, order, method, threshold, margin, grid_width, window)
    if _compiled_for_inference(tokens):
        # A length of 1 is one that the compiler wants to know.
        known = None if remaining >= 2 and torch._dynamo.config.capture_dynamic_output_shape_ops else remaining
        if reactivation is None:
            return torch.ops.pyra.merge_step(known, *state, None, None, None, None, 0.0, *how)
        if isinstance(norm := reactivation.norm, nn.LayerNorm):
            weights = (reactivation.pair_weight, reactivation.channel_weight, norm.weight, norm.bias, norm.eps)
            return torch.ops.pyra.merge_step(known, *state, *weights, *how)
    return _merge_step(*state, reactivation, *how)


def _compiled_for_inference(tokens: Tensor) -> bool:
    """Whether a compiler for CPUs traces without gradients; an exporter keeps plain operators and static lengths."""
    return (
        torch.compiler.is_compiling()
        and not torch.compiler.is_exporting()
        and not torch.is_grad_enabled()
        and tokens.device.type == "cpu"
    )


def _merge_step(
    tokens: Tensor,
    size: Tensor | None,
    source_map: Tensor | None,
    positions: Tensor | None,
    keys: Tensor,
    reactivation: Any,
    removed: int,
    prefix: int,
    order: Any,
    method: str,
    threshold: float | None,
    margin: float,
    grid_width: int | None,
    window: int,
) -> Merged:
    plan = match_tokens(
        keys,
        removed,
        num_prefix_tokens=prefix,
        order=order,
        method=method,
        threshold=threshold,
        margin=margin,
        positions=positions,
        grid_width=grid_width,
        window=window,
    )
    exact = None if size is None else size.to(torch.promote_types(tokens.dtype, torch.float32))
    merged, exact = merge_tokens(tokens, exact, plan, reactivation)
    places = plan.kept if positions is None else positions.gather(1, plan.kept)
    return merged, exact.to(torch.int32), compose_source_maps(source_map, plan), places


@torch.library.custom_op("pyra::merge_step", mutates_args=())
def _operator(
    _remaining: int | None,
    tokens: Tensor,
    size: Tensor | None,
    source_map: Tensor | None,
    positions: Tensor | None,
    keys: Tensor,
    pair_weight: Tensor | None,
    channel_weight: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    removed: int,
    prefix: int,
    order: str,
    method: str,
    threshold: float | None,
    margin: float,
    grid_width: int | None,
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    weights = None
    if pair_weight is not None:
        assert norm_weight is not None
        norm = functools.partial(
            F.layer_norm, normalized_shape=norm_weight.shape, weight=norm_weight, bias=norm_bias, eps=norm_eps
        )
        weights = SimpleNamespace(pair_weight=pair_weight, channel_weight=channel_weight, norm=norm)
    how = (removed, prefix, order, method, threshold, margin, grid_width, window)
    return _merge_step(tokens, size, source_map, positions, keys, weights, *how)


@_operator.register_fake
def _shapes(
    remaining: int | None,
    tokens: Tensor,
    size: Tensor | None,
    source_map: Tensor | None,
    positions: Tensor | None,
    keys: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, count, channels = tokens.shape
    left = torch.library.get_ctx().new_dynamic_size(min=2) if remaining is None else remaining
    original = count if source_map is None else source_map.shape[1]
    return (
        tokens.new_empty(batch, left, channels),
        tokens.new_empty(batch, left, 1, dtype=torch.int32),
        tokens.new_empty(batch, original, dtype=torch.int64),
        tokens.new_empty(batch, left, dtype=torch.int64),
    )
