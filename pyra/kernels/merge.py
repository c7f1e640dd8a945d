"""Merging as one operator, ``pyra::merge_tokens``, with its gradient: tokens and a plan in, merged tokens out.

:func:`merge` chooses how it runs, as in :mod:`pyra.kernels.match`. The operator runs :func:`reference`, or
:mod:`pyra.kernels.merge_triton` where Triton was chosen; so does its gradient, ``pyra::merge_tokens_backward``.

Letters: ``B`` batch, ``N`` tokens, ``C`` channels, ``r`` tokens removed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyra.kernels.choice import as_operator, at_once, on_device_of, runs_triton


class Plan(NamedTuple):
    """The tensors of a :class:`pyra.MergePlan`."""

    source: Tensor
    destination: Tensor
    kept: Tensor
    target: Tensor
    weight: Tensor | None


class Weights(NamedTuple):
    """The tensors of a :class:`pyra.Reactivation`.

    Attributes:
        pair: ``W_r`` [pairs, 1].
        channel: ``W_D`` [1, C].
        norm_weight: [C], or None.
        norm_bias: [C], or None.
        eps: of the norm.
    """

    pair: Tensor
    channel: Tensor
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    eps: float

    @classmethod
    def of(cls, module: Any) -> Weights | None:
        """Take them out of a module; None where its norm is more than a layer norm."""
        norm = module.norm
        if type(norm) is not nn.LayerNorm or norm._forward_hooks or norm._forward_pre_hooks:
            return None
        return cls(module.pair_weight, module.channel_weight, norm.weight, norm.bias, norm.eps)

    def scaled(self, pairs: int) -> Weights:
        """Divide the sum over ``pairs`` pairs that gates the channels by the root of their number."""
        return self._replace(pair=self.pair * gate_of(self.pair, pairs))


def merge(
    x: Tensor,
    size: Tensor | None,
    plan: Plan,
    reactivation: nn.Module | None = None,
    backend: str = "auto",
    scaled: bool = False,
) -> tuple[Tensor, Tensor]:
    """Merge the tokens of a batch.

    Args:
        x: [B, N, C].
        size: [B, N, 1], of whole numbers or floating point; None means ones.
        plan: which tokens merge; at least one.
        reactivation: a module with ``pair_weight``, ``channel_weight`` and ``norm``; None merges plainly.
        backend: ``"auto"``, ``"reference"`` or ``"triton"``.
        scaled: divide the sum over pairs that gates the channels by the root of their number.

    Returns:
        Tokens [B, N - r, C] and sizes [B, N - r, 1], these float32 or wider.
    """
    pairs = plan.source.shape[1]
    if as_operator(x, backend):
        weights = None if reactivation is None else Weights.of(reactivation)
        if weights is not None and scaled:
            weights = weights.scaled(pairs)
        if (reactivation is None) == (weights is None):
            tensors = (None, None, None, None, 0.0) if weights is None else weights
            run: Any = _run if at_once(x, size, *plan, *tensors[:4]) else torch.ops.pyra.merge_tokens
            merged, total = run(x, size, *plan, *tensors, backend)
            return merged, total
    rows: Any = getattr(reactivation, "pair_weight", None)
    return reference(x, size, plan, reactivation, gate_of(rows, pairs) if scaled and reactivation is not None else 1.0)


def reference(
    x: Tensor, size: Tensor | None, plan: Plan, reactivation: Any = None, gate: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Merge in plain PyTorch; ``reactivation`` is a module or :class:`Weights`, ``gate`` as of :func:`reactivate`."""
    if size is None:
        size = torch.ones(x.shape[0], x.shape[1], 1, device=x.device, dtype=_wide(x.dtype))
    else:
        size = size.to(_size_dtype(x, size))
    channels, (count, removed) = x.shape[2], (x.shape[1], plan.source.shape[1])
    # Rows of the flattened [B * rows, C] tensors: contiguous copies, no index expanded over channels.
    kept, source, target = flat(plan.kept, count), flat(plan.source, count), flat(plan.target, count - removed)
    tokens, sizes = x.reshape(-1, channels), size.reshape(-1, 1)
    kept_size, source_size = sizes.index_select(0, kept), sizes.index_select(0, source)
    moved = tokens.index_select(0, source)
    if plan.weight is not None:
        weight = plan.weight.reshape(-1, 1).to(source_size.dtype)
        source_size = source_size * weight
        # Times 0 would not do: a value that is no number stays one, and so does its gradient.
        moved = torch.where(weight > 0, moved, 0)
    merged_size = kept_size.index_add(0, target, source_size)
    # Operations in place act on rows gathered here, which nothing else reads: each saves a pass through memory.
    if reactivation is not None:
        received = tokens.index_select(0, flat(plan.destination, count)).to(_wide(x.dtype))
        pairs = received.mul_(kept_size.index_select(0, target)).addcmul_(moved, source_size)
        shape = (x.shape[0], removed, channels)
        moved = reactivate(moved.reshape(shape), pairs.reshape(shape), reactivation, plan.weight, gate)
        moved = moved.reshape(-1, channels)
    # Padding in padding (0 / 0) keeps its destination, stay = 1; every other size is divided as it is.
    padding = merged_size == 0
    divisor = merged_size + padding
    stay = ((kept_size + padding) / divisor).to(x.dtype)
    share = (source_size / divisor.index_select(0, target)).to(x.dtype)
    merged = tokens.index_select(0, kept).mul_(stay).index_add_(0, target, moved.to(x.dtype) * share)
    return merged.reshape(*plan.kept.shape, channels), merged_size.reshape(*plan.kept.shape, 1)


