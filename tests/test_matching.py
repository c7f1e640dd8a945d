"""Matching: the plan's invariants, and agreement with a reference written as plain loops."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils import _pytree as pytree

from pyra import MergePlan, match_tokens
from pyra.matching import ORDERS, removable

bounded = settings(deadline=None, max_examples=60)


@dataclass
class Case:
    """Arguments of one call of ``match_tokens``."""

    features: Tensor
    r: int
    prefix: int
    protected: Tensor | None
    order: str

    def plan(self) -> MergePlan:
        return match_tokens(
            self.features, self.r, num_prefix_tokens=self.prefix, protected=self.protected, order=self.order
        )

    def never(self, sample: int) -> list[bool]:
        """For each position: whether it takes no part."""
        tokens = self.features.shape[1]
        mask = [False] * tokens if self.protected is None else self.protected.expand(len(self.features), tokens)[sample]
        return [position < self.prefix or bool(mask[position]) for position in range(tokens)]


@st.composite
def cases(draw: st.DrawFn, dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)) -> Case:
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(2, 40))
    prefix = draw(st.integers(0, min(5, tokens)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    features = torch.randn(batch, tokens, 8, generator=generator, dtype=torch.float64).to(draw(st.sampled_from(dtypes)))
    if draw(st.booleans()):  # the same values, not contiguous
        features = features.transpose(1, 2).contiguous().transpose(1, 2)
    shape = draw(st.sampled_from([None, (tokens,), (batch, tokens)]))
    share = draw(st.sampled_from([0.1, 0.5, 1.0]))
    protected = None if shape is None else torch.rand(shape, generator=generator) < share
    r = draw(st.integers(0, removable(tokens, prefix) + 5))
    return Case(features, r, prefix, protected, draw(st.sampled_from(ORDERS)))


def reference(case: Case) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Sources, destinations and kept positions by plain loops over Python floats."""
    proposals, limits = [], []
    for sample, rows in enumerate(case.features.double().tolist()):
        never = case.never(sample)
        units = [[value / math.sqrt(sum(v * v for v in row)) for value in row] for row in rows]
        found = []
        for a in range(0, len(rows), 2):
            scores = [
                (sum(u * v for u, v in zip(units[a], units[b], strict=True)), b)
                for b in range(1, len(rows), 2)
                if not never[b]
            ]
            if scores and not never[a]:
                score, b = max(scores)
                found.append((score, a, b))
        proposals.append(sorted(found, reverse=True))
        limits.append(min(never.count(False) // 2, len(found)))
    r = min([case.r, *limits])
    sources = [[a for _, a, _ in found[:r]] for found in proposals]
    destinations = [[b for _, _, b in found[:r]] for found in proposals]
    kept = []
    for gone in sources:
        stay = [position for position in range(case.features.shape[1]) if position not in gone]
        if case.order == "grouped":
            stay.sort(key=lambda position: (position >= case.prefix) * (1 + position % 2))
        kept.append(stay)
    return sources, destinations, kept


@bounded
@given(cases(dtypes=(torch.float64,)))
def test_agrees_with_plain_loops(case: Case) -> None:
    plan = case.plan()
    sources, destinations, kept = reference(case)
    assert plan.source.tolist() == sources
    assert plan.destination.tolist() == destinations
    assert plan.kept.tolist() == kept


@bounded
@given(cases())
def test_plan_invariants(case: Case) -> None:
    plan = case.plan()
    batch, tokens, _ = case.features.shape
    assert plan.num_tokens == tokens and plan.removed <= case.r
    for tensor in (plan.source, plan.destination, plan.kept, plan.target):
        assert tensor.dtype == torch.int64 and len(tensor) == batch
    positions = torch.arange(tokens).expand(batch, -1)
    assert torch.equal(torch.cat([plan.kept, plan.source], dim=1).sort(dim=1).values, positions)
    assert torch.equal(plan.kept.gather(1, plan.target), plan.destination)
    for sample in range(batch):
        never = case.never(sample)
        assert not any(never[position] for position in plan.source[sample].tolist() + plan.destination[sample].tolist())
    assert bool((plan.source % 2 == 0).all()) and bool((plan.destination % 2 == 1).all())
    assert torch.equal(plan.kept[:, : case.prefix], positions[:, : case.prefix])
    if case.order == "sequence":
        assert bool((plan.kept.diff(dim=1) > 0).all())
    else:
        rest = plan.kept[:, case.prefix :]
        assert torch.equal(rest, torch.stack([row[(row + (row % 2) * tokens).argsort()] for row in rest]))


@bounded
@given(cases())
def test_source_map_follows_every_token(case: Case) -> None:
    plan = case.plan()
    holder = plan.kept.gather(1, plan.source_map())
    positions = torch.arange(case.features.shape[1]).repeat(len(case.features), 1)
    expected = positions.scatter(1, plan.source, plan.destination)
    assert torch.equal(holder, expected)


@bounded
@given(cases())
def test_a_sample_does_not_depend_on_its_batch(case: Case) -> None:
    together = case.plan()
    for sample in range(len(case.features)):
        one = slice(sample, sample + 1)
        mask = case.protected if case.protected is None or case.protected.ndim == 1 else case.protected[one]
        alone = match_tokens(
            case.features[one],
            together.removed,
            num_prefix_tokens=case.prefix,
            protected=mask,
            order=case.order,
        )
        for name in ("source", "destination", "kept", "target"):
            assert torch.equal(getattr(alone, name)[0], getattr(together, name)[sample]), name


@bounded
@given(st.integers(0, 40), st.integers(0, 5), st.integers(0, 25))
def test_r_is_clipped(tokens: int, prefix: int, r: int) -> None:
    features = torch.randn(1, tokens, 4, generator=torch.Generator().manual_seed(0))
    expected = min(r, max(tokens - prefix, 0) // 2)
    assert match_tokens(features, r, num_prefix_tokens=prefix).removed == expected


def test_r_is_clipped_to_the_free_tokens_of_the_poorest_sample() -> None:
    protected = torch.zeros(2, 12, dtype=torch.bool)
    protected[1, 4:8] = True
    features = torch.randn(2, 12, 4)
    assert match_tokens(features, 99, num_prefix_tokens=2, protected=protected).removed == (12 - 2 - 4) // 2
    assert match_tokens(features[:1], 99, num_prefix_tokens=2, protected=protected[:1]).removed == (12 - 2) // 2
    protected[1, 3::2] = True  # no free odd token is left to merge into
    assert match_tokens(features, 99, num_prefix_tokens=2, protected=protected).removed == 0


def test_similarity_is_the_cosine() -> None:
    features = torch.tensor([[[1.0, 0.0], [0.9, 0.1], [0.0, 1.0], [0.0, 9.0]]])  # the dot product prefers another pair
    plan = match_tokens(features, 1, num_prefix_tokens=0)
    assert (plan.source.tolist(), plan.destination.tolist()) == ([[2]], [[3]])


def test_equal_tokens_match_the_same_in_every_batch() -> None:
    features = torch.ones(3, 33, 4)
    plan = match_tokens(features, 9)
    alone = match_tokens(features[:1], 9)
    for name in ("source", "destination", "kept", "target"):
        assert torch.equal(getattr(plan, name), getattr(alone, name).expand(3, -1)), name


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("tokens", [0, 1, 2, 4])
def test_nothing_but_prefix_tokens(tokens: int, order: str) -> None:
    plan = match_tokens(torch.randn(2, tokens, 4), 3, num_prefix_tokens=5, order=order)
    assert plan.removed == 0 and plan.kept.tolist() == [list(range(tokens))] * 2


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("protected", [None, torch.zeros(9, dtype=torch.bool), torch.zeros(0, 9, dtype=torch.bool)])
def test_empty_batch(order: str, protected: Tensor | None) -> None:
    plan = match_tokens(torch.randn(0, 9, 4), 2, protected=protected, order=order)
    assert plan.kept.shape == (0, 9 - plan.removed) and plan.source.shape == plan.target.shape == (0, plan.removed)


def test_no_gradients_and_input_untouched() -> None:
    features = torch.randn(1, 9, 4, requires_grad=True)
    before = features.detach().clone()
    protected = torch.zeros(1, 9, dtype=torch.bool)
    plan = match_tokens(features, 2, protected=protected)
    assert not any(tensor.requires_grad for tensor in pytree.tree_leaves(plan))
    assert torch.equal(features.detach(), before) and not protected.any()


def test_plan_is_a_pytree() -> None:
    plan = match_tokens(torch.randn(2, 9, 4), 3)
    leaves, spec = pytree.tree_flatten(plan)
    assert [id(leaf) for leaf in leaves] == [id(t) for t in (plan.source, plan.destination, plan.kept, plan.target)]
    again = pytree.tree_unflatten(leaves, spec)
    assert isinstance(again, MergePlan) and again.kept is plan.kept and again.target is plan.target
    moved = pytree.tree_map(lambda tensor: tensor + 1, plan)
    assert isinstance(moved, MergePlan) and torch.equal(moved.source, plan.source + 1)


@pytest.mark.parametrize(
    ("features", "arguments", "message"),
    [
        (torch.zeros(9, 4), {"r": 1}, r"features must be \[B, N, D\], got \[9, 4\]"),
        (torch.zeros(1, 9, 4), {"r": -2}, "r must not be negative, got -2"),
        (torch.zeros(1, 9, 4), {"r": 1, "num_prefix_tokens": -1}, "num_prefix_tokens must not be negative, got -1"),
        (torch.zeros(1, 9, 4), {"r": 1, "order": "random"}, "order must be one of grouped, sequence, got 'random'"),
        (
            torch.zeros(1, 9, 4),
            {"r": 1, "protected": torch.zeros(8, dtype=torch.bool)},
            r"protected must be bool \[N\] or \[B, N\] = \[1, 9\], got torch.bool \[8\]",
        ),
        (torch.zeros(1, 9, 4), {"r": 1, "protected": torch.zeros(9)}, r"protected must be bool .*got torch.float32"),
        (torch.zeros(9), {"r": -1, "order": "x"}, r"features must be .*; r must not .*; order must be"),
    ],
)
def test_errors(features: Tensor, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"match_tokens: {message}"):
        match_tokens(features, **arguments)


def test_autocast_does_not_round_similarities() -> None:
    """In bfloat16 nearly equal pairs tie, and the plan would depend on it."""
    features = torch.randn(4, 65, 16, generator=torch.Generator().manual_seed(0)) * 0.05 + 1
    expected = match_tokens(features, 20)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = match_tokens(features, 20)
    assert torch.equal(found.source, expected.source) and torch.equal(found.destination, expected.destination)
