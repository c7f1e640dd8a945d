"""Which token pairs with which: one function for each way of matching, similarity in, pairs out.

- :func:`bipartite_pairs`: even against odd positions (ToMe, arXiv 2210.09461, section 3);
- :func:`energy_pairs`: among the tokens that have most others like them (PiToMe, arXiv 2405.16148, section 3.2);
- :func:`local_pairs`: even against odd squares of the patch grid as on a checkerboard, neighbours first.

Every function returns the same shapes for every input of a shape, so that graphs can be exported. A similarity that is
no number orders first and points at a token that may receive: the pairs of such a sample are arbitrary, but valid.

Letters: ``B`` batch, ``N`` tokens, ``n`` tokens that are not prefix tokens, ``D`` feature channels, ``r`` pairs.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Lost for each patch beyond the window. More than the range of a cosine, 2, so that rounding lets no far pair pass.
_PER_PATCH = 3.0


class Pairs(NamedTuple):
    """Pairs in the order in which the method takes them.

    Attributes:
        source: [B, r] position that merges.
        destination: [B, r] position that receives it.
        similarity: [B, r] cosine similarity of the two.
    """

    source: Tensor
    destination: Tensor
    similarity: Tensor


def unit_vectors(features: Tensor) -> Tensor:
    """Return ``features`` [B, N, D] at length 1, in float32 or wider: products of rows are cosine similarities."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def bipartite_pairs(unit: Tensor, r: int, p: int, blocked: Tensor | None) -> tuple[Pairs, Tensor]:
    """Pair each even position with its most similar odd one and take the ``r`` most similar pairs.

    Args:
        unit: [B, N, D] from :func:`unit_vectors`.
        r: pairs to take, at most the tokens that may take part allow.
        p: prefix tokens, which take no part.
        blocked: [B, N] bool, further tokens that take no part.

    Returns:
        The pairs, most similar first, and the even positions [B, N_even - r] that remain, in order.
    """
    scores = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
    scores[:, : (p + 1) // 2] = -torch.inf
    scores[:, :, : p // 2] = -torch.inf
    if blocked is not None:
        scores.masked_fill_(blocked[:, ::2, None] | blocked[:, None, 1::2], -torch.inf)
    positions = torch.arange(unit.shape[1], device=unit.device)
    even, odd = positions[::2], positions[1::2]
    if odd.numel() == 0:
        partner = positions.new_zeros(unit.shape[0], even.numel())
        best = partner.to(unit.dtype)
    else:
        best, partner = scores.max(dim=2)
    similarity, ranked = best.sort(dim=1, descending=True)
    chosen, rest = ranked[:, :r], ranked[:, r:].sort(dim=1).values
    return Pairs(even[chosen], odd[partner.gather(1, chosen)], similarity[:, :r]), even[rest]


def energy_pairs(unit: Tensor, r: int, p: int, blocked: Tensor | None, margin: float) -> Pairs:
    """Pair the ``2 r`` tokens of highest energy among themselves (arXiv 2405.16148, section 3.2).

    The energy of a token (equation 4) is the mean of ``f(x)`` over its cosine similarities ``x`` to the other tokens
    that are not prefix tokens, ``f(x) = x`` from the margin on and ``exp(x - margin) - 1`` below. In order of energy
    the tokens alternate between sources and destinations; every source takes its most similar destination. The
    published code uses ``x - margin`` above the margin and counts a token's similarity to itself; this is the paper's.

    Args:
        unit: [B, N, D] from :func:`unit_vectors`.
        r: pairs to take, at most half of the tokens that may take part.
        p: prefix tokens, which take no part and do not count for the energy.
        blocked: [B, N] bool, further tokens that take no part; they do count.
        margin: similarity from which on two tokens count as alike.

    Returns:
        The pairs, most similar first.
    """
    if r == 0:
        return _no_pairs(unit)
    free = unit[:, p:]
    cosine = free @ free.transpose(1, 2)
    count = free.shape[1]
    itself = torch.eye(count, dtype=torch.bool, device=unit.device)
    alike = torch.where(cosine >= margin, cosine, torch.exp(cosine - margin) - 1).masked_fill(itself, 0)
    energy = alike.sum(dim=2) / (count - 1)
    if blocked is not None:
        energy = energy.masked_fill(blocked[:, p:], -torch.inf)
    ranked = energy.sort(dim=1, descending=True).indices
    return _best_pairs(free, ranked[:, 0 : 2 * r : 2], ranked[:, 1 : 2 * r : 2], None, r, p)


def local_pairs(unit: Tensor, r: int, p: int, positions: Tensor | None, grid_width: int, window: int) -> Pairs:
    """Pair tokens with neighbours on the patch grid, and take the ``r`` most similar pairs, neighbours first.

    The split is by the colour of a token's patch on a checkerboard (parity of row + column), so that all four
    neighbours that share an edge are on the other side: by parity of the sequence, a token of a grid of even width
    would never meet the ones above and below. Merging unbalances the colours. The colour with more tokens left
    proposes, which balances them again; of its tokens ``ceil(n / 2)``, evenly spread over the sequence, are sources,
    and all others are destinations. There are thus enough of both for every ``r`` up to ``n // 2``, whatever is left.

    Pairs whose Chebyshev distance exceeds the window come after all that are nearer.

    Args:
        unit: [B, N, D] from :func:`unit_vectors`.
        r: pairs to take, at most half of the tokens that are not prefix tokens.
        p: prefix tokens, which take no part.
        positions: [B, N] or [N] whole numbers, the index of each token in the sequence that entered the model, prefix
            tokens included; None for ``0 .. N - 1``.
        grid_width: patches in a row of the grid.
        window: distance in patches up to which tokens are neighbours.

    Returns:
        The pairs, by distance beyond the window and then by similarity.
    """
    if r == 0:
        return _no_pairs(unit)
    batch, tokens, _ = unit.shape
    if positions is None:
        positions = torch.arange(tokens, device=unit.device)
    patch = (positions.to(unit.device).long()[..., p:] - p).expand(batch, tokens - p)
    row, column = patch // grid_width, patch % grid_width
    source, destination = _checkerboard((row + column) % 2)
    rows, columns = (
        (line.gather(1, source)[:, :, None] - line.gather(1, destination)[:, None, :]).abs() for line in (row, column)
    )
    beyond = (torch.maximum(rows, columns) - window).clamp_min(0)
    return _best_pairs(unit[:, p:], source, destination, _PER_PATCH * beyond.to(unit.dtype), r, p)


def _no_pairs(unit: Tensor) -> Pairs:
    nothing = torch.zeros(unit.shape[0], 0, dtype=torch.int64, device=unit.device)
    return Pairs(nothing, nothing, nothing.to(unit.dtype))


def _checkerboard(colour: Tensor) -> tuple[Tensor, Tensor]:
    """Split [B, n] colours (0 or 1) into ``ceil(n / 2)`` proposing and ``n // 2`` receiving indices, each in order."""
    count = colour.shape[1]
    half = count - count // 2
    common = (2 * colour.sum(dim=1, keepdim=True) > count).long()  # on a tie colour 0
    proposes = (colour == common).long()
    number = proposes.sum(dim=1, keepdim=True)  # at least `half`
    rank = proposes.cumsum(dim=1)
    # Of every `number` proposing tokens `half` are taken, as evenly as whole numbers allow.
    taken = (proposes == 1) & (rank * half // number > (rank - 1) * half // number)
    # Keys are unique, so the order depends on no backend's handling of ties.
    index = torch.arange(count, device=colour.device)
    keys = torch.where(taken, index, index + count).sort(dim=1).values
    return keys[:, :half], keys[:, half:] - count


def _best_pairs(free: Tensor, source: Tensor, destination: Tensor, handicap: Tensor | None, r: int, p: int) -> Pairs:
    """Give each candidate source its best destination and take the ``r`` best pairs.

    Args:
        free: [B, n, D] unit vectors without prefix tokens.
        source: [B, a] candidates, indices into ``free``.
        destination: [B, b] candidates.
        handicap: [B, a, b] taken off the similarity, for the choice only.
        r: pairs to take.
        p: number of the prefix tokens, added to the indices.
    """
    channels = free.shape[2]
    from_, to = (free.gather(1, side[:, :, None].expand(-1, -1, channels)) for side in (source, destination))
    cosine = from_ @ to.transpose(1, 2)
    best, partner = (cosine if handicap is None else cosine - handicap).max(dim=2)
    chosen = best.sort(dim=1, descending=True).indices[:, :r]
    similarity = cosine.gather(2, partner[:, :, None])[:, :, 0].gather(1, chosen)
    return Pairs(source.gather(1, chosen) + p, destination.gather(1, partner.gather(1, chosen)) + p, similarity)
