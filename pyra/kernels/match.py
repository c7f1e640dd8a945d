"""Matching as one operator, ``pyra::match_tokens``: keys in, the index tensors of a plan out.

:func:`match` chooses how it runs: the plain functions where a graph is exported or nothing is gained, the operator
elsewhere. The operator runs :func:`reference`, or :mod:`pyra.kernels.match_triton` where Triton was chosen.

Letters: ``B`` batch, ``N`` tokens, ``D`` feature channels, ``H`` heads, ``r`` tokens removed.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyra.kernels.choice import as_operator, at_once, autocast_dtype, on_device_of, runs_triton
from pyra.kernels.pairing import bipartite_pairs, energy_pairs, local_pairs, unit_vectors


class Matched(NamedTuple):
    """The index tensors of a :class:`pyra.MergePlan`, and the cosine similarity of each pair.

    Attributes:
        source: [B, r] int64.
        destination: [B, r] int64.
        kept: [B, N - r] int64.
        target: [B, r] int64.
        similarity: [B, r] float32 (float64 for float64 features).
    """

    source: Tensor
    destination: Tensor
    kept: Tensor
    target: Tensor
    similarity: Tensor


class Rules(NamedTuple):
    """How pairs are found; see :func:`pyra.match_tokens`."""

    order: str
    method: str
    margin: float
    grid_width: int | None
    window: int


def match(
    features: Tensor,
    heads: int | None,
    r: int,
    prefix: int,
    rules: Rules,
    positions: Tensor | None = None,
    backend: str = "auto",
) -> Matched:
    """Match the tokens of a batch.

    Args:
        features: [B, N, D], or with heads apart [B, H, N, D] or [B, N, H, D], of which the mean is compared.
        heads: axis of the heads; None for [B, N, D].
        r: tokens to remove, no more than can be.
        prefix: leading tokens that take no part.
        rules: how.
        positions: [N] or [B, N], read by ``"local"``.
        backend: ``"auto"``, ``"reference"`` or ``"triton"``.
    """
    features = features.detach()
    if as_operator(features, backend):
        run = _run if at_once(features, positions) else torch.ops.pyra.match_tokens
        return Matched(*run(features, heads, r, prefix, *rules, positions, backend))
    return reference(features, heads, r, prefix, rules, positions)


def reference(
    features: Tensor,
    heads: int | None,
    r: int,
    prefix: int,
    rules: Rules,
    positions: Tensor | None,
    blocked: Tensor | None = None,
) -> Matched:
    """Match in plain PyTorch; ``blocked`` [B, N] marks further tokens that take no part."""
    with torch.no_grad(), _without_autocast(features.device.type):
        unit = unit_vectors(features if heads is None else features.mean(dim=heads))
        tokens = unit.shape[1]
        if rules.method == "energy":
            pairs = energy_pairs(unit, r, prefix, blocked, rules.margin)
        elif rules.method == "local":
            assert rules.grid_width is not None
            pairs = local_pairs(unit, r, prefix, positions, rules.grid_width, rules.window)
        else:
            pairs, even = bipartite_pairs(unit, r, prefix, blocked)
        if rules.method in ("bipartite", "prune") and rules.order == "grouped":
            kept, target = _grouped(pairs.destination, even, tokens, prefix)
        else:
            kept, target = _in_sequence(pairs.source, pairs.destination, tokens)
        return Matched(pairs.source, pairs.destination, kept, target, pairs.similarity)


def _without_autocast(device: str) -> AbstractContextManager[Any]:
    """Keep autocast from rounding similarities: in bfloat16 nearly equal pairs would tie."""
    return nullcontext() if autocast_dtype(device) is None else torch.autocast(device, enabled=False)


def _grouped(destination: Tensor, even: Tensor, tokens: int, p: int) -> tuple[Tensor, Tensor]:
    """Kept positions and targets in the published order, given the even positions that remain."""
    positions = torch.arange(tokens, device=even.device).expand(even.shape[0], -1)
    # Prefix tokens lead; even ones are never sources, so they head `even` in order.
    kept = torch.cat([positions[:, :p], even[:, (p + 1) // 2 :], positions[:, 1::2][:, p // 2 :]], dim=1)
    first_odd = kept.shape[1] - (tokens // 2 - p // 2)  # output row of the first odd token after the prefix
    return kept, destination // 2 - p // 2 + first_odd


def _in_sequence(source: Tensor, destination: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Kept positions and targets in the original order."""
    positions = torch.arange(tokens, device=source.device).expand(source.shape[0], -1)
    # Not `searchsorted`, which ONNX does not have.
    kept = positions.scatter(1, source, tokens).sort(dim=1).values[:, : tokens - source.shape[1]]
    rows = positions.scatter(1, kept, positions[:, : kept.shape[1]])
    return kept, rows.gather(1, destination)


def _run(
    features: Tensor,
    heads: int | None,
    r: int,
    prefix: int,
    order: str,
    method: str,
    margin: float,
    grid_width: int | None,
    window: int,
    positions: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rules = Rules(order, method, margin, grid_width, window)
    if method in ("bipartite", "prune") and runs_triton(features, backend) and features.numel():
        from pyra.kernels.match_triton import match_bipartite

        with on_device_of(features):
            return match_bipartite(features, heads, r, prefix, order)
    found = reference(features, heads, r, prefix, rules, positions)
    source, destination, kept, target, similarity = (part.contiguous() for part in found)
    return source, destination, kept, target, similarity


_operator = torch.library.custom_op("pyra::match_tokens", _run, mutates_args=())


@_operator.register_fake
def _shapes(features: Tensor, heads: int | None, r: int, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    batch, tokens = features.shape[0], features.shape[2 if heads == 1 else 1]
    pairs = features.new_empty(batch, r, dtype=torch.int64)
    similarity = features.new_empty(batch, r, dtype=torch.promote_types(features.dtype, torch.float32))
    kept = features.new_empty(batch, tokens - r, dtype=torch.int64)
    return pairs, torch.empty_like(pairs), kept, torch.empty_like(pairs), similarity
