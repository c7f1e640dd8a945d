"""Triton's kernels against the references: on any machine in Triton's interpreter (``make test-kernels``), or on a GPU.

Outputs are compared with the reference in float64; the error allowed is that of the reference in the same precision.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from support_for_kernels import SIZES, TRAINED, plan_for, sizes, tokens_for, weights_for
from torch import Tensor

from pyra import PyraConfig, Reactivation, match_tokens, merge_tokens
from pyra.errors import KernelError
from pyra.kernels import attend, backend, bias, checks, follow, match, merge
from pyra.kernels.choice import interpreted, runs_triton
from pyra.kernels.match import Rules
from pyra.step import merge_step

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
pytestmark = pytest.mark.skipif(
    DEVICE == "cpu" and not interpreted(), reason="needs a GPU, or TRITON_INTERPRET=1 (make test-kernels)"
)
# tokens, prefix, heads, channels of a head
KEYS = [
    (197, 1, 12, 64),
    (257, 1, 6, 64),
    (198, 2, 3, 64),
    (196, 0, 2, 72),
    (301, 5, 1, 80),
    (17, 1, 2, 8),
    (5, 1, 1, 4),
    (33, 1, 1, 300),
    (67, 2, 2, 130),
]
KEYS += [(6, 5, 1, 8), (3, 1, 1, 8), (2, 2, 1, 8), (1, 1, 1, 8)]
STRIDES = {
    "contiguous": lambda x: x,
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2),
    "every-second": lambda x: x.repeat_interleave(2, dim=-1)[..., ::2],
    "expanded": lambda x: x[:1].expand_as(x),
}


@pytest.fixture(autouse=True)
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Fill every new tensor with what no result may contain, so that nothing is left unwritten."""

    def fill(self: Tensor, *shape: object, **options: object) -> Tensor:
        made = plain(self, *shape, **options)
        return made.fill_(torch.nan if made.is_floating_point() else torch.iinfo(made.dtype).min)

    plain = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", fill)
    with backend("triton"):
        yield


def rules(order: str = "grouped", method: str = "bipartite") -> Rules:
    return Rules(order, method, 0.5, None, 1)


def assert_same_plan(keys: Tensor, heads: int, removed: int, prefix: int, order: str) -> None:
    found = match.match(keys, heads, removed, prefix, rules(order))
    expected = match.reference(keys, heads, removed, prefix, rules(order), None)
    for name, actual, value in zip(match.Matched._fields, found, expected, strict=True):
        if name == "similarity":
            torch.testing.assert_close(actual, value, rtol=0, atol=1e-5)
        else:
            assert torch.equal(actual, value), name
    again = match.match(keys, heads, removed, prefix, rules(order))
    assert all(torch.equal(*pair) for pair in zip(found, again, strict=True))


