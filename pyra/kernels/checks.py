"""Whether Triton's kernels do on a device what the references do, on drawn data.

Every function returns what is wrong, one line a finding. Values are compared with a reference in float64: an error may
be twice the one that the plain functions make in the same precision. Plans are judged by what they are to be (valid,
and of the most similar pairs), since nearly equal similarities may order either way. Runs are repeated, and must not
differ by a bit.

Letters: ``B`` batch, ``N`` tokens, ``C`` channels, ``H`` heads, ``D`` head channels, ``r`` tokens removed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from pyra.kernels import attend, bias, follow, match, merge
from pyra.kernels.match import Matched, Rules
from pyra.kernels.merge import Plan, Weights

_SIMILARITY = 1e-5  # float32 cosines of a few hundred channels are this close to the exact ones
# Every loop of every kernel goes round more than once, and nothing is a power of two.
_TOKENS, _PREFIX, _HEADS, _WIDTH, _REMOVED = 251, 3, 3, 72, 100


def disagreement(device: torch.device) -> str | None:
    """Run every kernel, twice each, in float32, bfloat16 and float16; return the first thing wrong, or None.

    Random numbers are drawn from a generator of their own.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(device.type, enabled=False):
        try:
            return next(_findings(device), None)
        except Exception as error:  # whatever the compiler or the driver says: the plain functions still run
            return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _findings(device: torch.device) -> Iterator[str]:
    rules = Rules("grouped", "bipartite", 0.5, None, 1)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        keys, x, size, weights = drawn(2, _TOKENS, _HEADS, _WIDTH, _REMOVED, device, dtype)
        for order, prefix in (("grouped", _PREFIX), ("sequence", 2)):
            yield from match_problems(keys, _REMOVED, prefix, rules._replace(order=order))
        plan = Plan(*match.reference(keys, 1, _REMOVED, _PREFIX, rules, None)[:4], None)
        yield from merge_problems(x.mT.contiguous().mT, size, plan, weights, backward=True)  # of other strides
        yield from follow_problems(size, plan, dtype)
        if dtype != torch.float32:
            yield from attend_problems(keys, size)
        if dtype == torch.float32:
            yield from _odd_problems(keys, rules)
            yield from merge_problems(x, None, plan, None, backward=True)
        if dtype == torch.bfloat16:
            dropping = plan._replace(weight=(torch.arange(2 * _REMOVED, device=device).view(2, -1) % 3 > 0).float())
            fewer = weights._replace(pair=weights.pair[: _REMOVED // 2], norm_weight=None, norm_bias=None)
            yield from merge_problems(x, size, dropping, fewer, backward=True)


def _odd_problems(keys: Tensor, rules: Rules) -> list[str]:
    """Check that a similarity that is no number gives a valid plan, and another sample's is left alone."""
    odd = keys.clone()
    odd[1, :, 8] = torch.nan
    found, clean = (match.match(each, 1, _REMOVED, _PREFIX, rules, backend="triton") for each in (odd, keys))
    if not _same(tuple(part[0] for part in found), tuple(part[0] for part in clean)):
        return ["match_tokens: a sample that is no number changes another"]
    everything = torch.cat([found.source, found.kept], dim=1).sort(dim=1).values
    valid = torch.equal(everything, torch.arange(_TOKENS, device=keys.device).expand_as(everything))
    return [] if valid and int(found.source[1, 0]) == 8 else ["match_tokens: what is no number does not lead"]


def drawn(
    batch: int, tokens: int, heads: int, width: int, pairs: int, device: torch.device, dtype: torch.dtype, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, Weights]:
    """Draw keys [B, H, N, D], tokens [B, N, H * D], sizes [B, N, 1] int32 and re-activation weights for some pairs."""
    generator = torch.Generator("cpu").manual_seed(seed)
    channels = heads * width

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu").to(device, dtype)

    size = torch.randint(1, 5, (batch, tokens, 1), generator=generator, dtype=torch.int32, device="cpu").to(device)
    weights = Weights(normal(pairs, 1), 0.1 * normal(1, channels), 1 + 0.1 * normal(channels), normal(channels), 1e-5)
    # As an attention has them: views into one projection, [B, N, H, D] in memory.
    return normal(batch, tokens, heads, width).transpose(1, 2), normal(batch, tokens, channels), size, weights


def match_problems(keys: Tensor, r: int, prefix: int, rules: Rules, backend: str = "triton") -> list[str]:
    """Check bipartite matching of keys [B, H, N, D].

    Args:
        keys: of any strides.
        r: tokens to remove.
        prefix: leading tokens that take no part.
        rules: of the method ``"bipartite"``.
        backend: what is checked.
    """
    found = match.match(keys, 1, r, prefix, rules, backend=backend)
    again = match.match(keys, 1, r, prefix, rules, backend=backend)
    problems = [] if _same(found, again) else ["match_tokens: two runs differ"]
    tokens = keys.shape[2]
    positions = torch.arange(tokens, device=keys.device).expand(keys.shape[0], -1)
    everything = torch.cat([found.source, found.kept], dim=1).sort(dim=1).values
    if not torch.equal(everything, positions):
        return [*problems, "match_tokens: sources and kept tokens are not all tokens"]
    if not torch.equal(found.kept.gather(1, found.target), found.destination):
        return [*problems, "match_tokens: targets are not the rows of the destinations"]
    problems += _worse_pairs(keys, found, prefix)
    expected = _in_order(found, prefix, rules.order)
    return problems if torch.equal(found.kept, expected) else [*problems, f"match_tokens: order is not {rules.order}"]


def _worse_pairs(keys: Tensor, found: Matched, prefix: int) -> list[str]:
    """Compare the pairs with exact similarities: no better pair may have been left out."""
    unit = torch.nn.functional.normalize(keys.double().mean(dim=1), dim=-1)
    cosine = unit @ unit.transpose(1, 2)
    cosine[:, :prefix], cosine[:, :, :prefix] = -torch.inf, -torch.inf
    cosine[:, 1::2], cosine[:, :, ::2] = -torch.inf, -torch.inf  # even tokens propose to odd ones
    best = cosine.amax(dim=2)
    pair = cosine.gather(1, found.source[:, :, None].expand(-1, -1, keys.shape[2])).gather(
        2, found.destination[..., None]
    )
    pair = pair[..., 0]
    problems = []
    if not bool(((found.similarity - pair).abs() <= _SIMILARITY).all()):
        problems.append("match_tokens: similarities are not those of the pairs")
    if not bool((pair >= best.gather(1, found.source) - _SIMILARITY).all()):
        problems.append("match_tokens: a source has a more similar partner")
    if found.source.shape[1]:
        least = best.gather(1, found.source).amin(dim=1, keepdim=True)
        left = best.scatter(1, found.source, -torch.inf)
        if not bool((left <= least + _SIMILARITY).all()):
            problems.append("match_tokens: a more similar pair was left out")
    if not bool((found.similarity.diff(dim=1) <= 0).all()):
        problems.append("match_tokens: pairs are not in the order of their similarity")
    return problems


def _in_order(found: Matched, prefix: int, order: str) -> Tensor:
    """Return the kept tokens in the order they should have."""
    kept = found.kept.sort(dim=1).values
    if order == "sequence":
        return kept
    group = torch.where(kept < prefix, 0, 1 + kept % 2)  # prefix, even, odd
    return kept.gather(1, group.sort(dim=1, stable=True).indices)


def merge_problems(
    x: Tensor, size: Tensor | None, plan: Plan, weights: Weights | None, backward: bool, backend: str = "triton"
) -> list[str]:
    """Check merging of tokens ``x`` [B, N, C], and its gradients."""
    tensors = (None, None, None, None, 0.0) if weights is None else weights
    merged, total = torch.ops.pyra.merge_tokens(x, size, *plan, *tensors, backend)
    again = torch.ops.pyra.merge_tokens(x, size, *plan, *tensors, backend)
    problems = [] if _same((merged, total), again) else ["merge_tokens: two runs differ"]
    wide = (x.double(), _ones(x) if size is None else size.double(), doubled_plan(plan), doubled(weights))
    exact, exact_total = merge.reference(*wide)
    if not torch.equal(total.double(), exact_total):
        problems.append("merge_tokens: sizes are not the sums")
    problems += excess("merge_tokens", merged, merge.reference(x, size, plan, weights)[0], exact)
    if backward:
        gradient = torch.randn(merged.shape, generator=torch.Generator("cpu").manual_seed(1), device="cpu").to(x)
        inputs = (x, size, *plan, *tensors, backend)
        found = torch.ops.pyra.merge_tokens_backward(gradient, total, *inputs)
        if not _same(found, torch.ops.pyra.merge_tokens_backward(gradient, total, *inputs)):
            problems.append("merge_tokens_backward: two runs differ")
        eager = merge.reference_backward(gradient, total, x, size, plan, weights)
        values = merge.reference_backward(gradient.double(), exact_total, *wide)
        for name, *parts in zip(("x", *Weights._fields), found, eager, values, strict=False):
            problems += excess(f"merge_tokens_backward, {name}", *parts)
    return problems


def follow_problems(size: Tensor, plan: Plan, dtype: torch.dtype, backend: str = "triton") -> list[str]:
    """Check what follows sizes [B, N, 1] and places through a plan, and the bias of the sizes."""
    generator = torch.Generator("cpu").manual_seed(2)
    batch, tokens = size.shape[:2]
    total = size[:, : plan.kept.shape[1]].float()
    earlier = torch.randint(0, tokens, (batch, tokens + 9), generator=generator, device="cpu").to(size.device)
    places = torch.stack([torch.randperm(tokens + 9, generator=generator, device="cpu")[:tokens] for _ in range(batch)])
    problems = []
    for before in ((None, None), (earlier, places.to(size.device))):
        arguments = (total, *before, plan.kept, plan.source, plan.target)
        found = torch.ops.pyra.follow_tokens(*arguments, backend)
        if not _same(found, follow.reference(*arguments)):
            problems.append("follow_tokens: differs from the reference")
    lowest = torch.finfo(dtype).min
    size = size.repeat(1, 3, 1)  # more than one program takes
    padded = size * (torch.arange(3 * tokens, device=size.device) % 7 > 0)[None, :, None]
    exact = bias.reference(padded.double(), torch.float64, lowest)
    eager = bias.reference(padded, dtype, lowest)
    present = exact > lowest
    found = torch.ops.pyra.size_bias(padded, dtype, lowest, backend)
    if not torch.equal(found[~present], eager[~present]):
        problems.append("size_bias: padding is not the lowest number")
    return problems + excess("size_bias", found[present], eager[present], exact[present])


def attend_problems(key: Tensor, size: Tensor, backend: str = "triton") -> list[str]:
    """Check attention with sizes [B, N, 1], some of them padding, to keys [B, H, N, D] in half precision."""
    generator = torch.Generator("cpu").manual_seed(4)
    query, value = (torch.randn(key.shape, generator=generator, device="cpu").to(key) for _ in range(2))
    padded = size * (torch.arange(size.shape[1], device=size.device) % 7 > 0)[None, :, None]
    padded[:, : size.shape[1] // 2] *= 0  # the first tiles hold nothing else
    problems = []
    for sizes in (size, padded):
        arguments = (query, key, value, sizes, key.shape[-1] ** -0.5)
        found = torch.ops.pyra.attend_sizes(*arguments, backend)
        if not torch.equal(found, torch.ops.pyra.attend_sizes(*arguments, backend)):
            problems.append("attend_sizes: two runs differ")
        exact = attend.reference(query.double(), key.double(), value.double(), sizes, arguments[-1])
        problems += excess("attend_sizes", found, attend.reference(*arguments), exact)
    return problems


def excess(name: str, found: Tensor, eager: Tensor, exact: Tensor) -> list[str]:
    """Compare the largest error with twice that of the plain functions in the same precision.

    Args:
        name: what is compared.
        found: what a kernel returned.
        eager: what the plain functions return in the same precision.
        exact: what they return in float64.
    """
    if found.dtype != eager.dtype or found.shape != eager.shape:
        return [f"{name}: {found.dtype} {list(found.shape)} instead of {eager.dtype} {list(eager.shape)}"]
    if not exact.numel():
        return []
    largest = float(exact.abs().max())
    # In float32 both are exact to what sums of numbers of order 1 can be, which luck must not undercut.
    scale = 8 * (1 + largest) if found.dtype == torch.float32 else largest
    allowed = 2 * float((eager - exact).abs().max()) + scale * torch.finfo(found.dtype).eps
    error = float((found - exact).abs().max())
    return [] if error <= allowed else [f"{name}: error {error:.3g}, allowed {allowed:.3g}"]


def doubled(weights: Weights | None) -> Weights | None:
    """Return weights in float64."""
    if weights is None:
        return None
    scale, shift = (None if part is None else part.double() for part in weights[2:4])
    return Weights(weights.pair.double(), weights.channel.double(), scale, shift, weights.eps)


def doubled_plan(plan: Plan) -> Plan:
    """Return a plan whose weight is in float64."""
    return plan if plan.weight is None else plan._replace(weight=plan.weight.double())


def _ones(x: Tensor) -> Tensor:
    return torch.ones(*x.shape[:2], 1, device=x.device, dtype=torch.float64)


def _same(found: tuple[Tensor, ...], again: tuple[Tensor, ...]) -> bool:
    return all(torch.equal(*pair) for pair in zip(found, again, strict=True))
