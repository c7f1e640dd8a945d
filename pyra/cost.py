"""What a transformer costs: multiply-accumulates (MACs) of a backbone under a schedule.

Counted, as in the paper's table 1 (1 G = 1e9): patch projection, qkv, output projection, both attention products and
the MLP, and attention pooling where a model has it; a layer's merging takes effect after its attention. Not counted:
norms, biases, the head, and the matching itself (:func:`matching_macs` states it; 0.03 % of ViT-B/16 at the published
schedules).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Geometry:
    """The sizes of a plain transformer that its cost depends on.

    Attributes:
        depth: number of blocks.
        tokens: sequence length at the first block, prefix tokens included.
        prefix_tokens: leading tokens that never merge.
        dim: channels ``C`` of a token.
        attention_dim: channels of queries, keys and values (heads x head width).
        mlp_macs: MACs of the MLP for one token (``2 * C * hidden`` for the plain MLP).
        head_dim: channels of the similarity features.
        embedding_macs: MACs before the first block (patch projection).
        projection_macs: MACs of the attention's linear layers for one token; None means ``4 * dim * attention_dim``.
        pooling_macs: MACs of attention pooling after the last block, where every token is seen again.
        halving: whether a block removes at most half of the tokens that are not prefix tokens, as pairs do.
    """

    depth: int
    tokens: int
    prefix_tokens: int
    dim: int
    attention_dim: int
    mlp_macs: int
    head_dim: int
    embedding_macs: int = 0
    projection_macs: int | None = None
    pooling_macs: int = 0
    halving: bool = True


def token_counts(geometry: Geometry, schedule: Sequence[int]) -> list[int]:
    """Tokens that enter each block, and those that leave the last one: ``depth + 1`` numbers."""
    counts = [geometry.tokens]
    for removed in schedule:
        counts.append(counts[-1] - removed)
    return counts


def geometry_macs(geometry: Geometry, schedule: Sequence[int] | None = None) -> int:
    """MACs of one input.

    Args:
        geometry: sizes of the backbone.
        schedule: tokens removed in each block; None removes none.

    Raises:
        ValueError: where the schedule has not one entry a block.
    """
    schedule = [0] * geometry.depth if schedule is None else list(schedule)
    if len(schedule) != geometry.depth:
        raise ValueError(f"schedule has {len(schedule)} entries for {geometry.depth} blocks")
    counts = token_counts(geometry, schedule)
    projections = geometry.projection_macs
    if projections is None:
        projections = 4 * geometry.dim * geometry.attention_dim
    total = geometry.embedding_macs + geometry.pooling_macs
    for before, after in pairwise(counts):
        total += before * projections + 2 * before * before * geometry.attention_dim + after * geometry.mlp_macs
    return total


def matching_macs(geometry: Geometry, schedule: Sequence[int]) -> int:
    """MACs of the similarity scores that choose the pairs (not part of :func:`geometry_macs`)."""
    counts = token_counts(geometry, schedule)
    pairs = (((n + 1) // 2) * (n // 2) for n, removed in zip(counts, schedule, strict=False) if removed)
    return geometry.head_dim * sum(pairs)
