"""A whole merging step in the operations that runtimes of exported graphs run well.

What :mod:`pyra.kernels.match`, :mod:`~pyra.kernels.merge` and :mod:`~pyra.kernels.follow` do, for bipartite matching
in the published order. With a fixed number of tokens nothing has to be scattered: odd tokens stay where they are, even
ones are chosen by two sorts, and sources reach their destinations in a product with a matrix of their shares, which
takes ViT-B at the high published schedule 0.2 % more MACs. Scattering with a sum is what TensorRT cannot run, and
others run slowly.

Letters: ``B`` batch, ``N`` tokens, ``N0`` tokens at the first layer, ``C`` channels, ``E`` even and ``O`` odd tokens
that take part, ``p`` prefix tokens, ``r`` tokens removed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from pyra.kernels.merge import flat, gate_of, reactivate
from pyra.kernels.pairing import unit_vectors


def step(
    tokens: Tensor,
    size: Tensor | None,
    source_map: Tensor | None,
    positions: Tensor | None,
    features: Tensor,
    reactivation: nn.Module | None,
    r: int,
    p: int,
    scaled: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Match and merge the tokens of one layer, and follow them; arguments as of :func:`pyra.step.merge_step`.

    Args:
        tokens: [B, N, C].
        size: [B, N, 1] of any type; None means ones.
        source_map: [B, N0], or None.
        positions: [B, N], or None.
        features: [B, N, D] that are compared.
        reactivation: module with the re-activation weights, or None.
        r: tokens to remove, at least one and no more than can be.
        p: prefix tokens.
        scaled: as ``scaled_gates``.

    Returns:
        Tokens [B, N - r, C], size [B, N - r, 1] (float32 or wider), source map [B, N0], positions [B, N - r].
    """
    batch = tokens.shape[0]
    unit = unit_vectors(features)
    wide, device = unit.dtype, tokens.device
    even, odd = (p + 1) // 2, p // 2  # the first that take part
    scores = unit[:, ::2][:, even:] @ unit[:, 1::2][:, odd:].transpose(1, 2)
    evens, odds = scores.shape[1:]
    similarity, partner = scores.max(dim=2)
    source = similarity.topk(r, dim=1).indices
    target = partner.gather(1, source)
    place = torch.arange(evens, device=device)
    leaves = (source.unsqueeze(2) == place).any(dim=1)
    kept = torch.where(leaves, -1, evens - place).to(wide).topk(evens - r, dim=1).indices

    moved = _rows(tokens, 2 * (source + even))
    sizes = torch.ones_like(tokens[:, :, :1], dtype=wide) if size is None else size.to(wide)
    moved_size = _rows(sizes, 2 * (source + even))
    stands = sizes[:, 1::2][:, odd:]
    joins = (torch.arange(odds, device=device).unsqueeze(1) == target.unsqueeze(1)).to(wide)
    total = stands + joins @ moved_size
    share = joins * moved_size.transpose(1, 2) / total.clamp_min(1)  # 0 only where padding meets padding
    stay = 1 - share.sum(dim=2, keepdim=True)
    if reactivation is not None:
        received = _rows(tokens, 2 * (target + odd) + 1).to(wide)
        pairs = received * stands.squeeze(2).gather(1, target).unsqueeze(2) + moved * moved_size
        rows: Any = reactivation.pair_weight
        moved = reactivate(moved, pairs, reactivation, gate=gate_of(rows, r) if scaled else 1.0)
    kind = tokens.dtype
    merged = tokens[:, 1::2][:, odd:] * stay.to(kind) + share.to(kind) @ moved
    first = p + evens - r  # output row of the first odd token

    left = torch.cat([tokens[:, :p], _rows(tokens, 2 * (kept + even)), merged], dim=1)
    left_size = torch.cat([sizes[:, :p], _rows(sizes, 2 * (kept + even)), total], dim=1)
    of_even = torch.where(leaves, first + partner, p - 1 + (~leaves).to(torch.int64).cumsum(dim=1))
    of_odd = (first + torch.arange(odds, device=device)).expand(batch, odds)
    head = torch.arange(p, device=device).expand(batch, p)
    after = torch.cat([head, _woven(of_even, of_odd, p)], dim=1)
    tail = (2 * (torch.arange(odds, device=device) + odd) + 1).expand(batch, odds)
    remaining = torch.cat([head, 2 * (kept + even), tail], dim=1)
    return (
        left,
        left_size,
        after if source_map is None else after.gather(1, source_map),
        remaining if positions is None else positions.gather(1, remaining),
    )


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Rows of ``x`` [B, N, C] at ``index`` [B, M] -> [B, M, C], by an index of rows alone."""
    return x.reshape(-1, x.shape[2]).index_select(0, flat(index, x.shape[1])).reshape(*index.shape, x.shape[2])


def _woven(even: Tensor, odd: Tensor, p: int) -> Tensor:
    """Return [B, E + O] values of even and odd positions in the order of positions from ``p`` on."""
    lead, follow = (odd, even) if p % 2 else (even, odd)
    both = follow.shape[1]
    return torch.cat([torch.stack([lead[:, :both], follow], dim=2).flatten(1), lead[:, both:]], dim=1)