@pytest.mark.parametrize(("tokens", "prefix", "heads", "dim"), KEYS)
@pytest.mark.parametrize("order", ["grouped", "sequence"])
def test_matches_as_the_reference(tokens: int, prefix: int, heads: int, dim: int, order: str) -> None:
    keys = torch.randn(2, heads, tokens, dim, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    most = max((tokens - prefix) // 2, 0)
    for removed in sorted({0, min(1, most), most // 2, most}):
        assert_same_plan(keys, 1, removed, prefix, order)


@pytest.mark.parametrize("strides", STRIDES)
@pytest.mark.parametrize("heads", [1, 2])
def test_matches_keys_of_any_strides(strides: str, heads: int) -> None:
    keys = torch.randn(3, 4, 33, 16, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    keys = keys.transpose(1, 2) if heads == 2 else keys
    assert_same_plan(STRIDES[strides](keys), heads, 9, 1, "grouped")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matches_half_precision_as_the_same_numbers_in_full(dtype: torch.dtype) -> None:
    keys = torch.randn(2, 1, 65, 32, generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)
    found = match.match(keys, 1, 20, 1, rules())
    expected = match.reference(keys.float(), 1, 20, 1, rules(), None)
    assert all(torch.equal(*pair) for pair in zip(found[:4], expected[:4], strict=True))


def test_equal_tokens_match_in_order() -> None:
    keys = torch.ones(1, 1, 9, 4, device=DEVICE)
    found = match.match(keys, 1, 3, 1, rules())
    assert found.source.tolist() == [[2, 4, 6]] and found.destination.tolist() == [[1, 1, 1]]


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("order", ["grouped", "sequence"])
def test_numbers_that_are_none_give_some_valid_plan_and_leave_other_samples_alone(value: float, order: str) -> None:
    keys = torch.randn(3, 1, 18, 8, generator=torch.Generator().manual_seed(3)).to(DEVICE)
    clean = match.match(keys, 1, 6, 2, rules(order))
    keys[1, 0, 5] = value
    found = match.match(keys, 1, 6, 2, rules(order))
    assert all(torch.equal(a[0::2], b[0::2]) for a, b in zip(found, clean, strict=True))
    everything = torch.cat([found.source, found.kept], dim=1).sort(dim=1).values
    assert torch.equal(everything, torch.arange(18, device=DEVICE).expand(3, -1))
    assert (found.source >= 2).all() and (found.destination >= 2).all()
    assert torch.equal(found.kept.gather(1, found.target), found.destination)


def errors(dtype: torch.dtype, plan: merge.Plan, size: Tensor | None, weights: merge.Weights | None) -> None:
    """Compare tokens, sizes and gradients with the reference in float64, and with the reference's own error."""
    tokens = plan.kept.shape[1] + plan.source.shape[1]
    x = tokens_for(tokens, weights.channel.shape[1] if weights else 24).to(DEVICE, dtype)
    cast = None if weights is None else merge.Weights(*(t if t is None else t.to(dtype) for t in weights[:4]), 1e-5)
    assert checks.merge_problems(x, size, plan, cast, backward=True) == []


@pytest.mark.parametrize(("size", "trained"), list(itertools.product(SIZES, TRAINED)))
@pytest.mark.parametrize("dropping", [False, True])
def test_merges_as_the_reference(size: str, trained: str, dropping: bool) -> None:
    for tokens, prefix, channels in ((17, 1, 16), (16, 0, 8), (9, 2, 24)):
        for removed in {1, (tokens - prefix) // 2}:
            plan = to_device(plan_for(tokens, prefix, removed, dropping))
            counts = sizes(size, tokens)
            weights = weights_for(trained, removed, channels)
            errors(torch.float32, plan, None if counts is None else counts.to(DEVICE), to_device(weights))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("trained", ["plainly", "affine"])
def test_merges_in_half_precision(trained: str, dtype: torch.dtype) -> None:
    plan = to_device(plan_for(33, 1, 12))
    errors(dtype, plan, sizes("whole", 33).to(DEVICE), to_device(weights_for(trained, 12, 40)))


def to_device(parts):  # type: ignore[no-untyped-def]
    if parts is None:
        return None
    return type(parts)(*(part.to(DEVICE) if isinstance(part, Tensor) else part for part in parts))


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize(("tokens", "prefix", "entered"), [(197, 1, 400), (17, 1, 17), (2, 0, 300), (5, 1, 5)])
def test_follows_as_the_reference(tokens: int, prefix: int, entered: int, begun: bool) -> None:
    for removed in {0, (tokens - prefix) // 2}:
        plan = to_device(plan_for(tokens, prefix, removed))
        total = sizes("real", tokens).to(DEVICE)[:, : tokens - removed]
        generator = torch.Generator().manual_seed(7)
        earlier = torch.randint(0, tokens, (entered, 2), generator=generator).T.to(DEVICE)
        places = torch.randint(0, entered, (2, 2 * tokens), generator=generator)[:, ::2].to(DEVICE)
        arguments = (total, *((earlier, places) if begun else (None, None)), plan.kept, plan.source, plan.target)
        found, expected = follow.follow(*arguments), follow.reference(*arguments)
        for actual, value in zip(found, expected, strict=True):
            assert actual.dtype == value.dtype and torch.equal(actual, value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tokens", [1, 197, 600])
def test_takes_the_logarithm_of_sizes(tokens: int, dtype: torch.dtype) -> None:
    lowest = torch.finfo(dtype).min
    for kind in ("padding", "real"):
        size = sizes(kind, 2 * tokens).to(DEVICE)[:, ::2]
        found, exact = bias.bias(size, dtype, lowest), bias.reference(size.double(), torch.float64, lowest)
        assert checks.excess("size_bias", found, bias.reference(size, dtype, lowest), exact.clamp_min(lowest)) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("queries", "tokens", "dim"), [(1, 1, 64), (197, 197, 64), (65, 257, 72), (3, 31, 4), (64, 32, 128), (33, 70, 80)]
)
def test_attends_as_the_reference(queries: int, tokens: int, dim: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(tokens)
    query = torch.randn(2, queries, 3, dim, generator=generator).to(DEVICE, dtype).transpose(1, 2)
    key, value = (torch.randn(2, 3, tokens, dim, generator=generator).to(DEVICE, dtype) for _ in range(2))
    padded = sizes("padding", tokens)
    padded[:, -1] = 1
    for size in (sizes("whole", 2 * tokens)[:, ::2], padded, sizes("real", tokens)):
        for scale in (dim**-0.5, -0.3, 40.0):
            arguments = (query, key, value, size.to(DEVICE), scale)
            exact = attend.reference(query.double(), key.double(), value.double(), *arguments[3:])
            assert attend.takes(*arguments[:4], "triton")
            found = attend.attend(*arguments)
            assert checks.excess("attend_sizes", found, attend.reference(*arguments), exact) == []


@pytest.mark.parametrize("strides", STRIDES)
def test_attends_to_keys_of_any_strides(strides: str) -> None:
    query, key, value = (torch.randn(3, 2, 33, 16).to(DEVICE, torch.float16) for _ in range(3))
    size = sizes("whole", 33, batch=3).to(DEVICE)
    other = [STRIDES[strides](part) for part in (query, key, value)]
    expected = attend.attend(*(part.contiguous() for part in other), size, 0.25)
    assert torch.equal(attend.attend(*other, size, 0.25), expected)


def test_padding_alone_attends_to_nothing_and_what_is_no_number_stays_one() -> None:
    query, key, value = (torch.randn(2, 1, 40, 16).to(DEVICE, torch.bfloat16) for _ in range(3))
    size = torch.ones(2, 40, 1, dtype=torch.int32, device=DEVICE)
    size[0] = 0
    key[1, 0, 3] = torch.nan
    found = attend.attend(query, key, value, size, 0.25)
    assert not found[0].any() and found[1].isnan().all()
    size[1, 3] = 0
    assert attend.attend(query, key, value, size, 0.25).isfinite().all()


def test_models_attend_with_the_kernel_where_nothing_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    from pyra.attention import proportional
    from pyra.kernels import attend_triton

    ran = []
    kernel = attend_triton.attend_sizes
    monkeypatch.setattr(attend_triton, "attend_sizes", lambda *given: ran.append(1) or kernel(*given))
    query, key, value = (torch.randn(2, 3, 33, 16).to(DEVICE, torch.bfloat16) for _ in range(3))
    size = sizes("whole", 33).to(DEVICE)
    attention = torch.nn.functional.scaled_dot_product_attention
    fused = attention(query, key, value, attn_mask=proportional(size, torch.bfloat16, "fused"))
    assert len(ran) == 1
    masked = attention(query, key, value, attn_mask=proportional(size, torch.bfloat16, "mask"))
    torch.testing.assert_close(fused, masked, rtol=2e-2, atol=2e-2)
    bias = proportional(size, torch.bfloat16, "fused")
    attention(query.requires_grad_(), key, value, attn_mask=bias).sum().backward()  # the mask has gradients
    attention(query.detach(), key, value, attn_mask=bias, dropout_p=0.5)
    attention(query.detach().float(), key.float(), value.float(), attn_mask=bias)
    assert len(ran) == 1 and query.grad is not None


@pytest.mark.parametrize("strides", STRIDES)
def test_merges_tokens_of_any_strides(strides: str) -> None:
    plan, x = to_device(plan_for(17, 1, 6, batch=2)), STRIDES[strides](tokens_for(17, 16).to(DEVICE))
    weights = to_device(weights_for("affine", 6, 16))
    merged, total = torch.ops.pyra.merge_tokens(x, None, *plan, *weights, "triton")
    expected, _ = merge.reference(x, None, plan, weights)
    torch.testing.assert_close(merged, expected, rtol=1e-5, atol=1e-5)
    gradient = STRIDES[strides](torch.randn_like(merged))
    found = torch.ops.pyra.merge_tokens_backward(gradient, total, x, None, *plan, *weights, "triton")
    exact = merge.reference_backward(gradient, total, x, None, plan, weights)
    torch.testing.assert_close(list(found), list(exact), rtol=1e-4, atol=1e-4)


def test_a_dropped_token_that_is_no_number_reaches_nothing() -> None:
    plan = to_device(plan_for(17, 1, 6))
    plan = plan._replace(weight=torch.zeros(2, 6, device=DEVICE))
    x, weights = tokens_for(17, 16).to(DEVICE), to_device(weights_for("affine", 6, 16))
    x[torch.arange(2)[:, None], plan.source] = torch.nan
    merged, total = torch.ops.pyra.merge_tokens(x, None, *plan, *weights, "triton")
    gradients = torch.ops.pyra.merge_tokens_backward(merged, total, x, None, *plan, *weights, "triton")
    assert merged.isfinite().all() and all(gradient.isfinite().all() for gradient in gradients)


def test_a_dropped_token_receives_no_gradient_whatever_it_merges_with() -> None:
    plan = to_device(plan_for(17, 1, 6))
    plan = plan._replace(weight=torch.zeros(2, 6, device=DEVICE))
    x, weights = tokens_for(17, 16).to(DEVICE), to_device(weights_for("affine", 6, 16))
    x[torch.arange(2)[:, None], plan.destination] = torch.inf
    _, total = torch.ops.pyra.merge_tokens(x, None, *plan, *weights, "triton")
    found = torch.ops.pyra.merge_tokens_backward(
        torch.ones(2, 11, 16, device=DEVICE), total, x, None, *plan, *weights, "triton"
    )
    assert not found[0][torch.arange(2)[:, None], plan.source].any()


def test_sizes_in_float64_come_back_so() -> None:
    plan, x = to_device(plan_for(17, 1, 6)), tokens_for(17, 16).to(DEVICE)
    arguments = (x, sizes("whole", 17).double().to(DEVICE), *plan, None, None, None, None, 0.0)
    assert torch.ops.pyra.merge_tokens(*arguments, "triton")[1].dtype == torch.float64


def test_heads_far_apart() -> None:
    """Two heads 1.2e9 elements apart, of a tensor that takes no memory between them."""
    if DEVICE != "cpu":
        pytest.skip("memory that is asked for is taken on a GPU")
    far = torch.empty(5 * 600_000_000 + 17 * 8, dtype=torch.bfloat16)
    keys = far.as_strided((1, 5, 17, 8), (1, 600_000_000, 8, 1))
    keys.copy_(torch.randn(1, 5, 17, 8, generator=torch.Generator().manual_seed(0)))
    found, expected = match.match(keys, 1, 5, 1, rules()), match.reference(keys, 1, 5, 1, rules(), None)
    assert all(torch.equal(*pair) for pair in zip(found[:4], expected[:4], strict=True))


def test_an_empty_batch() -> None:
    x, plan = tokens_for(17, 16, batch=0).to(DEVICE), to_device(plan_for(17, 1, 6, batch=0))
    merged, total = torch.ops.pyra.merge_tokens(x, None, *plan, None, None, None, None, 0.0, "triton")
    assert merged.shape == (0, 11, 16) and total.shape == (0, 11, 1)
    none = torch.empty(0, 2, 17, 16, device=DEVICE, dtype=torch.bfloat16)
    assert attend.attend(none, none, none, torch.empty(0, 17, 1, device=DEVICE), 1.0).shape == none.shape


def test_the_public_functions_run_them_and_train() -> None:
    x = tokens_for(17, 16).to(DEVICE).requires_grad_()
    weights = Reactivation(6, 16).to(DEVICE)
    torch.nn.init.normal_(weights.channel_weight)
    assert runs_triton(x)
    outcomes = []
    for name in ("triton", "reference"):
        with backend(name):
            merged, _ = merge_tokens(x, None, match_tokens(x, 6), weights)
            outcomes.append((merged, *torch.autograd.grad(merged.square().sum(), [x, *weights.parameters()])))
    torch.testing.assert_close(*outcomes, rtol=1e-4, atol=1e-4)


def test_float64_is_refused() -> None:
    with pytest.raises(KernelError, match="float64"):
        match_tokens(torch.randn(1, 9, 4, device=DEVICE).double(), 2)
    assert PyraConfig(rate=0.5, backend="triton").backend == "triton"


@pytest.mark.parametrize("begun", [True, False])
@pytest.mark.parametrize("trained", [True, False])
def test_a_step_launched_at_once_is_the_step_of_operators(begun: bool, trained: bool) -> None:
    generator = torch.Generator().manual_seed(8)
    tokens, keys = (torch.randn(2, *shape, generator=generator).to(DEVICE) for shape in ((17, 16), (2, 17, 8)))
    weights = Reactivation(6, 16).to(DEVICE) if trained else None
    if weights is not None:
        torch.nn.init.normal_(weights.pair_weight)
        torch.nn.init.normal_(weights.channel_weight)
    size = sizes("whole", 17).to(DEVICE) if begun else None
    before = (torch.arange(17, device=DEVICE).expand(2, -1),) * 2 if begun else (None, None)
    for order in ("grouped", "sequence"):
        arguments = (tokens, size, *before, keys, 1, weights, 6, 1, rules(order))
        with torch.no_grad():
            found = merge_step(*arguments, scaled_gates=True)
        with_gradients = merge_step(tokens.clone().requires_grad_(), *arguments[1:], scaled_gates=True)
        with backend("reference"):
            expected = merge_step(*arguments, scaled_gates=True)
        for ours, operators, plain in zip(found, with_gradients, expected, strict=True):
            assert torch.equal(ours, operators)
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)