def reactivate(source: Tensor, pairs: Tensor, weights: Any, counted: Tensor | None = None, gate: float = 1.0) -> Tensor:
    """Modulate source tokens (equations 5-8 of arXiv 2403.09192).

    Args:
        source: [B, r, C] tokens to modulate; the modulation is linear in them, so means or sums both do.
        pairs: [B, r, C] ``M_s + M_t``, size-weighted sums of the matched pairs in rank order, float32 or wider.
        weights: a module with ``pair_weight``, ``channel_weight`` and ``norm``, or :class:`Weights`.
        counted: [B, r], 0 for pairs that take no part (dropped tokens), 1 for the others; None means all do.
        gate: factor of ``delta_D``.

    Returns:
        [B, r, C].
    """
    known = weights if isinstance(weights, Weights) else Weights.of(weights)
    if known is not None:
        pair_weight, channel_weight = known.pair, known.channel
        # In float32 at least: sums over many patches leave the range of float16, their norms do not.
        scale, shift = (None if part is None else part.to(pairs.dtype) for part in known[2:4])
        info = F.layer_norm(pairs, pairs.shape[-1:], scale, shift, known.eps)
    else:
        pair_weight, channel_weight = weights.pair_weight, weights.channel_weight
        info = weights.norm(pairs.to(source.dtype))
    if counted is not None:
        info = info * counted.to(info.dtype).unsqueeze(-1)
    rows = min(pair_weight.shape[0], pairs.shape[1])
    channel_delta = (gate * pair_weight[:rows]).T.to(info.dtype) @ info[:, :rows]
    token_delta = info @ channel_weight.T.to(info.dtype)
    modulation = (2 * token_delta.sigmoid() - 1) * (2 * channel_delta.sigmoid())
    return torch.addcmul(source, modulation.to(source.dtype), source)


def gate_of(rows: Tensor, pairs: int) -> float:
    """Return the factor of ``delta_D`` where the sum over ``pairs`` pairs is divided by the root of their number."""
    return max(min(len(rows), pairs), 1) ** -0.5


def flat(index: Tensor, rows: int) -> Tensor:
    """Positions [B, M] within a sample -> rows [B * M] of the flattened batch, ``rows`` rows a sample."""
    first = torch.arange(index.shape[0], device=index.device)[:, None] * rows
    return (index + first).reshape(-1)


def _size_dtype(x: Tensor, size: Tensor | None) -> torch.dtype:
    return _wide(x.dtype if size is None else torch.promote_types(size.dtype, x.dtype))


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _weights(pair: Tensor | None, channel: Tensor | None, *norm: Any) -> Weights | None:
    return None if pair is None or channel is None else Weights(pair, channel, *norm)


