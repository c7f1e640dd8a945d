"""What the tests of the kernels merge: plans, tokens, sizes and weights."""

from __future__ import annotations

import torch
from torch import Tensor

from pyra.kernels import match
from pyra.kernels.match import Rules
from pyra.kernels.merge import Plan, Weights

SIZES = ("none", "whole", "real", "padding")
TRAINED = ("plainly", "affine", "without-affine", "fewer-pairs", "more-pairs")


def plan_for(tokens: int, prefix: int, removed: int, dropping: bool = False, batch: int = 2) -> Plan:
    generator = torch.Generator().manual_seed(tokens + removed)
    features = torch.randn(batch, tokens, 8, generator=generator)
    rules = Rules("grouped", "bipartite", 0.5, None, 1)
    found = match.reference(features, None, removed, prefix, rules, None)
    weight = (torch.rand(batch, removed, generator=generator) > 0.3).float() if dropping else None
    return Plan(*found[:4], weight)


def sizes(kind: str, tokens: int, batch: int = 2) -> Tensor | None:
    generator = torch.Generator().manual_seed(3)
    if kind == "none":
        return None
    lowest = 0 if kind == "padding" else 1
    counts = torch.randint(lowest, 4, (batch, tokens, 1), generator=generator, dtype=torch.int32)
    return counts.float() if kind == "real" else counts


def weights_for(kind: str, removed: int, channels: int) -> Weights | None:
    if kind == "plainly":
        return None
    generator = torch.Generator().manual_seed(4)
    pairs = removed + {"fewer-pairs": -1, "more-pairs": 2}.get(kind, 0)
    affine = kind != "without-affine"
    drawn = [torch.randn(shape, generator=generator) for shape in ((pairs, 1), (1, channels), (channels,), (channels,))]
    return Weights(drawn[0], 0.3 * drawn[1], drawn[2] if affine else None, drawn[3] if affine else None, 1e-5)


def tokens_for(tokens: int, channels: int, batch: int = 2) -> Tensor:
    return torch.randn(batch, tokens, channels, generator=torch.Generator().manual_seed(5))
