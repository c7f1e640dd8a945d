"""Re-activation of prompts: the equations row by row, and weights that serve any number of pairs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pyra import Reactivation, merge_tokens
from pyra.prompt_matching import PromptPlan, match_prompt
from pyra.prompt_merging import merge_prompt, ranked


def plan_of(removed: list[int], tokens: int = 30, rule: str = "importance") -> PromptPlan:
    count = len(removed)
    prompt = torch.ones(count, tokens, dtype=torch.bool)
    scores = torch.rand(count, tokens, generator=torch.Generator().manual_seed(0))
    return match_prompt(scores, prompt, ~prompt, torch.tensor(removed), rule=rule, last=4)


def weights(channels: int, rows: int = 8) -> Reactivation:
    torch.manual_seed(0)
    made = Reactivation(rows, channels).double()
    torch.nn.init.normal_(made.channel_weight)
    torch.nn.init.normal_(made.norm.weight)
    return made


def by_hand(x: Tensor, size: Tensor, plan: PromptPlan, made: Reactivation) -> Tensor:
    """Modulate one source after the other."""
    out, indices = x.clone(), plan.plan
    for row, removed in enumerate(plan.removed.tolist()):
        pairs = list(zip(indices.source[row].tolist(), indices.destination[row].tolist(), strict=True))[:removed]
        info = [made.norm(x[row, s] * size[row, s] + x[row, d] * size[row, d]) for s, d in pairs]
        rows = [interpolated(made.pair_weight[:, 0], (rank + 0.5) / removed) for rank in range(removed)]
        delta = sum((weight * one for weight, one in zip(rows, info, strict=True)), torch.zeros(x.shape[2]))
        gate = 2 * torch.sigmoid(delta / max(removed, 1) ** 0.5)
        for (source, _), one in zip(pairs, info, strict=True):
            yielding = 2 * torch.sigmoid((one * made.channel_weight[0]).sum()) - 1
            out[row, source] = x[row, source] * (1 + yielding * gate)
    return out


def interpolated(rows: Tensor, share: float) -> Tensor:
    place = min(max(share * len(rows) - 0.5, 0), len(rows) - 1)
    below = int(place)
    return rows[below] + (rows[min(below + 1, len(rows) - 1)] - rows[below]) * (place - below)


@pytest.mark.parametrize("removed", [[12], [12, 3, 0], [25, 25], [1, 20]])
def test_sources_are_modulated_as_the_equations_say(removed: list[int]) -> None:
    plan, made = plan_of(removed), weights(6)
    x = torch.randn(len(removed), 30, 6, dtype=torch.float64)
    size = torch.randint(1, 4, (len(removed), 30, 1))
    merged, total = merge_prompt(x, size, plan, made)
    padded, sizes = plan.pad(x), plan.pad(size)
    expected, expected_size = merge_tokens(by_hand(padded, sizes, plan, made), sizes, plan.plan)
    assert torch.allclose(merged, expected, atol=1e-12)
    assert not torch.allclose(merged, merge_prompt(x, size, plan)[0], atol=1e-3)
    assert total.dtype == torch.int32 and torch.equal(total, expected_size.int())


def test_fresh_weights_change_nothing() -> None:
    plan, x = plan_of([12, 3]), torch.randn(2, 30, 6)
    size = torch.ones(2, 30, 1, dtype=torch.int32)
    assert torch.equal(merge_prompt(x, size, plan, Reactivation(64, 6))[0], merge_prompt(x, size, plan)[0])


def test_a_row_reads_its_own_length() -> None:
    rows = torch.arange(8.0)[:, None]
    both = ranked(rows, torch.tensor([16, 4]), 16)
    assert torch.allclose(both[1, :4], ranked(rows, torch.tensor([4]), 4)[0])
    assert torch.allclose(both[0] * 4, torch.linspace(-0.25, 7.25, 16).clamp(0, 7))


def test_gradients_reach_all_weights() -> None:
    plan, made = plan_of([12, 3]), weights(4)
    x = torch.randn(2, 30, 4, dtype=torch.float64, requires_grad=True)
    size = torch.ones(2, 30, 1)

    def run(x: Tensor, pair: Tensor, channel: Tensor) -> Tensor:
        parts = {"pair_weight": pair, "channel_weight": channel}
        return torch.func.functional_call(_Merge(made, plan, size), {f"made.{k}": v for k, v in parts.items()}, (x,))

    leaves = (x, made.pair_weight.detach().requires_grad_(), made.channel_weight.detach().requires_grad_())
    assert torch.autograd.gradcheck(run, leaves)


class _Merge(torch.nn.Module):
    def __init__(self, made: Reactivation, plan: PromptPlan, size: Tensor) -> None:
        super().__init__()
        self.made, self.plan, self.size = made, plan, size

    def forward(self, x: Tensor) -> Tensor:
        return merge_prompt(x, self.size, self.plan, self.made)[0]
