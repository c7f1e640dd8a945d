"""One merging step, from keys to merged tokens; and the same as one operator, for the compiler.

Every layer has its own number of tokens, so no two layers share a compiled kernel, and on a CPU a C++ compiler runs for
each of them: traced operator by operator, merging makes a 12-block ViT more than five times slower to compile. As one
operator the step costs nothing to compile; so do its layer norms, each as one.

Letters: ``B`` batch, ``N`` tokens, ``N0`` tokens at the first layer, ``C`` channels, ``H`` heads, ``d`` head channels,
``r`` tokens removed.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyra.attention import size_bias
from pyra.matching import match_tokens
from pyra.merging import compose_source_maps, merge_tokens

Merged = tuple[Tensor, Tensor, Tensor, Tensor]


def merge_step(
    tokens: Tensor,
    size: Tensor | None,
    source_map: Tensor | None,
    positions: Tensor | None,
    keys: Tensor,
    heads: int,
    reactivation: nn.Module | None,
    removed: int,
    prefix: int,
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
        keys: keys of all heads, [B, H, N, d] or [B, N, H, d]; their mean over heads is what is compared.
        heads: axis of the heads in ``keys``.
        reactivation: module with ``pair_weight``, ``channel_weight`` and ``norm``; None merges plainly.
        removed: tokens to remove (``r``).
        prefix: leading tokens that never merge.
        order, method, threshold, margin, grid_width, window: as in :func:`pyra.match_tokens`.

    Returns:
        Tokens [B, N - r, C], size [B, N - r, 1] int32, source map [B, N0], positions [B, N - r].
    """
    state: tuple[Any, ...] = (tokens, size, source_map, positions, keys, heads)
    how: tuple[Any, ...] = (removed, prefix, order, method, threshold, margin, grid_width, window)
    if _compiled_for_inference(tokens):
        if reactivation is None:
            return torch.ops.pyra.merge_step(*state, None, None, None, None, 0.0, *how)
        if isinstance(norm := reactivation.norm, nn.LayerNorm):
            weights = (reactivation.pair_weight, reactivation.channel_weight, norm.weight, norm.bias, norm.eps)
            return torch.ops.pyra.merge_step(*state, *weights, *how)
    return _merge_step(*(*state, reactivation, *how))


def proportional_bias(size: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what proportional attention adds to the scores, [B, 1, 1, N], from sizes [B, N, 1] int32."""
    if _compiled_for_inference(size):
        return torch.ops.pyra.size_bias(size, dtype)
    return _proportional_bias(size, dtype)


def layer_norm(norm: nn.Module, tokens: Tensor, kinds: tuple[type[nn.Module], ...] = (nn.LayerNorm,)) -> Tensor:
    """Apply a norm of a layer that merges.

    Layer norms are what takes the C++ compiler longest, and each length would need its own: a third of the compile
    time of a 12-block ViT, for one pass over the tokens saved where the norm fuses with the sum before it.

    Args:
        norm: any module.
        tokens: what it is applied to.
        kinds: classes, themselves and none derived from them, that do what ``nn.LayerNorm`` does.
    """
    changed = norm._forward_hooks or norm._forward_pre_hooks or "forward" in norm.__dict__
    if type(norm) in kinds and not changed and _compiled_for_inference(tokens) and not torch.is_autocast_enabled("cpu"):
        return torch.ops.pyra.layer_norm(tokens, norm.weight, norm.bias, norm.eps)
    return norm(tokens)


def _compiled_for_inference(tokens: Tensor) -> bool:
    """Whether a compiler for CPUs traces without gradients; an exporter wants plain operators."""
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
    heads: int,
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
        keys.mean(dim=heads),
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
    tokens: Tensor,
    size: Tensor | None,
    source_map: Tensor | None,
    positions: Tensor | None,
    keys: Tensor,
    heads: int,
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
    how: tuple[Any, ...] = (removed, prefix, order, method, threshold, margin, grid_width, window)
    return _merge_step(tokens, size, source_map, positions, keys, heads, weights, *how)


@_operator.register_fake
def _shapes(
    tokens: Tensor,
    size: Tensor | None,
    source_map: Tensor | None,
    positions: Tensor | None,
    keys: Tensor,
    heads: int,
    pair_weight: Tensor | None,
    channel_weight: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    removed: int,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, count, channels = tokens.shape
    left = count - removed
    original = count if source_map is None else source_map.shape[1]
    return (
        tokens.new_empty(batch, left, channels),
        tokens.new_empty(batch, left, 1, dtype=torch.int32),
        tokens.new_empty(batch, original, dtype=torch.int64),
        tokens.new_empty(batch, left, dtype=torch.int64),
    )


def _proportional_bias(size: Tensor, dtype: torch.dtype) -> Tensor:
    bias = size_bias(size.to(torch.promote_types(dtype, torch.float32)), dtype)
    assert bias is not None
    return bias


@torch.library.custom_op("pyra::size_bias", mutates_args=())
def _bias_operator(size: Tensor, dtype: torch.dtype) -> Tensor:
    return _proportional_bias(size, dtype).contiguous()


@_bias_operator.register_fake
def _bias_shape(size: Tensor, dtype: torch.dtype) -> Tensor:
    return size.new_empty(size.shape[0], 1, 1, size.shape[1], dtype=dtype)


@torch.library.custom_op("pyra::layer_norm", mutates_args=())
def _norm_operator(tokens: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(tokens, tokens.shape[-1:], weight, bias, eps)


@_norm_operator.register_fake
def _norm_shape(tokens: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return torch.empty_like(tokens, memory_format=torch.contiguous_format)
