"""Layers of visual prompts. Letters: ``B`` batch, ``N`` tokens, ``P`` prompts, ``C`` channels, ``L`` layers."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from pyra.adapters.prompts.config import VisualPromptsConfig
from pyra.backbones.layers import TokenStream
from pyra.errors import UnsupportedModelError


class VisualPrompts(nn.Module):
    """The prompts of all layers, [L, P, C]; ``L`` is 1 where they are shallow.

    Args:
        layers: ``L``.
        count: ``P``.
        dim: ``C``.
        fan: inputs of the patch projection: they start uniform in +-sqrt(6 / (fan + dim)), as published.
        prefix: tokens that stay before them.
        dropout: dropout on them.
    """

    def __init__(
        self, layers: int, count: int, dim: int, fan: int, prefix: int, dropout: float, **factory: Any
    ) -> None:
        super().__init__()
        self.visual_prompts = nn.Parameter(torch.empty(layers, count, dim, **factory))
        self.dropout = nn.Dropout(dropout)
        self.prefix = prefix
        bound = (6 / (fan + dim)) ** 0.5
        nn.init.uniform_(self.visual_prompts, -bound, bound)

    def insert(self, tokens: Tensor) -> Tensor:
        """Put the first layer's prompts behind the prefix: [B, N, C] -> [B, N + P, C]."""
        return torch.cat([tokens[:, : self.prefix], self._rows(0, tokens), tokens[:, self.prefix :]], dim=1)

    def replace(self, tokens: Tensor, layer: int) -> Tensor:
        """Put a layer's own prompts in the place of the earlier ones, [B, N, C]."""
        rows = self._rows(layer, tokens)
        return torch.cat([tokens[:, : self.prefix], rows, tokens[:, self.prefix + rows.shape[1] :]], dim=1)

    def current(self) -> VisualPrompts:
        """Return itself: prompts that are an ordinary part of a model are always in use."""
        return self

    def _rows(self, layer: int, tokens: Tensor) -> Tensor:
        rows: Tensor = self.dropout(self.visual_prompts[layer].expand(tokens.shape[0], -1, -1))
        return rows.to(tokens.dtype)

    def extra_repr(self) -> str:
        """Return the sizes shown in ``print(model)``."""
        layers, count, dim = self.visual_prompts.shape
        return f"layers={layers}, prompts={count}, dim={dim}, prefix={self.prefix}"


class _StandsFor(nn.Module):
    """A module in the place of another, whose attributes (class tokens, patch sizes) are found on it."""

    def _stood_for(self) -> nn.Module:
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base_layer", "module"):
                raise
            return getattr(self._stood_for(), name)


class PromptedTokens(_StandsFor):
    """Where the tokens come from, with prompts: what a folded :class:`PromptsLayer` becomes."""

    def __init__(self, module: nn.Module, prompts: VisualPrompts) -> None:
        super().__init__()
        self.module, self.prompts = module, prompts

    def _stood_for(self) -> nn.Module:
        return self.module

    @property
    def prompt_tokens(self) -> Tensor:
        """[1, P, C], the first layer's."""
        return self.prompts.visual_prompts[:1]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return [B, N + P, C]."""
        return self.prompts.insert(_tokens(self.module(*args, **kwargs)))


class PromptsLayer(_StandsFor, BaseTunerLayer):
    """Where the tokens come from, with the prompts of the one adapter that there may be.

    Prompts are no weights, so they cannot be folded: ``merge`` makes them an ordinary part of the base layer.

    Args:
        base_layer: gives the tokens [B, N, C].
        adapter_name: of the adapter.
        prompts: its prompts.
        core: the image encoder; a timm model counts its prefix tokens itself.
        blocks: the layers that get prompts of their own.
    """

    base_layer: Any  # what follows comes from peft, which has no annotations
    prompt_layers: nn.ModuleDict
    set_adapter: Any
    active_adapters: Any
    adapter_layer_names = ("prompt_layers",)

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        prompts: VisualPrompts,
        config: VisualPromptsConfig,
        core: nn.Module,
        blocks: Iterable[nn.Module],
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.prompt_layers = nn.ModuleDict({adapter_name: prompts})
        self._active_adapter = adapter_name
        self.merged_adapters: list[str] = []
        self._core = (core,)  # in a tuple: no child, but copied and pickled along
        self._deep = tuple(blocks)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)
        self._count(1)
        _hook(self._deep, self, self)

    def _stood_for(self) -> nn.Module:
        inner: nn.Module = self.base_layer
        return inner

    @property
    def prompt_tokens(self) -> Tensor | None:
        """[1, P, C], the first layer's; None while switched off."""
        prompts = self.current()
        return None if prompts is None else prompts.visual_prompts[:1]

    def current(self) -> VisualPrompts | None:
        """Return the prompts in use."""
        names = [name for name in self.active_adapters if name in self.prompt_layers]
        if self.disable_adapters or not names:
            return None
        prompts: Any = self.prompt_layers[names[0]]
        return prompts

    def enable_adapters(self, enabled: bool) -> None:
        """Switch the prompts on or off."""
        before = self.current()
        super().enable_adapters(enabled)
        if (before is None) != (self.current() is None):
            self._count(-1 if before is not None else 1)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Make the prompts a part of the base layer."""
        for name in check_adapters_to_merge(self, adapter_names):
            prompts: Any = self.prompt_layers[name]
            self.base_layer = PromptedTokens(self.base_layer, prompts)
            _hook(self._deep, self, prompts)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Undo :meth:`merge`."""
        while self.merged_adapters:
            self.merged_adapters.pop()
            _hook(self._deep, self.base_layer.prompts, self)
            self.base_layer = self.base_layer.module

    def detach(self) -> None:
        """Leave the encoder without prompts."""
        if self.current() is not None:
            self._count(-1)
        _hook(self._deep, self, None)

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Return [B, N + P, C]."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        tokens = self.base_layer(*args, **kwargs)
        prompts = None if self.merged else self.current()
        return tokens if prompts is None else prompts.insert(_tokens(tokens))

    def _count(self, sign: int) -> None:
        (core,) = self._core
        if hasattr(core, "num_prefix_tokens"):
            prompts: Any = next(iter(self.prompt_layers.values()))
            core.num_prefix_tokens += sign * prompts.visual_prompts.shape[1]


def _hook(blocks: Iterable[nn.Module], old: nn.Module, new: PromptsLayer | VisualPrompts | None) -> None:
    """Have ``new`` instead of ``old`` replace the prompts that enter each of the blocks, the second layer's first."""
    for layer, block in enumerate(blocks, start=1):
        hooks = block._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if getattr(hook, "args", (None,))[0] is old]:
            del hooks[key]
        if new is not None:
            block.register_forward_pre_hook(functools.partial(_replace_prompts, new, layer))


def _replace_prompts(
    owner: PromptsLayer | VisualPrompts, layer: int, _module: nn.Module, args: tuple[Any, ...]
) -> tuple[Any, ...] | None:
    """Replace the prompts in what enters a layer (a forward pre-hook)."""
    prompts = owner.current()
    if prompts is None:
        return None
    entering, *rest = args
    if isinstance(entering, TokenStream):
        return entering.holding(prompts.replace(entering.tokens, layer)), *rest
    return prompts.replace(entering, layer), *rest


def _tokens(found: Any) -> Tensor:
    if isinstance(found, Tensor) and found.ndim == 3:
        return found
    raise UnsupportedModelError(f"visual prompts need tokens [B, N, C] to stand among, found {type(found).__name__}")