def _run(
    x: Tensor,
    size: Tensor | None,
    source: Tensor,
    destination: Tensor,
    kept: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pair_weight: Tensor | None,
    channel_weight: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    plan = Plan(source, destination, kept, target, weight)
    weights = _weights(pair_weight, channel_weight, norm_weight, norm_bias, eps)
    if runs_triton(x, backend) and x.numel():
        from pyra.kernels.merge_triton import merge_forward

        with on_device_of(x):
            merged, total = merge_forward(x, size, plan, weights)
        return merged, total.to(_size_dtype(x, size))
    merged, total = reference(x, size, plan, weights)
    return merged, total


_operator = torch.library.custom_op("pyra::merge_tokens", _run, mutates_args=())


@_operator.register_fake
def _shapes(
    x: Tensor, size: Tensor | None, source: Tensor, destination: Tensor, kept: Tensor, *_: Any
) -> tuple[Tensor, Tensor]:
    return x.new_empty(*kept.shape, x.shape[2]), x.new_empty(*kept.shape, 1, dtype=_size_dtype(x, size))


@torch.library.custom_op("pyra::merge_tokens_backward", mutates_args=())
def _backward_operator(
    gradient: Tensor,
    merged_size: Tensor,
    x: Tensor,
    size: Tensor | None,
    source: Tensor,
    destination: Tensor,
    kept: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pair_weight: Tensor | None,
    channel_weight: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    plan = Plan(source, destination, kept, target, weight)
    weights = _weights(pair_weight, channel_weight, norm_weight, norm_bias, eps)
    if runs_triton(x, backend) and x.numel():
        from pyra.kernels.merge_triton import merge_backward

        with on_device_of(x):
            return merge_backward(gradient, merged_size, x, size, plan, weights)
    return reference_backward(gradient, merged_size, x, size, plan, weights)


def reference_backward(
    gradient: Tensor, merged_size: Tensor, x: Tensor, size: Tensor | None, plan: Plan, weights: Weights | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Differentiate :func:`reference`, by hand: an operator runs where autograd does not see.

    Args:
        gradient: [B, N - r, C], of the merged tokens.
        merged_size: [B, N - r, 1], what :func:`reference` returned.
        x, size, plan, weights: what it was given.

    Returns:
        Gradients of ``x`` and the four tensors of ``weights``; of no elements where there are none.
    """
    count, channels, removed = x.shape[1], x.shape[2], plan.source.shape[1]
    wide = _wide(x.dtype)
    kept, source, target = flat(plan.kept, count), flat(plan.source, count), flat(plan.target, count - removed)
    sizes = x.new_ones(x.shape[0] * count, 1, dtype=wide) if size is None else size.reshape(-1, 1).to(wide)
    tokens, arriving, whole = (
        x.reshape(-1, channels),
        gradient.reshape(-1, channels).to(wide),
        merged_size.reshape(-1, 1).to(wide),
    )
    padding = whole == 0
    divisor = whole + padding
    source_size, kept_size = sizes.index_select(0, source), sizes.index_select(0, kept)
    if plan.weight is not None:
        source_size = source_size * plan.weight.reshape(-1, 1).to(wide)
    to_source = arriving.index_select(0, target) * (source_size / divisor.index_select(0, target))
    to_tokens = torch.zeros_like(tokens, dtype=wide).index_copy_(0, kept, arriving * ((kept_size + padding) / divisor))
    trained = [x.new_empty(0) for _ in range(4)]
    if weights is not None:
        moved = tokens.index_select(0, source).to(wide)
        if plan.weight is not None:
            moved = torch.where(plan.weight.reshape(-1, 1) > 0, moved, 0)
        destination = flat(plan.destination, count)
        received_size = sizes.index_select(0, destination)
        sums = moved * source_size + tokens.index_select(0, destination).to(wide) * received_size
        shape = (x.shape[0], removed, channels)
        by_gate, to_sums, trained = _reactivate_backward(
            to_source.reshape(shape), moved.reshape(shape), sums.reshape(shape), weights, plan.weight, x.dtype
        )
        to_sums = to_sums.reshape(-1, channels)
        to_source = by_gate.reshape(-1, channels) + to_sums * source_size
        to_tokens.index_add_(0, destination, to_sums * received_size)
    if plan.weight is not None:
        to_source = torch.where(plan.weight.reshape(-1, 1) > 0, to_source, 0)
    to_tokens.index_copy_(0, source, to_source)
    return to_tokens.reshape(x.shape).to(x.dtype), trained[0], trained[1], trained[2], trained[3]


def _reactivate_backward(
    gradient: Tensor, source: Tensor, pairs: Tensor, weights: Weights, counted: Tensor | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Gradients of :func:`reactivate`: of ``source``, ``pairs`` and the weights (in ``dtype`` where there are none)."""
    wide, rows = pairs.dtype, min(weights.pair.shape[0], pairs.shape[1])
    counts = 1 if counted is None else counted.to(wide).unsqueeze(-1)
    yielding, by_rank = weights.channel.to(wide), pairs.new_zeros(pairs.shape[1], 1)
    by_rank[:rows] = weights.pair[:rows].to(wide)
    centred = pairs - pairs.mean(dim=-1, keepdim=True)
    inverse = (centred.square().mean(dim=-1, keepdim=True) + weights.eps).rsqrt()
    normal = centred * inverse
    scale = 1 if weights.norm_weight is None else weights.norm_weight.to(wide)
    shift = 0 if weights.norm_bias is None else weights.norm_bias.to(wide)
    info = (normal * scale + shift) * counts
    token = 2 * (info @ yielding.T).sigmoid() - 1
    channel = 2 * (by_rank.T @ info).sigmoid()
    product = gradient * source
    to_token = (product * channel).sum(dim=-1, keepdim=True) * (1 - token * token) / 2
    to_channel = (product * token).sum(dim=1, keepdim=True) * channel * (1 - channel / 2)
    to_norm = (to_token * yielding + by_rank * to_channel) * counts
    to_normal = to_norm * scale
    along = (to_normal * normal).mean(dim=-1, keepdim=True)
    to_pairs = (to_normal - to_normal.mean(dim=-1, keepdim=True) - normal * along) * inverse
    to_rank = (info * to_channel).sum(dim=(0, 2))
    found = (
        F.pad(to_rank[:rows], (0, weights.pair.shape[0] - rows)),
        (info * to_token).sum(dim=(0, 1)),
        (to_norm * normal).sum(dim=(0, 1)),
        to_norm.sum(dim=(0, 1)),
    )
    trained = [
        pairs.new_empty(0, dtype=dtype) if leaf is None else part.reshape(leaf.shape).to(leaf.dtype)
        for part, leaf in zip(found, weights[:4], strict=True)
    ]
    return gradient * (1 + token * channel), to_pairs, trained


@_backward_operator.register_fake
def _backward_shapes(
    gradient: Tensor,
    merged_size: Tensor,
    x: Tensor,
    size: Tensor | None,
    source: Tensor,
    destination: Tensor,
    kept: Tensor,
    target: Tensor,
    weight: Tensor | None,
    pair_weight: Tensor | None,
    channel_weight: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    leaves = (x, pair_weight, channel_weight, norm_weight, norm_bias)
    return tuple(  # type: ignore[return-value]
        x.new_empty(0) if leaf is None else leaf.new_empty(leaf.shape) for leaf in leaves
    )


def _keep_inputs(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.eps, ctx.backend = inputs
    ctx.save_for_backward(output[1], *tensors)


def _backward(context: Any, gradient: Tensor, _size_gradient: Tensor) -> tuple[Tensor | None, ...]:
    """Sizes are counts, which nothing trains."""
    merged_size, *inputs = context.saved_tensors
    found = torch.ops.pyra.merge_tokens_backward(gradient, merged_size, *inputs, context.eps, context.backend)
    x, *trained = (None if leaf is None else part for part, leaf in zip(found, (inputs[0], *inputs[7:11]), strict=True))
    return x, *[None] * 6, *trained, None, None


torch.library.register_autograd("pyra::merge_tokens", _backward, setup_context=_keep_inputs)
