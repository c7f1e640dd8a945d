"""The bottleneck adapter: what it computes, after the MLP and beside it."""

from __future__ import annotations

import peft
import pytest
import torch
from torch import Tensor, nn

from pyra.adapters import BottleneckConfig
from pyra.adapters.bottleneck import BottleneckLayer
from pyra.errors import ConfigError


class Model(nn.Module):
    """An MLP whose output is wider than its input."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 7))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


def adapted(**options: object) -> tuple[peft.PeftModel, BottleneckLayer]:
    torch.manual_seed(0)
    model = peft.get_peft_model(Model(), BottleneckConfig(width=3, **options)).eval()
    layer = model.get_base_model().mlp
    assert isinstance(layer, BottleneckLayer)
    return model, layer


@pytest.mark.parametrize("placement", ["after", "parallel"])
def test_it_starts_as_the_identity_and_computes_its_equation(placement: str) -> None:
    model, layer = adapted(placement=placement, scale=0.25)
    x = torch.randn(2, 5, 6)
    h = layer.base_layer(x)
    assert torch.equal(model(x), h)
    adapter = layer.bottleneck_layers["default"]
    for parameter in adapter.parameters():
        nn.init.normal_(parameter)
    if placement == "after":
        hidden = h @ adapter.down.weight.T + adapter.down.bias
        expected = h + (hidden * torch.sigmoid(1.702 * hidden)) @ adapter.up.weight.T + adapter.up.bias
    else:
        hidden = (x @ adapter.down.weight.T + adapter.down.bias).clamp(min=0)
        expected = h + 0.25 * (hidden @ adapter.up.weight.T + adapter.up.bias)
    torch.testing.assert_close(model(x), expected)
    with model.disable_adapter():
        assert torch.equal(model(x), h)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    assert type(layer.base_layer) is nn.Sequential
    torch.testing.assert_close(model(x), expected)
    folded = model.merge_and_unload()
    torch.testing.assert_close(folded(x), expected)
    assert not any(isinstance(module, BottleneckLayer) for module in folded.modules())


def test_two_adapters_in_their_order() -> None:
    model, layer = adapted(placement="parallel")
    model.add_adapter("more", BottleneckConfig(width=2))
    model.base_model.set_adapter(["default", "more"])
    for parameter in layer.bottleneck_layers.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(4, 6)
    expected = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), expected)


@pytest.mark.parametrize(
    ("wrong", "problem"),
    [
        (
            {"placement": "paralel"},
            r"placement must be one of after, parallel, got 'paralel' \(did you mean 'parallel'",
        ),
        ({"scale": 0.0}, "scale must be a finite number other than 0"),
        ({"scale": float("inf")}, "scale must be"),
        ({"width": 0, "placement": "before"}, "width must be positive.*; placement must be"),
    ],
)
def test_wrong_settings(wrong: dict[str, object], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        BottleneckConfig(**wrong)
