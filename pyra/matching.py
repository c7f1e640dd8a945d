"""Which tokens merge: similarity features -> :class:`MergePlan`, a plain set of index tensors.

Bipartite soft matching (ToMe, arXiv 2210.09461, section 3) as PYRA uses it (arXiv 2403.09192, section 3.1): even
positions form set A, odd positions set B; every A token proposes to its most similar B token, and the ``r`` A tokens
with the highest similarity become sources. Everything that follows - merging, unmerging, source maps, export -
consumes the plan and never looks at the features again.

Letters: ``B`` batch, ``N`` tokens, ``D`` feature channels, ``r`` tokens removed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Order = Literal["grouped", "sequence"]
ORDERS: tuple[str, ...] = ("grouped", "sequence")


@dataclass(frozen=True)
class MergePlan:
    """One merging step of a batch, as index tensors (int64, no gradients).

    Attributes:
        source: [B, r] input positions that are merged away, most similar pair first (the rank of a pair).
        destination: [B, r] input position that each source is merged into; a destination may occur several times.
        kept: [B, N - r] input positions that remain, in output order.
        target: [B, r] output row of each destination: ``kept.gather(1, target) == destination``.
    """

    source: Tensor
    destination: Tensor
    kept: Tensor
    target: Tensor

    @property
    def removed(self) -> int:
        """Number of tokens removed (``r`` after clipping)."""
        return self.source.shape[1]

    @property
    def num_tokens(self) -> int:
        """Number of input tokens (``N``)."""
        return self.kept.shape[1] + self.source.shape[1]

    def source_map(self) -> Tensor:
        """Return [B, N]: the output row that holds each input token."""
        rows = torch.arange(self.kept.shape[1], device=self.kept.device).expand_as(self.kept)
        empty = self.kept.new_zeros(self.kept.shape[0], self.num_tokens)
        return empty.scatter(1, self.kept, rows).scatter(1, self.source, self.target)


torch.export.register_dataclass(MergePlan)


def removable(num_tokens: int, num_prefix_tokens: int) -> int:
    """Most tokens one step can remove: half of the tokens that are not prefix tokens, rounded down.

    >>> removable(197, 1)
    98
    """
    return max((num_tokens - num_prefix_tokens) // 2, 0)


def match_tokens(
    features: Tensor,
    r: int,
    *,
    num_prefix_tokens: int = 1,
    protected: Tensor | None = None,
    order: Order = "grouped",
) -> MergePlan:
    """Choose ``r`` tokens to merge away and the token each of them merges into.

    Args:
        features: [B, N, D] similarity features, not normalised (cosine similarity is taken here, in at least float32).
        r: tokens to remove, clipped to ``(N - protected tokens) // 2``.
        num_prefix_tokens: leading tokens (class, distillation, register, prompt) that never take part.
        protected: [N] or [B, N] bool, further tokens that never take part. The number that can be removed then depends
            on the data, which costs one synchronisation with the device.
        order: order of the kept tokens. ``"grouped"``: prefix tokens, kept even positions, odd positions (the published
            order; the next layer's split sees it). ``"sequence"``: the original order.

    Returns:
        The plan; with nothing to remove its ``source`` is [B, 0] and ``kept`` lists every token.

    Raises:
        ValueError: for features that are not [B, N, D], a negative ``r`` or prefix, an unknown order, or a mask that
            does not fit.

    Example:
        >>> plan = match_tokens(torch.randn(2, 17, 8), 4)
        >>> plan.kept.shape
        torch.Size([2, 13])
    """
    _check(features, r, num_prefix_tokens, protected, order)
    batch, tokens, _ = features.shape
    with torch.no_grad():
        r = min(int(r), removable(tokens, num_prefix_tokens))
        blocked = None
        if protected is not None:
            blocked = protected.to(features.device).expand(batch, tokens)
            r = min(r, _removable_with(blocked, num_prefix_tokens))
        even, odd, best, partner = _propose(features.detach(), num_prefix_tokens, blocked)
        ranked = best.sort(dim=1, descending=True).indices
        chosen, rest = ranked[:, :r], ranked[:, r:].sort(dim=1).values
        source = even[chosen]
        destination = odd[partner.gather(1, chosen)]
        kept_even, kept_odd = even[rest], odd.expand(batch, -1)
        if order == "sequence":
            kept = torch.cat([kept_even, kept_odd], dim=1).sort(dim=1).values
            return MergePlan(source, destination, kept, torch.searchsorted(kept, destination.contiguous()))
        # Prefix tokens lead; even ones are never sources, so they head `kept_even` in order.
        p = min(num_prefix_tokens, tokens)
        prefix = torch.arange(p, device=features.device).expand(batch, -1)
        kept = torch.cat([prefix, kept_even[:, (p + 1) // 2 :], kept_odd[:, p // 2 :]], dim=1)
        first_odd = kept.shape[1] - (odd.shape[0] - p // 2)  # output row of the first odd token after the prefix
        return MergePlan(source, destination, kept, destination // 2 - p // 2 + first_odd)


def _propose(features: Tensor, p: int, blocked: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Positions of the even and odd tokens, and the best score [B, N_even] and partner of every even token."""
    unit = F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
    scores = unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)
    scores[:, : (p + 1) // 2] = -torch.inf
    scores[:, :, : p // 2] = -torch.inf
    if blocked is not None:
        scores.masked_fill_(blocked[:, ::2, None] | blocked[:, None, 1::2], -torch.inf)
    positions = torch.arange(features.shape[1], device=features.device)
    even, odd = positions[::2], positions[1::2]
    if odd.numel() == 0:
        nothing = positions.new_zeros(features.shape[0], even.numel())
        return even, odd, nothing.to(unit.dtype), nothing
    best, partner = scores.max(dim=2)
    return even, odd, best, partner


def _removable_with(blocked: Tensor, p: int) -> int:
    """Most tokens that every sample of the batch can lose under a protection mask."""
    if blocked.numel() == 0:
        return 0
    free = ~blocked
    free[:, :p] = False
    by_share = free.sum(1) // 2
    sources = torch.where(free[:, 1::2].any(1), free[:, ::2].sum(1), 0)
    return int(torch.minimum(by_share, sources).min())


def _check(features: Tensor, r: int, p: int, protected: Tensor | None, order: str) -> None:
    problems = []
    if features.ndim != 3:
        problems.append(f"features must be [B, N, D], got {list(features.shape)}")
    elif protected is not None and (
        protected.dtype != torch.bool or list(protected.shape) not in ([features.shape[1]], list(features.shape[:2]))
    ):
        problems.append(
            f"protected must be bool [N] or [B, N] = {list(features.shape[:2])}, "
            f"got {protected.dtype} {list(protected.shape)}"
        )
    if r < 0:
        problems.append(f"r must not be negative, got {r}")
    if p < 0:
        problems.append(f"num_prefix_tokens must not be negative, got {p}")
    if order not in ORDERS:
        problems.append(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
    if problems:
        raise ValueError("match_tokens: " + "; ".join(problems))
