"""One merging step, from keys to merged tokens.

Under a compiler for CPUs its parts are operators, as are the size bias and the layer norms of a layer that merges:
every layer has its own number of tokens, so no two layers share a compiled kernel, and a C++ compiler runs for each of
them (:func:`pyra.kernels.choice.as_operator`). On a GPU, without gradients, the kernels are launched one after another
and nothing is asked twice: at small batches a forward takes as long as the host needs to launch it.

Letters: ``B`` batch, ``N`` tokens, ``N0`` tokens at the first layer, ``C`` channels, ``H`` heads, ``d`` head channels,
``r`` tokens removed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyra.kernels import exported
from pyra.kernels.choice import at_once, compiled_on_a_cpu, exporting, on_device_of, runs_triton
from pyra.kernels.follow import follow
from pyra.kernels.match import Rules, match
from pyra.kernels.merge import Plan, Weights, merge
from pyra.matching import plan_of

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
    rules: Rules,
    threshold: float | None = None,
    backend: str = "auto",
    scaled_gates: bool = False,
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
        removed: tokens to remove (``r``), no more than can be.
        prefix: leading tokens that never merge.
        rules: how pairs are found.
        threshold: as in :func:`pyra.match_tokens`.
        backend: what runs, as in :class:`pyra.PyraConfig`.
        scaled_gates: as in :class:`pyra.PyraConfig`.

    Returns:
        Tokens [B, N - r, C], size [B, N - r, 1] (int32; float32 in an exported graph), source map [B, N0], positions
        [B, N - r].
    """
    weights = None if reactivation is None else Weights.of(reactivation)
    plain = rules.method == "bipartite" and threshold is None and (reactivation is None) == (weights is None)
    if plain and tokens.numel() and at_once(tokens, size, keys) and runs_triton(tokens, backend):
        if weights is not None and scaled_gates:
            weights = weights.scaled(removed)
        with on_device_of(tokens):
            return _launched(tokens, size, source_map, positions, keys, heads, weights, removed, prefix, rules.order)
    if exporting() and rules.method == "bipartite" and rules.order == "grouped" and threshold is None:
        features = keys.detach().mean(dim=heads)
        return exported.step(tokens, size, source_map, positions, features, reactivation, removed, prefix, scaled_gates)
    matched = match(keys, heads, removed, prefix, rules, positions, backend)
    plan = plan_of(matched, rules.method, threshold)
    indices = (plan.source, plan.destination, plan.kept, plan.target)
    merged, total = merge(tokens, size, Plan(*indices, plan.weight), reactivation, backend, scaled_gates)
    return merged, *follow(total.detach(), source_map, positions, plan.kept, plan.source, plan.target, backend)


def _launched(
    tokens: Tensor,
    size: Tensor | None,
    source_map: Tensor | None,
    positions: Tensor | None,
    keys: Tensor,
    heads: int,
    weights: Weights | None,
    removed: int,
    prefix: int,
    order: str,
) -> Merged:
    from pyra.kernels.follow_triton import follow_tokens
    from pyra.kernels.match_triton import match_bipartite
    from pyra.kernels.merge_triton import merge_forward

    source, destination, kept, target, _ = match_bipartite(keys, heads, removed, prefix, order)
    merged, total = merge_forward(tokens, size, Plan(source, destination, kept, target, None), weights)
    return merged, *follow_tokens(total, source_map, positions, kept, source, target)


def layer_norm(norm: nn.Module, tokens: Tensor, kinds: tuple[type[nn.Module], ...] = (nn.LayerNorm,)) -> Tensor:
    """Apply a norm of a layer that merges.

    Layer norms are what takes the C++ compiler longest, and each length would need its own, for one
    pass over the tokens saved where the norm fuses with the sum before it.

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
    """Whether it traces without gradients."""
    return compiled_on_a_cpu(tokens) and not torch.is_grad_enabled()


@torch.library.custom_op("pyra::layer_norm", mutates_args=())
def _norm_operator(tokens: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return F.layer_norm(tokens, tokens.shape[-1:], weight, bias, eps)


@_norm_operator.register_fake
def _norm_shape(tokens: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return torch.empty_like(tokens, memory_format=torch.contiguous_format)
