"""The ways of matching: one contract for all, references written as plain loops, dropping, and values that are none."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from pyra import MergePlan, match_tokens, merge_tokens
from pyra.matching import METHODS, ORDERS, removable

bounded = settings(deadline=None, max_examples=60)
INDICES = ("source", "destination", "kept", "target")
PREFIXES = (0, 1, 2, 5)
WIDTH = 4


def match(features: Tensor, r: int, method: str, **arguments: object) -> MergePlan:
    """``match_tokens`` with what the method needs."""
    needed = {"grid_width": WIDTH} if method == "local" else {}
    return match_tokens(features, r, method=method, **{**needed, **arguments})


def assert_valid(plan: MergePlan, batch: int, tokens: int, prefix: int) -> None:
    """Check what every plan must hold, however it was found."""
    positions = torch.arange(tokens).expand(batch, -1)
    for name in INDICES:
        assert getattr(plan, name).dtype == torch.int64 and len(getattr(plan, name)) == batch, name
    assert torch.equal(torch.cat([plan.kept, plan.source], dim=1).sort(dim=1).values, positions)
    assert torch.equal(plan.kept.gather(1, plan.target), plan.destination)
    assert torch.equal(plan.kept[:, :prefix], positions[:, :prefix])
    assert bool((plan.source >= prefix).all()) and bool((plan.destination >= prefix).all())
    holder = plan.kept.gather(1, plan.source_map())
    assert torch.equal(holder, positions.scatter(1, plan.source, plan.destination))
    if plan.weight is not None:
        assert plan.weight.dtype == torch.float32 and plan.weight.shape == plan.source.shape


def assert_same(one: MergePlan, other: MergePlan) -> None:
    for name in INDICES:
        assert torch.equal(getattr(one, name), getattr(other, name)), name
    assert (one.weight is None) == (other.weight is None)
    assert one.weight is None or torch.equal(one.weight, other.weight)


def sample_of(plan: MergePlan, sample: int) -> MergePlan:
    return pytree.tree_map(lambda tensor: tensor[sample : sample + 1], plan)


def cosine(a: list[float], b: list[float]) -> float:
    return sum(u * v for u, v in zip(a, b, strict=True)) / math.sqrt(sum(u * u for u in a) * sum(v * v for v in b))


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("method", METHODS)
def test_plan_invariants(method: str, order: str, prefix: int) -> None:
    torch.manual_seed(prefix)
    for tokens in (*range(12), 19, 26):
        features = torch.randn(2, tokens, 6)
        most = removable(tokens, prefix)
        for r in {0, 1, most // 2, most, most + 3}:
            for threshold in (None, 0.1) if method != "prune" else (None,):
                plan = match(features, r, method, num_prefix_tokens=prefix, order=order, threshold=threshold)
                assert plan.removed == min(r, most) and plan.num_tokens == tokens
                assert_valid(plan, 2, tokens, min(prefix, tokens))
                assert (plan.weight is None) == (threshold is None and method != "prune")
                if order == "sequence" or method in ("energy", "local"):
                    assert bool((plan.kept.diff(dim=1) > 0).all())


def test_the_methods_differ() -> None:
    torch.manual_seed(0)
    features = torch.randn(1, 17, 6)
    found = {tuple(match(features, 4, method).source[0].tolist()) for method in METHODS}
    assert len(found) == len(METHODS) - 1  # prune takes the tokens of bipartite


@pytest.mark.parametrize("method", METHODS)
def test_empty_batch(method: str) -> None:
    plan = match(torch.randn(0, 9, 4), 2, method)
    assert plan.source.shape == plan.target.shape == (0, 2) and plan.kept.shape == (0, 7)


@pytest.mark.parametrize("method", METHODS)
def test_no_gradients_and_input_untouched(method: str) -> None:
    features = torch.randn(2, 17, 4, requires_grad=True)
    before = features.detach().clone()
    plan = match(features, 5, method)
    assert not any(tensor.requires_grad for tensor in pytree.tree_leaves(plan))
    assert torch.equal(features.detach(), before)


# --- energy


@st.composite
def energy_cases(draw: st.DrawFn) -> tuple[Tensor, int, int, float, Tensor | None]:
    batch, tokens = draw(st.integers(1, 3)), draw(st.integers(2, 24))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    features = torch.randn(batch, tokens, 4, generator=generator, dtype=torch.float64)
    prefix = draw(st.integers(0, min(5, tokens)))
    protected = torch.rand(batch, tokens, generator=generator) < 0.3 if draw(st.booleans()) else None
    r = draw(st.integers(0, removable(tokens, prefix) + 2))
    return features, r, prefix, draw(st.sampled_from([0.9, 0.45, 0.0, -0.5])), protected


@bounded
@given(energy_cases())
def test_energy_agrees_with_plain_loops(case: tuple[Tensor, int, int, float, Tensor | None]) -> None:
    features, r, prefix, margin, protected = case
    batch, tokens, _ = features.shape
    blocked = [[False] * tokens] * batch if protected is None else protected.tolist()
    free = [[i for i in range(prefix, tokens) if not blocked[sample][i]] for sample in range(batch)]
    r = min(r, *(len(members) // 2 for members in free))
    plan = match_tokens(
        features, case[1], num_prefix_tokens=prefix, protected=protected, method="energy", margin=margin
    )
    assert plan.removed == r
    assert_valid(plan, batch, tokens, prefix)
    for sample, rows in enumerate(features.tolist()):
        energy = {}
        for i in free[sample]:
            similarities = [cosine(rows[i], rows[j]) for j in range(prefix, tokens) if j != i]
            f = [x if x >= margin else math.exp(x - margin) - 1 for x in similarities]
            energy[i] = sum(f) / max(len(f), 1)
        ranked = sorted(energy, key=lambda i: -energy[i])[: 2 * r]
        sources, destinations = ranked[::2], ranked[1::2]
        pairs = [max((cosine(rows[a], rows[b]), a, b) for b in destinations) for a in sources]
        pairs.sort(reverse=True)
        assert plan.source[sample].tolist() == [a for _, a, _ in pairs]
        assert plan.destination[sample].tolist() == [b for _, _, b in pairs]


def test_energy_protects_what_stands_alone() -> None:
    features = 0.01 * torch.randn(9, 4, generator=torch.Generator().manual_seed(0))
    group, alone = [0, 1, 2, 3, 5, 7], [4, 6, 8]
    features[group, 0] += 1
    features[alone, [1, 2, 3]] += 1
    plan = match_tokens(features[None], 3, num_prefix_tokens=0, method="energy")
    assert {*plan.source[0].tolist(), *plan.destination[0].tolist()} <= {*group}
    blurred = match_tokens(features[None], 3, num_prefix_tokens=0)  # only two even positions are of the group
    assert {*blurred.source[0].tolist()} & {*alone}


def test_the_margin_decides_what_is_alike() -> None:
    # Four tokens at 45 degrees of their neighbours against a tight pair: the ring wins only while 0.7 counts as alike.
    ring = torch.tensor([[math.cos(k * math.pi / 8), math.sin(k * math.pi / 8), 0.0] for k in range(4)])
    pair = torch.tensor([[0.0, 0.0, 1.0], [0.0, 0.01, 1.0]])
    features = torch.cat([ring, pair])[None]
    busy = [
        {*plan.source[0].tolist(), *plan.destination[0].tolist()}
        for plan in (match_tokens(features, 1, num_prefix_tokens=0, method="energy", margin=m) for m in (0.5, 0.99))
    ]
    assert busy[0] <= {0, 1, 2, 3} and busy[1] == {4, 5}


# --- local


@st.composite
def local_cases(draw: st.DrawFn) -> tuple[Tensor, int, int, Tensor, int, int]:
    batch, width, rows = draw(st.integers(1, 3)), draw(st.integers(1, 6)), draw(st.integers(1, 6))
    prefix, patches = draw(st.sampled_from(PREFIXES)), width * rows
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    left = draw(st.integers(1, patches))  # of a grid from which earlier layers took tokens
    places = torch.stack([torch.randperm(patches, generator=generator)[:left] for _ in range(batch)])
    if draw(st.booleans()):
        places = places.sort(dim=1).values
    positions = torch.cat([torch.arange(prefix).expand(batch, -1), places + prefix], dim=1)
    features = torch.randn(batch, prefix + left, 4, generator=generator, dtype=torch.float64)
    return features, draw(st.integers(0, left // 2 + 2)), prefix, positions, width, draw(st.integers(1, 3))


def checkerboard(places: list[int], width: int) -> tuple[list[int], list[int]]:
    """Split the tokens on ``places``: the commoner colour proposes, thinned to half of all."""
    colours = [(place // width + place % width) % 2 for place in places]
    common = 1 if colours.count(1) > colours.count(0) else 0
    proposing = [i for i, colour in enumerate(colours) if colour == common]
    half, error, sources = (len(places) + 1) // 2, 0, []
    for i in proposing:
        error += half
        if error >= len(proposing):
            error -= len(proposing)
            sources.append(i)
    assert len(sources) == half
    return sources, [i for i in range(len(places)) if i not in sources]


@bounded
@given(local_cases())
def test_local_agrees_with_plain_loops(case: tuple[Tensor, int, int, Tensor, int, int]) -> None:
    features, r, prefix, positions, width, window = case
    plan = match_tokens(
        features,
        r,
        num_prefix_tokens=prefix,
        method="local",
        positions=positions,
        grid_width=width,
        window=window,
    )
    batch, tokens, _ = features.shape
    assert plan.removed == min(r, (tokens - prefix) // 2)
    assert_valid(plan, batch, tokens, prefix)
    for sample, rows in enumerate(features.tolist()):
        places = [position - prefix for position in positions[sample, prefix:].tolist()]
        sources, destinations = checkerboard(places, width)

        def score(a: int, b: int, rows: list[list[float]] = rows, places: list[int] = places) -> float:
            down = abs(places[a] // width - places[b] // width)
            across = abs(places[a] % width - places[b] % width)
            return cosine(rows[prefix + a], rows[prefix + b]) - 2 * max(max(down, across) - window, 0)

        pairs = [max((score(a, b), a, b) for b in destinations) for a in sources if destinations]
        pairs = sorted(pairs, reverse=True)[: plan.removed]
        assert plan.source[sample].tolist() == [prefix + a for _, a, _ in pairs]
        assert plan.destination[sample].tolist() == [prefix + b for _, _, b in pairs]


@pytest.mark.parametrize("width", [3, 4])
@pytest.mark.parametrize("step", ["across", "down"])
def test_local_finds_all_neighbours_that_share_an_edge(step: str, width: int) -> None:
    """Tokens come in equal twos, side by side or one above the other: each finds its twin, on any width."""
    grid = torch.arange(4 * width).view(4, width)
    twins = (grid[:2].repeat_interleave(2, 0) if step == "down" else grid[:, :2].repeat_interleave(2, 1)).clone()
    if step == "across" and width == 3:
        twins = torch.cat([twins[:, :2], 100 + grid[:, 2:]], dim=1)  # the third column stands alone
    vectors = torch.randn(200, 16, generator=torch.Generator().manual_seed(1))
    labels = twins.reshape(-1)
    number = sum(int((labels == label).sum()) == 2 for label in labels.unique())
    plan = match_tokens(vectors[labels][None], number, num_prefix_tokens=0, method="local", grid_width=width)
    assert torch.equal(labels[plan.source], labels[plan.destination])


def test_local_takes_neighbours_before_anything_alike() -> None:
    """A far twin loses to neighbours that point the other way, and is taken once no neighbour is left."""
    features = torch.tensor([[[1.0, 0.0], [-1.0, 0.1], [-1.0, 0.2], [1.0, 0.0]]])
    plan = match_tokens(features, 2, num_prefix_tokens=0, method="local", grid_width=4)
    distance = (plan.source - plan.destination).abs()
    assert distance.tolist() == [[1, 1]]
    far = match_tokens(
        features, 2, num_prefix_tokens=0, method="local", grid_width=9, positions=torch.tensor([0, 3, 6, 8])
    )
    assert far.removed == 2  # a static shape, though no token has a neighbour
    wide = match_tokens(features, 2, num_prefix_tokens=0, method="local", grid_width=4, window=3)
    assert (wide.source[0, 0].item(), wide.destination[0, 0].item()) == (0, 3)


def test_local_window_counts_diagonals_as_one() -> None:
    # Patches 0 and 5 of a 3 x 3 grid are 2 columns and 1 row apart, of different colour.
    features = torch.eye(9)[None].clone()
    features[0, 5] = features[0, 0]
    for window, found in ((1, False), (2, True)):
        plan = match_tokens(features, 1, num_prefix_tokens=0, method="local", grid_width=3, window=window)
        assert ([plan.source.item(), plan.destination.item()] == [0, 5]) == found


@pytest.mark.parametrize("share", [0.3, 1.0])
def test_local_goes_on_until_one_token_is_left(share: float) -> None:
    torch.manual_seed(0)
    x, size = torch.randn(2, 1 + 36, 6), None
    positions = torch.arange(37).expand(2, -1)
    while (most := removable(x.shape[1], 1)) > 0:
        r = max(int(share * most), 1)
        plan = match_tokens(x, r, method="local", positions=positions, grid_width=6)
        assert plan.removed == r
        assert_valid(plan, 2, x.shape[1], 1)
        x, size = merge_tokens(x, size, plan)
        positions = positions.gather(1, plan.kept)
    assert x.shape[1] == 2 and size is not None and size[:, :, 0].sum(1).tolist() == [37, 37]


def test_local_reads_positions_of_any_integer_type_and_shape() -> None:
    features = torch.randn(3, 17, 4)
    plan = match(features, 5, "local")
    for positions in (torch.arange(17), torch.arange(17).int(), torch.arange(17).short().expand(3, -1)):
        assert_same(plan, match(features, 5, "local", positions=positions))
    assert not torch.equal(plan.source, match(features, 5, "local", positions=torch.arange(17).flip(0)).source)


# --- dropping


@pytest.mark.parametrize("order", ORDERS)
def test_prune_takes_the_tokens_of_bipartite(order: str) -> None:
    features = torch.randn(2, 17, 4)
    protected = torch.arange(17) % 5 == 2
    plain = match_tokens(features, 5, order=order, protected=protected)
    pruned = match_tokens(features, 5, order=order, protected=protected, method="prune")
    for name in INDICES:
        assert torch.equal(getattr(plain, name), getattr(pruned, name))
    assert plain.weight is None and pruned.weight is not None and pruned.weight.tolist() == [[0.0] * 5] * 2


@pytest.mark.parametrize("method", [method for method in METHODS if method != "prune"])
def test_threshold_drops_the_pairs_under_it(method: str) -> None:
    torch.manual_seed(1)
    features = torch.randn(2, 1 + 16, 4, dtype=torch.float64)
    features[:, 11] = features[:, 10]
    plain = match(features, 8, method)
    seen = set()
    for threshold in (-1, -0.3, 0.2, 0.6, 0.9):
        plan = match(features, 8, method, threshold=threshold)
        assert plan.weight is not None
        for name in INDICES:
            assert torch.equal(getattr(plain, name), getattr(plan, name)), name
        for sample, rows in enumerate(features.tolist()):
            pairs = zip(plan.source[sample].tolist(), plan.destination[sample].tolist(), strict=True)
            expected = [float(cosine(rows[a], rows[b]) >= threshold) for a, b in pairs]
            assert plan.weight[sample].tolist() == expected
            seen.add(tuple(expected))
    assert len(seen) > 2


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_with_weights_is_copied_pickled_and_mapped(method: str) -> None:
    features = torch.randn(2, 9, 4)
    for threshold in (None, 0.2) if method != "prune" else (None,):
        plan = match(features, 3, method, threshold=threshold)
        for again in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
            assert isinstance(again, MergePlan)
            assert_same(plan, again)
        leaves, spec = pytree.tree_flatten(plan)
        assert len(leaves) == 4 + (plan.weight is not None)
        assert_same(plan, pytree.tree_unflatten(leaves, spec))
        moved = pytree.tree_map(lambda tensor: tensor + 1, plan)
        assert (moved.weight is None) == (plan.weight is None)
        assert plan.weight is None or torch.equal(moved.weight, plan.weight + 1)


# --- features that are not finite


def poisoned(features: Tensor) -> list[Tensor]:
    """Copies of ``features`` with values in sample 1 that are no numbers."""
    tokens = features.shape[1]
    cases = []
    for value in (math.nan, math.inf, -math.inf):
        for where in (slice(None), 0, tokens // 2, tokens // 2 + 1, tokens - 1, slice(0, None, 2), slice(1, None, 2)):
            cases.append(features.clone())
            cases[-1][1, where] = value
        cases.append(features.clone())
        cases[-1][1, tokens // 2, 0] = value
        cases.append(features.clone())
        cases[-1][1, :, 1] = value
    return cases


@pytest.mark.parametrize("tokens", [11, 12, 17])
@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("method", METHODS)
def test_values_that_are_no_numbers_still_give_valid_plans(method: str, prefix: int, tokens: int) -> None:
    torch.manual_seed(0)
    clean = torch.randn(3, tokens, 5)
    most = removable(tokens, prefix)
    for r in (1, most):
        for order in ORDERS:
            good = match(clean, r, method, num_prefix_tokens=prefix, order=order)
            for features in poisoned(clean):
                plan = match(features, r, method, num_prefix_tokens=prefix, order=order)
                assert plan.removed == r
                assert_valid(plan, 3, tokens, prefix)
                for sample in (0, 2):
                    assert_same(sample_of(plan, sample), sample_of(good, sample))


@pytest.mark.parametrize("method", [method for method in METHODS if method != "local"])
def test_protected_tokens_stay_with_values_that_are_no_numbers(method: str) -> None:
    torch.manual_seed(0)
    clean = torch.randn(3, 12, 5)
    protected = torch.tensor([0, 0, 0, 1, 1, 0, 0, 1, 0, 0, 0, 1]).bool()
    for features in poisoned(clean):
        plan = match(features, 9, method, protected=protected)
        assert plan.removed > 0
        assert_valid(plan, 3, 12, 1)
        assert not protected[plan.source].any() and not protected[plan.destination].any()


@pytest.mark.parametrize("method", [method for method in METHODS if method != "prune"])
def test_a_similarity_that_is_no_number_is_under_every_threshold(method: str) -> None:
    features = torch.full((1, 9, 4), math.nan)
    plan = match(features, 3, method, threshold=-1)
    assert plan.weight is not None and plan.weight.tolist() == [[0.0] * 3]


# --- graphs


class TwoSteps(nn.Module):
    """Match and merge twice, as two layers do."""

    def __init__(self, method: str, **arguments: object) -> None:
        super().__init__()
        self.method, self.arguments = method, arguments

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        size = None
        positions = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        for r in (3, 4):
            plan = match(x, r, self.method, positions=positions, **self.arguments)
            x, size = merge_tokens(x, size, plan)
            positions = positions.gather(1, plan.kept)
        return x, size, positions


VARIANTS = [
    ("bipartite", {}),
    ("bipartite", {"order": "sequence", "threshold": 0.1}),
    ("energy", {"threshold": 0.1}),
    ("local", {"threshold": 0.1}),
    ("prune", {}),
]


@pytest.mark.parametrize(("method", "arguments"), VARIANTS)
def test_compiles_without_a_graph_break(method: str, arguments: dict[str, object]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 17, 6, requires_grad=True)
    module = TwoSteps(method, **arguments)
    torch.compiler.reset()
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(x), module(x), strict=True):
        torch.testing.assert_close(actual, expected)
    (own,) = torch.autograd.grad(compiled(x)[0].square().sum(), x)
    (expected,) = torch.autograd.grad(module(x)[0].square().sum(), x)
    torch.testing.assert_close(own, expected)


@pytest.mark.parametrize(("method", "arguments"), VARIANTS)
def test_exports_for_any_batch(method: str, arguments: dict[str, object]) -> None:
    torch.manual_seed(0)
    module = TwoSteps(method, **arguments)
    batch = torch.export.Dim("batch")
    program = torch.export.export(module, (torch.randn(2, 17, 6),), dynamic_shapes=({0: batch},))
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    names = {str(node.target) for graph in graphs for node in graph.nodes}
    assert "aten.sort.default" in names
    assert not names & {"aten.searchsorted.Tensor", "aten.sort.stable"}  # ONNX has neither
    x = torch.randn(5, 17, 6)
    for actual, expected in zip(program.module()(x), module(x), strict=True):
        torch.testing.assert_close(actual, expected)


def test_a_plan_with_weights_crosses_an_exported_graph() -> None:
    class Match(nn.Module):
        def forward(self, x: Tensor) -> MergePlan:
            return match_tokens(x, 3, threshold=0.1)

    x = torch.randn(2, 9, 4)
    plan = torch.export.export(Match(), (x,)).module()(x)
    assert isinstance(plan, MergePlan)
    assert_same(plan, match_tokens(x, 3, threshold=0.1))


# --- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "tome"}, "method must be one of bipartite, energy, local, prune, got 'tome'"),
        ({"threshold": 1.5}, r"threshold must be in \[-1, 1\], got 1\.5"),
        ({"threshold": math.nan}, "threshold must be .* got nan"),
        ({"method": "prune", "threshold": 0.5}, "method 'prune' drops every source: give no threshold"),
        ({"method": "energy", "margin": math.nan}, "margin must be a finite number, got nan"),
        ({"method": "local"}, r"method 'local' needs grid_width, .* got None"),
        ({"method": "local", "grid_width": 0}, r"method 'local' needs grid_width, .* got 0"),
        ({"method": "local", "grid_width": 4, "window": 0}, "window must be at least 1, got 0"),
        (
            {"method": "local", "grid_width": 4, "protected": torch.zeros(9, dtype=torch.bool)},
            "method 'local' does not support protected: use 'bipartite' or 'energy'",
        ),
        (
            {"method": "local", "grid_width": 4, "positions": torch.zeros(2, 8, dtype=torch.int64)},
            r"positions must be whole numbers \[N\] or \[B, N\] = \[2, 9\], got torch.int64 \[2, 8\]",
        ),
        ({"method": "local", "grid_width": 4, "positions": torch.zeros(9)}, "positions must be .* got torch.float32"),
        (
            {"r": -1, "method": "local", "threshold": 7, "window": 0},
            "r must not .*; threshold must .*; method 'local' needs grid_width.*; window must",
        ),
    ],
)
def test_errors(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=f"match_tokens: {message}"):
        match_tokens(torch.zeros(2, 9, 4), **{"r": 1, **arguments})
