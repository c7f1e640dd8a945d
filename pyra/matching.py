"""Which tokens merge: similarity features -> :class:`MergePlan`, a plain set of index tensors.

The default is bipartite soft matching (ToMe, arXiv 2210.09461, section 3) as PYRA uses it (arXiv 2403.09192, section
3.1): even positions form set A, odd positions set B; every A token proposes to its most similar B token, and the ``r``
A tokens with the highest similarity become sources. The other methods (:data:`METHODS`) find their pairs otherwise;
see :mod:`pyra.kernels.pairing`. Everything that follows - merging, unmerging, source maps, export - consumes the plan
and never looks at the features again.

Letters: ``B`` batch, ``N`` tokens, ``D`` feature channels, ``r`` tokens removed.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from pyra.kernels.follow import rows_after
from pyra.kernels.match import Matched, Rules, match, reference

Order = Literal["grouped", "sequence"]
ORDERS: tuple[str, ...] = ("grouped", "sequence")
METHODS: tuple[str, ...] = ("bipartite", "energy", "local", "prune")


@dataclass(frozen=True)
class MergePlan:
    """One merging step of a batch, as index tensors (int64, no gradients) and, where tokens are dropped, weights.

    Attributes:
        source: [B, r] input positions that are merged away, best pair first (the rank of a pair).
        destination: [B, r] input position that each source is merged into; a destination may occur several times.
        kept: [B, N - r] input positions that remain, in output order.
        target: [B, r] output row of each destination: ``kept.gather(1, target) == destination``.
        weight: [B, r] float32, share of each source's size that its destination receives; 0 drops the token, None
            stands for ones. A dropped token still has a destination, which stands for it in dense outputs.
    """

    source: Tensor
    destination: Tensor
    kept: Tensor
    target: Tensor
    weight: Tensor | None = None

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
        return rows_after(self.kept, self.source, self.target)


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
    method: str = "bipartite",
    threshold: float | None = None,
    margin: float = 0.9,
    positions: Tensor | None = None,
    grid_width: int | None = None,
    window: int = 1,
) -> MergePlan:
    """Choose ``r`` tokens to merge away and the token each of them merges into.

    A sample with features that are not finite gets some valid plan; the plans of the other samples are unaffected.

    Args:
        features: [B, N, D] similarity features, not normalised (cosine similarity is taken here, in at least float32).
        r: tokens to remove, clipped to ``(N - prefix tokens - protected tokens) // 2``.
        num_prefix_tokens: leading tokens (class, distillation, register, prompt) that never take part.
        protected: [N] or [B, N] bool, further tokens that never take part; not with ``"local"``. The number that can
            be removed then depends on the data, which costs one synchronisation with the device.
        order: order of the kept tokens, for ``"bipartite"`` and ``"prune"``; the other methods keep the original one.
            ``"grouped"``: prefix tokens, kept even positions, odd positions (the published order; the next layer's
            split sees it). ``"sequence"``: the original order.
        method: how pairs are found.
            ``"bipartite"``: even against odd positions (ToMe, arXiv 2210.09461, section 3).
            ``"energy"``: among the ``2 r`` tokens that have most others like them (PiToMe, arXiv 2405.16148, section
            3.2); see :func:`pyra.kernels.pairing.energy_pairs`.
            ``"local"``: neighbours on the patch grid before all others; see :func:`pyra.kernels.pairing.local_pairs`.
            ``"prune"``: the pairs of ``"bipartite"``, the sources dropped instead of merged: a control.
        threshold: cosine similarity in [-1, 1] under which a pair is not averaged: its source is dropped (weight 0),
            where merging would blur (cf. Token Fusion, arXiv 2312.01026). ``r`` tokens are removed all the same. Not
            with ``"prune"``.
        margin: similarity from which on tokens count as alike, read by ``"energy"``. The paper lowers it over the
            layers: ``0.9 - 0.9 * layer / depth``.
        positions: [N] or [B, N] whole numbers, read by ``"local"``: index of each token in the sequence that entered
            the model, prefix tokens included; None for ``0 .. N - 1``.
        grid_width: patches in a row of the grid, required by ``"local"``.
        window: largest distance of neighbours in patches, diagonals counted as 1 (Chebyshev), read by ``"local"``.

    Returns:
        The plan; with nothing to remove its ``source`` is [B, 0] and ``kept`` lists every token. Sources come most
        similar pair first; with ``"local"`` by distance beyond the window before that.

    Raises:
        ValueError: naming every argument that cannot be used, among them what a method needs or does not support.

    Example:
        >>> plan = match_tokens(torch.randn(2, 17, 8), 4)
        >>> plan.kept.shape
        torch.Size([2, 13])
    """
    problems = _problems(features, r, num_prefix_tokens, protected, order)
    problems += _method_problems(features, method, threshold, margin, protected, positions, grid_width, window)
    if problems:
        raise ValueError("match_tokens: " + "; ".join(problems))
    batch, tokens, _ = features.shape
    p = min(num_prefix_tokens, tokens)
    r = min(int(r), removable(tokens, p))
    rules = Rules(order, method, margin, grid_width, window)
    if protected is None:
        matched = match(features, None, r, p, rules, positions)
    else:
        blocked = protected.to(features.device).expand(batch, tokens)
        r = min(r, _removable_with(blocked, p, method))
        matched = reference(features.detach(), None, r, p, rules, positions, blocked)
    return plan_of(matched, method, threshold)


def plan_of(matched: Matched, method: str, threshold: float | None) -> MergePlan:
    """Return the plan of matched pairs: which are merged, and which dropped."""
    weight = None
    if method == "prune":
        weight = torch.zeros_like(matched.similarity, dtype=torch.float32)
    elif threshold is not None:  # a similarity that is no number is under every threshold
        weight = (matched.similarity >= threshold).to(torch.float32)
    return MergePlan(matched.source, matched.destination, matched.kept, matched.target, weight)


def _removable_with(blocked: Tensor, p: int, method: str) -> int:
    """Most tokens that every sample of the batch can lose under a protection mask."""
    if blocked.numel() == 0:
        return 0
    free = ~blocked
    free[:, :p] = False
    most = free.sum(1) // 2
    if method != "energy":  # sources are even, destinations odd
        most = torch.minimum(most, torch.where(free[:, 1::2].any(1), free[:, ::2].sum(1), 0))
    return int(most.min())


def _problems(features: Tensor, r: int, p: int, protected: Tensor | None, order: str) -> list[str]:
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
    return problems


def _method_problems(
    features: Tensor,
    method: str,
    threshold: float | None,
    margin: float,
    protected: Tensor | None,
    positions: Tensor | None,
    grid_width: int | None,
    window: int,
) -> list[str]:
    """What keeps ``method`` from running; what it does not read is not looked at."""
    problems = []
    if method not in METHODS:
        problems.append(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    if threshold is not None and not -1 <= threshold <= 1:
        problems.append(f"threshold must be in [-1, 1], got {threshold}")
    if threshold is not None and method == "prune":
        problems.append("method 'prune' drops every source: give no threshold")
    if method == "energy" and not math.isfinite(margin):
        problems.append(f"margin must be a finite number, got {margin}")
    if method != "local":
        return problems
    if protected is not None:
        problems.append("method 'local' does not support protected: use 'bipartite' or 'energy'")
    if grid_width is None or grid_width < 1:
        problems.append(f"method 'local' needs grid_width, the patches in a row (at least 1), got {grid_width}")
    if window < 1:
        problems.append(f"window must be at least 1, got {window}")
    if positions is not None and features.ndim == 3:
        whole = not (positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool)
        if not whole or list(positions.shape) not in ([features.shape[1]], list(features.shape[:2])):
            problems.append(
                f"positions must be whole numbers [N] or [B, N] = {list(features.shape[:2])}, "
                f"got {positions.dtype} {list(positions.shape)}"
            )
    return problems
