"""``delta_D`` over the root of the number of pairs: the published sum with smaller weights, everywhere alike."""

from __future__ import annotations

import copy

import pytest
import torch
from backbone_families import FAMILIES, build, result, run, trained
from torch import nn

from pyra import PyraConfig, Reactivation, match_tokens, merge_tokens, wrap
from pyra.backbones import merging_layers
from pyra.errors import ConfigError


def drawn(rows: int) -> tuple[torch.Tensor, Reactivation]:
    generator = torch.Generator().manual_seed(0)
    weights = Reactivation(rows, 16).double()
    with torch.no_grad():
        weights.channel_weight.copy_(torch.randn(1, 16, generator=generator))
        weights.pair_weight.copy_(torch.randn(rows, 1, generator=generator))
    return torch.randn(2, 41, 16, generator=generator).double(), weights


@pytest.mark.parametrize(("rows", "counted"), [(9, 9), (20, 9), (4, 4)])
def test_scaled_is_published_with_smaller_weights(rows: int, counted: int) -> None:
    x, weights = drawn(rows)
    plan, smaller = match_tokens(x, 9), copy.deepcopy(weights)
    with torch.no_grad():
        smaller.pair_weight /= counted**0.5
    found, size = merge_tokens(x, None, plan, weights, scaled_gates=True)
    expected, same = merge_tokens(x, None, plan, smaller)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(size, same) and not torch.allclose(found, merge_tokens(x, None, plan, weights)[0])


@pytest.mark.slow  # compiles each model
@pytest.mark.parametrize("family", ["timm-average", "hf-dinov2"])
def test_in_models_eager_and_compiled(family: str) -> None:
    inputs, found = FAMILIES[family].inputs(), []
    for scaled in (True, False):
        model = trained(wrap(build(family), PyraConfig(rate=0.4, scaled_gates=scaled)))
        if not scaled:
            with torch.no_grad():
                for layer in merging_layers(model):
                    layer.reactivation.pair_weight /= layer.step.removed**0.5
        torch.compiler.reset()
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        outcome = result(run(model, inputs))
        torch.testing.assert_close(result(run(compiled, inputs)), outcome, rtol=1e-4, atol=1e-5)
        gradient = torch.autograd.grad(outcome.square().sum(), next(merging_layers(model)).reactivation.channel_weight)
        found.append((outcome.detach(), *gradient))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_fewer_gates_start_saturated() -> None:
    """At 40 pairs, as in the first layer of ViT-B at the high schedule."""
    torch.manual_seed(0)
    info, weights = torch.randn(8, 40, 768), nn.init.uniform_(torch.empty(40, 1), -1, 1)
    delta = (weights.T @ info).abs()
    assert (delta > 2).float().mean() > 0.5 and (delta / 40**0.5 > 2).float().mean() < 0.01


def test_configuration() -> None:
    assert PyraConfig.from_dict(PyraConfig(rate=0.5, scaled_gates=True).to_dict()).scaled_gates
    with pytest.raises(ConfigError, match="scaled_gates scales what reactivation=False leaves out"):
        PyraConfig(rate=0.5, scaled_gates=True, reactivation=False)
