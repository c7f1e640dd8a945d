"""Layers of the bottleneck adapter. Letters: ``C`` channels, ``W`` adapter width."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from pyra.adapters.bottleneck.config import BottleneckConfig


class Bottleneck(nn.Module):
    """``h + up(quickgelu(down(h)))`` on [..., C], quickgelu(a) = a * sigmoid(1.702 a); the identity at the start."""

    def __init__(self, dim: int, width: int, dropout: float, **factory: Any) -> None:
        super().__init__()
        self.down = nn.Linear(dim, width, **factory)
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(width, dim, **factory)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, h: Tensor) -> Tensor:
        """Adapt ``h`` [..., C]."""
        hidden = self.down(h)
        adapted: Tensor = h + self.up(self.dropout(hidden * (1.702 * hidden).sigmoid()))
        return adapted


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """An adapted module: the base layer followed by the active bottlenecks.

    The bottleneck is not linear, so it cannot be folded into the weights before it: ``merge`` makes it an ordinary
    part of the base layer instead, with equal outputs.
    """

    base_layer: Any  # what follows comes from peft, which has no annotations
    bottleneck_layers: nn.ModuleDict
    _move_adapter_to_device_of_base_layer: Any
    set_adapter: Any
    active_adapters: Any
    adapter_layer_names = ("bottleneck_layers",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: BottleneckConfig) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_layers = nn.ModuleDict()
        self._active_adapter = adapter_name
        self.merged_adapters: list[str] = []
        self.update_layer(adapter_name, config)

    def update_layer(self, adapter_name: str, config: BottleneckConfig) -> None:
        """Add the bottleneck of one more adapter."""
        modules: list[Any] = list(self.base_layer.modules())
        weights = [m for m in modules if hasattr(m, "out_features") and hasattr(m, "weight")]
        if not weights:
            raise ValueError(f"{type(self.base_layer).__name__} has no linear layer that gives its output width")
        last = weights[-1]
        bottleneck = Bottleneck(int(last.out_features), config.width, config.dropout)
        self.bottleneck_layers[adapter_name] = bottleneck
        self._move_adapter_to_device_of_base_layer(adapter_name, device=last.weight.device)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Make the named (default: active) adapters a part of the base layer."""
        for name in check_adapters_to_merge(self, adapter_names):
            self.base_layer = nn.Sequential(self.base_layer, self.bottleneck_layers[name])
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Undo :meth:`merge`."""
        while self.merged_adapters:
            self.merged_adapters.pop()
            self.base_layer = self.base_layer[0]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the base layer and the active bottlenecks on ``x`` [..., C]."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if not self.disable_adapters and not self.merged:
            for name in self.active_adapters:
                if name in self.bottleneck_layers:
                    result = self.bottleneck_layers[name](result)
        return result
