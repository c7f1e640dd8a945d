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
        hidden = self.down(h.to(self.down.weight.dtype))  # peft keeps an adapter in float32 beside a 16-bit backbone
        adapted: Tensor = h + self.up(self.dropout(hidden * (1.702 * hidden).sigmoid())).to(h.dtype)
        return adapted


class ParallelBottleneck(nn.Module):
    """``scale * up(relu(down(x)))`` on the input [..., C] of a module, zero at the start; see :class:`Beside`."""

    def __init__(self, dim: int, out: int, width: int, dropout: float, scale: float, **factory: Any) -> None:
        super().__init__()
        self.down = nn.Linear(dim, width, **factory)
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(width, out, **factory)
        self.scale = scale
        nn.init.kaiming_uniform_(self.down.weight, a=5**0.5)  # as in AdaptFormer
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Return what is added to the module's output for its input ``x`` [..., C]."""
        hidden = self.down(x.to(self.down.weight.dtype)).relu()
        added: Tensor = (self.scale * self.up(self.dropout(hidden))).to(x.dtype)
        return added

    def extra_repr(self) -> str:
        """Return what is shown in ``print(model)``."""
        return f"scale={self.scale}"


class Beside(nn.Module):
    """A module and what stands beside it, both on the same input: their sum."""

    def __init__(self, module: nn.Module, bottleneck: nn.Module) -> None:
        super().__init__()
        self.module, self.bottleneck = module, bottleneck

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run both on ``x`` [..., C]."""
        summed: Tensor = self.module(x, *args, **kwargs) + self.bottleneck(x)
        return summed


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """An adapted module: the base layer followed by the active bottlenecks, or with them beside it.

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
        first, last = weights[0], weights[-1]
        bottleneck: nn.Module
        if config.placement == "parallel":
            dims = int(first.in_features), int(last.out_features)
            bottleneck = ParallelBottleneck(*dims, config.width, config.dropout, config.scale)
        else:
            bottleneck = Bottleneck(int(last.out_features), config.width, config.dropout)
        self.bottleneck_layers[adapter_name] = bottleneck
        self._move_adapter_to_device_of_base_layer(adapter_name, device=last.weight.device)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Make the named (default: active) adapters a part of the base layer."""
        for name in check_adapters_to_merge(self, adapter_names):
            bottleneck = self.bottleneck_layers[name]
            around = Beside if isinstance(bottleneck, ParallelBottleneck) else nn.Sequential
            self.base_layer = around(self.base_layer, bottleneck)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Undo :meth:`merge`."""
        while self.merged_adapters:
            self.merged_adapters.pop()
            self.base_layer = next(self.base_layer.children())

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Run the base layer and the active bottlenecks on ``x`` [..., C]."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        result: Tensor = self.base_layer(x, *args, **kwargs)
        if not self.disable_adapters and not self.merged:
            for name in self.active_adapters:
                if name in self.bottleneck_layers:
                    bottleneck = self.bottleneck_layers[name]
                    beside = isinstance(bottleneck, ParallelBottleneck)
                    result = result + bottleneck(x) if beside else bottleneck(result)
        return result
