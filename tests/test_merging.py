"""Merging: what is conserved, what is untouched, gradients, and the way back."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from pyra import MergePlan, Reactivation, match_tokens, merge_tokens, unmerge_tokens
from pyra.matching import ORDERS, removable
from pyra.merging import spread

bounded = settings(deadline=None, max_examples=60)
CHANNELS = 6


@dataclass
class Case:
    """Tokens, their sizes (None: ones) and a plan for them."""

    x: Tensor
    size: Tensor | None
    plan: MergePlan
    prefix: int
    protected: Tensor | None

    def sizes(self) -> Tensor:
        return torch.ones(*self.x.shape[:2], 1).double() if self.size is None else self.size.double()


@st.composite
def cases(draw: st.DrawFn) -> Case:
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(2, 40))
    prefix = draw(st.integers(0, min(5, tokens)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16]))
    x = torch.randn(batch, tokens, CHANNELS, generator=generator).to(dtype)
    if draw(st.booleans()):  # the same values, not contiguous
        x = x.transpose(1, 2).contiguous().transpose(1, 2)
    size = torch.randint(1, 200, (batch, tokens, 1), generator=generator).to(dtype) if draw(st.booleans()) else None
    shape = draw(st.sampled_from([None, (tokens,), (batch, tokens)]))
    protected = None if shape is None else torch.rand(shape, generator=generator) < 0.3
    plan = match_tokens(
        torch.randn(batch, tokens, 8, generator=generator),
        draw(st.integers(0, removable(tokens, prefix) + 5)),
        num_prefix_tokens=prefix,
        protected=protected,
        order=draw(st.sampled_from(ORDERS)),
    )
    return Case(x, size, plan, prefix, protected)


@pytest.fixture
def trained() -> Reactivation:
    """Re-activation weights that change what they touch."""
    return random_reactivation(4, 3).double()


def random_reactivation(pairs: int, dim: int = CHANNELS) -> Reactivation:
    torch.manual_seed(3)
    weights = Reactivation(pairs, dim)
    for parameter in weights.parameters():
        nn.init.normal_(parameter)
    return weights


@bounded
@given(cases())
def test_sizes_and_weighted_sums_are_conserved(case: Case) -> None:
    merged, size = merge_tokens(case.x, case.size, case.plan)
    assert merged.dtype == case.x.dtype and size.dtype == torch.float32
    assert merged.shape == (*case.plan.kept.shape, CHANNELS) and size.shape == (*case.plan.kept.shape, 1)
    assert torch.equal(size.double().sum(1), case.sizes().sum(1))  # whole numbers far below 2 ** 24
    before, after = (case.x.double() * case.sizes()).sum(1), (merged.double() * size.double()).sum(1)
    # A destination of k sources rounds its share, k + 1 products and k sums, each by at most eps of the terms' sum.
    most = max((int(row.bincount().max()) for row in case.plan.target), default=0) if case.plan.removed else 0
    bound = (2 * most + 3) * torch.finfo(case.x.dtype).eps * (case.x.double().abs() * case.sizes()).sum(1)
    assert bool(((before - after).abs() <= bound).all())


@bounded
@given(cases())
def test_a_destination_is_the_weighted_mean(case: Case) -> None:
    merged, size = merge_tokens(case.x, case.size, case.plan)
    x, sizes = case.x.double(), case.sizes()
    for sample, kept in enumerate(case.plan.kept.tolist()):
        for row, position in enumerate(kept):
            members = [position, *case.plan.source[sample][case.plan.destination[sample] == position].tolist()]
            total = sizes[sample, members].sum(0)
            assert size[sample, row].item() == total.item()
            mean = (x[sample, members] * sizes[sample, members]).sum(0) / total
            bound = 2 * len(members) * torch.finfo(case.x.dtype).eps * x[sample, members].abs().sum(0)
            assert bool(((merged[sample, row].double() - mean).abs() <= bound).all())


@bounded
@given(cases(), st.booleans())
def test_tokens_that_take_no_part_are_untouched(case: Case, reactivate: bool) -> None:
    weights = random_reactivation(3).to(case.x.dtype) if reactivate else None
    merged, size = merge_tokens(case.x, case.size, case.plan, weights)
    rows = case.plan.source_map()
    sizes = case.sizes()
    for sample in range(len(case.x)):
        busy = {*case.plan.source[sample].tolist(), *case.plan.destination[sample].tolist()}
        idle = [position for position in range(case.x.shape[1]) if position not in busy]
        mask = [] if case.protected is None else case.protected.expand(len(case.x), -1)[sample].nonzero()[:, 0].tolist()
        assert {*range(case.prefix), *mask} <= {*idle}
        assert torch.equal(merged[sample, rows[sample, idle]], case.x[sample, idle])
        assert torch.equal(size[sample, rows[sample, idle]].double(), sizes[sample, idle])
    assert torch.equal(merged[:, : case.prefix], case.x[:, : case.prefix])


@bounded
@given(cases(), st.booleans())
def test_a_sample_does_not_depend_on_its_batch(case: Case, reactivate: bool) -> None:
    weights = random_reactivation(3).to(case.x.dtype) if reactivate else None
    merged, size = merge_tokens(case.x, case.size, case.plan, weights)
    plan = case.plan
    for i in range(len(case.x)):
        one = slice(i, i + 1)
        alone = MergePlan(plan.source[one], plan.destination[one], plan.kept[one], plan.target[one])
        own, own_size = merge_tokens(case.x[one], None if case.size is None else case.size[one], alone, weights)
        if weights is None:
            assert torch.equal(own, merged[one])
        else:  # the matrix products of the channel weights may sum in another order for another batch
            torch.testing.assert_close(own, merged[one])
        assert torch.equal(own_size, size[one])


@bounded
@given(cases(), st.integers(1, 30))
def test_reactivation_starts_as_the_identity(case: Case, pairs: int) -> None:
    fresh = Reactivation(pairs, CHANNELS).to(case.x.dtype)
    merged, size = merge_tokens(case.x, case.size, case.plan, fresh)
    plain, plain_size = merge_tokens(case.x, case.size, case.plan)
    assert torch.equal(merged, plain) and torch.equal(size, plain_size)


@bounded
@given(cases(), st.integers(0, 2**31), st.booleans())
def test_weights_and_padding_by_hand(case: Case, seed: int, drop: bool) -> None:
    """A destination is the mean by what it receives; what stands for nothing leaves the mean as it is."""
    generator = torch.Generator().manual_seed(seed)
    shape = case.plan.source.shape
    weight = torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.6) if drop else None
    sizes = case.sizes() * (torch.rand(*case.x.shape[:2], 1, generator=generator) < 0.5)
    merged, size = merge_tokens(case.x, sizes.float(), replace(case.plan, weight=weight))
    assert bool(merged.isfinite().all())
    shares = torch.ones(shape) if weight is None else weight
    x, eps = case.x.double(), torch.finfo(case.x.dtype).eps
    for sample, kept in enumerate(case.plan.kept.tolist()):
        pairs = list(zip(case.plan.source[sample], case.plan.destination[sample], shares[sample], strict=True))
        for row, position in enumerate(kept):
            members = [(position, 1.0), *((int(a), float(w)) for a, b, w in pairs if b == position)]
            amounts = torch.tensor([float(sizes[sample, member]) * w for member, w in members]).double()
            values = x[sample, [member for member, _ in members]]
            torch.testing.assert_close(size[sample, row, 0].double(), amounts.sum(), rtol=1e-5, atol=0)
            real = [i for i, amount in enumerate(amounts.tolist()) if amount > 0]
            if not real:
                assert torch.equal(merged[sample, row], case.x[sample, position]) and size[sample, row] == 0
            elif len(real) == 1:
                assert torch.equal(merged[sample, row].double(), values[real[0]])
            mean = (values * amounts[:, None]).sum(0) / amounts.sum() if real else values[0]
            bound = 2 * len(members) * eps * values.abs().sum(0)
            assert bool(((merged[sample, row].double() - mean).abs() <= bound).all())


@bounded
@given(cases(), st.integers(0, 2**31), st.booleans(), st.sampled_from([1e3, math.nan, math.inf]))
def test_dropped_tokens_reach_nothing(case: Case, seed: int, reactivate: bool, value: float) -> None:
    dropped = torch.rand(case.plan.source.shape, generator=torch.Generator().manual_seed(seed)) < 0.5
    plan = replace(case.plan, weight=(~dropped).float())
    weights = random_reactivation(3).to(case.x.dtype) if reactivate else None
    merged, size = merge_tokens(case.x, case.size, plan, weights)
    gone = torch.zeros(case.x.shape[:2], dtype=torch.bool).scatter(1, plan.source, dropped)
    x = case.x.masked_fill(gone[:, :, None], value).requires_grad_()
    again, again_size = merge_tokens(x, case.size, plan, weights)
    assert torch.equal(merged, again) and torch.equal(size, again_size)
    assert torch.equal(size.double().sum(1), (case.sizes() * ~gone[:, :, None]).sum(1))
    again.float().square().sum().backward()
    assert x.grad is not None and bool(x.grad.isfinite().all()) and not x.grad[gone].any()
    receives = torch.zeros(merged.shape[:2], dtype=torch.int64).scatter_add(1, plan.target, (~dropped).long()) > 0
    same = ~receives
    assert torch.equal(merged[same], case.x.gather(1, index_of(plan.kept))[same])
    assert torch.equal(size[same].double(), case.sizes().gather(1, plan.kept[:, :, None])[same])


@bounded
@given(cases(), st.booleans())
def test_weights_of_one_change_nothing(case: Case, reactivate: bool) -> None:
    weights = random_reactivation(3).to(case.x.dtype) if reactivate else None
    plain = merge_tokens(case.x, case.size, case.plan, weights)
    weighted = merge_tokens(case.x, case.size, replace(case.plan, weight=torch.ones(case.plan.source.shape)), weights)
    assert torch.equal(plain[0], weighted[0]) and torch.equal(plain[1], weighted[1])


def index_of(positions: Tensor) -> Tensor:
    """Return [B, M, C] for ``gather`` of whole tokens."""
    return positions.unsqueeze(2).expand(-1, -1, CHANNELS)


def test_pruning_leaves_the_rest_as_it_was() -> None:
    x = torch.randn(2, 17, CHANNELS)
    plan = match_tokens(x, 6, method="prune")
    merged, size = merge_tokens(x, None, plan)
    assert torch.equal(merged, x.gather(1, index_of(plan.kept))) and torch.equal(size, torch.ones(2, 11, 1))
    averaged = match_tokens(x, 6)
    assert not torch.equal(merge_tokens(x, None, averaged)[0], merged)
    assert torch.equal(unmerge_tokens(merged, plan)[0, plan.source[0]], merged[0, plan.target[0]])


@pytest.mark.parametrize("reactivate", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding(dtype: torch.dtype, reactivate: bool) -> None:
    """In order: a real token into padding, padding into a real token, padding into padding, real into real."""
    torch.manual_seed(0)
    x = torch.randn(1, 8, CHANNELS).to(dtype).requires_grad_()
    size = torch.tensor([2.0, 0, 0, 3, 0, 0, 1, 1]).view(1, 8, 1).requires_grad_()
    rows = torch.arange(4)[None]
    plan = MergePlan(2 * rows, 2 * rows + 1, 2 * rows + 1, rows)
    weights = random_reactivation(4).to(dtype) if reactivate else None
    merged, merged_size = merge_tokens(x, size, plan, weights)
    assert merged_size.flatten().tolist() == [2, 3, 0, 2]
    assert torch.equal(merged[0, 1], x[0, 3]) and torch.equal(merged[0, 2], x[0, 5])
    if not reactivate:
        assert torch.equal(merged[0, 0], x[0, 0])
    gradients = torch.autograd.grad(merged.float().square().sum() + merged_size.square().sum(), (x, size))
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)
    assert not gradients[0][0, [2, 4]].any() and bool(gradients[0][0, [0, 3, 5, 6, 7]].all())


@bounded
@given(cases())
def test_unmerge_returns_every_token_to_its_place(case: Case) -> None:
    merged, _ = merge_tokens(case.x, case.size, case.plan)
    back = unmerge_tokens(merged, case.plan)
    assert back.shape == case.x.shape
    assert torch.equal(back.gather(1, index_of(case.plan.kept)), merged)
    for sample in range(len(back)):
        assert torch.equal(back[sample, case.plan.source[sample]], back[sample, case.plan.destination[sample]])


def test_trained_reactivation_changes_destinations_only(trained: Reactivation) -> None:
    x = torch.randn(2, 9, 3, dtype=torch.float64)
    plan = match_tokens(x, 3)
    plain, size = merge_tokens(x, None, plan)
    merged, reactivated_size = merge_tokens(x, None, plan, trained)
    changed = (merged != plain).any(2)
    hit = torch.zeros_like(changed).scatter(1, plan.target, True)
    assert torch.equal(changed, hit) and torch.equal(size, reactivated_size)


def test_any_module_with_the_attributes_is_accepted(trained: Reactivation) -> None:
    x = torch.randn(2, 9, 3, dtype=torch.float64)
    plan = match_tokens(x, 3)
    lookalike = SimpleNamespace(
        pair_weight=trained.pair_weight, channel_weight=trained.channel_weight, norm=trained.norm
    )
    assert torch.equal(merge_tokens(x, None, plan, lookalike)[0], merge_tokens(x, None, plan, trained)[0])


@pytest.mark.parametrize("order", ORDERS)
def test_two_steps_spread_to_the_tokens_that_hold_each_position(order: str) -> None:
    x = torch.randn(2, 17, 4)
    first = match_tokens(x, 5, order=order)
    once, size = merge_tokens(x, None, first)
    second = match_tokens(once, 4, order=order)
    twice, size = merge_tokens(once, size, second)
    step = second.source_map()
    source_map = step.gather(1, first.source_map())
    assert torch.equal(spread(twice, source_map), unmerge_tokens(unmerge_tokens(twice, second), first))
    counts = torch.stack([row.bincount(minlength=8) for row in source_map])
    assert torch.equal(counts[..., None].float(), size)


@pytest.mark.parametrize("sized", [False, True])
def test_gradients(sized: bool) -> None:
    x = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    size = torch.randint(1, 5, (2, 7, 1)).double().requires_grad_() if sized else None
    plan = match_tokens(torch.randn(2, 7, 4), 3)
    assert plan.removed == 3
    assert torch.autograd.gradcheck(lambda x, size: merge_tokens(x, size, plan), (x, size))


def test_gradients_with_weights_and_padding() -> None:
    x = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    size = torch.tensor([1.0, 0, 2, 0, 0, 3, 0]).double().view(1, 7, 1).expand(2, -1, -1)
    plan = match_tokens(torch.randn(2, 7, 4), 3)
    plan = replace(plan, weight=torch.tensor([[0.0, 1, 0.25], [1, 0.5, 0]]))
    assert torch.autograd.gradcheck(lambda x: merge_tokens(x, size, plan), (x,))


@pytest.mark.parametrize("rows", [2, 3, 5])
def test_gradients_of_reactivation(rows: int) -> None:
    torch.manual_seed(1)
    x = torch.randn(2, 7, 3, dtype=torch.float64, requires_grad=True)
    size = torch.randint(1, 5, (2, 7, 1)).double()
    plan = match_tokens(torch.randn(2, 7, 4), 3)
    weights = random_reactivation(rows, 3).double()
    parameters = tuple(weights.parameters())

    def merge(x: Tensor, *values: Tensor) -> Tensor:
        names = dict(zip((name for name, _ in weights.named_parameters()), values, strict=True))
        norm = lambda pairs: nn.functional.layer_norm(pairs, (3,), names["norm.weight"], names["norm.bias"])  # noqa: E731
        holder = SimpleNamespace(pair_weight=names["pair_weight"], channel_weight=names["channel_weight"], norm=norm)
        return merge_tokens(x, size, plan, holder)[0]

    assert torch.autograd.gradcheck(merge, (x, *parameters))


@pytest.mark.parametrize("order", ORDERS)
def test_r_zero_returns_the_tokens(order: str) -> None:
    x = torch.randn(2, 8, 3)
    plan = match_tokens(x, 0, num_prefix_tokens=0, order=order)
    merged, size = merge_tokens(x, None, plan, random_reactivation(2, 3))
    assert torch.equal(unmerge_tokens(merged, plan), x) and torch.equal(size, torch.ones(2, 8, 1))
    if order == "sequence":
        assert torch.equal(merged, x)


@pytest.mark.parametrize("reactivate", [False, True])
def test_empty_batch(reactivate: bool) -> None:
    x = torch.randn(0, 9, 3, requires_grad=True)
    plan = match_tokens(x, 3)
    merged, size = merge_tokens(x, None, plan, random_reactivation(2, 3) if reactivate else None)
    assert merged.shape == (0, 6, 3) and size.shape == (0, 6, 1)
    assert unmerge_tokens(merged, plan).shape == (0, 9, 3)
    merged.sum().backward()
    assert x.grad is not None and x.grad.shape == x.shape


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sizes_stay_exact_in_half_precision(dtype: torch.dtype) -> None:
    x = torch.ones(1, 4, 2, dtype=dtype)
    plan = match_tokens(torch.tensor([[[1.0, 0], [1, 0], [0, 1], [-1, 0]]]), 1, num_prefix_tokens=0, order="sequence")
    assert (plan.source.item(), plan.destination.item()) == (0, 1)
    merged, size = merge_tokens(x, torch.tensor([300.0, 1, 1, 1]).to(dtype).view(1, 4, 1), plan)
    assert size[0, :, 0].tolist() == [301, 1, 1]  # bfloat16 has 300 and 302
    for _ in range(3):
        _, size = merge_tokens(merged, size, MergePlan(*(torch.tensor([v]) for v in ([0], [1], [1, 2], [0]))))
        merged, size = torch.ones(1, 3, 2, dtype=dtype), torch.cat([size, torch.ones(1, 1, 1)], dim=1)
    assert size[0, :, 0].tolist() == [304, 1, 1]


@pytest.mark.parametrize(
    ("x", "size", "message"),
    [
        ((9, 3), None, r"x must be \[B, N, C\] with \[B, N\] = \[2, 9\] as in the plan, got \[9, 3\]"),
        ((2, 8, 3), None, r"x must be .* got \[2, 8, 3\]"),
        ((1, 9, 3), None, r"x must be .* got \[1, 9, 3\]"),
        ((2, 9, 3), (2, 9), r"size must be \[B, N, 1\] = \[2, 9, 1\], got \[2, 9\]"),
        ((2, 8, 3), (2, 8, 1), r"x must be .* got \[2, 8, 3\]; size must be .* got \[2, 8, 1\]"),
    ],
)
def test_merge_errors(x: tuple[int, ...], size: tuple[int, ...] | None, message: str) -> None:
    plan = match_tokens(torch.randn(2, 9, 4), 2)
    with pytest.raises(ValueError, match=f"merge_tokens: {message}"):
        merge_tokens(torch.zeros(x), None if size is None else torch.ones(size), plan)


def test_weights_must_fit() -> None:
    plan = replace(match_tokens(torch.randn(2, 9, 4), 2), weight=torch.ones(2, 3))
    with pytest.raises(ValueError, match=r"plan\.weight must be \[B, r\] = \[2, 2\], got \[2, 3\]"):
        merge_tokens(torch.zeros(2, 9, 3), None, plan)


@pytest.mark.parametrize("shape", [(7, 3), (2, 9, 3), (1, 7, 3)])
def test_unmerge_errors(shape: tuple[int, ...]) -> None:
    plan = match_tokens(torch.randn(2, 9, 4), 2)
    with pytest.raises(ValueError, match=r"unmerge_tokens: merged must be .* = \[2, 7\], got \[" + str(shape[0])):
        unmerge_tokens(torch.zeros(shape), plan)
