"""Where every token is after a merging step, and what it stands for, as one operator: ``pyra::follow_tokens``.

:func:`follow` chooses how it runs, as in :mod:`pyra.kernels.match`. The operator runs :func:`reference`, or
:mod:`pyra.kernels.follow_triton` where Triton was chosen. Nothing here has a gradient.

Letters: ``B`` batch, ``N`` tokens, ``N0`` tokens at the first layer, ``M = N - r`` tokens left, ``r`` tokens removed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyra.kernels.choice import as_operator, at_once, on_device_of, runs_triton


class Followed(NamedTuple):
    """What is known of the tokens that are left.

    Attributes:
        size: [B, M, 1] int32, patches each token stands for.
        source_map: [B, N0] int64, row that holds each original token.
        positions: [B, M] int64, original position of each token; a merged token has that of its destination.
    """

    size: Tensor
    source_map: Tensor
    positions: Tensor


def follow(
    total: Tensor,
    source_map: Tensor | None,
    positions: Tensor | None,
    kept: Tensor,
    source: Tensor,
    target: Tensor,
    backend: str = "auto",
) -> Followed:
    """Follow the tokens of a batch through one step.

    Args:
        total: [B, M, 1] sizes after the step, of any type; whole numbers.
        source_map: [B, N0] row that held each original token before the step; None means its own.
        positions: [B, N] original position of each token before the step; None means in place.
        kept: [B, M] from the step's plan, as ``source`` [B, r] and ``target`` [B, r].
        source: tokens that merged.
        target: output row that each of them merged into.
        backend: ``"auto"``, ``"reference"`` or ``"triton"``.
    """
    if total.dtype != torch.float64 and as_operator(total, backend):
        run = _run if at_once(total, source_map, positions) else torch.ops.pyra.follow_tokens
        return Followed(*run(total, source_map, positions, kept, source, target, backend))
    return reference(total, source_map, positions, kept, source, target)


def reference(
    total: Tensor, source_map: Tensor | None, positions: Tensor | None, kept: Tensor, source: Tensor, target: Tensor
) -> Followed:
    """Follow in plain PyTorch."""
    step = rows_after(kept, source, target)
    return Followed(
        total.to(torch.int32),
        step if source_map is None else step.gather(1, source_map),
        kept if positions is None else positions.gather(1, kept),
    )


def rows_after(kept: Tensor, source: Tensor, target: Tensor) -> Tensor:
    """Return [B, N]: the output row of one step that holds each of its input tokens."""
    rows = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    empty = kept.new_zeros(kept.shape[0], kept.shape[1] + source.shape[1])
    return empty.scatter(1, kept, rows).scatter(1, source, target)


def _run(
    total: Tensor,
    source_map: Tensor | None,
    positions: Tensor | None,
    kept: Tensor,
    source: Tensor,
    target: Tensor,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    if total.dtype != torch.float64 and runs_triton(total, backend):
        from pyra.kernels.follow_triton import follow_tokens

        with on_device_of(total):
            return follow_tokens(total, source_map, positions, kept, source, target)
    size, rows, places = reference(total, source_map, positions, kept, source, target)
    # An operator returns none of its inputs.
    return (size.clone() if size is total else size), rows, (places.clone() if places is kept else places)


_operator = torch.library.custom_op("pyra::follow_tokens", _run, mutates_args=())


@_operator.register_fake
def _shapes(
    total: Tensor, source_map: Tensor | None, positions: Tensor | None, kept: Tensor, source: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    original = source.shape[1] + kept.shape[1] if source_map is None else source_map.shape[1]
    rows = kept.new_empty(kept.shape[0], original)
    return total.new_empty(total.shape, dtype=torch.int32), rows, kept.new_empty(kept.shape)
