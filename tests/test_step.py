"""Operators that stand for a merging step under the compiler: the same numbers as the functions they are made of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.library import opcheck

from pyra.kernels.match import Rules
from pyra.step import layer_norm, merge_step

RULES = Rules("grouped", "bipartite", 0.5, None, 1)


def state(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int]:
    """A stream of 17 tokens that 25 have merged into, and keys with their heads at axis 1."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(3, 17, 16, generator=generator).to(dtype)
    size = torch.randint(1, 5, (3, 17, 1), generator=generator, dtype=torch.int32)
    source_map = torch.randint(0, 17, (3, 25), generator=generator)
    positions = torch.stack([torch.randperm(25, generator=generator)[:17] for _ in range(3)])
    return tokens, size, source_map, positions, torch.randn(3, 2, 17, 8, generator=generator).to(dtype), 1


@pytest.mark.parametrize("begun", [True, False])
@torch.no_grad()
def test_a_compiled_step_is_the_step(begun: bool) -> None:
    tokens, size, source_map, positions, keys, heads = state()
    before = (size, source_map, positions) if begun else (None, None, None)
    torch.compiler.reset()
    compiled = torch.compile(merge_step, backend="eager", fullgraph=True)
    arguments = (tokens, *before, keys, heads, None, 4, 1, RULES)
    for actual, value in zip(compiled(*arguments), merge_step(*arguments), strict=True):
        assert actual.dtype == value.dtype and torch.equal(actual, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("affine", [True, False])
def test_layer_norm_as_an_operator(affine: bool, dtype: torch.dtype) -> None:
    norm = nn.LayerNorm(16, elementwise_affine=affine, dtype=dtype).requires_grad_(False)
    tokens = state(dtype)[0].transpose(0, 1)
    arguments = (tokens, norm.weight, norm.bias, norm.eps)
    opcheck(torch.ops.pyra.layer_norm.default, arguments)
    assert torch.equal(torch.ops.pyra.layer_norm(*arguments), norm(tokens))


class Doubled(nn.LayerNorm):
    def forward(self, tokens: Tensor) -> Tensor:
        return 2 * super().forward(tokens)


@torch.no_grad()
def test_a_norm_of_another_kind_or_with_hooks_runs_itself_when_compiled() -> None:
    tokens, hooked, patched, seen = state()[0], nn.LayerNorm(16), nn.LayerNorm(16), []
    hooked.register_forward_hook(lambda *_: seen.append(1))
    patched.forward = lambda tokens: tokens + 1  # type: ignore[method-assign]
    for norm in (hooked, patched, Doubled(16)):
        torch.compiler.reset()
        assert torch.equal(torch.compile(layer_norm, backend="eager")(norm, tokens), norm(tokens))
    assert len(seen) == 2
