"""A :class:`~pyra.matching.MergePlan` applied: tokens merged, and spread out again.

A destination becomes the size-weighted mean of itself and its sources (ToMe, arXiv 2210.09461, section 3); with
re-activation the sources are modulated first (PYRA, arXiv 2403.09192, equations 5-9). Weights are computed as shares
of the merged size, in float32 at least: a token that takes part in nothing is passed on bit for bit, and sizes
stay exact in half precision. A token of size 0 is padding: it stands for nothing and changes nothing it merges into.

Letters: ``B`` batch, ``N`` tokens, ``C`` channels, ``r`` tokens removed.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyra.kernels.merge import Plan, flat, merge
from pyra.matching import MergePlan


def merge_tokens(
    x: Tensor,
    size: Tensor | None,
    plan: MergePlan,
    reactivation: nn.Module | None = None,
    *,
    scaled_gates: bool = False,
) -> tuple[Tensor, Tensor]:
    """Merge the plan's sources into their destinations.

    A source that the plan drops (weight 0) reaches nothing: neither value nor size of any token depends on it, be it
    finite or not, and its gradient is 0. Its pair takes no part in re-activation.

    Args:
        x: [B, N, C] tokens.
        size: [B, N, 1] number of patches or words each token stands for; None means ones. 0 marks padding, whose
            values must be finite: merged into a token it leaves it as it is, merged with padding it stays padding.
        plan: from :func:`pyra.match_tokens` on the same tokens.
        reactivation: any module with the attributes ``pair_weight``, ``channel_weight`` and ``norm``
            (:class:`pyra.Reactivation`); None merges plainly.
        scaled_gates: as in :class:`pyra.PyraConfig`.

    Returns:
        ``merged`` [B, N - r, C] and its ``size`` [B, N - r, 1] (float32 or wider).

    Raises:
        ValueError: where ``x`` or ``size`` does not have the plan's batch and token count, or the plan's weight not
            the shape of its sources.
    """
    _check(x, size, plan)
    if plan.removed == 0:
        sizes = torch.ones_like(x[:, :, :1]) if size is None else size
        sizes = sizes.to(torch.promote_types(torch.promote_types(sizes.dtype, x.dtype), torch.float32))
        return _gather(x, plan.kept), _gather(sizes, plan.kept)
    indices = Plan(plan.source, plan.destination, plan.kept, plan.target, plan.weight)
    return merge(x, size, indices, reactivation, scaled=scaled_gates)


def unmerge_tokens(merged: Tensor, plan: MergePlan) -> Tensor:
    """Spread merged tokens over the positions they came from.

    Args:
        merged: [B, N - r, C] tokens in the plan's output order.
        plan: the step to undo.

    Returns:
        [B, N, C]: every kept token at its own input position, every source a copy of its destination.

    Raises:
        ValueError: where ``merged`` does not have the plan's batch and token count.
    """
    if merged.ndim != 3 or merged.shape[:2] != plan.kept.shape:
        raise ValueError(
            f"unmerge_tokens: merged must be [B, N - r, C] with [B, N - r] = {list(plan.kept.shape)}, "
            f"got {list(merged.shape)}"
        )
    return _gather(merged, plan.source_map())


def spread(tokens: Tensor, source_map: Tensor) -> Tensor:
    """Return [B, N0, C]: for each original position the token that holds it (``source_map`` [B, N0])."""
    return _gather(tokens, source_map)


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Rows of ``x`` [B, N, C] at ``index`` [B, M] -> [B, M, C]."""
    # An embedding look-up gives the rows of `index_select`, but as no view, which FSDP2 would warn of.
    return F.embedding(flat(index, x.shape[1]).reshape(index.shape), x.reshape(-1, x.shape[2]))


def _check(x: Tensor, size: Tensor | None, plan: MergePlan) -> None:
    expected = (plan.kept.shape[0], plan.num_tokens)
    problems = []
    if x.ndim != 3 or x.shape[:2] != expected:
        problems.append(f"x must be [B, N, C] with [B, N] = {list(expected)} as in the plan, got {list(x.shape)}")
    if not x.is_floating_point():
        problems.append(f"x must be of a floating-point type, got {x.dtype}")
    if size is not None and size.shape != (*expected, 1):
        problems.append(f"size must be [B, N, 1] = {[*expected, 1]}, got {list(size.shape)}")
    if plan.weight is not None and plan.weight.shape != plan.source.shape:
        problems.append(f"plan.weight must be [B, r] = {list(plan.source.shape)}, got {list(plan.weight.shape)}")
    if problems:
        raise ValueError("merge_tokens: " + "; ".join(problems))
