"""The operators on a CPU: what they return is the reference, and their gradients are those of autograd."""

from __future__ import annotations

import itertools

import pytest
import torch
from support_for_kernels import SIZES, TRAINED, plan_for, sizes, tokens_for, weights_for
from torch import Tensor
from torch.library import opcheck

from pyra.kernels import attend, bias, follow, match, merge
from pyra.kernels.checks import doubled
from pyra.kernels.match import Rules

SHAPES = ((17, 1, 16), (16, 0, 8), (9, 2, 24))  # tokens, prefix, channels


@pytest.mark.parametrize(("size", "trained"), list(itertools.product(SIZES, TRAINED)))
@pytest.mark.parametrize("dropping", [False, True])
def test_gradients_are_those_of_autograd(size: str, trained: str, dropping: bool) -> None:
    for tokens, prefix, channels in SHAPES:
        removed = (tokens - prefix) // 2
        plan, x = plan_for(tokens, prefix, removed, dropping), tokens_for(tokens, channels).double().requires_grad_()
        weights = doubled(weights_for(trained, removed, channels))
        counts = sizes(size, tokens)
        leaves = [x, *(part.requires_grad_() for part in (weights or ())[:4] if part is not None)]
        merged, total = merge.reference(x, counts, plan, weights)
        gradient = torch.randn_like(merged)
        expected = torch.autograd.grad(merged, leaves, gradient)
        with torch.no_grad():
            found = merge.reference_backward(gradient, total, x, counts, plan, weights)
        actual = [part for part in found if part.numel()]
        torch.testing.assert_close(actual, list(expected), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("trained", TRAINED)
@pytest.mark.parametrize("size", SIZES)
def test_the_merge_operator_is_well_made(size: str, trained: str) -> None:
    plan, x, weights = plan_for(17, 1, 6), tokens_for(17, 16), weights_for(trained, 6, 16)
    tensors = (None, None, None, None, 0.0) if weights is None else weights
    trainable = [t.requires_grad_() if isinstance(t, Tensor) else t for t in tensors]
    counts = sizes(size, 17)
    arguments = (x.requires_grad_(), counts, *plan, *trainable, "auto")
    opcheck(torch.ops.pyra.merge_tokens.default, arguments)
    with torch.no_grad():
        expected = merge.reference(x, counts, plan, weights)
        assert all(torch.equal(*pair) for pair in zip(torch.ops.pyra.merge_tokens(*arguments), expected, strict=True))


@pytest.mark.parametrize("method", ["bipartite", "energy", "local", "prune"])
@pytest.mark.parametrize("heads", [None, 1, 2])
def test_the_match_operator_is_well_made(heads: int | None, method: str) -> None:
    keys = torch.randn(2, 17, 8) if heads is None else torch.randn(2, 3, 17, 8)
    keys = keys.transpose(1, 2) if heads == 2 else keys
    rules = Rules("grouped", method, 0.5, 4, 1)
    arguments = (keys, heads, 5, 1, *rules, torch.arange(17), "auto")
    opcheck(torch.ops.pyra.match_tokens.default, arguments)
    expected = match.reference(keys, heads, 5, 1, rules, torch.arange(17))
    assert all(torch.equal(*pair) for pair in zip(torch.ops.pyra.match_tokens(*arguments), expected, strict=True))


@pytest.mark.parametrize("begun", [True, False])
def test_the_follow_operator_is_well_made(begun: bool) -> None:
    plan, generator = plan_for(17, 1, 6), torch.Generator().manual_seed(0)
    earlier = torch.randint(0, 17, (2, 25), generator=generator)
    places = torch.stack([torch.randperm(25, generator=generator)[:17] for _ in range(2)])
    before = (earlier, places) if begun else (None, None)
    for total in (torch.ones(2, 11, 1), torch.ones(2, 11, 1, dtype=torch.int32)):
        arguments = (total, *before, plan.kept, plan.source, plan.target)
        opcheck(torch.ops.pyra.follow_tokens.default, (*arguments, "auto"))
        expected = follow.reference(*arguments)
        found = torch.ops.pyra.follow_tokens(*arguments, "auto")
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_size_bias_operator_is_well_made(dtype: torch.dtype) -> None:
    size = sizes("padding", 17)
    arguments = (size, dtype, -30000.0)
    opcheck(torch.ops.pyra.size_bias.default, (*arguments, "auto"))
    found = torch.ops.pyra.size_bias(*arguments, "auto")
    assert torch.equal(found, bias.reference(*arguments)) and found.dtype == dtype
    assert found.shape == (2, 1, 1, 17) and found.min() == torch.tensor(-30000.0).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_attention_operator_is_well_made(dtype: torch.dtype) -> None:
    query, key, value = (torch.randn(2, 3, tokens, 8, dtype=dtype) for tokens in (5, 17, 17))
    arguments = (query, key, value, sizes("padding", 17), 0.3)
    opcheck(torch.ops.pyra.attend_sizes.default, (*arguments, "auto"))
    found = torch.ops.pyra.attend_sizes(*arguments, "auto")
    assert torch.equal(found, attend.reference(*arguments)) and found.transpose(1, 2).is_contiguous()
    assert not attend.takes(*arguments[:4])  # on a CPU the mask runs


def test_sizes_and_weights_in_float64_beside_tokens_in_float32() -> None:
    plan, x, weights = plan_for(17, 1, 6, dropping=True), tokens_for(17, 16), weights_for("affine", 6, 16)
    plan, counts = plan._replace(weight=plan.weight.double()), sizes("whole", 17).double()
    arguments = (x.requires_grad_(), counts, *plan, *weights, "auto")
    opcheck(torch.ops.pyra.merge_tokens.default, arguments)
    merged, total = torch.ops.pyra.merge_tokens(*arguments)
    merged.sum().backward()
    assert (merged.dtype, total.dtype, x.grad.dtype) == (torch.float32, torch.float64, torch.float32)
