"""A :class:`~pyra.prompt_matching.PromptPlan` applied: prompts of any length, one set of re-activation weights.

The weights of a pair belong to its rank (arXiv 2403.09192, section 3.2), and prompts merge any number of pairs. Rows
of ``W_r`` stand for shares of the ranks here: pair ``j`` of ``r`` reads between the two rows nearest to ``j / r``. The
sum over pairs that gates the channels is divided by ``sqrt(r)``, so that prompts of all lengths gate alike. ``r`` is
that of a row's own prompt: what else is in the batch changes nothing.

Letters: ``B`` batch, ``N`` tokens, ``C`` channels, ``r`` tokens removed, ``P`` rows of ``W_r``.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pyra.kernels.merge import flat
from pyra.merging import merge_tokens
from pyra.prompt_matching import PromptPlan

ROWS = 64
"""Rows of ``W_r`` in a decoder."""


def merge_prompt(
    x: Tensor, size: Tensor, plan: PromptPlan, reactivation: nn.Module | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """Merge the tokens of prompts.

    Args:
        x: [B, N, C].
        size: [B, N, 1] words each token stands for, whole numbers; 0 for padding.
        plan: from :func:`pyra.prompt_matching.match_prompt` on the same tokens.
        reactivation: a module with ``pair_weight`` [P, 1], ``channel_weight`` and ``norm``; None merges plainly.

    Returns:
        Tokens [B, front + N - r, C] and their sizes, int32.
    """
    x, size = plan.pad(x), plan.pad(size)
    if reactivation is not None and plan.plan.removed:
        x = reactivate_prompt(x, size, plan, reactivation)
    merged, total = merge_tokens(x, size, plan.plan)
    return merged, total.round().to(torch.int32)


def reactivate_prompt(x: Tensor, size: Tensor, plan: PromptPlan, weights: Any) -> Tensor:
    """Return ``x`` [B, N, C] with its sources modulated (equations 5-8 of arXiv 2403.09192)."""
    indices = plan.plan
    source, batch, channels = flat(indices.source, x.shape[1]), x.shape[0], x.shape[2]
    rows, sizes = x.reshape(-1, channels), size.reshape(-1, 1)
    moved = rows.index_select(0, source)
    received = flat(indices.destination, x.shape[1])
    wide = torch.promote_types(x.dtype, torch.float32)
    pairs = moved.to(wide) * sizes.index_select(0, source) + rows.index_select(0, received).to(wide) * (
        sizes.index_select(0, received)
    )
    norm = weights.norm
    if type(norm) is nn.LayerNorm:
        scale, shift = (None if part is None else part.to(wide) for part in (norm.weight, norm.bias))
        info = F.layer_norm(pairs, pairs.shape[-1:], scale, shift, norm.eps)
    else:
        info = norm(pairs.to(x.dtype)).to(wide)
    info = info.view(batch, -1, channels)
    by_rank = ranked(weights.pair_weight.to(wide), plan.removed, indices.source.shape[1])
    if indices.weight is not None:  # pairs that are dropped, padding among them, take no part
        by_rank = by_rank * indices.weight
    channel_delta = by_rank.unsqueeze(1) @ info  # [B, 1, C]
    token_delta = info @ weights.channel_weight.to(wide).T  # [B, r, 1]
    modulation = (2 * token_delta.sigmoid() - 1) * (2 * channel_delta.sigmoid())
    moved = torch.addcmul(moved, modulation.view(-1, channels).to(x.dtype), moved)
    return rows.index_copy(0, source, moved).view_as(x)


def ranked(rows: Tensor, removed: Tensor, pairs: int) -> Tensor:
    """Read ``W_r`` for prompts that lose different numbers of tokens.

    Args:
        rows: [P, 1].
        removed: [B] tokens that each prompt loses, ``r``.
        pairs: most of them, or more.

    Returns:
        [B, pairs] over ``sqrt(r)``: rows nearest to each rank's share, linear between them; past ``r`` anything.
    """
    count = removed.clamp(min=1).to(rows.dtype)[:, None]
    share = (torch.arange(pairs, device=rows.device, dtype=rows.dtype) + 0.5) / count
    place = (share * rows.shape[0] - 0.5).clamp(0, rows.shape[0] - 1)
    below = place.floor()
    upper = (below + 1).clamp(max=rows.shape[0] - 1).long()
    flat_rows, between = rows[:, 0], place - below
    return (flat_rows[below.long()] * (1 - between) + flat_rows[upper] * between) * count.rsqrt()
